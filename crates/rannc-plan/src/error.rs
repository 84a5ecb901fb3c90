//! What can be wrong with a plan, its file, or the wish for one.

use std::path::PathBuf;

use rannc_cost::CostError;
use rannc_partition::PartitionError;
use rannc_schedule::ScheduleError;
use thiserror::Error;

/// Why there is no plan, or why this plan cannot be used here.
#[derive(Debug, Error)]
pub enum PlanError {
    /// The file is not there, or cannot be read or written.
    #[error("cannot {action} the deployment file `{path}`: {source}")]
    Io {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is not JSON of the plan's form; a truncated file ends here.
    #[error("the deployment file{} is damaged or incomplete: {source}", place(.path.as_ref()))]
    Parse {
        /// The file, where there is one.
        path: Option<PathBuf>,
        /// What the JSON reader found, with line and column.
        source: serde_json::Error,
    },
    /// The file says it is something else.
    #[error("the deployment file has format `{found}`, needed `{needed}`")]
    Format {
        /// The format that the file names.
        found: String,
        /// The format this version reads.
        needed: &'static str,
    },
    /// The plan was made for another model.
    #[error(
        "the deployment belongs to another model: it was made for `{plan_model}` \
         ({plan_identity}), but this is `{model}` ({identity})"
    )]
    OtherModel {
        /// The class that the plan names.
        plan_model: String,
        /// The model that the plan was made for.
        plan_identity: String,
        /// The class at hand.
        model: String,
        /// The model at hand.
        identity: String,
    },
    /// The plan was made for another number of processes.
    #[error(
        "the deployment was made for {planned} processes, but {running} {} running",
        if *.running == 1 { "is" } else { "are" }
    )]
    OtherWorld {
        /// How many the plan uses.
        planned: u32,
        /// How many there are.
        running: u32,
    },
    /// The plan contradicts itself or the graph.
    #[error("the deployment is not valid: {problem}")]
    Invalid {
        /// What does not hold, and where.
        problem: String,
    },
    /// The schedule runs backwards before the caller can give the gradients of the results.
    #[error(
        "schedule `{schedule}` needs a model that returns its loss as the only result with a gradient, \
         but this one returns {found} such results"
    )]
    NeedsLoss {
        /// The schedule that was asked for.
        schedule: rannc_cost::ScheduleKind,
        /// Results that a gradient flows through.
        found: usize,
    },
    /// The partitioner found none.
    #[error(transparent)]
    Partition(#[from] PartitionError),
    /// The costs are unusable.
    #[error(transparent)]
    Cost(#[from] CostError),
    /// The schedule broke a rule; always a bug of ours.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
}

fn place(path: Option<&PathBuf>) -> String {
    path.map_or_else(String::new, |path| format!(" `{}`", path.display()))
}

impl PlanError {
    /// What the reader can do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Io { action: "read", .. } => {
                Some("name a file that `save_deployment` wrote".into())
            }
            Self::Io { .. } => Some("name a file in a folder that exists and is writable".into()),
            Self::Parse { .. } | Self::Format { .. } => {
                Some("save the deployment again, or plan without `load_deployment`".into())
            }
            Self::OtherModel { .. } => {
                Some("load the deployment of this model, or plan without `load_deployment`".into())
            }
            Self::OtherWorld { planned, .. } => Some(format!(
                "start {planned} processes, or plan without `load_deployment` for these; `rannc plan \
                 --from` adapts a deployment"
            )),
            Self::NeedsLoss { .. } => {
                Some("let the model return its loss only, or use the schedule `fill_drain`".into())
            }
            Self::Invalid { .. } => Some("correct the file, or plan without it".into()),
            Self::Partition(source) => source.help(),
            Self::Cost(source) => source.help(),
            Self::Schedule(_) => None,
        }
    }
}
