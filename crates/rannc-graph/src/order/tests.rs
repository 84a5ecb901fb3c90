use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{Step, canonical_order};
use crate::testing::graphs;
use crate::{Graph, Node, Value, ValueId};

/// What tells an operator apart from others, wherever it stands: no ordinal, no number of a value.
fn step(graph: &Graph, node: &Node) -> Step {
    let (mut label, mut reads) = (format!("{} {}", node.module, node.op), Vec::new());
    for &input in &node.inputs {
        match graph.producer(input) {
            Some(made) => reads.push(made.index()),
            None => label.push_str(&graph.value(input).name),
        }
    }
    for (position, output) in graph.outputs().iter().enumerate() {
        if node.outputs.contains(output) {
            label = format!("{label} result {position}");
        }
    }
    let place = node
        .module
        .bytes()
        .take(node.flops.per_row as usize % 3)
        .map(|byte| (byte.into(), byte % 2 == 0))
        .collect();
    Step { place, label, reads, after: vec![] }
}

/// The graph with its operators in another order, as a capture of it would write it.
fn rewritten(graph: &Graph, order: &[usize]) -> Graph {
    let mut values: Vec<Value> =
        graph.values().iter().filter(|value| value.name.starts_with(['p', 'x'])).cloned().collect();
    let mut ids: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for id in graph.value_ids().filter(|&id| graph.producer(id).is_none()) {
        ids.insert(id, ValueId::new(ids.len()));
    }
    let mut ordinals: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut nodes = Vec::new();
    for node in order.iter().map(|&index| &graph.nodes()[index]) {
        for &output in &node.outputs {
            ids.insert(output, ValueId::new(values.len()));
            values
                .push(Value { name: format!("v{}", values.len()), ..graph.value(output).clone() });
        }
        let ordinal = ordinals.entry((&node.module, &node.op)).or_default();
        let key = format!("{}/{}#{ordinal}", node.module, node.op);
        *ordinal += 1;
        let renamed = |values: &[ValueId]| values.iter().map(|id| ids[id]).collect();
        let (inputs, outputs) = (renamed(&node.inputs), renamed(&node.outputs));
        nodes.push(Node { key, inputs, outputs, ..node.clone() });
    }
    let [inputs, outputs] =
        [graph.inputs(), graph.outputs()].map(|all| all.iter().map(|id| ids[id]).collect());
    let (name, batch) = (graph.name().into(), graph.batch().clone());
    Graph::new(name, batch, values, nodes, inputs, outputs).expect("it is in topological order")
}

/// What the results need of a random graph, with many operators in one module.
fn needed() -> impl Strategy<Value = Graph> {
    graphs(24).prop_map(|graph| {
        let mut needed = vec![false; graph.nodes().len()];
        needed[graph.nodes().len() - 1] = true;
        for (index, node) in graph.nodes().iter().enumerate().rev() {
            for made in node.inputs.iter().filter_map(|&id| graph.producer(id)) {
                needed[made.index()] |= needed[index];
            }
        }
        let mut coarse = graph.clone();
        coarse
            .nodes
            .iter_mut()
            .for_each(|node| node.module = format!("m{}", node.flops.per_row % 2));
        let order: Vec<usize> = (0..needed.len()).filter(|&index| needed[index]).collect();
        rewritten(&coarse, &order)
    })
}

/// Another topological order: of what is free, `choices` say which comes next.
fn shuffled(graph: &Graph, choices: &[u64]) -> Vec<usize> {
    let mut order: Vec<usize> = Vec::new();
    let mut left: Vec<usize> = (0..graph.nodes().len()).collect();
    while !left.is_empty() {
        let is_free = |&index: &usize| {
            let inputs = graph.nodes()[index].inputs.iter();
            inputs.filter_map(|&id| graph.producer(id)).all(|made| order.contains(&made.index()))
        };
        let free: Vec<usize> = left.iter().copied().filter(is_free).collect();
        let choice = choices[order.len() % choices.len()] as usize % free.len();
        left.retain(|&index| index != free[choice]);
        order.push(free[choice]);
    }
    order
}

fn canonical(graph: &Graph) -> Graph {
    let steps: Vec<Step> = graph.nodes().iter().map(|node| step(graph, node)).collect();
    rewritten(graph, &canonical_order(&steps))
}

proptest! {
    #[test]
    fn the_order_of_the_run_does_not_show(graph in needed(), choices in prop::collection::vec(any::<u64>(), 1..24)) {
        let other = rewritten(&graph, &shuffled(&graph, &choices));
        prop_assert_eq!(canonical(&graph).to_json(), canonical(&other).to_json());
        prop_assert_eq!(canonical(&graph).fingerprint(), canonical(&other).fingerprint());
        prop_assert_eq!(canonical(&graph).identity(), canonical(&other).identity());
    }
}

fn at(place: &[u32], label: &str, reads: &[usize]) -> Step {
    let place = place.iter().map(|&number| (number, number % 10 == 0)).collect();
    Step { place, label: label.into(), reads: reads.into(), after: vec![] }
}

#[test]
fn a_program_without_sets_keeps_its_order() {
    // Two loops one after the other, in the second one what the first has made; then a step over all.
    let mut steps = vec![at(&[0], "begin", &[])];
    for iteration in 0..12 {
        let before = steps.len() - 1;
        let input = if iteration == 0 { 0 } else { before };
        steps.push(at(&[10, 1], &format!("select {iteration:02}"), &[0]));
        steps.push(at(&[10, 2], "cell", &[before + 1, input]));
    }
    for iteration in 0..12 {
        let input = steps.len() - 1;
        steps.push(at(&[20, 1], "second cell", &[2 + 2 * iteration, input]));
        steps.push(at(&[20, 3], "head", &[input + 1]));
    }
    steps.push(at(&[30], "early", &[]));
    steps.push(at(&[40], "end", &(0..24).map(|index| 25 + index).collect::<Vec<_>>()));
    assert_eq!(canonical_order(&steps), (0..steps.len()).collect::<Vec<_>>());
}

#[test]
fn what_writes_keeps_its_place() {
    let mut write = at(&[1], "add_", &[0]);
    write.after = vec![1];
    let steps = [at(&[2], "make", &[]), at(&[3], "read", &[0]), write];
    assert_eq!(canonical_order(&steps), [0, 1, 2]);
}

#[test]
fn steps_out_of_order_are_no_panic() {
    assert_eq!(canonical_order(&[at(&[], "a", &[1, 7]), at(&[], "b", &[1])]), [0, 1]);
}
