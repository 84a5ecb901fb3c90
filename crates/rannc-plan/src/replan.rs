//! A plan for what has changed, made from the one before.
//!
//! A few devices more or less, another batch or memory limit: the stages of the plan are spread over the
//! devices that there are, cut anew where the slowest is as fast as can be, and simulated. That is kept if
//! it is about as near to the new lower bound as the old plan was to its own; otherwise everything is
//! planned afresh. So a device lost of a thousand costs no search.

use rannc_cost::Cluster;
use rannc_partition::{Candidate, Options as SearchOptions, Progress, StageCandidate};

use crate::compile::search_options;
use crate::evaluate::Evaluator;
use crate::round::{Round, Winner};
use crate::{Options, Plan, PlanError, Planner};

/// The gap to the lower bound may grow by this part of the step, besides what a replica less costs the
/// stage that has the fewest.
const MOST_WORSE: u64 = 32;
/// The most candidates that are simulated.
const MOST_SIMULATED: usize = 2;

impl Planner<'_> {
    /// Plans as [`plan`](Self::plan) does, but first looks whether the stages of an earlier plan for the
    /// same model do: on other devices of the same kind, for another batch, or with another limit of the
    /// memory. The result depends on the arguments alone.
    ///
    /// # Errors
    ///
    /// [`PlanError::OtherModel`] when the plan belongs to another model, [`PlanError::Invalid`] when it
    /// contradicts itself, and those of [`plan`](Self::plan).
    pub fn replan(
        &self,
        previous: &Plan,
        cluster: &Cluster,
        options: &Options,
        progress: &dyn Progress,
    ) -> Result<Plan, PlanError> {
        previous.check_model(self.graph)?;
        let before = previous.candidate(self.graph)?;
        let Some(repaired) = self.repaired(previous, &before, cluster, options, progress)? else {
            return self.plan(cluster, options, progress);
        };
        if is_as_good(previous, &before, &repaired) {
            return Ok(repaired);
        }
        log::debug!("the stages of the earlier plan are too slow now: planning afresh");
        let fresh = self.plan(cluster, options, progress)?;
        let step_ns = |plan: &Plan| plan.estimates.as_ref().map_or(u64::MAX, |all| all.step_ns);
        Ok(if step_ns(&fresh) <= step_ns(&repaired) { fresh } else { repaired })
    }

    /// The best plan with the stages of an earlier one; none if it is not for such devices or does not fit.
    fn repaired(
        &self,
        previous: &Plan,
        before: &Candidate,
        cluster: &Cluster,
        options: &Options,
        progress: &dyn Progress,
    ) -> Result<Option<Plan>, PlanError> {
        let search = search_options(self.graph, cluster, options)?;
        let costs = self.costs(cluster)?;
        let same_world = previous.world_size as usize == cluster.devices.len();
        let is_allowed = search.num_stages.is_none_or(|count| count == before.stages.len())
            && search.num_replicas.is_none()
            && search.schedules.contains(&before.schedule)
            && self.graph.batch().splittable
            && costs.crowded(cluster).is_none()
            && (same_world || costs.num_classes() == 1);
        if !is_allowed {
            return Ok(None);
        }
        let evaluator = Evaluator::new(self.graph, &costs, cluster, &search);
        let mut likes = Vec::new();
        for microbatches in counts(previous, before, &search) {
            let before = Candidate { microbatches, ..before.clone() };
            let spreads = spreads(previous.world_size, &before, cluster, &search, &evaluator);
            likes.extend(spreads.into_iter().map(|ranks| on_ranks(&before, ranks)));
        }
        let found = self.partitioner.recut(&costs, cluster, &search, &likes)?;
        let fitting = found.into_iter().filter(|candidate| evaluator.is_possible(candidate));
        let fitting: Vec<Candidate> = fitting.take(MOST_SIMULATED).collect();
        let mut round = Round::new(&evaluator, progress);
        round.simulate_found(fitting)?;
        let Some(winner): Option<Winner> = round.winner()? else { return Ok(None) };
        let bound = self.partitioner.lower_bound(&costs, cluster, &search);
        self.finished(&evaluator, &winner, &bound, options.batch_size).map(Some)
    }
}

/// Whether a plan is about as near to its lower bound as the one before.
fn is_as_good(previous: &Plan, before: &Candidate, repaired: &Plan) -> bool {
    let gap = |plan: &Plan| {
        let estimates = plan.estimates.as_ref()?;
        let bound = estimates.lower_bound.as_ref()?.step_ns;
        Some((u128::from(estimates.step_ns), u128::from(bound)))
    };
    let (Some((old, old_bound)), Some((new, new_bound))) = (gap(previous), gap(repaired)) else {
        return false;
    };
    // With whole replicas a stage that loses one of n is slower by 1 / n, however good the plan.
    let fewest = before.stages.iter().map(|stage| stage.ranks.len() as u64).min().unwrap_or(1);
    let lost =
        if previous.world_size > repaired.world_size { u128::from(fewest) } else { u128::MAX };
    let allowed = old + old / lost + old / u128::from(MOST_WORSE);
    new * old_bound <= allowed * new_bound
}

/// The numbers of microbatches to try: that of the earlier plan, and for another batch that with as many
/// rows for each.
fn counts(previous: &Plan, before: &Candidate, search: &SearchOptions) -> Vec<u64> {
    let possible = rannc_partition::microbatch_candidates(search);
    let nearest = |wanted: u64| possible.iter().copied().min_by_key(|count| count.abs_diff(wanted));
    let scaled = u128::from(before.microbatches) * u128::from(search.batch_rows)
        / u128::from(previous.batch_size.max(1));
    let scaled = u64::try_from(scaled).unwrap_or(u64::MAX);
    let mut wanted = vec![before.microbatches];
    if previous.batch_size != search.batch_rows {
        wanted.push(scaled);
    }
    let mut counts: Vec<u64> = wanted.into_iter().filter_map(nearest).collect();
    counts.dedup();
    counts
}

fn on_ranks(candidate: &Candidate, ranks: Vec<Vec<u32>>) -> Candidate {
    let stages = candidate.stages.iter().zip(ranks);
    let stages = stages.map(|(stage, ranks)| StageCandidate {
        nodes: stage.nodes.clone(),
        ranks,
        ..StageCandidate::default()
    });
    Candidate { stages: stages.collect(), ..candidate.clone() }
}

/// The ways to spread the stages over the devices that there are now.
fn spreads(
    old_world: u32,
    before: &Candidate,
    cluster: &Cluster,
    search: &SearchOptions,
    evaluator: &Evaluator<'_>,
) -> Vec<Vec<Vec<u32>>> {
    let ranks = || before.stages.iter().map(|stage| stage.ranks.clone()).collect();
    if old_world as usize == cluster.devices.len() {
        return vec![ranks()];
    }
    let mut spreads: Vec<Vec<Vec<u32>>> =
        in_place(old_world, ranks(), cluster).into_iter().collect();
    spreads.extend(in_order(before, cluster.devices.len(), search, &evaluator.loads(before)));
    spreads.dedup();
    spreads
}

/// Every device where it was, if nodes that were alike have become smaller.
fn in_place(old_world: u32, ranks: Vec<Vec<u32>>, cluster: &Cluster) -> Option<Vec<Vec<u32>>> {
    let nodes = cluster.devices.chunk_by(|left, right| left.node == right.node);
    let sizes: Vec<usize> = nodes.map(<[_]>::len).collect();
    let size = sizes.iter().copied().max()?;
    if size * sizes.len() != old_world as usize {
        return None;
    }
    let mut now = vec![None; old_world as usize];
    let mut next = 0;
    for (node, &left) in sizes.iter().enumerate() {
        for slot in &mut now[node * size..node * size + left] {
            *slot = Some(next);
            next += 1;
        }
    }
    let left: Vec<Vec<u32>> = ranks
        .into_iter()
        .map(|ranks| ranks.into_iter().filter_map(|rank| now[rank as usize]).collect())
        .collect();
    left.iter().all(|ranks| !ranks.is_empty()).then_some(left)
}

/// Stage after stage along the devices, with a replica more or less where that makes the slowest stage
/// fastest; none if there are fewer devices than stages.
fn in_order(
    before: &Candidate,
    num_devices: usize,
    search: &SearchOptions,
    loads: &[u64],
) -> Option<Vec<Vec<u32>>> {
    let most =
        usize::try_from(search.batch_rows / before.microbatches.max(1)).unwrap_or(usize::MAX);
    let mut counts: Vec<usize> = before.stages.iter().map(|stage| stage.ranks.len()).collect();
    let mut used: usize = counts.iter().sum();
    if num_devices < counts.len() {
        return None;
    }
    while used > num_devices {
        let shrinking = (0..counts.len()).filter(|&stage| counts[stage] > 1);
        let stage = shrinking.min_by_key(|&stage| loads[stage] / (counts[stage] as u64 - 1))?;
        counts[stage] -= 1;
        used -= 1;
    }
    while used < num_devices {
        let growing = (0..counts.len()).filter(|&stage| counts[stage] < most);
        let Some(stage) = growing.max_by_key(|&stage| loads[stage] / counts[stage] as u64) else {
            break;
        };
        counts[stage] += 1;
        used += 1;
    }
    let mut next = 0;
    let ranks = counts.into_iter().map(|count| {
        next += count as u32;
        (next - count as u32..next).collect()
    });
    Some(ranks.collect())
}

#[cfg(test)]
mod tests;
