//! All forwards, then all backwards, microbatch after microbatch (`GPipe`).
//!
//! ```text
//! stage 0 | F0 F1 F2 .  .  | .  .  B0 B1 B2
//! stage 1 | .  F0 F1 F2 .  | .  B0 B1 B2 .
//! stage 2 | .  .  F0 F1 F2 | B0 B1 B2 .  .
//! ```
//!
//! Between the two the outputs are with the caller, who may do anything with them. All microbatches are
//! in flight at once.

use super::Step;
use crate::Pipeline;

/// The forwards of each stage.
pub(super) fn forward(pipeline: &Pipeline, microbatches: &[u32]) -> Vec<Vec<Step>> {
    let steps: Vec<Step> = microbatches.iter().map(|&index| Step::forward(index)).collect();
    vec![steps; pipeline.stages.len()]
}

/// The backwards of each stage.
pub(super) fn backward(pipeline: &Pipeline, microbatches: &[u32]) -> Vec<Vec<Step>> {
    let steps: Vec<Step> = microbatches.iter().map(|&index| Step::backward(index)).collect();
    let stages = pipeline.stages.iter();
    stages.map(|stage| if stage.backward { steps.clone() } else { Vec::new() }).collect()
}
