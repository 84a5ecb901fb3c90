use std::collections::BTreeMap;

use fixedbitset::FixedBitSet;
use proptest::prelude::*;
use rannc_graph::{Graph, testing};

use super::{assign, stages_are_valid};
use crate::atomic::tests::graph;

fn stages(graph: &Graph, members: &[&[usize]]) -> Vec<FixedBitSet> {
    let stage = |indices: &&[usize]| {
        let mut nodes = FixedBitSet::with_capacity(graph.nodes().len());
        nodes.extend(indices.iter().copied());
        nodes
    };
    members.iter().map(stage).collect()
}

fn problem(graph: &Graph, members: &[&[usize]]) -> String {
    stages_are_valid(graph, &stages(graph, members)).unwrap_err().to_string()
}

#[test]
fn stages_need_not_be_contiguous() {
    let graph = testing::unet(2, 4);
    assert_eq!(stages_are_valid(&graph, &stages(&graph, &[&[0], &[1, 2], &[3]])), Ok(()));
    assert_eq!(stages_are_valid(&graph, &stages(&graph, &[&[0, 1], &[], &[2, 3]])), Ok(()));
}

#[test]
fn broken_stages_name_the_operators() {
    let chain = testing::chain(3, 4);
    insta::assert_snapshot!(problem(&chain, &[&[0], &[2]]), @"operator `layer1/op#0` is in no stage");
    insta::assert_snapshot!(
        problem(&chain, &[&[0, 1], &[1, 2]]),
        @"operator `layer1/op#0` is in stage 0 and in stage 1, but must run once"
    );
    insta::assert_snapshot!(
        problem(&chain, &[&[0, 2], &[1]]),
        @"operator `layer2/op#0` in stage 0 reads `v1`, which stage 1 makes later"
    );
    insta::assert_snapshot!(problem(&chain, &[&[0, 9]]), @"the planner cannot use its options: stage 0 has operator 9 of 3");
    let written = graph(&[("one", "x b", "a", "b", ""), ("two", "a b", "c", "b", "")], "c");
    insta::assert_snapshot!(
        problem(&written, &[&[0], &[1]]),
        @"operators `one` and `two` are in stages 0 and 1, but share memory that one of them writes to"
    );
    let constant = graph(&[("zeros", "", "z", "", ""), ("one", "x z", "a", "", "")], "a");
    insta::assert_snapshot!(problem(&constant, &[&[0], &[1]]), @"operator `one` in stage 1 needs `zeros` there too");
}

#[test]
fn unknown_operators_follow_their_parameters() {
    let graph = graph(
        &[
            ("embed/look", "x b1", "a", "", ""),
            ("body/known", "a b2", "c", "", ""),
            ("body/new", "c b2", "d", "", ""),
            ("head/new", "d b1", "e", "", ""),
            ("head/other", "e b3", "f", "", ""),
        ],
        "f",
    );
    let wanted = BTreeMap::from([("embed/look", 0), ("body/known", 1), ("head/gone", 2)]);
    let found = assign(&graph, &wanted, 3);
    // `head/new` shares its parameter with stage 0, too early for what it reads.
    assert_eq!(found, stages(&graph, &[&[0], &[1, 2, 3], &[4]]));
}

#[test]
fn what_a_known_operator_takes_along_does_not_move_it() {
    // Nothing else touches what `flip` writes to, so it is pinned to the first operator.
    let graph = graph(
        &[
            ("first/op", "x", "p", "", ""),
            ("/flip", "b", "n", "b", "b"),
            ("/second", "p", "q", "", ""),
        ],
        "q",
    );
    let wanted = BTreeMap::from([("first/op", 0), ("/second", 1)]);
    assert_eq!(assign(&graph, &wanted, 2), stages(&graph, &[&[0, 1], &[2]]));
}

#[test]
fn other_numbers_of_stages_are_possible() {
    let graph = testing::chain(3, 4);
    let wanted = BTreeMap::from([("layer0/op#0", 7), ("layer1/op#0", 0)]);
    assert_eq!(assign(&graph, &wanted, 2), stages(&graph, &[&[], &[0, 1, 2]]));
    assert_eq!(assign(&graph, &wanted, 0), stages(&graph, &[&[0, 1, 2]]));
}

proptest! {
    #[test]
    fn any_wish_gives_valid_stages(
        graph in testing::graphs(30),
        wishes in prop::collection::vec(prop::option::of(0..5usize), 30),
        num_stages in 1..6usize,
    ) {
        let keys = graph.nodes().iter().map(|node| node.key.as_str());
        let wanted = keys.zip(wishes).filter_map(|(key, wish)| wish.map(|stage| (key, stage)));
        let wanted: BTreeMap<&str, usize> = wanted.collect();
        let found = assign(&graph, &wanted, num_stages);
        prop_assert_eq!(found.len(), num_stages);
        prop_assert_eq!(stages_are_valid(&graph, &found), Ok(()));
    }

    #[test]
    fn a_valid_wish_is_granted(graph in testing::graphs(30), cut in 0..30usize) {
        let num_nodes = graph.nodes().len();
        let stage_of = |index: usize| usize::from(index >= cut.min(num_nodes));
        let wanted: BTreeMap<&str, usize> =
            graph.nodes().iter().enumerate().map(|(index, node)| (node.key.as_str(), stage_of(index))).collect();
        let found = assign(&graph, &wanted, 2);
        for index in 0..num_nodes {
            prop_assert!(found[stage_of(index)].contains(index));
        }
    }
}
