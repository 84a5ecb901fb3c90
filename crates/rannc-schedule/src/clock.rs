//! The times and the memory of a simulated program.

use crate::depend::{Access, Resource, Resources};
use crate::run::{At, Observer};
use crate::script::{Move, Op, Script, Work};
use crate::simulate::{Event, Memory, RankTimeline, Timeline, Timing};
use crate::{Action, Pass, Pipeline, Place, RankId, Slot};

/// Knows the time of each rank and of everything that has happened.
pub(crate) struct Clock<'a> {
    pipeline: &'a Pipeline,
    resources: &'a Resources<'a>,
    timing: &'a dyn Timing,
    memory: &'a dyn Memory,
    /// Whether activations are kept.
    training: bool,
    pass: usize,
    script: &'a Script,
    /// The actions of this pass, if events are wanted.
    lists: Option<&'a [Vec<Action>]>,
    /// Per move, when and at which step its sender and its receiver got ready.
    posted: Vec<[(u64, u32); 2]>,
    ranks: Vec<Rank>,
    /// Per resource, when it is complete.
    ready: Vec<u64>,
    /// Per resource, the memory it takes.
    held: Vec<u64>,
    /// The end of the last event.
    end: u64,
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
    /// Changes of its memory.
    changes: Vec<(u64, i64)>,
    /// Events with their pass and position.
    events: Vec<(usize, u32, Event)>,
}

impl Rank {
    fn change(&mut self, time: u64, bytes: u64, sign: i64) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        if bytes > 0 {
            self.changes.push((time, sign * bytes));
        }
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
    /// Everything at time 0, before the first pass.
    pub(crate) fn new(
        pipeline: &'a Pipeline,
        resources: &'a Resources<'a>,
        timing: &'a dyn Timing,
        memory: &'a dyn Memory,
        script: &'a Script,
    ) -> Self {
        Self {
            pipeline,
            resources,
            timing,
            memory,
            training: script.works.iter().any(|work| work.pass == Pass::Backward),
            pass: 0,
            script,
            lists: None,
            posted: vec![Default::default(); script.moves.len()],
            ranks: vec![Rank::default(); pipeline.world_size as usize],
            ready: vec![0; resources.count()],
            held: vec![0; resources.count()],
            end: 0,
        }
    }

    /// When a rank can go on.
    pub(crate) fn now(&self, rank: u32) -> u64 {
        self.ranks[rank as usize].now
    }

    /// Starts a pass, the second one on each rank when it has its outputs; keeps events if it gets `lists`.
    pub(crate) fn begin(&mut self, pass: usize, lists: Option<&'a [Vec<Action>]>) {
        (self.pass, self.lists) = (pass, lists);
        if pass == 0 {
            return;
        }
        let outputs = self.pipeline.flows.iter().filter(|flow| flow.to.contains(&Place::Sink));
        for flow in outputs {
            let slot = Slot::new(Place::Sink, 0, flow.value, Pass::Forward);
            for (index, rank) in self.ranks.iter_mut().enumerate() {
                if let Some(resource) = self.resources.slot(RankId::new(index), &slot) {
                    rank.now = rank.now.max(self.ready[resource as usize]);
                }
            }
        }
    }

    /// Everything that happened.
    pub(crate) fn finish(mut self) -> Timeline {
        let ends = self.ranks.iter().map(|rank| rank.now);
        let makespan_ns = ends.fold(self.end, u64::max);
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
        self.end = self.end.max(end_ns);
        if let Some(lists) = self.lists {
            let event =
                Event { rank: RankId(at.rank), action: *at.action(lists), start_ns, end_ns };
            self.ranks[at.rank as usize].events.push((self.pass, at.step, event));
        }
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
    fn work(&mut self, at: At, work: &Work) {
        let resources = self.resources;
        let mut start = self.now(at.rank);
        resources.touch_work(work, |resource, access| {
            if access == Access::Take {
                start = start.max(self.ready[resource as usize]);
            }
        });
        let (forward, rank) = (work.pass == Pass::Forward, RankId(at.rank));
        let duration = if forward {
            self.timing.forward_ns(work.stage, rank, work.rows)
        } else {
            self.timing.backward_ns(work.stage, rank, work.rows)
        };
        let end = start.saturating_add(duration);
        let keeps = forward && self.training && self.pipeline.stages[work.stage.index()].backward;
        if keeps {
            let bytes = self.memory.saved_bytes(work.stage, work.rows);
            self.hold(at.rank, resources.kept_by(work), start, bytes);
        }
        resources.touch_work(work, |resource, access| match access {
            // What is kept from the inputs is already in the saved bytes.
            Access::Take => self.free(at.rank, resource, if keeps { start } else { end }),
            Access::Write => self.written(resource, end),
            Access::Read => {}
        });
        for (flow, resource) in resources.results(work) {
            let bytes = self.pipeline.flows[flow].bytes.at(work.rows);
            self.hold(at.rank, resource, end, bytes);
        }
        let rank = &mut self.ranks[at.rank as usize];
        rank.now = end;
        rank.busy += duration;
        self.event(at, start, end);
    }

    /// A piece arrives in a slot: its memory counts unless the slot is the caller's.
    fn arrive(&mut self, piece: &Move, time: u64) {
        if piece.to_stage {
            self.hold(piece.to, piece.target, time, piece.bytes);
        }
    }
}

impl Observer for Clock<'_> {
    fn ran(&mut self, at: At, op: Op) {
        let (script, now) = (self.script, self.now(at.rank));
        match op {
            Op::Work(index) => self.work(at, &script.works[index as usize]),
            Op::Send(index) => self.posted[index as usize][0] = (now, at.step),
            Op::Recv(index) => {
                self.posted[index as usize][1] = (now, at.step);
                self.arrive(&script.moves[index as usize], now);
            }
            Op::Copy(index) => {
                let piece = &script.moves[index as usize];
                if piece.release {
                    self.free(at.rank, piece.source, now);
                }
                self.written(piece.target, now);
                self.arrive(piece, now);
            }
            Op::ReduceGradients(_) | Op::ReduceOutput(_) => {}
        }
    }

    fn delivered(&mut self, number: u32, piece: &Move) {
        let (from, to) = (piece.from as usize, piece.to as usize);
        let [(offered, sender), (awaited, receiver)] = self.posted[number as usize];
        let start = offered.max(awaited).max(self.ranks[from].sent).max(self.ranks[to].received);
        let time = self.timing.transfer_ns(piece.bytes, RankId(piece.from), RankId(piece.to));
        let end = start.saturating_add(time);
        self.ranks[from].sent = end;
        self.ranks[to].received = end;
        self.written(piece.target, end);
        if piece.release {
            self.free(piece.from, piece.source, end);
        }
        self.event(At { rank: piece.from, step: sender }, start, end);
        self.event(At { rank: piece.to, step: receiver }, start, end);
    }

    fn reduced(&mut self, op: Op, arrived: &[At]) {
        let mut start = 0;
        for at in arrived {
            start = start.max(self.now(at.rank));
            self.script.touch(at.rank, op, self.resources, |resource, _| {
                start = start.max(self.ready[resource as usize]);
            });
        }
        let duration = match op {
            Op::ReduceGradients(group) => {
                self.timing.reduce_gradients_ns(&self.pipeline.gradient_groups[group as usize])
            }
            Op::ReduceOutput(flow) => {
                let ranks: Vec<RankId> = arrived.iter().map(|at| RankId(at.rank)).collect();
                let bytes = self.pipeline.flows[flow as usize].bytes.at(0);
                self.timing.reduce_output_ns(bytes, &ranks)
            }
            _ => unreachable!("only reductions wait for other ranks"),
        };
        let end = start.saturating_add(duration);
        for &at in arrived {
            self.ranks[at.rank as usize].now = end;
            self.event(at, start, end);
        }
    }
}
