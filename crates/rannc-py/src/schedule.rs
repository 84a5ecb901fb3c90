//! `Slot`, `Action` and `Program`.

use pyo3::exceptions::{PyAttributeError, PyValueError};
use pyo3::prelude::*;
use rannc_schedule::{Pass, Place, RowRange, StageId};

/// Where one tensor is in assembly on one rank: a place, a microbatch, a value and a pass.
#[pyclass(frozen, eq, hash, module = "pyrannc._core")]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Slot {
    slot: rannc_schedule::Slot,
}

/// One step of one rank.
#[pyclass(frozen, module = "pyrannc._core")]
pub(crate) struct Action {
    action: rannc_schedule::Action,
}

/// What every rank does in one step.
#[pyclass(frozen, module = "pyrannc._core")]
pub(crate) struct Program {
    pub(crate) program: rannc_schedule::Program,
    pub(crate) fused: bool,
}

const fn pass(gradient: bool) -> Pass {
    if gradient { Pass::Backward } else { Pass::Forward }
}

#[pymethods]
impl Slot {
    /// The slot of one of the model's inputs, or of its gradient.
    #[staticmethod]
    #[pyo3(signature = (value, *, gradient = false))]
    fn source(value: u32, gradient: bool) -> Self {
        Self { slot: rannc_schedule::Slot::new(Place::Source, 0, value, pass(gradient)) }
    }

    /// The slot of one of the model's outputs, or of its gradient.
    #[staticmethod]
    #[pyo3(signature = (value, *, gradient = false))]
    fn sink(value: u32, gradient: bool) -> Self {
        Self { slot: rannc_schedule::Slot::new(Place::Sink, 0, value, pass(gradient)) }
    }

    /// The value in assembly.
    #[getter]
    fn value(&self) -> u32 {
        self.slot.value
    }

    fn __str__(&self) -> String {
        self.slot.to_string()
    }

    fn __repr__(&self) -> String {
        format!("Slot({})", self.slot)
    }
}

fn rows(range: Option<RowRange>) -> Option<(u64, u64)> {
    range.map(|range| (range.start, range.end))
}

#[pymethods]
impl Action {
    /// What to do: `forward`, `backward`, `send`, `recv`, `copy`, `reduce_gradients`,
    /// `reduce_output`.
    #[getter]
    fn kind(&self) -> &'static str {
        use rannc_schedule::Action as A;
        match self.action {
            A::Forward { .. } => "forward",
            A::Backward { .. } => "backward",
            A::Send { .. } => "send",
            A::Recv { .. } => "recv",
            A::Copy { .. } => "copy",
            A::ReduceGradients { .. } => "reduce_gradients",
            A::ReduceOutput { .. } => "reduce_output",
        }
    }

    /// The stage that it runs, or whose slot it moves; -1 where there is none.
    #[getter]
    fn stage(&self) -> i64 {
        use rannc_schedule::Action as A;
        let place = match self.action {
            A::Forward { stage, .. } | A::Backward { stage, .. } => Place::Stage(stage),
            A::Send { slot, .. } | A::Recv { slot, .. } => slot.place,
            A::Copy { from, .. } => from.place,
            A::ReduceGradients { .. } | A::ReduceOutput { .. } => Place::Source,
        };
        match place {
            Place::Stage(stage) => stage.0.into(),
            Place::Source | Place::Sink => -1,
        }
    }

    /// The microbatch that it runs; 0 for other kinds.
    #[getter]
    fn microbatch(&self) -> u32 {
        self.computed().map_or(0, |(_, microbatch, _)| microbatch)
    }

    /// How many rows it computes; 0 for other kinds.
    #[getter]
    fn rows(&self) -> u64 {
        self.computed().map_or(0, |(_, _, rows)| rows)
    }

    /// The slot that it sends from, receives into, copies from or reduces.
    ///
    /// An `AttributeError` for other kinds.
    #[getter]
    fn slot(&self) -> PyResult<Slot> {
        use rannc_schedule::Action as A;
        let slot = match self.action {
            A::Send { slot, .. } | A::Recv { slot, .. } => slot,
            A::Copy { from, .. } => from,
            A::ReduceOutput { value } => {
                rannc_schedule::Slot::new(Place::Sink, 0, value, Pass::Forward)
            }
            A::Forward { .. } | A::Backward { .. } | A::ReduceGradients { .. } => {
                return Err(self.lacks("slot"));
            }
        };
        Ok(Slot { slot })
    }

    /// First and last-but-one row of `slot`; none for tensors that have no rows.
    #[getter]
    fn slot_rows(&self) -> Option<(u64, u64)> {
        use rannc_schedule::Action as A;
        match self.action {
            A::Send { rows: range, .. } | A::Recv { rows: range, .. } => rows(range),
            A::Copy { from_rows, .. } => rows(from_rows),
            _ => None,
        }
    }

    /// The slot that it copies to; an `AttributeError` for other kinds.
    #[getter]
    fn to_slot(&self) -> PyResult<Slot> {
        match self.action {
            rannc_schedule::Action::Copy { to, .. } => Ok(Slot { slot: to }),
            _ => Err(self.lacks("slot to copy to")),
        }
    }

    /// The rows of `to_slot`.
    #[getter]
    fn to_rows(&self) -> Option<(u64, u64)> {
        match self.action {
            rannc_schedule::Action::Copy { to_rows, .. } => rows(to_rows),
            _ => None,
        }
    }

    /// Rows of the full slot that is received or copied into.
    #[getter]
    fn total(&self) -> u64 {
        match self.action {
            rannc_schedule::Action::Recv { total, .. }
            | rannc_schedule::Action::Copy { total, .. } => total,
            _ => 0,
        }
    }

    /// The other rank of a transfer; -1 for other kinds.
    #[getter]
    fn peer(&self) -> i64 {
        match self.action {
            rannc_schedule::Action::Send { peer, .. }
            | rannc_schedule::Action::Recv { peer, .. } => peer.0.into(),
            _ => -1,
        }
    }

    /// Whether it is the last use of `slot` on this rank.
    #[getter]
    fn release(&self) -> bool {
        match self.action {
            rannc_schedule::Action::Send { release, .. }
            | rannc_schedule::Action::Copy { release, .. } => release,
            _ => false,
        }
    }

    /// The gradient group that it reduces; -1 for other kinds.
    #[getter]
    fn group(&self) -> i64 {
        match self.action {
            rannc_schedule::Action::ReduceGradients { group } => group.into(),
            _ => -1,
        }
    }

    /// The slot that holds a value of the stage and microbatch that it runs.
    ///
    /// A `ValueError` if it runs no stage.
    fn value_slot(&self, value: u32) -> PyResult<Slot> {
        self.own_slot(value, Pass::Forward)
    }

    /// The slot that holds the gradient of such a value.
    fn gradient_slot(&self, value: u32) -> PyResult<Slot> {
        self.own_slot(value, Pass::Backward)
    }

    fn __str__(&self) -> String {
        self.action.to_string()
    }

    fn __repr__(&self) -> String {
        format!("Action({})", self.action)
    }
}

impl Action {
    fn computed(&self) -> Option<(StageId, u32, u64)> {
        match self.action {
            rannc_schedule::Action::Forward { stage, microbatch, rows }
            | rannc_schedule::Action::Backward { stage, microbatch, rows } => {
                Some((stage, microbatch, rows))
            }
            _ => None,
        }
    }

    fn own_slot(&self, value: u32, pass: Pass) -> PyResult<Slot> {
        let (stage, microbatch, _) = self.computed().ok_or_else(|| {
            PyValueError::new_err(format!("the action `{}` runs no stage", self.action))
        })?;
        let place = Place::Stage(stage);
        Ok(Slot { slot: rannc_schedule::Slot::new(place, microbatch, value, pass) })
    }

    fn lacks(&self, what: &str) -> PyErr {
        PyAttributeError::new_err(format!("the action `{}` has no {what}", self.action))
    }
}

#[pymethods]
impl Program {
    /// What `rank` does when the model is called.
    fn forward(&self, rank: usize) -> Vec<Action> {
        actions(&self.program.forward, rank)
    }

    /// What `rank` does when the loss is differentiated.
    fn backward(&self, rank: usize) -> Vec<Action> {
        actions(&self.program.backward, rank)
    }

    /// Whether the backward runs within the call of the model, with a gradient of 1 for the loss.
    #[getter]
    fn fused(&self) -> bool {
        self.fused
    }

    fn __str__(&self) -> String {
        rannc_schedule::listing(&self.program)
    }
}

fn actions(lists: &[Vec<rannc_schedule::Action>], rank: usize) -> Vec<Action> {
    lists.get(rank).into_iter().flatten().map(|&action| Action { action }).collect()
}
