//! From a graph and its costs to a plan: search, lay out, simulate, choose.

use fixedbitset::FixedBitSet;
use rannc_cost::{
    AnalyticCosts, Cluster, CostModel, Profile, ProfiledCosts, ScheduleKind, StageMemory,
    StageSizes, Training,
};
use rannc_graph::{Graph, NodeId, Rows, Users, ValueId};
use rannc_partition::Candidate;
use rannc_schedule::{GradientGroup, Memory, Mode, RankId, StageId, Timing};

use crate::{Estimates, Placement, Plan, PlanError, PlanStage, RankEstimate, StageEstimate};

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
            max_microbatches: 32,
            max_blocks: 32,
            memory_limit_gib: None,
            memory_margin: 0.1,
            schedules: ScheduleKind::ALL.to_vec(),
        }
    }
}

/// Plans a deployment on all devices of the cluster.
///
/// Costs are those of `profile` or, without one, estimated for the cluster's first device. The search
/// gives a few candidates; each is laid out and simulated, and the fastest wins.
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
    if let Some(profile) = profile {
        let source = format!("measured on {}", profile.device);
        let costs = ProfiledCosts::new(graph, profile)?;
        return with_costs(graph, &costs, &source, cluster, options);
    }
    let device = &cluster.devices[0];
    let source = format!("estimated from the data of {}", device.kind);
    with_costs(graph, &AnalyticCosts::new(graph, device), &source, cluster, options)
}

/// A global batch as equal local batches: the first ranks have one row more where it does not divide.
pub fn even_rows(batch_size: u64, world_size: u32) -> Vec<u64> {
    let ranks = u64::from(world_size);
    (0..ranks).map(|rank| batch_size / ranks + u64::from(rank < batch_size % ranks)).collect()
}

fn with_costs(
    graph: &Graph,
    costs: &dyn CostModel,
    source: &str,
    cluster: &Cluster,
    options: &Options,
) -> Result<Plan, PlanError> {
    let search = search_options(graph, cluster, options)?;
    let found = rannc_partition::search(graph, costs, cluster, &search)?;
    let planner = Planner { graph, costs, cluster, options, training: search.training };
    let mut best: Option<(u64, Candidate, Placement)> = None;
    for candidate in found {
        let placement = planner.place(&candidate);
        let step_ns = planner.simulate(&candidate, &placement)?;
        if best.as_ref().is_none_or(|(least, ..)| step_ns < *least) {
            best = Some((step_ns, candidate, placement));
        }
    }
    let (step_ns, candidate, placement) = best.expect("a search that finds nothing is an error");
    Ok(planner.plan(step_ns, &candidate, &placement, source, search.memory_limit_bytes))
}

fn search_options(
    graph: &Graph,
    cluster: &Cluster,
    options: &Options,
) -> Result<rannc_partition::Options, PlanError> {
    let device_bytes = cluster.least_memory_bytes(cluster.devices.len());
    let asked = options.memory_limit_gib.map_or(f64::INFINITY, |gib| gib * GIB);
    let usable = (device_bytes as f64).min(asked) * (1.0 - options.memory_margin);
    let factor = (options.optimizer_state_factor * PARTS).round() as u64;
    Ok(rannc_partition::Options {
        min_microbatches: options.min_microbatches,
        max_microbatches: options.max_microbatches,
        microbatches: options.microbatches,
        num_stages: options.num_stages,
        num_replicas: options.num_replicas,
        max_blocks: options.max_blocks,
        training: Training { optimizer_state_factor_ppm: factor },
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

struct Planner<'a> {
    graph: &'a Graph,
    costs: &'a dyn CostModel,
    cluster: &'a Cluster,
    options: &'a Options,
    training: Training,
}

impl Planner<'_> {
    fn world_size(&self) -> u32 {
        self.cluster.devices.len() as u32
    }

    fn place(&self, candidate: &Candidate) -> Placement {
        Placement::new(
            self.graph,
            candidate.stages.clone(),
            self.world_size(),
            candidate.microbatches,
            candidate.schedule,
        )
    }

    /// The simulated duration of one training step.
    fn simulate(&self, candidate: &Candidate, placement: &Placement) -> Result<u64, PlanError> {
        let rows = even_rows(self.options.batch_size, self.world_size());
        let program = placement.program(rows, true, Mode::Training)?;
        let timing = StageTiming::new(self, candidate);
        let timeline = rannc_schedule::simulate(&program, &placement.pipeline, &timing, &timing)?;
        Ok(timeline.makespan_ns)
    }

    fn plan(
        &self,
        step_ns: u64,
        candidate: &Candidate,
        placement: &Placement,
        source: &str,
        limit_bytes: u64,
    ) -> Plan {
        let batch_nodes = self.graph.batch_nodes();
        let key = |id: &NodeId| self.graph.node(*id).key.clone();
        let is_listed = |id: &&NodeId| batch_nodes.contains(id.index());
        let stages = placement
            .stages
            .iter()
            .map(|stage| PlanStage {
                ranks: stage.ranks.clone(),
                shares: stage.shares.clone(),
                sharding: stage.sharding,
                nodes: stage.nodes.iter().filter(is_listed).map(key).collect(),
                recompute: stage
                    .recompute
                    .iter()
                    .map(|group| group.iter().map(key).collect())
                    .collect(),
            })
            .collect();
        Plan {
            model: self.graph.name().into(),
            model_identity: self.graph.identity(),
            world_size: self.world_size(),
            batch_size: self.options.batch_size,
            microbatches: candidate.microbatches,
            schedule: placement.training_schedule(),
            stages,
            estimates: Some(self.estimates(step_ns, candidate, placement, source, limit_bytes)),
        }
    }

    fn estimates(
        &self,
        step_ns: u64,
        candidate: &Candidate,
        placement: &Placement,
        source: &str,
        limit_bytes: u64,
    ) -> Estimates {
        let users = self.graph.users();
        let timing = StageTiming::new(self, candidate);
        let mut stages = Vec::new();
        let mut memory = vec![StageMemory::default(); self.world_size() as usize];
        for (index, stage) in candidate.stages.iter().enumerate() {
            let rows = self.rows_per_replica(candidate, stage.ranks.len());
            stages.push(StageEstimate {
                rows,
                forward_ns: timing.sum(index, rows, Direction::Forward),
                backward_ns: timing.sum(index, rows, Direction::Backward),
                all_reduce_ns: self.all_reduce_ns(index, placement),
            });
            let used = self.memory(candidate, index, rows, &users);
            for &rank in &placement.stages[index].ranks {
                memory[rank as usize] = used;
            }
        }
        let ranks = memory
            .into_iter()
            .enumerate()
            .map(|(rank, memory)| RankEstimate { rank: rank as u32, memory, limit_bytes })
            .collect();
        Estimates { costs_of: source.into(), step_ns, stages, ranks }
    }

    fn rows_per_replica(&self, candidate: &Candidate, replicas: usize) -> u64 {
        self.options.batch_size.div_ceil(candidate.microbatches).div_ceil(replicas.max(1) as u64)
    }

    fn memory(&self, candidate: &Candidate, stage: usize, rows: u64, users: &Users) -> StageMemory {
        let from_end = (candidate.stages.len() - stage) as u64;
        let in_flight = match candidate.schedule {
            ScheduleKind::FillDrain => candidate.microbatches,
            ScheduleKind::OneForwardOneBackward => candidate.microbatches.min(from_end),
        };
        StageSizes::of(self.graph, users, &candidate.stages[stage].nodes, rows)
            .memory(in_flight, &self.training)
    }

    fn all_reduce_ns(&self, stage: usize, placement: &Placement) -> u64 {
        let id = StageId::new(stage);
        let groups = &placement.pipeline.gradient_groups;
        let bytes_of = |group: &GradientGroup| {
            let ranks: Vec<u32> = group.ranks.iter().map(|rank| rank.0).collect();
            self.cluster.all_reduce_ns(group.bytes, &ranks)
        };
        groups.iter().filter(|group| group.stages.contains(&id)).map(bytes_of).sum()
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Forward,
    Backward,
}

/// Times of stages as sums over their operators.
struct StageTiming<'a> {
    planner: &'a Planner<'a>,
    nodes: Vec<&'a FixedBitSet>,
}

impl<'a> StageTiming<'a> {
    fn new(planner: &'a Planner<'a>, candidate: &'a Candidate) -> Self {
        Self { planner, nodes: candidate.stages.iter().map(|stage| &stage.nodes).collect() }
    }

    fn sum(&self, stage: usize, rows: u64, direction: Direction) -> u64 {
        let costs = self.planner.costs;
        self.nodes[stage]
            .ones()
            .map(NodeId::new)
            .map(|node| match direction {
                Direction::Forward => costs.forward_ns(node, rows),
                Direction::Backward => costs.backward_ns(node, rows),
            })
            .fold(0, u64::saturating_add)
    }
}

impl Timing for StageTiming<'_> {
    fn forward_ns(&self, stage: StageId, _: RankId, rows: u64) -> u64 {
        self.sum(stage.index(), rows, Direction::Forward)
    }

    fn backward_ns(&self, stage: StageId, _: RankId, rows: u64) -> u64 {
        self.sum(stage.index(), rows, Direction::Backward)
    }

    fn transfer_ns(&self, bytes: u64, from: RankId, to: RankId) -> u64 {
        self.planner.cluster.transfer_ns(bytes, from.0, to.0)
    }

    fn reduce_gradients_ns(&self, group: &GradientGroup) -> u64 {
        self.reduce_output_ns(group.bytes, &group.ranks)
    }

    fn reduce_output_ns(&self, bytes: u64, ranks: &[RankId]) -> u64 {
        let ranks: Vec<u32> = ranks.iter().map(|rank| rank.0).collect();
        self.planner.cluster.all_reduce_ns(bytes, &ranks)
    }
}

impl Memory for StageTiming<'_> {
    fn saved_bytes(&self, stage: StageId, rows: u64) -> u64 {
        let nodes = self.nodes[stage.index()].ones().map(NodeId::new);
        nodes.fold(0, |sum: u64, id| {
            sum.saturating_add(self.planner.graph.node(id).saved_bytes.at(rows))
        })
    }
}
