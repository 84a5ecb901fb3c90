//! Lists of actions with everything looked up, to be played.

use crate::depend::{Access, Resource, Resources, Unknown};
use crate::run::{Fault, Matching, positions};
use crate::{Action, Pass, Place, RankId, RowRange, Slot, StageId};

/// An action that knows what it works on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    /// Runs a stage: the number of the work.
    Work(u32),
    /// Starts sending: the number of the move.
    Send(u32),
    /// Gets ready to receive: the number of the move.
    Recv(u32),
    /// Moves within the rank: the number of the move.
    Copy(u32),
    /// Adds up gradients: the position of the group.
    ReduceGradients(u32),
    /// Adds up an output: the position of the flow.
    ReduceOutput(u32),
}

/// A forward or a backward.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// Which of the two.
    pub(crate) pass: Pass,
    /// The stage.
    pub(crate) stage: StageId,
    /// The microbatch.
    pub(crate) microbatch: u32,
    /// How many rows.
    pub(crate) rows: u64,
    /// The first resource of the microbatch on the replica.
    pub(crate) first: Resource,
    /// The gradients of the replica.
    pub(crate) gradients: Resource,
}

/// A piece on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Move {
    /// Who has it.
    pub(crate) from: u32,
    /// Who gets it.
    pub(crate) to: u32,
    /// Where it is.
    pub(crate) source: Resource,
    /// Where it goes.
    pub(crate) target: Resource,
    /// Its size.
    pub(crate) bytes: u64,
    /// Whether it is the last use of where it is.
    pub(crate) release: bool,
    /// Whether it goes to a stage, and not to the caller.
    pub(crate) to_stage: bool,
}

/// The lists of both passes.
#[derive(Debug, Default)]
pub(crate) struct Script {
    /// By pass and rank.
    pub(crate) passes: [Vec<Vec<Op>>; 2],
    /// All work.
    pub(crate) works: Vec<Work>,
    /// All that moves.
    pub(crate) moves: Vec<Move>,
}

impl Script {
    /// Looks up all actions of the next pass; `matching` is theirs.
    pub(crate) fn add(
        &mut self,
        pass: usize,
        lists: &[Vec<Action>],
        matching: &Matching,
        resources: &Resources<'_>,
    ) -> Result<(), Fault> {
        let before = number(self.moves.len());
        for &(send, receive) in &matching.pairs {
            let (
                Action::Send { slot: source, release, .. },
                Action::Recv { slot: target, rows, total, .. },
            ) = (send.action(lists), receive.action(lists))
            else {
                unreachable!("a pair is a send and a receive");
            };
            let end = |rank: u32, slot: &Slot| resources.known_slot(RankId(rank), slot);
            self.moves.push(Move {
                from: send.rank,
                to: receive.rank,
                source: end(send.rank, source).map_err(|problem| send.fault(problem))?,
                target: end(receive.rank, target).map_err(|problem| receive.fault(problem))?,
                bytes: resources.bytes(target.value, *rows, *total),
                release: *release,
                to_stage: matches!(target.place, Place::Stage(_)),
            });
        }
        self.passes[pass] = lists.iter().map(|list| Vec::with_capacity(list.len())).collect();
        for (at, action) in positions(lists) {
            let op = match action {
                Action::Send { .. } => Op::Send(before + matching.number(at)),
                Action::Recv { .. } => Op::Recv(before + matching.number(at)),
                _ => self
                    .op(RankId(at.rank), action, resources)
                    .map_err(|problem| at.fault(problem))?,
            };
            self.passes[pass][at.rank as usize].push(op);
        }
        Ok(())
    }

    /// Looks up an action that is no transfer between ranks.
    fn op(
        &mut self,
        rank: RankId,
        action: &Action,
        resources: &Resources<'_>,
    ) -> Result<Op, Unknown> {
        Ok(match action {
            Action::Forward { .. } | Action::Backward { .. } => {
                self.works.push(resources.work(rank, action)?);
                Op::Work(number(self.works.len() - 1))
            }
            Action::Copy { from, to, to_rows, total, release, .. } => {
                self.moves.push(Move {
                    from: rank.0,
                    to: rank.0,
                    source: resources.known_slot(rank, from)?,
                    target: resources.known_slot(rank, to)?,
                    bytes: resources.bytes(to.value, *to_rows, *total),
                    release: *release,
                    to_stage: matches!(to.place, Place::Stage(_)),
                });
                Op::Copy(number(self.moves.len() - 1))
            }
            Action::ReduceGradients { group } => {
                let index = resources.group(*group);
                Op::ReduceGradients(number(
                    index.ok_or_else(|| format!("there is no group {group}"))?,
                ))
            }
            Action::ReduceOutput { value } => {
                resources.known_slot(rank, &Slot::new(Place::Sink, 0, *value, Pass::Forward))?;
                let index = resources.flow(*value).expect("a value with a slot has a flow");
                Op::ReduceOutput(number(index))
            }
            Action::Send { .. } | Action::Recv { .. } => unreachable!("transfers are matched"),
        })
    }

    /// Calls `visit` with every resource that an action of `rank` touches.
    pub(crate) fn touch(
        &self,
        rank: u32,
        op: Op,
        resources: &Resources<'_>,
        mut visit: impl FnMut(Resource, Access),
    ) {
        let last = |piece: &Move| if piece.release { Access::Take } else { Access::Read };
        match op {
            Op::Work(index) => resources.touch_work(&self.works[index as usize], visit),
            Op::Send(index) => {
                let piece = &self.moves[index as usize];
                visit(piece.source, last(piece));
            }
            Op::Recv(index) => visit(self.moves[index as usize].target, Access::Write),
            Op::Copy(index) => {
                let piece = &self.moves[index as usize];
                visit(piece.source, last(piece));
                visit(piece.target, Access::Write);
            }
            Op::ReduceGradients(group) => {
                resources.touch_gradients(RankId(rank), group as usize, visit);
            }
            Op::ReduceOutput(flow) => visit(resources.output(RankId(rank), flow), Access::Read),
        }
    }

    /// Calls `visit` with everything that will happen.
    pub(crate) fn expect(
        &self,
        resources: &Resources<'_>,
        mut visit: impl FnMut(Resource, Access),
    ) {
        for lists in &self.passes {
            for (list, rank) in lists.iter().zip(0..) {
                for &op in list {
                    self.touch(rank, op, resources, &mut visit);
                }
            }
        }
    }
}

/// The rows of a piece, or those that a sum or whole value was made from.
pub(crate) fn rows_of(rows: Option<RowRange>, total: u64) -> u64 {
    rows.map_or(total, RowRange::len)
}

/// A position in a table of a script.
pub(crate) fn number(index: usize) -> u32 {
    u32::try_from(index).expect("a step has fewer than 2^32 actions")
}
