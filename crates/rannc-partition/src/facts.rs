//! Times and bytes of blocks by number of rows, each found when first asked for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rannc_cost::DeviceCosts;

use crate::runs::{BlockFacts, Runs};

/// Times and bytes of blocks at one number of rows on one class of devices.
pub(crate) struct RowFacts {
    pub(crate) rows: u64,
    /// Forward time of the blocks before each; one longer than there are blocks.
    forward: Vec<u64>,
    backward: Vec<u64>,
    /// Largest workspace of 2^level blocks from each on, by level.
    working: Vec<Vec<u64>>,
    pub(crate) saved: Vec<u64>,
    pub(crate) inputs: Vec<u64>,
    /// For each block that is worth computing again how many are more so: those that free the most
    /// for their time are the first.
    repeat_rank: OnceLock<Vec<Option<usize>>>,
}

impl RowFacts {
    fn new(runs: &Runs, costs: &DeviceCosts<'_>, class: usize, rows: u64) -> Self {
        let model = costs.class(class);
        let mut by_kind: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
        let (mut forward, mut backward) = (vec![0_u64], vec![0_u64]);
        for block in &runs.blocks {
            let (mut before, mut behind) =
                (forward[forward.len() - 1], backward[backward.len() - 1]);
            for &(kind, count) in &block.kinds {
                let (one, other) = *by_kind.entry(kind).or_insert_with(|| {
                    (model.forward_of(kind, rows), model.backward_of(kind, rows))
                });
                before = before.saturating_add(one.saturating_mul(count));
                behind = behind.saturating_add(other.saturating_mul(count));
            }
            forward.push(before);
            backward.push(behind);
        }
        let most = |block: &BlockFacts| {
            block.working.iter().map(|bytes| bytes.at(rows)).max().unwrap_or_default()
        };
        let mut working: Vec<Vec<u64>> = vec![runs.blocks.iter().map(most).collect()];
        while working[working.len() - 1].len() > 1 << (working.len() - 1) {
            let (below, half) = (&working[working.len() - 1], 1 << (working.len() - 1));
            let level = (0..below.len() - half).map(|at| below[at].max(below[at + half]));
            let level: Vec<u64> = level.collect();
            if level.is_empty() {
                break;
            }
            working.push(level);
        }
        Self {
            rows,
            forward,
            backward,
            working,
            saved: runs.blocks.iter().map(|block| block.saved.at(rows)).collect(),
            inputs: runs.blocks.iter().map(|block| block.inputs.at(rows)).collect(),
            repeat_rank: OnceLock::new(),
        }
    }

    pub(crate) fn forward_ns(&self, start: usize, end: usize) -> u64 {
        self.forward[end] - self.forward[start]
    }

    pub(crate) fn backward_ns(&self, start: usize, end: usize) -> u64 {
        self.backward[end] - self.backward[start]
    }

    pub(crate) fn working_bytes(&self, start: usize, end: usize) -> u64 {
        let level = ((end - start).ilog2() as usize).min(self.working.len() - 1);
        let row = &self.working[level];
        row[start].max(row[end - (1 << level)])
    }

    /// The blocks of a run that are worth computing again, the most rewarding first.
    pub(crate) fn repeat_order(&self, runs: &Runs, run: (usize, usize)) -> Vec<usize> {
        let rank = self.repeat_rank(runs);
        let mut order: Vec<usize> = (run.0..run.1).filter(|&block| rank[block].is_some()).collect();
        order.sort_unstable_by_key(|&block| rank[block]);
        order
    }

    fn repeat_rank(&self, runs: &Runs) -> &[Option<usize>] {
        self.repeat_rank.get_or_init(|| {
            let freed = |block: usize| self.saved[block].saturating_sub(self.inputs[block]);
            let time = |block: usize| self.forward_ns(block, block + 1).max(1);
            let mut order: Vec<usize> = (0..runs.num_blocks())
                .filter(|&block| runs.blocks[block].repeatable && freed(block) > 0)
                .collect();
            order.sort_by(|&a, &b| {
                let a_over_b = u128::from(freed(a)) * u128::from(time(b));
                let b_over_a = u128::from(freed(b)) * u128::from(time(a));
                b_over_a.cmp(&a_over_b).then(a.cmp(&b))
            });
            let mut rank = vec![None; runs.num_blocks()];
            for (at, block) in order.into_iter().enumerate() {
                rank[block] = Some(at);
            }
            rank
        })
    }
}

/// Row facts, each made when first asked for.
pub(crate) struct FactCache<'a> {
    runs: &'a Runs,
    costs: &'a DeviceCosts<'a>,
    known: Mutex<BTreeMap<(usize, u64), Arc<RowFacts>>>,
}

impl<'a> FactCache<'a> {
    pub(crate) fn new(runs: &'a Runs, costs: &'a DeviceCosts<'a>) -> Self {
        Self { runs, costs, known: Mutex::new(BTreeMap::new()) }
    }

    pub(crate) fn get(&self, class: usize, rows: u64) -> Arc<RowFacts> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || Arc::new(RowFacts::new(self.runs, self.costs, class, rows));
        Arc::clone(known.entry((class, rows)).or_insert_with(make))
    }
}
