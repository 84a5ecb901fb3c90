//! Questions about a graph that several parts of the planner ask.

use fixedbitset::FixedBitSet;

use crate::{Graph, Node, NodeId, Value, ValueId};

/// Who reads each value.
#[derive(Clone, Debug)]
pub struct Users {
    users: Vec<Vec<NodeId>>,
}

impl Users {
    /// The operators that read a value, in topological order, each once.
    pub fn of(&self, value: ValueId) -> &[NodeId] {
        &self.users[value.index()]
    }
}

/// What a set of operators takes from outside and gives to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// Values read but not made inside, the model's state left out, ascending.
    pub inputs: Vec<ValueId>,
    /// Values made inside and read outside or returned by the model, ascending.
    pub outputs: Vec<ValueId>,
    /// Parameters, buffers and constants read, ascending.
    pub state: Vec<ValueId>,
}

impl Graph {
    /// The readers of every value.
    ///
    /// # Complexity
    ///
    /// Linear in the number of edges.
    pub fn users(&self) -> Users {
        let mut users: Vec<Vec<NodeId>> = vec![Vec::new(); self.values.len()];
        for id in self.node_ids() {
            for &input in &self.node(id).inputs {
                if users[input.index()].last() != Some(&id) {
                    users[input.index()].push(id);
                }
            }
        }
        Users { users }
    }

    /// The operators that depend on the model's inputs, directly or not. The others only handle
    /// weights, constants and sizes, and can be run again wherever they are needed.
    pub fn batch_nodes(&self) -> FixedBitSet {
        self.batch_nodes.clone()
    }

    /// What `nodes` takes from outside and gives to it.
    ///
    /// # Complexity
    ///
    /// Linear in the number of edges that touch `nodes`, plus one bit per value.
    pub fn cut(&self, nodes: &FixedBitSet, users: &Users) -> Cut {
        let mut cut = Cut::default();
        let mut seen = FixedBitSet::with_capacity(self.values.len());
        for index in nodes.ones() {
            let node = &self.nodes[index];
            for &id in &node.inputs {
                if seen.put(id.index()) {
                    continue;
                }
                if self.value(id).is_state() {
                    cut.state.push(id);
                } else if self.producer(id).is_none_or(|made| !nodes.contains(made.index())) {
                    cut.inputs.push(id);
                }
            }
            for &id in &node.outputs {
                let outside = users.of(id).iter().any(|user| !nodes.contains(user.index()));
                if outside || self.outputs.contains(&id) {
                    cut.outputs.push(id);
                }
            }
        }
        cut.inputs.sort_unstable();
        cut.outputs.sort_unstable();
        cut.state.sort_unstable();
        cut
    }
}

/// The operators that depend on `inputs`, found once for each graph.
pub(crate) fn batch_nodes(values: &[Value], nodes: &[Node], inputs: &[ValueId]) -> FixedBitSet {
    let mut dependent = FixedBitSet::with_capacity(values.len());
    dependent.extend(inputs.iter().map(|id| id.index()));
    let mut found = FixedBitSet::with_capacity(nodes.len());
    for (index, node) in nodes.iter().enumerate() {
        if node.inputs.iter().any(|id| dependent.contains(id.index())) {
            found.insert(index);
            dependent.extend(node.outputs.iter().map(|id| id.index()));
        }
    }
    found
}
