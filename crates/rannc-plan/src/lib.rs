//! The plan: what a search decided, as a file; and a plan applied to a graph.
//!
//! [`compile`] is the only end-to-end function: graph, costs, cluster and options in, [`Plan`] out. A
//! plan names operators by their stable keys, so [`Placement`] can apply it to another capture of the
//! same model (evaluation mode, another sequence length) as well as to the one it was made for.

mod compile;
mod error;
mod explain;
mod file;
mod place;
mod plan;

pub use compile::{Options, compile, even_rows};
pub use error::PlanError;
pub use place::{Group, PlacedStage, Placement};
pub use plan::{Estimates, Plan, PlanStage, RankEstimate, StageEstimate};
pub use rannc_cost::ScheduleKind;
