//! What each run of consecutive blocks would amount to as a stage: time, traffic and bytes.
//!
//! Sums over atoms are prefix sums. What several blocks may share (parameters, cloned operators,
//! values that cross borders) is counted once for each run, by who uses it.

use std::collections::BTreeMap;

use fixedbitset::FixedBitSet;
use rannc_cost::{CostModel, is_trained, working_bytes};
use rannc_graph::{Affine, Graph, NodeId, Users, Value};

use crate::{Atoms, Blocks};

/// What a run of blocks amounts to, whatever its replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Interval {
    /// Time of the cloned operators, forward and backward.
    pub(crate) clones_ns: u64,
    /// Workspace of the largest cloned operator.
    pub(crate) clones_working: u64,
    /// Bytes of parameters, buffers and constants.
    pub(crate) state: u64,
    /// Bytes of trained parameters that no other block uses.
    pub(crate) own_trained: u64,
    /// Bytes of trained parameters that other blocks use, too.
    pub(crate) shared_trained: u64,
    /// Bytes that autograd keeps.
    pub(crate) saved: Affine,
    /// Bytes of all inputs.
    pub(crate) received: Affine,
    /// Bytes of gradients that come back for the outputs.
    pub(crate) returned: Affine,
    /// Bytes of values that come from or go to other stages, or leave the model.
    pub(crate) exchanged: Affine,
}

/// All runs of consecutive blocks.
pub(crate) struct Intervals {
    num_blocks: usize,
    runs: Vec<Interval>,
    by_rows: BTreeMap<u64, BlockTimes>,
}

/// Time and workspace of blocks at some number of rows.
struct BlockTimes {
    /// Time of the blocks before each; one longer than there are blocks.
    elapsed: Vec<u64>,
    working: Vec<u64>,
}

impl Intervals {
    /// Adds everything up; `all_rows` are the numbers of rows that stages may run at.
    ///
    /// # Complexity
    ///
    /// Operators times numbers of rows, plus shared things times the square of the blocks.
    pub(crate) fn new(
        graph: &Graph,
        atoms: &Atoms,
        blocks: &Blocks,
        costs: &dyn CostModel,
        batch_rows: u64,
        all_rows: impl IntoIterator<Item = u64>,
    ) -> Self {
        let facts = Facts::new(graph, atoms, blocks, costs, batch_rows);
        let num_blocks = blocks.len();
        let ends =
            (0..num_blocks).flat_map(|start| (start + 1..=num_blocks).map(move |end| (start, end)));
        let runs = ends.map(|(start, end)| facts.interval(start, end)).collect();
        let mut by_rows = BTreeMap::new();
        for rows in all_rows {
            by_rows
                .entry(rows)
                .or_insert_with(|| BlockTimes::new(graph, atoms, blocks, costs, rows));
        }
        Self { num_blocks, runs, by_rows }
    }

    pub(crate) fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    pub(crate) fn get(&self, start: usize, end: usize) -> &Interval {
        &self.runs[run_index(self.num_blocks, start, end)]
    }

    /// Forward and backward time for `rows`, one of those given at the start.
    pub(crate) fn time_ns(&self, start: usize, end: usize, rows: u64) -> u64 {
        let elapsed = &self.by_rows[&rows].elapsed;
        (elapsed[end] - elapsed[start]).saturating_add(self.get(start, end).clones_ns)
    }

    /// Workspace for `rows`, one of those given at the start.
    pub(crate) fn working_bytes(&self, start: usize, end: usize, rows: u64) -> u64 {
        let blocks = self.by_rows[&rows].working[start..end].iter().copied();
        blocks.chain([self.get(start, end).clones_working]).max().unwrap_or_default()
    }
}

/// The position of a run of blocks when runs are listed by start, then end.
pub(crate) fn run_index(num_blocks: usize, start: usize, end: usize) -> usize {
    start * num_blocks - start * start.saturating_sub(1) / 2 + (end - start - 1)
}

impl BlockTimes {
    fn new(
        graph: &Graph,
        atoms: &Atoms,
        blocks: &Blocks,
        costs: &dyn CostModel,
        rows: u64,
    ) -> Self {
        let mut elapsed = vec![0_u64];
        let mut working = Vec::new();
        for block in 0..blocks.len() {
            let mut time = elapsed[block];
            let mut most = 0;
            for &id in blocks.atoms(block..block + 1).iter().flat_map(|&atom| atoms.members(atom)) {
                time = time.saturating_add(node_ns(costs, id, rows));
                most = most.max(working_bytes(graph, id, rows));
            }
            elapsed.push(time);
            working.push(most);
        }
        Self { elapsed, working }
    }
}

fn node_ns(costs: &dyn CostModel, id: NodeId, rows: u64) -> u64 {
    costs.forward_ns(id, rows).saturating_add(costs.backward_ns(id, rows))
}

/// Something that a run of blocks has once if any of its blocks uses it.
struct Shared<T> {
    used_by: FixedBitSet,
    fact: T,
}

struct Clone {
    time_ns: u64,
    working: u64,
    saved: u64,
}

struct State {
    bytes: u64,
    trained: bool,
}

struct Crossing {
    /// The block that makes it; none for the model's inputs.
    made_by: Option<usize>,
    bytes: Affine,
    gradient: bool,
    result: bool,
}

struct Facts {
    num_blocks: usize,
    /// Bytes that the atoms of each block save.
    saved: Vec<Affine>,
    clones: Vec<Shared<Clone>>,
    states: Vec<Shared<State>>,
    crossings: Vec<Shared<Crossing>>,
}

impl Facts {
    fn new(
        graph: &Graph,
        atoms: &Atoms,
        blocks: &Blocks,
        costs: &dyn CostModel,
        batch_rows: u64,
    ) -> Self {
        let num_blocks = blocks.len();
        let mut used_by = vec![FixedBitSet::with_capacity(num_blocks); graph.nodes().len()];
        let mut saved = vec![Affine::default(); num_blocks];
        for (block, saved) in saved.iter_mut().enumerate() {
            let members =
                blocks.atoms(block..block + 1).iter().flat_map(|&atom| atoms.members(atom));
            for &id in members {
                used_by[id.index()].insert(block);
                *saved += graph.node(id).saved_bytes;
            }
        }
        spread_to_clones(graph, atoms, &mut used_by);
        let clones = graph.node_ids().filter(|&id| atoms.of(id).is_none()).map(|id| Shared {
            used_by: used_by[id.index()].clone(),
            fact: Clone {
                time_ns: node_ns(costs, id, 1),
                working: working_bytes(graph, id, 1),
                saved: graph.node(id).saved_bytes.at(1),
            },
        });
        let clones = clones.collect();
        let (states, crossings) = shared_values(graph, atoms, &used_by, batch_rows);
        Self { num_blocks, saved, clones, states, crossings }
    }

    fn interval(&self, start: usize, end: usize) -> Interval {
        let mut interval = Interval::default();
        for saved in &self.saved[start..end] {
            interval.saved += *saved;
        }
        for Shared { used_by, fact } in &self.clones {
            if used_by.contains_any_in_range(start..end) {
                interval.clones_ns = interval.clones_ns.saturating_add(fact.time_ns);
                interval.clones_working = interval.clones_working.max(fact.working);
                interval.saved += affine_constant(fact.saved);
            }
        }
        for Shared { used_by, fact } in &self.states {
            if used_by.contains_any_in_range(start..end) {
                interval.state = interval.state.saturating_add(fact.bytes);
                let outside = used_by.contains_any_in_range(..start)
                    || used_by.contains_any_in_range(end..self.num_blocks);
                let trained = match (fact.trained, outside) {
                    (true, true) => &mut interval.shared_trained,
                    (true, false) => &mut interval.own_trained,
                    (false, _) => continue,
                };
                *trained = trained.saturating_add(fact.bytes);
            }
        }
        for Shared { used_by, fact } in &self.crossings {
            let made_here = fact.made_by.is_some_and(|block| (start..end).contains(&block));
            if made_here {
                if fact.result || used_by.contains_any_in_range(end..self.num_blocks) {
                    interval.exchanged += fact.bytes;
                    interval.returned += if fact.gradient { fact.bytes } else { Affine::default() };
                }
            } else if used_by.contains_any_in_range(start..end) {
                interval.received += fact.bytes;
                if fact.made_by.is_some() {
                    interval.exchanged += fact.bytes;
                }
            }
        }
        interval
    }
}

/// Extends who uses what from atoms to the cloned operators that they need.
fn spread_to_clones(graph: &Graph, atoms: &Atoms, used_by: &mut [FixedBitSet]) {
    let mut pending: Vec<NodeId> = graph.node_ids().filter(|&id| atoms.of(id).is_some()).collect();
    while let Some(id) = pending.pop() {
        let blocks = used_by[id.index()].clone();
        for needed in atoms.cloned_with(graph, id) {
            let known = &mut used_by[needed.index()];
            if !blocks.is_subset(known) {
                known.union_with(&blocks);
                pending.push(needed);
            }
        }
    }
}

fn shared_values(
    graph: &Graph,
    atoms: &Atoms,
    used_by: &[FixedBitSet],
    batch_rows: u64,
) -> (Vec<Shared<State>>, Vec<Shared<Crossing>>) {
    let users: Users = graph.users();
    let num_blocks = used_by.first().map_or(0, FixedBitSet::len);
    let mut is_result = FixedBitSet::with_capacity(graph.values().len());
    is_result.extend(graph.outputs().iter().map(|id| id.index()));
    let (mut states, mut crossings) = (Vec::new(), Vec::new());
    for id in graph.value_ids() {
        let value = graph.value(id);
        let mut blocks = FixedBitSet::with_capacity(num_blocks);
        for user in users.of(id) {
            blocks.union_with(&used_by[user.index()]);
        }
        if value.is_state() {
            let fact = State { bytes: value.bytes(1), trained: is_trained(graph, id) };
            states.push(Shared { used_by: blocks, fact });
            continue;
        }
        let made_by = match graph.producer(id) {
            None => None,
            // Results of cloned operators never cross, but may leave the model.
            Some(made) if atoms.of(made).is_none() && !is_result.contains(id.index()) => continue,
            Some(made) => used_by[made.index()].ones().next(),
        };
        let result = is_result.contains(id.index()) && graph.producer(id).is_some();
        let elsewhere = made_by.is_none_or(|block| blocks.ones().any(|user| user != block));
        if result || elsewhere {
            let (bytes, gradient) = (affine_bytes(value, batch_rows), value.requires_grad);
            crossings.push(Shared {
                used_by: blocks,
                fact: Crossing { made_by, bytes, gradient, result },
            });
        }
    }
    (states, crossings)
}

fn affine_constant(bytes: u64) -> Affine {
    Affine::fixed(i64::try_from(bytes).unwrap_or(i64::MAX))
}

/// The bytes of a value as a line over rows: exact with one dimension that holds rows; with several,
/// exact for the whole batch and too large below.
fn affine_bytes(value: &Value, batch_rows: u64) -> Affine {
    let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    if value.shape.iter().filter(|size| !size.is_fixed()).count() > 1 {
        return Affine::per_row(signed(value.bytes(batch_rows).div_ceil(batch_rows.max(1))));
    }
    let mut bytes = affine_constant(value.element_bytes());
    for size in &value.shape {
        bytes = if size.is_fixed() {
            let times = size.fixed.max(0);
            Affine {
                per_row: bytes.per_row.saturating_mul(times),
                fixed: bytes.fixed.saturating_mul(times),
            }
        } else {
            Affine {
                per_row: bytes.fixed.saturating_mul(size.per_row),
                fixed: bytes.fixed.saturating_mul(size.fixed),
            }
        };
    }
    bytes
}

#[cfg(test)]
mod tests;
