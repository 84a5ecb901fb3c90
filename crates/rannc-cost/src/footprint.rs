//! How much memory a stage takes at each moment of its forward and backward.
//!
//! [`StageSizes`](crate::StageSizes) adds up what is there at one time or another, which is quick and
//! never too low; a [`Footprint`] plays the stage operator by operator, which is closer. A tensor
//! lives from the operator that makes it to the last that needs it: a reader, or the backward of an
//! operator that saved it. Which tensors an operator saves is told from their sizes and
//! [`Node::saved_bytes`](rannc_graph::Node::saved_bytes); the backward of an operator makes the
//! gradients of its operands, but for views and additions, which hand on the gradient they get.
//! Memory that an operator allocates and frees inside does not count.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use rannc_graph::{Graph, Node, NodeId, ValueId};

use crate::is_trained;

/// What a stage takes for one microbatch, in bytes, parameters left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Kept from the forward to the backward, inputs that have gradients included.
    pub saved: u64,
    /// The most at any time of the forward.
    pub forward: u64,
    /// The most at any time of the first backward, in which gradients of parameters come to be,
    /// without the gradients that it is given.
    pub first_backward: u64,
    /// The same for those that follow, without the gradients of parameters that are there already.
    pub later_backward: u64,
    /// Gradients of the parameters.
    pub gradients: u64,
}

/// What a footprint is taken of.
#[derive(Clone, Copy, Debug)]
pub struct StageWork<'a> {
    /// All operators, in the order in which they run; each group of `recompute` is together.
    pub nodes: &'a [NodeId],
    /// Values that it is given.
    pub inputs: &'a [ValueId],
    /// Values that it gives.
    pub outputs: &'a [ValueId],
    /// Operators that run again in the backward.
    pub recompute: &'a [Vec<NodeId>],
}

impl Footprint {
    /// The footprint of a stage that runs `rows` rows.
    ///
    /// # Complexity
    ///
    /// Linear in the edges of the stage but for the logarithm of ordered maps.
    pub fn of(graph: &Graph, work: &StageWork<'_>, rows: u64) -> Self {
        let mut walk = Walk::new(graph, work, rows);
        walk.find_kept();
        let forward = walk.forward();
        let saved = walk.saved();
        Self {
            saved,
            forward: forward.max(saved),
            first_backward: walk.backward(true).max(saved),
            later_backward: walk.backward(false).max(saved),
            gradients: walk.gradients(),
        }
    }
}

/// Operators that run one after the other: a group, or one alone.
struct Unit<'a> {
    nodes: &'a [NodeId],
    again: bool,
}

/// What an operator's backward needs.
#[derive(Clone, Default)]
struct Kept {
    /// Memory of values.
    storages: Vec<ValueId>,
    /// Memory that no value shows.
    inner: u64,
}

struct Walk<'a> {
    graph: &'a Graph,
    work: &'a StageWork<'a>,
    rows: u64,
    units: Vec<Unit<'a>>,
    /// The value whose memory a value shows.
    storage_of: BTreeMap<ValueId, ValueId>,
    /// What each unit keeps until its backward; for a group what it is given.
    kept: Vec<Kept>,
    /// What the operators of groups keep once they have run again.
    kept_again: BTreeMap<NodeId, Kept>,
}

impl<'a> Walk<'a> {
    fn new(graph: &'a Graph, work: &'a StageWork<'a>, rows: u64) -> Self {
        let mut first_of: BTreeMap<NodeId, &[NodeId]> = BTreeMap::new();
        for group in work.recompute.iter().filter(|group| !group.is_empty()) {
            first_of.insert(group[0], group);
        }
        let mut units = Vec::new();
        let mut position = 0;
        while position < work.nodes.len() {
            let group = first_of.get(&work.nodes[position]).copied();
            let nodes = group.unwrap_or(&work.nodes[position..=position]);
            units.push(Unit { nodes, again: group.is_some() });
            position += nodes.len();
        }
        let mut storage_of = BTreeMap::new();
        for node in work.nodes.iter().map(|&id| graph.node(id)) {
            if let Some(shown) = node.aliases.first() {
                let storage = storage_of.get(shown).copied().unwrap_or(*shown);
                storage_of.extend(node.outputs.iter().map(|&output| (output, storage)));
            }
        }
        let kept = vec![Kept::default(); units.len()];
        Self { graph, work, rows, units, storage_of, kept, kept_again: BTreeMap::new() }
    }

    fn storage(&self, value: ValueId) -> ValueId {
        self.storage_of.get(&value).copied().unwrap_or(value)
    }

    /// Bytes of a value that the step makes or is given; nothing for the model's own.
    fn bytes(&self, value: ValueId) -> u64 {
        let value = self.graph.value(value);
        if value.is_state() { 0 } else { value.bytes(self.rows) }
    }

    fn total(&self, values: impl IntoIterator<Item = ValueId>) -> u64 {
        values.into_iter().map(|value| self.bytes(value)).fold(0, u64::saturating_add)
    }

    /// The memory that an operator touches, each once, what its backward rather looks at first.
    fn touched(&self, node: &Node) -> Vec<ValueId> {
        let (outputs, inputs) = (&node.outputs, &node.inputs);
        let (first, second) =
            if keeps_results(node) { (outputs, inputs) } else { (inputs, outputs) };
        let mut found = Vec::new();
        for &value in first.iter().chain(second) {
            let storage = self.storage(value);
            if !found.contains(&storage) && self.bytes(storage) > 0 {
                found.push(storage);
            }
        }
        found
    }

    /// Finds what is kept for the backward.
    fn find_kept(&mut self) {
        let mut known: Vec<ValueId> = Vec::new();
        let mut inside: Vec<ValueId> = Vec::new();
        for position in 0..self.units.len() {
            let Unit { nodes, again } = self.units[position];
            let mut given = Vec::new();
            let made: Vec<ValueId> =
                nodes.iter().flat_map(|&id| self.graph.node(id).outputs.iter().copied()).collect();
            for &id in nodes {
                let node = self.graph.node(id);
                // The first who saves memory is charged for it; it may be one who does so later.
                let touched = self.touched(node);
                let again_saved =
                    touched.iter().copied().filter(|s| !again && inside.contains(s)).collect();
                let kept = self.matching(node, &touched, &known);
                if again {
                    given.extend(touched.iter().copied().filter(|s| !made.contains(s)));
                    inside.extend(kept.storages.iter().copied());
                    self.kept_again.insert(id, kept);
                } else {
                    known.extend(kept.storages.iter().copied());
                    let all: Vec<ValueId> = [kept.storages, again_saved].concat();
                    inside.retain(|storage| !all.contains(storage));
                    self.kept[position] = Kept { storages: all, inner: kept.inner };
                }
            }
            given.sort_unstable();
            given.dedup();
            given.retain(|storage| !known.contains(storage));
            if again {
                known.extend(given.iter().copied());
                self.kept[position].storages = given;
            }
        }
    }

    /// What of the memory that an operator touches adds up to what it saves: exactly if there is
    /// such a choice, else the largest that fit.
    fn matching(&self, node: &Node, touched: &[ValueId], known: &[ValueId]) -> Kept {
        const MOST: usize = 10;
        let saved = node.saved_bytes.at(self.rows);
        if self.inner_bytes(node) > 0 {
            return Kept { storages: Vec::new(), inner: saved };
        }
        let mut fresh: Vec<ValueId> =
            touched.iter().copied().filter(|storage| !known.contains(storage)).collect();
        fresh.truncate(MOST);
        let chosen = |mask: usize| {
            fresh
                .iter()
                .copied()
                .enumerate()
                .filter_map(move |(i, s)| (mask >> i & 1 == 1).then_some(s))
        };
        let best = (0..1_usize << fresh.len())
            .filter(|&mask| self.total(chosen(mask)) <= saved)
            .max_by_key(|&mask| (self.total(chosen(mask)), std::cmp::Reverse(mask)));
        let storages: Vec<ValueId> = best.map(|mask| chosen(mask).collect()).unwrap_or_default();
        let inner = saved.saturating_sub(self.total(storages.iter().copied()));
        Kept { storages, inner }
    }

    /// What an operator that torch makes of two others hands from one to the other, in the backward
    /// as in the forward: the logarithms of a cross entropy.
    fn inner_bytes(&self, node: &Node) -> u64 {
        let made_of_two = node.op.starts_with("aten.cross_entropy_loss.");
        node.inputs.first().filter(|_| made_of_two).map_or(0, |&id| self.bytes(id))
    }

    /// Inputs that have gradients are kept as they are.
    fn leaves(&self) -> Vec<ValueId> {
        let leaf = |id: &&ValueId| self.graph.value(**id).requires_grad;
        self.work.inputs.iter().filter(leaf).copied().collect()
    }

    fn is_kept(&self) -> Vec<ValueId> {
        let mut kept = self.leaves();
        kept.extend(self.kept.iter().flat_map(|kept| kept.storages.iter().copied()));
        kept.sort_unstable();
        kept.dedup();
        kept
    }

    fn saved(&self) -> u64 {
        let inner = self.kept.iter().map(|kept| kept.inner).fold(0, u64::saturating_add);
        self.total(self.is_kept()).saturating_add(inner)
    }

    /// The most that is alive at any time of the forward.
    fn forward(&self) -> u64 {
        let kept = self.is_kept();
        let mut last: BTreeMap<ValueId, usize> = BTreeMap::new();
        for (position, &id) in self.work.nodes.iter().enumerate() {
            for storage in self.touched(self.graph.node(id)) {
                last.insert(storage, position);
            }
        }
        let stays = |storage: &ValueId| {
            kept.binary_search(storage).is_ok()
                || self.work.outputs.iter().any(|&output| self.storage(output) == *storage)
                || self.work.inputs.contains(storage)
        };
        let mut alive = self.total(self.work.inputs.iter().copied());
        let mut most = alive;
        let mut position = 0;
        for (unit, kept) in self.units.iter().zip(&self.kept) {
            for &id in unit.nodes {
                let node = self.graph.node(id);
                let own = |value: &&ValueId| self.storage(**value) == **value;
                alive += self.total(node.outputs.iter().filter(own).copied());
                if !unit.again {
                    alive += kept.inner;
                }
                most = most.max(alive);
                for storage in self.touched(node) {
                    if last[&storage] == position && !stays(&storage) {
                        alive = alive.saturating_sub(self.bytes(storage));
                    }
                }
                position += 1;
            }
        }
        most
    }

    fn gradients(&self) -> u64 {
        let mut trained: Vec<ValueId> = self.trained(self.work.nodes);
        trained.sort_unstable();
        trained.dedup();
        trained.iter().map(|&id| self.graph.value(id).bytes(0)).fold(0, u64::saturating_add)
    }

    fn trained(&self, nodes: &[NodeId]) -> Vec<ValueId> {
        let read = nodes.iter().flat_map(|&id| self.graph.node(id).inputs.iter().copied());
        read.filter(|&id| is_trained(self.graph, id)).collect()
    }

    /// The most that is alive at any time of the backward, in which the parameters' gradients are
    /// made to stay (the first one) or to be added to those that are there.
    fn backward(&self, first: bool) -> u64 {
        let leaves = self.leaves();
        let mut state = Backward { alive: self.saved(), ..Backward::default() };
        state.most = state.alive;
        let seeds = self.work.outputs.iter().filter(|&&id| self.graph.value(id).requires_grad);
        // Seeds are somebody else's memory, and gone with the whole backward.
        state.gradients.extend(seeds.map(|&id| (id, 0)));
        for (unit, kept) in self.units.iter().zip(&self.kept).rev() {
            if unit.again {
                for id in unit.nodes {
                    let again = &self.kept_again[id];
                    let own = again.storages.iter().copied().filter(|s| !kept.storages.contains(s));
                    state.alive += self.total(own).saturating_add(again.inner);
                }
                state.most = state.most.max(state.alive);
            }
            for &id in unit.nodes.iter().rev() {
                self.differentiate(id, first, &mut state);
                if let Some(again) = self.kept_again.get(&id) {
                    let own = again.storages.iter().copied().filter(|s| !kept.storages.contains(s));
                    state.alive =
                        state.alive.saturating_sub(self.total(own).saturating_add(again.inner));
                }
            }
            let freed = kept.storages.iter().copied().filter(|storage| !leaves.contains(storage));
            state.alive = state.alive.saturating_sub(self.total(freed).saturating_add(kept.inner));
        }
        state.most
    }

    fn differentiate(&self, id: NodeId, first: bool, state: &mut Backward) {
        let node = self.graph.node(id);
        let given: Vec<(ValueId, u64)> = node
            .outputs
            .iter()
            .filter_map(|&output| state.gradients.remove(&output).map(|bytes| (output, bytes)))
            .collect();
        if given.is_empty() {
            return;
        }
        let mut to_free = given.iter().map(|&(_, bytes)| bytes).fold(0, u64::saturating_add);
        let mut inputs: Vec<ValueId> = node.inputs.clone();
        inputs.sort_unstable();
        inputs.dedup();
        let (mut made, mut passing) = (self.inner_bytes(node), self.inner_bytes(node));
        for input in inputs {
            let value = self.graph.value(input);
            if !value.requires_grad {
                continue;
            }
            let bytes = value.bytes(self.rows);
            if is_trained(self.graph, input) {
                let stays = first && state.trained.insert(input);
                made += bytes;
                passing += if stays { 0 } else { bytes };
                continue;
            }
            let same_size = bytes == self.graph.value(given[0].0).bytes(self.rows);
            match state.gradients.entry(input) {
                Entry::Occupied(_) => {
                    made += bytes;
                    passing += bytes;
                }
                // Whoever is left last pays for the memory that both operands' gradients are.
                Entry::Vacant(entry) if hands_on(node) && same_size => {
                    entry.insert(std::mem::take(&mut to_free));
                }
                Entry::Vacant(entry) => {
                    made += bytes;
                    entry.insert(bytes);
                }
            }
        }
        state.alive += made;
        state.most = state.most.max(state.alive);
        state.alive = state.alive.saturating_sub(passing.saturating_add(to_free));
    }
}

/// A backward under way.
#[derive(Default)]
struct Backward {
    alive: u64,
    most: u64,
    /// The gradients that are there, with the memory that goes with them.
    gradients: BTreeMap<ValueId, u64>,
    trained: std::collections::BTreeSet<ValueId>,
}

/// Whether an operator's backward looks at its results instead of its operands: the ones whose formulas in
/// PyTorch's `derivatives.yaml` name `result`, or `output`, and no operand.
fn keeps_results(node: &Node) -> bool {
    const KEEPING: [&str; 14] = [
        "relu",
        "relu_",
        "sigmoid",
        "sigmoid_",
        "tanh",
        "tanh_",
        "softmax",
        "_softmax",
        "log_softmax",
        "_log_softmax",
        "exp",
        "sqrt",
        "rsqrt",
        "reciprocal",
    ];
    let name = node.op.split('.').nth(1).unwrap_or_default();
    KEEPING.contains(&name)
}

/// Whether an operator's operands get the very gradient of its result.
fn hands_on(node: &Node) -> bool {
    !node.aliases.is_empty() || node.op.starts_with("aten.add.")
}

#[cfg(test)]
mod tests {
    use rannc_graph::{Graph, NodeId, testing};

    use super::{Footprint, StageWork};

    fn whole(graph: &Graph, recompute: &[Vec<NodeId>]) -> Footprint {
        let nodes: Vec<NodeId> = graph.node_ids().collect();
        let (inputs, outputs) = (graph.inputs(), graph.outputs());
        Footprint::of(graph, &StageWork { nodes: &nodes, inputs, outputs, recompute }, 2)
    }

    #[test]
    fn a_chain_keeps_what_each_operator_saves() {
        let graph = testing::chain(4, 8);
        let (activation, weight) = (2 * 8 * 4, 8 * 8 * 4);
        let found = whole(&graph, &[]);
        assert_eq!(found.gradients, 4 * weight);
        // Each operator of the test saves as much as it is given.
        assert_eq!(found.saved, 4 * activation);
        assert_eq!(found.forward, 5 * activation);
        // At the end all of the parameters' gradients, the last saved value, and the gradient of
        // the one before are there; no input has a gradient.
        assert_eq!(found.first_backward, 4 * weight + 2 * activation);
        assert_eq!(found.later_backward, 4 * activation + activation + weight);
    }

    #[test]
    fn groups_keep_what_they_are_given() {
        let graph = testing::chain(4, 8);
        let activation = 2 * 8 * 4;
        let ids = |range: std::ops::Range<usize>| range.map(NodeId::new).collect::<Vec<_>>();
        let found = whole(&graph, &[ids(0..2), ids(2..4)]);
        // The model's input, and what the second group reads of the first.
        assert_eq!(found.saved, 2 * activation);
        assert!(found.later_backward < whole(&graph, &[]).later_backward + activation);
    }
}
