use proptest::prelude::*;
use rannc_cost::{AnalyticCosts, Cluster, StageSizes};
use rannc_graph::{Affine, testing};

use super::{Intervals, affine_bytes, run_index};
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
        let device = &Cluster::parse("cpu").unwrap().devices[0];
        let costs = AnalyticCosts::new(&graph, device);
        let blocks = Blocks::new(&graph, &atoms, &costs, 8, 6);
        let intervals = Intervals::new(&graph, &atoms, &blocks, &costs, 8, [rows]);
        for start in 0..blocks.len() {
            for end in start + 1..=blocks.len() {
                let found = intervals.get(start, end);
                let sizes = StageSizes {
                    state: found.state,
                    trainable: found.own_trained + found.shared_trained,
                    saved: found.saved.at(rows),
                    received: found.received.at(rows),
                    exchanged: found.exchanged.at(rows),
                    working: intervals.working_bytes(start, end, rows),
                };
                let expected = brute::price(&graph, &atoms, &costs, blocks.atoms(start..end), rows);
                prop_assert_eq!((intervals.time_ns(start, end, rows), sizes), expected);
            }
        }
    }
}
