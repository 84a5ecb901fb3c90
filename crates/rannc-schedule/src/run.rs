//! Plays the lists of all ranks by the rules of the dependency relation, without time.

use crate::depend::{Access, Ledger, Resource, Resources};
use crate::script::{Move, Op, Script};
use crate::{Action, Pipeline};

/// A position in the lists of one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct At {
    /// The rank.
    pub(crate) rank: u32,
    /// The position in its list.
    pub(crate) step: u32,
}

/// What is wrong, and where.
#[derive(Debug)]
pub(crate) struct Fault {
    /// Where.
    pub(crate) at: At,
    /// What.
    pub(crate) problem: String,
}

impl At {
    /// The action there.
    pub(crate) fn action(self, lists: &[Vec<Action>]) -> &Action {
        &lists[self.rank as usize][self.step as usize]
    }

    /// A fault here.
    pub(crate) fn fault(self, problem: impl Into<String>) -> Fault {
        Fault { at: self, problem: problem.into() }
    }
}

/// The positions and actions of all lists, rank by rank.
pub(crate) fn positions(lists: &[Vec<Action>]) -> impl Iterator<Item = (At, &Action)> {
    lists.iter().zip(0..).flat_map(|(list, rank)| {
        list.iter().zip(0..).map(move |(action, step)| (At { rank, step }, action))
    })
}

/// Sends and the receives they belong to.
#[derive(Debug)]
pub(crate) struct Matching {
    /// Each send with its receive.
    pub(crate) pairs: Vec<(At, At)>,
    /// Per rank and step, the number of the pair; `u32::MAX` for other actions.
    numbers: Vec<Vec<u32>>,
}

impl Matching {
    /// Pairs the transfers between each two ranks by their order in both lists.
    ///
    /// Both ranks must have the same sequence, both directions taken together, because some
    /// transports carry both directions of a pair in one queue. Sorts: `n log n` in the transfers.
    pub(crate) fn new(lists: &[Vec<Action>]) -> Result<Self, Fault> {
        let mut halves = Vec::new();
        for (at, action) in positions(lists) {
            if let Action::Send { peer, .. } | Action::Recv { peer, .. } = action {
                if peer.index() >= lists.len() || peer.0 == at.rank {
                    return Err(at.fault(format!("rank {peer} is no peer of rank {}", at.rank)));
                }
                halves.push(((at.rank.min(peer.0), at.rank.max(peer.0)), at));
            }
        }
        halves.sort_unstable();
        let mut matching = Self {
            pairs: Vec::with_capacity(halves.len() / 2),
            numbers: lists.iter().map(|list| vec![u32::MAX; list.len()]).collect(),
        };
        for group in halves.chunk_by(|left, right| left.0 == right.0) {
            let lower = group.partition_point(|half| half.1.rank == half.0.0);
            let (lower, upper) = group.split_at(lower);
            for (index, &(_, at)) in lower.iter().enumerate() {
                let Some(&(_, other)) = upper.get(index) else {
                    return Err(at.fault("the peer has no action that belongs to this one"));
                };
                matching.join(lists, at, other)?;
            }
            if let Some(&(_, at)) = upper.get(lower.len()) {
                return Err(at.fault("the peer has no action that belongs to this one"));
            }
        }
        Ok(matching)
    }

    fn join(&mut self, lists: &[Vec<Action>], left: At, right: At) -> Result<(), Fault> {
        let pair = match (left.action(lists), right.action(lists)) {
            (Action::Send { .. }, Action::Recv { .. }) => (left, right),
            (Action::Recv { .. }, Action::Send { .. }) => (right, left),
            (_, other) => {
                let problem = format!(
                    "it meets `{other}` at step {} of rank {}, which is no other end of it",
                    right.step, right.rank
                );
                return Err(left.fault(problem));
            }
        };
        let number = u32::try_from(self.pairs.len()).expect("a step has fewer than 2^32 transfers");
        for at in [left, right] {
            self.numbers[at.rank as usize][at.step as usize] = number;
        }
        self.pairs.push(pair);
        Ok(())
    }

    /// The number of the pair that a send or receive belongs to.
    pub(crate) fn number(&self, at: At) -> u32 {
        self.numbers[at.rank as usize][at.step as usize]
    }
}

/// Learns what happens, in an order that respects all dependencies.
pub(crate) trait Observer {
    /// An action that is no reduction ran.
    fn ran(&mut self, at: At, op: Op);
    /// A send and its receive have both run: the piece arrives.
    fn delivered(&mut self, number: u32, piece: &Move);
    /// A reduction ran on all its ranks.
    fn reduced(&mut self, op: Op, arrived: &[At]);
    /// All replicas of a stage ran a pass of a microbatch together: the numbers of their work.
    fn worked(&mut self, arrived: &[(At, u32)]);
}

/// Where every rank is in its list.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    resources: &'a Resources<'a>,
    pipeline: &'a Pipeline,
    script: &'a Script,
    lists: &'a [Vec<Op>],
    steps: Vec<u32>,
    /// Per move, whether one end has run.
    half_done: Vec<bool>,
    /// The ranks that wait in each gradient group, then in each reduced output, then in each stage.
    arrived: Vec<Vec<At>>,
    /// Per rank, whether it waits in one.
    waits: Vec<bool>,
}

/// What a rank did when it was asked to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It ran its next action.
    Ran,
    /// Its next action cannot run yet.
    Blocked,
    /// It has reached the end.
    Finished,
}

impl<'a> Run<'a> {
    /// Every rank at the start of its list of one pass.
    pub(crate) fn new(
        resources: &'a Resources<'a>,
        pipeline: &'a Pipeline,
        script: &'a Script,
        pass: usize,
    ) -> Self {
        let lists = &script.passes[pass];
        let num_reductions = pipeline.gradient_groups.len() + pipeline.flows.len();
        let num_meetings = num_reductions + pipeline.stages.len();
        Self {
            resources,
            pipeline,
            script,
            lists,
            steps: vec![0; lists.len()],
            half_done: vec![false; script.moves.len()],
            arrived: vec![Vec::new(); num_meetings],
            waits: vec![false; lists.len()],
        }
    }

    /// Where a rank is.
    pub(crate) fn position(&self, rank: u32) -> At {
        At { rank, step: self.steps[rank as usize] }
    }

    /// Where a rank waits for ever, once no rank can go on.
    pub(crate) fn stuck(&self) -> Option<At> {
        let ranks = self.lists.iter().zip(0..);
        let mut positions = ranks.map(|(list, rank)| (list.len(), self.position(rank)));
        positions.find(|(end, at)| (at.step as usize) < *end).map(|(_, at)| at)
    }

    /// The number of the work that a rank could do next.
    pub(crate) fn next_work(&self, rank: u32, ledger: &Ledger) -> Option<u32> {
        let at = self.position(rank);
        let &op = self.lists[rank as usize].get(at.step as usize)?;
        let Op::Work(index) = op else { return None };
        let mut allowed = true;
        self.touch(rank, op, |resource, access| allowed &= ledger.allows(resource, access));
        allowed.then_some(index)
    }

    /// Lets a rank run its next action if it can; adds the ranks that this may set free to `woken`.
    pub(crate) fn advance(
        &mut self,
        rank: u32,
        ledger: &mut Ledger,
        observer: &mut impl Observer,
        woken: &mut Vec<u32>,
    ) -> Progress {
        let at = self.position(rank);
        let Some(&op) = self.lists[rank as usize].get(at.step as usize) else {
            return Progress::Finished;
        };
        let mut allowed = true;
        self.touch(rank, op, |resource, access| allowed &= ledger.allows(resource, access));
        if !allowed {
            return Progress::Blocked;
        }
        if self.meeting(op).is_some() {
            return self.meet_all(at, op, ledger, observer, woken);
        }
        self.steps[rank as usize] += 1;
        if !matches!(op, Op::Recv(_)) {
            self.touch(rank, op, |resource, access| ledger.settle(resource, access));
        }
        observer.ran(at, op);
        if let Op::Send(number) | Op::Recv(number) = op {
            self.meet(number, ledger, observer, woken);
        }
        Progress::Ran
    }

    fn touch(&self, rank: u32, op: Op, visit: impl FnMut(Resource, Access)) {
        self.script.touch(rank, op, self.resources, visit);
    }

    /// One end of a transfer has run; if it is the second, the piece arrives.
    fn meet(
        &mut self,
        number: u32,
        ledger: &mut Ledger,
        observer: &mut impl Observer,
        woken: &mut Vec<u32>,
    ) {
        if !std::mem::replace(&mut self.half_done[number as usize], true) {
            return;
        }
        let piece = &self.script.moves[number as usize];
        ledger.settle(piece.target, Access::Write);
        observer.delivered(number, piece);
        woken.push(piece.to);
    }

    /// A rank arrives at what it does together with others; the last one sets all free.
    fn meet_all(
        &mut self,
        at: At,
        op: Op,
        ledger: &mut Ledger,
        observer: &mut impl Observer,
        woken: &mut Vec<u32>,
    ) -> Progress {
        let (index, needed) = self.meeting(op).expect("others take part");
        if self.arrived[index].first().is_some_and(|&first| !self.is_same(self.op(first), op)) {
            return Progress::Blocked; // the others are at another microbatch: they never meet
        }
        if !std::mem::replace(&mut self.waits[at.rank as usize], true) {
            self.arrived[index].push(at);
        }
        if self.arrived[index].len() < needed {
            return Progress::Blocked;
        }
        let mut arrived = std::mem::take(&mut self.arrived[index]);
        arrived.sort_unstable();
        let ops: Vec<Op> = arrived.iter().map(|&at| self.op(at)).collect();
        for (at, &op) in arrived.iter().zip(&ops) {
            self.touch(at.rank, op, |resource, access| ledger.settle(resource, access));
            self.steps[at.rank as usize] += 1;
            self.waits[at.rank as usize] = false;
            woken.push(at.rank);
        }
        let work = |(&at, op): (&At, &Op)| match *op {
            Op::Work(number) => Some((at, number)),
            _ => None,
        };
        match arrived.iter().zip(&ops).map(work).collect::<Option<Vec<_>>>() {
            Some(works) => observer.worked(&works),
            None => observer.reduced(op, &arrived),
        }
        Progress::Ran
    }

    fn op(&self, at: At) -> Op {
        self.lists[at.rank as usize][at.step as usize]
    }

    /// Whether two ranks that meet mean the same.
    fn is_same(&self, one: Op, other: Op) -> bool {
        match (one, other) {
            (Op::Work(one), Op::Work(other)) => {
                let kind = |number: u32| {
                    let work = &self.script.works[number as usize];
                    (work.pass, work.stage, work.microbatch)
                };
                kind(one) == kind(other)
            }
            _ => true,
        }
    }

    /// The number of a reduction, or of a stage whose replicas work together, and how many ranks take part.
    fn meeting(&self, op: Op) -> Option<(usize, usize)> {
        let groups = &self.pipeline.gradient_groups;
        let num_reductions = groups.len() + self.pipeline.flows.len();
        match op {
            Op::ReduceGradients(group) => {
                Some((group as usize, groups[group as usize].ranks.len()))
            }
            Op::ReduceOutput(flow) => {
                Some((groups.len() + flow as usize, self.pipeline.world_size as usize))
            }
            Op::Work(number) => {
                let work = &self.script.works[number as usize];
                let stage = &self.pipeline.stages[work.stage.index()];
                let index = num_reductions + work.stage.index();
                stage.is_joint(work.pass).then_some((index, stage.ranks.len()))
            }
            Op::Send(_) | Op::Recv(_) | Op::Copy(_) => None,
        }
    }
}
