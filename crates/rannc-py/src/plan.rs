//! `Plan`, `Placement` and the planner.

#![expect(clippy::needless_pass_by_value, reason = "paths come from Python by value")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use pyo3::prelude::*;
use rannc_cost::{Cluster, Profile, Sharding};
use rannc_graph::ValueId;
use rannc_schedule::{Mode, ScheduleKind};

use crate::error::{raise_cost, raise_deployment, raise_plan};
use crate::graph::Graph;
use crate::schedule::Program;

/// What was decided: a deployment.
#[pyclass(frozen, module = "pyrannc._core")]
pub(crate) struct Plan {
    plan: rannc_plan::Plan,
}

/// A plan applied to a graph.
#[pyclass(frozen, module = "pyrannc._core")]
pub(crate) struct Placement {
    placed: rannc_plan::Placement,
    nodes: Vec<Vec<String>>,
    recompute: Vec<Vec<Vec<String>>>,
    units: Vec<Vec<PlacedUnit>>,
    parameters: Vec<Vec<String>>,
    holders: BTreeMap<String, Vec<u32>>,
}

/// One stage of a placement.
#[pyclass(frozen, get_all, module = "pyrannc._core")]
pub(crate) struct PlacedStage {
    /// The processes that hold a replica.
    ranks: Vec<u32>,
    /// Keys of its operators in the order in which they run.
    nodes: Vec<String>,
    /// Groups of these whose inner values are computed again in backward; each is together in
    /// `nodes`.
    recompute: Vec<Vec<String>>,
    /// Ids of the values it receives.
    inputs: Vec<u32>,
    /// Ids of the values it hands on or returns.
    outputs: Vec<u32>,
    /// Its parts, which run one after the other: one, unless gradients or parameters are divided.
    units: Vec<PlacedUnit>,
}

/// A part of a stage that runs by itself, with only its own divided parameters whole.
#[pyclass(frozen, get_all, module = "pyrannc._core")]
#[derive(Clone)]
pub(crate) struct PlacedUnit {
    /// Keys of its operators in the order in which they run.
    nodes: Vec<String>,
    /// Ids of the values it is given.
    inputs: Vec<u32>,
    /// Ids of the values it hands on to later units or out of the stage.
    outputs: Vec<u32>,
}

/// Plans a deployment.
///
/// `cluster` is a cluster's JSON, or a preset as `kind:nodesxdevices`: `a100-40gb:1x8`. The costs are those of `profile_json`, or, without one, estimated for the cluster's devices. With
/// `progress`, a search of more than a second shows on a terminal how far it is.
#[pyfunction]
#[pyo3(signature = (
    graph, cluster, *, profile_json = None, batch_size, optimizer_state_factor = 2.0,
    partition_num = 0, replica_num = 0, pipeline_num = 0, min_pipeline = 1, max_pipeline = 512,
    max_partition_num = 32, mem_limit_gb = 0.0, mem_margin = 0.1, schedule = "auto", recompute = true,
    sharding = "none", least_sharding = "none", progress = false,
))]
#[expect(clippy::too_many_arguments, reason = "the items of the configuration, by name")]
pub(crate) fn plan(
    py: Python<'_>,
    graph: &Graph,
    cluster: &str,
    profile_json: Option<&str>,
    batch_size: u64,
    optimizer_state_factor: f64,
    partition_num: usize,
    replica_num: usize,
    pipeline_num: u64,
    min_pipeline: u64,
    max_pipeline: u64,
    max_partition_num: usize,
    mem_limit_gb: f64,
    mem_margin: f64,
    schedule: &str,
    recompute: bool,
    sharding: &str,
    least_sharding: &str,
    progress: bool,
) -> PyResult<Plan> {
    let cluster = if cluster.trim_start().starts_with('{') {
        Cluster::from_json(cluster)
    } else {
        Cluster::parse(cluster)
    }
    .map_err(raise_cost)?;
    let profile = profile_json.map(Profile::from_json).transpose().map_err(raise_cost)?;
    let schedules = match schedule {
        "auto" => vec![ScheduleKind::FillDrain, ScheduleKind::OneForwardOneBackward],
        name => vec![name.parse::<ScheduleKind>().map_err(raise_cost)?],
    };
    let forced = |number: usize| (number > 0).then_some(number);
    let options = rannc_plan::Options {
        batch_size,
        optimizer_state_factor,
        num_stages: forced(partition_num),
        num_replicas: forced(replica_num),
        microbatches: (pipeline_num > 0).then_some(pipeline_num),
        min_microbatches: min_pipeline,
        max_microbatches: max_pipeline,
        max_blocks: max_partition_num,
        memory_limit_gib: (mem_limit_gb > 0.0).then_some(mem_limit_gb),
        memory_margin: mem_margin,
        schedules,
        recompute,
        sharding: sharding.parse().map_err(raise_cost)?,
        least_sharding: least_sharding.parse().map_err(raise_cost)?,
    };
    let plan = py.detach(|| {
        let planner = rannc_plan::Planner::new(&graph.graph, profile.as_ref());
        planner.plan(&cluster, &options, &rannc_plan::Bar::new(progress))
    });
    Ok(Plan { plan: plan.map_err(raise_plan)? })
}

#[pymethods]
impl Plan {
    /// Reads the JSON form.
    #[staticmethod]
    fn from_json(text: &str) -> PyResult<Self> {
        Ok(Self { plan: rannc_plan::Plan::from_json(text).map_err(raise_deployment)? })
    }

    /// Reads a deployment file.
    #[staticmethod]
    fn load(path: PathBuf) -> PyResult<Self> {
        Ok(Self { plan: rannc_plan::Plan::load(&path).map_err(raise_deployment)? })
    }

    /// Writes a deployment file.
    fn save(&self, path: PathBuf) -> PyResult<()> {
        self.plan.save(&path).map_err(raise_deployment)
    }

    /// The JSON form.
    fn to_json(&self) -> String {
        self.plan.to_json()
    }

    /// The same plan with every stage that has several replicas sharded at least so far; the
    /// estimates stay as they are.
    fn shard_at_least(&self, level: &str) -> PyResult<Self> {
        let level = level.parse().map_err(raise_cost)?;
        Ok(Self { plan: self.plan.clone().shard_at_least(level) })
    }

    /// Raises unless the plan is one for this graph and this many processes.
    fn check(&self, graph: &Graph, world_size: u32) -> PyResult<()> {
        self.plan.check(&graph.graph, world_size).map_err(raise_deployment)
    }

    /// Applies the plan to a graph of its model. `divided` is that of the placement in force, if there
    /// is one.
    #[pyo3(signature = (graph, divided = None))]
    fn place(
        &self,
        graph: &Graph,
        divided: Option<BTreeMap<String, String>>,
    ) -> PyResult<Placement> {
        let levels = |(name, level): (String, String)| {
            level.parse::<Sharding>().map(|level| (name, level)).map_err(raise_cost)
        };
        let placement = match divided {
            Some(divided) => {
                let divided = divided.into_iter().map(levels).collect::<PyResult<_>>()?;
                self.plan.place_again(&graph.graph, &divided)
            }
            None => self.plan.place(&graph.graph),
        };
        let placement = placement.map_err(raise_deployment)?;
        let key = |id: &rannc_graph::NodeId| graph.graph.node(*id).key.clone();
        let name = |id: &ValueId| graph.graph.value(*id).name.clone();
        let keys = |ids: &Vec<rannc_graph::NodeId>| ids.iter().map(key).collect::<Vec<_>>();
        let nodes = placement.stages.iter().map(|stage| keys(&stage.nodes));
        let ids = |values: &[ValueId]| values.iter().map(|id| id.0).collect();
        let unit = |unit: &rannc_partition::Unit| PlacedUnit {
            nodes: keys(&unit.nodes),
            inputs: ids(&unit.inputs),
            outputs: ids(&unit.outputs),
        };
        let units = placement.stages.iter().map(|stage| stage.units.iter().map(unit).collect());
        let recompute =
            placement.stages.iter().map(|stage| stage.recompute.iter().map(keys).collect());
        let parameters =
            placement.groups.iter().map(|group| group.parameters.iter().map(name).collect());
        Ok(Placement {
            nodes: nodes.collect(),
            recompute: recompute.collect(),
            units: units.collect(),
            parameters: parameters.collect(),
            holders: placement.holders(&graph.graph),
            placed: placement,
        })
    }

    /// The report that people read; for a global batch of `rows` also how it is cut.
    #[pyo3(signature = (rows = None))]
    fn report(&self, rows: Option<u64>) -> String {
        rows.map_or_else(|| self.plan.report(), |rows| self.plan.report_for(rows))
    }

    /// The number of processes.
    #[getter]
    fn world_size(&self) -> u32 {
        self.plan.world_size
    }

    /// The number of stages.
    #[getter]
    fn num_stages(&self) -> usize {
        self.plan.stages.len()
    }

    /// The ranks of each stage.
    #[getter]
    fn stage_ranks(&self) -> Vec<Vec<u32>> {
        self.plan.stages.iter().map(|stage| stage.ranks.clone()).collect()
    }

    /// What the replicas of each stage divide among themselves: `none`, `optimizer`, `gradients` or
    /// `parameters`.
    #[getter]
    fn stage_sharding(&self) -> Vec<String> {
        self.plan.stages.iter().map(|stage| stage.sharding.to_string()).collect()
    }

    /// How many parts the batch is cut into.
    #[getter]
    fn microbatches(&self) -> u64 {
        self.plan.microbatches
    }

    /// `fill_drain` or `1f1b`.
    #[getter]
    fn schedule(&self) -> String {
        self.plan.schedule.to_string()
    }

    /// Predicted peak bytes by rank; none for a plan written by hand.
    #[getter]
    fn predicted_bytes(&self) -> Option<Vec<u64>> {
        let estimates = self.plan.estimates.as_ref()?;
        Some(estimates.ranks.iter().map(|rank| rank.memory.total()).collect())
    }

    /// Predicted nanoseconds of a step; none for a plan written by hand.
    #[getter]
    fn predicted_step_ns(&self) -> Option<u64> {
        self.plan.estimates.as_ref().map(|estimates| estimates.step_ns)
    }

    fn __str__(&self) -> String {
        self.plan.report()
    }
}

#[pymethods]
impl Placement {
    /// The stages, in the order in which values flow.
    #[getter]
    fn stages(&self) -> Vec<PlacedStage> {
        let ids = |values: &[ValueId]| values.iter().map(|id| id.0).collect();
        self.placed
            .stages
            .iter()
            .zip(self.nodes.iter().zip(&self.recompute))
            .zip(&self.units)
            .map(|((stage, (nodes, recompute)), units)| PlacedStage {
                ranks: stage.ranks.clone(),
                nodes: nodes.clone(),
                recompute: recompute.clone(),
                inputs: ids(&stage.inputs),
                outputs: ids(&stage.outputs),
                units: units.clone(),
            })
            .collect()
    }

    /// For each gradient group its ranks and the names of its parameters.
    #[getter]
    fn gradient_groups(&self) -> Vec<(Vec<u32>, Vec<String>)> {
        let groups = self.placed.groups.iter().zip(&self.parameters);
        groups.map(|(group, names)| (group.ranks.clone(), names.clone())).collect()
    }

    /// What the ranks of each gradient group divide among themselves: `none`, `optimizer`,
    /// `gradients` or `parameters`.
    #[getter]
    fn group_sharding(&self) -> Vec<String> {
        self.placed.groups.iter().map(|group| group.sharding.to_string()).collect()
    }

    /// What the holders of each divided parameter divide, by its name: `optimizer`, `gradients` or
    /// `parameters`.
    #[getter]
    fn divided(&self) -> BTreeMap<String, String> {
        let divided = self.placed.divided.iter();
        divided.map(|(name, level)| (name.clone(), level.to_string())).collect()
    }

    /// The ranks that hold each parameter and buffer that a stage uses, by name.
    #[getter]
    fn holders(&self) -> BTreeMap<String, Vec<u32>> {
        self.holders.clone()
    }

    /// Every rank's actions for a batch with these rows per rank, checked.
    ///
    /// In training, gradients are added up between ranks unless `reduce` is false, and backward waits
    /// for the caller's gradients unless `seeded`, where the plan allows it.
    #[pyo3(signature = (rows, *, gather, training, reduce = true, seeded = true))]
    #[allow(clippy::fn_params_excessive_bools, reason = "they are keywords in Python")]
    fn program(
        &self,
        rows: Vec<u64>,
        gather: bool,
        training: bool,
        reduce: bool,
        seeded: bool,
    ) -> PyResult<Program> {
        let mode = match (training, reduce) {
            (false, _) => Mode::Inference,
            (true, true) => Mode::Training,
            (true, false) => Mode::Accumulation,
        };
        let schedule = if training && seeded {
            self.placed.training_schedule()
        } else {
            ScheduleKind::FillDrain
        };
        let program = self.placed.program_by(schedule, rows, gather, mode).map_err(raise_plan)?;
        let fused = schedule == ScheduleKind::OneForwardOneBackward
            && program.backward.iter().all(Vec::is_empty);
        Ok(Program { program, fused })
    }

    /// Every rank's actions that add up what programs without `reduce` have left, checked; all are in
    /// the forward pass.
    fn reduction(&self) -> PyResult<Program> {
        Ok(Program { program: self.placed.reduction().map_err(raise_plan)?, fused: false })
    }
}
