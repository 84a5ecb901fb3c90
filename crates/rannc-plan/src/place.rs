//! A plan applied to a graph: what each stage computes and what flows between the stages.

use std::collections::{BTreeMap, BTreeSet};

use fixedbitset::FixedBitSet;
use rannc_cost::{ScheduleKind, Sharding};
use rannc_graph::{Graph, NodeId, Rows, Users, Value, ValueId, ValueKind};
use rannc_partition::{Arrangement, Arranger, Candidate, StageCandidate, Unit};
use rannc_schedule::{
    Batch, Flow, GradientGroup, Mode, Pipeline, Place, Program, RankId, Stage, StageId, Transport,
};

use crate::{Plan, PlanError};

/// One stage of a [`Placement`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedStage {
    /// The processes that hold a replica, ascending.
    pub ranks: Vec<u32>,
    /// In which proportion these divide the rows of a microbatch; equally if empty.
    pub shares: Vec<u64>,
    /// What each replica keeps only a part of.
    pub sharding: Sharding,
    /// Its operators in the order in which they run, those that depend on no input included; each
    /// group of `recompute` is together.
    pub nodes: Vec<NodeId>,
    /// Values it receives, ascending.
    pub inputs: Vec<ValueId>,
    /// Values it hands on or returns, ascending.
    pub outputs: Vec<ValueId>,
    /// Parameters, buffers and constants it reads, ascending.
    pub state: Vec<ValueId>,
    /// Groups of its operators whose inner values are computed again in backward, each in the order
    /// in which they run.
    pub recompute: Vec<Vec<NodeId>>,
    /// Its parts, which run one after the other: one, unless gradients or parameters are divided.
    pub units: Vec<Unit>,
}

/// Parameters whose gradients are summed together: those held by exactly these ranks and divided
/// alike among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The ranks, ascending; at least two.
    pub ranks: Vec<u32>,
    /// What the ranks divide: what their stage says, nothing for parameters of several stages.
    pub sharding: Sharding,
    /// The parameters, ascending.
    pub parameters: Vec<ValueId>,
}

/// What the holders of parameters divide, by the parameter's name.
pub type Divided = BTreeMap<String, Sharding>;

/// A plan applied to one graph of its model.
#[derive(Clone, Debug)]
pub struct Placement {
    /// The stages, in the order in which values flow.
    pub stages: Vec<PlacedStage>,
    /// Gradient groups; the position is the group's number.
    pub groups: Vec<Group>,
    /// What the holders of each divided parameter divide, by its name.
    pub divided: Divided,
    /// The same for the schedule: stages and flows only.
    pub pipeline: Pipeline,
    microbatches: u64,
    schedule: ScheduleKind,
}

impl Plan {
    /// Applies the plan to a graph of its model. Operators that the plan does not know (another mode of
    /// the model may have some) go where their parameters and inputs are; groups to compute again that
    /// this graph does not allow are left out.
    ///
    /// # Errors
    ///
    /// [`PlanError::Invalid`] when the plan's stages contradict each other or the graph.
    pub fn place(&self, graph: &Graph) -> Result<Placement, PlanError> {
        self.place_as(graph, None)
    }

    /// The same where ranks divide parameters already.
    ///
    /// # Errors
    ///
    /// As [`Plan::place`].
    pub fn place_again(&self, graph: &Graph, divided: &Divided) -> Result<Placement, PlanError> {
        self.place_as(graph, Some(divided))
    }

    fn place_as(&self, graph: &Graph, divided: Option<&Divided>) -> Result<Placement, PlanError> {
        let Candidate { stages, microbatches, schedule, .. } = self.candidate(graph)?;
        let users = graph.users();
        Ok(Placement::new(graph, &users, stages, self.world_size, microbatches, schedule, divided))
    }

    /// The division of a graph that the plan stands for.
    ///
    /// # Errors
    ///
    /// [`PlanError::Invalid`] when the plan's stages contradict each other.
    pub fn candidate(&self, graph: &Graph) -> Result<Candidate, PlanError> {
        self.check_form()?;
        let nodes = rannc_partition::assign(graph, &self.wanted(), self.stages.len());
        let stages = nodes.into_iter().zip(&self.stages).map(|(nodes, stage)| {
            let recompute = recomputed(graph, &nodes, &stage.recompute);
            let (ranks, shares) = (stage.ranks.clone(), stage.shares.clone());
            StageCandidate { nodes, ranks, shares, sharding: stage.sharding, recompute }
        });
        let estimate_ns = self.estimates.as_ref().map_or(0, |estimates| estimates.step_ns);
        Ok(Candidate {
            stages: stages.collect(),
            microbatches: self.microbatches,
            schedule: self.schedule,
            estimate_ns,
        })
    }

    /// The stage of each operator, by its key.
    pub(crate) fn wanted(&self) -> BTreeMap<&str, usize> {
        self.stages
            .iter()
            .enumerate()
            .flat_map(|(stage, part)| part.nodes.iter().map(move |key| (key.as_str(), stage)))
            .collect()
    }
}

/// The groups of a stage to compute again, by what this graph knows of their keys; perhaps empty.
pub(crate) fn recomputed(
    graph: &Graph,
    nodes: &FixedBitSet,
    groups: &[Vec<String>],
) -> Vec<Vec<NodeId>> {
    if groups.is_empty() {
        return Vec::new();
    }
    let ids: BTreeMap<&str, NodeId> =
        nodes.ones().map(NodeId::new).map(|id| (graph.node(id).key.as_str(), id)).collect();
    let known = |group: &Vec<String>| {
        group.iter().filter_map(|key| ids.get(key.as_str()).copied()).collect()
    };
    groups.iter().map(known).collect()
}

impl Placement {
    /// Lays stages of operators over ranks.
    ///
    /// A plan made for another form of the model may divide a batch that in this form is not to be
    /// divided: then all rows are one microbatch, on the first replica of each stage.
    pub(crate) fn new(
        graph: &Graph,
        users: &Users,
        mut parts: Vec<StageCandidate>,
        world_size: u32,
        mut microbatches: u64,
        schedule: ScheduleKind,
        known: Option<&Divided>,
    ) -> Self {
        if !graph.batch().splittable {
            microbatches = 1;
            for part in parts.iter_mut().filter(|part| part.ranks.len() > 1) {
                part.shares =
                    (0..part.ranks.len()).map(|replica| u64::from(replica == 0)).collect();
            }
        }
        place_returned_constants(graph, &mut parts);
        let flows = flows(graph, &parts, users);
        let mut stages = placed_stages(graph, parts, &flows);
        let divided = known.map_or_else(|| divided(graph, &stages), Divided::clone);
        let readers = readers(&stages);
        let groups = gradient_groups(graph, &stages, &readers, &divided);
        for stage in &mut stages {
            stage.units = units(graph, users, stage, &divided);
        }
        let pipeline = Pipeline {
            world_size,
            stages: stages
                .iter()
                .map(|stage| Stage {
                    ranks: stage.ranks.iter().map(|&rank| RankId(rank)).collect(),
                    shares: stage.shares.clone(),
                    backward: differentiates(graph, stage),
                    sharding: most_divided(graph, stage, &divided),
                })
                .collect(),
            gradient_groups: pipeline_groups(graph, &readers, &groups),
            flows,
        };
        Self { stages, groups, divided, pipeline, microbatches, schedule }
    }

    /// For each parameter and buffer that a stage reads: its name and the ranks that hold it.
    pub fn holders(&self, graph: &Graph) -> BTreeMap<String, Vec<u32>> {
        let read = readers(&self.stages).into_iter();
        read.filter(|(id, _)| graph.value(*id).kind != ValueKind::Constant)
            .map(|(id, readers)| (graph.value(id).name.clone(), ranks_of(&self.stages, &readers)))
            .collect()
    }

    /// The schedule that training follows: 1F1B needs one scalar loss as the only thing to
    /// differentiate, since every other backward waits for the caller's gradients.
    pub fn training_schedule(&self) -> ScheduleKind {
        let mut seeds = self
            .pipeline
            .flows
            .iter()
            .filter(|flow| flow.gradient && flow.to.contains(&Place::Sink));
        match (seeds.next(), seeds.next()) {
            (Some(flow), None) if flow.transport == Transport::Sum => self.schedule,
            _ => ScheduleKind::FillDrain,
        }
    }

    /// Every rank's actions for a batch with these rows per rank.
    ///
    /// # Errors
    ///
    /// [`PlanError::Schedule`] when the program breaks a rule, which would be a bug.
    pub fn program(&self, rows: Vec<u64>, gather: bool, mode: Mode) -> Result<Program, PlanError> {
        let schedule = match mode {
            Mode::Training | Mode::Accumulation => self.training_schedule(),
            Mode::Inference | Mode::Reduction => ScheduleKind::FillDrain,
        };
        self.program_by(schedule, rows, gather, mode)
    }

    /// The same with another schedule than the plan's.
    ///
    /// # Errors
    ///
    /// As [`Placement::program`]; also when the schedule needs a model that returns its loss.
    pub fn program_by(
        &self,
        schedule: ScheduleKind,
        rows: Vec<u64>,
        gather: bool,
        mode: Mode,
    ) -> Result<Program, PlanError> {
        let batch = Batch { rows, gather, microbatches: self.microbatches };
        Ok(rannc_schedule::compile(&self.pipeline, &batch, schedule, mode)?)
    }

    /// Every rank's actions that add up the gradients which steps of [`Mode::Accumulation`] have left.
    ///
    /// # Errors
    ///
    /// As [`Placement::program`].
    pub fn reduction(&self) -> Result<Program, PlanError> {
        let rows = crate::even_rows(1, self.pipeline.world_size);
        let batch = Batch { rows, gather: false, microbatches: 1 };
        let (schedule, mode) = (ScheduleKind::FillDrain, Mode::Reduction);
        Ok(rannc_schedule::compile(&self.pipeline, &batch, schedule, mode)?)
    }
}

/// A result that depends on no input may have no user; the first stage then makes it.
fn place_returned_constants(graph: &Graph, parts: &mut [StageCandidate]) {
    for &output in graph.outputs() {
        let mut needed: Vec<NodeId> = graph.producer(output).into_iter().collect();
        if needed.iter().any(|id| parts.iter().any(|part| part.nodes.contains(id.index()))) {
            continue;
        }
        while let Some(id) = needed.pop() {
            if !parts[0].nodes.put(id.index()) {
                needed.extend(graph.node(id).inputs.iter().filter_map(|&v| graph.producer(v)));
            }
        }
    }
}

/// One flow for each value that leaves the place where it is made.
fn flows(graph: &Graph, parts: &[StageCandidate], users: &Users) -> Vec<Flow> {
    let stage_of = |stage: usize| Place::Stage(StageId(stage as u32));
    let batch_nodes = graph.batch_nodes();
    let returned: BTreeSet<ValueId> = graph.outputs().iter().copied().collect();
    // Those that depend on no input may be in several.
    let mut stages_of: Vec<Vec<usize>> = vec![Vec::new(); graph.nodes().len()];
    for (stage, part) in parts.iter().enumerate() {
        part.nodes.ones().for_each(|node| stages_of[node].push(stage));
    }
    let mut flows = Vec::new();
    for id in graph.value_ids() {
        let value = graph.value(id);
        let mut readers: Vec<usize> =
            users.of(id).iter().flat_map(|user| &stages_of[user.index()]).copied().collect();
        readers.sort_unstable();
        readers.dedup();
        let made_in = match graph.producer(id) {
            Some(node) => stages_of[node.index()].first().copied(),
            None if value.is_state() => Some(readers.first().copied().unwrap_or(0)),
            None => None,
        };
        let cloned = value.is_state()
            || graph.producer(id).is_some_and(|n| !batch_nodes.contains(n.index()));
        readers.retain(|&stage| !cloned && Some(stage) != made_in);
        let mut to: Vec<Place> = readers.into_iter().map(stage_of).collect();
        if returned.contains(&id) {
            to.push(Place::Sink);
        }
        if to.is_empty() || (made_in.is_none() && value.kind != ValueKind::Input) {
            continue;
        }
        flows.push(Flow {
            value: id.0,
            transport: transport(value),
            from: made_in.map_or(Place::Source, stage_of),
            to,
            gradient: value.requires_grad,
            bytes: value.affine_bytes(),
        });
    }
    flows
}

fn transport(value: &Value) -> Transport {
    match value.rows {
        Rows::Split { .. } => Transport::Split,
        Rows::Sum => Transport::Sum,
        Rows::None | Rows::Whole => Transport::Whole,
    }
}

fn placed_stages(graph: &Graph, parts: Vec<StageCandidate>, flows: &[Flow]) -> Vec<PlacedStage> {
    let recomputes = parts.iter().any(|part| !part.recompute.is_empty());
    let arranger = recomputes.then(|| Arranger::new(graph));
    let arranged = |part: &StageCandidate| match &arranger {
        Some(arranger) => arranger.arrange_possible(&part.nodes, &part.recompute),
        None => Arrangement::plain(&part.nodes),
    };
    let mut stages: Vec<PlacedStage> = parts
        .into_iter()
        .map(|part| {
            let Arrangement { order: nodes, groups: recompute } = arranged(&part);
            let state = state_of(graph, &part.nodes);
            let StageCandidate { ranks, shares, sharding, .. } = part;
            let (inputs, outputs) = (Vec::new(), Vec::new());
            let units = Vec::new();
            PlacedStage { ranks, shares, sharding, nodes, inputs, outputs, state, recompute, units }
        })
        .collect();
    for flow in flows {
        let value = ValueId(flow.value);
        if let Place::Stage(stage) = flow.from {
            stages[stage.0 as usize].outputs.push(value);
            if graph.value(value).is_state() {
                let state = &mut stages[stage.0 as usize].state;
                if let Err(position) = state.binary_search(&value) {
                    state.insert(position, value);
                }
            }
        }
        for place in &flow.to {
            if let Place::Stage(stage) = place {
                stages[stage.0 as usize].inputs.push(value);
            }
        }
    }
    stages
}

fn state_of(graph: &Graph, part: &FixedBitSet) -> Vec<ValueId> {
    let inputs = part.ones().flat_map(|index| graph.nodes()[index].inputs.iter().copied());
    let mut read: Vec<ValueId> = inputs.filter(|&id| graph.value(id).is_state()).collect();
    read.sort_unstable();
    read.dedup();
    read
}

fn differentiates(graph: &Graph, stage: &PlacedStage) -> bool {
    stage.outputs.iter().any(|&id| graph.value(id).requires_grad)
}

fn is_trainable(value: &Value) -> bool {
    value.kind == ValueKind::Parameter && value.requires_grad
}

/// The stages that read each parameter, buffer and constant, ascending.
fn readers(stages: &[PlacedStage]) -> BTreeMap<ValueId, Vec<usize>> {
    let mut readers: BTreeMap<ValueId, Vec<usize>> = BTreeMap::new();
    for (index, stage) in stages.iter().enumerate() {
        stage.state.iter().for_each(|&id| readers.entry(id).or_default().push(index));
    }
    readers
}

/// All ranks of some stages.
fn ranks_of(stages: &[PlacedStage], some: &[usize]) -> Vec<u32> {
    let mut ranks: Vec<u32> =
        some.iter().flat_map(|&index| &stages[index].ranks).copied().collect();
    ranks.sort_unstable();
    ranks.dedup();
    ranks
}

fn gradient_groups(
    graph: &Graph,
    stages: &[PlacedStage],
    readers: &BTreeMap<ValueId, Vec<usize>>,
    divided: &Divided,
) -> Vec<Group> {
    let mut by_readers: BTreeMap<(&[usize], Sharding), Vec<ValueId>> = BTreeMap::new();
    for (&id, readers) in readers.iter().filter(|&(&id, _)| is_trainable(graph.value(id))) {
        by_readers.entry((readers, level(graph, id, divided))).or_default().push(id);
    }
    // Stages on the same ranks add up together.
    let mut groups: BTreeMap<(Vec<u32>, Sharding), Vec<ValueId>> = BTreeMap::new();
    for ((readers, sharding), parameters) in by_readers {
        let ranks = ranks_of(stages, readers);
        if ranks.len() > 1 {
            groups.entry((ranks, sharding)).or_default().extend(parameters);
        }
    }
    let group = |((ranks, sharding), mut parameters): (_, Vec<ValueId>)| {
        parameters.sort_unstable();
        Group { ranks, sharding, parameters }
    };
    groups.into_iter().map(group).collect()
}

/// What replicas divide of the trained parameters of a graph: those of one stage can be divided, those
/// of several cannot, since each stage may divide in another way. What the model returns stays whole.
fn divided(graph: &Graph, stages: &[PlacedStage]) -> Divided {
    let mut readers: BTreeMap<ValueId, Vec<&PlacedStage>> = BTreeMap::new();
    for stage in stages {
        for &id in stage.state.iter().filter(|&&id| is_trainable(graph.value(id))) {
            readers.entry(id).or_default().push(stage);
        }
    }
    let own = readers.into_iter().filter_map(|(id, stages)| match stages[..] {
        [stage] if stage.ranks.len() > 1 && !stage.outputs.contains(&id) => {
            (!stage.sharding.is_none()).then(|| (graph.value(id).name.clone(), stage.sharding))
        }
        _ => None,
    });
    own.collect()
}

fn level(graph: &Graph, id: ValueId, divided: &Divided) -> Sharding {
    divided.get(&graph.value(id).name).copied().unwrap_or_default()
}

/// The most that the replicas of a stage divide in fact.
fn most_divided(graph: &Graph, stage: &PlacedStage, divided: &Divided) -> Sharding {
    stage.state.iter().map(|&id| level(graph, id, divided)).max().unwrap_or_default()
}

fn units(graph: &Graph, users: &Users, stage: &PlacedStage, divided: &Divided) -> Vec<Unit> {
    let PlacedStage { nodes, inputs, outputs, recompute, .. } = stage;
    if most_divided(graph, stage, divided) < Sharding::Gradients {
        let (nodes, inputs, outputs) = (nodes.clone(), inputs.clone(), outputs.clone());
        return vec![Unit { nodes, inputs, outputs }];
    }
    let arrangement = Arrangement { order: nodes.clone(), groups: recompute.clone() };
    let is_divided = |id: ValueId| level(graph, id, divided) >= Sharding::Gradients;
    rannc_partition::units(graph, users, &arrangement, outputs, is_divided)
}

fn pipeline_groups(
    graph: &Graph,
    readers: &BTreeMap<ValueId, Vec<usize>>,
    groups: &[Group],
) -> Vec<GradientGroup> {
    let used_by = |group: &Group| {
        let mut stages: Vec<StageId> = group
            .parameters
            .iter()
            .flat_map(|id| &readers[id])
            .copied()
            .map(StageId::new)
            .collect();
        stages.sort_unstable();
        stages.dedup();
        stages
    };
    let bytes = |group: &Group| {
        let each = group.parameters.iter().map(|&id| graph.value(id).bytes(0));
        each.fold(0, u64::saturating_add)
    };
    let group = |(index, group): (usize, &Group)| GradientGroup {
        id: index as u32,
        ranks: group.ranks.iter().map(|&rank| RankId(rank)).collect(),
        stages: used_by(group),
        bytes: bytes(group),
        sharding: group.sharding,
    };
    groups.iter().enumerate().map(group).collect()
}

#[cfg(test)]
mod tests;
