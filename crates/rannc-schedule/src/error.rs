//! What can be wrong with a pipeline, a batch or a program.

use thiserror::Error;

use crate::{RankId, ScheduleKind};

/// A step that cannot be scheduled, or a program that would not do it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ScheduleError {
    /// The pipeline contradicts itself.
    #[error("the pipeline is not valid: {place}: {problem}")]
    BadPipeline {
        /// The stage, value or group.
        place: String,
        /// What does not hold.
        problem: String,
    },
    /// The batch is for another number of ranks.
    #[error("the batch has rows for {found} ranks, but the pipeline has {needed}")]
    RankCount {
        /// The ranks of the batch.
        found: usize,
        /// The ranks of the pipeline.
        needed: u32,
    },
    /// No microbatch, or absurdly many.
    #[error("the batch is cut into {found} microbatches, needed 1 to {limit}")]
    Microbatches {
        /// The number asked for.
        found: u64,
        /// The most there may be.
        limit: u64,
    },
    /// No row on any rank, or absurdly many.
    #[error("the batch has {found} rows, needed 1 to {limit}")]
    RowCount {
        /// The rows of all ranks.
        found: u64,
        /// The most there may be.
        limit: u64,
    },
    /// Inputs are not gathered, but a rank other than 0 brings rows.
    #[error("rank {rank} brings {rows} rows, but only rank 0's count when inputs are not gathered")]
    ForeignRows {
        /// The rank.
        rank: RankId,
        /// Its rows.
        rows: u64,
    },
    /// More tensors than can be numbered.
    #[error("the step has up to {slots} tensors in assembly, needed fewer than {limit}")]
    TooLarge {
        /// Places x microbatches x values.
        slots: u64,
        /// The limit.
        limit: u32,
    },
    /// The schedule runs backward before the caller can supply this gradient.
    #[error(
        "schedule `{schedule}` needs a model that returns nothing but its loss, \
         but a gradient flows back from output value {value}"
    )]
    GradientFromOutside {
        /// The schedule.
        schedule: ScheduleKind,
        /// The output.
        value: u32,
    },
    /// A rank whose cores are shared in two ways.
    #[error("rank {rank} shares its cores in two groups, or is none of {world_size}")]
    SharedTwice {
        /// The rank.
        rank: u32,
        /// How many there are.
        world_size: u32,
    },
    /// Text that is not an action.
    #[error("`{text}` is not an action: {problem}")]
    ParseAction {
        /// The text.
        text: String,
        /// What was found and what was needed.
        problem: String,
    },
    /// A program that would hang or compute something else.
    #[error("the program is not valid: rank {rank}, step {step} of {pass}: {problem}\n{grid}")]
    Rejected {
        /// The rank whose list is wrong.
        rank: RankId,
        /// The position in its list.
        step: usize,
        /// `forward` or `backward`.
        pass: &'static str,
        /// What does not hold.
        problem: String,
        /// The lists around the place, the place marked.
        grid: String,
    },
    /// A program that leaves out something that must happen.
    #[error("the program is not valid: {problem}\n{grid}")]
    Incomplete {
        /// What is missing.
        problem: String,
        /// The lists.
        grid: String,
    },
}

impl ScheduleError {
    /// What the reader can do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Microbatches { .. } | Self::TooLarge { .. } => {
                Some("choose another number of microbatches".into())
            }
            Self::RowCount { found: 0, .. } => {
                Some("skip the step when no rank has any rows".into())
            }
            Self::ForeignRows { .. } => {
                Some("let every rank bring its own rows with `gather_inputs=True`".into())
            }
            Self::GradientFromOutside { .. } => Some(format!(
                "use schedule `{}`, or let the model return its loss only",
                ScheduleKind::FillDrain
            )),
            Self::Rejected { .. } | Self::Incomplete { .. } => Some(
                "this is a defect of the scheduler: please report it with the plan file".into(),
            ),
            Self::BadPipeline { .. }
            | Self::RankCount { .. }
            | Self::RowCount { .. }
            | Self::SharedTwice { .. }
            | Self::ParseAction { .. } => None,
        }
    }
}
