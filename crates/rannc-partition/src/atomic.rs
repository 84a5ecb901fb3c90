//! Operators to *atoms*, the smallest parts that a stage may hold.
//!
//! Every operator that depends on the batch is an atom of its own, with these exceptions:
//!
//! - operators that touch memory which is written to later share an atom with the writer, as only
//!   program order tells them apart; readers after the last write are free;
//! - all operators that touch a parameter, buffer or input that is written to share an atom, so
//!   that one stage owns it;
//! - atoms that then depend on each other in a circle become one.
//!
//! Operators that depend on no input of the model are in no atom: they are *cloned* into every
//! stage that needs them. Those that write to the model's buffers (`BatchNorm`'s counter) or
//! read what an atom writes are *pinned* to an atom instead: they must run once. A pinned operator
//! that nothing ties to an atom joins the first one of its module.

use std::collections::BTreeMap;

use fixedbitset::FixedBitSet;
use rannc_graph::{Graph, NodeId, Users};

use crate::order::{self, Edges};
use crate::storage::{WrittenStorage, written_storages};
use crate::union::DisjointSets;

/// The atoms of a graph, in a topological order close to the program's.
#[derive(Clone, Debug)]
pub struct Atoms {
    members: Vec<Vec<NodeId>>,
    atom_of: Vec<Option<usize>>,
    /// Cloned operators that only make sense together, by operator.
    clone_groups: BTreeMap<NodeId, Vec<NodeId>>,
    edges: Edges,
}

impl Atoms {
    /// Finds the atoms.
    ///
    /// # Complexity
    ///
    /// Linear in the number of edges but for the logarithm of a heap.
    pub fn new(graph: &Graph) -> Self {
        let mut builder = Builder::new(graph);
        builder.join_written(&written_storages(graph));
        builder.pin_lonely_outputs();
        builder.follow_pinned();
        builder.house_homeless();
        builder.finish()
    }

    /// How many atoms there are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether nothing depends on the batch.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The operators of an atom, ascending.
    pub fn members(&self, atom: usize) -> &[NodeId] {
        &self.members[atom]
    }

    /// The atom of an operator; none for those that are cloned.
    pub fn of(&self, node: NodeId) -> Option<usize> {
        self.atom_of[node.index()]
    }

    /// The operators of some atoms, and clones of what else they need.
    pub fn stage(&self, graph: &Graph, atoms: impl IntoIterator<Item = usize>) -> FixedBitSet {
        let mut nodes = FixedBitSet::with_capacity(graph.nodes().len());
        let mut pending: Vec<NodeId> =
            atoms.into_iter().flat_map(|atom| self.members[atom].iter().copied()).collect();
        while let Some(id) = pending.pop() {
            if !nodes.put(id.index()) {
                pending.extend(self.cloned_with(graph, id));
            }
        }
        nodes
    }

    /// The cloned operators that must be wherever `node` is.
    pub(crate) fn cloned_with<'a>(
        &'a self,
        graph: &'a Graph,
        node: NodeId,
    ) -> impl Iterator<Item = NodeId> + 'a {
        let read = graph.node(node).inputs.iter().filter_map(|&value| graph.producer(value));
        let group = self.clone_groups.get(&node).into_iter().flatten().copied();
        read.chain(group).filter(|&other| self.of(other).is_none())
    }

    /// The atoms that read what each atom makes.
    pub(crate) fn edges(&self) -> &Edges {
        &self.edges
    }
}

struct Builder<'a> {
    graph: &'a Graph,
    users: Users,
    batch_nodes: FixedBitSet,
    pinned: FixedBitSet,
    sets: DisjointSets,
    clone_groups: Vec<Vec<NodeId>>,
}

impl<'a> Builder<'a> {
    fn new(graph: &'a Graph) -> Self {
        Self {
            graph,
            users: graph.users(),
            batch_nodes: graph.batch_nodes(),
            pinned: FixedBitSet::with_capacity(graph.nodes().len()),
            sets: DisjointSets::new(graph.nodes().len()),
            clone_groups: Vec::new(),
        }
    }

    fn join_written(&mut self, storages: &[WrittenStorage]) {
        for storage in storages {
            let is_batch = |id: &NodeId| self.batch_nodes.contains(id.index());
            let before = storage.touching.partition_point(|&id| id <= storage.last_write);
            let joined: Vec<NodeId> = if storage.external {
                storage.touching.clone()
            } else if storage.touching[..before].iter().any(is_batch) {
                let after = storage.touching[before..].iter().filter(|id| !is_batch(id));
                storage.touching[..before].iter().chain(after).copied().collect()
            } else {
                self.clone_groups.push(storage.touching[..before].to_vec());
                continue;
            };
            self.pin_together(&joined);
        }
    }

    /// Puts operators in one atom; whether that changed anything.
    fn pin_together(&mut self, nodes: &[NodeId]) -> bool {
        let mut changed = self.sets.join_all(nodes.iter().map(|id| id.index()));
        for id in nodes.iter().filter(|id| !self.batch_nodes.contains(id.index())) {
            changed |= !self.pinned.put(id.index());
        }
        changed
    }

    /// Pins the operators that make a result of the model from weights alone, unless some atom
    /// needs them anyway.
    fn pin_lonely_outputs(&mut self) {
        let mut needed = FixedBitSet::with_capacity(self.graph.nodes().len());
        for index in (0..self.graph.nodes().len()).rev() {
            let node = &self.graph.nodes()[index];
            if self.batch_nodes.contains(index) || needed.contains(index) {
                let made = node.inputs.iter().filter_map(|&value| self.graph.producer(value));
                needed.extend(made.map(NodeId::index));
            }
        }
        for &output in self.graph.outputs() {
            let Some(made) = self.graph.producer(output) else { continue };
            if !self.batch_nodes.contains(made.index()) && !needed.contains(made.index()) {
                self.pinned.insert(made.index());
            }
        }
    }

    /// Pins what reads a pinned operator's results to the same atom: they never cross stages.
    fn follow_pinned(&mut self) {
        let groups = self.clone_groups.clone();
        let mut changed = true;
        while changed {
            changed = false;
            for id in self.graph.node_ids() {
                if !self.pinned.contains(id.index()) {
                    continue;
                }
                for output in &self.graph.node(id).outputs {
                    let mut together = vec![id];
                    together.extend(self.users.of(*output));
                    changed |= self.pin_together(&together);
                }
            }
            for group in &groups {
                if group.iter().any(|id| self.pinned.contains(id.index())) {
                    changed |= self.pin_together(group);
                }
            }
        }
    }

    /// Gives pinned operators without a batch operator beside them to the first one of their
    /// module, of the module around it, and so on.
    fn house_homeless(&mut self) {
        let mut first_of: BTreeMap<&str, usize> = BTreeMap::new();
        let mut housed = FixedBitSet::with_capacity(self.graph.nodes().len());
        for index in self.batch_nodes.ones() {
            housed.insert(self.sets.find(index));
            for module in modules_around(&self.graph.nodes()[index].module) {
                first_of.entry(module).or_insert(index);
            }
        }
        let first_pinned = self.pinned.ones().next();
        for index in self.pinned.clone().ones() {
            if housed.contains(self.sets.find(index)) {
                continue;
            }
            let mut modules = modules_around(&self.graph.nodes()[index].module);
            let home = modules.find_map(|module| first_of.get(module).copied()).or(first_pinned);
            self.sets.join(index, home.expect("there is a pinned operator: this one"));
            housed.insert(self.sets.find(index));
        }
    }

    fn finish(mut self) -> Atoms {
        let num_nodes = self.graph.nodes().len();
        let owned: Vec<usize> = (0..num_nodes)
            .filter(|&index| self.batch_nodes.contains(index) || self.pinned.contains(index))
            .collect();
        let mut set_of = vec![None; num_nodes];
        for &index in &owned {
            set_of[index] = Some(self.sets.find(index));
        }
        // Sets are numbered by their lowest member; the numbers between stand for nothing.
        let component = order::components(&edges_between(self.graph, &set_of, num_nodes));
        let mut atom_of_component = vec![None; num_nodes];
        let mut early = vec![None; num_nodes];
        let mut num_atoms = 0;
        for &index in &owned {
            let component = component[set_of[index].expect("owned operators are in a set")];
            early[index] = Some(*atom_of_component[component].get_or_insert_with(|| {
                num_atoms += 1;
                num_atoms - 1
            }));
        }
        self.ordered(&early, num_atoms)
    }

    /// Renumbers atoms in topological order.
    fn ordered(self, early: &[Option<usize>], num_atoms: usize) -> Atoms {
        let order = order::lowest_first(&edges_between(self.graph, early, num_atoms));
        let mut position = vec![0; num_atoms];
        for (index, &atom) in order.iter().enumerate() {
            position[atom] = index;
        }
        let atom_of: Vec<Option<usize>> =
            early.iter().map(|atom| atom.map(|atom| position[atom])).collect();
        let mut members = vec![Vec::new(); num_atoms];
        for (index, atom) in atom_of.iter().enumerate() {
            if let Some(atom) = *atom {
                members[atom].push(NodeId::new(index));
            }
        }
        let mut clone_groups: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::new();
        for group in &self.clone_groups {
            for &id in group {
                clone_groups.entry(id).or_default().extend(group);
            }
        }
        let edges = edges_between(self.graph, &atom_of, num_atoms);
        Atoms { members, atom_of, clone_groups, edges }
    }
}

/// The module, the module around it, and so on to the model itself, whose name is empty.
fn modules_around(module: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(module), |inner| {
        if inner.is_empty() {
            return None;
        }
        Some(inner.rsplit_once('.').map_or("", |(outer, _)| outer))
    })
}

/// Which group reads what each group makes.
fn edges_between(graph: &Graph, group_of: &[Option<usize>], num_groups: usize) -> Edges {
    let mut edges: Edges = vec![Vec::new(); num_groups];
    for (node, to) in graph.nodes().iter().zip(group_of) {
        let Some(to) = *to else { continue };
        for made in node.inputs.iter().filter_map(|&value| graph.producer(value)) {
            if let Some(from) = group_of[made.index()].filter(|&from| from != to) {
                edges[from].push(to);
            }
        }
    }
    for successors in &mut edges {
        successors.sort_unstable();
        successors.dedup();
    }
    edges
}

#[cfg(test)]
pub(crate) mod tests;
