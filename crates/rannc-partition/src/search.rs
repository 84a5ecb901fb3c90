//! The search for the best division: numbers of stages and microbatches, and schedules.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use rannc_cost::{Classes, Cluster, DeviceCosts, Sharding};
use rannc_graph::NodeId;
use rayon::prelude::*;

use crate::PartitionError;
use crate::block::Balance;
use crate::bound::Ground;
use crate::facts::FactCache;
use crate::layout::{Layout, Shape};
use crate::options::{Candidate, Options, Progress, StageCandidate, microbatch_candidates};
use crate::orders::orders;
use crate::partitioner::{Cut, LineKey, Partitioner};
use crate::price::{Pricer, Setting};
use crate::runs::Runs;
use crate::stage::{Division, Problem};

/// The most candidates that a search returns, and how many of them are of any shape.
const NUM_CANDIDATES: usize = 32;
const NUM_FREE_CANDIDATES: usize = 6;
/// Candidates may take so many times the best estimate.
const MOST_TIMES_BEST: u64 = 3;
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

/// What a stage may take on a device of each class.
fn limits(classes: &Classes, options: &Options) -> Vec<u64> {
    let usable = |bytes: u64| {
        let left = 1_000_000 - options.memory_margin_ppm.min(1_000_000);
        (u128::from(bytes) * u128::from(left) / 1_000_000) as u64
    };
    let limit = |bytes| usable(bytes).min(options.memory_limit_bytes);
    classes.devices.iter().map(|device| limit(device.memory_bytes)).collect()
}

pub(crate) struct Search<'a, 'g> {
    pub(crate) partitioner: &'a Partitioner<'g>,
    pub(crate) costs: &'a DeviceCosts<'a>,
    pub(crate) cluster: &'a Cluster,
    pub(crate) options: &'a Options,
    pub(crate) classes: Classes,
    pub(crate) limits: Vec<u64>,
    pub(crate) orders: Vec<Vec<u32>>,
    pub(crate) progress: &'a dyn Progress,
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
    pub(crate) schedule: usize,
    starts: Vec<usize>,
    pub(crate) ranks: Vec<Vec<u32>>,
    /// Where the division belongs: numbers of the pricer and of the layout.
    pub(crate) place: (usize, usize),
    pub(crate) division: Division,
}

impl Found {
    pub(crate) fn new(
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
    /// The same for all numbers.
    pub(crate) layouts: Arc<[Layout]>,
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

    pub(crate) fn run(&self) -> Result<Vec<Candidate>, PartitionError> {
        let found = self.find();
        if !found.is_empty() {
            return Ok(found);
        }
        let finest = MAX_BLOCKS.min(self.partitioner.atoms.len());
        Err(self.does_not_fit(&self.cut(finest)))
    }

    /// The fewest and the most blocks to search with.
    pub(crate) fn block_counts(&self) -> (usize, usize) {
        let finest = MAX_BLOCKS.min(self.partitioner.atoms.len());
        let wanted = self.options.max_blocks.max(self.options.num_stages.unwrap_or(1));
        (wanted.max(self.fewest_stages().saturating_mul(3)).clamp(1, finest), finest)
    }

    /// The best candidates; none if nothing fits.
    pub(crate) fn find(&self) -> Vec<Candidate> {
        let (mut num_blocks, finest) = self.block_counts();
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

    pub(crate) fn line_key(&self) -> LineKey {
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

    pub(crate) fn setting(&self, microbatches: u64) -> Setting<'_> {
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
        let layout = |(shape, order): (&Units, &Vec<u32>)| {
            let &Units { shape, one_each, stage_counts } = shape;
            let classes = &self.classes;
            Layout::new(self.cluster, classes, order, shape, one_each, stage_counts, may_idle)
        };
        let pairs =
            shapes.iter().flat_map(|shape| self.orders.iter().map(move |order| (shape, order)));
        let layouts: Arc<[Layout]> = pairs.map(layout).collect();
        let case = |microbatches| {
            let pricer = Pricer::new(runs, facts, self.setting(microbatches));
            let remaining = pricer.remaining();
            Case { pricer, remaining, layouts: Arc::clone(&layouts) }
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

    pub(crate) fn ground(&self) -> Ground<'_> {
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

    pub(crate) fn microbatch_counts(&self) -> Vec<u64> {
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

    /// Smaller blocks around the cuts of a division.
    pub(crate) fn zoomed(&self, division: &Division, cut: &Cut) -> Cut {
        let pieces = (MAX_FINE_BLOCKS / (2 * division.starts.len())).clamp(1, PIECES);
        let blocks = cut.blocks.zoom(&division.starts[1..], pieces);
        self.partitioner.runs_of(self.costs, blocks, self.options.batch_rows)
    }

    /// The division with its cuts at the best places nearby.
    fn refined(&self, coarse: &Problem<'_>, division: &Division, cut: &Cut) -> Option<Candidate> {
        let num_stages = division.starts.len();
        if num_stages == 1 || cut.blocks.len() == self.partitioner.atoms.len() {
            return None;
        }
        let fine = self.zoomed(division, cut);
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

    pub(crate) fn candidate(
        &self,
        problem: &Problem<'_>,
        division: &Division,
        cut: &Cut,
    ) -> Candidate {
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
