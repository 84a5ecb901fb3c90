use proptest::prelude::*;
use rannc_cost::{Cluster, DeviceCosts, ScheduleKind, StageMemory};
use rannc_graph::{Graph, testing};
use rannc_partition::{Atoms, Candidate, StageCandidate};

use super::Evaluator;
use crate::Options;
use crate::compile::search_options;

/// The graph in parts of about equally many atoms, each on so many ranks.
fn candidate(graph: &Graph, stages: usize, replicas: usize, microbatches: u64) -> Candidate {
    let atoms = Atoms::new(graph);
    let stages = stages.min(atoms.len());
    let stage = |index: usize| StageCandidate {
        nodes: atoms.stage(graph, index * atoms.len() / stages..(index + 1) * atoms.len() / stages),
        ranks: (index * replicas..(index + 1) * replicas).map(|rank| rank as u32).collect(),
        ..StageCandidate::default()
    };
    Candidate {
        stages: (0..stages).map(stage).collect(),
        microbatches,
        schedule: ScheduleKind::OneForwardOneBackward,
        estimate_ns: 0,
    }
}

proptest! {
    /// Branches may run side by side, so only stages that read from each other may be added up.
    #[test]
    fn no_step_is_shorter_than_the_least(
        graph in testing::graphs(12),
        stages in 1..5usize,
        replicas in 1..3usize,
        microbatches in 1..5u64,
        fill_drain: bool,
    ) {
        let mut candidate = candidate(&graph, stages, replicas, microbatches);
        if fill_drain {
            candidate.schedule = ScheduleKind::FillDrain;
        }
        let world = (candidate.stages.len() * replicas) as u32;
        let cluster = Cluster::uniform("v100-32gb", 1, world).unwrap();
        let options = Options { batch_size: 24, ..Options::default() };
        let search = search_options(&graph, &cluster, &options).unwrap();
        let costs = DeviceCosts::new(&graph, None, &cluster.classes(world as usize).devices).unwrap();
        let evaluator = Evaluator::new(&graph, &costs, &cluster, &search);
        let step_ns = evaluator.step_ns(&candidate, &evaluator.place(&candidate)).unwrap();
        prop_assert!(evaluator.least_ns(&candidate) <= step_ns);
    }
}

/// What each rank takes when the stages, of one replica each, lie on these ranks.
fn memory(graph: &Graph, ranks: &[u32]) -> Vec<StageMemory> {
    let mut candidate = candidate(graph, ranks.len(), 1, 2);
    for (stage, &rank) in candidate.stages.iter_mut().zip(ranks) {
        stage.ranks = vec![rank];
    }
    let cluster = Cluster::uniform("v100-32gb", 1, ranks.len() as u32).unwrap();
    let options = Options { batch_size: 24, ..Options::default() };
    let search = search_options(graph, &cluster, &options).unwrap();
    let costs = DeviceCosts::new(graph, None, &cluster.classes(ranks.len()).devices).unwrap();
    Evaluator::new(graph, &costs, &cluster, &search).memory(&candidate)
}

#[test]
fn a_rank_of_several_stages_holds_them_all() {
    let graph = testing::chain(4, 8);
    let (apart, together) = (memory(&graph, &[0, 1]), memory(&graph, &[0, 0]));
    let lasting = |memory: &StageMemory| {
        [memory.parameters, memory.gradients, memory.optimizer, memory.activations]
    };
    let sums: Vec<u64> = lasting(&apart[0])
        .into_iter()
        .zip(lasting(&apart[1]))
        .map(|(one, two)| one + two)
        .collect();
    assert_eq!(lasting(&together[0])[..], sums);
    assert_eq!(together[1].total(), 0);
}

#[test]
fn a_rank_holds_once_what_two_of_its_stages_read() {
    let (mut sketch, input) = testing::Sketch::new(8);
    let weight = sketch.parameter("weight", 64);
    let hidden = sketch.op(&[input, weight], 8, 100);
    let output = sketch.op(&[hidden, weight], 8, 100);
    let graph = sketch.finish(&[output]);
    let (apart, together) = (memory(&graph, &[0, 1]), memory(&graph, &[0, 0]));
    assert_eq!(together[0].parameters, apart[0].parameters);
    assert_eq!(together[0].gradients, apart[0].gradients);
    assert_eq!(together[0].optimizer, apart[0].optimizer);
}
