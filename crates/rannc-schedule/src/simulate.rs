//! When everything in a program happens, given how long each thing takes, and how much memory that needs.
//!
//! An event simulation over the same dependency relation that the checker uses. A rank runs its list in order.
//! Work and reductions keep it busy; transfers run beside its work, but one at a time out of a rank and one at
//! a time into it. The second pass starts on a rank when its first one is done and its outputs are there; what
//! the caller does in between takes no time.
//!
//! Links are not shared any further: the time of a transfer between nodes is that of one device's share of its
//! node's network cards (`rannc_cost::Cluster`), which it has also when all devices of the node send at once.
//!
//! Memory is what one rank holds beyond its parameters, gradients and optimizer state: what stages keep for
//! backward, from the start of the forward to the end of the backward, and stage inputs and outputs from the
//! time at which they are made, or a receive is posted, until their last use is over. What is computed again in
//! backward is not kept; [`Memory::saved_bytes`] leaves it out.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::check::refuse_other_ranks;
use crate::clock::Clock;
use crate::depend::{Ledger, Resources};
use crate::render;
use crate::run::{At, Matching, Progress, Run};
use crate::script::Script;
use crate::{Action, GradientGroup, Pipeline, Program, RankId, ScheduleError, Shared, StageId};

/// How long things take, in nanoseconds.
pub trait Timing {
    /// Running a stage on this many rows on one of its ranks.
    fn forward_ns(&self, stage: StageId, rank: RankId, rows: u64) -> u64;
    /// Differentiating a stage on this many rows on one of its ranks.
    fn backward_ns(&self, stage: StageId, rank: RankId, rows: u64) -> u64;
    /// Moving bytes between two ranks.
    fn transfer_ns(&self, bytes: u64, from: RankId, to: RankId) -> u64;
    /// Adding up the gradients of a group between its ranks.
    fn reduce_gradients_ns(&self, group: &GradientGroup) -> u64;
    /// Adding up an output of this size between ranks.
    fn reduce_output_ns(&self, bytes: u64, ranks: &[RankId]) -> u64;

    /// Ranks that compute with the same cores, in groups that have no rank in common: forwards and backwards
    /// take longer while several are at them.
    fn shared(&self) -> Vec<Shared> {
        Vec::new()
    }
}

/// How much memory work takes.
pub trait Memory {
    /// What a stage keeps from forward to backward for this many rows, its inputs included.
    fn saved_bytes(&self, stage: StageId, rows: u64) -> u64;

    /// The most at any time of a forward, what it keeps included.
    fn forward_bytes(&self, stage: StageId, rows: u64) -> u64 {
        self.saved_bytes(stage, rows)
    }

    /// The most at any time of a backward, what was kept included. In a step's `first` of a replica the
    /// gradients of its parameters come to be; later they are there already and do not count.
    fn backward_bytes(&self, stage: StageId, rows: u64, first: bool) -> u64 {
        let _ = first;
        self.saved_bytes(stage, rows)
    }

    /// The gradients of a stage's parameters.
    fn gradient_bytes(&self, stage: StageId) -> u64 {
        let _ = stage;
        0
    }

    /// Buffers to add up the gradients of a group.
    fn reduction_bytes(&self, group: &GradientGroup) -> u64 {
        let _ = group;
        0
    }
}

/// What happened when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeline {
    /// From the start of the first to the end of the last event.
    pub makespan_ns: u64,
    /// By rank.
    pub ranks: Vec<RankTimeline>,
    /// Work, transfers and reductions by rank and then in the order of the lists.
    pub events: Vec<Event>,
}

/// How one rank spent the step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankTimeline {
    /// Running stages.
    pub busy_ns: u64,
    /// Not running stages.
    pub bubble_ns: u64,
    /// The most that saved activations and stage inputs and outputs in transit took at any time.
    pub peak_activation_bytes: u64,
    /// Everything that is there when the most is, but for what outlives the step.
    pub peak: PeakMemory,
}

/// What the memory of a rank goes to at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeakMemory {
    /// Kept from forward to backward.
    pub activations: u64,
    /// Gradients of parameters.
    pub gradients: u64,
    /// What the operator that runs needs besides.
    pub working: u64,
    /// Inputs and outputs of stages and their gradients, in transit; and those of reductions.
    pub buffers: u64,
}

impl PeakMemory {
    /// All of it.
    pub fn total(&self) -> u64 {
        let parts = [self.activations, self.gradients, self.working, self.buffers];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// An action with its time. A send and its receive both have the time of the transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The rank.
    pub rank: RankId,
    /// The action.
    pub action: Action,
    /// When it started.
    pub start_ns: u64,
    /// When it was done.
    pub end_ns: u64,
}

/// Plays a program that [`check`](crate::check()) accepts.
///
/// # Complexity
///
/// `n log n` in the number of actions.
pub fn simulate(
    program: &Program,
    pipeline: &Pipeline,
    timing: &dyn Timing,
    memory: &dyn Memory,
) -> Result<Timeline, ScheduleError> {
    pipeline.validate()?;
    refuse_other_ranks(program, pipeline)?;
    let resources = Resources::new(pipeline, num_microbatches(program))?;
    let mut script = Script::default();
    for (pass, (_, lists)) in program.passes().iter().enumerate() {
        Matching::new(lists)
            .and_then(|matching| script.add(pass, lists, &matching, &resources))
            .map_err(|fault| render::rejected(program, pass, &fault))?;
    }
    let stage = Stage { pipeline, resources: &resources, timing, memory };
    stage
        .play(&script, Some(program))?
        .map_err(|(pass, at)| render::rejected(program, pass, &at.fault("it waits for ever")))
}

/// Where scripts are played.
pub(crate) struct Stage<'a> {
    /// The pipeline.
    pub(crate) pipeline: &'a Pipeline,
    /// Its resources.
    pub(crate) resources: &'a Resources<'a>,
    /// How long things take.
    pub(crate) timing: &'a dyn Timing,
    /// How much memory work keeps.
    pub(crate) memory: &'a dyn Memory,
}

impl Stage<'_> {
    /// Plays both passes; keeps events if it gets the program. Tells where a rank waits for ever.
    pub(crate) fn play(
        &self,
        script: &Script,
        program: Option<&Program>,
    ) -> Result<Result<Timeline, (usize, At)>, ScheduleError> {
        let &Self { pipeline, resources, timing, memory } = self;
        let mut ledger = Ledger::new(resources);
        script.expect(resources, |resource, access| ledger.expect(resource, access));
        let mut clock = Clock::new(pipeline, resources, timing, memory, script)?;
        for pass in 0..script.passes.len() {
            clock.begin(pass, program.map(|program| program.passes()[pass].1));
            let mut run = Run::new(resources, pipeline, script, pass);
            play(&mut run, &mut ledger, &mut clock, pipeline.world_size);
            if let Some(at) = run.stuck() {
                return Ok(Err((pass, at)));
            }
        }
        Ok(Ok(clock.finish()))
    }
}

fn num_microbatches(program: &Program) -> u32 {
    let microbatch = |action: &Action| match action {
        Action::Forward { microbatch, .. } | Action::Backward { microbatch, .. } => *microbatch,
        _ => 0,
    };
    let actions = program.passes().into_iter().flat_map(|(_, lists)| lists.iter().flatten());
    actions.map(microbatch).max().unwrap_or(0).saturating_add(1)
}

/// Lets the rank with the earliest time go first, until no rank can go on.
fn play(run: &mut Run<'_>, ledger: &mut Ledger, clock: &mut Clock<'_>, world_size: u32) {
    let mut queue: BinaryHeap<_> =
        (0..world_size).map(|rank| Reverse((clock.now(rank), rank))).collect();
    // Or at work that shares its cores.
    let mut queued = vec![true; world_size as usize];
    let mut woken = Vec::new();
    loop {
        let next = queue.peek().map(|&Reverse((time, _))| time);
        if let Some((time, rank)) = clock.next_finished(next.unwrap_or(u64::MAX)) {
            queue.push(Reverse((time, rank)));
            continue;
        }
        let Some(Reverse((time, rank))) = queue.pop() else { break };
        queued[rank as usize] = false;
        if time < clock.now(rank) {
            // It has got into a reduction since.
            woken.push(rank);
        }
        while woken.is_empty() {
            let shares = clock.shares(rank);
            let work = shares.then(|| run.next_work(rank, ledger)).flatten();
            if work.is_some_and(|work| clock.start_shared(rank, work)) {
                queued[rank as usize] = true;
                break;
            }
            if run.advance(rank, ledger, clock, &mut woken) != Progress::Ran {
                break;
            }
            let next = (clock.now(rank), rank);
            if !woken.is_empty() || queue.peek().is_some_and(|&Reverse(first)| first < next) {
                woken.push(rank);
            }
        }
        for rank in woken.drain(..) {
            if !std::mem::replace(&mut queued[rank as usize], true) {
                queue.push(Reverse((clock.now(rank), rank)));
            }
        }
    }
}
