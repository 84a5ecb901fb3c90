//! The search for the best division: numbers of stages and microbatches, and schedules.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use fixedbitset::FixedBitSet;
use rannc_cost::{Classes, Cluster, DeviceCosts, Sharding};
use rannc_graph::{Graph, NodeId};
use rayon::prelude::*;

use crate::block::{Balance, Line};
use crate::bound::{Ground, LowerBound};
use crate::facts::FactCache;
use crate::layout::{Layout, Shape};
use crate::options::{Candidate, Options, Progress, StageCandidate, microbatch_candidates};
use crate::orders::orders;
use crate::price::{Pricer, Setting};
use crate::runs::Runs;
use crate::stage::{Division, Problem};
use crate::uniform::best_of_each;
use crate::{Atoms, Blocks, PartitionError};

/// The most candidates that a search returns, and how many of them are of any shape.
const NUM_CANDIDATES: usize = 32;
const NUM_FREE_CANDIDATES: usize = 6;
/// Candidates may take so many times the best estimate.
const MOST_TIMES_BEST: u64 = 3;
/// The most stages of regular candidates.
const MOST_UNIFORM: usize = 256;
/// The most numbers of microbatches to look at for these.
const MOST_UNIFORM_COUNTS: usize = 5;
/// The search looks for what takes longer than the best by this part of it.
const WORST_OVER_BEST: u64 = 8;
/// The most units that devices are handed out in, unless more stages are needed to fit.
const MAX_UNITS: usize = 64;
/// The most blocks.
const MAX_BLOCKS: usize = 1024;
/// What the exact programme may cost, by its own estimate; beyond it is approximated.
const EXACT_EFFORT: u64 = 1 << 20;
/// Once something is found the search ends after so many stages were priced: what it might still
/// find is worth less than its time.
const MOST_PRICED: u64 = 6_000_000;
/// Problems that are solved at once.
const AT_ONCE: usize = 4;
/// The blocks around a cut are cut into so many pieces to find a better place for it.
const PIECES: usize = 6;
/// The most blocks then, roughly.
const MAX_FINE_BLOCKS: usize = 384;

/// Divides one graph, again and again: what depends on the graph alone is found once, and what
/// depends on devices and batch is kept as long as they stay the same.
pub struct Partitioner<'g> {
    pub(crate) graph: &'g Graph,
    atoms: Atoms,
    lines: Mutex<BTreeMap<LineKey, Arc<Line>>>,
    cut: Mutex<BTreeMap<(LineKey, usize, u64), Arc<Cut>>>,
}

/// The rows at which times are compared, what is balanced, and the device, by a text.
type LineKey = (u64, Balance, String);

/// Blocks with what runs of them amount to.
pub(crate) struct Cut {
    pub(crate) blocks: Blocks,
    pub(crate) runs: Runs,
}

impl<'g> Partitioner<'g> {
    /// Finds the atoms of the graph.
    pub fn new(graph: &'g Graph) -> Self {
        let atoms = Atoms::new(graph);
        Self { graph, atoms, lines: Mutex::default(), cut: Mutex::default() }
    }

    /// The graph's atoms.
    pub fn atoms(&self) -> &Atoms {
        &self.atoms
    }

    /// Finds good ways to train the model, all different, the best estimate first: the best few of
    /// all, and the best with equally many replicas of each stage for each number of stages.
    ///
    /// All devices are used if rows and memory allow. Where they do not, devices are left idle, and
    /// the fastest way wins however many it uses: no stage gets more replicas than a microbatch has
    /// rows, and a batch that cannot be split has one microbatch and one replica of each stage.
    /// Replicas that were asked for apply to every stage; if stages were not, there are as many as the
    /// devices suffice for.
    ///
    /// Candidates are compared by estimated time, then number of stages, number of microbatches, order
    /// of the schedule in the options, places of the cuts and devices.
    ///
    /// # Errors
    ///
    /// Any [`PartitionError`] about options, or [`PartitionError::DoesNotFit`].
    pub fn search(
        &self,
        costs: &DeviceCosts<'_>,
        cluster: &Cluster,
        options: &Options,
        progress: &dyn Progress,
    ) -> Result<Vec<Candidate>, PartitionError> {
        check(self.graph, &self.atoms, cluster, options)?;
        if self.atoms.is_empty() {
            return Ok(vec![trivial(self.graph, options)]);
        }
        let search = Search { progress, ..Search::new(self, costs, cluster, options) };
        let found = search.run()?;
        log::debug!("{} candidates, best estimate {} ns", found.len(), found[0].estimate_ns);
        Ok(found)
    }

    /// How short a step can possibly be with these devices and options.
    pub fn lower_bound(
        &self,
        costs: &DeviceCosts<'_>,
        cluster: &Cluster,
        options: &Options,
    ) -> LowerBound {
        let search = Search::new(self, costs, cluster, options);
        search.ground().bound(&search.microbatch_counts())
    }

    fn line(&self, costs: &DeviceCosts<'_>, key: &LineKey) -> Arc<Line> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || Arc::new(Line::of(self.graph, &self.atoms, costs.class(0), key.0, key.1));
        Arc::clone(lines.entry(key.clone()).or_insert_with(make))
    }

    fn cut(
        &self,
        costs: &DeviceCosts<'_>,
        key: &LineKey,
        num_blocks: usize,
        batch: u64,
    ) -> Arc<Cut> {
        let line = self.line(costs, key);
        let mut cuts = self.cut.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (key.clone(), num_blocks, batch);
        let make = || Arc::new(self.runs_of(costs, Blocks::cut(&line, num_blocks), batch));
        Arc::clone(cuts.entry(key).or_insert_with(make))
    }

    fn runs_of(&self, costs: &DeviceCosts<'_>, blocks: Blocks, batch_rows: u64) -> Cut {
        let runs = Runs::new(self.graph, &self.atoms, &blocks, costs.class(0), batch_rows);
        Cut { blocks, runs }
    }
}

/// Finds the best ways to train the model; see [`Partitioner::search`].
///
/// # Errors
///
/// Any [`PartitionError`] about options, or [`PartitionError::DoesNotFit`].
pub fn search(
    graph: &Graph,
    costs: &DeviceCosts<'_>,
    cluster: &Cluster,
    options: &Options,
) -> Result<Vec<Candidate>, PartitionError> {
    Partitioner::new(graph).search(costs, cluster, options, &())
}

/// What a stage may take on a device of each class.
fn limits(classes: &Classes, options: &Options) -> Vec<u64> {
    let usable = |bytes: u64| {
        let left = 1_000_000 - options.memory_margin_ppm.min(1_000_000);
        (u128::from(bytes) * u128::from(left) / 1_000_000) as u64
    };
    let limit = |bytes| usable(bytes).min(options.memory_limit_bytes);
    classes.devices.iter().map(|device| limit(device.memory_bytes)).collect()
}

/// The only way to run a model without operators.
fn trivial(graph: &Graph, options: &Options) -> Candidate {
    let nodes = FixedBitSet::with_capacity(graph.nodes().len());
    let (replicas, microbatches) = if graph.batch().splittable {
        let replicas = options.num_replicas.unwrap_or(options.num_devices);
        (replicas, microbatch_candidates(options)[0])
    } else {
        (1, 1)
    };
    let ranks = (0..replicas as u32).collect();
    Candidate {
        stages: vec![StageCandidate { nodes, ranks, ..StageCandidate::default() }],
        microbatches,
        schedule: options.schedules[0],
        estimate_ns: 0,
    }
}

/// Checks what was asked for against what there is.
fn check(
    graph: &Graph,
    atoms: &Atoms,
    cluster: &Cluster,
    options: &Options,
) -> Result<(), PartitionError> {
    let Options { batch_rows, num_devices, .. } = *options;
    let problem = if batch_rows == 0 {
        "the batch has no rows".to_owned()
    } else if num_devices == 0 {
        "there are no devices".to_owned()
    } else if options.schedules.is_empty() {
        "there are no schedules to choose from".to_owned()
    } else if [options.num_stages, options.num_replicas].contains(&Some(0))
        || options.microbatches == Some(0)
    {
        "stages, replicas and microbatches must be at least 1".to_owned()
    } else if options.min_microbatches > options.max_microbatches {
        let (min, max) = (options.min_microbatches, options.max_microbatches);
        format!("at least {min} and at most {max} microbatches were asked for")
    } else if cluster.devices.len() < num_devices {
        let found = cluster.devices.len();
        format!("{num_devices} devices were asked for, but the cluster has {found}")
    } else {
        String::new()
    };
    if !problem.is_empty() {
        return Err(PartitionError::Options { problem });
    }
    let num_stages = options.num_stages.unwrap_or(1);
    let num_replicas = options.num_replicas.unwrap_or(1);
    let microbatches = options.microbatches.unwrap_or(1);
    let batch = graph.batch();
    if num_stages > atoms.len().max(1) {
        return Err(PartitionError::TooFewOperators { num_stages, num_atoms: atoms.len().max(1) });
    }
    if num_stages.saturating_mul(num_replicas) > num_devices {
        return Err(PartitionError::TooFewDevices { num_stages, num_replicas, num_devices });
    }
    if !batch.splittable && !atoms.is_empty() && (microbatches > 1 || num_replicas > 1) {
        let reason = batch.reason.clone().unwrap_or_else(|| "an operator mixes its rows".into());
        return Err(PartitionError::NotSplittable { microbatches, num_replicas, reason });
    }
    let fewest = microbatch_candidates(options)[0];
    if batch.splittable && fewest.saturating_mul(num_replicas as u64) > batch_rows {
        let microbatches = fewest;
        return Err(PartitionError::TooFewRows { microbatches, num_replicas, batch_rows });
    }
    Ok(())
}

pub(crate) struct Search<'a, 'g> {
    pub(crate) partitioner: &'a Partitioner<'g>,
    pub(crate) costs: &'a DeviceCosts<'a>,
    pub(crate) cluster: &'a Cluster,
    pub(crate) options: &'a Options,
    classes: Classes,
    pub(crate) limits: Vec<u64>,
    orders: Vec<Vec<u32>>,
    progress: &'a dyn Progress,
    /// How many stages were priced to find advice.
    pub(crate) priced: Rc<Cell<u64>>,
}

/// A division with what candidates are compared by, in this order.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Found {
    step_ns: u64,
    num_stages: usize,
    microbatches: u64,
    /// The position of the schedule in the options.
    schedule: usize,
    starts: Vec<usize>,
    pub(crate) ranks: Vec<Vec<u32>>,
    /// Where the division belongs: numbers of the pricer and of the layout.
    place: (usize, usize),
    division: Division,
}

impl Found {
    fn new(
        problem: &Problem<'_>,
        division: Division,
        place: (usize, usize),
        schedule: usize,
    ) -> Self {
        let ranks = |&(start, end): &(usize, usize)| problem.layout.ranks(start, end);
        Self {
            step_ns: division.step_ns,
            num_stages: division.starts.len(),
            microbatches: problem.microbatches(),
            schedule,
            starts: division.starts.clone(),
            ranks: division.units.iter().map(ranks).collect(),
            place,
            division,
        }
    }
}

/// Everything for one number of microbatches.
pub(crate) struct Case<'a> {
    pub(crate) pricer: Pricer<'a>,
    pub(crate) remaining: Vec<(u64, u64)>,
    pub(crate) layouts: Vec<Layout>,
}

impl<'a, 'g> Search<'a, 'g> {
    pub(crate) fn new(
        partitioner: &'a Partitioner<'g>,
        costs: &'a DeviceCosts<'a>,
        cluster: &'a Cluster,
        options: &'a Options,
    ) -> Self {
        let classes = cluster.classes(options.num_devices);
        let limits = limits(&classes, options);
        let orders = orders(&classes);
        Self {
            partitioner,
            costs,
            cluster,
            options,
            classes,
            limits,
            orders,
            progress: &(),
            priced: Rc::default(),
        }
    }

    fn run(&self) -> Result<Vec<Candidate>, PartitionError> {
        let found = self.find();
        if !found.is_empty() {
            return Ok(found);
        }
        let finest = MAX_BLOCKS.min(self.partitioner.atoms.len());
        Err(self.does_not_fit(&self.cut(finest)))
    }

    /// The best candidates; none if nothing fits.
    pub(crate) fn find(&self) -> Vec<Candidate> {
        let finest = MAX_BLOCKS.min(self.partitioner.atoms.len());
        let wanted = self.options.max_blocks.max(self.options.num_stages.unwrap_or(1));
        let mut num_blocks = wanted.max(self.fewest_stages().saturating_mul(3)).clamp(1, finest);
        loop {
            let found = self.with_blocks(num_blocks);
            if !found.is_empty() || num_blocks == finest {
                return found;
            }
            num_blocks = (num_blocks * 2).min(finest);
        }
    }

    pub(crate) fn cut(&self, num_blocks: usize) -> Arc<Cut> {
        self.partitioner.cut(self.costs, &self.line_key(), num_blocks, self.options.batch_rows)
    }

    fn line_key(&self) -> LineKey {
        let scarce = self.fewest_stages() > 1;
        let balance = if scarce { Balance::TimeAndState } else { Balance::Time };
        (self.block_rows(), balance, format!("{:?}", self.classes.devices[0]))
    }

    /// How many stages the parameters need at least.
    pub(crate) fn fewest_stages(&self) -> usize {
        let graph = self.partitioner.graph;
        let factor = self.options.training.optimizer_state_factor_ppm;
        let devices = self.options.num_devices as u64;
        let mut bytes = 0_u64;
        for value in graph.value_ids().filter(|&id| graph.value(id).is_state()) {
            let size = graph.value(value).bytes(1);
            let (mut copies, mut parts) = (size, 0);
            if rannc_cost::is_trained(graph, value) {
                let state = (u128::from(size) * u128::from(factor) / 1_000_000) as u64;
                (copies, parts) = match self.options.sharding {
                    Sharding::None => (size.saturating_mul(2).saturating_add(state), 0),
                    Sharding::Optimizer => (size.saturating_mul(2), state),
                    Sharding::Gradients => (size, state.saturating_add(size)),
                    Sharding::Parameters => (0, state.saturating_add(size.saturating_mul(2))),
                };
            }
            bytes = bytes.saturating_add(copies).saturating_add(parts / devices.max(1));
        }
        let most = self.limits.iter().copied().max().unwrap_or(1).max(1);
        usize::try_from(bytes.div_ceil(most)).unwrap_or(usize::MAX).clamp(1, MAX_BLOCKS)
    }

    /// The rows to balance blocks at: what a device has if all share a batch, as a power of two, so
    /// that a few devices more or less change nothing.
    fn block_rows(&self) -> u64 {
        if self.partitioner.graph.batch().splittable {
            let rows = self.options.batch_rows.div_ceil(self.options.num_devices as u64);
            rows.next_power_of_two().min(self.options.batch_rows)
        } else {
            self.options.batch_rows
        }
    }

    fn with_blocks(&self, num_blocks: usize) -> Vec<Candidate> {
        let cut = self.cut(num_blocks);
        let facts = FactCache::new(&cut.runs, self.costs);
        for may_idle in [false, true] {
            let cases = self.cases(&cut.runs, &facts, may_idle);
            let found = self.solve(&cases);
            log::debug!(
                "{num_blocks} blocks, idle devices {}: {} divisions",
                if may_idle { "allowed" } else { "not allowed" },
                found.len()
            );
            if !found.is_empty() {
                return self.candidates(&found, &cases, &cut);
            }
        }
        Vec::new()
    }

    fn setting(&self, microbatches: u64) -> Setting<'_> {
        Setting {
            cluster: self.cluster,
            classes: &self.classes,
            limits: &self.limits,
            training: &self.options.training,
            batch_rows: self.options.batch_rows,
            microbatches,
            splittable: self.partitioner.graph.batch().splittable,
            recompute: self.options.recompute,
            sharding: self.options.sharding,
            num_devices: self.options.num_devices,
        }
    }

    pub(crate) fn cases<'b>(
        &'b self,
        runs: &'b Runs,
        facts: &'b FactCache<'b>,
        may_idle: bool,
    ) -> Vec<Case<'b>> {
        let counts = self.microbatch_counts();
        let shapes = self.shapes(runs.num_blocks(), self.fewest_stages());
        let case = |microbatches| {
            let setting = self.setting(microbatches);
            let pricer = Pricer::new(runs, facts, setting);
            let remaining = pricer.remaining();
            let layout = |(shape, order): (&Units, &Vec<u32>)| {
                let &Units { shape, one_each, stage_counts } = shape;
                let classes = &self.classes;
                Layout::new(self.cluster, classes, order, shape, one_each, stage_counts, may_idle)
            };
            let pairs =
                shapes.iter().flat_map(|shape| self.orders.iter().map(move |order| (shape, order)));
            Case { pricer, remaining, layouts: pairs.map(layout).collect() }
        };
        counts.into_iter().map(case).collect()
    }

    /// The ways to make units of the devices.
    fn shapes(&self, num_blocks: usize, scarce: usize) -> Vec<Units> {
        let num_devices = self.options.num_devices;
        let most_stages = num_blocks.min(num_devices);
        let stage_counts = self.options.num_stages.map_or((1, most_stages), |count| (count, count));
        if let Some(replicas) = self.options.num_replicas {
            let count = (num_devices / replicas).min(num_blocks);
            let count = self.options.num_stages.unwrap_or(count);
            let shape = Shape::Groups(count, replicas);
            return vec![Units { shape, one_each: true, stage_counts: (count, count) }];
        }
        let units = |shape| Units { shape, one_each: false, stage_counts };
        let needed = stage_counts.0.max(scarce);
        let most_units = MAX_UNITS.max(needed.saturating_mul(4)).min(num_devices);
        let mut counts: BTreeSet<usize> = (1..=most_units)
            .filter(|count| num_devices.is_multiple_of(*count))
            .chain([MAX_UNITS, MAX_UNITS / 2, most_units])
            .filter(|&count| (needed.min(num_devices)..=most_units).contains(&count))
            .collect();
        if num_devices <= MAX_UNITS {
            // Units of one device are all that the others are, side by side.
            counts.retain(|&count| count == num_devices);
        }
        let mut shapes: Vec<Units> =
            counts.iter().map(|&count| units(Shape::Neighbours(count))).collect();
        let nodes = self.cluster.devices[..num_devices].iter().map(|device| device.node);
        let several_nodes = nodes.clone().max() != nodes.min();
        if several_nodes && self.classes.devices.len() == 1 {
            let copies = (2..=num_devices / needed.max(1))
                .filter(|&copies| num_devices.is_multiple_of(copies))
                .map(|copies| (num_devices / copies, copies))
                .filter(|&(count, _)| count > 1 && count <= most_units);
            shapes.extend(copies.map(|(count, copies)| units(Shape::Copies(count, copies))));
        }
        shapes
    }

    fn ground(&self) -> Ground<'_> {
        Ground {
            graph: self.partitioner.graph,
            atoms: &self.partitioner.atoms,
            costs: self.costs,
            classes: &self.classes,
            limits: &self.limits,
            training: &self.options.training,
            sharding: self.options.sharding,
            batch_rows: self.options.batch_rows,
        }
    }

    fn microbatch_counts(&self) -> Vec<u64> {
        let splittable = self.partitioner.graph.batch().splittable;
        if splittable { microbatch_candidates(self.options) } else { vec![1] }
    }

    /// The best divisions of all problems, best first.
    fn solve(&self, cases: &[Case<'_>]) -> Vec<Found> {
        let schedules = &self.options.schedules;
        let paths = self.ground().paths(&self.microbatch_counts());
        let mut problems = Vec::new();
        for (case_index, case) in cases.iter().enumerate() {
            for (layout_index, layout) in case.layouts.iter().enumerate() {
                for (schedule, &kind) in schedules.iter().enumerate() {
                    let mut problem = Problem::new(&case.pricer, layout, kind, &case.remaining);
                    problem.least_sum = paths[case_index];
                    let place = (case_index, layout_index);
                    problems.push((problem.bound(), place, schedule, problem));
                }
            }
        }
        problems.sort_by_key(|(bound, place, schedule, _)| (*bound, *place, *schedule));
        let mut found: Vec<Found> = Vec::new();
        let mut best = u64::MAX;
        let mut priced = 0;
        let total = problems.len() as u64;
        for (done, chunk) in problems.chunks_mut(AT_ONCE).enumerate() {
            self.progress.update("searching divisions", (done * AT_ONCE) as u64, total);
            let most = best.saturating_add(best / WORST_OVER_BEST);
            if chunk[0].0 > most || (priced > MOST_PRICED && !found.is_empty()) {
                break;
            }
            // All of a chunk know the same best, so that threads change nothing.
            let solved: Vec<Vec<Division>> = chunk
                .par_iter_mut()
                .map(|(bound, _, _, problem)| match *bound {
                    bound if bound > most => Vec::new(),
                    _ if problem.effort() <= EXACT_EFFORT => problem.exact(most),
                    _ => problem.approximate(most),
                })
                .collect();
            priced += chunk.iter().map(|(.., problem)| problem.priced.get()).sum::<u64>();
            for ((_, place, schedule, problem), divisions) in chunk.iter().zip(solved) {
                for division in divisions {
                    best = best.min(division.step_ns);
                    found.push(Found::new(problem, division, *place, *schedule));
                }
            }
        }
        log::debug!("{priced} stages priced");
        log::debug!("{} problems, {} divisions", problems.len(), found.len());
        found.sort();
        found
    }

    /// The best few as candidates, with their cuts moved to better places; a division that is there
    /// with another schedule is left out.
    fn candidates(&self, found: &[Found], cases: &[Case<'_>], cut: &Cut) -> Vec<Candidate> {
        let most = found[0].step_ns.saturating_add(found[0].step_ns / WORST_OVER_BEST);
        let mut kept: Vec<&Found> = Vec::new();
        for next in found.iter().filter(|next| next.step_ns <= most) {
            let same = |other: &&Found| {
                (other.microbatches, &other.starts, &other.ranks)
                    == (next.microbatches, &next.starts, &next.ranks)
            };
            if kept.len() < NUM_FREE_CANDIDATES && !kept.iter().any(same) {
                kept.push(next);
            }
        }
        let mut candidates: Vec<Candidate> = self.uniform(cut.blocks.len());
        for found in kept {
            let case = &cases[found.place.0];
            let layout = &case.layouts[found.place.1];
            let kind = self.options.schedules[found.schedule];
            let problem = Problem::new(&case.pricer, layout, kind, &case.remaining);
            candidates.push(self.candidate(&problem, &found.division, cut));
            candidates.extend(self.refined(&problem, &found.division, cut));
        }
        candidates.sort_by_key(|candidate| candidate.estimate_ns);
        let most = candidates[0].estimate_ns.saturating_mul(MOST_TIMES_BEST);
        candidates.retain(|candidate| candidate.estimate_ns <= most);
        let mut distinct: Vec<Candidate> = Vec::new();
        for candidate in candidates {
            if distinct.len() < NUM_CANDIDATES && !distinct.contains(&candidate) {
                distinct.push(candidate);
            }
        }
        distinct
    }

    /// The best divisions with equally many replicas of each stage, for each number of stages that
    /// uses all devices.
    fn uniform(&self, wanted: usize) -> Vec<Candidate> {
        let line = self.partitioner.line(self.costs, &self.line_key());
        let cut = self.cut(Blocks::natural(&line, wanted));
        let facts = FactCache::new(&cut.runs, self.costs);
        let cases = self.cases(&cut.runs, &facts, false);
        let Options { num_devices, num_stages, num_replicas, .. } = *self.options;
        let most = cut.blocks.len().min(num_devices).min(MOST_UNIFORM);
        let counts = (num_stages.unwrap_or(1)..=num_stages.unwrap_or(most))
            .filter(|&count| num_devices.is_multiple_of(count))
            .filter(|&count| num_replicas.is_none_or(|replicas| replicas == num_devices / count));
        let mut shapes = Vec::new();
        for count in counts {
            let replicas = num_devices / count;
            shapes.push((count, Shape::Groups(count, replicas)));
            if count > 1 && replicas > 1 {
                shapes.push((count, Shape::Copies(count, replicas)));
            }
        }
        let mut candidates = Vec::new();
        for (count, shape) in shapes {
            let stage_counts = (count, count);
            let layout = |order: &Vec<u32>| {
                Layout::new(self.cluster, &self.classes, order, shape, true, stage_counts, false)
            };
            let layouts: Vec<Layout> = self.orders.iter().map(layout).collect();
            let mut found = Vec::new();
            // The simulator goes on from the best of these to the numbers between.
            let every = cases.len().div_ceil(MOST_UNIFORM_COUNTS);
            for (case_index, case) in cases.iter().enumerate().rev().step_by(every) {
                for (layout_index, layout) in layouts.iter().enumerate() {
                    for (schedule, &kind) in self.options.schedules.iter().enumerate() {
                        let problem = Problem::new(&case.pricer, layout, kind, &case.remaining);
                        let place = (case_index, layout_index);
                        found.extend(
                            problem
                                .balanced()
                                .map(|division| Found::new(&problem, division, place, schedule)),
                        );
                    }
                }
            }
            for found in best_of_each(found) {
                let case = &cases[found.place.0];
                let kind = self.options.schedules[found.schedule];
                let layout = &layouts[found.place.1];
                let problem = Problem::new(&case.pricer, layout, kind, &case.remaining);
                candidates.push(self.candidate(&problem, &found.division, &cut));
            }
        }
        candidates
    }

    /// The division with its cuts at the best places nearby.
    fn refined(&self, coarse: &Problem<'_>, division: &Division, cut: &Cut) -> Option<Candidate> {
        let num_stages = division.starts.len();
        if num_stages == 1 || cut.blocks.len() == self.partitioner.atoms.len() {
            return None;
        }
        let pieces = (MAX_FINE_BLOCKS / (2 * num_stages)).clamp(1, PIECES);
        let blocks = cut.blocks.zoom(&division.starts[1..], pieces);
        let fine = self.partitioner.runs_of(self.costs, blocks, self.options.batch_rows);
        let facts = FactCache::new(&fine.runs, self.costs);
        let pricer = Pricer::new(&fine.runs, &facts, coarse.pricer.setting);
        let remaining = pricer.remaining();
        let problem = Problem::new(&pricer, coarse.layout, coarse.schedule, &remaining);
        let better = division.step_ns.saturating_sub(1);
        let found = if problem.effort() <= EXACT_EFFORT {
            problem.exact(better)
        } else {
            problem.approximate(better)
        };
        let best = found.into_iter().min()?;
        Some(self.candidate(&problem, &best, &fine))
    }

    fn candidate(&self, problem: &Problem<'_>, division: &Division, cut: &Cut) -> Candidate {
        let Partitioner { graph, atoms, .. } = self.partitioner;
        let stage = |((start, end), units, in_flight): ((usize, usize), (usize, usize), u64)| {
            let details = problem.details((start, end), units, in_flight).unwrap_or_default();
            let ranks = problem.layout.ranks(units.0, units.1);
            let rows_of = |rank: &u32| {
                let class = self.classes.of_rank[*rank as usize];
                let found = details.shares.iter().find(|&&(of, _)| of == class);
                found.map_or(1, |&(_, rows)| rows)
            };
            let sharding = match ranks.len() {
                1 => details.sharding,
                _ => details.sharding.max(self.options.least_sharding),
            };
            let mut shares: Vec<u64> = ranks.iter().map(rows_of).collect();
            if shares.windows(2).all(|pair| pair[0] == pair[1]) {
                shares.clear();
            }
            let group = |&block: &usize| {
                let mut group: Vec<NodeId> = cut.blocks.members(atoms, block).copied().collect();
                group.sort_unstable();
                group
            };
            StageCandidate {
                nodes: atoms.stage(graph, cut.blocks.atoms(start..end).iter().copied()),
                ranks,
                shares,
                sharding,
                recompute: details.repeated.iter().map(group).collect(),
            }
        };
        Candidate {
            stages: problem.stages(division).into_iter().map(stage).collect(),
            microbatches: problem.microbatches(),
            schedule: problem.schedule,
            estimate_ns: division.step_ns,
        }
    }
}

/// A shape with how stages may use it.
struct Units {
    shape: Shape,
    one_each: bool,
    stage_counts: (usize, usize),
}

#[cfg(test)]
mod tests;
