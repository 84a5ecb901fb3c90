//! What a rank can be told to do, and the lists of it.
//!
//! An action works on *slots*: a slot is one tensor in assembly on one rank, named by its place, its
//! microbatch, its value and whether it is the value or its gradient. Pieces arrive in a slot by
//! [`Action::Recv`] and [`Action::Copy`]: a piece that covers all rows of an empty slot becomes the
//! slot, any other is added at its rows to zeros. So pieces of rows fill the slot, and summands and the
//! gradients of several consumers add up. A slot that nothing arrived in stands for zeros (or for no
//! rows).
//!
//! Work that takes a slot empties it, and so does the `release` of its last send or copy. Only what nobody
//! moves stays until the step ends: replicas' spare copies of whole values, and the gradient of a sum that
//! no summand arrived for.

use std::ops::Range;

use crate::{Place, RankId, StageId};

/// Rows `start..end` of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowRange {
    /// The first row.
    pub start: u64,
    /// One past the last row.
    pub end: u64,
}

/// A tensor, or its gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pass {
    /// The value.
    Forward,
    /// Its gradient.
    Backward,
}

/// One tensor in assembly on one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// Whose input or output it is. A stage's gradient slot is that of its own output or input.
    pub place: Place,
    /// The microbatch; 0 at the source and the sink, which hold the rank's whole batch.
    pub microbatch: u32,
    /// The value.
    pub value: u32,
    /// The value itself or its gradient.
    pub pass: Pass,
}

/// One step of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Runs a stage: takes its input slots (a missing sum is zero), fills its output slots.
    Forward {
        /// The stage.
        stage: StageId,
        /// The microbatch.
        microbatch: u32,
        /// How many of the microbatch's rows this replica has.
        rows: u64,
    },
    /// Differentiates a stage: takes the gradient slots of its outputs (a missing one is zero), fills
    /// those of the inputs that were there, adds to the parameters' gradients.
    Backward {
        /// The stage.
        stage: StageId,
        /// The microbatch.
        microbatch: u32,
        /// How many of the microbatch's rows this replica has.
        rows: u64,
    },
    /// Starts sending a piece and goes on.
    Send {
        /// Where the piece is.
        slot: Slot,
        /// Which rows of the slot; none for a sum or a whole value.
        rows: Option<RowRange>,
        /// Who gets it.
        peer: RankId,
        /// Whether this is the last use of the slot on this rank.
        release: bool,
    },
    /// Gets ready to receive a piece and goes on; the action that takes the slot waits for it.
    Recv {
        /// Where the piece goes.
        slot: Slot,
        /// Which rows of the slot; none for a sum or a whole value.
        rows: Option<RowRange>,
        /// The rows of the full slot, or the rows that a sum or whole value was made from.
        total: u64,
        /// Who sends it.
        peer: RankId,
    },
    /// Moves a piece within the rank.
    Copy {
        /// Where the piece is.
        from: Slot,
        /// Which rows of it.
        from_rows: Option<RowRange>,
        /// Where it goes.
        to: Slot,
        /// Which rows there.
        to_rows: Option<RowRange>,
        /// As in [`Action::Recv`].
        total: u64,
        /// As in [`Action::Send`].
        release: bool,
    },
    /// Adds up the gradients of a group between its ranks, all of which do this together.
    ReduceGradients {
        /// The group's id.
        group: u32,
    },
    /// Adds up an output between all ranks, all of which do this together.
    ReduceOutput {
        /// The value.
        value: u32,
    },
}

/// What every rank does in one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    /// Per rank, what runs when the model is called.
    pub forward: Vec<Vec<Action>>,
    /// Per rank, what runs when the loss is differentiated.
    pub backward: Vec<Vec<Action>>,
}

impl RowRange {
    /// Rows `start..end`.
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end }
    }

    /// How many rows.
    pub const fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether there is no row.
    pub const fn is_empty(self) -> bool {
        self.end <= self.start
    }

    /// The rows in both.
    #[must_use]
    pub fn intersect(self, other: Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// The same rows, counted from `origin`, which becomes row `target`.
    #[must_use]
    pub(crate) const fn rebase(self, origin: u64, target: u64) -> Self {
        Self::new(self.start - origin + target, self.end - origin + target)
    }
}

impl From<Range<u64>> for RowRange {
    fn from(range: Range<u64>) -> Self {
        Self::new(range.start, range.end)
    }
}

impl From<RowRange> for Range<u64> {
    fn from(range: RowRange) -> Self {
        range.start..range.end
    }
}

impl Slot {
    /// The slot of a value at a place; the microbatch is ignored at the source and the sink.
    pub const fn new(place: Place, microbatch: u32, value: u32, pass: Pass) -> Self {
        let microbatch = match place {
            Place::Stage(_) => microbatch,
            Place::Source | Place::Sink => 0,
        };
        Self { place, microbatch, value, pass }
    }
}

impl Action {
    /// Whether this is work for the device, as opposed to moving data.
    pub const fn is_compute(&self) -> bool {
        matches!(self, Self::Forward { .. } | Self::Backward { .. })
    }

    /// The short name in a grid: `2F0`, `2SEND_F0`, `REDUCE`.
    pub fn label(&self) -> String {
        let text = self.to_string();
        let end = text.find([' ', '[']).unwrap_or(text.len());
        text[..end].to_owned()
    }
}

impl Program {
    /// The lists of the two passes, in the order in which they run.
    pub fn passes(&self) -> [(&'static str, &[Vec<Action>]); 2] {
        [("forward", &self.forward), ("backward", &self.backward)]
    }
}
