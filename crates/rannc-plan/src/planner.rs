//! From a graph and its costs to a plan: search, lay out, simulate, choose.

use std::sync::{Arc, Mutex, PoisonError};

use rannc_cost::{Cluster, Device, DeviceCosts, Profile};
use rannc_graph::{Graph, NodeId};
use rannc_partition::simple::{Assessor, Sequence, Setting};
use rannc_partition::{Candidate, LowerBound, Partitioner, Progress};
use rannc_schedule::{Program, Timeline};

use crate::climb::Neighbours;
use crate::compile::search_options;
use crate::evaluate::Evaluator;
use crate::round::{Round, Winner};
use crate::shift::Shifter;
use crate::{
    BoundEstimate, Estimates, Evaluation, Options, Placement, Plan, PlanError, PlanStage,
    RankEstimate,
};

/// Plans one model, again and again.
///
/// What depends on the model alone is found once. What also depends on the devices (costs, blocks
/// and their sizes) is kept, so that planning for another batch, memory limit or number of equal
/// devices only searches.
pub struct Planner<'a> {
    pub(crate) graph: &'a Graph,
    profile: Option<&'a Profile>,
    pub(crate) partitioner: Partitioner<'a>,
    costs: Mutex<Vec<(Vec<Device>, Arc<DeviceCosts<'a>>)>>,
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
        // Estimates of the search take all devices to compute all the time; the simulator knows better.
        let crowded = costs.crowded(cluster);
        let expected = crowded.as_ref().unwrap_or(&costs);
        let found = self.partitioner.search(expected, cluster, &search, progress)?;
        let evaluator = Evaluator::new(self.graph, &costs, cluster, &search);
        let mut round = Round::new(&evaluator, progress);
        round.simulate_found(found)?;
        let is_splittable = self.graph.batch().splittable;
        let neighbours = Neighbours::new(&search);
        if is_splittable {
            let sequence = Sequence::new(self.graph, self.partitioner.atoms(), costs.class(0));
            let recompute = search.recompute && sequence.is_repeatable();
            let options = rannc_partition::Options { recompute, ..search.clone() };
            let setting = Setting::new(cluster, &options);
            round.simulate_simple(&Assessor::new(&sequence, &setting))?;
            round.climb(&neighbours)?;
        }
        let mut winner = round.winner()?.expect("a search that finds nothing is an error");
        if is_splittable {
            let shifter = Shifter::new(self.graph, self.partitioner.atoms());
            winner = round.shifted(winner, &shifter, &neighbours)?;
        }
        let bound = self.partitioner.lower_bound(&costs, cluster, &search);
        self.finished(&evaluator, &winner, &bound, options.batch_size)
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
        let folded_ns = evaluator.step_ns(candidate, &placement)?;
        let step_ns = evaluator.unfolded_ns(candidate, &placement, folded_ns)?;
        let memory = evaluator.peak_memory(candidate, &placement)?;
        let fits = evaluator.is_within(&memory);
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
    pub(crate) fn costs(&self, cluster: &Cluster) -> Result<Arc<DeviceCosts<'a>>, PlanError> {
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

    /// The plan of a winner, with what it is expected to cost.
    pub(crate) fn finished(
        &self,
        evaluator: &Evaluator<'_>,
        winner: &Winner,
        bound: &LowerBound,
        batch_size: u64,
    ) -> Result<Plan, PlanError> {
        let Winner { step_ns, candidate, placement } = winner;
        let estimates = Estimates {
            costs_of: evaluator.costs_of().into(),
            step_ns: *step_ns,
            lower_bound: Some(BoundEstimate {
                step_ns: bound.step_ns,
                work_ns: bound.work_ns,
                critical_path_ns: bound.critical_path_ns,
                memory_ns: bound.memory_ns,
            }),
            stages: evaluator.stage_estimates(candidate, placement),
            ranks: evaluator
                .peak_memory(candidate, placement)?
                .into_iter()
                .enumerate()
                .map(|(rank, memory)| RankEstimate {
                    rank: rank as u32,
                    memory,
                    limit_bytes: evaluator.limit_bytes(rank),
                })
                .collect(),
        };
        Ok(self.written(candidate, placement, batch_size, estimates))
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
