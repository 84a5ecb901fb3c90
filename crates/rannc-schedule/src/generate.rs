//! The order of the work: which stage runs which microbatch when, on each rank. Data movement is not its
//! concern; [`lower`](crate::lower) adds it.
//!
//! A generator writes one list per *stage*. A rank that hosts several stages merges their lists by the
//! times at which an ideal machine, with a device for each stage, would start each step; as a step starts
//! later than all it waits for, such an order never blocks itself.

mod fill_drain;
mod one_f_one_b;

use crate::rows::Layout;
use crate::{Action, Mode, Pass, Pipeline, ScheduleKind, StageId};

/// The work of each rank in both passes of a step, nothing else.
#[derive(Debug, Default)]
pub(crate) struct Order {
    /// Per rank, what runs when the model is called.
    pub(crate) forward: Vec<Vec<Action>>,
    /// Per rank, what runs when the loss is differentiated.
    pub(crate) backward: Vec<Vec<Action>>,
    /// In which of the two the gradients of the outputs are known.
    pub(crate) seeded: Seeded,
}

/// When the gradients of the outputs are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Seeded {
    /// From the start of the step: they are ones.
    AtOnce,
    /// Once the caller has had the outputs.
    #[default]
    ByCaller,
}

/// One piece of work of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    pass: Pass,
    microbatch: u32,
}

impl Step {
    const fn forward(microbatch: u32) -> Self {
        Self { pass: Pass::Forward, microbatch }
    }

    const fn backward(microbatch: u32) -> Self {
        Self { pass: Pass::Backward, microbatch }
    }

    /// How long an ideal machine takes.
    const fn duration(self) -> u64 {
        match self.pass {
            Pass::Forward => 1,
            Pass::Backward => 2,
        }
    }
}

/// Orders the work of all ranks.
pub(crate) fn generate(
    kind: ScheduleKind,
    pipeline: &Pipeline,
    layout: &Layout,
    mode: Mode,
) -> Order {
    let microbatches: Vec<u32> = layout.filled().collect();
    let (forward, backward) = match (mode, kind) {
        (Mode::Reduction, _) => (Vec::new(), Vec::new()),
        (Mode::Inference, _) => (fill_drain::forward(pipeline, &microbatches), Vec::new()),
        (Mode::Training | Mode::Accumulation, ScheduleKind::FillDrain) => (
            fill_drain::forward(pipeline, &microbatches),
            fill_drain::backward(pipeline, &microbatches),
        ),
        (Mode::Training | Mode::Accumulation, ScheduleKind::OneForwardOneBackward) => {
            (one_f_one_b::steps(pipeline, &microbatches), Vec::new())
        }
    };
    Order {
        forward: deal(pipeline, layout, &forward),
        backward: deal(pipeline, layout, &backward),
        seeded: match kind {
            ScheduleKind::FillDrain => Seeded::ByCaller,
            ScheduleKind::OneForwardOneBackward => Seeded::AtOnce,
        },
    }
}

/// Deals the steps of the stages to the ranks that run them.
fn deal(pipeline: &Pipeline, layout: &Layout, stages: &[Vec<Step>]) -> Vec<Vec<Action>> {
    let times = start_times(stages, layout.microbatches());
    let mut ranks = vec![Vec::new(); pipeline.world_size as usize];
    for (index, (steps, times)) in stages.iter().zip(&times).enumerate() {
        let stage = StageId::new(index);
        for (&Step { pass, microbatch }, &time) in steps.iter().zip(times) {
            for (rank, rows) in layout.workers(pipeline, stage, microbatch, pass) {
                let action = match pass {
                    Pass::Forward => Action::Forward { stage, microbatch, rows },
                    Pass::Backward => Action::Backward { stage, microbatch, rows },
                };
                ranks[rank.index()].push((time, stage, action));
            }
        }
    }
    let merge = |mut steps: Vec<(u64, StageId, Action)>| {
        steps.sort_by_key(|&(time, stage, _)| (time, stage));
        steps.into_iter().map(|(_, _, action)| action).collect()
    };
    ranks.into_iter().map(merge).collect()
}

/// The ideal machine: when each step starts if every stage has a device and data moves at once.
///
/// Forwards of a microbatch go up the stages one by one, backwards go down. Steps that can never
/// start get no time, and the checker then misses them.
fn start_times(stages: &[Vec<Step>], microbatches: u32) -> Vec<Vec<u64>> {
    let mut machine = Machine::new(stages, microbatches);
    let upwards: Vec<usize> = (0..stages.len()).collect();
    let downwards: Vec<usize> = upwards.iter().rev().copied().collect();
    loop {
        let mut moved = false;
        for &stage in upwards.iter().chain(&downwards) {
            while machine.advance(stage) {
                moved = true;
            }
        }
        if !moved {
            return machine.times;
        }
    }
}

struct Machine<'a> {
    stages: &'a [Vec<Step>],
    times: Vec<Vec<u64>>,
    free: Vec<u64>,
    /// Per pass and microbatch, the stages that have it to do, the next one last.
    waiting: [Vec<Vec<usize>>; 2],
    /// Per pass and microbatch, when the stage before was done.
    ready: [Vec<u64>; 2],
}

impl<'a> Machine<'a> {
    fn new(stages: &'a [Vec<Step>], microbatches: u32) -> Self {
        let empty = vec![Vec::new(); microbatches as usize];
        let mut waiting = [empty.clone(), empty];
        for (stage, steps) in stages.iter().enumerate() {
            for step in steps {
                waiting[step.pass as usize][step.microbatch as usize].push(stage);
            }
        }
        waiting[Pass::Forward as usize].iter_mut().for_each(|stages| stages.reverse());
        let ready = vec![0; microbatches as usize];
        Self {
            stages,
            times: vec![Vec::new(); stages.len()],
            free: vec![0; stages.len()],
            waiting,
            ready: [ready.clone(), ready],
        }
    }

    /// Runs the next step of a stage if it can start.
    fn advance(&mut self, stage: usize) -> bool {
        let Some(&step) = self.stages[stage].get(self.times[stage].len()) else { return false };
        let (pass, microbatch) = (step.pass as usize, step.microbatch as usize);
        if self.waiting[pass][microbatch].last() != Some(&stage) {
            return false;
        }
        let start = self.free[stage].max(self.ready[pass][microbatch]);
        self.times[stage].push(start);
        self.free[stage] = start + step.duration();
        self.ready[pass][microbatch] = self.free[stage];
        self.waiting[pass][microbatch].pop();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::{Step, start_times};

    #[test]
    fn steps_wait_for_their_neighbours() {
        let forward = [Step::forward(0), Step::forward(1)];
        let stages = [
            [forward[0], forward[1], Step::backward(0), Step::backward(1)].to_vec(),
            [forward[0], Step::backward(0), forward[1], Step::backward(1)].to_vec(),
        ];
        assert_eq!(start_times(&stages, 2), [vec![0, 1, 4, 7], vec![1, 2, 4, 5]]);
    }
}
