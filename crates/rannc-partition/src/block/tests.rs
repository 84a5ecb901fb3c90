use std::time::{Duration, Instant};

use proptest::prelude::*;
use rannc_cost::{AnalyticCosts, Cluster};
use rannc_graph::{Graph, testing};

use super::Blocks;
use crate::{Atoms, stages_are_valid};

fn blocks(graph: &Graph, max_blocks: usize) -> (Atoms, Blocks) {
    let atoms = Atoms::new(graph);
    let device = &Cluster::parse("a100-40gb").unwrap().devices[0];
    let costs = AnalyticCosts::new(graph, device);
    let blocks = Blocks::new(graph, &atoms, &costs, 8, max_blocks);
    (atoms, blocks)
}

fn sizes(blocks: &Blocks) -> Vec<usize> {
    (0..blocks.len()).map(|block| blocks.atoms(block..block + 1).len()).collect()
}

#[test]
fn equal_layers_give_equal_blocks() {
    let (_, found) = blocks(&testing::chain(96, 512), 32);
    assert_eq!(sizes(&found), [3; 32]);
    let (_, found) = blocks(&testing::chain(10, 512), 32);
    assert_eq!(sizes(&found), [1; 10]);
}

#[test]
fn cuts_fall_where_few_bytes_cross() {
    // Layers of four operators that are 1024 wide inside and 16 wide between them.
    let (mut sketch, mut value) = testing::Sketch::new(16);
    for _ in 0..12 {
        for width in [1024, 1024, 1024, 16] {
            value = sketch.op(&[value], width, 1_000_000);
        }
    }
    let (_, found) = blocks(&sketch.finish(&[value]), 4);
    assert_eq!(sizes(&found), [12; 4]);
}

#[test]
fn branches_are_laid_out_one_after_the_other() {
    // Two towers whose operators alternate in the program.
    let (mut sketch, input) = testing::Sketch::new(1024);
    let (mut left, mut right) = (input, input);
    for _ in 0..8 {
        left = sketch.op(&[left], 1024, 1000);
        right = sketch.op(&[right], 1024, 1000);
    }
    left = sketch.op(&[left], 1, 1000);
    right = sketch.op(&[right], 1, 1000);
    let joined = sketch.op(&[left, right], 1, 1000);
    let (_, found) = blocks(&sketch.finish(&[joined]), 19);
    assert_eq!(found.atoms(0..9), [0, 2, 4, 6, 8, 10, 12, 14, 16]);
}

#[test]
fn one_heavy_operator_leaves_enough_blocks() {
    let (mut sketch, mut value) = testing::Sketch::new(16);
    for index in 0..20 {
        value = sketch.op(&[value], 16, if index == 7 { 1_000_000_000_000 } else { 10 });
    }
    let (_, found) = blocks(&sketch.finish(&[value]), 8);
    assert_eq!(found.len(), 8);
    let sizes = sizes(&found);
    assert_eq!(sizes.iter().sum::<usize>(), 20);
    assert!(sizes.contains(&1));
}

#[test]
fn ten_thousand_operators_take_little_time() {
    let graph = testing::unet(5_000, 64);
    let start = Instant::now();
    let (_, found) = blocks(&graph, 32);
    assert_eq!(found.len(), 32);
    // Generous, as tests run without optimisation and beside others.
    assert!(start.elapsed() < Duration::from_secs(5));
}

proptest! {
    #[test]
    fn blocks_cover_the_graph_and_are_convex(graph in testing::graphs(40), max_blocks in 1..20usize) {
        let (atoms, found) = blocks(&graph, max_blocks);
        prop_assert_eq!(found.len(), max_blocks.min(atoms.len()));
        let stages: Vec<_> = (0..found.len())
            .map(|block| atoms.stage(&graph, found.atoms(block..block + 1).iter().copied()))
            .collect();
        prop_assert_eq!(stages_are_valid(&graph, &stages), Ok(()));
    }
}
