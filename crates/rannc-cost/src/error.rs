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
    /// A sharding level that nobody knows.
    #[error("there is no sharding level `{found}`")]
    UnknownSharding {
        /// The name as given.
        found: String,
    },
    /// Text that is not JSON, or not of the form of a profile or cluster.
    #[error("the {what} is not valid JSON of its form: {source}")]
    Json {
        /// `profile` or `cluster`.
        what: &'static str,
        /// What the reader found, with line and column.
        source: serde_json::Error,
    },
    /// A cluster file that is not TOML, or lacks something.
    #[error("the cluster file is not valid: {source}")]
    Toml {
        /// What the reader found, with line and column.
        #[from]
        source: toml::de::Error,
    },
    /// The file says it is something else.
    #[error("the file has format `{found}`, needed `{needed}`")]
    Format {
        /// The format that the file names.
        found: String,
        /// The format this version reads.
        needed: &'static str,
    },
    /// An operator that was never measured.
    #[error("the profile of `{device}` has no samples for `{signature}`, the operator of `{node}`")]
    UnknownSignature {
        /// The device of the profile.
        device: String,
        /// The signature that it lacks.
        signature: String,
        /// The first node that needs it.
        node: String,
    },
    /// A profile with numbers that nothing can have.
    #[error("the profile is not valid: {problem}")]
    BadProfile {
        /// What does not hold, and where.
        problem: String,
    },
    /// A device kind without built-in numbers.
    #[error("there is no device preset `{found}`")]
    UnknownPreset {
        /// The name as given.
        found: String,
    },
    /// A short cluster text that does not follow `kind:nodesxdevices`.
    #[error("`{found}` does not describe a cluster")]
    ClusterText {
        /// The text as given.
        found: String,
    },
    /// A cluster that nothing can run on.
    #[error("the cluster `{name}` cannot be used: {problem}")]
    BadCluster {
        /// The cluster's name.
        name: String,
        /// What does not hold.
        problem: String,
    },
}

impl CostError {
    /// What the reader can do about it.
    pub fn help(&self) -> Option<String> {
        let presets = || crate::cluster::PRESET_NAMES.join("`, `");
        Some(match self {
            Self::UnknownSchedule { .. } => "use `fill_drain` or `1f1b`".into(),
            Self::UnknownSharding { .. } => {
                "use `none`, `optimizer`, `gradients` or `parameters`".into()
            }
            Self::UnknownSignature { .. } | Self::BadProfile { .. } => {
                "profile the model again on this device".into()
            }
            Self::UnknownPreset { .. } => {
                format!("use one of `{}`, or give all numbers in a cluster file", presets())
            }
            Self::ClusterText { .. } => format!(
                "write `kind:nodesxdevices`, for example `a100-40gb:2x8`; the kinds are `{}`",
                presets()
            ),
            Self::Format { .. } | Self::Json { .. } | Self::Toml { .. } => {
                "see docs/formats for the form of the file".into()
            }
            Self::BadCluster { .. } => "correct the cluster, see docs/formats".into(),
        })
    }
}
