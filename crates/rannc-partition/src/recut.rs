//! The cuts of divisions moved, their devices kept: what planning again needs when little has changed.

use crate::facts::FactCache;
use crate::layout::Layout;
use crate::options::Candidate;
use crate::partitioner::Cut;
use crate::price::Pricer;
use crate::search::Search;
use crate::stage::{Division, Problem};

impl Search<'_, '_> {
    /// See [`Partitioner::recut`](crate::Partitioner::recut).
    pub(crate) fn recut(&self, likes: &[Candidate]) -> Vec<Candidate> {
        let (fewest, finest) = self.block_counts();
        let mut found: Vec<(Candidate, Layout, Division)> = Vec::new();
        for like in likes.iter().filter(|like| like.stages.len() <= finest) {
            let layout = self.layout_of(like);
            let coarse = self.cut(fewest.max(like.stages.len()));
            if let Some((division, candidate)) = self.balanced(like, &layout, &coarse) {
                found.push((candidate, layout, division));
            }
        }
        found.sort_by_key(|(candidate, ..)| candidate.estimate_ns);
        let mut candidates = Vec::new();
        if let Some((best, layout, division)) = found.first() {
            let coarse = self.cut(fewest.max(best.stages.len()));
            if best.stages.len() > 1 && coarse.blocks.len() < self.partitioner.atoms.len() {
                let fine = self.zoomed(division, &coarse);
                candidates.extend(self.balanced(best, layout, &fine).map(|(_, found)| found));
            }
        }
        candidates.extend(found.into_iter().map(|(candidate, ..)| candidate));
        candidates.sort_by_key(|candidate| candidate.estimate_ns);
        candidates
    }

    /// One unit for each stage.
    fn layout_of(&self, like: &Candidate) -> Layout {
        let units: Vec<Vec<u32>> = like.stages.iter().map(|stage| stage.ranks.clone()).collect();
        let are_neighbours = |unit: &Vec<u32>| unit.windows(2).all(|pair| pair[0] + 1 == pair[1]);
        let is_paired = units.iter().all(|unit| unit.len() == units[0].len())
            && !units.iter().all(are_neighbours);
        Layout::of_units(self.cluster, &self.classes, units, is_paired, true)
    }

    fn balanced(
        &self,
        like: &Candidate,
        layout: &Layout,
        cut: &Cut,
    ) -> Option<(Division, Candidate)> {
        let facts = FactCache::new(&cut.runs, self.costs);
        let pricer = Pricer::new(&cut.runs, &facts, self.setting(like.microbatches));
        let remaining = pricer.remaining();
        let problem = Problem::new(&pricer, layout, like.schedule, &remaining);
        let division = problem.balanced()?;
        let candidate = self.candidate(&problem, &division, cut);
        Some((division, candidate))
    }
}
