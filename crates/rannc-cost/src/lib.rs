//! What things cost, in integer nanoseconds and bytes: operators, transfers and memory.

mod cluster;
mod comm;
mod device_costs;
mod error;
mod footprint;
mod memory;
mod model;
mod profile;
mod schedule_kind;
mod sharding;

pub use cluster::{Cluster, Device, Shared};
pub use comm::Link;
pub use device_costs::{Classes, DeviceCosts};
pub use error::CostError;
pub use footprint::{Footprint, StageWork};
pub use memory::{BUCKET_BYTES, StageMemory, StageSizes, Training, is_trained, working_bytes};
pub use model::{AnalyticCosts, CostModel, ProfiledCosts};
pub use profile::{Calibration, Profile, Sample};
pub use schedule_kind::ScheduleKind;
pub use sharding::Sharding;
