use proptest::prelude::*;
use rannc_cost::{Cluster, DeviceCosts, ScheduleKind, Sharding, StageSizes};
use rannc_graph::{Batch, Graph, testing};

use super::{Candidate, Options, Partitioner, Search, microbatch_candidates};
use crate::facts::FactCache;
use crate::stage::Problem;
use crate::{PartitionError, Remedy, brute, search, stages_are_valid};

fn plan(graph: &Graph, cluster: &str, options: &Options) -> Result<Vec<Candidate>, PartitionError> {
    let cluster = Cluster::parse(cluster).unwrap();
    let classes = cluster.classes(options.num_devices);
    let costs = DeviceCosts::new(graph, None, &classes.devices).unwrap();
    search(graph, &costs, &cluster, options)
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
    assert!(!found.is_empty() && found.len() <= 32);
    for candidate in &found {
        assert!(candidate.stages.len() >= 2);
        assert_eq!(replicas(candidate).iter().sum::<usize>(), 8);
    }
    assert!(found.windows(2).all(|pair| pair[0].estimate_ns <= pair[1].estimate_ns));
}

#[test]
fn there_is_a_hint_without_a_remedy() {
    let remedies = Vec::new();
    let (needed_bytes, limit_bytes, stage) = (2, 1, "stage 1 of 1".to_owned());
    let error = PartitionError::DoesNotFit { needed_bytes, limit_bytes, stage, remedies };
    assert!(error.help().unwrap().starts_with("use more devices, let each use more memory"));
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
    no partition fits: at best stage 3 of 3 (`layer2/op#0`; replicas: 1, microbatches: 8, schedule: fill_drain) needs 86.00 KiB but a device has 48.83 KiB
    hint: any of these would do: let each device use 86.00 KiB
    ");
    insta::assert_snapshot!(
        refusal(&graph, &|options| options.num_devices = 5),
        @"the planner cannot use its options: 5 devices were asked for, but the cluster has 4"
    );
}

/// The best of all divisions of all problems of a search, and what the search found.
fn against_oracle(
    graph: &Graph,
    cluster: &Cluster,
    options: &Options,
) -> Result<(Option<u64>, Option<u64>), TestCaseError> {
    let partitioner = Partitioner::new(graph);
    let classes = cluster.classes(options.num_devices);
    let costs = DeviceCosts::new(graph, None, &classes.devices).unwrap();
    let search = Search::new(&partitioner, &costs, cluster, options);
    let num_blocks = options.max_blocks.min(partitioner.atoms.len());
    let cut = search.cut(num_blocks);
    let facts = FactCache::new(&cut.runs, &costs);
    let mut best = None;
    for may_idle in [false, true] {
        for case in search.cases(&cut.runs, &facts, may_idle) {
            for layout in case.layouts.iter() {
                for &kind in &options.schedules {
                    let problem = Problem::new(&case.pricer, layout, kind, &case.remaining);
                    let exact = problem.exact(u64::MAX);
                    let values: Vec<u64> = exact.iter().map(|division| division.step_ns).collect();
                    prop_assert_eq!(&values, &brute::best(&problem));
                    for division in &exact {
                        prop_assert!(problem.bound() <= division.step_ns);
                        prop_assert_eq!(problem.evaluate(division), Some(division.step_ns));
                        let again = problem.exact(division.step_ns);
                        prop_assert!(again.iter().any(|found| found.step_ns == division.step_ns));
                    }
                    for rough in problem.approximate(u64::MAX) {
                        prop_assert_eq!(problem.evaluate(&rough), Some(rough.step_ns));
                        prop_assert!(values.iter().any(|&value| value <= rough.step_ns));
                    }
                    best = best.into_iter().chain(values).min();
                }
            }
        }
        if best.is_some() {
            break;
        }
    }
    let found = search.with_blocks(num_blocks).iter().map(|found| found.estimate_ns).min();
    Ok((best, found))
}

/// A cluster of `num_devices`, of two kinds where `mixed`.
fn cluster(num_devices: usize, mixed: bool, across: bool) -> Cluster {
    let kinds = if mixed { ["cpu", "v100-32gb"] } else { ["cpu", "cpu"] };
    let devices: Vec<String> = (0..num_devices)
        .map(|index| {
            let node = if across { index % 2 } else { 0 };
            let memory = if mixed && index % 3 == 0 { "memory_bytes = 300000, " } else { "" };
            format!("{{kind = \"{}\", {memory}node = {node}}}", kinds[usize::from(index % 3 == 1)])
        })
        .collect();
    Cluster::from_toml(&format!("devices = [{}]", devices.join(", "))).unwrap()
}

/// `PROPTEST_CASES`, or as many as a test run has time for.
fn cases() -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok());
    ProptestConfig::with_cases(asked.unwrap_or(40))
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn the_search_equals_trying_everything(
        graph in testing::graphs(20),
        max_blocks in 1..10usize,
        num_devices in 1..7usize,
        batch_rows in 1..20u64,
        limit_kib in 4..400u64,
        (mixed, across, recompute) in any::<(bool, bool, bool)>(),
        level in 0..4usize,
    ) {
        let mut options = Options::new(batch_rows, num_devices, limit_kib << 10);
        options.max_blocks = max_blocks;
        options.max_microbatches = 4;
        options.schedules = ScheduleKind::ALL.to_vec();
        options.recompute = recompute;
        options.sharding = Sharding::ALL[level];
        let cluster = cluster(num_devices, mixed && num_devices < 5, across);
        let (best, found) = against_oracle(&graph, &cluster, &options)?;
        match (best, found) {
            // Moving cuts into blocks finds more than the oracle may look at.
            (Some(best), Some(found)) => prop_assert!(found <= best, "{} > {}", found, best),
            (best, found) => prop_assert_eq!(best, found),
        }
    }

    #[test]
    fn every_remedy_makes_it_fit(
        graph in testing::graphs(30),
        num_devices in 1..6usize,
        batch_rows in 1..40u64,
        limit_kib in 2..60u64,
        (recompute, one_schedule) in any::<(bool, bool)>(),
    ) {
        let mut options = Options::new(batch_rows, num_devices, limit_kib << 10);
        options.recompute = recompute;
        options.schedules = ScheduleKind::ALL[..if one_schedule { 1 } else { 2 }].to_vec();
        let many = format!("cpu:{}", num_devices * 64);
        let Err(PartitionError::DoesNotFit { remedies, .. }) = plan(&graph, &many, &options) else {
            return Ok(());
        };
        for remedy in remedies {
            let mut options = options.clone();
            match remedy {
                Remedy::Recompute => options.recompute = true,
                Remedy::Sharding(level) => options.sharding = level,
                Remedy::Devices(count) => options.num_devices = count,
                Remedy::Memory(bytes) => options.memory_limit_bytes = bytes,
                Remedy::Batch(rows) => options.batch_rows = rows,
                Remedy::Unforced => {}
            }
            let found = plan(&graph, &many, &options);
            prop_assert!(found.is_ok(), "{}: {:?}", remedy, found.err());
        }
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
                let bytes = sizes.memory(in_flight, &options.training, Sharding::None, 1).total();
                prop_assert!(bytes <= options.memory_limit_bytes);
            }
        }
        if let Ok(found) = found {
            prop_assert!(!found.is_empty() && found.len() <= 32);
            let distinct = found.iter().enumerate().all(|(index, candidate)| !found[..index].contains(candidate));
            prop_assert!(distinct);
        }
    }
}
