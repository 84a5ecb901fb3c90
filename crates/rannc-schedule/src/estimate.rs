//! How long a step takes and what it holds, without a program or a timeline to look at.
//!
//! The same simulation as [`simulate`](crate::simulate()) of what [`compile`](crate::compile()) writes, for
//! those who compare many pipelines: nothing is checked, no events are kept, and what several copies of the
//! pipeline do alike is simulated once ([`fold`](crate::fold())).

use crate::compile::validate;
use crate::depend::Resources;
use crate::fold::fold;
use crate::generate::generate;
use crate::lower::{lower, program};
use crate::outline::Outline;
use crate::pipeline::Beside;
use crate::render;
use crate::route::transfers;
use crate::rows::Layout;
use crate::simulate::Stage;
use crate::{Batch, Memory, Mode, Pipeline, RankTimeline, ScheduleError, ScheduleKind, Timing};

/// What a simulation says in short.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// From the start of the first to the end of the last event.
    pub makespan_ns: u64,
    /// By rank.
    pub ranks: Vec<RankTimeline>,
}

/// Simulates a step.
///
/// Equal to the simulation of the compiled program, unless many copies of the pipeline are folded whose
/// inputs or outputs come from and go to ranks of other copies ([`Folded::exact`](crate::Folded::exact)).
pub fn estimate(
    pipeline: &Pipeline,
    batch: &Batch,
    schedule: ScheduleKind,
    mode: Mode,
    timing: &dyn Timing,
    memory: &dyn Memory,
) -> Result<Estimate, ScheduleError> {
    // Copies that share cores are no copies of what one does alone.
    let alone = timing.shared().is_empty();
    let folded = alone.then(|| fold(pipeline, batch, mode, timing)).flatten();
    let Some(folded) = folded else {
        let step = Step { pipeline, batch, schedule, mode, beside: Beside::None };
        return step.play(timing, memory);
    };
    let timing = folded.timing(pipeline, timing);
    let (pipeline, batch) = (&folded.pipeline, &folded.batch);
    let step = Step { pipeline, batch, schedule, mode, beside: Beside::Others };
    let short = step.play(&timing, memory)?;
    let ranks = folded.like.iter().map(|rank| short.ranks[rank.index()]);
    Ok(Estimate { makespan_ns: short.makespan_ns, ranks: ranks.collect() })
}

/// Roughly how long a step takes: its simulation with one rank in place of the replicas of each stage.
/// None where that would not be a rank's work, see the module `outline`.
///
/// # Complexity
///
/// That of simulating stages x microbatches, however many replicas there are.
pub fn roughly_ns(
    pipeline: &Pipeline,
    batch: &Batch,
    schedule: ScheduleKind,
    mode: Mode,
    timing: &dyn Timing,
) -> Result<Option<u64>, ScheduleError> {
    validate(pipeline, batch, schedule, mode)?;
    let Some(outline) = Outline::new(pipeline, batch, timing) else { return Ok(None) };
    let Outline { pipeline, batch, .. } = &outline;
    let step = Step { pipeline, batch, schedule, mode, beside: Beside::Others };
    Ok(Some(step.play(&outline, &outline)?.makespan_ns))
}

/// What is simulated.
struct Step<'a> {
    pipeline: &'a Pipeline,
    batch: &'a Batch,
    schedule: ScheduleKind,
    mode: Mode,
    beside: Beside,
}

impl Step<'_> {
    fn play(&self, timing: &dyn Timing, memory: &dyn Memory) -> Result<Estimate, ScheduleError> {
        let &Self { pipeline, batch, schedule, mode, beside } = self;
        validate(pipeline, batch, schedule, mode)?;
        let layout = Layout::new(pipeline, batch);
        let resources = Resources::new(pipeline, layout.microbatches())?;
        let transfers = transfers(pipeline, &layout, mode);
        let order = generate(schedule, pipeline, &layout, mode);
        let script = lower(pipeline, &resources, &transfers, &order, (mode, beside))?;
        let stage = Stage { pipeline, resources: &resources, timing, memory };
        let timeline = stage.play(&script, None)?.map_err(|(pass, at)| {
            let program = program(pipeline, &transfers, &script);
            render::rejected(&program, pass, &at.fault("it waits for ever"))
        })?;
        Ok(Estimate { makespan_ns: timeline.makespan_ns, ranks: timeline.ranks })
    }
}
