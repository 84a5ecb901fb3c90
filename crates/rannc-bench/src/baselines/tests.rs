use std::cell::Cell;

use fixedbitset::FixedBitSet;
use rannc_cost::{Cluster, ScheduleKind};
use rannc_graph::Graph;
use rannc_partition::simple::Setting;
use rannc_partition::{Candidate, Options, stages_are_valid};

use super::{Baseline, Evaluate, best};
use crate::models::{Transformer, chain, gpt, nasnet, recommender, unet};

/// Believes the estimate, and checks the form of what it is asked about.
struct Estimate<'a> {
    graph: &'a Graph,
    devices: usize,
    asked: Cell<usize>,
}

impl Evaluate for Estimate<'_> {
    fn step_ns(&self, candidate: &Candidate) -> Option<u64> {
        // Looking at all of them would take most of the tests' time.
        if self.asked.get().is_multiple_of(8) {
            let nodes: Vec<FixedBitSet> =
                candidate.stages.iter().map(|stage| stage.nodes.clone()).collect();
            stages_are_valid(self.graph, &nodes).unwrap();
        }
        let mut ranks: Vec<u32> =
            candidate.stages.iter().flat_map(|stage| stage.ranks.clone()).collect();
        assert!(candidate.stages.iter().all(|stage| stage.ranks.is_sorted()));
        ranks.sort_unstable();
        // Some may be idle where the others have equally many replicas.
        assert!(ranks.is_sorted_by(|left, right| left < right));
        assert!(ranks.last().is_some_and(|&last| (last as usize) < self.devices));
        for stage in &candidate.stages {
            for group in &stage.recompute {
                assert!(group.is_sorted() && !group.is_empty());
                assert!(group.iter().all(|node| stage.nodes.contains(node.index())));
            }
        }
        self.asked.set(self.asked.get() + 1);
        Some(candidate.estimate_ns)
    }
}

fn options(cluster: &Cluster, batch_rows: u64, memory_limit_bytes: u64) -> Options {
    Options {
        max_microbatches: 8,
        recompute: true,
        schedules: ScheduleKind::ALL.to_vec(),
        ..Options::new(batch_rows, cluster.devices.len(), memory_limit_bytes)
    }
}

fn steps(graph: &Graph, cluster: &Cluster, options: &Options) -> Vec<Option<u64>> {
    let evaluate = Estimate { graph, devices: cluster.devices.len(), asked: Cell::new(0) };
    let found = best(&Baseline::ALL, graph, &Setting::new(cluster, options), &evaluate);
    assert!(evaluate.asked.get() >= found.iter().flatten().count());
    found.into_iter().map(|found| found.map(|found| found.step_ns)).collect()
}

#[test]
fn candidates_are_valid_for_all_kinds_of_models() {
    let small = Transformer::new(2, 64, 16);
    let graphs = [gpt(small), unet(3, 8, 32), nasnet(2, 8, 32), recommender(8, 1000, 16, 4)];
    for (nodes, devices) in [(1, 3), (2, 2)] {
        let cluster = Cluster::uniform("a100-40gb", nodes, devices).unwrap();
        for graph in &graphs {
            let found = steps(graph, &cluster, &options(&cluster, 16, u64::MAX));
            assert!(found.iter().all(Option::is_some), "{}: {found:?}", graph.name());
        }
    }
}

#[test]
fn many_nodes_are_planned_level_by_level() {
    let cluster = Cluster::uniform("a100-40gb", 33, 2).unwrap();
    let graph = chain(32, 256, 1);
    let found = steps(&graph, &cluster, &options(&cluster, 660, 6 << 20));
    assert!(found[2].is_some(), "PipeDream's: {found:?}");
}

#[test]
fn all_agree_where_there_is_one_good_plan() {
    // One stage on one device, and data parallelism where parameters are next to nothing.
    let graph = chain(8, 64, 4096);
    for devices in [1, 4] {
        let cluster = Cluster::uniform("a100-40gb", 1, devices).unwrap();
        let found = steps(&graph, &cluster, &options(&cluster, 64, u64::MAX));
        assert!(found.iter().all(|step| *step == found[0] && step.is_some()), "{found:?}");
    }
}

#[test]
fn memory_is_honoured() {
    let graph = chain(16, 1024, 1);
    let cluster = Cluster::uniform("a100-40gb", 1, 4).unwrap();
    let whole = 16 * 1024 * 1024 * 4 * 4;
    assert!(steps(&graph, &cluster, &options(&cluster, 8, 2 * whole)).iter().all(Option::is_some));
    let found = steps(&graph, &cluster, &options(&cluster, 8, whole / 3));
    assert!(found.iter().all(Option::is_some), "{found:?}");
    assert!(steps(&graph, &cluster, &options(&cluster, 8, whole / 8)).iter().all(Option::is_none));
}
