//! Why a graph cannot be divided as asked, and what is wrong with a division made by hand.

use rannc_cost::Sharding;
use thiserror::Error;

/// A change with which something fits, everything else staying as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Let the planner compute parts of the model again in backward.
    Recompute,
    /// Let the replicas of a stage divide state up to this level.
    Sharding(Sharding),
    /// So many devices, more like the last one.
    Devices(usize),
    /// So many bytes for each device to use.
    Memory(u64),
    /// A global batch of so many rows.
    Batch(u64),
    /// Let the planner choose stages, replicas and microbatches.
    Unforced,
}

impl std::fmt::Display for Remedy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Recompute => f.write_str("allow recompute"),
            Self::Sharding(level) => write!(f, "allow sharding up to `{level}`"),
            Self::Devices(count) => write!(f, "use {count} devices"),
            Self::Memory(bytes) => write!(f, "let each device use {}", Bytes(*bytes)),
            Self::Batch(rows) => write!(f, "use a batch of {rows} rows"),
            Self::Unforced => {
                f.write_str("let the planner choose stages, replicas and microbatches")
            }
        }
    }
}

/// A division that cannot be found or does not hold.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PartitionError {
    /// Options that contradict themselves.
    #[error("the planner cannot use its options: {problem}")]
    Options {
        /// What was found and what was needed.
        problem: String,
    },
    /// More stages than operators.
    #[error(
        "{num_stages} stages were asked for, but the model divides into {num_atoms} parts at most"
    )]
    TooFewOperators {
        /// Stages asked for.
        num_stages: usize,
        /// Parts that cannot be divided further.
        num_atoms: usize,
    },
    /// More stages times replicas than devices.
    #[error(
        "{num_stages} stages of {num_replicas} replicas need {} devices, but there are {num_devices}",
        num_stages.saturating_mul(*num_replicas)
    )]
    TooFewDevices {
        /// Stages asked for, or 1.
        num_stages: usize,
        /// Replicas asked for, or 1.
        num_replicas: usize,
        /// Devices to plan for.
        num_devices: usize,
    },
    /// More microbatches times replicas than rows.
    #[error(
        "{microbatches} microbatches over {num_replicas} replicas need {needed} rows, \
         but the batch has {batch_rows}",
        needed = microbatches.saturating_mul(*num_replicas as u64)
    )]
    TooFewRows {
        /// Microbatches asked for, or the fewest allowed.
        microbatches: u64,
        /// Replicas asked for, or 1.
        num_replicas: usize,
        /// Rows of the batch.
        batch_rows: u64,
    },
    /// Microbatches or replicas of a model that needs its whole batch at once.
    #[error(
        "{microbatches} microbatches and {num_replicas} replicas were asked for, \
         but the batch of this model cannot be split: {reason}"
    )]
    NotSplittable {
        /// Microbatches asked for, or 1.
        microbatches: u64,
        /// Replicas asked for, or 1.
        num_replicas: usize,
        /// Why not.
        reason: String,
    },
    /// No division keeps every stage within memory.
    #[error(
        "no partition fits: at best {stage} needs {} but a device has {}",
        Bytes(*needed_bytes),
        Bytes(*limit_bytes)
    )]
    DoesNotFit {
        /// What the largest stage needs in the division that needs least.
        needed_bytes: u64,
        /// What a device offers.
        limit_bytes: u64,
        /// That stage, for a person.
        stage: String,
        /// What would help, each by itself.
        remedies: Vec<Remedy>,
    },
    /// An operator that no stage runs.
    #[error("operator `{node}` is in no stage")]
    Missing {
        /// The operator's key.
        node: String,
    },
    /// An operator that depends on the batch and is in two stages.
    #[error("operator `{node}` is in stage {first} and in stage {second}, but must run once")]
    Twice {
        /// The operator's key.
        node: String,
        /// The first stage that has it.
        first: usize,
        /// Another one.
        second: usize,
    },
    /// A value that would flow from a later to an earlier stage.
    #[error("operator `{node}` in stage {stage} reads `{value}`, which stage {from} makes later")]
    Backwards {
        /// The reading operator's key.
        node: String,
        /// Its stage.
        stage: usize,
        /// The value's name.
        value: String,
        /// The stage that makes it.
        from: usize,
    },
    /// Operators that share memory which one of them writes to.
    #[error(
        "operators `{first}` and `{second}` are in stages {first_stage} and {second_stage}, \
         but share memory that one of them writes to"
    )]
    SharedMemory {
        /// An operator's key.
        first: String,
        /// Its stage.
        first_stage: usize,
        /// Another operator's key.
        second: String,
        /// Its stage.
        second_stage: usize,
    },
    /// A batch-independent operator that a stage reads but does not run.
    #[error("operator `{node}` in stage {stage} needs `{needed}` there too")]
    MissingClone {
        /// The operator's key.
        node: String,
        /// Its stage.
        stage: usize,
        /// The key of the operator that is lacking.
        needed: String,
    },
}

impl PartitionError {
    /// What the reader can do about it.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::Options { .. } => return None,
            Self::TooFewOperators { num_atoms, .. } => {
                format!("ask for at most {num_atoms} stages, or none to let the planner choose")
            }
            Self::TooFewDevices { .. } => {
                "ask for fewer stages or replicas, or run on more devices".into()
            }
            Self::TooFewRows { .. } => {
                "ask for fewer microbatches or replicas, or use a larger batch".into()
            }
            Self::NotSplittable { .. } => {
                "ask for 1 microbatch and 1 replica, or change the model so that no operator \
                 mixes the rows of its batch"
                    .into()
            }
            Self::DoesNotFit { remedies, .. } if remedies.is_empty() => {
                "use more devices, let each use more memory, take a smaller batch, or allow more: \
                 recomputing, sharding, other numbers of stages; in the time for it no such change \
                 alone was found to be enough"
                    .into()
            }
            Self::DoesNotFit { remedies, .. } => {
                let remedies: Vec<String> = remedies.iter().map(Remedy::to_string).collect();
                format!("any of these would do: {}", remedies.join("; "))
            }
            Self::Missing { .. } => "add it to a stage".into(),
            Self::Twice { .. } => "leave it in one of them".into(),
            Self::Backwards { stage, from, .. } => {
                format!("move the reader to stage {from} or later, or the maker to stage {stage}")
            }
            Self::SharedMemory { .. } => "put both into one stage".into(),
            Self::MissingClone { needed, .. } => {
                format!("add `{needed}` to that stage: it depends on no input and is run again")
            }
        })
    }
}

/// A byte count in the largest binary unit that leaves a number above one.
pub(crate) struct Bytes(pub(crate) u64);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1 << 10 {
            return write!(f, "{} bytes", self.0);
        }
        let power = (self.0.ilog2() / 10).min(6);
        write!(
            f,
            "{:.2} {}",
            self.0 as f64 / (1_u64 << (10 * power)) as f64,
            units[power as usize - 1]
        )
    }
}
