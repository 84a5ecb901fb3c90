//! From a graph and its costs to a plan: search, lay out, simulate, choose.

use std::sync::{Arc, Mutex, PoisonError};

use rannc_cost::{Cluster, Device, DeviceCosts, Profile};
use rannc_graph::{Graph, NodeId};
use rannc_partition::{Candidate, Partitioner, Progress};
use rannc_schedule::{Program, Timeline};

use crate::climb::neighbours;
use crate::compile::search_options;
use crate::evaluate::Evaluator;
use crate::{
    BoundEstimate, Estimates, Evaluation, Options, Placement, Plan, PlanError, PlanStage,
    RankEstimate,
};

/// A plan with at most so many forwards is simulated as it is, without folding.
const MOST_PLAYED: u64 = 1 << 13;
/// Candidates are simulated until these take so many forwards together; the first one always is.
const MOST_SIMULATED: u64 = 1 << 17;

/// Plans one model, again and again.
///
/// What depends on the model alone is found once. What also depends on the devices (costs, blocks
/// and their sizes) is kept, so that planning for another batch, memory limit or number of equal
/// devices only searches.
pub struct Planner<'a> {
    graph: &'a Graph,
    profile: Option<&'a Profile>,
    partitioner: Partitioner<'a>,
    costs: Mutex<Vec<(Vec<Device>, Arc<DeviceCosts<'a>>)>>,
}

/// The candidates simulated so far.
struct Round<'a> {
    evaluator: &'a Evaluator<'a>,
    progress: &'a dyn Progress,
    simulated: Vec<Candidate>,
    work: u64,
    best: Option<(u64, Candidate, Placement)>,
}

impl<'a> Round<'a> {
    fn new(evaluator: &'a Evaluator<'a>, progress: &'a dyn Progress) -> Self {
        Self { evaluator, progress, simulated: Vec::new(), work: 0, best: None }
    }

    /// Simulates a candidate unless it was already, or there was enough of that.
    fn simulate(&mut self, candidate: Candidate) -> Result<(), PlanError> {
        let work = Evaluator::work(&candidate);
        if self.best.is_some() && self.work + work > MOST_SIMULATED {
            return Ok(());
        }
        let same = |known: &Candidate| {
            (&known.stages, known.microbatches, known.schedule)
                == (&candidate.stages, candidate.microbatches, candidate.schedule)
        };
        if self.simulated.iter().any(same) {
            return Ok(());
        }
        self.work += work;
        self.progress.update("simulating candidates", self.work, MOST_SIMULATED);
        let placement = self.evaluator.place(&candidate);
        let step_ns = self.evaluator.step_ns(&candidate, &placement)?;
        log::debug!(
            "{} stages of {:?} replicas, {} microbatches, {}: estimated {} ns, simulated {step_ns} ns",
            candidate.stages.len(),
            candidate.stages.iter().map(|stage| stage.ranks.len()).collect::<Vec<_>>(),
            candidate.microbatches,
            candidate.schedule,
            candidate.estimate_ns,
        );
        self.simulated.push(candidate.clone());
        if self.best.as_ref().is_none_or(|(least, ..)| step_ns < *least) {
            self.best = Some((step_ns, candidate, placement));
        }
        Ok(())
    }
}

impl<'a> Planner<'a> {
    /// A planner for the graph. Costs are those of `profile` or, without one, estimated from the
    /// data of the devices.
    pub fn new(graph: &'a Graph, profile: Option<&'a Profile>) -> Self {
        let partitioner = Partitioner::new(graph);
        Self { graph, profile, partitioner, costs: Mutex::default() }
    }

    /// Plans a deployment on all devices of the cluster.
    ///
    /// The search gives a few candidates; each is laid out and simulated, and the fastest wins.
    ///
    /// # Errors
    ///
    /// [`PlanError::Partition`] when no plan fits the memory or what the options force cannot be had,
    /// [`PlanError::Cost`] when the profile does not belong to the graph.
    pub fn plan(
        &self,
        cluster: &Cluster,
        options: &Options,
        progress: &dyn Progress,
    ) -> Result<Plan, PlanError> {
        let search = search_options(self.graph, cluster, options)?;
        let costs = self.costs(cluster)?;
        let found = self.partitioner.search(&costs, cluster, &search, progress)?;
        let evaluator = Evaluator::new(self.graph, &costs, cluster, &search);
        let mut round = Round::new(&evaluator, progress);
        for candidate in found {
            round.simulate(candidate)?;
        }
        let counts = rannc_partition::microbatch_candidates(&search);
        while self.graph.batch().splittable {
            let Some((least, candidate, _)) = &round.best else { break };
            let least = *least;
            for next in neighbours(candidate, &counts, &search.schedules) {
                if evaluator.is_possible(&next) {
                    round.simulate(next)?;
                }
            }
            if round.best.as_ref().is_none_or(|(step_ns, ..)| *step_ns >= least) {
                break;
            }
        }
        let best = round.best;
        let (step_ns, candidate, placement) =
            best.expect("a search that finds nothing is an error");
        // Candidates were compared with copies of the pipeline folded; what is said of the plan is not.
        let ranks: u64 = candidate.stages.iter().map(|stage| stage.ranks.len() as u64).sum();
        let step_ns = if ranks * candidate.microbatches <= MOST_PLAYED {
            evaluator.timeline(&candidate, &placement)?.1.makespan_ns
        } else {
            step_ns
        };
        let bound = self.partitioner.lower_bound(&costs, cluster, &search);
        let estimates = Estimates {
            costs_of: costs.source().into(),
            step_ns,
            lower_bound: Some(BoundEstimate {
                step_ns: bound.step_ns,
                work_ns: bound.work_ns,
                critical_path_ns: bound.critical_path_ns,
                memory_ns: bound.memory_ns,
            }),
            stages: evaluator.stage_estimates(&candidate, &placement),
            ranks: evaluator
                .peak_memory(&candidate, &placement)?
                .into_iter()
                .enumerate()
                .map(|(rank, memory)| RankEstimate {
                    rank: rank as u32,
                    memory,
                    limit_bytes: evaluator.limit_bytes(rank),
                })
                .collect(),
        };
        Ok(self.written(&candidate, &placement, options.batch_size, estimates))
    }

    /// What a division would cost, simulated.
    ///
    /// # Errors
    ///
    /// [`PlanError::Schedule`] when it cannot be carried out, and those of [`plan`](Self::plan) about
    /// options and costs.
    pub fn evaluate(
        &self,
        cluster: &Cluster,
        options: &Options,
        candidate: &Candidate,
    ) -> Result<Evaluation, PlanError> {
        let search = search_options(self.graph, cluster, options)?;
        let costs = self.costs(cluster)?;
        let evaluator = Evaluator::new(self.graph, &costs, cluster, &search);
        let placement = evaluator.place(candidate);
        let step_ns = evaluator.step_ns(candidate, &placement)?;
        let memory = evaluator.peak_memory(candidate, &placement)?;
        let fits = memory
            .iter()
            .enumerate()
            .all(|(rank, memory)| memory.total() <= evaluator.limit_bytes(rank));
        Ok(Evaluation { step_ns, memory, fits })
    }

    /// When everything in a step of a plan would happen, simulated on a cluster.
    ///
    /// # Errors
    ///
    /// [`PlanError::Invalid`] when the plan does not fit the graph or cluster, and those of
    /// [`evaluate`](Self::evaluate).
    pub fn timeline(
        &self,
        cluster: &Cluster,
        options: &Options,
        plan: &Plan,
    ) -> Result<(Program, Timeline), PlanError> {
        plan.check(self.graph, plan.world_size)?;
        if cluster.devices.len() != plan.world_size as usize {
            return Err(PlanError::OtherWorld {
                planned: plan.world_size,
                running: cluster.devices.len() as u32,
            });
        }
        let options = Options { batch_size: plan.batch_size, ..options.clone() };
        let search = search_options(self.graph, cluster, &options)?;
        let costs = self.costs(cluster)?;
        let evaluator = Evaluator::new(self.graph, &costs, cluster, &search);
        let candidate = plan.candidate(self.graph)?;
        let placement = plan.place(self.graph)?;
        evaluator.timeline(&candidate, &placement)
    }

    /// The costs on the cluster's classes of devices, made once.
    fn costs(&self, cluster: &Cluster) -> Result<Arc<DeviceCosts<'a>>, PlanError> {
        let classes = cluster.classes(cluster.devices.len());
        let mut known = self.costs.lock().unwrap_or_else(PoisonError::into_inner);
        let alike = |devices: &[Device]| {
            let kind =
                |device: &Device| (device.kind.clone(), Device { node: 0, ..device.clone() });
            devices.iter().map(kind).eq(classes.devices.iter().map(kind))
        };
        if let Some((_, costs)) = known.iter().find(|(devices, _)| alike(devices)) {
            return Ok(Arc::clone(costs));
        }
        let costs = Arc::new(DeviceCosts::new(self.graph, self.profile, &classes.devices)?);
        known.push((classes.devices, Arc::clone(&costs)));
        Ok(costs)
    }

    fn written(
        &self,
        candidate: &Candidate,
        placement: &Placement,
        batch_size: u64,
        estimates: Estimates,
    ) -> Plan {
        let batch_nodes = self.graph.batch_nodes();
        let key = |id: &NodeId| self.graph.node(*id).key.clone();
        let is_listed = |id: &&NodeId| batch_nodes.contains(id.index());
        let stage = |stage: &crate::PlacedStage| PlanStage {
            ranks: stage.ranks.clone(),
            shares: stage.shares.clone(),
            sharding: stage.sharding,
            nodes: stage.nodes.iter().filter(is_listed).map(key).collect(),
            recompute: stage
                .recompute
                .iter()
                .map(|group| group.iter().filter(is_listed).map(key).collect())
                .collect(),
        };
        Plan {
            model: self.graph.name().into(),
            model_identity: self.graph.identity(),
            world_size: placement.pipeline.world_size,
            batch_size,
            microbatches: candidate.microbatches,
            schedule: placement.training_schedule(),
            stages: placement.stages.iter().map(stage).collect(),
            estimates: Some(estimates),
        }
    }
}
