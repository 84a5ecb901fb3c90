//! Plans like a given one, for the simulator to compare with it.

use rannc_cost::ScheduleKind;
use rannc_graph::Graph;
use rannc_partition::{Atoms, Candidate, Options, StageCandidate};

/// How many atoms are moved between two stages at once.
const MOVED: [usize; 3] = [1, 2, 4];

/// What plans may be like.
pub(crate) struct Neighbours<'a> {
    graph: &'a Graph,
    atoms: &'a Atoms,
    microbatches: Vec<u64>,
    schedules: &'a [ScheduleKind],
}

impl<'a> Neighbours<'a> {
    pub(crate) fn new(graph: &'a Graph, atoms: &'a Atoms, options: &'a Options) -> Self {
        let microbatches = rannc_partition::microbatch_candidates(options);
        Self { graph, atoms, microbatches, schedules: &options.schedules }
    }

    /// Those of a candidate: see [`neighbours`]; and with the first or the last atoms of its `slowest` stage
    /// in the stage beside it.
    pub(crate) fn of(&self, candidate: &Candidate, slowest: usize) -> Vec<Candidate> {
        let mut found = neighbours(candidate, &self.microbatches, self.schedules);
        let own = self.atoms_of(&candidate.stages[slowest]);
        for count in MOVED.into_iter().filter(|&count| count < own.len()) {
            let (first, others) = own.split_at(count);
            found.extend(
                slowest
                    .checked_sub(1)
                    .and_then(|before| self.moved(candidate, (slowest, others), (before, first))),
            );
            let (others, last) = own.split_at(own.len() - count);
            found.extend(self.moved(candidate, (slowest, others), (slowest + 1, last)));
        }
        found
    }

    /// The atoms of a stage in the order of the program.
    fn atoms_of(&self, stage: &StageCandidate) -> Vec<usize> {
        let has = |&atom: &usize| stage.nodes.contains(self.atoms.members(atom)[0].index());
        (0..self.atoms.len()).filter(has).collect()
    }

    /// One stage with these atoms only, another with these besides its own; none if there is no such stage,
    /// or one of them computes something again.
    fn moved(
        &self,
        candidate: &Candidate,
        (from, left): (usize, &[usize]),
        (to, more): (usize, &[usize]),
    ) -> Option<Candidate> {
        let target = candidate.stages.get(to)?;
        if !(target.recompute.is_empty() && candidate.stages[from].recompute.is_empty()) {
            return None;
        }
        let mut atoms = self.atoms_of(target);
        atoms.extend(more);
        let mut stages = candidate.stages.clone();
        stages[from].nodes = self.atoms.stage(self.graph, left.iter().copied());
        stages[to].nodes = self.atoms.stage(self.graph, atoms);
        Some(Candidate { stages, ..candidate.clone() })
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
