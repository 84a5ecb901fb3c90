//! How much of a stage's state its replicas divide among themselves.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::CostError;

/// What each replica of a stage keeps only a part of; each level includes those before it
/// (`ZeRO`, Rajbhandari et al. 2020, section 5).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Sharding {
    /// Every replica keeps everything.
    #[default]
    None,
    /// The optimizer's state.
    Optimizer,
    /// Gradients, too: they are reduced and scattered in every backward.
    Gradients,
    /// Parameters, too: they are gathered in every forward and every backward.
    Parameters,
}

impl Sharding {
    /// Every level, from nothing to everything.
    pub const ALL: [Self; 4] = [Self::None, Self::Optimizer, Self::Gradients, Self::Parameters];

    /// The name in files, messages and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Optimizer => "optimizer",
            Self::Gradients => "gradients",
            Self::Parameters => "parameters",
        }
    }

    /// Time that a step's traffic takes, when adding up all gradients once takes `all_reduce_ns`:
    /// sharded gradients are scattered after each of the microbatches, sharded parameters gathered
    /// twice for each. Gathering and scattering each move half of what adding up moves.
    pub fn traffic_ns(self, all_reduce_ns: u64, microbatches: u64) -> u64 {
        let halves = match self {
            Self::None | Self::Optimizer => 2,
            Self::Gradients => microbatches.saturating_add(1),
            Self::Parameters => microbatches.saturating_mul(3),
        };
        all_reduce_ns.saturating_mul(halves) / 2
    }

    /// Whether nothing is divided.
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }
}

impl fmt::Display for Sharding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Sharding {
    type Err = CostError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|level| level.name() == text)
            .ok_or_else(|| CostError::UnknownSharding { found: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::Sharding;

    #[test]
    fn text_and_json_agree() {
        for level in Sharding::ALL {
            assert_eq!(level.to_string().parse::<Sharding>().unwrap(), level);
            assert_eq!(serde_json::to_string(&level).unwrap(), format!("\"{level}\""));
        }
        let error = "zero".parse::<Sharding>().unwrap_err();
        assert_eq!(error.to_string(), "there is no sharding level `zero`");
    }
}
