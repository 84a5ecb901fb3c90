//! Blocks to *stages*: how many, where they end, and which devices each gets.
//!
//! Stages get consecutive blocks and consecutive units of devices. Of a division into stages
//!
//! ```text
//! step = (microbatches - 1) * slowest + sum + tail
//! ```
//!
//! where `slowest` is the longest that a stage is busy with one microbatch, `sum` the time of one
//! microbatch through all stages and back, and `tail` what the reduction of gradients adds: a later
//! stage starts it while earlier ones still run backward. With 1F1B a stage waits for what it
//! receives; with fill-drain transfers run beside the work of other microbatches, so that the slower
//! of the two counts.
//!
//! [`Problem::exact`] is a dynamic programme from the last stage to the first. Its state is (first
//! block, first unit, number of stages so far), for each of which it keeps the divisions that no
//! other beats in all of slowest, sum and tail. Counting stages from the end tells how many
//! microbatches are in flight, hence whether a stage fits. The result is exact for this objective;
//! divisions that cannot beat a known one are dropped early.
//!
//! # Complexity
//!
//! `O(stages * blocks^2 * units^2)` transitions, each times the divisions kept, less what the bound
//! cuts off. Where that is too much, see [`crate::threshold`].

use std::cell::{Cell, RefCell};
use std::ops::Range;

use rannc_cost::ScheduleKind;
use rustc_hash::FxHashMap;

use crate::layout::Layout;
use crate::price::{Plain, Pricer, StageCost, StageDetails};

/// Finding out what to give up so that a stage fits takes as long as pricing so many that fit.
const SEARCHED: u64 = 32;

/// One search: everything but the number of stages and where they end is fixed.
pub(crate) struct Problem<'a> {
    pub(crate) pricer: &'a Pricer<'a>,
    pub(crate) layout: &'a Layout,
    pub(crate) schedule: ScheduleKind,
    /// For the blocks before each: device time and time of one microbatch at best.
    pub(crate) remaining: &'a [(u64, u64)],
    /// By form of the run and set of devices.
    plains: RefCell<FxHashMap<(u32, usize), Option<Plain>>>,
    /// By form of the run, set of devices and microbatches in flight, where something is given up.
    prices: RefCell<FxHashMap<(u32, usize, u64), Option<StageCost>>>,
    /// A time that no microbatch passes the whole model and back in less.
    pub(crate) least_sum: u64,
    /// How often a stage was priced.
    pub(crate) priced: Cell<u64>,
    /// How many units a run of some form with some microbatches in flight needs to keep within a time.
    pub(crate) enough: RefCell<FxHashMap<(u32, u64, u64), usize>>,
}

/// A division into stages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Division {
    /// The estimated step.
    pub(crate) step_ns: u64,
    /// The first block of each stage.
    pub(crate) starts: Vec<usize>,
    /// The units of each stage.
    pub(crate) units: Vec<Range2>,
}

/// From a first to one before the last.
pub(crate) type Range2 = (usize, usize);

/// What a stage adds to a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StageTime {
    /// Time that passes from one microbatch to the next.
    pub(crate) busy: u64,
    /// Time of one microbatch alone.
    pub(crate) alone: u64,
    /// Time from its last backward's start until the stage before can start its own.
    pub(crate) delay: u64,
    pub(crate) reduce: u64,
}

/// Stages put together from the last to some first one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    pub(crate) slowest: u64,
    pub(crate) sum: u64,
    pub(crate) tail: u64,
    /// First block, first unit and label of the stages behind the first.
    pub(crate) rest: (usize, usize, usize),
}

impl Label {
    /// No stages yet.
    pub(crate) fn none(num_blocks: usize, unit: usize) -> Self {
        Self { slowest: 0, sum: 0, tail: 0, rest: (num_blocks, unit, 0) }
    }

    /// With a stage in front.
    pub(crate) fn behind(&self, time: &StageTime, rest: (usize, usize, usize)) -> Self {
        Self {
            slowest: self.slowest.max(time.busy),
            sum: self.sum.saturating_add(time.alone),
            tail: time.reduce.max(self.tail.saturating_sub(time.delay)),
            rest,
        }
    }
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

impl<'a> Problem<'a> {
    pub(crate) fn new(
        pricer: &'a Pricer<'a>,
        layout: &'a Layout,
        schedule: ScheduleKind,
        remaining: &'a [(u64, u64)],
    ) -> Self {
        Self {
            pricer,
            layout,
            schedule,
            remaining,
            least_sum: 0,
            priced: Cell::new(0),
            plains: RefCell::default(),
            prices: RefCell::default(),
            enough: RefCell::default(),
        }
    }

    pub(crate) fn num_blocks(&self) -> usize {
        self.pricer.runs.num_blocks()
    }

    pub(crate) fn microbatches(&self) -> u64 {
        self.pricer.setting.microbatches
    }

    /// Roughly how much work [`Problem::exact`] is.
    pub(crate) fn effort(&self) -> u64 {
        let square = |count: usize| (count as u64) * (count as u64 + 1) / 2;
        let units = if self.layout.one_unit_each {
            self.layout.num_units() as u64
        } else {
            square(self.layout.num_units())
        };
        let stages = self.layout.stage_counts.1.min(self.num_blocks()) as u64;
        square(self.num_blocks()).saturating_mul(units).saturating_mul(stages)
    }

    /// A step that no division of this problem beats.
    pub(crate) fn bound(&self) -> u64 {
        let devices: usize = self.layout.units.iter().map(Vec::len).sum();
        let (work, fastest) = self.remaining[self.num_blocks()];
        self.step_ns(work.div_ceil(devices.max(1) as u64), fastest.max(self.least_sum), 0)
    }

    /// The best division for each number of stages that the layout allows and that fits, by
    /// number of stages; those that take longer than `bound` may be missing.
    pub(crate) fn exact(&self, bound: u64) -> Vec<Division> {
        let (num_blocks, num_units) = (self.num_blocks(), self.layout.num_units());
        let (fewest, most) = self.layout.stage_counts;
        let mut first = Layer::new(num_blocks, num_units);
        let last_ends = if self.layout.may_idle { 1..=num_units } else { num_units..=num_units };
        for unit in last_ends {
            first.at_mut(num_blocks, unit).push(Label::none(num_blocks, unit));
        }
        let mut layers = vec![first];
        let mut divisions = Vec::new();
        for num_stages in 1..=most.min(num_blocks) {
            let layer = self.prepend(&layers[num_stages - 1], num_stages, bound);
            layers.push(layer);
            if num_stages >= fewest {
                let complete = 0..layers[num_stages].at(0, 0).len();
                let all = complete.map(|label| self.read_off(&layers, num_stages, label));
                divisions.extend(all.min());
            }
        }
        divisions
    }

    /// All ways to put a stage before those of `layer`.
    fn prepend(&self, layer: &Layer, num_stages: usize, bound: u64) -> Layer {
        let (num_blocks, num_units) = (self.num_blocks(), layer.num_units);
        let in_flight = self.in_flight(num_stages);
        let mut next = Layer::new(num_blocks, num_units);
        for end in 1..=num_blocks {
            for end_unit in 1..=num_units {
                let labels = layer.at(end, end_unit);
                if labels.is_empty() {
                    continue;
                }
                for start in (0..end).rev() {
                    for start_unit in self.start_units(start, end_unit, num_stages) {
                        let units = (start_unit, end_unit);
                        let Some(time) = self.stage((start, end), units, in_flight) else {
                            continue;
                        };
                        for (index, label) in labels.iter().enumerate() {
                            let label = label.behind(&time, (end, end_unit, index));
                            self.keep(&mut next, start, start_unit, label, bound);
                        }
                    }
                }
            }
        }
        next
    }

    /// Where the units of a stage may start that starts at a block and ends before a unit.
    fn start_units(&self, start: usize, end_unit: usize, num_stages: usize) -> Range<usize> {
        let (fewest, most) = self.layout.stage_counts;
        let all = match start {
            0 if (fewest..=most).contains(&num_stages) => 0..1,
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

    /// The time of a stage; none if it does not fit.
    pub(crate) fn stage(&self, blocks: Range2, units: Range2, in_flight: u64) -> Option<StageTime> {
        let cost = self.price(blocks, units, in_flight)?;
        Some(self.time(&cost, blocks, units))
    }

    pub(crate) fn price(&self, blocks: Range2, units: Range2, in_flight: u64) -> Option<StageCost> {
        self.priced.set(self.priced.get() + 1);
        let set = self.layout.set_id(units.0, units.1);
        let form = self.pricer.runs.form(blocks.0, blocks.1);
        let mut plains = self.plains.borrow_mut();
        let plain = plains
            .entry((form, set))
            .or_insert_with(|| self.pricer.plain(blocks, self.layout.set(set)));
        if let Some(cost) = plain.as_ref().and_then(|plain| self.pricer.within(plain, in_flight)) {
            return Some(cost);
        }
        drop(plains);
        if self.pricer.is_hopeless(blocks) {
            return None;
        }
        let key = (form, set, in_flight);
        *self.prices.borrow_mut().entry(key).or_insert_with(|| {
            self.priced.set(self.priced.get() + SEARCHED);
            self.pricer.price(blocks, self.layout.set(set), in_flight)
        })
    }

    pub(crate) fn details(
        &self,
        blocks: Range2,
        units: Range2,
        in_flight: u64,
    ) -> Option<StageDetails> {
        let set = self.layout.set_id(units.0, units.1);
        self.pricer.details(blocks, self.layout.set(set), in_flight)
    }

    fn time(&self, cost: &StageCost, blocks: Range2, units: Range2) -> StageTime {
        let layout = self.layout;
        let reduce = cost.reduce_ns[usize::from(layout.spans_nodes(units.0, units.1))];
        let everything =
            blocks == (0, self.num_blocks()) && units == (0, layout.num_units()) && layout.has_all;
        let (receive, send, give_back) = if everything {
            // Every rank keeps the rows that it brings.
            (0, 0, 0)
        } else {
            let (receives, returns) = layout.far(units.0, units.1);
            let link = usize::from(returns);
            (cost.receive_ns[usize::from(receives)], cost.send_ns[link], cost.return_ns[link])
        };
        let forward = cost.forward_ns.saturating_add(receive);
        let backward = cost.backward_ns.saturating_add(give_back);
        let alone = forward.saturating_add(backward);
        let busy = match self.schedule {
            ScheduleKind::FillDrain => {
                let forward = cost.forward_ns.max(receive).max(send);
                forward.saturating_add(cost.backward_ns.max(give_back).max(receive))
            }
            ScheduleKind::OneForwardOneBackward => alone.max(send.saturating_add(receive)),
        };
        StageTime { busy, alone, delay: backward, reduce }
    }

    fn keep(&self, layer: &mut Layer, block: usize, unit: usize, label: Label, bound: u64) {
        if self.least_step(&label, block, unit) > bound {
            return;
        }
        let only_sum = self.microbatches() == 1;
        let beats = |a: &Label, b: &Label| {
            (only_sum || a.slowest <= b.slowest) && a.sum <= b.sum && a.tail <= b.tail
        };
        let labels = layer.at_mut(block, unit);
        if !labels.iter().any(|kept| beats(kept, &label)) {
            labels.retain(|kept| !beats(&label, kept));
            labels.push(label);
        }
    }

    /// A step that nothing which ends with this label beats.
    pub(crate) fn least_step(&self, label: &Label, block: usize, unit: usize) -> u64 {
        let (work, fastest) = self.remaining[block];
        let devices: usize = self.layout.units[..unit].iter().map(Vec::len).sum();
        let slowest = label.slowest.max(work.div_ceil(devices.max(1) as u64));
        // What the stages in front take off the tail they add to the sum.
        self.step_ns(slowest, label.sum.saturating_add(fastest.max(label.tail)), 0)
    }

    pub(crate) fn step_ns(&self, slowest: u64, sum: u64, tail: u64) -> u64 {
        slowest.saturating_mul(self.microbatches() - 1).saturating_add(sum).saturating_add(tail)
    }

    /// Reads a division off the labels.
    fn read_off(&self, layers: &[Layer], num_stages: usize, label: usize) -> Division {
        let first = layers[num_stages].at(0, 0)[label];
        let (mut starts, mut units) = (Vec::new(), Vec::new());
        let (mut block, mut unit, mut current) = (0, 0, first);
        for behind in (0..num_stages).rev() {
            let (next_block, next_unit, next_label) = current.rest;
            starts.push(block);
            units.push((unit, next_unit));
            current = layers[behind].at(next_block, next_unit)[next_label];
            (block, unit) = (next_block, next_unit);
        }
        Division { step_ns: self.step_ns(first.slowest, first.sum, first.tail), starts, units }
    }

    /// Microbatches between their forward and backward in the stage with this number from the
    /// end, the last being 1.
    pub(crate) fn in_flight(&self, from_end: usize) -> u64 {
        match self.schedule {
            ScheduleKind::FillDrain => self.microbatches(),
            ScheduleKind::OneForwardOneBackward => self.microbatches().min(from_end as u64),
        }
    }

    /// The blocks, units and microbatches in flight of each stage.
    pub(crate) fn stages(&self, division: &Division) -> Vec<(Range2, Range2, u64)> {
        let num_stages = division.starts.len();
        let ends = division.starts.iter().skip(1).copied().chain([self.num_blocks()]);
        let stages = division.starts.iter().zip(ends).zip(&division.units).enumerate();
        stages
            .map(|(index, ((&start, end), &units))| {
                ((start, end), units, self.in_flight(num_stages - index))
            })
            .collect()
    }

    /// The step of a division, or none if it does not fit.
    pub(crate) fn evaluate(&self, division: &Division) -> Option<u64> {
        let mut label = Label::none(self.num_blocks(), self.layout.num_units());
        for (blocks, units, in_flight) in self.stages(division).into_iter().rev() {
            label = label.behind(&self.stage(blocks, units, in_flight)?, label.rest);
        }
        Some(self.step_ns(label.slowest, label.sum, label.tail))
    }
}
