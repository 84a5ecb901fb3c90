//! What `RaNNC`'s planner is measured on and against: models as graphs ([`models`]), models on
//! clusters ([`cases`]), and the planners that people use ([`baselines`]).
//!
//! The benches print Markdown tables; nothing of the product depends on this crate.

pub mod baselines;
mod builder;
pub mod cases;
pub mod models;
pub mod resources;
pub mod table;

pub use builder::{Builder, Op};
