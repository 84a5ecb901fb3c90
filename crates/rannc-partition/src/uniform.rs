//! Divisions in which every stage has equally many replicas, to be simulated beside what the
//! programmes find: estimates leave out what a simulation shows, and such regular pipelines wait
//! for each other the least.

use crate::Blocks;
use crate::facts::FactCache;
use crate::layout::{Layout, Shape};
use crate::options::Candidate;
use crate::search::{Found, Search};
use crate::stage::{Division, Problem};

/// The most stages of regular candidates.
const MOST_UNIFORM: usize = 256;
/// The most numbers of microbatches to look at for these.
const MOST_UNIFORM_COUNTS: usize = 5;

/// Bisection ends when the time is known to this part of it.
const PRECISION: u64 = 32;

impl Search<'_, '_> {
    /// The best divisions with equally many replicas of each stage.
    pub(crate) fn uniform(&self, wanted: usize) -> Vec<Candidate> {
        let line = self.partitioner.line(self.costs, &self.line_key());
        let cut = self.cut(Blocks::natural(&line, wanted));
        let facts = FactCache::new(&cut.runs, self.costs);
        let cases = self.cases(&cut.runs, &facts, false);
        let most = cut.blocks.len().min(MOST_UNIFORM);
        let mut shapes = Vec::new();
        for (count, replicas) in self.options.regular_shapes() {
            if count > most {
                continue;
            }
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
}

impl Problem<'_> {
    /// One unit for each stage, the slowest stage as fast as can be; none if that does not fit.
    pub(crate) fn balanced(&self) -> Option<Division> {
        let mut best = self.packed(u64::MAX)?;
        let (mut low, mut high) = (0, best.1);
        while high.saturating_sub(low) > (high / PRECISION).max(1) {
            let middle = low.midpoint(high);
            match self.packed(middle) {
                None => low = middle,
                Some(found) => {
                    high = found.1;
                    best = found;
                }
            }
        }
        Some(Division { step_ns: self.evaluate(&best.0)?, ..best.0 })
    }

    /// Stages from the last to the first, each as long as it may be without being busy for more than
    /// `time`; also the time of the slowest.
    fn packed(&self, time: u64) -> Option<(Division, u64)> {
        let num_stages = self.layout.num_units();
        let mut starts = vec![0; num_stages];
        let mut end = self.num_blocks();
        let mut slowest = 0;
        for stage in (0..num_stages).rev() {
            let in_flight = self.in_flight(num_stages - stage);
            let busy = |start: usize| {
                let found = self.stage((start, end), (stage, stage + 1), in_flight)?;
                (found.busy <= time).then_some(found.busy)
            };
            let fewest = stage;
            let mut start = end.checked_sub(1).filter(|&start| start >= fewest)?;
            let mut reached = busy(start)?;
            while start > fewest {
                let Some(busy) = busy(start - 1) else { break };
                (start, reached) = (start - 1, busy);
            }
            slowest = slowest.max(reached);
            starts[stage] = start;
            end = start;
        }
        let units = (0..num_stages).map(|stage| (stage, stage + 1)).collect();
        (end == 0).then_some((Division { step_ns: 0, starts, units }, slowest))
    }
}

/// The best two of some divisions for each number of stages and placement of ranks.
fn best_of_each(mut found: Vec<Found>) -> Vec<Found> {
    found.sort();
    let mut kept: Vec<Found> = Vec::new();
    for next in found {
        let same = |other: &&Found| other.ranks == next.ranks;
        if kept.iter().filter(same).count() < 2 {
            kept.push(next);
        }
    }
    kept
}
