//! Divisions in which every stage has equally many replicas, to be simulated beside what the
//! programmes find: estimates leave out what a simulation shows, and such regular pipelines wait
//! for each other the least.

use crate::search::Found;
use crate::stage::{Division, Problem};

/// Bisection ends when the time is known to this part of it.
const PRECISION: u64 = 32;

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

/// The best of some divisions for each number of stages and placement of ranks.
pub(crate) fn best_of_each(mut found: Vec<Found>) -> Vec<Found> {
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
