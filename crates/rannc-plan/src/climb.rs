//! Plans like a given one, for the simulator to compare with it.

use rannc_cost::ScheduleKind;
use rannc_partition::{Candidate, Options, StageCandidate};

/// What plans may be like.
pub(crate) struct Neighbours<'a> {
    microbatches: Vec<u64>,
    schedules: &'a [ScheduleKind],
}

impl<'a> Neighbours<'a> {
    pub(crate) fn new(options: &'a Options) -> Self {
        let microbatches = rannc_partition::microbatch_candidates(options);
        Self { microbatches, schedules: &options.schedules }
    }

    /// Those of a candidate; see [`neighbours`].
    pub(crate) fn of(&self, candidate: &Candidate) -> Vec<Candidate> {
        neighbours(candidate, &self.microbatches, self.schedules)
    }
}

/// The candidate with other numbers of microbatches, with another schedule, and with its stages on
/// the ranks in another order; each differs in one thing.
fn neighbours(
    candidate: &Candidate,
    microbatches: &[u64],
    schedules: &[ScheduleKind],
) -> Vec<Candidate> {
    let mut found = Vec::new();
    let current = candidate.microbatches;
    let after = microbatches.partition_point(|&count| count < current);
    let close =
        microbatches.get(after.wrapping_sub(1)).into_iter().chain(microbatches.get(after + 1));
    let mut counts: Vec<u64> = close.copied().collect();
    let far = [1, 2, current / 2, current.saturating_mul(2)];
    counts.extend(far.into_iter().filter(|count| microbatches.contains(count)));
    counts.sort_unstable();
    counts.dedup();
    counts.retain(|&count| count != current);
    found.extend(
        counts.into_iter().map(|microbatches| Candidate { microbatches, ..candidate.clone() }),
    );
    let others = schedules.iter().filter(|&&schedule| schedule != candidate.schedule);
    found.extend(others.map(|&schedule| Candidate { schedule, ..candidate.clone() }));
    found.extend(reordered(candidate));
    found
}

/// Where all stages have equally many replicas: replicas side by side instead of stages, or the
/// other way round.
fn reordered(candidate: &Candidate) -> Option<Candidate> {
    let num_stages = candidate.stages.len();
    let replicas = candidate.stages[0].ranks.len();
    let alike = |stage: &StageCandidate| stage.ranks.len() == replicas && stage.shares.is_empty();
    if num_stages == 1 || replicas == 1 || !candidate.stages.iter().all(alike) {
        return None;
    }
    let mut ranks: Vec<u32> =
        candidate.stages.iter().flat_map(|stage| stage.ranks.iter().copied()).collect();
    ranks.sort_unstable();
    let side_by_side = candidate.stages[0].ranks[..] == ranks[..replicas];
    let stages = candidate.stages.iter().enumerate().map(|(index, stage)| {
        let own = (0..replicas).map(|replica| {
            let at = if side_by_side {
                replica * num_stages + index
            } else {
                index * replicas + replica
            };
            ranks[at]
        });
        StageCandidate { ranks: own.collect(), ..stage.clone() }
    });
    Some(Candidate { stages: stages.collect(), ..candidate.clone() })
}

#[cfg(test)]
mod tests {
    use rannc_cost::ScheduleKind;
    use rannc_partition::{Candidate, StageCandidate};

    use super::neighbours;

    #[test]
    fn each_neighbour_differs_in_one_thing() {
        let stage =
            |ranks: [u32; 2]| StageCandidate { ranks: ranks.to_vec(), ..StageCandidate::default() };
        let candidate = Candidate {
            stages: vec![stage([0, 1]), stage([2, 3])],
            microbatches: 4,
            schedule: ScheduleKind::FillDrain,
            estimate_ns: 0,
        };
        let found = neighbours(&candidate, &[1, 2, 4, 6, 8], &ScheduleKind::ALL);
        let counts: Vec<u64> = found.iter().map(|found| found.microbatches).collect();
        assert_eq!(counts, [1, 2, 6, 8, 4, 4]);
        assert_eq!(found[4].schedule, ScheduleKind::OneForwardOneBackward);
        let ranks: Vec<_> = found[5].stages.iter().map(|stage| stage.ranks.clone()).collect();
        assert_eq!(ranks, [[0, 2], [1, 3]]);
        let back = neighbours(&found[5], &[4], &[ScheduleKind::FillDrain]);
        assert_eq!(back, [candidate]);
    }
}
