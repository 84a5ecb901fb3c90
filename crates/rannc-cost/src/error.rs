//! What can be wrong with a profile, a cluster or a schedule's name.

use thiserror::Error;

/// A cost input that cannot be used.
#[derive(Debug, Error)]
pub enum CostError {
    /// A schedule name that nobody knows.
    #[error("there is no schedule `{found}`")]
    UnknownSchedule {
        /// The name as given.
        found: String,
    },
}

impl CostError {
    /// What the reader can do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::UnknownSchedule { .. } => Some("use `fill_drain` or `1f1b`".into()),
        }
    }
}
