//! The plan: what a search decided, as a file; and a plan applied to a graph.
//!
//! [`compile`] goes end to end: graph, costs, cluster and options in, [`Plan`] out. A [`Planner`] does the
//! same again and again. A
//! plan names operators by their stable keys, so [`Placement`] can apply it to another capture of the
//! same model (evaluation mode, another sequence length) as well as to the one it was made for.

mod check;
mod climb;
mod compile;
mod error;
mod evaluate;
mod explain;
mod file;
mod footprints;
mod place;
mod plan;
mod planner;
mod progress;
mod replan;
mod round;
mod shift;

pub use compile::{Options, compile, even_rows};
pub use error::PlanError;
pub use evaluate::Evaluation;
pub use explain::{duration, size};
pub use place::{Divided, Group, PlacedStage, Placement};
pub use plan::{BoundEstimate, Estimates, Plan, PlanStage, RankEstimate, StageEstimate};
pub use planner::Planner;
pub use progress::Bar;
pub use rannc_cost::{ScheduleKind, Sharding};
pub use rannc_partition::{Candidate, Progress, Remedy, StageCandidate};
