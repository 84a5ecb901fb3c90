//! What things cost, in integer nanoseconds and bytes.

mod error;
mod schedule_kind;

pub use error::CostError;
pub use schedule_kind::ScheduleKind;
