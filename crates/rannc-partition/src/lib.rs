//! Divides a captured graph into pipeline stages, each with its own number of replicas.
//!
//! Three phases, as in the `RaNNC` paper (IPDPS 2021, section III): operators to [`Atoms`], atoms to
//! [`Blocks`] of similar time with cheap cuts between them, and blocks to stages by dynamic
//! programming over memory, time and traffic. [`search`] runs all three for every number of stages and
//! microbatches and returns the best few for a simulator to choose from. [`stages_are_valid`]
//! checks divisions made by hand, [`assign`] carries one over to another capture of the model.

mod advice;
mod atomic;
mod block;
mod bound;
#[cfg(test)]
mod brute;
mod error;
mod facts;
mod layout;
mod options;
mod order;
mod orders;
mod partitioner;
mod price;
mod recompute;
mod recut;
mod runs;
mod search;
pub mod simple;
mod stage;
mod storage;
mod threshold;
mod uniform;
mod union;
mod units;
mod valid;

pub use atomic::Atoms;
pub use block::Blocks;
pub use bound::LowerBound;
pub use error::{PartitionError, Remedy};
pub use options::{Candidate, Options, Progress, StageCandidate, microbatch_candidates};
pub use partitioner::{Partitioner, search};
pub use recompute::{Arrangement, Arranger, BadGroup};
pub use units::{Unit, most_gathered, units};
pub use valid::{assign, stages_are_valid};
