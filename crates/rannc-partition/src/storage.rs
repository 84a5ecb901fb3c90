//! Storages that operators write to, and who touches them.
//!
//! A captured graph is not functional: `relu_` writes into the tensor it reads, a view shows
//! another tensor's memory. Values that share memory form one *storage*.

use rannc_graph::{Graph, NodeId, ValueKind};

use crate::union::DisjointSets;

/// Memory that at least one operator writes to after it came to be.
#[derive(Clone, Debug)]
pub(crate) struct WrittenStorage {
    /// The operators that make, read or write any value of it, ascending.
    pub(crate) touching: Vec<NodeId>,
    /// The last operator that writes to it.
    pub(crate) last_write: NodeId,
    /// Whether it belongs to the model or to the caller, hence outlives the step or is handed to
    /// every stage.
    pub(crate) external: bool,
}

/// The storages that are written to, by their lowest value.
///
/// # Complexity
///
/// Linear, nearly, in the number of edges.
pub(crate) fn written_storages(graph: &Graph) -> Vec<WrittenStorage> {
    let mut sets = DisjointSets::new(graph.values().len());
    for node in graph.nodes().iter().filter(|node| !node.aliases.is_empty()) {
        sets.join_all(node.aliases.iter().chain(&node.outputs).map(|value| value.index()));
    }
    let mut written: Vec<Option<WrittenStorage>> = vec![None; graph.values().len()];
    for id in graph.node_ids() {
        for value in &graph.node(id).mutates {
            let storage = &mut written[sets.find(value.index())];
            let touching = Vec::new();
            *storage = Some(WrittenStorage { touching, last_write: id, external: false });
        }
    }
    for id in graph.node_ids() {
        let node = graph.node(id);
        for value in node.inputs.iter().chain(&node.outputs) {
            let Some(storage) = &mut written[sets.find(value.index())] else { continue };
            if storage.touching.last() != Some(&id) {
                storage.touching.push(id);
            }
        }
    }
    for id in graph.value_ids() {
        if graph.value(id).kind == ValueKind::Activation {
            continue;
        }
        if let Some(storage) = &mut written[sets.find(id.index())] {
            storage.external = true;
        }
    }
    written.into_iter().flatten().collect()
}
