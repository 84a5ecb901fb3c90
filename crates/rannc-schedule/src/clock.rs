//! The times and the memory of a simulated program.

use crate::depend::{Access, Resource, Resources};
use crate::run::{At, Matching, Observer};
use crate::simulate::{Event, Memory, RankTimeline, Timeline, Timing};
use crate::{Action, Pass, Pipeline, Place, RankId, Slot, StageId};

/// Knows the time of each rank and of everything that has happened.
pub(crate) struct Clock<'a> {
    pipeline: &'a Pipeline,
    resources: &'a Resources<'a>,
    timing: &'a dyn Timing,
    memory: &'a dyn Memory,
    /// Whether activations are kept.
    training: bool,
    pass: usize,
    lists: &'a [Vec<Action>],
    pairs: Vec<(At, At)>,
    ranks: Vec<Rank>,
    /// Per resource, when it is complete.
    ready: Vec<u64>,
    /// Per resource, the memory it takes.
    held: Vec<u64>,
}

/// One rank.
#[derive(Clone, Default)]
struct Rank {
    /// When it can go on.
    now: u64,
    busy: u64,
    /// When its last transfer out is done.
    sent: u64,
    /// When its last transfer in is done.
    received: u64,
    /// Per position, when it started its half of a transfer.
    posted: Vec<u64>,
    /// Changes of its memory.
    changes: Vec<(u64, i64)>,
    /// Events with their pass and position.
    events: Vec<(usize, u32, Event)>,
}

impl Rank {
    fn change(&mut self, time: u64, bytes: u64, sign: i64) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.changes.push((time, sign * bytes));
    }

    fn peak(&mut self) -> u64 {
        self.changes.sort_unstable();
        let (mut level, mut peak) = (0i64, 0);
        for &(_, change) in &self.changes {
            level = level.saturating_add(change);
            peak = peak.max(level);
        }
        u64::try_from(peak).unwrap_or(0)
    }
}

impl<'a> Clock<'a> {
    /// Everything at time 0.
    pub(crate) fn new(
        pipeline: &'a Pipeline,
        resources: &'a Resources<'a>,
        timing: &'a dyn Timing,
        memory: &'a dyn Memory,
        training: bool,
    ) -> Self {
        Self {
            pipeline,
            resources,
            timing,
            memory,
            training,
            pass: 0,
            lists: &[],
            pairs: Vec::new(),
            ranks: vec![Rank::default(); pipeline.world_size as usize],
            ready: vec![0; resources.count()],
            held: vec![0; resources.count()],
        }
    }

    /// When a rank can go on.
    pub(crate) fn now(&self, rank: u32) -> u64 {
        self.ranks[rank as usize].now
    }

    /// Starts a pass; the second one when a rank has its outputs.
    pub(crate) fn begin(&mut self, pass: usize, lists: &'a [Vec<Action>], matching: &Matching) {
        self.pass = pass;
        self.lists = lists;
        self.pairs.clone_from(&matching.pairs);
        for (index, (rank, list)) in self.ranks.iter_mut().zip(lists).enumerate() {
            rank.posted = vec![0; list.len()];
            if pass == 0 {
                continue;
            }
            let outputs = self.pipeline.flows.iter().filter(|flow| flow.to.contains(&Place::Sink));
            for flow in outputs {
                let slot = Slot::new(Place::Sink, 0, flow.value, Pass::Forward);
                if let Some(resource) = self.resources.slot(RankId::new(index), &slot) {
                    rank.now = rank.now.max(self.ready[resource as usize]);
                }
            }
        }
    }

    /// Everything that happened.
    pub(crate) fn finish(mut self) -> Timeline {
        let ends = self.ranks.iter().flat_map(|rank| {
            rank.events.iter().map(|(_, _, event)| event.end_ns).chain([rank.now])
        });
        let makespan_ns = ends.max().unwrap_or(0);
        let ranks = self.ranks.iter_mut().map(|rank| RankTimeline {
            busy_ns: rank.busy,
            bubble_ns: makespan_ns - rank.busy,
            peak_activation_bytes: rank.peak(),
        });
        let ranks = ranks.collect();
        for rank in &mut self.ranks {
            rank.events.sort_unstable_by_key(|&(pass, step, _)| (pass, step));
        }
        let events = self.ranks.into_iter().flat_map(|rank| rank.events);
        Timeline { makespan_ns, ranks, events: events.map(|(_, _, event)| event).collect() }
    }

    fn event(&mut self, at: At, start_ns: u64, end_ns: u64) {
        let action = *at.action(self.lists);
        let event = Event { rank: RankId(at.rank), action, start_ns, end_ns };
        self.ranks[at.rank as usize].events.push((self.pass, at.step, event));
    }

    fn touched(&self, rank: u32, action: &Action, access: Access) -> Vec<Resource> {
        let mut touched = Vec::new();
        let looked_up = self.resources.touch(RankId(rank), action, |resource, found| {
            if found == access {
                touched.push(resource);
            }
        });
        looked_up.expect("all actions were looked up before the simulation");
        touched
    }

    fn hold(&mut self, rank: u32, resource: Resource, time: u64, bytes: u64) {
        self.held[resource as usize] = self.held[resource as usize].saturating_add(bytes);
        self.ranks[rank as usize].change(time, bytes, 1);
    }

    fn free(&mut self, rank: u32, resource: Resource, time: u64) {
        let bytes = std::mem::take(&mut self.held[resource as usize]);
        self.ranks[rank as usize].change(time, bytes, -1);
    }

    fn written(&mut self, resource: Resource, time: u64) {
        let ready = &mut self.ready[resource as usize];
        *ready = time.max(*ready);
    }

    /// A stage runs as soon as the rank and all that it takes are ready.
    fn work(&mut self, at: At, action: &Action, stage: StageId, microbatch: u32, rows: u64) {
        let forward = matches!(action, Action::Forward { .. });
        let taken = self.touched(at.rank, action, Access::Take);
        let ready = taken.iter().map(|&resource| self.ready[resource as usize]);
        let start = ready.fold(self.now(at.rank), u64::max);
        let rank = RankId(at.rank);
        let duration = if forward {
            self.timing.forward_ns(stage, rank, rows)
        } else {
            self.timing.backward_ns(stage, rank, rows)
        };
        let end = start.saturating_add(duration);
        let keeps = forward && self.training && self.pipeline.stages[stage.index()].backward;
        if keeps {
            let activations = self.resources.activations(RankId(at.rank), stage, microbatch);
            let activations = activations.expect("all actions were looked up before");
            self.hold(at.rank, activations, start, self.memory.saved_bytes(stage, rows));
        }
        for resource in taken {
            // What is kept from the inputs is already in the saved bytes.
            self.free(at.rank, resource, if keeps { start } else { end });
        }
        for resource in self.touched(at.rank, action, Access::Write) {
            self.written(resource, end);
        }
        self.hold_results(at.rank, forward, (stage, microbatch), rows, end);
        let rank = &mut self.ranks[at.rank as usize];
        rank.now = end;
        rank.busy = rank.busy.saturating_add(duration);
        self.event(at, start, end);
    }

    /// The slots that work fills, until they are released.
    fn hold_results(
        &mut self,
        rank: u32,
        forward: bool,
        (stage, microbatch): (StageId, u32),
        rows: u64,
        time: u64,
    ) {
        let (pipeline, resources) = (self.pipeline, self.resources);
        for (flow, input) in resources.ports(stage) {
            let flow = &pipeline.flows[flow];
            if input == forward || !(forward || flow.gradient) {
                continue;
            }
            let pass = if forward { Pass::Forward } else { Pass::Backward };
            let slot = Slot::new(Place::Stage(stage), microbatch, flow.value, pass);
            if let Some(resource) = resources.slot(RankId(rank), &slot) {
                self.hold(rank, resource, time, flow.bytes.at(rows));
            }
        }
    }

    /// The size of a piece of a slot.
    fn bytes(&self, slot: &Slot, rows: Option<crate::RowRange>, total: u64) -> u64 {
        let flow = self.resources.flow(slot.value).map(|index| &self.pipeline.flows[index]);
        flow.map_or(0, |flow| flow.bytes.at(rows.map_or(total, crate::RowRange::len)))
    }

    /// A piece arrives in a slot: its memory counts unless the slot is the caller's.
    fn arrive(&mut self, rank: u32, slot: &Slot, time: u64, bytes: u64) {
        if let (Place::Stage(_), Some(resource)) =
            (slot.place, self.resources.slot(RankId(rank), slot))
        {
            self.hold(rank, resource, time, bytes);
        }
    }
}

impl Observer for Clock<'_> {
    fn ran(&mut self, at: At, action: &Action) {
        let now = self.now(at.rank);
        match action {
            &Action::Forward { stage, microbatch, rows }
            | &Action::Backward { stage, microbatch, rows } => {
                self.work(at, action, stage, microbatch, rows);
            }
            Action::Send { .. } => self.ranks[at.rank as usize].posted[at.step as usize] = now,
            Action::Recv { slot, rows, total, .. } => {
                self.ranks[at.rank as usize].posted[at.step as usize] = now;
                self.arrive(at.rank, slot, now, self.bytes(slot, *rows, *total));
            }
            Action::Copy { to, to_rows, total, .. } => {
                for resource in self.touched(at.rank, action, Access::Take) {
                    self.free(at.rank, resource, now);
                }
                for resource in self.touched(at.rank, action, Access::Write) {
                    self.written(resource, now);
                }
                self.arrive(at.rank, to, now, self.bytes(to, *to_rows, *total));
            }
            Action::ReduceGradients { .. } | Action::ReduceOutput { .. } => {}
        }
    }

    fn delivered(&mut self, pair: usize, target: Resource) {
        let (send, receive) = self.pairs[pair];
        let (from, to) = (send.rank as usize, receive.rank as usize);
        let Action::Recv { slot, rows, total, .. } = receive.action(self.lists) else { return };
        let bytes = self.bytes(slot, *rows, *total);
        let posted = self.ranks[from].posted[send.step as usize]
            .max(self.ranks[to].posted[receive.step as usize]);
        let start = posted.max(self.ranks[from].sent).max(self.ranks[to].received);
        let time = self.timing.transfer_ns(bytes, RankId(send.rank), RankId(receive.rank));
        let end = start.saturating_add(time);
        self.ranks[from].sent = end;
        self.ranks[to].received = end;
        self.written(target, end);
        for resource in self.touched(send.rank, send.action(self.lists), Access::Take) {
            self.free(send.rank, resource, end);
        }
        self.event(send, start, end);
        self.event(receive, start, end);
    }

    fn reduced(&mut self, action: &Action, arrived: &[At]) {
        let mut start = 0;
        for at in arrived {
            start = start.max(self.now(at.rank));
            for resource in self.touched(at.rank, action, Access::Read) {
                start = start.max(self.ready[resource as usize]);
            }
        }
        let duration = match action {
            Action::ReduceGradients { group } => self.resources.group(*group).map(|index| {
                self.timing.reduce_gradients_ns(&self.pipeline.gradient_groups[index])
            }),
            Action::ReduceOutput { value } => self.resources.flow(*value).map(|index| {
                let ranks: Vec<RankId> = arrived.iter().map(|at| RankId(at.rank)).collect();
                self.timing.reduce_output_ns(self.pipeline.flows[index].bytes.at(0), &ranks)
            }),
            _ => None,
        };
        let duration = duration.expect("all actions were looked up before the simulation");
        let end = start.saturating_add(duration);
        for &at in arrived {
            self.ranks[at.rank as usize].now = end;
            self.event(at, start, end);
        }
    }
}
