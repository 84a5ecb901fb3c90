//! Which pieces of which values go where: the data movement of one step, before any order.
//!
//! Rows go where their holders overlap. Each summand goes to exactly one replica of the consumer, itself
//! if it can. A whole value is fetched by each replica of the consumer from one producer, itself if it can.
//! Gradients go the same ways back, with two exceptions: of outputs that all ranks have, only one rank's
//! gradient counts (rank 0's where inputs are not gathered, the maker's for a whole value).

use crate::rows::{Holding, Layout, overlaps};
use crate::{Flow, Mode, Pass, Pipeline, Place, RankId, RowRange, Slot, Transport};

/// One end of a transfer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    /// The rank.
    pub(crate) rank: RankId,
    /// The slot there.
    pub(crate) slot: Slot,
    /// The rows of the slot; none for a sum or a whole value.
    pub(crate) rows: Option<RowRange>,
}

/// One piece on its way, within a rank or between two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    /// Where it is taken from.
    pub(crate) from: End,
    /// Where it goes.
    pub(crate) to: End,
    /// The rows of the full target slot, or those that a sum or whole value was made from.
    pub(crate) total: u64,
}

/// All transfers of one step; those that leave one slot are in the order in which they should go.
pub(crate) fn transfers(pipeline: &Pipeline, layout: &Layout, mode: Mode) -> Vec<Transfer> {
    let mut transfers = Vec::new();
    for flow in pipeline.flows.iter().filter(|_| mode.computes()) {
        for &to in &flow.to {
            let gradient = mode.differentiates() && pipeline.returns_gradient(flow, to);
            let mut router = Router { flow, to, layout, gradient, transfers: &mut transfers };
            router.route();
        }
    }
    transfers
}

/// Collects the transfers between the two ends of a flow.
struct Router<'a> {
    flow: &'a Flow,
    to: Place,
    layout: &'a Layout,
    gradient: bool,
    transfers: &'a mut Vec<Transfer>,
}

/// A rank with the rows and the full size of its slot.
type Port = (RankId, Option<RowRange>, u64);

impl Router<'_> {
    fn route(&mut self) {
        if (self.flow.from, self.to) == (Place::Source, Place::Sink) {
            return self.pass_through();
        }
        let layout = self.layout;
        for microbatch in layout.filled() {
            let from = layout.holdings(self.flow.from, microbatch);
            let to = layout.holdings(self.to, microbatch);
            match self.flow.transport {
                Transport::Split => self.split(microbatch, from, to),
                Transport::Sum => self.sum(microbatch, from, to),
                Transport::Whole if self.to == Place::Sink => {
                    return self.whole_output(microbatch, from[0]);
                }
                Transport::Whole => self.whole(microbatch, from, to),
            }
        }
    }

    /// Adds a transfer and, if `returns`, that of its gradient.
    fn add(&mut self, microbatch: u32, from: Port, to: Port, returns: bool) {
        let end = |place: Place, pass: Pass, (rank, rows, _): Port| {
            let slot = Slot::new(place, microbatch, self.flow.value, pass);
            End { rank, slot, rows }
        };
        self.transfers.push(Transfer {
            from: end(self.flow.from, Pass::Forward, from),
            to: end(self.to, Pass::Forward, to),
            total: to.2,
        });
        if returns && self.gradient {
            self.transfers.push(Transfer {
                from: end(self.to, Pass::Backward, to),
                to: end(self.flow.from, Pass::Backward, from),
                total: from.2,
            });
        }
    }

    /// An input that is an output.
    fn pass_through(&mut self) {
        let layout = self.layout;
        let world_size = layout.world_size();
        for rank in (0..world_size).map(RankId) {
            let from = if layout.replicates_outputs() { RankId(0) } else { rank };
            let total = layout.local_rows(from);
            let rows = match self.flow.transport {
                Transport::Split if total == 0 => continue,
                Transport::Split => Some(RowRange::new(0, total)),
                Transport::Sum | Transport::Whole => None,
            };
            self.add(0, (from, rows, total), (rank, rows, total), from == rank);
        }
    }

    fn split(&mut self, microbatch: u32, from: &[Holding], to: &[Holding]) {
        let one_counts = self.to == Place::Sink && self.layout.replicates_outputs();
        overlaps(from, to, |source, target, shared| {
            let from = (source.rank, Some(source.local(shared)), source.total);
            let to = (target.rank, Some(target.local(shared)), target.total);
            self.add(microbatch, from, to, !one_counts || target.rank == RankId(0));
        });
    }

    fn sum(&mut self, microbatch: u32, from: &[Holding], to: &[Holding]) {
        for (index, source) in from.iter().enumerate() {
            let total = source.rows.len();
            let target = match self.to {
                Place::Sink => source.rank,
                _ => counterpart(source.rank, index, from.len(), to),
            };
            self.add(microbatch, (source.rank, None, total), (target, None, total), true);
        }
    }

    fn whole(&mut self, microbatch: u32, from: &[Holding], to: &[Holding]) {
        for (index, target) in to.iter().enumerate() {
            let (source, total) = if self.flow.from == Place::Source {
                (target.rank, self.layout.local_rows(target.rank))
            } else {
                let source = counterpart(target.rank, index, to.len(), from);
                let made = self.layout.holding(self.flow.from, microbatch, source);
                (source, made.map_or(0, |holding| holding.rows.len()))
            };
            self.add(microbatch, (source, None, total), (target.rank, None, total), true);
        }
    }

    /// A whole output: every rank gets what the first replica made of the first microbatch.
    fn whole_output(&mut self, microbatch: u32, maker: Holding) {
        let total = maker.rows.len();
        for rank in (0..self.layout.world_size()).map(RankId) {
            let from = (maker.rank, None, total);
            self.add(microbatch, from, (rank, None, total), rank == maker.rank);
        }
    }
}

/// The partner among `others` of the rank that is number `index` of `count`: itself, else its like.
fn counterpart(rank: RankId, index: usize, count: usize, others: &[Holding]) -> RankId {
    match others.binary_search_by_key(&rank, |holding| holding.rank) {
        Ok(_) => rank,
        Err(_) => others[index * others.len() / count].rank,
    }
}
