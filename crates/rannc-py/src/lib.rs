//! The Python module `pyrannc._core`: frozen handles on the Rust objects, and conversions.
//!
//! Graphs, profiles, clusters and plans cross as the JSON of their files; nothing is decided here.

mod error;
mod graph;
mod plan;
mod schedule;

use pyo3::prelude::*;

/// The Rust half of RaNNC.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::graph::{Graph, ValueInfo, canonical_order};
    #[pymodule_export]
    use crate::plan::{PlacedStage, PlacedUnit, Placement, Plan, plan};
    #[pymodule_export]
    use crate::schedule::{Action, Program, Slot};
}
