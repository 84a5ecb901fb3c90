//! `Graph` and `ValueInfo`, and the order of a graph's operators.

use pyo3::prelude::*;
use rannc_graph::{Rows, Scope, Step};

use crate::error::raise_graph;

/// A captured graph.
#[pyclass(frozen, module = "pyrannc._core")]
pub(crate) struct Graph {
    pub(crate) graph: rannc_graph::Graph,
}

/// What is known of one tensor of a graph.
#[pyclass(frozen, module = "pyrannc._core")]
pub(crate) struct ValueInfo {
    value: rannc_graph::Value,
}

#[pymethods]
impl Graph {
    /// Reads and checks the JSON form.
    #[staticmethod]
    fn from_json(text: &str) -> PyResult<Self> {
        Ok(Self { graph: rannc_graph::Graph::from_json(text).map_err(raise_graph)? })
    }

    /// The JSON form.
    fn to_json(&self) -> String {
        self.graph.to_json()
    }

    /// A hash that is equal on all ranks that captured the same graph.
    fn fingerprint(&self) -> String {
        self.graph.fingerprint()
    }

    /// The model's class name.
    #[getter]
    fn name(&self) -> &str {
        self.graph.name()
    }

    /// All values, by id.
    #[getter]
    fn values(&self) -> Vec<ValueInfo> {
        self.graph.values().iter().map(|value| ValueInfo { value: value.clone() }).collect()
    }

    /// Ids of the model's tensor arguments.
    #[getter]
    fn inputs(&self) -> Vec<u32> {
        self.graph.inputs().iter().map(|id| id.0).collect()
    }

    /// Ids of the model's tensor results.
    #[getter]
    fn outputs(&self) -> Vec<u32> {
        self.graph.outputs().iter().map(|id| id.0).collect()
    }

    /// The number of operators.
    #[getter]
    fn num_nodes(&self) -> usize {
        self.graph.nodes().len()
    }

    /// Whether the model may run on parts of the batch.
    #[getter]
    fn splittable(&self) -> bool {
        self.graph.batch().splittable
    }

    /// Why it may not.
    #[getter]
    fn unsplittable_reason(&self) -> Option<&str> {
        self.graph.batch().reason.as_deref()
    }
}

#[pymethods]
impl ValueInfo {
    /// The parameter's or buffer's qualified name, or the capture's name.
    #[getter]
    fn name(&self) -> &str {
        &self.value.name
    }

    /// The element type as torch spells it.
    #[getter]
    fn dtype(&self) -> &str {
        &self.value.dtype
    }

    /// Whether a gradient flows through it.
    #[getter]
    fn requires_grad(&self) -> bool {
        self.value.requires_grad
    }

    /// How it depends on the rows of the batch: `split`, `sum`, or `whole`.
    #[getter]
    fn transport(&self) -> &'static str {
        match self.value.rows {
            Rows::Split { .. } => "split",
            Rows::Sum => "sum",
            Rows::None | Rows::Whole => "whole",
        }
    }

    /// The dimension that holds the rows.
    #[getter]
    fn dim(&self) -> u32 {
        self.layout().0
    }

    /// How many runs of rows that dimension holds.
    #[getter]
    fn outer(&self) -> u64 {
        self.layout().1
    }

    /// How many consecutive entries of that dimension belong to one row.
    #[getter]
    fn inner(&self) -> u64 {
        self.layout().2
    }

    /// The sizes for a batch of `rows`.
    fn shape(&self, rows: u64) -> Vec<u64> {
        self.value.shape.iter().map(|size| size.at(rows)).collect()
    }
}

impl ValueInfo {
    fn layout(&self) -> (u32, u64, u64) {
        match self.value.rows {
            Rows::Split { dim, outer, inner } => (dim, outer, inner),
            Rows::None | Rows::Sum | Rows::Whole => (0, 1, 1),
        }
    }
}

/// Place, label, what is read and what else must come before.
type GivenStep = (Vec<Scope>, String, Vec<usize>, Vec<usize>);

/// The positions of operators in the order that does not depend on when they ran.
///
/// `steps` are in an order in which they can run, each with its place in the program (numbers of the
/// calls and loops around it, and whether they are loops), a label, the
/// positions of what it reads, and those of what else it must follow.
#[pyfunction]
pub(crate) fn canonical_order(py: Python<'_>, steps: Vec<GivenStep>) -> Vec<usize> {
    let step = |(place, label, reads, after)| Step { place, label, reads, after };
    let steps: Vec<Step> = steps.into_iter().map(step).collect();
    py.detach(|| rannc_graph::canonical_order(&steps))
}
