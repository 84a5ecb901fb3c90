use fixedbitset::FixedBitSet;
use proptest::prelude::*;
use rannc_graph::{Affine, Batch, Graph, Node, NodeId, Rows, Value, ValueId, ValueKind, testing};

use super::Atoms;

/// A graph of `(key, inputs, outputs, mutates, aliases)`; `x` is the input, names that start with
/// `b` are buffers.
pub(crate) fn graph(nodes: &[(&str, &str, &str, &str, &str)], outputs: &str) -> Graph {
    let mut values: Vec<Value> = Vec::new();
    let mut made: Vec<Node> = Vec::new();
    let mut id = |name: &str| {
        if let Some(index) = values.iter().position(|value| value.name == name) {
            return ValueId::new(index);
        }
        let kind = match &name[..1] {
            "x" => ValueKind::Input,
            "b" => ValueKind::Buffer,
            _ => ValueKind::Activation,
        };
        values.push(Value {
            name: name.into(),
            kind,
            dtype: "float32".into(),
            shape: vec![Affine::fixed(4)],
            rows: Rows::None,
            requires_grad: false,
        });
        ValueId::new(values.len() - 1)
    };
    let mut ids = |names: &str| names.split_whitespace().map(&mut id).collect::<Vec<_>>();
    let inputs = ids("x");
    for (key, reads, makes, mutates, aliases) in nodes {
        made.push(Node {
            key: (*key).into(),
            op: "op".into(),
            module: key.split_once('/').map_or("", |(module, _)| module).into(),
            inputs: ids(reads),
            outputs: ids(makes),
            mutates: ids(mutates),
            aliases: ids(aliases),
            signature: "op".into(),
            flops: Affine::fixed(1),
            saved_bytes: Affine::default(),
        });
    }
    let outputs = ids(outputs);
    let batch = Batch { rows: 4, splittable: true, reason: None };
    Graph::new("Test".into(), batch, values, made, inputs, outputs).unwrap()
}

fn members(atoms: &Atoms) -> Vec<Vec<u32>> {
    (0..atoms.len()).map(|atom| atoms.members(atom).iter().map(|id| id.0).collect()).collect()
}

#[test]
fn plain_operators_are_atoms() {
    let atoms = Atoms::new(&testing::chain(3, 4));
    assert_eq!(members(&atoms), [[0], [1], [2]]);
}

#[test]
fn in_place_results_may_be_read_elsewhere() {
    // conv -> relu_ -> conv -> add_(to the first relu) -> relu_
    let graph = graph(
        &[
            ("conv1", "x", "a", "", ""),
            ("relu1", "a", "r", "a", "a"),
            ("conv2", "r", "c", "", ""),
            ("add", "c r", "d", "c", "c"),
            ("relu2", "d", "e", "d", "d"),
            ("conv3", "e", "f", "", ""),
        ],
        "f",
    );
    assert_eq!(members(&Atoms::new(&graph)), vec![vec![0, 1], vec![2, 3, 4], vec![5]]);
}

#[test]
fn views_of_written_memory_stay_with_the_writer() {
    let graph = graph(
        &[
            ("make", "x", "a", "", ""),
            ("view", "a", "v", "", "a"),
            ("early", "a", "e", "", ""),
            ("fill", "v", "w", "v", "v"),
            ("late", "a", "l", "", ""),
        ],
        "e l",
    );
    assert_eq!(members(&Atoms::new(&graph)), vec![vec![0, 1, 2, 3], vec![4]]);
}

#[test]
fn circles_become_one_atom() {
    // `between` reads the first user of the buffer and feeds the second.
    let graph = graph(
        &[
            ("first", "x b", "a", "b", ""),
            ("between", "a", "c", "", ""),
            ("second", "c b", "d", "b", ""),
            ("after", "d", "e", "", ""),
        ],
        "e",
    );
    assert_eq!(members(&Atoms::new(&graph)), vec![vec![0, 1, 2], vec![3]]);
}

#[test]
fn counters_join_their_module() {
    let graph = graph(
        &[
            ("stem/conv", "x", "a", "", ""),
            ("body.norm/count", "b", "n", "b", "b"),
            ("body.norm/normalize", "a", "c", "", ""),
            ("head.norm/count", "b2", "n2", "b2", "b2"),
            ("head/linear", "c", "d", "", ""),
        ],
        "d",
    );
    assert_eq!(members(&Atoms::new(&graph)), vec![vec![0], vec![1, 2], vec![3, 4]]);
}

#[test]
fn readers_of_a_counter_stay_with_it() {
    let graph = graph(
        &[
            ("count", "b", "n", "b", "b"),
            ("scale", "n", "s", "", ""),
            ("one", "x s", "a", "", ""),
            ("two", "a", "c", "", ""),
        ],
        "c",
    );
    assert_eq!(members(&Atoms::new(&graph)), vec![vec![0, 1, 2], vec![3]]);
}

#[test]
fn constants_are_cloned_with_all_their_writers() {
    let graph = graph(
        &[
            ("zeros", "", "z", "", ""),
            ("triu", "z", "t", "z", "z"),
            ("one", "x z", "a", "", ""),
            ("two", "a z", "c", "", ""),
        ],
        "c",
    );
    let atoms = Atoms::new(&graph);
    assert_eq!(members(&atoms), [[2], [3]]);
    let stage: Vec<usize> = atoms.stage(&graph, [1]).ones().collect();
    assert_eq!(stage, [0, 1, 3]);
}

#[test]
fn results_of_weights_alone_have_a_place() {
    let graph = graph(&[("penalty", "b", "p", "", ""), ("one", "x", "a", "", "")], "a p");
    assert_eq!(members(&Atoms::new(&graph)), [[0, 1]]);
    let graph = super::tests::graph(&[("penalty", "b", "p", "", "")], "x p");
    assert_eq!(members(&Atoms::new(&graph)), [[0]]);
}

proptest! {
    #[test]
    fn atoms_are_ordered_and_hold_every_batch_operator_once(graph in testing::graphs(40)) {
        let atoms = Atoms::new(&graph);
        let mut seen = FixedBitSet::with_capacity(graph.nodes().len());
        for atom in 0..atoms.len() {
            for &id in atoms.members(atom) {
                prop_assert!(!seen.put(id.index()));
                for value in &graph.node(id).inputs {
                    let made = graph.producer(*value).and_then(|made| atoms.of(made));
                    prop_assert!(made.is_none_or(|made| made <= atom));
                }
            }
        }
        prop_assert_eq!(seen, graph.batch_nodes());
        prop_assert!(graph.node_ids().all(|id: NodeId| atoms.of(id).is_some()
            == graph.batch_nodes().contains(id.index())));
    }
}
