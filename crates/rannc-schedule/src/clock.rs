//! The times and the memory of a simulated program.

use crate::depend::{Access, Resource, Resources};
use crate::pool::Pools;
use crate::run::{At, Observer};
use crate::script::{Move, Op, Script, Work};
use crate::simulate::{Event, Memory, PeakMemory, RankTimeline, Timeline, Timing};
use crate::{Action, Pass, Pipeline, Place, RankId, ScheduleError, Slot, StageId};

const NOTHING: (u64, Use) = (0, Use::Buffers);

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
    pools: Pools,
    /// Per resource, when it is complete.
    ready: Vec<u64>,
    /// Per resource, the memory it takes.
    held: Vec<(u64, Use)>,
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
    changes: Vec<(u64, i64, Use)>,
    /// When its next work starts and ends, if it shares its cores and that is known.
    finished: Option<(u64, u64)>,
    /// Stages whose parameters have gradients.
    accumulated: Vec<StageId>,
    /// Events with their pass and position.
    events: Vec<(usize, u32, Event)>,
}

impl Rank {
    fn change(&mut self, time: u64, bytes: u64, sign: i64, purpose: Use) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        if bytes > 0 {
            self.changes.push((time, sign * bytes, purpose));
        }
    }

    /// Takes memory for a while.
    fn borrow(&mut self, from: u64, until: u64, bytes: u64, purpose: Use) {
        self.change(from, bytes, 1, purpose);
        self.change(until, bytes, -1, purpose);
    }

    /// The most of activations and what is in transit, and all at the time of the most of everything.
    fn peak(&mut self) -> (u64, PeakMemory) {
        self.changes.sort_unstable();
        let mut levels = [0_i64; 4];
        let (mut most_activations, mut peak) = (0_i64, levels);
        let total = |levels: &[i64; 4]| levels.iter().fold(0, |sum: i64, &n| sum.saturating_add(n));
        for &(_, change, purpose) in &self.changes {
            let level = &mut levels[purpose as usize];
            *level = level.saturating_add(change);
            let activations = levels[Use::Activations as usize];
            let activations = activations.saturating_add(levels[Use::Buffers as usize]);
            most_activations = most_activations.max(activations);
            if total(&levels) > total(&peak) {
                peak = levels;
            }
        }
        let at = |purpose: Use| u64::try_from(peak[purpose as usize]).unwrap_or(0);
        let peak = PeakMemory {
            activations: at(Use::Activations),
            gradients: at(Use::Gradients),
            working: at(Use::Working),
            buffers: at(Use::Buffers),
        };
        (u64::try_from(most_activations).unwrap_or(0), peak)
    }
}

/// What memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Use {
    Activations,
    Gradients,
    Working,
    Buffers,
}

impl<'a> Clock<'a> {
    /// Everything at time 0, before the first pass.
    pub(crate) fn new(
        pipeline: &'a Pipeline,
        resources: &'a Resources<'a>,
        timing: &'a dyn Timing,
        memory: &'a dyn Memory,
        script: &'a Script,
    ) -> Result<Self, ScheduleError> {
        let pools = Pools::new(&timing.shared(), pipeline.world_size)?;
        Ok(Self {
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
            pools,
            ready: vec![0; resources.count()],
            held: vec![NOTHING; resources.count()],
            end: 0,
        })
    }

    /// Whether a rank shares its cores.
    pub(crate) fn shares(&self, rank: u32) -> bool {
        self.pools.has(rank)
    }

    /// Starts work on a rank that shares its cores; false if it has come to its end.
    pub(crate) fn start_shared(&mut self, rank: u32, work: u32) -> bool {
        if self.ranks[rank as usize].finished.is_some() {
            return false;
        }
        let work = &self.script.works[work as usize];
        let (start, duration) = (self.earliest(rank, work), self.duration(rank, work));
        self.pools.start(rank, start, duration);
        true
    }

    /// The rank whose shared work ends next, by `time`, and when.
    pub(crate) fn next_finished(&mut self, time: u64) -> Option<(u64, u32)> {
        let done = self.pools.next_by(time)?;
        self.ranks[done.rank as usize].finished = Some((done.start, done.end));
        Some((done.end, done.rank))
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
        let ranks = self.ranks.iter_mut().map(|rank| {
            let (peak_activation_bytes, peak) = rank.peak();
            let (busy_ns, bubble_ns) = (rank.busy, makespan_ns - rank.busy);
            RankTimeline { busy_ns, bubble_ns, peak_activation_bytes, peak }
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

    fn hold(&mut self, rank: u32, resource: Resource, time: u64, bytes: u64, purpose: Use) {
        let (held, _) = self.held[resource as usize];
        self.held[resource as usize] = (held.saturating_add(bytes), purpose);
        self.ranks[rank as usize].change(time, bytes, 1, purpose);
    }

    fn free(&mut self, rank: u32, resource: Resource, time: u64) {
        let (bytes, purpose) = std::mem::replace(&mut self.held[resource as usize], NOTHING);
        self.ranks[rank as usize].change(time, bytes, -1, purpose);
    }

    fn written(&mut self, resource: Resource, time: u64) {
        let ready = &mut self.ready[resource as usize];
        *ready = time.max(*ready);
    }

    /// When a rank and all that its work takes are ready.
    fn earliest(&self, rank: u32, work: &Work) -> u64 {
        let mut start = self.now(rank);
        self.resources.touch_work(work, |resource, access| {
            if access == Access::Take {
                start = start.max(self.ready[resource as usize]);
            }
        });
        start
    }

    fn duration(&self, rank: u32, work: &Work) -> u64 {
        match work.pass {
            Pass::Forward => self.timing.forward_ns(work.stage, RankId(rank), work.rows),
            Pass::Backward => self.timing.backward_ns(work.stage, RankId(rank), work.rows),
        }
    }

    /// A stage runs from `start`, or when it ran where cores are shared.
    fn work(&mut self, at: At, work: &Work, start: u64) {
        let resources = self.resources;
        let forward = work.pass == Pass::Forward;
        let finished = self.ranks[at.rank as usize].finished.take();
        let (start, end) =
            finished.unwrap_or_else(|| (start, start.saturating_add(self.duration(at.rank, work))));
        let keeps = forward && self.training && self.pipeline.stages[work.stage.index()].backward;
        if keeps {
            let bytes = self.memory.saved_bytes(work.stage, work.rows);
            self.hold(at.rank, resources.kept_by(work), start, bytes, Use::Activations);
        }
        if keeps || !forward {
            self.take_working_memory(at.rank, work, (start, end));
        }
        resources.touch_work(work, |resource, access| match access {
            // What is kept from the inputs is already in the saved bytes.
            Access::Take => self.free(at.rank, resource, if keeps { start } else { end }),
            Access::Write => self.written(resource, end),
            Access::Read => {}
        });
        for (flow, resource) in resources.results(work) {
            let bytes = self.pipeline.flows[flow].bytes.at(work.rows);
            self.hold(at.rank, resource, end, bytes, Use::Buffers);
        }
        let rank = &mut self.ranks[at.rank as usize];
        rank.now = end;
        rank.busy += end - start;
        self.event(at, start, end);
    }

    /// What work needs besides what it keeps, while it runs, and the gradients that it makes.
    fn take_working_memory(&mut self, rank: u32, work: &Work, (start, end): (u64, u64)) {
        let rank = &mut self.ranks[rank as usize];
        let forward = work.pass == Pass::Forward;
        let first = !forward && !rank.accumulated.contains(&work.stage);
        let most = if forward {
            self.memory.forward_bytes(work.stage, work.rows)
        } else {
            self.memory.backward_bytes(work.stage, work.rows, first)
        };
        let working = most.saturating_sub(self.memory.saved_bytes(work.stage, work.rows));
        rank.borrow(start, end, working, Use::Working);
        if first {
            rank.accumulated.push(work.stage);
            rank.change(end, self.memory.gradient_bytes(work.stage), 1, Use::Gradients);
        }
    }

    /// A piece arrives in a slot: its memory counts unless the slot is the caller's.
    fn arrive(&mut self, piece: &Move, time: u64) {
        if piece.to_stage {
            self.hold(piece.to, piece.target, time, piece.bytes, Use::Buffers);
        }
    }
}

impl Observer for Clock<'_> {
    fn ran(&mut self, at: At, op: Op) {
        let (script, now) = (self.script, self.now(at.rank));
        match op {
            Op::Work(index) => {
                let work = &script.works[index as usize];
                self.work(at, work, self.earliest(at.rank, work));
            }
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

    /// All start when the last can, and go on when the last has ended.
    fn worked(&mut self, arrived: &[(At, u32)]) {
        let works = &self.script.works;
        let starts =
            arrived.iter().map(|&(at, number)| self.earliest(at.rank, &works[number as usize]));
        let start = starts.max().unwrap_or(0);
        for &(at, number) in arrived {
            self.work(at, &works[number as usize], start);
        }
        let end = arrived.iter().map(|(at, _)| self.now(at.rank)).max().unwrap_or(0);
        for (at, _) in arrived {
            self.ranks[at.rank as usize].now = end;
        }
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
        let buffers = match op {
            Op::ReduceGradients(group) => {
                self.memory.reduction_bytes(&self.pipeline.gradient_groups[group as usize])
            }
            _ => 0,
        };
        for &at in arrived {
            self.ranks[at.rank as usize].now = end;
            self.ranks[at.rank as usize].borrow(start, end, buffers, Use::Buffers);
            self.event(at, start, end);
        }
    }
}
