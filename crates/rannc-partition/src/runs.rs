//! What each run of consecutive blocks would amount to as a stage: traffic and bytes.
//!
//! What belongs to one block is added up along the run. What several blocks may share (parameters,
//! cloned operators, values that cross borders) is counted once for each run: where a run that
//! starts at some block first meets it.
//!
//! Models repeat layers, so that many runs are alike: these have one *form*, and prices found for one of
//! them hold for all.

use fixedbitset::FixedBitSet;
use rannc_cost::{CostModel, is_trained};
use rannc_graph::{Affine, Graph, NodeId, Value};
use rustc_hash::FxHashMap;

use crate::storage::written_storages;
use crate::{Atoms, Blocks};

/// What a run of blocks amounts to, whatever its replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Run {
    /// Forward and backward time of the cloned operators.
    pub(crate) clones_ns: (u64, u64),
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
    /// Bytes of those that other stages make.
    pub(crate) arriving: Affine,
    /// Bytes of gradients that come back for the outputs.
    pub(crate) returned: Affine,
    /// Bytes of values that come from or go to other stages, or leave the model.
    pub(crate) exchanged: Affine,
}

/// What one block amounts to by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct BlockFacts {
    /// How many operators of each kind it has, cloned ones left out.
    pub(crate) kinds: Vec<(usize, u64)>,
    /// Workspaces of its operators; the largest counts.
    pub(crate) working: Vec<Affine>,
    /// Bytes that autograd keeps for it.
    pub(crate) saved: Affine,
    /// Bytes of its inputs: what is kept when it is computed again.
    pub(crate) inputs: Affine,
    /// Bytes of the trained parameters that only it uses.
    pub(crate) own_trained: u64,
    /// Whether it may be computed again: it writes to nothing that outlives the step.
    pub(crate) repeatable: bool,
}

/// All runs of consecutive blocks.
#[derive(Debug)]
pub(crate) struct Runs {
    pub(crate) blocks: Vec<BlockFacts>,
    /// The *form* of each run: runs of equal blocks that amount to the same have one form.
    forms: Vec<u32>,
    /// What runs of each form amount to.
    by_form: Vec<Run>,
}

impl Runs {
    /// Adds everything up.
    ///
    /// # Complexity
    ///
    /// Linear in the graph, plus the square of the blocks times the things that blocks share.
    pub(crate) fn new(
        graph: &Graph,
        atoms: &Atoms,
        blocks: &Blocks,
        costs: &dyn CostModel,
        batch_rows: u64,
    ) -> Self {
        let facts = Facts::new(graph, atoms, blocks, costs, batch_rows);
        let num_blocks = blocks.len();
        let alike = numbered(&facts.blocks);
        let mut forms = Vec::with_capacity(num_blocks * (num_blocks + 1) / 2);
        let mut by_form: Vec<Run> = Vec::new();
        // By the form of all blocks but the last, the last block, and the sums.
        let mut known: FxHashMap<(Option<u32>, u32, Run), u32> = FxHashMap::default();
        for start in 0..num_blocks {
            let (mut run, mut before) = (Run::default(), None);
            for (block, &alike) in alike.iter().enumerate().skip(start) {
                facts.extend(&mut run, start, block);
                let form = *known.entry((before, alike, run)).or_insert_with(|| {
                    by_form.push(run);
                    by_form.len() as u32 - 1
                });
                forms.push(form);
                before = Some(form);
            }
        }
        Self { blocks: facts.blocks, forms, by_form }
    }

    pub(crate) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(crate) fn get(&self, start: usize, end: usize) -> &Run {
        &self.by_form[self.form(start, end) as usize]
    }

    /// The form of a run: runs of one form take the same times and bytes on the same devices.
    pub(crate) fn form(&self, start: usize, end: usize) -> u32 {
        self.forms[run_index(self.num_blocks(), start, end)]
    }
}

/// For each block a number that equal blocks share.
fn numbered(blocks: &[BlockFacts]) -> Vec<u32> {
    let mut known: FxHashMap<&BlockFacts, u32> = FxHashMap::default();
    blocks
        .iter()
        .map(|block| {
            let next = known.len() as u32;
            *known.entry(block).or_insert(next)
        })
        .collect()
}

/// The position of a run of blocks when runs are listed by start, then end.
fn run_index(num_blocks: usize, start: usize, end: usize) -> usize {
    start * num_blocks - start * start.saturating_sub(1) / 2 + (end - start - 1)
}

/// Something that a run has once if any of its blocks uses it.
struct Met<T> {
    /// The user before this one; none for the first.
    before: Option<usize>,
    fact: T,
}

impl<T> Met<T> {
    /// Whether a run from `start` has not met it before.
    fn is_new(&self, start: usize) -> bool {
        self.before.is_none_or(|before| before < start)
    }
}

#[derive(Clone, Copy)]
struct Clone {
    forward_ns: u64,
    backward_ns: u64,
    working: u64,
    saved: Affine,
}

#[derive(Clone, Copy)]
struct State {
    bytes: u64,
    trained: bool,
    first: usize,
    last: usize,
}

#[derive(Clone, Copy)]
struct Input {
    /// The block that makes it; none for the model's inputs.
    made_by: Option<usize>,
    bytes: Affine,
}

#[derive(Clone, Copy)]
struct Output {
    made_by: usize,
    bytes: Affine,
    gradient: bool,
}

/// By block, what a run meets there.
struct Facts {
    blocks: Vec<BlockFacts>,
    clones: Vec<Vec<Met<Clone>>>,
    states: Vec<Vec<Met<State>>>,
    inputs: Vec<Vec<Met<Input>>>,
    /// Values that the block makes and others read, or that leave the model.
    made: Vec<Vec<Output>>,
    /// Values whose last reader the block is.
    settled: Vec<Vec<Output>>,
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
        let mut block_of = vec![None; graph.nodes().len()];
        let mut facts = vec![BlockFacts { repeatable: true, ..BlockFacts::default() }; num_blocks];
        for (block, facts) in facts.iter_mut().enumerate() {
            let mut kinds = Vec::new();
            for &id in blocks.members(atoms, block) {
                block_of[id.index()] = Some(block);
                kinds.push(costs.kind(id));
                facts.saved += graph.node(id).saved_bytes;
                facts.working.push(affine_working(graph, id, batch_rows));
            }
            facts.kinds = counted(kinds);
            facts.working = outermost(std::mem::take(&mut facts.working));
        }
        for storage in written_storages(graph).iter().filter(|storage| storage.external) {
            for block in storage.touching.iter().filter_map(|id| block_of[id.index()]) {
                facts[block].repeatable = false;
            }
        }
        let mut built = Self {
            blocks: facts,
            clones: empty(num_blocks),
            states: empty(num_blocks),
            inputs: empty(num_blocks),
            made: empty(num_blocks),
            settled: empty(num_blocks),
        };
        let clone_users = clone_users(graph, atoms, &block_of, num_blocks);
        for id in graph.node_ids() {
            let Some(users) = &clone_users[id.index()] else { continue };
            let fact = Clone {
                forward_ns: costs.forward_ns(id, 1),
                backward_ns: costs.backward_ns(id, 1),
                working: affine_working(graph, id, batch_rows).at(1),
                saved: fixed(graph.node(id).saved_bytes.at(1)),
            };
            let users: Vec<usize> = users.ones().collect();
            meet(&mut built.clones, &users, fact);
        }
        built.add_values(graph, atoms, &block_of, &clone_users, batch_rows);
        built
    }

    fn add_values(
        &mut self,
        graph: &Graph,
        atoms: &Atoms,
        block_of: &[Option<usize>],
        clone_users: &[Option<FixedBitSet>],
        batch_rows: u64,
    ) {
        let users = graph.users();
        let mut is_result = FixedBitSet::with_capacity(graph.values().len());
        is_result.extend(graph.outputs().iter().map(|id| id.index()));
        for id in graph.value_ids() {
            let value = graph.value(id);
            let mut readers: Vec<usize> = Vec::new();
            for user in users.of(id) {
                match (block_of[user.index()], &clone_users[user.index()]) {
                    (Some(block), _) => readers.push(block),
                    (None, Some(blocks)) => readers.extend(blocks.ones()),
                    (None, None) => {}
                }
            }
            readers.sort_unstable();
            readers.dedup();
            if value.is_state() {
                let (Some(&first), Some(&last)) = (readers.first(), readers.last()) else {
                    continue;
                };
                let (bytes, trained) = (value.bytes(1), is_trained(graph, id));
                if trained && first == last {
                    self.blocks[first].own_trained += bytes;
                }
                meet(&mut self.states, &readers, State { bytes, trained, first, last });
                continue;
            }
            let result = is_result.contains(id.index()) && graph.producer(id).is_some();
            let made_by = match graph.producer(id) {
                None => None,
                // Results of cloned operators never cross, but may leave the model.
                Some(made) if atoms.of(made).is_none() => {
                    if !result {
                        continue;
                    }
                    clone_users[made.index()].as_ref().and_then(|blocks| blocks.ones().next())
                }
                Some(made) => block_of[made.index()],
            };
            let bytes = affine_bytes(value, batch_rows);
            readers.retain(|&reader| Some(reader) != made_by);
            for &reader in &readers {
                self.blocks[reader].inputs += bytes;
            }
            meet(&mut self.inputs, &readers, Input { made_by, bytes });
            if let Some(made_by) = made_by.filter(|_| result || !readers.is_empty()) {
                let output = Output { made_by, bytes, gradient: value.requires_grad };
                self.made[made_by].push(output);
                if let Some(&last) = readers.last().filter(|_| !result) {
                    self.settled[last].push(output);
                }
            }
        }
    }

    /// Makes the run `start..block` the run `start..=block`.
    fn extend(&self, run: &mut Run, start: usize, block: usize) {
        run.saved += self.blocks[block].saved;
        for Met { fact, .. } in self.clones[block].iter().filter(|met| met.is_new(start)) {
            run.clones_ns.0 = run.clones_ns.0.saturating_add(fact.forward_ns);
            run.clones_ns.1 = run.clones_ns.1.saturating_add(fact.backward_ns);
            run.clones_working = run.clones_working.max(fact.working);
            run.saved += fact.saved;
        }
        for met in &self.states[block] {
            let fact = met.fact;
            if met.is_new(start) {
                run.state = run.state.saturating_add(fact.bytes);
                if fact.trained {
                    run.shared_trained = run.shared_trained.saturating_add(fact.bytes);
                }
            }
            if fact.trained && fact.first >= start && fact.last == block {
                run.shared_trained = run.shared_trained.saturating_sub(fact.bytes);
                run.own_trained = run.own_trained.saturating_add(fact.bytes);
            }
        }
        for met in &self.inputs[block] {
            let outside = met.fact.made_by.is_none_or(|made_by| made_by < start);
            if outside && met.is_new(start) {
                run.received += met.fact.bytes;
                if met.fact.made_by.is_some() {
                    run.exchanged += met.fact.bytes;
                    run.arriving += met.fact.bytes;
                }
            }
        }
        let none = Affine::default();
        for output in &self.made[block] {
            run.exchanged += output.bytes;
            run.returned += if output.gradient { output.bytes } else { none };
        }
        for output in self.settled[block].iter().filter(|output| output.made_by >= start) {
            run.exchanged += negative(output.bytes);
            run.returned += if output.gradient { negative(output.bytes) } else { none };
        }
    }
}

fn empty<T>(num_blocks: usize) -> Vec<Vec<T>> {
    (0..num_blocks).map(|_| Vec::new()).collect()
}

fn meet<T: Copy>(by_block: &mut [Vec<Met<T>>], users: &[usize], fact: T) {
    let mut before = None;
    for &user in users {
        by_block[user].push(Met { before, fact });
        before = Some(user);
    }
}

/// The blocks that each cloned operator is needed in; none for operators of atoms.
fn clone_users(
    graph: &Graph,
    atoms: &Atoms,
    block_of: &[Option<usize>],
    num_blocks: usize,
) -> Vec<Option<FixedBitSet>> {
    let mut users: Vec<Option<FixedBitSet>> = graph
        .node_ids()
        .map(|id| atoms.of(id).is_none().then(|| FixedBitSet::with_capacity(num_blocks)))
        .collect();
    let mut pending: Vec<NodeId> = graph.node_ids().filter(|&id| atoms.of(id).is_some()).collect();
    while let Some(id) = pending.pop() {
        let mut blocks = users[id.index()].clone().unwrap_or_default();
        if let Some(block) = block_of[id.index()] {
            blocks.grow(num_blocks);
            blocks.insert(block);
        }
        for needed in atoms.cloned_with(graph, id) {
            let known = users[needed.index()].get_or_insert_default();
            if !blocks.is_subset(known) {
                known.union_with(&blocks);
                pending.push(needed);
            }
        }
    }
    users
}

/// Each number once, with how often it occurs.
fn counted(mut numbers: Vec<usize>) -> Vec<(usize, u64)> {
    numbers.sort_unstable();
    let runs = numbers.chunk_by(|a, b| a == b);
    runs.map(|run| (run[0], run.len() as u64)).collect()
}

/// The lines of which some is the highest at some number of rows, perhaps with a few others.
fn outermost(mut lines: Vec<Affine>) -> Vec<Affine> {
    lines.sort_unstable_by_key(|line| {
        (std::cmp::Reverse(line.per_row), std::cmp::Reverse(line.fixed))
    });
    let mut kept: Vec<Affine> = Vec::new();
    for line in lines {
        if kept.iter().all(|higher| higher.fixed < line.fixed) {
            kept.push(line);
        }
    }
    kept
}

fn negative(bytes: Affine) -> Affine {
    Affine { per_row: -bytes.per_row, fixed: -bytes.fixed }
}

fn fixed(bytes: u64) -> Affine {
    Affine::fixed(i64::try_from(bytes).unwrap_or(i64::MAX))
}

/// Workspace of an operator as a line over rows, as [`rannc_cost::working_bytes`] has it.
fn affine_working(graph: &Graph, node: NodeId, batch_rows: u64) -> Affine {
    let node = graph.node(node);
    let mut working = Affine::default();
    for &id in node.inputs.iter().chain(&node.outputs) {
        let value = graph.value(id);
        let bytes = affine_bytes(value, batch_rows);
        if !value.is_state() {
            working += bytes;
            working += bytes;
        } else if is_trained(graph, id) {
            working += bytes;
        }
    }
    working
}

/// The bytes of a value as a line over rows: exact with one dimension that holds rows; with several,
/// exact for the whole batch and too large below.
fn affine_bytes(value: &Value, batch_rows: u64) -> Affine {
    let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    if value.shape.iter().filter(|size| !size.is_fixed()).count() > 1 {
        return Affine::per_row(signed(value.bytes(batch_rows).div_ceil(batch_rows.max(1))));
    }
    let mut bytes = fixed(value.element_bytes());
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
