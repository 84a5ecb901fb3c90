//! What a division into stages would cost: simulated time, and memory added up.

use std::cell::RefCell;
use std::collections::BTreeMap;

use fixedbitset::FixedBitSet;
use rannc_cost::{
    Classes, Cluster, DeviceCosts, ScheduleKind, Sharding, StageMemory, StageSizes, is_trained,
};
use rannc_graph::{Graph, NodeId, Users, ValueId};
use rannc_partition::{Arrangement, Candidate, Options, StageCandidate};
use rannc_schedule::{
    Batch, GradientGroup, Memory, Mode, Program, RankId, Shared, StageId, Timeline, Timing,
};

use crate::footprints::Footprints;
use crate::{Placement, PlanError, StageEstimate, even_rows};

/// Memory is played operator by operator if a step has no more forwards than that.
const MOST_PLAYED: u64 = 1 << 13;

/// A plan with at most so many forwards is simulated as it is, without folding.
const MOST_UNFOLDED: u64 = 1 << 13;
/// With more than so many that are left after folding it is simulated in outline.
const MOST_FOLDED: u64 = 1 << 14;

/// What a division would cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evaluation {
    /// Simulated duration of a step.
    pub step_ns: u64,
    /// Peak memory of each rank.
    pub memory: Vec<StageMemory>,
    /// Whether no rank takes more than its device may use.
    pub fits: bool,
}

/// Prices candidates on a cluster.
pub(crate) struct Evaluator<'a> {
    graph: &'a Graph,
    users: Users,
    costs: &'a DeviceCosts<'a>,
    cluster: &'a Cluster,
    options: &'a Options,
    classes: Classes,
}

impl<'a> Evaluator<'a> {
    pub(crate) fn new(
        graph: &'a Graph,
        costs: &'a DeviceCosts<'a>,
        cluster: &'a Cluster,
        options: &'a Options,
    ) -> Self {
        let classes = cluster.classes(cluster.devices.len());
        Self { graph, users: graph.users(), costs, cluster, options, classes }
    }

    /// Where the times come from.
    pub(crate) fn costs_of(&self) -> &str {
        self.costs.source()
    }

    /// Forward and backward of a microbatch through each stage, of all replicas together if they are like
    /// the cluster's first device.
    pub(crate) fn loads(&self, candidate: &Candidate) -> Vec<u64> {
        let timing = StageTiming::new(self, candidate);
        let stages = candidate.stages.iter().enumerate();
        let load = |(index, stage): (usize, &StageCandidate)| {
            let rows = self.rows(candidate, stage, 0);
            let times = timing.times(StageId::new(index), RankId(0), rows);
            times.0.saturating_add(times.1).saturating_mul(stage.ranks.len() as u64)
        };
        stages.map(load).collect()
    }

    /// The stages, the one that works longest in a step, adding up its gradients included, first.
    pub(crate) fn by_work(&self, candidate: &Candidate, placement: &Placement) -> Vec<usize> {
        let work_ns = |stage: &StageEstimate| {
            let each = stage.forward_ns.saturating_add(stage.backward_ns);
            each.saturating_mul(candidate.microbatches).saturating_add(stage.all_reduce_ns)
        };
        let times: Vec<u64> =
            self.stage_estimates(candidate, placement).iter().map(work_ns).collect();
        let mut stages: Vec<usize> = (0..times.len()).collect();
        stages.sort_by_key(|&stage| std::cmp::Reverse(times[stage]));
        stages
    }

    fn world_size(&self) -> u32 {
        self.cluster.devices.len() as u32
    }

    /// How many forwards a simulation of the candidate has.
    pub(crate) fn work(candidate: &Candidate) -> u64 {
        let folded = folded_forwards(candidate);
        if folded <= MOST_FOLDED {
            return folded;
        }
        candidate.stages.len() as u64 * candidate.microbatches
    }

    pub(crate) fn place(&self, candidate: &Candidate) -> Placement {
        Placement::new(
            self.graph,
            &self.users,
            candidate.stages.clone(),
            self.world_size(),
            candidate.microbatches,
            candidate.schedule,
            None,
        )
    }

    /// A duration that no simulation of the candidate falls below: each stage works on all microbatches,
    /// none of which gets there, or is given back, without passing the stages that it reads from.
    pub(crate) fn least_ns(&self, candidate: &Candidate) -> u64 {
        let timing = StageTiming::new(self, candidate);
        let fewest_rows = self.options.batch_rows / candidate.microbatches.max(1);
        let links = self.links(candidate);
        let mut least = 0_u64;
        let mut passages: Vec<Passage> = Vec::new();
        for (index, (stage, links)) in candidate.stages.iter().zip(&links).enumerate() {
            let mut own = Passage::default();
            for (&read, &differentiable) in &links.read {
                let earlier = &passages[read];
                let reached = earlier.before.saturating_add(earlier.forward);
                own.before = own.before.max(reached);
                own.around = own.around.max(if differentiable {
                    earlier.around.saturating_add(earlier.both())
                } else {
                    reached
                });
            }
            let rows = fewest_rows / stage.ranks.len().max(1) as u64;
            // Shares may leave a replica any number of rows.
            if rows > 0 && stage.shares.is_empty() {
                let times = |&rank: &u32| timing.times(StageId::new(index), RankId(rank), rows);
                own.forward = stage.ranks.iter().map(|rank| times(rank).0).min().unwrap_or(0);
                if links.backward {
                    own.backward = stage.ranks.iter().map(|rank| times(rank).1).min().unwrap_or(0);
                }
            }
            let work = own.both().saturating_mul(candidate.microbatches);
            least = least.max(work.saturating_add(own.around));
            passages.push(own);
        }
        least
    }

    fn links(&self, candidate: &Candidate) -> Vec<Links> {
        let graph = self.graph;
        let mut maker: Vec<Option<usize>> = vec![None; graph.nodes().len()];
        let mut links: Vec<Links> = Vec::new();
        for (index, stage) in candidate.stages.iter().enumerate() {
            let mut read: BTreeMap<usize, bool> = BTreeMap::new();
            for &value in stage.nodes.ones().flat_map(|node| &graph.nodes()[node].inputs) {
                let made = graph.producer(value).map(NodeId::index);
                let made = made.filter(|&node| !stage.nodes.contains(node));
                if let Some(earlier) = made.and_then(|node| maker[node]) {
                    let differentiable = graph.value(value).requires_grad;
                    *read.entry(earlier).or_default() |= differentiable;
                    links[earlier].backward |= differentiable;
                }
            }
            for node in stage.nodes.ones() {
                maker[node].get_or_insert(index);
            }
            links.push(Links { read, backward: false });
        }
        for &output in graph.outputs().iter().filter(|&&id| graph.value(id).requires_grad) {
            if let Some(stage) = graph.producer(output).and_then(|node| maker[node.index()]) {
                links[stage].backward = true;
            }
        }
        links
    }

    /// The simulated duration of one training step.
    pub(crate) fn step_ns(
        &self,
        candidate: &Candidate,
        placement: &Placement,
    ) -> Result<u64, PlanError> {
        let batch = Batch {
            rows: even_rows(self.options.batch_rows, self.world_size()),
            gather: true,
            microbatches: candidate.microbatches,
        };
        let timing = StageTiming::new(self, candidate);
        let (pipeline, schedule) = (&placement.pipeline, placement.training_schedule());
        let mode = Mode::Training;
        if folded_forwards(candidate) > MOST_FOLDED
            && let Some(step_ns) =
                rannc_schedule::roughly_ns(pipeline, &batch, schedule, mode, &timing)?
        {
            return Ok(step_ns);
        }
        let found = rannc_schedule::estimate(pipeline, &batch, schedule, mode, &timing, &timing)?;
        Ok(found.makespan_ns)
    }

    /// The duration of a step without folding; with it, as given, where that takes long.
    pub(crate) fn unfolded_ns(
        &self,
        candidate: &Candidate,
        placement: &Placement,
        folded_ns: u64,
    ) -> Result<u64, PlanError> {
        let all = num_forwards(candidate);
        if all > MOST_UNFOLDED || all == folded_forwards(candidate) {
            return Ok(folded_ns);
        }
        Ok(self.timeline(candidate, placement)?.1.makespan_ns)
    }

    /// A training step and when everything in it happens.
    pub(crate) fn timeline(
        &self,
        candidate: &Candidate,
        placement: &Placement,
    ) -> Result<(Program, Timeline), PlanError> {
        let rows = even_rows(self.options.batch_rows, self.world_size());
        let program = placement.program(rows, true, Mode::Training)?;
        let timing = StageTiming::new(self, candidate);
        let timeline = rannc_schedule::simulate(&program, &placement.pipeline, &timing, &timing)?;
        Ok((program, timeline))
    }

    /// Memory of each rank at its worst moment of a step: played operator by operator, but added up
    /// for sharded stages and where playing would take long.
    pub(crate) fn peak_memory(
        &self,
        candidate: &Candidate,
        placement: &Placement,
    ) -> Result<Vec<StageMemory>, PlanError> {
        let mut memory = self.memory(candidate);
        let sharded = candidate.stages.iter().any(|stage| !stage.sharding.is_none());
        if sharded || num_forwards(candidate) > MOST_PLAYED {
            return Ok(memory);
        }
        let rows = even_rows(self.options.batch_rows, self.world_size());
        let program = placement.program(rows.clone(), true, Mode::Training)?;
        let timing = StageTiming::new(self, candidate);
        let footprints = Footprints::new(self.graph, placement);
        let timeline =
            rannc_schedule::simulate(&program, &placement.pipeline, &timing, &footprints)?;
        for ((rank, timeline), lasting) in (0..).zip(&timeline.ranks).zip(&mut memory) {
            *lasting = footprints.peak(rank, timeline, lasting, rows[rank as usize]);
        }
        Ok(memory)
    }

    /// By stage, for the replica with the most rows.
    pub(crate) fn stage_estimates(
        &self,
        candidate: &Candidate,
        placement: &Placement,
    ) -> Vec<StageEstimate> {
        let timing = StageTiming::new(self, candidate);
        let groups = &placement.pipeline.gradient_groups;
        let stages = candidate.stages.iter().enumerate();
        stages
            .map(|(index, stage)| {
                let id = StageId::new(index);
                let slowest = |direction: fn((u64, u64)) -> u64| {
                    let ranks = stage.ranks.iter().enumerate();
                    ranks
                        .map(|(replica, &rank)| {
                            let rows = self.rows(candidate, stage, replica);
                            direction(timing.times(id, RankId(rank), rows))
                        })
                        .max()
                };
                let mine = groups.iter().filter(|group| group.stages.contains(&id));
                StageEstimate {
                    rows: (0..stage.ranks.len())
                        .map(|replica| self.rows(candidate, stage, replica))
                        .max()
                        .unwrap_or(0),
                    forward_ns: slowest(|times| times.0).unwrap_or(0),
                    backward_ns: slowest(|times| times.1).unwrap_or(0),
                    all_reduce_ns: mine.map(|group| timing.reduce_gradients_ns(group)).sum(),
                }
            })
            .collect()
    }

    /// Peak memory of each rank.
    pub(crate) fn memory(&self, candidate: &Candidate) -> Vec<StageMemory> {
        let mut memory = vec![StageMemory::default(); self.world_size() as usize];
        let tied = tied(self.graph, &candidate.stages);
        for (index, stage) in candidate.stages.iter().enumerate() {
            let from_end = (candidate.stages.len() - index) as u64;
            let in_flight = match candidate.schedule {
                ScheduleKind::FillDrain => candidate.microbatches,
                ScheduleKind::OneForwardOneBackward => candidate.microbatches.min(from_end),
            };
            let mut by_rows: BTreeMap<u64, StageMemory> = BTreeMap::new();
            for (replica, &rank) in stage.ranks.iter().enumerate() {
                let rows = self.rows(candidate, stage, replica);
                let own = by_rows.entry(rows).or_insert_with(|| {
                    let replicas = stage.ranks.len() as u64;
                    self.sizes(stage, rows, &tied).memory(
                        in_flight,
                        &self.options.training,
                        stage.sharding,
                        replicas,
                    )
                });
                memory[rank as usize] = memory[rank as usize].beside(own);
            }
        }
        for (rank, (state, trained)) in held_again(self.graph, &candidate.stages) {
            let all = &mut memory[rank as usize];
            *all = all.without(state, trained, &self.options.training);
        }
        memory
    }

    /// Whether every replica has rows in every microbatch, and no rank takes too much memory.
    pub(crate) fn is_possible(&self, candidate: &Candidate) -> bool {
        let fewest_rows = self.options.batch_rows / candidate.microbatches.max(1);
        candidate.stages.iter().all(|stage| stage.ranks.len() as u64 <= fewest_rows)
            && self.is_within(&self.memory(candidate))
    }

    /// Whether no rank takes too much memory, at its worst moment where that does not take long to tell.
    pub(crate) fn fits(&self, candidate: &Candidate) -> Result<bool, PlanError> {
        Ok(self.is_within(&self.peak_memory(candidate, &self.place(candidate))?))
    }

    /// Whether no rank takes more than it may.
    pub(crate) fn is_within(&self, memory: &[StageMemory]) -> bool {
        let mut ranks = memory.iter().enumerate();
        ranks.all(|(rank, memory)| memory.total() <= self.limit_bytes(rank))
    }

    /// What a rank's device may use.
    pub(crate) fn limit_bytes(&self, rank: usize) -> u64 {
        let bytes = u128::from(self.cluster.devices[rank].memory_bytes);
        let left = 1_000_000 - self.options.memory_margin_ppm.min(1_000_000);
        let usable = (bytes * u128::from(left) / 1_000_000) as u64;
        usable.min(self.options.memory_limit_bytes)
    }

    /// The most rows of a microbatch that a replica has.
    fn rows(&self, candidate: &Candidate, stage: &StageCandidate, replica: usize) -> u64 {
        let rows = self.options.batch_rows.div_ceil(candidate.microbatches);
        match stage.shares.get(replica) {
            None => rows.div_ceil(stage.ranks.len().max(1) as u64),
            Some(&share) => {
                let all: u128 = stage.shares.iter().map(|&share| u128::from(share)).sum();
                (u128::from(rows) * u128::from(share)).div_ceil(all.max(1)) as u64
            }
        }
    }

    fn sizes(&self, stage: &StageCandidate, rows: u64, tied: &FixedBitSet) -> StageSizes {
        let graph = self.graph;
        let mut sizes = StageSizes::of(graph, &self.users, &stage.nodes, rows);
        let mut counted = FixedBitSet::with_capacity(graph.values().len());
        for id in stage.nodes.ones().flat_map(|node| &graph.nodes()[node].inputs) {
            if tied.contains(id.index()) && !counted.put(id.index()) {
                sizes.tied = sizes.tied.saturating_add(graph.value(*id).bytes(1));
            }
        }
        let mut kept = FixedBitSet::with_capacity(graph.values().len());
        let (mut freed, mut inputs, mut moment) = (0_u64, 0_u64, 0_u64);
        for group in &stage.recompute {
            let saved = group.iter().map(|&id| graph.node(id).saved_bytes.at(rows));
            let saved = saved.fold(0, u64::saturating_add);
            freed = freed.saturating_add(saved);
            moment = moment.max(saved);
            let mut inside = FixedBitSet::with_capacity(graph.nodes().len());
            inside.extend(group.iter().map(|id| id.index()));
            for &value in group.iter().flat_map(|&id| &graph.node(id).inputs) {
                // What the stage receives is held anyway.
                let made = graph.producer(value).filter(|made| stage.nodes.contains(made.index()));
                if made.is_some_and(|made| !inside.contains(made.index()))
                    && !kept.put(value.index())
                {
                    inputs = inputs.saturating_add(graph.value(value).bytes(rows));
                }
            }
        }
        if stage.sharding >= Sharding::Gradients {
            let divided = |id| is_trained(graph, id) && !tied.contains(id.index());
            let plain = Arrangement::plain(&stage.nodes);
            let arranged = Arrangement { groups: stage.recompute.clone(), ..plain };
            let units = rannc_partition::units(graph, &self.users, &arranged, &[], divided);
            sizes.gathered = rannc_partition::most_gathered(graph, &units, divided);
        }
        sizes.saved = sizes.saved.saturating_sub(freed).saturating_add(inputs);
        sizes.working = sizes.working.saturating_add(moment);
        sizes
    }
}

/// What a stage has to do with others.
struct Links {
    /// The stages before it that it reads from, and whether gradients go back there.
    read: BTreeMap<usize, bool>,
    /// Whether it is given gradients, without which it has no backward.
    backward: bool,
}

/// The least that a microbatch takes through a stage, and on its way there and back, in nanoseconds.
#[derive(Default)]
struct Passage {
    forward: u64,
    backward: u64,
    /// Forwards of the stages before it.
    before: u64,
    /// These, and backwards that can only follow the stage's own.
    around: u64,
}

impl Passage {
    fn both(&self) -> u64 {
        self.forward.saturating_add(self.backward)
    }
}

/// How many forwards a step has.
fn num_forwards(candidate: &Candidate) -> u64 {
    let ranks: u64 = candidate.stages.iter().map(|stage| stage.ranks.len() as u64).sum();
    ranks * candidate.microbatches
}

/// How many are left of these with equal copies folded.
fn folded_forwards(candidate: &Candidate) -> u64 {
    let copies = candidate.stages.iter().map(|stage| stage.ranks.len() as u64).fold(0, gcd);
    num_forwards(candidate) / copies.max(1)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Trained parameters that several stages read.
fn tied(graph: &Graph, stages: &[StageCandidate]) -> FixedBitSet {
    let mut seen: Vec<Option<usize>> = vec![None; graph.values().len()];
    let mut tied = FixedBitSet::with_capacity(graph.values().len());
    for (index, stage) in stages.iter().enumerate() {
        for &id in stage.nodes.ones().flat_map(|node| &graph.nodes()[node].inputs) {
            let elsewhere = seen[id.index()].replace(index).is_some_and(|other| other != index);
            if elsewhere && is_trained(graph, id) {
                tied.insert(id.index());
            }
        }
    }
    tied
}

/// For ranks of several stages, the bytes of parameters and buffers, and of trained parameters, that
/// later stages read as well as earlier ones: a rank holds them once.
fn held_again(graph: &Graph, stages: &[StageCandidate]) -> BTreeMap<u32, (u64, u64)> {
    let mut stages_of: BTreeMap<u32, Vec<&StageCandidate>> = BTreeMap::new();
    for stage in stages {
        stage.ranks.iter().for_each(|&rank| stages_of.entry(rank).or_default().push(stage));
    }
    let mut again = BTreeMap::new();
    for (rank, stages) in stages_of.into_iter().filter(|(_, stages)| stages.len() > 1) {
        let mut held = FixedBitSet::with_capacity(graph.values().len());
        let (mut state, mut trained) = (0_u64, 0_u64);
        for stage in stages {
            let read = stage.nodes.ones().flat_map(|node| &graph.nodes()[node].inputs);
            let mut own = FixedBitSet::with_capacity(graph.values().len());
            own.extend(read.filter(|&&id| graph.value(id).is_state()).map(|id| id.index()));
            for id in own.intersection(&held).map(ValueId::new) {
                let bytes = graph.value(id).bytes(1);
                state = state.saturating_add(bytes);
                trained = trained.saturating_add(if is_trained(graph, id) { bytes } else { 0 });
            }
            held.union_with(&own);
        }
        again.insert(rank, (state, trained));
    }
    again
}

/// A stage, a class of devices and a number of rows.
type TimesKey = (usize, usize, u64);

/// Times of stages as sums over their operators.
struct StageTiming<'a> {
    evaluator: &'a Evaluator<'a>,
    candidate: &'a Candidate,
    known: RefCell<BTreeMap<TimesKey, (u64, u64)>>,
    /// By stage and rows.
    saved: RefCell<BTreeMap<(usize, u64), u64>>,
    /// By stage, the time that gathering and scattering take in a forward and in a backward.
    traffic: Vec<(u64, u64)>,
}

impl<'a> StageTiming<'a> {
    fn new(evaluator: &'a Evaluator<'a>, candidate: &'a Candidate) -> Self {
        let stages = candidate.stages.iter();
        let traffic = stages.map(|stage| Self::traffic(evaluator, candidate, stage)).collect();
        let (known, saved) = (RefCell::default(), RefCell::default());
        Self { evaluator, candidate, known, saved, traffic }
    }

    /// What divided gradients and parameters add to a forward and to a backward.
    fn traffic(
        evaluator: &Evaluator<'_>,
        candidate: &Candidate,
        stage: &StageCandidate,
    ) -> (u64, u64) {
        if stage.sharding < Sharding::Gradients || stage.ranks.len() < 2 {
            return (0, 0);
        }
        let tied = tied(evaluator.graph, &candidate.stages);
        let sizes = evaluator.sizes(stage, 1, &tied);
        let bytes = sizes.trainable.saturating_sub(sizes.tied);
        let whole = evaluator.cluster.all_reduce_ns(bytes, &stage.ranks);
        let microbatches = candidate.microbatches.max(1);
        let each = stage.sharding.traffic_ns(whole, microbatches) / microbatches;
        if stage.sharding == Sharding::Parameters { (each / 3, each - each / 3) } else { (0, each) }
    }

    /// Forward and backward time.
    fn times(&self, stage: StageId, rank: RankId, rows: u64) -> (u64, u64) {
        let class = self.evaluator.classes.of_rank[rank.index()];
        let key = (stage.index(), class, rows);
        *self.known.borrow_mut().entry(key).or_insert_with(|| self.added_up(key))
    }

    fn added_up(&self, (stage, class, rows): (usize, usize, u64)) -> (u64, u64) {
        let model = self.evaluator.costs.class(class);
        let stage = &self.candidate.stages[stage];
        let mut counts: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
        for node in stage.nodes.ones().map(NodeId::new) {
            counts.entry(model.kind(node)).or_default().0 += 1;
        }
        for &node in stage.recompute.iter().flatten() {
            counts.entry(model.kind(node)).or_default().1 += 1;
        }
        counts.into_iter().fold(
            (0, 0),
            |(forward, backward): (u64, u64), (kind, (count, again))| {
                let one = model.forward_of(kind, rows);
                let other = model.backward_of(kind, rows).saturating_mul(count);
                (
                    forward.saturating_add(one.saturating_mul(count)),
                    backward.saturating_add(other).saturating_add(one.saturating_mul(again)),
                )
            },
        )
    }
}

impl Timing for StageTiming<'_> {
    fn forward_ns(&self, stage: StageId, rank: RankId, rows: u64) -> u64 {
        self.times(stage, rank, rows).0.saturating_add(self.traffic[stage.index()].0)
    }

    fn backward_ns(&self, stage: StageId, rank: RankId, rows: u64) -> u64 {
        self.times(stage, rank, rows).1.saturating_add(self.traffic[stage.index()].1)
    }

    fn transfer_ns(&self, bytes: u64, from: RankId, to: RankId) -> u64 {
        self.evaluator.cluster.transfer_ns(bytes, from.0, to.0)
    }

    fn reduce_gradients_ns(&self, group: &GradientGroup) -> u64 {
        let levels = group.stages.iter().map(|id| self.candidate.stages[id.index()].sharding);
        let level =
            if group.stages.len() == 1 { levels.max().unwrap_or_default() } else { Sharding::None };
        level.traffic_ns(
            self.reduce_output_ns(group.bytes, &group.ranks),
            self.candidate.microbatches,
        )
    }

    fn reduce_output_ns(&self, bytes: u64, ranks: &[RankId]) -> u64 {
        let ranks: Vec<u32> = ranks.iter().map(|rank| rank.0).collect();
        self.evaluator.cluster.all_reduce_ns(bytes, &ranks)
    }

    fn shared(&self) -> Vec<Shared> {
        let groups = self.evaluator.cluster.shared.iter();
        let ranks = |ranks: &[u32]| ranks.iter().copied().map(RankId).collect();
        groups
            .map(|group| Shared { ranks: ranks(&group.devices), capacity_ppm: group.capacity_ppm })
            .collect()
    }
}

impl Memory for StageTiming<'_> {
    fn saved_bytes(&self, stage: StageId, rows: u64) -> u64 {
        *self.saved.borrow_mut().entry((stage.index(), rows)).or_insert_with(|| {
            let candidate = &self.candidate.stages[stage.index()];
            self.evaluator.sizes(candidate, rows, &FixedBitSet::new()).saved
        })
    }
}

#[cfg(test)]
mod tests;
