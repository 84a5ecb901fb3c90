//! The captured computation graph: pure data and the questions one can ask of it.
//!
//! A [`Graph`] is what capture produces and everything else reads: tensor operators in topological
//! order, the values between them, and for each value how it depends on the rows of the batch. It
//! knows nothing of torch, of devices or of time.

mod affine;
mod error;
mod file;
mod graph;
mod id;
mod order;
mod query;
#[cfg(feature = "testing")]
pub mod testing;

pub use affine::Affine;
pub use error::GraphError;
pub use graph::{Batch, Graph, Node, Rows, Value, ValueKind};
pub use id::{NodeId, ValueId};
pub use order::{Scope, Step, canonical_order};
pub use query::{Cut, Users};
