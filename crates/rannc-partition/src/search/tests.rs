use proptest::prelude::*;
use rannc_cost::{AnalyticCosts, Cluster, ScheduleKind, StageSizes};
use rannc_graph::{Batch, Graph, testing};

use super::{Candidate, Options, Search, microbatch_candidates, search};
use crate::stage::Goal;
use crate::{Atoms, PartitionError, brute, stages_are_valid};

fn plan(graph: &Graph, cluster: &str, options: &Options) -> Result<Vec<Candidate>, PartitionError> {
    let cluster = Cluster::parse(cluster).unwrap();
    search(graph, &AnalyticCosts::new(graph, &cluster.devices[0]), &cluster, options)
}

fn replicas(candidate: &Candidate) -> Vec<usize> {
    candidate.stages.iter().map(|stage| stage.ranks.len()).collect()
}

fn unsplittable(graph: &Graph) -> Graph {
    let batch = Batch { rows: 8, splittable: false, reason: Some("it sorts its rows".into()) };
    Graph::new(
        graph.name().into(),
        batch,
        graph.values().to_vec(),
        graph.nodes().to_vec(),
        graph.inputs().to_vec(),
        graph.outputs().to_vec(),
    )
    .unwrap()
}

const GIB: u64 = 1 << 30;

#[test]
fn one_device_takes_everything_at_once() {
    let graph = testing::chain(10, 512);
    let best = &plan(&graph, "cpu:1", &Options::new(64, 1, 8 * GIB)).unwrap()[0];
    assert_eq!((replicas(best), best.microbatches), (vec![1], 1));
    assert_eq!(best.stages[0].nodes.count_ones(..), 10);
}

#[test]
fn small_models_are_replicated() {
    let graph = testing::chain(10, 512);
    let best = &plan(&graph, "a100-40gb:1x2", &Options::new(64, 2, 38 * GIB)).unwrap()[0];
    assert_eq!((replicas(best), best.microbatches), (vec![2], 1));
}

#[test]
fn models_larger_than_a_device_become_a_pipeline() {
    let graph = testing::chain(100, 5000);
    let limit = 42_506_321_920 / 10 * 9;
    let mut options = Options::new(512, 8, limit);
    options.schedules = ScheduleKind::ALL.to_vec();
    let found = plan(&graph, "a100-40gb:1x8", &options).unwrap();
    assert!(!found.is_empty() && found.len() <= 8);
    for candidate in &found {
        assert!(candidate.stages.len() >= 2);
        assert_eq!(replicas(candidate).iter().sum::<usize>(), 8);
    }
    assert!(found.windows(2).all(|pair| pair[0].estimate_ns <= pair[1].estimate_ns));
}

#[test]
fn what_is_forced_is_honoured() {
    let graph = testing::chain(12, 256);
    let mut options = Options::new(64, 8, 8 * GIB);
    options.num_stages = Some(3);
    options.num_replicas = Some(2);
    options.microbatches = Some(5);
    for candidate in plan(&graph, "cpu:8", &options).unwrap() {
        assert_eq!((replicas(&candidate), candidate.microbatches), (vec![2, 2, 2], 5));
    }
    options.num_replicas = None;
    options.num_stages = Some(1);
    options.microbatches = Some(1);
    assert_eq!(replicas(&plan(&graph, "cpu:8", &options).unwrap()[0]), [8]);
    options.num_stages = None;
    options.num_replicas = Some(3);
    assert_eq!(replicas(&plan(&graph, "cpu:8", &options).unwrap()[0]), [3, 3]);
}

#[test]
fn many_stages_need_many_blocks() {
    let graph = testing::chain(80, 16);
    let mut options = Options::new(64, 40, GIB);
    options.num_stages = Some(40);
    assert_eq!(replicas(&plan(&graph, "cpu:40", &options).unwrap()[0]), [1; 40]);
}

#[test]
fn devices_without_rows_are_idle() {
    let (mut sketch, input) = testing::Sketch::new(16);
    let output = sketch.op(&[input], 16, 1_000_000_000);
    let graph = sketch.finish(&[output]);
    assert_eq!(replicas(&plan(&graph, "cpu:8", &Options::new(3, 8, GIB)).unwrap()[0]), [3]);
    let graph = unsplittable(&testing::chain(4, 16));
    let found = plan(&graph, "cpu:8", &Options::new(64, 8, GIB)).unwrap();
    assert_eq!((replicas(&found[0]), found[0].microbatches), (vec![1], 1));
    assert!(found.iter().all(|candidate| replicas(candidate).iter().all(|&count| count == 1)));
}

#[test]
fn models_without_operators_run_everywhere() {
    let (sketch, input) = testing::Sketch::new(4);
    let found = plan(&sketch.finish(&[input]), "cpu:4", &Options::new(8, 4, GIB)).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(replicas(&found[0]), [4]);
    assert!(found[0].stages[0].nodes.is_clear());
}

#[test]
fn many_devices_are_handed_out_in_groups() {
    let graph = testing::chain(96, 2048);
    let mut options = Options::new(4096, 100, 38 * GIB);
    options.max_microbatches = 4;
    let best = &plan(&graph, "a100-40gb:25x4", &options).unwrap()[0];
    assert_eq!(replicas(best).iter().sum::<usize>(), 100);
}

#[test]
fn microbatches_are_powers_and_divisors() {
    let mut options = Options::new(60, 4, GIB);
    assert_eq!(microbatch_candidates(&options), [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16, 20, 30, 32]);
    options.min_microbatches = 13;
    options.max_microbatches = 14;
    assert_eq!(microbatch_candidates(&options), [13]);
    options.microbatches = Some(7);
    assert_eq!(microbatch_candidates(&options), [7]);
    assert_eq!(microbatch_candidates(&Options::new(1, 4, GIB)), [1]);
}

#[test]
fn refusals_name_both_sides() {
    let graph = testing::chain(3, 64);
    let refusal = |graph: &Graph, change: &dyn Fn(&mut Options)| {
        let mut options = Options::new(8, 4, GIB);
        change(&mut options);
        let error = plan(graph, "cpu:4", &options).unwrap_err();
        error.help().map_or(error.to_string(), |help| format!("{error}\nhint: {help}"))
    };
    insta::assert_snapshot!(refusal(&graph, &|options| options.num_stages = Some(4)), @"
    4 stages were asked for, but the model divides into 3 parts at most
    hint: ask for at most 3 stages, or none to let the planner choose
    ");
    insta::assert_snapshot!(refusal(&graph, &|options| {
        options.num_stages = Some(3);
        options.num_replicas = Some(2);
    }), @"
    3 stages of 2 replicas need 6 devices, but there are 4
    hint: ask for fewer stages or replicas, or run on more devices
    ");
    insta::assert_snapshot!(refusal(&graph, &|options| {
        options.num_replicas = Some(4);
        options.microbatches = Some(4);
    }), @"
    4 microbatches over 4 replicas need 16 rows, but the batch has 8
    hint: ask for fewer microbatches or replicas, or use a larger batch
    ");
    insta::assert_snapshot!(refusal(&unsplittable(&graph), &|options| options.microbatches = Some(2)), @"
    2 microbatches and 1 replicas were asked for, but the batch of this model cannot be split: it sorts its rows
    hint: ask for 1 microbatch and 1 replica, or change the model so that no operator mixes the rows of its batch
    ");
    insta::assert_snapshot!(refusal(&graph, &|options| options.memory_limit_bytes = 50_000), @"
    no partition fits: at best stage 2 of 3 (`layer1/op#0`; replicas: 1, microbatches: 8, schedule: fill_drain) needs 86.00 KiB but a device has 48.83 KiB
    hint: use more devices than 4, devices with more memory (86.00 KiB for each with this many), or a smaller batch than 8 rows
    ");
    insta::assert_snapshot!(
        refusal(&graph, &|options| options.num_devices = 5),
        @"the planner cannot use its options: 5 devices were asked for, but the cluster has 4"
    );
}

/// The problems of a search with few blocks, each with the oracle's answer.
fn check_against_oracle(
    graph: &Graph,
    cluster: &str,
    options: &Options,
) -> Result<(), TestCaseError> {
    let cluster = Cluster::parse(cluster).unwrap();
    let costs = AnalyticCosts::new(graph, &cluster.devices[0]);
    let atoms = Atoms::new(graph);
    let search = Search { graph, atoms: &atoms, costs: &costs, cluster: &cluster, options };
    let blocks = search.blocks(options.max_blocks);
    let (mut best, mut best_busy): (Option<u64>, Option<u64>) = (None, None);
    let cases = search.cases(&blocks);
    for problem in search.problems(&cases) {
        let exact = problem.solve(Goal::Time { bound: u64::MAX });
        let values: Vec<u64> = exact.iter().map(|division| division.value).collect();
        prop_assert_eq!(&values, &brute::best(&problem));
        let quick = problem.solve(Goal::QuickTime);
        for (quick, exact) in quick.iter().zip(&exact) {
            prop_assert!(quick.value >= exact.value);
            let bounded = problem.solve(Goal::Time { bound: exact.value });
            prop_assert!(bounded.iter().any(|found| found.value == exact.value));
        }
        prop_assert_eq!(quick.len(), exact.len());
        for division in exact {
            let earlier = if problem.layout.uses_all { &mut best_busy } else { &mut best };
            *earlier = Some(earlier.map_or(division.value, |value| value.min(division.value)));
            let most = problem.stage_bytes(&division).into_iter().max();
            prop_assert!(most <= Some(options.memory_limit_bytes));
        }
    }
    let found = search.with_blocks(options.max_blocks).ok();
    prop_assert_eq!(found.map(|found| found[0].estimate_ns), best_busy.or(best));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_search_equals_trying_everything(
        graph in testing::graphs(20),
        max_blocks in 1..7usize,
        num_devices in 1..6usize,
        batch_rows in 1..20u64,
        limit_kib in 4..400u64,
        across in any::<bool>(),
    ) {
        let mut options = Options::new(batch_rows, num_devices, limit_kib << 10);
        options.max_blocks = max_blocks;
        options.max_microbatches = 4;
        options.schedules = ScheduleKind::ALL.to_vec();
        let cluster = if across { "cpu:3x2" } else { "a100-40gb:6" };
        check_against_oracle(&graph, cluster, &options)?;
    }

    #[test]
    fn candidates_are_valid_fit_and_repeat(
        graph in testing::graphs(30),
        num_devices in 1..9usize,
        batch_rows in 1..40u64,
        limit_kib in 4..4000u64,
    ) {
        let mut options = Options::new(batch_rows, num_devices, limit_kib << 10);
        options.schedules = ScheduleKind::ALL.to_vec();
        let found = plan(&graph, "cpu:2x4", &options);
        prop_assert_eq!(&found, &plan(&graph, "cpu:2x4", &options));
        let users = graph.users();
        for candidate in found.iter().flatten() {
            let nodes: Vec<_> = candidate.stages.iter().map(|stage| stage.nodes.clone()).collect();
            prop_assert_eq!(stages_are_valid(&graph, &nodes), Ok(()));
            prop_assert!(replicas(candidate).iter().sum::<usize>() <= num_devices);
            for (index, stage) in candidate.stages.iter().enumerate() {
                prop_assert!(stage.ranks.len() as u64 * candidate.microbatches <= batch_rows);
                let rows = batch_rows.div_ceil(candidate.microbatches * stage.ranks.len() as u64);
                let in_flight = match candidate.schedule {
                    ScheduleKind::FillDrain => candidate.microbatches,
                    ScheduleKind::OneForwardOneBackward =>
                        candidate.microbatches.min((candidate.stages.len() - index) as u64),
                };
                let sizes = StageSizes::of(&graph, &users, &stage.nodes, rows);
                let bytes = sizes.memory(in_flight, &options.training).total();
                prop_assert!(bytes <= options.memory_limit_bytes);
            }
        }
        if let Ok(found) = found {
            prop_assert!(!found.is_empty() && found.len() <= 8);
            let distinct = found.iter().enumerate().all(|(index, candidate)| !found[..index].contains(candidate));
            prop_assert!(distinct);
        }
    }
}
