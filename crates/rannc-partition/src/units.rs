//! Parts of a stage that run one after the other, each with only its own parameters whole.
//!
//! The operators of a stage, in the order in which they run, are cut into runs that read about equally
//! many bytes of divided parameters. A run is closed as soon as it has its part, so it has at most that
//! and what the operators have between two places where a cut is possible: not within a group that is
//! computed again, nor between operators that share memory which one of them writes to.

use std::collections::BTreeSet;

use fixedbitset::FixedBitSet;
use rannc_graph::{Graph, NodeId, Users, ValueId};

use crate::recompute::Arrangement;
use crate::storage::written_storages;

/// Into how many units a stage is cut, about: twice as many would save little more memory, and send twice
/// as many messages.
pub(crate) const UNITS: u64 = 8;

/// A part of a stage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unit {
    /// Its operators in the order in which they run.
    pub nodes: Vec<NodeId>,
    /// Values it is given, ascending.
    pub inputs: Vec<ValueId>,
    /// Values it hands on to later units or out of the stage, ascending.
    pub outputs: Vec<ValueId>,
}

/// Cuts a stage into units by the bytes of divided parameters that they read.
///
/// `outputs` are the values that the stage hands on.
///
/// # Complexity
///
/// Linear, nearly, in the size of the graph.
pub fn units(
    graph: &Graph,
    users: &Users,
    stage: &Arrangement,
    outputs: &[ValueId],
    is_divided: impl Fn(ValueId) -> bool,
) -> Vec<Unit> {
    let all = bytes(graph, &stage.order, &is_divided);
    let limit = all.div_ceil(UNITS).max(1);
    let together = together(graph, stage);
    let mut runs: Vec<Vec<NodeId>> = vec![Vec::new()];
    let (mut read, mut size) = (BTreeSet::new(), 0_u64);
    for (position, &node) in stage.order.iter().enumerate() {
        if !together.contains(position) && size >= limit {
            runs.push(Vec::new());
            read.clear();
            size = 0;
        }
        for &id in &graph.node(node).inputs {
            if is_divided(id) && read.insert(id) {
                size = size.saturating_add(graph.value(id).bytes(1));
            }
        }
        runs.last_mut().expect("there is always one").push(node);
    }
    let mut units: Vec<Unit> = runs.into_iter().map(|run| unit(graph, users, run)).collect();
    let last = units.len() - 1;
    for index in 0..=last {
        let later: BTreeSet<ValueId> =
            units[index + 1..].iter().flat_map(|unit| unit.inputs.iter().copied()).collect();
        units[index].outputs.retain(|id| later.contains(id) || outputs.contains(id));
    }
    let returned = outputs.iter().filter(|&&id| graph.value(id).is_state());
    units[last].outputs.extend(returned.copied());
    units[last].outputs.sort_unstable();
    units
}

/// The most bytes of trained parameters that a unit reads.
pub fn most_gathered(graph: &Graph, units: &[Unit], is_divided: impl Fn(ValueId) -> bool) -> u64 {
    units.iter().map(|unit| bytes(graph, &unit.nodes, &is_divided)).max().unwrap_or(0)
}

/// Bytes of the divided parameters that the operators read, each once.
fn bytes(graph: &Graph, nodes: &[NodeId], is_divided: &impl Fn(ValueId) -> bool) -> u64 {
    let read = nodes.iter().flat_map(|&id| graph.node(id).inputs.iter().copied());
    let divided: BTreeSet<ValueId> = read.filter(|&id| is_divided(id)).collect();
    divided.into_iter().map(|id| graph.value(id).bytes(1)).fold(0, u64::saturating_add)
}

/// The positions that must be in one unit with the position before.
fn together(graph: &Graph, stage: &Arrangement) -> FixedBitSet {
    let mut position = vec![None; graph.nodes().len()];
    for (index, node) in stage.order.iter().enumerate() {
        position[node.index()] = Some(index);
    }
    let mut together = FixedBitSet::with_capacity(stage.order.len());
    let storages = written_storages(graph);
    let written = storages.iter().map(|storage| &storage.touching);
    for nodes in written.chain(&stage.groups) {
        let places = || nodes.iter().filter_map(|node| position[node.index()]);
        if let (Some(first), Some(last)) = (places().min(), places().max()) {
            together.insert_range(first + 1..last + 1);
        }
    }
    together
}

fn unit(graph: &Graph, users: &Users, nodes: Vec<NodeId>) -> Unit {
    let mut set = FixedBitSet::with_capacity(graph.nodes().len());
    set.extend(nodes.iter().map(|node| node.index()));
    let cut = graph.cut(&set, users);
    Unit { nodes, inputs: cut.inputs, outputs: cut.outputs }
}

#[cfg(test)]
mod tests {
    use fixedbitset::FixedBitSet;
    use rannc_cost::is_trained;
    use rannc_graph::testing;

    use super::{UNITS, most_gathered, units};
    use crate::recompute::Arrangement;

    #[test]
    fn a_chain_is_cut_into_equal_units() {
        let graph = testing::chain(16, 8);
        let mut all = FixedBitSet::with_capacity(16);
        all.insert_range(..);
        let stage = Arrangement::plain(&all);
        let divided = |id| is_trained(&graph, id);
        let cut = units(&graph, &graph.users(), &stage, graph.outputs(), divided);
        assert_eq!(cut.len() as u64, UNITS);
        assert!(cut.iter().all(|unit| unit.nodes.len() == 2 && unit.inputs.len() == 1));
        assert!(cut.windows(2).all(|pair| pair[0].outputs == pair[1].inputs));
        assert_eq!(most_gathered(&graph, &cut, divided), 2 * 8 * 8 * 4);
    }

    #[test]
    fn a_group_stays_in_one_unit() {
        let graph = testing::chain(8, 8);
        let mut all = FixedBitSet::with_capacity(8);
        all.insert_range(..);
        let mut stage = Arrangement::plain(&all);
        stage.groups = vec![stage.order[2..6].to_vec()];
        let divided = |id| is_trained(&graph, id);
        let cut = units(&graph, &graph.users(), &stage, graph.outputs(), divided);
        let sizes: Vec<usize> = cut.iter().map(|unit| unit.nodes.len()).collect();
        assert_eq!(sizes, [1, 1, 4, 1, 1]);
    }
}
