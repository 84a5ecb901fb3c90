//! The cuts of a division moved, its devices kept: what planning again needs when little has changed.

use crate::facts::FactCache;
use crate::layout::Layout;
use crate::options::Candidate;
use crate::partitioner::Cut;
use crate::price::Pricer;
use crate::search::Search;
use crate::stage::{Division, Problem};

impl Search<'_, '_> {
    /// See [`Partitioner::recut`](crate::Partitioner::recut).
    pub(crate) fn recut(&self, like: &Candidate) -> Vec<Candidate> {
        let num_stages = like.stages.len();
        let (fewest, finest) = self.block_counts();
        if num_stages > finest {
            return Vec::new();
        }
        let units: Vec<Vec<u32>> = like.stages.iter().map(|stage| stage.ranks.clone()).collect();
        let side_by_side = |unit: &Vec<u32>| unit.windows(2).all(|pair| pair[0] + 1 == pair[1]);
        let is_paired = units.iter().all(|unit| unit.len() == units[0].len())
            && !units.iter().all(side_by_side);
        let layout = Layout::of_units(self.cluster, &self.classes, units, is_paired, true);
        let coarse = self.cut(fewest.max(num_stages));
        let Some((division, found)) = self.balanced(like, &layout, &coarse) else {
            return Vec::new();
        };
        let mut candidates = vec![found];
        if num_stages > 1 && coarse.blocks.len() < self.partitioner.atoms.len() {
            let fine = self.zoomed(&division, &coarse);
            candidates.extend(self.balanced(like, &layout, &fine).map(|(_, found)| found));
        }
        candidates
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
