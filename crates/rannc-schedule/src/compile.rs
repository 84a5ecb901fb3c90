//! From a pipeline and a batch to a checked program.

use crate::check::check_valid;
use crate::depend::Resources;
use crate::generate::generate;
use crate::lower::{lower, program};
use crate::pipeline::Beside;
use crate::route::transfers;
use crate::rows::Layout;
use crate::{Batch, Mode, Pipeline, Place, Program, ScheduleError, ScheduleKind, Transport};

/// Writes the program of one step: orders the work, routes the data, and checks the result.
pub fn compile(
    pipeline: &Pipeline,
    batch: &Batch,
    schedule: ScheduleKind,
    mode: Mode,
) -> Result<Program, ScheduleError> {
    validate(pipeline, batch, schedule, mode)?;
    let layout = Layout::new(pipeline, batch);
    let resources = Resources::new(pipeline, layout.microbatches())?;
    let transfers = transfers(pipeline, &layout, mode);
    let order = generate(schedule, pipeline, &layout, mode);
    let script = lower(pipeline, &resources, &transfers, &order, (mode, Beside::None))?;
    let program = program(pipeline, &transfers, &script);
    check_valid(&program, pipeline, &layout, &resources, mode)?;
    Ok(program)
}

/// Whether there can be a program.
pub(crate) fn validate(
    pipeline: &Pipeline,
    batch: &Batch,
    schedule: ScheduleKind,
    mode: Mode,
) -> Result<(), ScheduleError> {
    pipeline.validate()?;
    batch.validate(pipeline)?;
    if mode.differentiates() && schedule == ScheduleKind::OneForwardOneBackward {
        refuse_outside_gradients(pipeline, schedule)?;
    }
    Ok(())
}

/// Backward may start before the caller has the outputs only if their gradients are known: one for each sum.
fn refuse_outside_gradients(
    pipeline: &Pipeline,
    schedule: ScheduleKind,
) -> Result<(), ScheduleError> {
    let outside = pipeline.flows.iter().find(|flow| {
        flow.gradient && flow.transport != Transport::Sum && flow.to.contains(&Place::Sink)
    });
    match outside {
        Some(flow) => Err(ScheduleError::GradientFromOutside { schedule, value: flow.value }),
        None => Ok(()),
    }
}
