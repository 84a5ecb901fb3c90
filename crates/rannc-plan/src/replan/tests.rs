use rannc_cost::Cluster;
use rannc_graph::{Graph, testing};

use super::in_place;
use crate::{Options, Plan, PlanError, Planner};

const BATCH: u64 = 96;

fn options() -> Options {
    // Little enough for several stages.
    Options { batch_size: BATCH, memory_limit_gib: Some(0.1), ..Options::default() }
}

fn cluster(devices: &str) -> Cluster {
    Cluster::parse(devices).unwrap()
}

fn step_ns(plan: &Plan) -> u64 {
    plan.estimates.as_ref().unwrap().step_ns
}

/// The deployment on 12 devices, that made from it for what changed, and one made afresh.
fn again(graph: &Graph, devices: &Cluster, options: &Options) -> (Plan, Plan, Plan) {
    let planner = Planner::new(graph, None);
    let first = planner.plan(&cluster("v100-32gb:3x4"), &self::options(), &()).unwrap();
    assert!(first.stages.len() > 1, "there is something to keep");
    let again = planner.replan(&first, devices, options, &()).unwrap();
    again.check(graph, devices.devices.len() as u32).unwrap();
    for plan in [&first, &again] {
        let ranks = &plan.estimates.as_ref().unwrap().ranks;
        assert!(ranks.iter().all(|rank| rank.memory.total() <= rank.limit_bytes));
    }
    assert_eq!(planner.replan(&first, devices, options, &()).unwrap(), again);
    let afresh = planner.plan(devices, options, &()).unwrap();
    (first, again, afresh)
}

#[test]
fn a_plan_for_what_changed_is_about_as_good_as_one_made_afresh() {
    let graph = testing::chain(12, 1024);
    let whole = cluster("v100-32gb:3x4");
    let mut fewer = whole.clone();
    fewer.devices.remove(5);
    let mut two = fewer.clone();
    two.devices.truncate(4);
    let batch = Options { batch_size: 2 * BATCH, ..options() };
    let less = Options { memory_limit_gib: Some(0.06), ..options() };
    let cases = [
        ("nothing", &whole, options()),
        ("a lost device", &fewer, options()),
        ("a third of the devices", &two, options()),
        ("more devices", &cluster("v100-32gb:4x4"), options()),
        ("a larger batch", &whole, batch),
        ("less memory", &whole, less),
    ];
    for (what, devices, options) in cases {
        let (_, again, afresh) = again(&graph, devices, &options);
        // It may be further from its bound by a thirty-second, and by a replica of a stage that lost one.
        let (found, best) = (step_ns(&again), step_ns(&afresh));
        assert!(found <= best + best / 4, "{what}: {found} ns, afresh {best} ns");
    }
}

#[test]
fn stages_stay_where_they_were_if_nothing_changed() {
    let graph = testing::chain(12, 1024);
    let (first, again, _) = again(&graph, &cluster("v100-32gb:3x4"), &options());
    let ranks =
        |plan: &Plan| plan.stages.iter().map(|stage| stage.ranks.clone()).collect::<Vec<_>>();
    assert_eq!(ranks(&again), ranks(&first));
    assert!(step_ns(&again) <= step_ns(&first) + step_ns(&first) / 32);
}

#[test]
fn what_is_asked_for_is_searched_for() {
    let graph = testing::chain(12, 1024);
    let forced = Options { num_replicas: Some(2), ..options() };
    let (_, again, afresh) = again(&graph, &cluster("v100-32gb:3x4"), &forced);
    assert_eq!(again, afresh);
}

#[test]
fn a_plan_of_another_model_is_refused() {
    let (graph, other) = (testing::chain(12, 1024), testing::chain(11, 1024));
    let devices = cluster("v100-32gb:3x4");
    let first = Planner::new(&graph, None).plan(&devices, &options(), &()).unwrap();
    let refused = Planner::new(&other, None).replan(&first, &devices, &options(), &());
    assert!(matches!(refused, Err(PlanError::OtherModel { .. })));
}

#[test]
fn devices_that_are_left_keep_their_stage() {
    let mut devices = cluster("v100-32gb:2x3");
    devices.devices.remove(1);
    let ranks = || vec![vec![0, 1, 2], vec![3, 4], vec![5]];
    // The last of the first node counts as the one that is gone.
    assert_eq!(in_place(6, ranks(), &devices), Some(vec![vec![0, 1], vec![2, 3], vec![4]]));
    devices.devices.retain(|device| device.node == 0);
    assert_eq!(in_place(6, ranks(), &devices), None);
}
