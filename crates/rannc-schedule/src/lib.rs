//! What each rank does in one step, and what that would cost.
//!
//! A [`Pipeline`] says which stages sit on which ranks and which values flow between them; a [`Batch`]
//! says how many rows each rank brings. [`compile()`] turns both into a [`Program`]: for every rank the list
//! of [`Action`]s it runs in order, with no decision left to make. The schedule sees stages and flows only,
//! never the model.
//!
//! ```text
//! generate   which stage runs which microbatch when        (one generator per schedule)
//! route      which rows of which values go where           (from rows)
//! lower      both together: lists with sends and receives  (by depend)
//! check      refuses lists that hang or do something else  (by depend, rows)
//! simulate   when everything happens, and what it holds    (by depend)
//! ```

mod action;
mod chart;
mod check;
mod clock;
mod compile;
mod depend;
mod error;
mod estimate;
mod fold;
mod generate;
mod lower;
mod outline;
mod pipeline;
mod pool;
mod render;
mod route;
mod rows;
mod run;
mod script;
mod simulate;
mod text;

pub use action::{Action, Pass, Program, RowRange, Slot};
pub use chart::{chrome_trace, timeline_text};
pub use check::check;
pub use compile::compile;
pub use error::ScheduleError;
pub use estimate::{Estimate, estimate, roughly_ns};
pub use fold::{Folded, fold};
pub use pipeline::{
    Batch, Flow, GradientGroup, Mode, Pipeline, Place, RankId, Stage, StageId, Transport,
};
pub use pool::Shared;
pub use rannc_cost::{ScheduleKind, Sharding};
pub use render::{grid, listing};
pub use simulate::{Event, Memory, PeakMemory, RankTimeline, Timeline, Timing, simulate};
