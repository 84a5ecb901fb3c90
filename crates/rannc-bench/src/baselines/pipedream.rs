//! `PipeDream`'s dynamic programme (Narayanan et al., SOSP 2019, section 3.1).
//!
//! The time of the slowest stage is minimised, where a stage on `m` machines takes the greater of its
//! share of the work and the synchronisation of its weights:
//!
//! ```text
//! A(i -> j, m) = min over s, m' of max(A(i -> s, m - m'), 2 a_s / B, T(s -> j, m'))
//! T(i -> j, m) = 1/m max(A'(i -> j), 2 (m - 1) w / B)
//! ```
//!
//! With several nodes it is solved twice: within a node, where `A'` is the time of the operators, and
//! over nodes, where `A'` is the best time within a node. Weights are synchronised once for each
//! microbatch as published, or once for all of a batch as a flush needs it. Stages that do not fit
//! their memory are left out, with as many microbatches in flight as there are machines behind.

use std::rc::Rc;

use rannc_cost::Link;
use rannc_partition::simple::{Assessor, Proposal, Recompute, Sizes, nodes};

/// The most units of layers.
const MAX_UNITS: usize = 128;
/// The most units of machines on each level.
const MAX_MACHINES: usize = 64;
const IMPOSSIBLE: u64 = u64::MAX;

/// The best division for each number of microbatches, each way to synchronise and to recompute, and
/// each guess of how many microbatches the nodes behind keep in flight.
pub(super) fn proposals(assessor: &Assessor) -> Vec<Proposal> {
    let cluster = assessor.setting.cluster;
    let num_devices = cluster.devices.len();
    let levels = if num_devices <= MAX_MACHINES { (1, num_devices) } else { nodes(cluster) };
    let mut found = Vec::new();
    let mut behind = vec![0, levels.0.isqrt() as u64 * 2, num_devices as u64];
    behind.dedup();
    if levels.0 == 1 {
        behind.truncate(1);
    }
    let prices = Prices::new(assessor);
    let counts =
        assessor.setting.microbatches(1).into_iter().filter(|count| count.is_power_of_two());
    for microbatches in counts {
        for recompute in [Recompute::Nothing, Recompute::Layers, Recompute::Stages] {
            for per_batch in [false, true] {
                for &extra in &behind {
                    let case = Case { prices: &prices, microbatches, recompute, per_batch, extra };
                    let Some((starts, ranks)) = case.solve(levels) else { continue };
                    let (starts, ranks) = (Rc::new(starts), Rc::new(ranks));
                    let schedules = assessor.setting.options.schedules.iter();
                    found.extend(schedules.map(|&schedule| Proposal {
                        starts: Rc::clone(&starts),
                        ranks: Rc::clone(&ranks),
                        microbatches,
                        schedule,
                        recompute,
                    }));
                }
            }
        }
    }
    found
}

/// Units of layers, and the sizes of all runs of them.
struct Prices<'a> {
    assessor: &'a Assessor<'a>,
    bounds: Vec<usize>,
    /// By first unit, then by length.
    sizes: Vec<Vec<Sizes>>,
}

impl<'a> Prices<'a> {
    fn new(assessor: &'a Assessor<'a>) -> Self {
        let bounds = assessor.line.units(MAX_UNITS, assessor.setting.microbatch_to_balance());
        let count = bounds.len() - 1;
        let sizes = (0..count).map(|first| assessor.line.sizes(&bounds[first..])).collect();
        Self { assessor, bounds, sizes }
    }

    fn count(&self) -> usize {
        self.bounds.len() - 1
    }

    fn sizes(&self, first: usize, end: usize) -> &Sizes {
        &self.sizes[first][end - first - 1]
    }
}

struct Case<'a> {
    prices: &'a Prices<'a>,
    microbatches: u64,
    recompute: Recompute,
    /// Whether weights are synchronised once for all microbatches.
    per_batch: bool,
    /// Microbatches in flight because of other nodes.
    extra: u64,
}

/// A run of units on some machines.
#[derive(Clone, Copy)]
struct Stage {
    time: u64,
    /// The most microbatches in flight that fit.
    depth: u64,
}

/// The least time of the slowest stage for a run of units, and the division that has it.
#[derive(Clone)]
struct Best {
    /// By first unit and machines.
    time: Vec<Vec<u64>>,
    /// End of the first stage, and its machines.
    first: Vec<Vec<(usize, usize)>>,
}

impl Case<'_> {
    fn solve(&self, (num_nodes, per_node): (usize, usize)) -> Option<(Vec<usize>, Vec<Vec<u32>>)> {
        let link = &self.prices.assessor.setting.cluster.intra_node;
        let count = self.prices.count();
        if num_nodes == 1 {
            let best = self.within(&self.table(per_node, link), count, per_node);
            let stages = best.stages(0, count, per_node)?;
            let mut next = 0;
            let ranks = stages.iter().map(|&(_, machines)| {
                next += machines as u32;
                (next - machines as u32..next).collect()
            });
            let ranks = ranks.collect();
            return Some((self.starts(&stages), ranks));
        }
        let group = num_nodes.div_ceil(MAX_MACHINES);
        if !num_nodes.is_multiple_of(group) {
            return None;
        }
        let table = self.table(per_node, link);
        let inner: Vec<Best> = (1..=count).map(|end| self.within(&table, end, per_node)).collect();
        let outer = self.between(&inner, per_node, num_nodes / group, group);
        let mut stages = Vec::new();
        let mut ranks: Vec<Vec<u32>> = Vec::new();
        let (mut first, mut node) = (0, 0);
        for (end, groups) in outer.stages(0, count, num_nodes / group)? {
            let within = inner[end - 1].stages(first, end, per_node)?;
            let nodes = node..node + groups * group;
            let mut device = 0;
            for &(_, machines) in &within {
                let on = |node: usize| {
                    (device..device + machines).map(move |d| (node * per_node + d) as u32)
                };
                ranks.push(nodes.clone().flat_map(on).collect());
                device += machines;
            }
            stages.extend(within);
            (first, node) = (end, nodes.end);
        }
        Some((self.starts(&stages), ranks))
    }

    fn starts(&self, stages: &[(usize, usize)]) -> Vec<usize> {
        let ends = stages[..stages.len() - 1].iter().map(|&(end, _)| end);
        [0].into_iter().chain(ends).map(|unit| self.prices.bounds[unit]).collect()
    }

    /// Every stage within a node on up to `machines` of its devices.
    fn table(&self, machines: usize, link: &Link) -> Vec<Stage> {
        let Prices { assessor, bounds, .. } = self.prices;
        let count = self.prices.count();
        let rows = assessor.rows(self.microbatches, 1);
        let mut table = vec![Stage { time: IMPOSSIBLE, depth: 0 }; count * count * machines];
        for first in 0..count {
            for end in first + 1..=count {
                let part = bounds[first]..bounds[end];
                let times = assessor.times(&part, rows, self.recompute);
                let work = times.forward.saturating_add(times.backward);
                for replicas in 1..=machines.min(usize::try_from(rows).unwrap_or(machines)) {
                    let time = self.stage_time(work, (first, end), replicas, link);
                    let depth = self.depth((first, end), replicas);
                    table[(first * count + end - 1) * machines + replicas - 1] =
                        Stage { time, depth };
                }
            }
        }
        table
    }

    /// Units up to `end` on the machines of one node.
    fn within(&self, table: &[Stage], end: usize, machines: usize) -> Best {
        let count = self.prices.count();
        best(end, machines, |first, end, replicas, behind| {
            let stage = table[(first * count + end - 1) * machines + replicas - 1];
            let needed = 1 + behind.div_ceil(replicas) as u64 + self.extra;
            if needed.min(self.microbatches) <= stage.depth { stage.time } else { IMPOSSIBLE }
        })
    }

    /// All units on nodes, `group` of them at a time.
    fn between(&self, inner: &[Best], per_node: usize, groups: usize, group: usize) -> Best {
        let Prices { assessor, .. } = self.prices;
        let (link, rows) =
            (&assessor.setting.cluster.inter_node, assessor.rows(self.microbatches, 1));
        let count = inner.len();
        let mut table = vec![IMPOSSIBLE; count * count * groups];
        for first in 0..count {
            for end in first + 1..=count {
                let work = inner[end - 1].time[first][per_node];
                for replicas in (1..=groups).filter(|_| work != IMPOSSIBLE) {
                    let nodes = replicas * group;
                    if (nodes * per_node) as u64 <= rows {
                        table[(first * count + end - 1) * groups + replicas - 1] =
                            self.stage_time(work, (first, end), nodes, link);
                    }
                }
            }
        }
        best(count, groups, |first, end, replicas, _| {
            table[(first * count + end - 1) * groups + replicas - 1]
        })
    }

    /// The published time of a stage, or of the transfers into it if these take longer.
    fn stage_time(
        &self,
        work: u64,
        (first, end): (usize, usize),
        machines: usize,
        link: &Link,
    ) -> u64 {
        let trained = self.prices.sizes(first, end).trained;
        let reduction = link.all_reduce_ns(trained, machines as u64);
        let times = if self.per_batch { self.microbatches } else { 1 };
        (work / machines as u64).max(reduction / times).max(self.transfer(link, first, machines))
    }

    /// Moving the values that cross into a stage, and their gradients.
    fn transfer(&self, link: &Link, first: usize, replicas: usize) -> u64 {
        if first == 0 {
            return 0;
        }
        let rows = self.prices.assessor.rows(self.microbatches, replicas);
        let received = self.prices.sizes(first, first + 1).received.at(rows);
        2 * link.transfer_ns(received)
    }

    /// The most microbatches in flight with which a stage fits.
    fn depth(&self, (first, end): (usize, usize), replicas: usize) -> u64 {
        let Prices { assessor, bounds, .. } = self.prices;
        let rows = assessor.rows(self.microbatches, replicas);
        let sizes = self.prices.sizes(first, end);
        let part = bounds[first]..bounds[end];
        let bytes = |in_flight| assessor.bytes(&part, sizes, rows, in_flight, self.recompute);
        let (none, one) = (bytes(0), bytes(1));
        let limit = assessor.setting.memory_limit_bytes;
        if one > limit { 0 } else { (limit - none) / (one - none).max(1) }
    }
}

/// The dynamic programme over units `0..count` and machines, from the last stage to the first;
/// `time(first, end, machines, machines behind)`.
fn best(count: usize, machines: usize, time: impl Fn(usize, usize, usize, usize) -> u64) -> Best {
    let mut found = Best {
        time: vec![vec![IMPOSSIBLE; machines + 1]; count + 1],
        first: vec![vec![(0, 0); machines + 1]; count + 1],
    };
    found.time[count][0] = 0;
    for first in (0..count).rev() {
        for end in first + 1..=count {
            for behind in 0..machines {
                let rest = found.time[end][behind];
                if rest == IMPOSSIBLE {
                    continue;
                }
                for here in 1..=machines - behind {
                    let all = here + behind;
                    if rest >= found.time[first][all] {
                        continue;
                    }
                    let slowest = time(first, end, here, behind).max(rest);
                    if slowest < found.time[first][all] {
                        found.time[first][all] = slowest;
                        found.first[first][all] = (end, here);
                    }
                }
            }
        }
    }
    found
}

impl Best {
    /// End and machines of each stage of the best division of `first..end`.
    fn stages(&self, first: usize, end: usize, machines: usize) -> Option<Vec<(usize, usize)>> {
        if self.time[first][machines] == IMPOSSIBLE {
            return None;
        }
        let (mut first, mut machines) = (first, machines);
        let mut stages = Vec::new();
        while first < end {
            let (next, here) = self.first[first][machines];
            stages.push((next, here));
            (first, machines) = (next, machines - here);
        }
        Some(stages)
    }
}
