//! The names of the schedules, shared by the planner that prices them and the compiler that writes
//! them out.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::CostError;

/// In which order a rank runs the microbatches of its stage.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum ScheduleKind {
    /// All forwards, then all backwards: the loss may be anything that follows the model.
    #[default]
    #[serde(rename = "fill_drain")]
    FillDrain,
    /// Backward of a microbatch as soon as its forward left the last stage: fewer microbatches in
    /// flight, but the model itself must return its loss.
    #[serde(rename = "1f1b")]
    OneForwardOneBackward,
}

impl ScheduleKind {
    /// Every schedule, in the order in which the planner prefers equals.
    pub const ALL: [Self; 2] = [Self::FillDrain, Self::OneForwardOneBackward];

    /// The name in files, messages and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FillDrain => "fill_drain",
            Self::OneForwardOneBackward => "1f1b",
        }
    }
}

impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ScheduleKind {
    type Err = CostError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| CostError::UnknownSchedule { found: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::ScheduleKind;

    #[test]
    fn text_and_json_agree() {
        for kind in ScheduleKind::ALL {
            assert_eq!(kind.to_string().parse::<ScheduleKind>().unwrap(), kind);
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
        }
    }

    #[test]
    fn unknown_names_are_refused() {
        let error = "gpipe".parse::<ScheduleKind>().unwrap_err();
        assert_eq!(error.to_string(), "there is no schedule `gpipe`");
    }
}
