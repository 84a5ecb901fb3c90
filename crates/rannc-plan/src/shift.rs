//! The cuts beside a plan's busiest stages, moved by single atoms.
//!
//! The search cuts between blocks and by estimates. What it finds may still be a little faster with an
//! operator more or less in a stage that others wait for, and only the simulator can tell.

use rannc_graph::Graph;
use rannc_partition::{Atoms, Candidate, StageCandidate};

/// How many atoms are moved at once.
const MOVED: [usize; 3] = [1, 2, 4];

/// Moves atoms between the stages of one graph.
pub(crate) struct Shifter<'a> {
    graph: &'a Graph,
    atoms: &'a Atoms,
}

impl<'a> Shifter<'a> {
    pub(crate) fn new(graph: &'a Graph, atoms: &'a Atoms) -> Self {
        Self { graph, atoms }
    }

    /// The candidate with the first or the last atoms of a stage in the stage beside it. Stages that
    /// compute something again stay as they are.
    pub(crate) fn without_ends(&self, candidate: &Candidate, stage: usize) -> Vec<Candidate> {
        let own = self.atoms_of(&candidate.stages[stage]);
        let mut found = Vec::new();
        for count in MOVED.into_iter().filter(|&count| count < own.len()) {
            let (first, others) = own.split_at(count);
            if let Some(before) = stage.checked_sub(1) {
                found.extend(self.moved(candidate, (stage, others), (before, first)));
            }
            let (others, last) = own.split_at(own.len() - count);
            found.extend(self.moved(candidate, (stage, others), (stage + 1, last)));
        }
        found
    }

    /// The atoms of a stage, in a topological order.
    fn atoms_of(&self, stage: &StageCandidate) -> Vec<usize> {
        let has = |&atom: &usize| stage.nodes.contains(self.atoms.members(atom)[0].index());
        (0..self.atoms.len()).filter(has).collect()
    }

    /// One stage with these atoms only, another with these besides its own.
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
        let all = self.atoms_of(target).into_iter().chain(more.iter().copied());
        let mut stages = candidate.stages.clone();
        stages[from].nodes = self.atoms.stage(self.graph, left.iter().copied());
        stages[to].nodes = self.atoms.stage(self.graph, all);
        Some(Candidate { stages, ..candidate.clone() })
    }
}

#[cfg(test)]
mod tests {
    use rannc_graph::testing;
    use rannc_partition::{Atoms, Candidate, StageCandidate};

    use super::Shifter;

    #[test]
    fn ends_of_a_stage_go_to_the_stages_beside_it() {
        let graph = testing::chain(6, 4);
        let atoms = Atoms::new(&graph);
        let stage = |atoms_of: std::ops::Range<usize>| StageCandidate {
            nodes: atoms.stage(&graph, atoms_of),
            ..StageCandidate::default()
        };
        let candidate = Candidate {
            stages: vec![stage(0..1), stage(1..4), stage(4..6)],
            microbatches: 1,
            schedule: rannc_cost::ScheduleKind::FillDrain,
            estimate_ns: 0,
        };
        let found = Shifter::new(&graph, &atoms).without_ends(&candidate, 1);
        let sizes = |found: &Candidate| -> Vec<usize> {
            found.stages.iter().map(|stage| stage.nodes.count_ones(..)).collect()
        };
        let found: Vec<Vec<usize>> = found.iter().map(sizes).collect();
        assert_eq!(found, [[2, 2, 2], [1, 2, 3], [3, 1, 2], [1, 1, 4]]);
    }
}
