//! What each rank does in one step, and what that would cost.
//!
//! A [`Pipeline`] says which stages sit on which ranks and which values flow between them; a [`Batch`]
//! says how many rows each rank brings. [`compile`] turns both into a [`Program`]: for every rank the list
//! of [`Action`]s it runs in order, with no decision left to make. The schedule sees stages and flows only,
//! never the model.

#![allow(dead_code)]

mod action;
mod error;
mod pipeline;
mod text;

pub use action::{Action, Pass, Program, RowRange, Slot};
pub use error::ScheduleError;
pub use pipeline::{
    Batch, Flow, GradientGroup, Mode, Pipeline, Place, RankId, Stage, StageId, Transport,
};
pub use rannc_cost::ScheduleKind;

/// Writes the program of one step: generates the order of the work, routes the data, and checks the result.
pub fn compile(
    _pipeline: &Pipeline,
    _batch: &Batch,
    _schedule: ScheduleKind,
    _mode: Mode,
) -> Result<Program, ScheduleError> {
    Err(ScheduleError::BadPipeline { place: "compile".into(), problem: "to be written".into() })
}
