//! The dependency relation: what must happen before what. Lowering, checking and simulating all use it.
//!
//! Every action touches some *resources* of its rank: slots, the activations that a stage keeps from forward
//! to backward, and the gradients of a stage's parameters. It writes a resource, reads it, or takes it
//! (uses it for the last time). The whole relation is:
//!
//! 1. a resource is read after all its writes, and taken after all its writes and reads;
//! 2. a [`Action::Recv`] writes its slot once the matching [`Action::Send`] has run as well, where the nth
//!    transfer between two ranks, in either direction, is the same one for both of them;
//! 3. a reduction starts on all its ranks at once.
//!
//! Sends and receives only start something; computing and reducing block the rank until it can be done.
//! [`Run`] plays lists of actions by these rules, without time; observers add what they need.
//!
//! A schedule with other kinds of work (a backward in two halves, say) adds its actions to
//! [`Resources::touch`] and nowhere else here.

use rustc_hash::FxHashMap;

use crate::script::{Work, rows_of};
use crate::{Action, Pass, Pipeline, Place, RankId, RowRange, ScheduleError, Slot, StageId};

/// What an action does to a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Adds to it, or makes it.
    Write,
    /// Uses it.
    Read,
    /// Uses it for the last time.
    Take,
}

/// A resource of one rank, numbered over all ranks.
pub(crate) type Resource = u32;

/// Why an action cannot be one of this pipeline's: it names something that its rank does not have.
pub(crate) type Unknown = String;

/// The numbering of all resources, and which of them an action touches.
#[derive(Debug)]
pub(crate) struct Resources<'a> {
    pipeline: &'a Pipeline,
    microbatches: u32,
    /// By value.
    flows: FxHashMap<u32, u32>,
    /// By id.
    groups: FxHashMap<u32, usize>,
    stages: Vec<StageResources>,
    source: Ports,
    sink: Ports,
    count: u32,
}

/// The values that come and go at one place, with the number of the place's first resource.
#[derive(Debug, Default)]
struct Ports {
    /// Flows in, ascending, then flows out, ascending.
    flows: Vec<u32>,
    num_inputs: usize,
    first: Resource,
}

/// A stage's resources: for each replica and microbatch its slots and its activations, then for each
/// replica its gradients.
#[derive(Debug)]
struct StageResources {
    ports: Ports,
    gradients: Resource,
}

impl Ports {
    fn of(place: Place, pipeline: &Pipeline) -> Self {
        let indices = |keep: &dyn Fn(&crate::Flow) -> bool| -> Vec<u32> {
            let kept = pipeline.flows.iter().zip(0..).filter(|(flow, _)| keep(flow));
            kept.map(|(_, index)| index).collect()
        };
        let mut flows = indices(&|flow| flow.to.contains(&place));
        let num_inputs = flows.len();
        flows.extend(indices(&|flow| flow.from == place));
        Self { flows, num_inputs, first: 0 }
    }

    fn position(&self, flow: u32) -> Option<u32> {
        let (inputs, outputs) = self.flows.split_at(self.num_inputs);
        let position = match inputs.binary_search(&flow) {
            Ok(index) => index,
            Err(_) => self.num_inputs + outputs.binary_search(&flow).ok()?,
        };
        Some(small(position))
    }

    /// How many slots one assembly at this place has.
    fn num_slots(&self) -> u32 {
        2 * small(self.flows.len())
    }
}

fn small(number: usize) -> u32 {
    u32::try_from(number).expect("a pipeline has fewer than 2^32 elements")
}

fn slot_offset(port: u32, pass: Pass) -> u32 {
    2 * port + u32::from(pass == Pass::Backward)
}

/// Resources are numbered in 32 bits; every slot there could be must fit, with room to spare.
fn refuse_too_large(pipeline: &Pipeline, microbatches: u32) -> Result<(), ScheduleError> {
    let replicas: u64 = pipeline.stages.iter().map(|stage| stage.ranks.len() as u64).sum();
    let slots = 2 * pipeline.flows.len() as u64 + 1;
    let assemblies = replicas.saturating_mul(microbatches.into());
    let total = assemblies.saturating_add(2 * u64::from(pipeline.world_size) + replicas);
    let total = total.saturating_mul(slots);
    if total < u64::from(u32::MAX) {
        return Ok(());
    }
    Err(ScheduleError::TooLarge { slots: total, limit: u32::MAX })
}

impl<'a> Resources<'a> {
    /// Numbers the resources of a valid pipeline.
    pub(crate) fn new(pipeline: &'a Pipeline, microbatches: u32) -> Result<Self, ScheduleError> {
        refuse_too_large(pipeline, microbatches)?;
        let mut next = 0;
        let mut reserve = |count: u32| {
            let first = next;
            next += count;
            first
        };
        let mut source = Ports::of(Place::Source, pipeline);
        source.first = reserve(pipeline.world_size * source.num_slots());
        let mut sink = Ports::of(Place::Sink, pipeline);
        sink.first = reserve(pipeline.world_size * sink.num_slots());
        let mut stages = Vec::with_capacity(pipeline.stages.len());
        for (index, stage) in pipeline.stages.iter().enumerate() {
            let mut ports = Ports::of(Place::Stage(StageId::new(index)), pipeline);
            let replicas = small(stage.ranks.len());
            ports.first = reserve(replicas * microbatches * (ports.num_slots() + 1));
            stages.push(StageResources { ports, gradients: reserve(replicas) });
        }
        let flows = pipeline.flows.iter().zip(0..).map(|(flow, index)| (flow.value, index));
        let groups = pipeline.gradient_groups.iter().enumerate();
        Ok(Self {
            pipeline,
            microbatches,
            flows: flows.collect(),
            groups: groups.map(|(index, group)| (group.id, index)).collect(),
            stages,
            source,
            sink,
            count: next,
        })
    }

    /// How many resources there are.
    pub(crate) fn count(&self) -> usize {
        self.count as usize
    }

    /// The position of a value's flow.
    pub(crate) fn flow(&self, value: u32) -> Option<usize> {
        self.flows.get(&value).map(|&flow| flow as usize)
    }

    /// The position of a gradient group.
    pub(crate) fn group(&self, id: u32) -> Option<usize> {
        self.groups.get(&id).copied()
    }

    /// The resource of a slot on a rank.
    pub(crate) fn slot(&self, rank: RankId, slot: &Slot) -> Option<Resource> {
        let flow = *self.flows.get(&slot.value)?;
        let (ports, assembly) = match slot.place {
            Place::Source => (&self.source, rank.0),
            Place::Sink => (&self.sink, rank.0),
            Place::Stage(stage) => {
                let assembly = self.assembly(stage, slot.microbatch, rank)?;
                let ports = &self.stages[stage.index()].ports;
                let offset = slot_offset(ports.position(flow)?, slot.pass);
                return Some(ports.first + assembly * (ports.num_slots() + 1) + offset);
            }
        };
        let offset = slot_offset(ports.position(flow)?, slot.pass);
        Some(ports.first + assembly * ports.num_slots() + offset)
    }

    /// The resource of the activations that a replica keeps of a microbatch.
    pub(crate) fn activations(
        &self,
        rank: RankId,
        stage: StageId,
        microbatch: u32,
    ) -> Option<Resource> {
        let assembly = self.assembly(stage, microbatch, rank)?;
        let ports = &self.stages[stage.index()].ports;
        Some(ports.first + assembly * (ports.num_slots() + 1) + ports.num_slots())
    }

    /// The number of a microbatch on a replica, within its stage.
    fn assembly(&self, stage: StageId, microbatch: u32, rank: RankId) -> Option<u32> {
        let replica = self.replica(stage, rank)?;
        (microbatch < self.microbatches).then_some(replica * self.microbatches + microbatch)
    }

    fn replica(&self, stage: StageId, rank: RankId) -> Option<u32> {
        let ranks = &self.pipeline.stages.get(stage.index())?.ranks;
        // Most stages are on ranks in a row.
        let guess = rank.0.checked_sub(ranks[0].0)?;
        if ranks.get(guess as usize) == Some(&rank) {
            return Some(guess);
        }
        ranks.binary_search(&rank).ok().map(small)
    }

    /// Calls `visit` with every resource that an action of `rank` touches.
    pub(crate) fn touch(
        &self,
        rank: RankId,
        action: &Action,
        mut visit: impl FnMut(Resource, Access),
    ) -> Result<(), Unknown> {
        let slot = |slot: &Slot| self.known_slot(rank, slot);
        let last = |release: bool| if release { Access::Take } else { Access::Read };
        match action {
            Action::Forward { .. } | Action::Backward { .. } => {
                self.touch_work(&self.work(rank, action)?, visit);
            }
            Action::Send { slot: from, release, .. } => visit(slot(from)?, last(*release)),
            Action::Recv { slot: to, .. } => visit(slot(to)?, Access::Write),
            Action::Copy { from, to, release, .. } => {
                visit(slot(from)?, last(*release));
                visit(slot(to)?, Access::Write);
            }
            Action::ReduceGradients { group } => {
                let index =
                    self.group(*group).ok_or_else(|| format!("there is no group {group}"))?;
                self.touch_gradients(rank, index, visit);
            }
            Action::ReduceOutput { value } => {
                visit(slot(&Slot::new(Place::Sink, 0, *value, Pass::Forward))?, Access::Read);
            }
        }
        Ok(())
    }

    /// The same for work that was looked up.
    pub(crate) fn touch_work(&self, work: &Work, mut visit: impl FnMut(Resource, Access)) {
        let ports = &self.stages[work.stage.index()].ports;
        let activations = work.first + ports.num_slots();
        let (inputs, outputs) = match work.pass {
            Pass::Forward => (Access::Take, Access::Write),
            Pass::Backward => (Access::Write, Access::Take),
        };
        for (&flow, port) in ports.flows.iter().zip(0..) {
            if work.pass == Pass::Forward || self.pipeline.flows[flow as usize].gradient {
                let access = if (port as usize) < ports.num_inputs { inputs } else { outputs };
                visit(work.first + slot_offset(port, work.pass), access);
            }
        }
        match work.pass {
            Pass::Forward if self.pipeline.stages[work.stage.index()].backward => {
                visit(activations, Access::Write);
            }
            Pass::Forward => {}
            Pass::Backward => {
                visit(activations, Access::Take);
                visit(work.gradients, Access::Write);
            }
        }
    }

    /// The same for the reduction of a group, by its position.
    pub(crate) fn touch_gradients(
        &self,
        rank: RankId,
        group: usize,
        mut visit: impl FnMut(Resource, Access),
    ) {
        for &stage in &self.pipeline.gradient_groups[group].stages {
            if let Some(replica) = self.replica(stage, rank) {
                visit(self.stages[stage.index()].gradients + replica, Access::Read);
            }
        }
    }

    /// Looks up a forward or backward.
    pub(crate) fn work(&self, rank: RankId, action: &Action) -> Result<Work, Unknown> {
        let (pass, stage, microbatch, rows) = match *action {
            Action::Forward { stage, microbatch, rows } => (Pass::Forward, stage, microbatch, rows),
            Action::Backward { stage, microbatch, rows } => {
                (Pass::Backward, stage, microbatch, rows)
            }
            _ => return Err("it is no work".into()),
        };
        let found = self
            .replica(stage, rank)
            .and_then(|replica| Some((replica, self.assembly(stage, microbatch, rank)?)));
        let (replica, assembly) = found.ok_or_else(|| {
            format!("rank {rank} has no stage {stage}, or there is no microbatch {microbatch}")
        })?;
        let StageResources { ports, gradients } = &self.stages[stage.index()];
        let first = ports.first + assembly * (ports.num_slots() + 1);
        Ok(Work { pass, stage, microbatch, rows, first, gradients: gradients + replica })
    }

    /// The resource of a slot, or why there is none.
    pub(crate) fn known_slot(&self, rank: RankId, slot: &Slot) -> Result<Resource, Unknown> {
        self.slot(rank, slot).ok_or_else(|| format!("rank {rank} has no slot `{slot}`"))
    }

    /// The resource of an output on a rank, by the position of its flow.
    pub(crate) fn output(&self, rank: RankId, flow: u32) -> Resource {
        let port = self.sink.position(flow).expect("the flow was looked up before");
        self.sink.first + rank.0 * self.sink.num_slots() + slot_offset(port, Pass::Forward)
    }

    /// The size of a piece.
    pub(crate) fn bytes(&self, value: u32, rows: Option<RowRange>, total: u64) -> u64 {
        let flow = self.flow(value).map(|index| &self.pipeline.flows[index]);
        flow.map_or(0, |flow| flow.bytes.at(rows_of(rows, total)))
    }

    /// The slots that work fills, with the position of each one's flow.
    pub(crate) fn results(&self, work: &Work) -> impl Iterator<Item = (usize, Resource)> + '_ {
        let (pass, first) = (work.pass, work.first);
        let ports = &self.stages[work.stage.index()].ports;
        let flows = ports.flows.iter().zip(0u32..);
        flows.filter_map(move |(&flow, port)| {
            let input = (port as usize) < ports.num_inputs;
            let filled = match pass {
                Pass::Forward => !input,
                Pass::Backward => input && self.pipeline.flows[flow as usize].gradient,
            };
            filled.then(|| (flow as usize, first + slot_offset(port, pass)))
        })
    }

    /// What a replica keeps of the microbatch of a work.
    pub(crate) fn kept_by(&self, work: &Work) -> Resource {
        work.first + self.stages[work.stage.index()].ports.num_slots()
    }
}

/// How many writes and reads each resource still waits for.
#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    unwritten: Vec<u32>,
    unread: Vec<u32>,
}

impl Ledger {
    /// Nothing is waited for.
    pub(crate) fn new(resources: &Resources<'_>) -> Self {
        Self { unwritten: vec![0; resources.count()], unread: vec![0; resources.count()] }
    }

    /// Something will happen to a resource.
    pub(crate) fn expect(&mut self, resource: Resource, access: Access) {
        match access {
            Access::Write => self.unwritten[resource as usize] += 1,
            Access::Read => self.unread[resource as usize] += 1,
            Access::Take => {}
        }
    }

    /// Something that was expected has happened.
    pub(crate) fn settle(&mut self, resource: Resource, access: Access) {
        match access {
            Access::Write => self.unwritten[resource as usize] -= 1,
            Access::Read => self.unread[resource as usize] -= 1,
            Access::Take => {}
        }
    }

    /// Whether something may happen now.
    pub(crate) fn allows(&self, resource: Resource, access: Access) -> bool {
        match access {
            Access::Write => true,
            Access::Read => self.complete(resource),
            Access::Take => self.complete(resource) && self.unread[resource as usize] == 0,
        }
    }

    /// Whether all writes have happened.
    pub(crate) fn complete(&self, resource: Resource) -> bool {
        self.unwritten[resource as usize] == 0
    }

    /// Whether all reads have happened.
    pub(crate) fn is_read(&self, resource: Resource) -> bool {
        self.unread[resource as usize] == 0
    }
}
