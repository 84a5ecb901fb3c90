//! What was decided, and what it was expected to cost.

use rannc_cost::{ScheduleKind, Sharding, StageMemory};
use serde::{Deserialize, Serialize};

/// A deployment: which ranks run which operators, in how many microbatches, in which order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The model's class name.
    pub model: String,
    /// Which model it belongs to: a hash of its operators, parameters and buffers.
    pub model_identity: String,
    /// The number of processes.
    pub world_size: u32,
    /// Rows of the global batch it was made for; it runs with any.
    pub batch_size: u64,
    /// How many parts the batch is cut into.
    pub microbatches: u64,
    /// The order of forwards and backwards.
    pub schedule: ScheduleKind,
    /// The parts of the model, in the order in which values flow.
    pub stages: Vec<PlanStage>,
    /// What the planner expected; absent in plans written by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimates: Option<Estimates>,
}

/// One part of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanStage {
    /// The processes that hold a replica of it, ascending.
    pub ranks: Vec<u32>,
    /// In which proportion these divide the rows of a microbatch; equally if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<u64>,
    /// What each replica keeps only a part of.
    #[serde(default, skip_serializing_if = "Sharding::is_none")]
    pub sharding: Sharding,
    /// Keys of its operators. Those that depend on no input run wherever they are needed and are not
    /// listed.
    pub nodes: Vec<String>,
    /// Groups of operators whose inner values are not kept but computed again in backward. Each group
    /// is convex: no path leaves and enters it again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recompute: Vec<Vec<String>>,
}

impl Plan {
    /// The same plan with every stage that has several replicas sharded at least so far. The
    /// estimates stay as they are.
    #[must_use]
    pub fn shard_at_least(mut self, level: Sharding) -> Self {
        for stage in self.stages.iter_mut().filter(|stage| stage.ranks.len() > 1) {
            stage.sharding = stage.sharding.max(level);
        }
        self
    }
}

/// What a plan is expected to cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Estimates {
    /// Where the times come from: a measured device, or a device's data sheet.
    pub costs_of: String,
    /// Duration of one training step as simulated, without the optimizer's own step.
    pub step_ns: u64,
    /// How short a step can possibly be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lower_bound: Option<BoundEstimate>,
    /// By stage, for one microbatch on one replica.
    pub stages: Vec<StageEstimate>,
    /// By rank.
    pub ranks: Vec<RankEstimate>,
}

/// A lower bound on the duration of a step, whatever the plan, and what it rests on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BoundEstimate {
    /// The largest of the others, for the number of microbatches where that is least.
    pub step_ns: u64,
    /// All work, divided over all devices at their best.
    pub work_ns: u64,
    /// The longest path of operators, forward and back, with as many replicas as devices.
    pub critical_path_ns: u64,
    /// The same with as many replicas as the memory has room for; 0 if it has room for all.
    pub memory_ns: u64,
}

/// Times of one stage for one microbatch on one replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageEstimate {
    /// Rows of one microbatch on one replica, the most that any has.
    pub rows: u64,
    /// Forward time.
    pub forward_ns: u64,
    /// Backward time.
    pub backward_ns: u64,
    /// Time to sum the gradients of its parameters over the ranks that hold them, once a step.
    pub all_reduce_ns: u64,
}

/// Peak memory of one rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankEstimate {
    /// The process.
    pub rank: u32,
    /// What the memory goes to.
    pub memory: StageMemory,
    /// What the device may use.
    pub limit_bytes: u64,
}
