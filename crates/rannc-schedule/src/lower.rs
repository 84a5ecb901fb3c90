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
use std::ops::Range;

use crate::depend::{Access, Ledger, Resource, Resources};
use crate::generate::{Order, Seeded};
use crate::pipeline::Beside;
use crate::route::{End, Transfer};
use crate::script::{Move, Op, Script, Work, number};
use crate::{Action, Mode, Pass, Pipeline, Place, Program, RankId, ScheduleError};

/// Writes the lists of all ranks; the moves of the script are the transfers.
pub(crate) fn lower(
    pipeline: &Pipeline,
    resources: &Resources<'_>,
    transfers: &[Transfer],
    order: &Order,
    (mode, beside): (Mode, Beside),
) -> Result<Script, ScheduleError> {
    let mut lowering = Lowering::new(pipeline, resources, transfers, order, (mode, beside));
    let (first, second): (&[Pass], &[Pass]) = match order.seeded {
        Seeded::ByCaller => (&[Pass::Forward], &[Pass::Backward]),
        Seeded::AtOnce => (&[Pass::Forward, Pass::Backward], &[]),
    };
    lowering.pass(0, first)?;
    for flow in pipeline.reduced_outputs(mode, beside) {
        let index = resources.flow(flow.value).expect("the resources are this pipeline's");
        for list in &mut lowering.script.passes[0] {
            list.push(Op::ReduceOutput(number(index)));
        }
    }
    lowering.pass(1, second)?;
    Ok(lowering.script)
}

/// Writes out the actions of a script that [`lower`] wrote for these transfers.
pub(crate) fn program(pipeline: &Pipeline, transfers: &[Transfer], script: &Script) -> Program {
    let action = |op: &Op| match *op {
        Op::Work(index) => {
            let Work { pass, stage, microbatch, rows, .. } = script.works[index as usize];
            match pass {
                Pass::Forward => Action::Forward { stage, microbatch, rows },
                Pass::Backward => Action::Backward { stage, microbatch, rows },
            }
        }
        Op::Send(index) => {
            let (Transfer { from, to, .. }, release) = piece(transfers, script, index);
            Action::Send { slot: from.slot, rows: from.rows, peer: to.rank, release }
        }
        Op::Recv(index) => {
            let (&Transfer { from, to, total }, _) = piece(transfers, script, index);
            Action::Recv { slot: to.slot, rows: to.rows, total, peer: from.rank }
        }
        Op::Copy(index) => {
            let (&Transfer { from, to, total }, release) = piece(transfers, script, index);
            let (from_rows, to_rows) = (from.rows, to.rows);
            Action::Copy { from: from.slot, from_rows, to: to.slot, to_rows, total, release }
        }
        Op::ReduceGradients(group) => {
            Action::ReduceGradients { group: pipeline.gradient_groups[group as usize].id }
        }
        Op::ReduceOutput(flow) => {
            Action::ReduceOutput { value: pipeline.flows[flow as usize].value }
        }
    };
    let lists = |lists: &[Vec<Op>]| -> Vec<Vec<Action>> {
        lists.iter().map(|list| list.iter().map(action).collect()).collect()
    };
    let [forward, backward] = &script.passes;
    Program { forward: lists(forward), backward: lists(backward) }
}

/// A transfer, and whether it is the last out of its slot.
fn piece<'a>(transfers: &'a [Transfer], script: &Script, index: u32) -> (&'a Transfer, bool) {
    (&transfers[index as usize], script.moves[index as usize].release)
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
    script: Script,
    /// The pass that is written.
    pass: usize,
    /// By pass and rank, its work in order.
    work: [Vec<Range<u32>>; 2],
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
}

/// The work of one rank that is still to be done in a pass.
struct Worker {
    work: Range<u32>,
    busy: bool,
    /// Whether the work that keeps it busy is in its list already.
    listed: bool,
}

impl<'a> Lowering<'a> {
    fn new(
        pipeline: &'a Pipeline,
        resources: &'a Resources<'a>,
        transfers: &'a [Transfer],
        order: &Order,
        kind: (Mode, Beside),
    ) -> Self {
        let mut ledger = Ledger::new(resources);
        let (mut pushed, mut pulled, mut direct, mut moves) = (vec![], vec![], vec![], vec![]);
        for (transfer, index) in transfers.iter().zip(0..) {
            let slot = |end: &End| {
                let slot = resources.slot(end.rank, &end.slot);
                slot.expect("routes lead between holders of the value")
            };
            let (from, to) = (slot(&transfer.from), slot(&transfer.to));
            ledger.expect(from, Access::Read);
            ledger.expect(to, Access::Write);
            let Transfer { from: End { rank: sender, .. }, to: target, total } = transfer;
            moves.push(Move {
                from: sender.0,
                to: target.rank.0,
                source: from,
                target: to,
                bytes: resources.bytes(target.slot.value, target.rows, *total),
                release: false,
                to_stage: matches!(target.slot.place, Place::Stage(_)),
            });
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
            script: Script { moves, ..Script::default() },
            pass: 0,
            work: [Vec::new(), Vec::new()],
            ledger,
            pushed: Index::new(resources.count(), &pushed),
            pulled: Index::new(resources.count(), &pulled),
            direct,
            groups: Index::new(resources.count(), &[]),
            incomplete: vec![0; pipeline.gradient_groups.len()],
            complete: Vec::new(),
        };
        lowering.expect_work(order);
        lowering.expect_reductions(kind);
        lowering
    }

    fn expect_work(&mut self, order: &Order) {
        for (pass, lists) in [&order.forward, &order.backward].into_iter().enumerate() {
            for (index, list) in lists.iter().enumerate() {
                let first = number(self.script.works.len());
                for action in list {
                    let work = self.resources.work(RankId::new(index), action);
                    let work = work.expect("generators order work of this pipeline only");
                    self.resources.touch_work(&work, |resource, access| {
                        self.ledger.expect(resource, access);
                    });
                    self.script.works.push(work);
                }
                self.work[pass].push(first..number(self.script.works.len()));
            }
        }
    }

    fn expect_reductions(&mut self, (mode, beside): (Mode, Beside)) {
        let mut pairs = Vec::new();
        for (group, index) in self.pipeline.gradient_groups.iter().zip(0..) {
            if !self.pipeline.reduces(group, mode, beside) {
                continue;
            }
            for &rank in &group.ranks {
                self.resources.touch_gradients(rank, index as usize, |resource, _| {
                    if !self.ledger.complete(resource) {
                        pairs.push((resource, index));
                        self.incomplete[index as usize] += 1;
                    }
                });
            }
            if self.incomplete[index as usize] == 0 {
                self.complete.push(index); // what earlier steps have left
            }
        }
        self.groups = Index::new(self.resources.count(), &pairs);
    }

    /// Plays the work of one pass; slots that are full from the start are of these `passes`.
    fn pass(&mut self, pass: usize, passes: &[Pass]) -> Result<(), ScheduleError> {
        self.pass = pass;
        self.script.passes[pass] = vec![Vec::new(); self.pipeline.world_size as usize];
        let work = std::mem::take(&mut self.work[pass]);
        let mut workers: Vec<Worker> =
            work.into_iter().map(|work| Worker { work, busy: false, listed: false }).collect();
        let mut woken = Vec::new();
        for index in std::mem::take(&mut self.direct) {
            if passes.contains(&self.transfers[index as usize].from.slot.pass) {
                self.transfer(index, &mut woken);
            } else {
                self.direct.push(index);
            }
        }
        self.reduce();
        for worker in &workers {
            self.fetch(worker.work.clone().next(), &mut woken);
        }
        self.play(&mut workers)
    }

    fn play(&mut self, workers: &mut [Worker]) -> Result<(), ScheduleError> {
        let mut queue = BinaryHeap::new();
        let mut woken: Vec<u32> = (0..self.pipeline.world_size).collect();
        let mut now = 0u64;
        loop {
            woken.sort_unstable();
            woken.dedup();
            let mut next_woken = Vec::new();
            for rank in std::mem::take(&mut woken) {
                for (rank, end) in self.start(workers, rank, now, &mut next_woken) {
                    queue.push(Reverse((end, rank)));
                }
            }
            woken = next_woken;
            if !woken.is_empty() {
                continue;
            }
            let Some(&Reverse((end, _))) = queue.peek() else { break };
            now = end;
            let mut ended = Vec::new();
            while let Some(&Reverse((end, rank))) = queue.peek()
                && end == now
            {
                queue.pop();
                ended.push(rank);
            }
            // What ranks do together comes into their lists before anything that follows from it.
            for &rank in &ended {
                self.list_joint(rank, &mut workers[rank as usize]);
            }
            for rank in ended {
                self.finish(rank, &mut workers[rank as usize], &mut woken);
            }
            self.reduce();
        }
        let stuck = workers.iter().zip(0..).find(|(worker, _)| !worker.work.is_empty());
        stuck.map_or(Ok(()), |(worker, rank)| Err(self.stuck(worker, rank)))
    }

    /// Starts the next work of a rank if it can, and tells who is busy until when: work that replicas do
    /// together starts when the last of them can.
    fn start(
        &mut self,
        workers: &mut [Worker],
        rank: u32,
        now: u64,
        woken: &mut Vec<u32>,
    ) -> Vec<(u32, u64)> {
        let Some(work) = self.possible(&workers[rank as usize]) else { return Vec::new() };
        let ranks = self.together(rank, &work);
        let kind = |work: &Work| (work.pass, work.stage, work.microbatch);
        let ready = |&other: &u32| {
            let theirs = self.possible(&workers[other as usize]);
            theirs.is_some_and(|theirs| kind(&theirs) == kind(&work))
        };
        if !ranks.iter().all(ready) {
            return Vec::new();
        }
        for &rank in &ranks {
            let worker = &mut workers[rank as usize];
            worker.busy = true;
            self.fetch(worker.work.clone().nth(1), woken);
        }
        let end = now + if work.pass == Pass::Forward { 1 } else { 2 };
        ranks.into_iter().map(|rank| (rank, end)).collect()
    }

    /// The next work of a rank, if the rank is idle and all that the work needs is there.
    fn possible(&self, worker: &Worker) -> Option<Work> {
        if worker.busy || worker.work.is_empty() {
            return None;
        }
        let work = self.script.works[worker.work.start as usize];
        let mut allowed = true;
        self.resources.touch_work(&work, |resource, access| {
            allowed &= self.ledger.allows(resource, access);
        });
        allowed.then_some(work)
    }

    /// The ranks that do a work of `rank` together with it, itself included.
    fn together(&self, rank: u32, work: &Work) -> Vec<u32> {
        let stage = &self.pipeline.stages[work.stage.index()];
        if stage.is_joint(work.pass) {
            stage.ranks.iter().map(|rank| rank.0).collect()
        } else {
            vec![rank]
        }
    }

    /// Moves what is there from the start and a work needs.
    fn fetch(&mut self, work: Option<u32>, woken: &mut Vec<u32>) {
        let Some(work) = work else { return };
        let (resources, work) = (self.resources, self.script.works[work as usize]);
        resources.touch_work(&work, |resource, access| {
            if access == Access::Take {
                for position in self.pulled.range(resource) {
                    self.transfer(self.pulled.items[position], woken);
                }
            }
        });
    }

    /// Writes work that has ended into the rank's list if replicas did it together.
    fn list_joint(&mut self, rank: u32, worker: &mut Worker) {
        let index = worker.work.start;
        let work = &self.script.works[index as usize];
        worker.listed = self.pipeline.stages[work.stage.index()].is_joint(work.pass);
        if worker.listed {
            self.push(rank, Op::Work(index));
        }
    }

    /// Ends the work of a rank and sends on what it made.
    fn finish(&mut self, rank: u32, worker: &mut Worker, woken: &mut Vec<u32>) {
        let index = worker.work.next().expect("a rank that is busy has work");
        if !worker.listed {
            self.push(rank, Op::Work(index));
        }
        (worker.busy, worker.listed) = (false, false);
        let (resources, work) = (self.resources, self.script.works[index as usize]);
        resources.touch_work(&work, |resource, access| self.ledger.settle(resource, access));
        resources.touch_work(&work, |resource, access| {
            if access == Access::Write {
                self.made(resource, woken);
            }
        });
        woken.push(rank);
    }

    /// Sends on what is complete.
    fn made(&mut self, resource: Resource, woken: &mut Vec<u32>) {
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

    fn push(&mut self, rank: u32, op: Op) {
        self.script.passes[self.pass][rank as usize].push(op);
    }

    /// Reduces the groups whose last gradients are there.
    fn reduce(&mut self) {
        self.complete.sort_unstable();
        for index in std::mem::take(&mut self.complete) {
            for rank in &self.pipeline.gradient_groups[index as usize].ranks {
                self.push(rank.0, Op::ReduceGradients(index));
            }
        }
    }

    /// Writes a transfer into the lists of its ranks.
    fn transfer(&mut self, index: u32, woken: &mut Vec<u32>) {
        let piece = &mut self.script.moves[index as usize];
        self.ledger.settle(piece.source, Access::Read);
        self.ledger.settle(piece.target, Access::Write);
        piece.release = self.ledger.is_read(piece.source);
        let (from, to) = (piece.from, piece.to);
        if self.ledger.complete(piece.target) {
            woken.push(to);
        }
        if from == to {
            self.push(from, Op::Copy(index));
        } else {
            self.push(from, Op::Send(index));
            self.push(to, Op::Recv(index));
        }
    }

    /// The generator's order blocks itself.
    fn stuck(&self, worker: &Worker, rank: u32) -> ScheduleError {
        let program = program(self.pipeline, self.transfers, &self.script);
        let Work { pass, stage, microbatch, .. } = self.script.works[worker.work.start as usize];
        let problem =
            format!("rank {rank} never gets what it needs for `{stage}{pass}{microbatch}`");
        ScheduleError::Incomplete { problem, grid: crate::render::listing(&program) }
    }
}
