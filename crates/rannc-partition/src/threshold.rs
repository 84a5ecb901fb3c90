//! Stages for many blocks and devices: a limit on the slowest stage, lowered step by step.
//!
//! If no stage may be busy longer than some time, going from the last block to the first tells how
//! few units the rest of the model needs. The least time for which the units suffice is found by
//! bisection. At that time, and at a few longer ones with fewer stages, a dynamic programme over
//! (first block, first unit) looks for the shortest step; only places from which the units in front
//! suffice are looked at, so that its tables are narrow.
//!
//! The result is not proved to be the best. What is lost against [`Problem::exact`] is that each
//! state keeps one division, and that a stage tries only some numbers of units.

use crate::stage::{Division, Label, Problem, Range2};

/// The times to look at, as parts of the least in hundredths.
const TIMES: [u64; 4] = [100, 104, 115, 150];
/// The most places that are looked at for one first block, and for all blocks together.
const MAX_WINDOW: usize = 32;
const MOST_PLACES: usize = 4096;
/// After so many stages were priced no further times are looked at.
const MOST_PRICED: u64 = 1_000_000;
/// Bisection ends when the time is known to this part of it.
const PRECISION: u64 = 64;

/// For each first block, the most units that may be left in front, and the number of stages that
/// the rest then has; where the number of stages is prescribed, for each number of stages behind.
type Reach = Vec<Vec<Option<(usize, usize)>>>;

/// The best known for one first block and one first unit.
#[derive(Clone, Copy)]
struct Cell {
    label: Label,
    stages: usize,
}

impl Problem<'_> {
    /// Good divisions, best first; none takes longer than `bound`.
    pub(crate) fn approximate(&self, bound: u64) -> Vec<Division> {
        let mut found = Vec::new();
        let Some(least) = self.least_time(bound) else { return found };
        for part in TIMES {
            let time = least.saturating_mul(part) / 100;
            let (_, fastest) = self.remaining[self.num_blocks()];
            let least_sum = fastest.max(self.least_sum);
            let too_long = self.microbatches() > 1 && self.step_ns(least, least_sum, 0) > bound;
            if too_long || self.priced.get() > MOST_PRICED {
                break;
            }
            found.extend(self.best_within(time));
        }
        found.retain(|division| division.step_ns <= bound);
        found.sort();
        found.dedup();
        found
    }

    /// Whether anything fits the memory, however long it takes.
    fn fits(&self) -> bool {
        self.reaches(u64::MAX)
    }

    /// Whether the units suffice if no stage is busy for longer than `time`.
    fn reaches(&self, time: u64) -> bool {
        self.reach(time).iter().any(|layer| self.is_complete(layer[0]))
    }

    fn is_complete(&self, front: Option<(usize, usize)>) -> bool {
        front.is_some_and(|(_, stages)| stages >= self.layout.stage_counts.0)
    }

    /// Which of the tables divisions with so many stages belong to: there is one for each number
    /// only where that is prescribed.
    fn layer(&self, stages: usize) -> usize {
        if self.layout.stage_counts.0 > 1 { stages } else { 0 }
    }

    /// How many stages there must be in front of so many: each needs a block and a unit.
    fn still_needed(&self, stages: usize) -> usize {
        self.layout.stage_counts.0.saturating_sub(stages)
    }

    fn num_layers(&self) -> usize {
        self.layer(self.layout.stage_counts.1.min(self.num_blocks())) + 1
    }

    /// Some division that fits the memory.
    pub(crate) fn any_fitting(&self) -> Option<Division> {
        let reach = self.reach(u64::MAX);
        let complete = |layer: &usize| self.is_complete(reach[*layer][0]);
        let mut layer = (0..reach.len()).find(complete)?;
        let (mut starts, mut units) = (Vec::new(), Vec::new());
        let mut start = 0;
        while let Some((unit, stages)) = reach[layer][start].filter(|&(_, stages)| stages > 0) {
            let behind = self.layer(stages - 1);
            let end = (start + 1..=self.num_blocks()).find(|&end| {
                reach[behind][end].filter(|&(end_unit, _)| end_unit > unit).is_some_and(
                    |(end_unit, left)| {
                        let in_flight = self.in_flight(stages);
                        let fewest = self.fewest_units((start, end), end_unit, in_flight, u64::MAX);
                        left + 1 == stages && fewest.is_some_and(|fewest| unit + fewest == end_unit)
                    },
                )
            })?;
            starts.push(start);
            units.push((unit, reach[behind][end]?.0));
            (start, layer) = (end, behind);
        }
        Some(Division { step_ns: u64::MAX, starts, units })
    }

    /// The least limit on the slowest stage that can be kept, nearly; none if nothing fits or the step
    /// would take longer than `bound`.
    fn least_time(&self, bound: u64) -> Option<u64> {
        let devices: usize = self.layout.units.iter().map(Vec::len).sum();
        let (work, fastest) = self.remaining[self.num_blocks()];
        let mut low = work.div_ceil(devices.max(1) as u64);
        let high_enough = |time: u64| self.reaches(time);
        if self.microbatches() == 1 {
            return self.fits().then(|| fastest.max(1));
        }
        let most =
            bound.saturating_sub(fastest.max(self.least_sum)) / (self.microbatches() - 1).max(1);
        if high_enough(low) {
            return Some(low);
        }
        if !self.fits() {
            return None;
        }
        let mut high = low.max(1);
        loop {
            low = high;
            high = high.saturating_add(high / 4).saturating_add(1);
            if high_enough(high) {
                break;
            }
            if high > most || high == u64::MAX {
                return None;
            }
        }
        while high - low > high / PRECISION && self.priced.get() <= MOST_PRICED {
            let middle = low.midpoint(high);
            if high_enough(middle) { high = middle } else { low = middle }
        }
        Some(high)
    }

    /// How much can be left in front of each block if no stage is busy for longer than `time`.
    fn reach(&self, time: u64) -> Reach {
        let (num_blocks, num_units) = (self.num_blocks(), self.layout.num_units());
        let most = self.layout.stage_counts.1;
        let mut reach: Reach = vec![vec![None; num_blocks + 1]; self.num_layers()];
        reach[0][num_blocks] = Some((num_units, 0));
        for start in (0..num_blocks).rev() {
            for end in start + 1..=num_blocks {
                let mut possible = false;
                for layer in 0..reach.len() {
                    let Some((unit, stages)) = reach[layer][end] else { continue };
                    if unit == 0 || stages >= most {
                        continue;
                    }
                    let in_flight = self.in_flight(stages + 1);
                    let Some(units) = self.fewest_units((start, end), unit, in_flight, time) else {
                        continue;
                    };
                    possible = true;
                    let found = (unit - units, stages + 1);
                    if found.0.min(start) < self.still_needed(found.1) {
                        continue;
                    }
                    let better = |known: (usize, usize)| {
                        (found.0, std::cmp::Reverse(found.1))
                            > (known.0, std::cmp::Reverse(known.1))
                    };
                    let known = &mut reach[self.layer(stages + 1)][start];
                    if known.is_none_or(better) {
                        *known = Some(found);
                    }
                }
                if !possible && self.is_too_long((start, end), time) {
                    break;
                }
            }
        }
        reach
    }

    /// Whether a stage of these or more blocks cannot keep within `time` on any units: longer stages
    /// take more time and memory.
    fn is_too_long(&self, blocks: Range2, time: u64) -> bool {
        if self.pricer.is_hopeless(blocks) {
            return true;
        }
        let num_units = self.layout.num_units();
        if self.layout.one_unit_each {
            return (0..num_units).all(|unit| {
                self.stage(blocks, (unit, unit + 1), 1).is_none_or(|one| one.busy > time)
            });
        }
        let within = |units: usize| {
            self.stage(blocks, (0, units), 1).is_some_and(|stage| stage.busy <= time)
        };
        // With more units than rows there is no stage at all.
        !within(num_units) && self.fewest_units(blocks, num_units, 1, time).is_none()
    }

    /// The fewest units before `end_unit` on which a stage keeps within `time`.
    fn fewest_units(
        &self,
        blocks: Range2,
        end_unit: usize,
        in_flight: u64,
        time: u64,
    ) -> Option<usize> {
        let within = |units: usize| {
            let stage = self.stage(blocks, (end_unit - units, end_unit), in_flight);
            stage.is_some_and(|stage| stage.busy <= time)
        };
        let most = if self.layout.one_unit_each { 1 } else { end_unit.min(self.most_units()) };
        if within(1) {
            return Some(1);
        }
        // Mostly as many as at other places.
        let key = (self.pricer.runs.form(blocks.0, blocks.1), in_flight, time);
        let known = self.enough.borrow().get(&key).copied();
        if let Some(known) = known.filter(|&known| known <= most)
            && within(known)
            && !within(known - 1)
        {
            return Some(known);
        }
        let found = search_units(most, &within);
        if let Some(found) = found {
            self.enough.borrow_mut().insert(key, found);
        }
        found
    }

    /// The most units that all have rows in every microbatch.
    fn most_units(&self) -> usize {
        let smallest = self.layout.units.iter().map(Vec::len).min().unwrap_or(1).max(1);
        (self.pricer.setting.most_replicas() / smallest).max(1)
    }

    /// The shortest step in which no stage is busy for longer than `time`, nearly.
    fn best_within(&self, time: u64) -> Option<Division> {
        let num_blocks = self.num_blocks();
        let mut tables = Tables::new(self, time)?;
        for start in (0..num_blocks).rev() {
            if self.priced.get() > 2 * MOST_PRICED {
                return None;
            }
            for end in start + 1..=num_blocks {
                let mut possible = false;
                for layer in 0..self.num_layers() {
                    possible |= self.prolong(&mut tables, (start, end), layer, time);
                }
                if !possible && self.is_too_long((start, end), time) {
                    break;
                }
            }
        }
        self.read_tables(&tables)
    }

    /// Puts a stage of these blocks before everything known behind them; whether any stage of them
    /// is possible.
    fn prolong(&self, tables: &mut Tables, (start, end): Range2, layer: usize, time: u64) -> bool {
        let (fewest, most) = self.layout.stage_counts;
        let mut possible = false;
        let Some((end_from, _)) = tables.windows[layer][end] else { return false };
        for at in 0..tables.cells[layer][end].len() {
            let Some(cell) = tables.cells[layer][end][at] else { continue };
            let end_unit = end_from + at;
            let stages = cell.stages + 1;
            if stages > most || (start == 0 && stages < fewest) {
                continue;
            }
            let in_flight = self.in_flight(stages);
            let Some(least) = self.fewest_units((start, end), end_unit, in_flight, time) else {
                continue;
            };
            possible = true;
            let to = self.layer(stages);
            let Some((from, until)) = tables.windows[to][start] else { continue };
            let takes_all = start == 0 && !self.layout.may_idle;
            let most_units = end_unit.saturating_sub(from).min(self.most_units());
            for units in choices(least, most_units, takes_all, self.layout.one_unit_each) {
                let unit = end_unit - units;
                if unit > until || unit.min(start) < self.still_needed(stages).max(start.min(1)) {
                    continue;
                }
                let stage = self.stage((start, end), (unit, end_unit), in_flight);
                let Some(stage) = stage.filter(|stage| stage.busy <= time) else { continue };
                let label = cell.label.behind(&stage, (end, end_unit, layer));
                let known = &mut tables.cells[to][start][unit - from];
                if known.is_none_or(|known| self.value(&label) < self.value(&known.label)) {
                    *known = Some(Cell { label, stages });
                }
            }
        }
        possible
    }

    fn value(&self, label: &Label) -> u64 {
        self.step_ns(label.slowest, label.sum, label.tail)
    }

    fn read_tables(&self, tables: &Tables) -> Option<Division> {
        let fronts = tables.cells.iter().flat_map(|layer| layer[0].iter().enumerate());
        let complete = fronts.filter_map(|(unit, cell)| Some((unit, (*cell)?)));
        let allowed = complete.filter(|&(unit, cell)| {
            (unit == 0 || self.layout.may_idle) && cell.stages >= self.layout.stage_counts.0
        });
        let (idle, first) = allowed.min_by_key(|(unit, cell)| (self.value(&cell.label), *unit))?;
        let (mut starts, mut units) = (Vec::new(), Vec::new());
        let (mut block, mut unit, mut cell) = (0, idle, first);
        while cell.stages > 0 {
            let (next_block, next_unit, layer) = cell.label.rest;
            starts.push(block);
            units.push((unit, next_unit));
            let (from, _) = tables.windows[layer][next_block]?;
            cell = tables.cells[layer][next_block][next_unit - from]?;
            (block, unit) = (next_block, next_unit);
        }
        let found = Division { step_ns: self.value(&first.label), starts, units };
        // Rather the last devices are idle than the first.
        let moved = found.units.iter().map(|&(start, end)| (start - idle, end - idle)).collect();
        let moved = Division { units: moved, ..found.clone() };
        let step_ns = self.evaluate(&moved).filter(|_| idle > 0);
        Some(step_ns.map_or(found, |step_ns| Division { step_ns, ..moved }))
    }
}

/// The best known for each first block and first unit worth looking at, by layer.
struct Tables {
    /// The first units looked at, ends included.
    windows: Vec<Vec<Option<Range2>>>,
    cells: Vec<Vec<Vec<Option<Cell>>>>,
}

impl Tables {
    fn new(problem: &Problem<'_>, time: u64) -> Option<Self> {
        let (num_blocks, num_units) = (problem.num_blocks(), problem.layout.num_units());
        let reach = problem.reach(time);
        let widest = (MOST_PLACES / num_blocks.max(1)).clamp(6, MAX_WINDOW);
        let ranks_per_unit = problem.layout.units.iter().map(Vec::len).max()?.max(1) as u64;
        let window = |block: usize, front: Option<(usize, usize)>| {
            let (until, _) = front?;
            if block == 0 {
                // The first block's stage takes all units that are left, unless some may idle.
                return Some((0, until));
            }
            let (work, _) = problem.remaining[block];
            let needed = work / time.max(1) / ranks_per_unit;
            let from = usize::try_from(needed).unwrap_or(usize::MAX).min(until);
            Some((from.max(until.saturating_sub(widest)), until))
        };
        let windows: Vec<Vec<Option<Range2>>> = reach
            .iter()
            .map(|layer| {
                layer.iter().enumerate().map(|(block, &front)| window(block, front)).collect()
            })
            .collect();
        let empty = |window: &Option<Range2>| {
            window.map_or_else(Vec::new, |(from, until)| vec![None; until - from + 1])
        };
        let mut cells: Vec<Vec<Vec<Option<Cell>>>> =
            windows.iter().map(|layer| layer.iter().map(empty).collect()).collect();
        let (from, _) = windows[0][num_blocks]?;
        let last = Label::none(num_blocks, num_units);
        cells[0][num_blocks][num_units - from] = Some(Cell { label: last, stages: 0 });
        Some(Self { windows, cells })
    }
}

/// The fewest units that suffice, by doubling and bisection.
fn search_units(most: usize, within: &dyn Fn(usize) -> bool) -> Option<usize> {
    // More units are faster and take less memory each, up to as many as there are rows.
    let mut too_few = 1;
    let mut enough = 2;
    while enough <= most && !within(enough) {
        too_few = enough;
        enough *= 2;
    }
    if enough > most {
        if too_few >= most || !within(most) {
            return None;
        }
        enough = most;
    }
    while too_few + 1 < enough {
        let middle = too_few.midpoint(enough);
        if within(middle) { enough = middle } else { too_few = middle }
    }
    Some(enough)
}

/// Numbers of units to try for a stage: the fewest, some more, or all.
fn choices(least: usize, most: usize, takes_all: bool, one_each: bool) -> Vec<usize> {
    if one_each {
        return if least == 1 { vec![1] } else { Vec::new() };
    }
    if takes_all {
        return if least <= most { vec![most] } else { Vec::new() };
    }
    let steps = [0, 1, 2, 3, least / 4, least / 2, least];
    let mut choices: Vec<usize> =
        steps.into_iter().map(|step| least + step).filter(|&units| units <= most).collect();
    choices.sort_unstable();
    choices.dedup();
    choices
}
