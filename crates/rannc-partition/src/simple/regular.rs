//! Pipelines with equally many devices for every stage.

use std::ops::RangeInclusive;
use std::rc::Rc;

use super::{Assessor, Order, Proposal, Sequence};

/// How the operators are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Equally many operators, or equally many layers.
    EqualCounts,
    /// The least time of the slowest stage, between layers.
    LayerTime,
    /// The least time of the slowest stage, between operators.
    OperatorTime,
}

impl Cut {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::EqualCounts, Self::LayerTime, Self::OperatorTime];
}

/// Every number of stages and replicas (`Options::regular_shapes`), with every number of microbatches, schedule, way
/// to compute again, and order of ranks; without those that surely take longer than `most_ns` or too
/// much memory.
pub fn regular(assessor: &Assessor, cut: Cut, most_ns: u64) -> Vec<Proposal> {
    let setting = assessor.setting;
    let mut found = Vec::new();
    let shapes = setting.options.regular_shapes();
    for (stages, replicas) in shapes.into_iter().filter(|&(stages, _)| assessor.may_fit(stages)) {
        let ranks = Order::ALL.map(|order| Rc::new(order.ranks(stages, replicas)));
        for microbatches in setting.microbatches(replicas) {
            if assessor.least_ns(stages, replicas, microbatches) > most_ns {
                continue;
            }
            let rows = assessor.rows(microbatches, replicas);
            for starts in divisions(assessor.line, cut, stages, rows).into_iter().map(Rc::new) {
                for &schedule in &setting.options.schedules {
                    for &recompute in setting.recompute() {
                        found.extend(ranks.iter().map(|ranks| Proposal {
                            starts: Rc::clone(&starts),
                            ranks: Rc::clone(ranks),
                            microbatches,
                            schedule,
                            recompute,
                        }));
                    }
                }
            }
        }
    }
    found
}

fn divisions(line: &Sequence, cut: Cut, stages: usize, rows: u64) -> Vec<Vec<usize>> {
    let operators: Vec<usize> = (0..line.len()).collect();
    let found = match cut {
        Cut::EqualCounts => [equal(&operators, stages), equal(&line.layers, stages)],
        Cut::LayerTime => [balanced(line, &line.layers, stages, rows), None],
        Cut::OperatorTime => [balanced(line, &operators, stages, rows), None],
    };
    found.into_iter().flatten().collect()
}

/// Equally many units for each stage.
fn equal(units: &[usize], stages: usize) -> Option<Vec<usize>> {
    let unit = |stage: usize| units[stage * units.len() / stages];
    (stages <= units.len()).then(|| (0..stages).map(unit).collect())
}

/// The division into stages whose slowest takes the least time: bisection over that time, with a
/// greedy check.
fn balanced(line: &Sequence, units: &[usize], stages: usize, rows: u64) -> Option<Vec<usize>> {
    if stages > units.len() {
        return None;
    }
    let elapsed = line.elapsed(rows);
    let ends = units.iter().copied().chain([line.len()]);
    let times: Vec<u64> =
        ends.map(|end| elapsed[end].forward.saturating_add(elapsed[end].backward)).collect();
    let total = times[units.len()];
    let mut range: RangeInclusive<u64> = total / stages as u64..=total;
    while range.start() < range.end() {
        let middle = range.start().midpoint(*range.end());
        if greedy(&times, stages, middle).is_some() {
            range = *range.start()..=middle;
        } else {
            range = middle + 1..=*range.end();
        }
    }
    let starts = greedy(&times, stages, *range.end())?;
    Some(starts.into_iter().map(|unit| units[unit]).collect())
}

/// The first unit of each stage if none may take more than `limit`.
fn greedy(times: &[u64], stages: usize, limit: u64) -> Option<Vec<usize>> {
    let units = times.len() - 1;
    let mut starts = Vec::with_capacity(stages);
    let mut start = 0;
    for stage in 0..stages {
        starts.push(start);
        // Every later stage needs a unit.
        let last = units - (stages - 1 - stage);
        let end = times.partition_point(|&time| time <= times[start].saturating_add(limit)) - 1;
        start = end.min(last);
        if start == starts[stage] {
            return None;
        }
    }
    (start == units).then_some(starts)
}

#[cfg(test)]
mod tests {
    use super::greedy;

    #[test]
    fn no_stage_is_empty_and_none_above_the_limit() {
        let times = [0, 4, 5, 6, 7, 11];
        assert_eq!(greedy(&times, 3, 4), Some(vec![0, 1, 4]));
        assert_eq!(greedy(&times, 3, 3), None);
        assert_eq!(greedy(&times, 5, 11), Some(vec![0, 1, 2, 3, 4]));
    }
}
