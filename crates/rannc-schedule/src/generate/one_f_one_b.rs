//! Backward of a microbatch as soon as its gradient is there (PipeDream-flush, 1F1B).
//!
//! ```text
//! stage 0 | F0 F1 F2 .  .  B0 F3 .  B1 .  B2 .  B3
//! stage 1 | .  F0 F1 .  B0 F2 .  B1 F3 B2 .  B3 .
//! stage 2 | .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .  .
//! ```
//!
//! A stage starts with as many forwards as there are stages after it, then alternates. So no more
//! microbatches are in flight on a stage than there are stages from it to the end.

use super::Step;
use crate::Pipeline;

/// The steps of each stage.
pub(super) fn steps(pipeline: &Pipeline, microbatches: &[u32]) -> Vec<Vec<Step>> {
    let num_stages = pipeline.stages.len();
    let stages = pipeline.stages.iter().enumerate();
    let steps = stages.map(|(index, stage)| {
        if stage.backward {
            alternate(microbatches, num_stages - 1 - index)
        } else {
            microbatches.iter().map(|&microbatch| Step::forward(microbatch)).collect()
        }
    });
    steps.collect()
}

/// Keeps the backwards `ahead` microbatches behind the forwards.
fn alternate(microbatches: &[u32], ahead: usize) -> Vec<Step> {
    let ahead = ahead.min(microbatches.len());
    let (first, later) = microbatches.split_at(ahead);
    let mut steps: Vec<Step> = first.iter().map(|&index| Step::forward(index)).collect();
    for (index, &microbatch) in microbatches.iter().enumerate() {
        steps.extend(later.get(index).map(|&next| Step::forward(next)));
        steps.push(Step::backward(microbatch));
    }
    steps
}
