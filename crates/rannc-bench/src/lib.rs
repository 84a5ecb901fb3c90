//! What RaNNC's planner is measured against and on: models as graphs and clusters ([`models`]), and
//! the planners that people use ([`baselines`]).
//!
//! The benches print Markdown tables; nothing of the product depends on this crate.

pub mod baselines;
mod builder;
pub mod models;

pub use builder::{Builder, Op};
