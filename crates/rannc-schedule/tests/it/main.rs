//! Programs as a whole: what they look like, what they do, and what the checker lets through.

#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod accumulation;
mod folding;
mod interpreter;
mod mutations;
mod pipelines;
mod properties;
mod scale;
mod sharing;
mod simulation;
mod snapshots;
