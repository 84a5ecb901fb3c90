use proptest::prelude::*;
use rannc_cost::{AnalyticCosts, Cluster, DeviceCosts, Sharding, StageSizes, Training};
use rannc_graph::{Affine, testing};

use super::{Runs, affine_bytes, run_index};
use crate::facts::FactCache;
use crate::price::{Pricer, Setting};
use crate::{Atoms, Blocks, brute};

#[test]
fn runs_are_numbered_without_gaps() {
    let mut expected = 0;
    for start in 0..7 {
        for end in start + 1..=7 {
            assert_eq!(run_index(7, start, end), expected);
            expected += 1;
        }
    }
}

#[test]
fn bytes_are_exact_lines() {
    let graph = testing::chain(1, 8);
    let mut value = graph.values()[0].clone();
    assert_eq!(affine_bytes(&value, 16), Affine::per_row(32));
    value.shape[0] = Affine { per_row: 2, fixed: 1 };
    assert_eq!(affine_bytes(&value, 16), Affine { per_row: 64, fixed: 32 });
    value.shape[1] = Affine::per_row(1);
    assert_eq!(affine_bytes(&value, 16).at(16), value.bytes(16));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn sums_equal_the_graph_itself(graph in testing::graphs(25), rows in 1..9u64) {
        let atoms = Atoms::new(&graph);
        let cluster = Cluster::parse("cpu").unwrap();
        let costs = AnalyticCosts::new(&graph, &cluster.devices[0]);
        let blocks = Blocks::new(&graph, &atoms, &costs, 8, 6);
        let runs = Runs::new(&graph, &atoms, &blocks, &costs, 8);
        let classes = cluster.classes(1);
        let device_costs = DeviceCosts::new(&graph, None, &classes.devices).unwrap();
        let facts = FactCache::new(&runs, &device_costs);
        let setting = Setting {
            cluster: &cluster,
            classes: &classes,
            limits: &[u64::MAX],
            training: &Training::default(),
            batch_rows: rows,
            microbatches: 1,
            splittable: true,
            recompute: false,
            sharding: Sharding::None,
            num_devices: 1,
        };
        let pricer = Pricer::new(&runs, &facts, setting);
        let set = crate::layout::DeviceSet { classes: vec![(0, 1)] };
        for start in 0..blocks.len() {
            for end in start + 1..=blocks.len() {
                let found = runs.get(start, end);
                let expected = brute::price(&graph, &atoms, &costs, blocks.atoms(start..end), rows);
                let sizes = StageSizes { tied: found.shared_trained, ..expected.1 };
                let run = (found.state, found.own_trained + found.shared_trained);
                prop_assert_eq!(run, (sizes.state, sizes.trainable));
                prop_assert_eq!(found.saved.at(rows), sizes.saved);
                prop_assert_eq!(found.received.at(rows), sizes.received);
                prop_assert_eq!(found.exchanged.at(rows), sizes.exchanged);
                let cost = pricer.price((start, end), &set, 3).unwrap();
                prop_assert_eq!(cost.forward_ns + cost.backward_ns, expected.0);
                let memory = sizes.memory(3, &Training::default(), Sharding::None, 1);
                prop_assert_eq!(cost.bytes, memory.total());
            }
        }
    }
}

#[test]
fn runs_of_equal_layers_have_one_form() {
    let graph = testing::chain(24, 8);
    let atoms = Atoms::new(&graph);
    let cluster = Cluster::parse("cpu").unwrap();
    let costs = AnalyticCosts::new(&graph, &cluster.devices[0]);
    let blocks = Blocks::new(&graph, &atoms, &costs, 8, 12);
    let runs = Runs::new(&graph, &atoms, &blocks, &costs, 8);
    assert_eq!(runs.form(2, 4), runs.form(7, 9));
    assert_ne!(runs.form(2, 4), runs.form(2, 5));
}
