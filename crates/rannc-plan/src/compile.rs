//! What to plan for, and planning in one call.

use rannc_cost::{Cluster, Profile, ScheduleKind, Sharding, Training};
use rannc_graph::{Graph, Rows, ValueId};

use crate::{Plan, PlanError, Planner};

const GIB: f64 = 1_073_741_824.0;
const PARTS: f64 = 1_000_000.0;

/// What to plan for.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Rows of the global batch.
    pub batch_size: u64,
    /// Bytes of optimizer state for each byte of trained parameters.
    pub optimizer_state_factor: f64,
    /// Exactly this many stages.
    pub num_stages: Option<usize>,
    /// Exactly this many replicas of every stage.
    pub num_replicas: Option<usize>,
    /// Exactly this many microbatches.
    pub microbatches: Option<u64>,
    /// The fewest microbatches to consider.
    pub min_microbatches: u64,
    /// The most microbatches to consider.
    pub max_microbatches: u64,
    /// The number of blocks that stages are made of.
    pub max_blocks: usize,
    /// Use at most this much of each device, in GiB.
    pub memory_limit_gib: Option<f64>,
    /// The part of the memory to leave free, 0 to 1.
    pub memory_margin: f64,
    /// The schedules to consider.
    pub schedules: Vec<ScheduleKind>,
    /// Whether parts of the model may be computed again in backward to save memory.
    pub recompute: bool,
    /// The most that the replicas of a stage may divide among themselves.
    pub sharding: Sharding,
    /// The least that they divide, wherever a stage has several.
    pub least_sharding: Sharding,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            batch_size: 1,
            optimizer_state_factor: 2.0,
            num_stages: None,
            num_replicas: None,
            microbatches: None,
            min_microbatches: 1,
            max_microbatches: 512,
            max_blocks: 32,
            memory_limit_gib: None,
            memory_margin: 0.1,
            schedules: ScheduleKind::ALL.to_vec(),
            recompute: true,
            sharding: Sharding::None,
            least_sharding: Sharding::None,
        }
    }
}

/// Plans a deployment on all devices of the cluster; see [`Planner`].
///
/// # Errors
///
/// [`PlanError::Partition`] when no plan fits the memory or what the options force cannot be had,
/// [`PlanError::Cost`] when the profile does not belong to the graph.
pub fn compile(
    graph: &Graph,
    profile: Option<&Profile>,
    cluster: &Cluster,
    options: &Options,
) -> Result<Plan, PlanError> {
    Planner::new(graph, profile).plan(cluster, options, &())
}

/// A global batch as equal local batches: the first ranks have one row more where it does not divide.
pub fn even_rows(batch_size: u64, world_size: u32) -> Vec<u64> {
    let ranks = u64::from(world_size);
    (0..ranks).map(|rank| batch_size / ranks + u64::from(rank < batch_size % ranks)).collect()
}

/// The options of the search.
pub(crate) fn search_options(
    graph: &Graph,
    cluster: &Cluster,
    options: &Options,
) -> Result<rannc_partition::Options, PlanError> {
    let asked = options.memory_limit_gib.map_or(f64::INFINITY, |gib| gib * GIB);
    let usable = asked * (1.0 - options.memory_margin);
    let factor = (options.optimizer_state_factor * PARTS).round() as u64;
    Ok(rannc_partition::Options {
        min_microbatches: options.min_microbatches,
        max_microbatches: options.max_microbatches,
        microbatches: options.microbatches,
        num_stages: options.num_stages,
        num_replicas: options.num_replicas,
        max_blocks: options.max_blocks,
        training: Training { optimizer_state_factor_ppm: factor },
        memory_margin_ppm: (options.memory_margin * PARTS).round() as u64,
        recompute: options.recompute,
        sharding: options.sharding.max(options.least_sharding),
        least_sharding: options.least_sharding,
        schedules: possible_schedules(graph, &options.schedules)?,
        ..rannc_partition::Options::new(options.batch_size, cluster.devices.len(), usable as u64)
    })
}

/// Without the schedules that run backwards before the caller can give the gradients of the outputs.
fn possible_schedules(
    graph: &Graph,
    wanted: &[ScheduleKind],
) -> Result<Vec<ScheduleKind>, PlanError> {
    let mut results: Vec<ValueId> = graph.outputs().to_vec();
    results.sort_unstable();
    results.dedup();
    results.retain(|&id| graph.value(id).requires_grad);
    let only_a_loss = matches!(results[..], [loss] if graph.value(loss).rows == Rows::Sum && graph.value(loss).shape.is_empty());
    let possible: Vec<ScheduleKind> = wanted
        .iter()
        .copied()
        .filter(|&kind| only_a_loss || kind == ScheduleKind::FillDrain)
        .collect();
    if possible.is_empty() && !wanted.is_empty() {
        return Err(PlanError::NeedsLoss { schedule: wanted[0], found: results.len() });
    }
    Ok(possible)
}
