//! Adds data movement and reductions to the order of the work.
//!
//! The work of all ranks is played on an ideal machine (a forward takes one tick, a backward two, data
//! moves at once). This yields *one* sequence of events for the whole world, in which every event comes
//! after all it depends on, and each rank's list is its part of that sequence:
//!
//! - work stands where it ends;
//! - a transfer stands, on both its ranks, where the work that makes the data ends. So the receive
//!   comes before the work that the receiver was busy with then, and the transfer overlaps with it;
//! - model inputs, and the gradients of model outputs, are there from the start: they move when their
//!   receiver starts the work before the one that needs them, so no rank collects a whole batch;
//! - gradients are reduced, on all ranks of the group, where the last of its ranks has its last one, after
//!   the transfers of that tick, which then need not wait for the reduction.
//!
//! As a transfer is one event for both ranks, any two ranks list their common transfers in the same order,
//! and the lists would even run without deadlock if every send waited for its receive.
//!
//! Linear in the number of actions, but for the queue of ranks.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::depend::{Access, Ledger, Resource, Resources};
use crate::generate::{Order, Seeded};
use crate::pipeline::Beside;
use crate::route::Transfer;
use crate::{Action, Pass, Pipeline, Place, Program, RankId, ScheduleError};

/// Writes the lists of all ranks.
pub(crate) fn lower(
    pipeline: &Pipeline,
    resources: &Resources<'_>,
    transfers: &[Transfer],
    order: &Order,
    beside: Beside,
) -> Result<Program, ScheduleError> {
    let mut lowering = Lowering::new(pipeline, resources, transfers, order, beside);
    let (first, second): (&[Pass], &[Pass]) = match order.seeded {
        Seeded::ByCaller => (&[Pass::Forward], &[Pass::Backward]),
        Seeded::AtOnce => (&[Pass::Forward, Pass::Backward], &[]),
    };
    let mut forward = lowering.pass(&order.forward, first)?;
    for flow in pipeline.reduced_outputs(beside) {
        for list in &mut forward {
            list.push(Action::ReduceOutput { value: flow.value });
        }
    }
    let backward = lowering.pass(&order.backward, second)?;
    Ok(Program { forward, backward })
}

/// Lists of transfers, or of other things, by resource.
struct Index {
    starts: Vec<u32>,
    items: Vec<u32>,
}

impl Index {
    /// Sorts `(resource, item)` pairs by resource, keeping their order otherwise.
    fn new(count: usize, pairs: &[(Resource, u32)]) -> Self {
        let mut starts = vec![0u32; count + 1];
        for &(resource, _) in pairs {
            starts[resource as usize + 1] += 1;
        }
        for index in 0..count {
            starts[index + 1] += starts[index];
        }
        let mut next = starts.clone();
        let mut items = vec![0; pairs.len()];
        for &(resource, item) in pairs {
            let place = &mut next[resource as usize];
            items[*place as usize] = item;
            *place += 1;
        }
        Self { starts, items }
    }

    fn range(&self, resource: Resource) -> std::ops::Range<usize> {
        let index = resource as usize;
        self.starts[index] as usize..self.starts[index + 1] as usize
    }
}

struct Lowering<'a> {
    pipeline: &'a Pipeline,
    resources: &'a Resources<'a>,
    transfers: &'a [Transfer],
    /// Both ends of each transfer.
    ends: Vec<(Resource, Resource)>,
    ledger: Ledger,
    /// Transfers out of slots that work fills, by that slot.
    pushed: Index,
    /// Transfers to work out of slots that are full from the start, by the slot that the work takes.
    pulled: Index,
    /// Transfers from inputs to outputs.
    direct: Vec<u32>,
    /// Gradient groups, by the gradients they add up.
    groups: Index,
    /// Per gradient group, how many of its gradients are still to be completed.
    incomplete: Vec<u32>,
    /// Groups that can be reduced now.
    complete: Vec<u32>,
    lists: Vec<Vec<Action>>,
}

/// The work of one rank in one pass.
struct Worker<'a> {
    work: &'a [Action],
    next: usize,
    busy: bool,
}

impl<'a> Lowering<'a> {
    fn new(
        pipeline: &'a Pipeline,
        resources: &'a Resources<'a>,
        transfers: &'a [Transfer],
        order: &Order,
        beside: Beside,
    ) -> Self {
        let mut ledger = Ledger::new(resources);
        let (mut pushed, mut pulled, mut direct, mut ends) = (vec![], vec![], vec![], vec![]);
        for (transfer, index) in transfers.iter().zip(0..) {
            let slot = |end: &crate::route::End| {
                let slot = resources.slot(end.rank, &end.slot);
                slot.expect("routes lead between holders of the value")
            };
            let (from, to) = (slot(&transfer.from), slot(&transfer.to));
            ledger.expect(from, Access::Read);
            ledger.expect(to, Access::Write);
            ends.push((from, to));
            match (transfer.from.slot.place, transfer.to.slot.place) {
                (Place::Stage(_), _) => pushed.push((from, index)),
                (_, Place::Stage(_)) => pulled.push((to, index)),
                _ => direct.push(index),
            }
        }
        let mut lowering = Self {
            pipeline,
            resources,
            transfers,
            ends,
            ledger,
            pushed: Index::new(resources.count(), &pushed),
            pulled: Index::new(resources.count(), &pulled),
            direct,
            groups: Index::new(resources.count(), &[]),
            incomplete: vec![0; pipeline.gradient_groups.len()],
            complete: Vec::new(),
            lists: Vec::new(),
        };
        lowering.expect_work(order);
        lowering.expect_reductions(beside);
        lowering
    }

    fn expect_work(&mut self, order: &Order) {
        for lists in [&order.forward, &order.backward] {
            for (index, list) in lists.iter().enumerate() {
                for action in list {
                    touch(self.resources, RankId::new(index), action, |resource, access| {
                        self.ledger.expect(resource, access);
                    });
                }
            }
        }
    }

    fn expect_reductions(&mut self, beside: Beside) {
        let mut pairs = Vec::new();
        for (group, index) in self.pipeline.gradient_groups.iter().zip(0..) {
            let action = Action::ReduceGradients { group: group.id };
            let ranks = group.ranks.iter().filter(|_| self.pipeline.reduces(group, beside));
            for &rank in ranks {
                touch(self.resources, rank, &action, |resource, _| {
                    if !self.ledger.complete(resource) {
                        pairs.push((resource, index));
                        self.incomplete[index as usize] += 1;
                    }
                });
            }
        }
        self.groups = Index::new(self.resources.count(), &pairs);
    }

    /// Plays the work of one pass; slots that are full from the start are of these `passes`.
    fn pass(
        &mut self,
        work: &[Vec<Action>],
        passes: &[Pass],
    ) -> Result<Vec<Vec<Action>>, ScheduleError> {
        self.lists = vec![Vec::new(); self.pipeline.world_size as usize];
        let worker = |work| Worker { work, next: 0, busy: false };
        let mut workers: Vec<Worker<'_>> = work.iter().map(|work| worker(work)).collect();
        let mut woken = Vec::new();
        for index in std::mem::take(&mut self.direct) {
            if passes.contains(&self.transfers[index as usize].from.slot.pass) {
                self.transfer(index, &mut woken);
            } else {
                self.direct.push(index);
            }
        }
        for (worker, rank) in workers.iter().zip(0..) {
            self.fetch(rank, worker.work.first(), &mut woken);
        }
        self.play(&mut workers)?;
        Ok(std::mem::take(&mut self.lists))
    }

    fn play(&mut self, workers: &mut [Worker<'_>]) -> Result<(), ScheduleError> {
        let mut queue = BinaryHeap::new();
        let mut woken: Vec<u32> = (0..self.pipeline.world_size).collect();
        let mut now = 0u64;
        loop {
            woken.sort_unstable();
            woken.dedup();
            let mut next_woken = Vec::new();
            for rank in std::mem::take(&mut woken) {
                let worker = &mut workers[rank as usize];
                if let Some(end) = self.start(rank, worker, now, &mut next_woken) {
                    queue.push(Reverse((end, rank)));
                }
            }
            woken = next_woken;
            if !woken.is_empty() {
                continue;
            }
            let Some(&Reverse((end, _))) = queue.peek() else { break };
            now = end;
            while let Some(&Reverse((end, rank))) = queue.peek()
                && end == now
            {
                queue.pop();
                self.finish(rank, &mut workers[rank as usize], &mut woken);
            }
            self.reduce();
        }
        let stuck = workers.iter().zip(0..).find(|(worker, _)| worker.next < worker.work.len());
        stuck.map_or(Ok(()), |(worker, rank)| Err(self.stuck(worker, rank)))
    }

    /// Starts the next work of a rank if it can, and returns when it ends.
    fn start(
        &mut self,
        rank: u32,
        worker: &mut Worker<'_>,
        now: u64,
        woken: &mut Vec<u32>,
    ) -> Option<u64> {
        let action = worker.work.get(worker.next)?;
        let mut allowed = !worker.busy;
        touch(self.resources, RankId(rank), action, |resource, access| {
            allowed &= self.ledger.allows(resource, access);
        });
        if !allowed {
            return None;
        }
        worker.busy = true;
        self.fetch(rank, worker.work.get(worker.next + 1), woken);
        Some(now + if matches!(action, Action::Forward { .. }) { 1 } else { 2 })
    }

    /// Moves what is there from the start and `work` needs.
    fn fetch(&mut self, rank: u32, work: Option<&Action>, woken: &mut Vec<u32>) {
        let Some(work) = work else { return };
        let mut taken = Vec::new();
        touch(self.resources, RankId(rank), work, |resource, access| {
            if access == Access::Take {
                taken.push(resource);
            }
        });
        for resource in taken {
            for position in self.pulled.range(resource) {
                self.transfer(self.pulled.items[position], woken);
            }
        }
    }

    /// Ends the work of a rank and sends on what it made.
    fn finish(&mut self, rank: u32, worker: &mut Worker<'_>, woken: &mut Vec<u32>) {
        let action = worker.work[worker.next];
        worker.busy = false;
        worker.next += 1;
        self.lists[rank as usize].push(action);
        let mut made = Vec::new();
        touch(self.resources, RankId(rank), &action, |resource, access| {
            self.ledger.settle(resource, access);
            if access == Access::Write {
                made.push(resource);
            }
        });
        for resource in made {
            for position in self.pushed.range(resource) {
                self.transfer(self.pushed.items[position], woken);
            }
            if self.ledger.complete(resource) {
                for position in self.groups.range(resource) {
                    let index = self.groups.items[position];
                    self.incomplete[index as usize] -= 1;
                    if self.incomplete[index as usize] == 0 {
                        self.complete.push(index);
                    }
                }
            }
        }
        woken.push(rank);
    }

    /// Reduces the groups whose last gradients are there.
    fn reduce(&mut self) {
        self.complete.sort_unstable();
        for index in self.complete.drain(..) {
            let group = &self.pipeline.gradient_groups[index as usize];
            for rank in &group.ranks {
                self.lists[rank.index()].push(Action::ReduceGradients { group: group.id });
            }
        }
    }

    /// Writes a transfer into the lists of its ranks.
    fn transfer(&mut self, index: u32, woken: &mut Vec<u32>) {
        let Transfer { from, to, total } = self.transfers[index as usize];
        let (source, target) = self.ends[index as usize];
        self.ledger.settle(source, Access::Read);
        self.ledger.settle(target, Access::Write);
        let release = self.ledger.is_read(source);
        if from.rank == to.rank {
            let (from_rows, to_rows, rank) = (from.rows, to.rows, from.rank);
            let (from, to) = (from.slot, to.slot);
            let copy = Action::Copy { from, from_rows, to, to_rows, total, release };
            self.lists[rank.index()].push(copy);
        } else {
            let (slot, rows, peer) = (from.slot, from.rows, to.rank);
            self.lists[from.rank.index()].push(Action::Send { slot, rows, peer, release });
            let (slot, rows, peer) = (to.slot, to.rows, from.rank);
            self.lists[to.rank.index()].push(Action::Recv { slot, rows, total, peer });
        }
        if self.ledger.complete(target) {
            woken.push(to.rank.0);
        }
    }

    /// The generator's order blocks itself.
    fn stuck(&self, worker: &Worker<'_>, rank: u32) -> ScheduleError {
        let problem =
            format!("rank {rank} never gets what it needs for `{}`", worker.work[worker.next]);
        let program = Program { forward: self.lists.clone(), backward: Vec::new() };
        ScheduleError::Incomplete { problem, grid: crate::render::listing(&program) }
    }
}

fn touch(
    resources: &Resources<'_>,
    rank: RankId,
    action: &Action,
    visit: impl FnMut(Resource, Access),
) {
    resources.touch(rank, action, visit).expect("generators order work of this pipeline only");
}
