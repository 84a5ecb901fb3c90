//! How short a step can possibly be, whatever the plan.
//!
//! - **Work**: every row of the batch passes every operator. Each device can at best work all the time,
//!   at the number of rows at which an operator takes least for each.
//! - **Critical path**: a microbatch passes the longest path of operators forward and back, at best
//!   with as many replicas as there are devices. Replicas hold copies of parameters, and all copies
//!   of all parameters must find room: with `q` bytes for one copy of an operator's parameters and
//!   `k` replicas, `sum(k * q) <= memory of all devices`. Where that binds, the path is bounded by
//!   Lagrange's method: for any price `y >= 0` of a byte no plan takes less than
//!   `sum(min over k of time(k) + y * k * q) - y * memory`.
//!
//! Both hold for each number of microbatches; the bound is the least over those allowed of the larger
//! of the two. Not counted are transfers, reductions, and waiting for the pipeline to fill.

use std::collections::BTreeMap;

use rannc_cost::{Classes, DeviceCosts, Sharding, Training, is_trained};
use rannc_graph::{Graph, NodeId};

use crate::Atoms;

/// A lower bound on the time of a step, and what it rests on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LowerBound {
    /// No plan that is allowed takes less.
    pub step_ns: u64,
    /// All work, divided over all devices at their best.
    pub work_ns: u64,
    /// The longest path, with as many replicas as there are devices.
    pub critical_path_ns: u64,
    /// The longest path, with as many replicas as the memory has room for.
    pub memory_ns: u64,
}

/// What the bound stands on.
pub(crate) struct Ground<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) atoms: &'a Atoms,
    pub(crate) costs: &'a DeviceCosts<'a>,
    pub(crate) classes: &'a Classes,
    /// What may be used of a device of each class.
    pub(crate) limits: &'a [u64],
    pub(crate) training: &'a Training,
    pub(crate) sharding: Sharding,
    pub(crate) batch_rows: u64,
}

/// Prices of a byte to try, as powers of two of (time of the path over memory).
const PRICES: std::ops::Range<i32> = -6..7;

impl Ground<'_> {
    /// The bound over some numbers of microbatches.
    pub(crate) fn bound(&self, microbatches: &[u64]) -> LowerBound {
        let work_ns = self.work(microbatches.iter().copied().min().unwrap_or(1));
        let path = self.path();
        let mut least: Option<LowerBound> = None;
        for &microbatches in microbatches {
            let (critical_path_ns, memory_ns) = self.along(&path, microbatches);
            let step_ns = work_ns.max(critical_path_ns).max(memory_ns);
            let bound = LowerBound { step_ns, work_ns, critical_path_ns, memory_ns };
            if least.is_none_or(|least| step_ns < least.step_ns) {
                least = Some(bound);
            }
        }
        least.unwrap_or_default()
    }

    /// For each number of microbatches a time that no microbatch passes the model and back in less.
    pub(crate) fn paths(&self, microbatches: &[u64]) -> Vec<u64> {
        let path = self.path();
        let along = microbatches.iter().map(|&microbatches| self.along(&path, microbatches));
        along.map(|(fastest, memory)| fastest.max(memory)).collect()
    }

    fn owned(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.graph.node_ids().filter(|&id| self.atoms.of(id).is_some())
    }

    /// Work over devices. With several classes each operator is counted on the class that does it at
    /// the least share of that class's whole speed, which no division of work beats.
    fn work(&self, fewest_microbatches: u64) -> u64 {
        let most_rows = self.batch_rows.div_ceil(fewest_microbatches.max(1)).max(1);
        let num_classes = self.costs.num_classes();
        let by_class: Vec<BTreeMap<usize, u64>> = (0..num_classes)
            .map(|class| {
                let mut counts = BTreeMap::new();
                self.owned().for_each(|id| {
                    *counts.entry(self.costs.class(class).kind(id)).or_insert(0) += 1;
                });
                counts
            })
            .collect();
        let thousandths =
            |class: usize, kind: usize| self.costs.class(class).least_per_row(kind, most_rows);
        // Time of one row of everything on one device of each class, in thousandths.
        let alone: Vec<u128> = by_class
            .iter()
            .enumerate()
            .map(|(class, counts)| {
                let each = counts.iter().map(|(&kind, &count)| {
                    u128::from(thousandths(class, kind)) * u128::from(count)
                });
                each.sum()
            })
            .collect();
        if num_classes == 1 {
            let devices = self.classes.of_rank.len().max(1) as u128;
            return (alone[0] * u128::from(self.batch_rows) / 1000 / devices) as u64;
        }
        // Weigh a nanosecond of a class by how much of all the work its devices do in it.
        let speed = |class: usize| 1e18 / alone[class].max(1) as f64;
        let devices = self.classes.of_rank.iter();
        let all: f64 = devices.map(|&class| speed(class)).sum();
        let mut weighed = 0.0;
        for id in self.owned() {
            let on = |class: usize| {
                let kind = self.costs.class(class).kind(id);
                thousandths(class, kind) as f64 * speed(class)
            };
            weighed += (0..num_classes).map(on).fold(f64::INFINITY, f64::min);
        }
        // Rounded down, with room for the error of the sums.
        (weighed * self.batch_rows as f64 / 1000.0 / all * (1.0 - 1e-9)) as u64
    }

    /// The operators of the longest path, by the time they take at the full batch.
    fn path(&self) -> Vec<NodeId> {
        let mut times: BTreeMap<usize, u64> = BTreeMap::new();
        let model = self.costs.class(0);
        let mut length = vec![0_u64; self.graph.nodes().len()];
        let mut before: Vec<Option<NodeId>> = vec![None; self.graph.nodes().len()];
        let mut last: Option<NodeId> = None;
        for id in self.owned() {
            let made =
                self.graph.node(id).inputs.iter().filter_map(|&value| self.graph.producer(value));
            let longest = made
                .filter(|made| self.atoms.of(*made).is_some())
                .max_by_key(|made| (length[made.index()], std::cmp::Reverse(*made)));
            let kind = model.kind(id);
            let time = *times.entry(kind).or_insert_with(|| {
                let rows = self.batch_rows;
                model.forward_of(kind, rows).saturating_add(model.backward_of(kind, rows))
            });
            let so_far = longest.map_or(0, |made| length[made.index()]);
            length[id.index()] = so_far.saturating_add(time);
            before[id.index()] = longest;
            if last.is_none_or(|last| length[id.index()] > length[last.index()]) {
                last = Some(id);
            }
        }
        std::iter::successors(last, |id| before[id.index()]).collect()
    }

    /// The time of the path with all replicas, and with as many as there is memory for.
    fn along(&self, path: &[NodeId], microbatches: u64) -> (u64, u64) {
        let smallest = (self.batch_rows / microbatches).max(1);
        let devices = self.classes.of_rank.len().max(1) as u64;
        let most = devices.min(smallest);
        // Equal operators with equally large parameters, with their number.
        let mut groups: BTreeMap<(usize, u64), u64> = BTreeMap::new();
        let mut paid = vec![false; self.graph.values().len()];
        for &id in path {
            let mut bytes = 0_u64;
            for &value in &self.graph.node(id).inputs {
                let new = is_trained(self.graph, value)
                    && !std::mem::replace(&mut paid[value.index()], true);
                bytes += if new { self.copy_bytes(self.graph.value(value).bytes(1)) } else { 0 };
            }
            *groups.entry((self.kind_everywhere(id), bytes)).or_insert(0) += 1;
        }
        let representative: BTreeMap<usize, NodeId> =
            path.iter().map(|&id| (self.kind_everywhere(id), id)).collect();
        let time = |kind: usize, replicas: u64| {
            let id = representative[&kind];
            let rows = smallest.div_ceil(replicas).max(1);
            let on = |class: usize| {
                let model = self.costs.class(class);
                // A replica with an uneven share may have as little as one row.
                let rows = if self.costs.num_classes() == 1 { rows } else { 1 };
                model.forward_ns(id, rows).saturating_add(model.backward_ns(id, rows))
            };
            (0..self.costs.num_classes()).map(on).min().unwrap_or(0)
        };
        let fastest =
            groups.iter().map(|(&(kind, _), &count)| time(kind, most).saturating_mul(count));
        let fastest = fastest.fold(0, u64::saturating_add);
        let needed =
            groups.iter().map(|(&(_, bytes), &count)| u128::from(bytes) * u128::from(count));
        let needed: u128 = needed.sum();
        let room: u128 =
            self.classes.of_rank.iter().map(|&class| u128::from(self.limits[class])).sum();
        if needed * u128::from(most) <= room || room == 0 {
            return (fastest, 0);
        }
        // Few enough numbers of replicas to look at: with them the rows of a replica change.
        let mut counts: Vec<u64> = (1..=smallest.isqrt().min(most)).collect();
        counts.extend(
            (1..=smallest.isqrt()).map(|rows| smallest.div_ceil(rows)).filter(|&k| k <= most),
        );
        counts.push(most);
        counts.sort_unstable();
        counts.dedup();
        let tables: Vec<(f64, f64, Vec<f64>)> = groups
            .iter()
            .map(|(&(kind, bytes), &count)| {
                let times = counts.iter().map(|&replicas| time(kind, replicas) as f64);
                (bytes as f64, count as f64, times.collect())
            })
            .collect();
        let best = PRICES.map(|power| {
            let price = fastest as f64 / room as f64 * 2_f64.powi(power);
            let sum: f64 = tables
                .iter()
                .map(|(bytes, count, times)| {
                    let choices = times.iter().zip(&counts);
                    let each =
                        choices.map(|(time, &replicas)| time + price * replicas as f64 * bytes);
                    count * each.fold(f64::INFINITY, f64::min)
                })
                .sum();
            sum - price * room as f64
        });
        let best = best.fold(0.0, f64::max);
        (fastest, (best * (1.0 - 1e-9)) as u64)
    }

    /// What one more copy of a parameter takes on a device.
    fn copy_bytes(&self, bytes: u64) -> u64 {
        let optimizer =
            u128::from(bytes) * u128::from(self.training.optimizer_state_factor_ppm) / 1_000_000;
        match self.sharding {
            Sharding::None => bytes.saturating_mul(2).saturating_add(optimizer as u64),
            Sharding::Optimizer => bytes.saturating_mul(2),
            Sharding::Gradients => bytes,
            Sharding::Parameters => 0,
        }
    }

    /// The kind of an operator where kinds differ between classes of devices.
    fn kind_everywhere(&self, id: NodeId) -> usize {
        self.costs.class(0).kind(id)
    }
}
