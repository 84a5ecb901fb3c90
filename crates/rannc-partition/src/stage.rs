//! Blocks to *stages*: how many, where they end, and how many replicas each gets.
//!
//! A dynamic programme from the last stage to the first. Its state is (first block, first device,
//! number of stages so far), for each of which it keeps the divisions that no other beats in all of
//! slowest stage, sum of stages, and slowest gradient reduction:
//!
//! ```text
//! step = (microbatches - 1) * slowest + sum + reduction
//!
//! blocks   0 1 2 | 3 4 | 5 6 7      stages get consecutive blocks
//! devices  0 0 0 | 1 2 | 3 3 3      and consecutive devices
//! ```
//!
//! A stage's time is forward, backward and what it waits to receive (inputs, and the gradients of its
//! outputs) for one microbatch. Counting stages from the end tells how many microbatches are in
//! flight, hence whether a stage fits. The result is exact for this objective; divisions that
//! cannot beat a known one are dropped early by a lower bound on what remains.
//!
//! # Complexity
//!
//! `O(stages * blocks^2 * devices^2)` transitions, each times the divisions kept, less what the bound
//! cuts off.

use rannc_cost::ScheduleKind;

use crate::table::{Layout, StageCost, Table};

/// What the programme minimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    /// A good step time, keeping one division in each state.
    QuickTime,
    /// The least step time; divisions that cannot reach the bound may be dropped.
    Time { bound: u64 },
    /// The least memory of the largest stage, whatever the limit.
    Memory,
}

/// One search: everything but the number of stages and where they end is fixed.
pub(crate) struct Problem<'a> {
    pub(crate) table: &'a Table,
    pub(crate) layout: &'a Layout,
    pub(crate) microbatches: u64,
    pub(crate) schedule: ScheduleKind,
    pub(crate) limit_bytes: u64,
}

/// A division into stages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Division {
    /// What was minimised: nanoseconds or bytes.
    pub(crate) value: u64,
    /// The first block of each stage.
    pub(crate) starts: Vec<usize>,
    /// The replicas of each stage.
    pub(crate) replicas: Vec<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Label {
    slowest: u64,
    sum: u64,
    reduction: u64,
    /// First block, first unit and label of the stages behind the first.
    rest: (usize, usize, usize),
}

/// The labels of all (first block, first unit) with one number of stages.
struct Layer {
    labels: Vec<Vec<Label>>,
    num_units: usize,
}

impl Layer {
    fn new(num_blocks: usize, num_units: usize) -> Self {
        Self { labels: vec![Vec::new(); (num_blocks + 1) * (num_units + 1)], num_units }
    }

    fn at(&self, block: usize, unit: usize) -> &[Label] {
        &self.labels[block * (self.num_units + 1) + unit]
    }

    fn at_mut(&mut self, block: usize, unit: usize) -> &mut Vec<Label> {
        &mut self.labels[block * (self.num_units + 1) + unit]
    }
}

impl Problem<'_> {
    /// The best division for each number of stages that the layout allows and that fits, by
    /// number of stages.
    pub(crate) fn solve(&self, goal: Goal) -> Vec<Division> {
        let (num_blocks, num_units) = (self.table.num_blocks(), self.layout.num_units());
        let Some(&most_stages) = self.layout.stage_counts.last() else { return Vec::new() };
        let mut first = Layer::new(num_blocks, num_units);
        let rest = (num_blocks, num_units, 0);
        first.at_mut(num_blocks, num_units).push(Label { slowest: 0, sum: 0, reduction: 0, rest });
        let mut layers = vec![first];
        let mut divisions = Vec::new();
        for num_stages in 1..=most_stages {
            let layer = self.prepend(&layers[num_stages - 1], num_stages, goal);
            layers.push(layer);
            let complete = 0..layers[num_stages].at(0, 0).len();
            divisions.extend(
                complete.map(|label| self.division(&layers, num_stages, label, goal)).min(),
            );
        }
        divisions
    }

    /// All ways to put a stage before those of `layer`.
    fn prepend(&self, layer: &Layer, num_stages: usize, goal: Goal) -> Layer {
        let (num_blocks, num_units) = (self.table.num_blocks(), layer.num_units);
        let in_flight = self.in_flight(num_stages);
        let mut next = Layer::new(num_blocks, num_units);
        for end in 1..=num_blocks {
            for end_unit in 1..=num_units {
                let labels = layer.at(end, end_unit);
                if labels.is_empty() {
                    continue;
                }
                for start in 0..end {
                    for start_unit in self.start_units(start, end_unit, num_stages) {
                        let units = (start_unit, end_unit);
                        let Some(cost) = self.stage((start, end), units, in_flight, goal) else {
                            continue;
                        };
                        for (index, label) in labels.iter().enumerate() {
                            let label = Label {
                                slowest: label.slowest.max(cost.0),
                                sum: label.sum.saturating_add(cost.0),
                                reduction: label.reduction.max(cost.1),
                                rest: (end, end_unit, index),
                            };
                            self.keep(&mut next, start, start_unit, label, goal);
                        }
                    }
                }
            }
        }
        next
    }

    /// Where the devices of a stage may start that starts at a block and ends before a unit.
    fn start_units(
        &self,
        start: usize,
        end_unit: usize,
        num_stages: usize,
    ) -> std::ops::Range<usize> {
        let counts = &self.layout.stage_counts;
        let (fewest, most) = (counts[0], counts[counts.len() - 1]);
        let all = match start {
            0 if counts.binary_search(&num_stages).is_ok() => 0..1,
            0 => 0..0,
            _ if num_stages == most || num_stages + start < fewest => 0..0,
            _ => 1..end_unit,
        };
        if self.layout.one_unit_each {
            all.start.max(end_unit - 1)..all.end.min(end_unit)
        } else {
            all
        }
    }

    /// Time and reduction of a stage, or its memory; none if it cannot be.
    fn stage(
        &self,
        blocks: (usize, usize),
        units: (usize, usize),
        in_flight: u64,
        goal: Goal,
    ) -> Option<(u64, u64)> {
        let ranks = (self.layout.offsets[units.0], self.layout.offsets[units.1]);
        let cost = self.table.get(blocks, ranks.1 - ranks.0)?;
        if goal == Goal::Memory {
            return Some((cost.bytes(in_flight), 0));
        }
        (cost.bytes(in_flight) <= self.limit_bytes).then(|| self.times(cost, blocks, ranks))
    }

    fn times(&self, cost: &StageCost, blocks: (usize, usize), ranks: (usize, usize)) -> (u64, u64) {
        let layout = self.layout;
        let reduction = cost.reduce_ns[usize::from(layout.spans_nodes(ranks.0, ranks.1))];
        if blocks == (0, self.table.num_blocks()) && layout.uses_all {
            return (cost.time_ns, reduction);
        }
        let total = layout.num_ranks();
        let whole = layout.spans_nodes(0, total);
        let far_in = if ranks.0 == 0 { whole } else { layout.spans_nodes(ranks.0 - 1, ranks.1) };
        let far_out =
            if ranks.1 == total { whole } else { layout.spans_nodes(ranks.0, ranks.1 + 1) };
        let waiting = cost.receive_ns[usize::from(far_in)]
            .saturating_add(cost.return_ns[usize::from(far_out)]);
        (cost.time_ns.saturating_add(waiting), reduction)
    }

    fn keep(&self, layer: &mut Layer, block: usize, unit: usize, label: Label, goal: Goal) {
        if let Goal::Time { bound } = goal {
            let remaining = self.table.remaining(block, self.layout.offsets[unit]);
            let slowest = label.slowest.max(remaining.0);
            let sum = label.sum.saturating_add(remaining.1);
            if self.step_ns(slowest, sum, label.reduction) > bound {
                return;
            }
        }
        let labels = layer.at_mut(block, unit);
        if !matches!(goal, Goal::Time { .. }) {
            match labels.first_mut() {
                Some(kept) if self.value(&label, goal) < self.value(kept, goal) => *kept = label,
                Some(_) => {}
                None => labels.push(label),
            }
            return;
        }
        let only_sum = self.microbatches == 1;
        let beats = |a: &Label, b: &Label| {
            (only_sum || a.slowest <= b.slowest) && a.sum <= b.sum && a.reduction <= b.reduction
        };
        if !labels.iter().any(|kept| beats(kept, &label)) {
            labels.retain(|kept| !beats(&label, kept));
            labels.push(label);
        }
    }

    fn step_ns(&self, slowest: u64, sum: u64, reduction: u64) -> u64 {
        slowest.saturating_mul(self.microbatches - 1).saturating_add(sum).saturating_add(reduction)
    }

    fn value(&self, label: &Label, goal: Goal) -> u64 {
        match goal {
            Goal::Memory => label.slowest,
            _ => self.step_ns(label.slowest, label.sum, label.reduction),
        }
    }

    /// Reads a division off the labels.
    fn division(&self, layers: &[Layer], num_stages: usize, label: usize, goal: Goal) -> Division {
        let first = layers[num_stages].at(0, 0)[label];
        let (mut starts, mut replicas) = (Vec::new(), Vec::new());
        let (mut block, mut unit, mut current) = (0, 0, first);
        for behind in (0..num_stages).rev() {
            let (next_block, next_unit, next_label) = current.rest;
            starts.push(block);
            replicas.push(self.layout.offsets[next_unit] - self.layout.offsets[unit]);
            current = layers[behind].at(next_block, next_unit)[next_label];
            (block, unit) = (next_block, next_unit);
        }
        Division { value: self.value(&first, goal), starts, replicas }
    }

    /// Microbatches between their forward and backward in the stage with this number from the
    /// end, the last being 1.
    pub(crate) fn in_flight(&self, from_end: usize) -> u64 {
        match self.schedule {
            ScheduleKind::FillDrain => self.microbatches,
            ScheduleKind::OneForwardOneBackward => self.microbatches.min(from_end as u64),
        }
    }

    /// The memory of each stage of a division.
    pub(crate) fn stage_bytes(&self, division: &Division) -> Vec<u64> {
        let num_stages = division.starts.len();
        let ends = division.starts.iter().skip(1).copied().chain([self.table.num_blocks()]);
        let stages = division.starts.iter().zip(ends).zip(&division.replicas).enumerate();
        stages
            .map(|(index, ((&start, end), &replicas))| {
                let cost = self.table.get((start, end), replicas);
                cost.map_or(0, |cost| cost.bytes(self.in_flight(num_stages - index)))
            })
            .collect()
    }

    /// The step time of a division, or none if it does not fit: what the programme minimises,
    /// computed the long way round.
    #[cfg(test)]
    pub(crate) fn evaluate(&self, starts: &[usize], units: &[usize]) -> Option<u64> {
        let num_stages = starts.len();
        let (mut slowest, mut sum, mut reduction) = (0, 0, 0);
        for index in 0..num_stages {
            let end = starts.get(index + 1).copied().unwrap_or(self.table.num_blocks());
            let range =
                (units[index], units.get(index + 1).copied().unwrap_or(self.layout.num_units()));
            let in_flight = self.in_flight(num_stages - index);
            let goal = Goal::Time { bound: u64::MAX };
            let (time, reduce) = self.stage((starts[index], end), range, in_flight, goal)?;
            slowest = time.max(slowest);
            sum += time;
            reduction = reduce.max(reduction);
        }
        Some(self.step_ns(slowest, sum, reduction))
    }
}
