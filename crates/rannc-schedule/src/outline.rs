//! One rank for each stage in place of its replicas, to simulate large pipelines fast.
//!
//! Where replica counts have no divisor, nothing can be folded ([`fold`](crate::fold())): a step on a
//! thousand ranks has as many forwards as ranks x microbatches. In outline the replicas of a stage are one
//! rank that computes whole microbatches, each in the time of the replica that takes longest, and that
//! sends and receives in the time of the slowest pair, of which the stage with fewer replicas has its own
//! part of the bytes:
//!
//! ```text
//! stage 0: ranks 0 1 2    0 -> 3, 1 -> 3 4, 2 -> 4
//! stage 1: ranks 3 4      in outline: one transfer of half of the bytes, as slow as the slowest of these
//! ```
//!
//! Lost is that replicas run ahead of each other, and that what arrives in several pieces waits for each.

use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::{
    Batch, Flow, GradientGroup, Memory, Pass, Pipeline, Place, RankId, Stage, StageId, Timing,
    Transport,
};

/// A pipeline with one rank for each stage, and its batch.
pub(crate) struct Outline<'a> {
    pub(crate) pipeline: Pipeline,
    pub(crate) batch: Batch,
    whole: &'a Pipeline,
    timing: &'a dyn Timing,
    /// By rank, those of the whole pipeline that it stands for.
    members: Vec<Vec<RankId>>,
    /// By stage and rows of a microbatch, the slowest forward and backward.
    passes: RefCell<BTreeMap<(StageId, u64), (u64, u64)>>,
    transfers: RefCell<BTreeMap<(u64, RankId, RankId), u64>>,
}

impl<'a> Outline<'a> {
    /// The outline of a valid pipeline; none where replicas are not all that its ranks are: where a rank
    /// has several stages, where each replica gets the whole of a value, where ranks share cores, or where
    /// some get the outputs of others.
    pub(crate) fn new(whole: &'a Pipeline, batch: &Batch, timing: &'a dyn Timing) -> Option<Self> {
        let copied = |flow: &Flow| flow.transport == Transport::Whole && flow.from != Place::Source;
        if !batch.gather || !timing.shared().is_empty() || whole.flows.iter().any(copied) {
            return None;
        }
        let mut members: Vec<Vec<RankId>> =
            whole.stages.iter().map(|stage| stage.ranks.clone()).collect();
        let mut is_taken = vec![false; whole.world_size as usize];
        for rank in members.iter().flatten() {
            if std::mem::replace(&mut is_taken[rank.index()], true) {
                return None;
            }
        }
        let idle: Vec<RankId> =
            (0..is_taken.len()).filter(|&rank| !is_taken[rank]).map(RankId::new).collect();
        if !idle.is_empty() {
            members.push(idle);
        }
        let rows = |ranks: &Vec<RankId>| ranks.iter().map(|rank| batch.rows[rank.index()]).sum();
        let stages = whole.stages.iter().enumerate();
        let group = |group: &GradientGroup| {
            let mut ranks: Vec<RankId> = group.stages.iter().map(|stage| RankId(stage.0)).collect();
            ranks.sort_unstable();
            GradientGroup { ranks, ..group.clone() }
        };
        Some(Self {
            batch: Batch { rows: members.iter().map(rows).collect(), ..*batch },
            pipeline: Pipeline {
                world_size: RankId::new(members.len()).0,
                stages: stages
                    .map(|(index, stage)| Stage {
                        ranks: vec![RankId::new(index)],
                        shares: Vec::new(),
                        ..*stage
                    })
                    .collect(),
                flows: whole.flows.clone(),
                gradient_groups: whole.gradient_groups.iter().map(group).collect(),
            },
            whole,
            timing,
            members,
            passes: RefCell::default(),
            transfers: RefCell::default(),
        })
    }

    /// The slowest forward and backward of the replicas of a stage that have a microbatch of so many rows.
    fn passes(&self, id: StageId, rows: u64) -> (u64, u64) {
        *self.passes.borrow_mut().entry((id, rows)).or_insert_with(|| {
            let stage = &self.whole.stages[id.index()];
            let bounds = stage.bounds(rows);
            let mut slowest = (0, 0);
            for (&rank, ends) in stage.ranks.iter().zip(bounds.windows(2)) {
                let own = ends[1] - ends[0];
                if own > 0 || stage.is_joint(Pass::Forward) {
                    slowest.0 = self.timing.forward_ns(id, rank, own).max(slowest.0);
                }
                if own > 0 || stage.is_joint(Pass::Backward) {
                    slowest.1 = self.timing.backward_ns(id, rank, own).max(slowest.1);
                }
            }
            slowest
        })
    }
}

impl Timing for Outline<'_> {
    fn forward_ns(&self, stage: StageId, _: RankId, rows: u64) -> u64 {
        self.passes(stage, rows).0
    }

    fn backward_ns(&self, stage: StageId, _: RankId, rows: u64) -> u64 {
        self.passes(stage, rows).1
    }

    fn transfer_ns(&self, bytes: u64, from: RankId, to: RankId) -> u64 {
        *self.transfers.borrow_mut().entry((bytes, from, to)).or_insert_with(|| {
            let (from, to) = (&self.members[from.index()], &self.members[to.index()]);
            let (fewer, more) = (from.len().min(to.len()), from.len().max(to.len()));
            let part = bytes.div_ceil(fewer as u64);
            let pair = |at: usize| (from[at * from.len() / more], to[at * to.len() / more]);
            let times =
                (0..more).map(pair).map(|(from, to)| self.timing.transfer_ns(part, from, to));
            times.max().unwrap_or(0)
        })
    }

    fn reduce_gradients_ns(&self, group: &GradientGroup) -> u64 {
        let whole = self.whole.gradient_groups.iter().find(|whole| whole.id == group.id);
        self.timing.reduce_gradients_ns(whole.unwrap_or(group))
    }

    fn reduce_output_ns(&self, bytes: u64, _: &[RankId]) -> u64 {
        let all: Vec<RankId> = (0..self.whole.world_size).map(RankId).collect();
        self.timing.reduce_output_ns(bytes, &all)
    }
}

/// Memory is not looked at in outline.
impl Memory for Outline<'_> {
    fn saved_bytes(&self, _: StageId, _: u64) -> u64 {
        0
    }
}
