//! What each target does with a file: read it and, if it is accepted, do all that the command does.
//!
//! No input may panic, hang or take memory out of proportion. The tests of the command replay the
//! corpus through these functions.

use rannc_cost::{Cluster, Profile};
use rannc_graph::{Graph, testing};
use rannc_plan::{Options, Plan, PlanError, Planner, compile};
use rannc_schedule::Mode;

/// Larger graphs, clusters and plans are read but not planned or played: a target must be quick.
const MAX_NODES: usize = 48;
const MAX_DEVICES: usize = 8;

/// Reads a graph; plans and lays it out.
pub fn graph(data: &[u8]) {
    let Some(graph) = text(data).and_then(|text| Graph::from_json(text).ok()) else { return };
    let written = graph.to_json();
    assert_eq!(Graph::from_json(&written).expect("a written graph can be read"), graph);
    assert_ne!(graph.fingerprint(), graph.identity());
    if graph.nodes().len() > MAX_NODES {
        return;
    }
    let cluster = Cluster::parse("v100-32gb:2x2").expect("the text is valid");
    for batch_size in [graph.batch().rows, 4] {
        plan_for(&graph, None, &cluster, batch_size);
    }
}

/// Reads a profile; plans a graph with its times.
pub fn profile(data: &[u8]) {
    let Some(profile) = text(data).and_then(|text| Profile::from_json(text).ok()) else { return };
    let written = profile.to_json();
    assert_eq!(Profile::from_json(&written).expect("a written profile can be read"), profile);
    let cluster = Cluster::parse("cpu:1x2").expect("the text is valid");
    for batch_size in [6, 1 << 40] {
        plan_for(&small_graph(), Some(&profile), &cluster, batch_size);
    }
}

/// Reads a cluster as TOML, as JSON and as a short text; plans for it.
pub fn cluster(data: &[u8]) {
    let Some(text) = text(data) else { return };
    for read in [Cluster::from_toml, Cluster::from_json, Cluster::parse] {
        let Ok(cluster) = read(text) else { continue };
        let last = cluster.devices.len() as u32 - 1;
        for bytes in [0, 1, u64::MAX] {
            cluster.transfer_ns(bytes, 0, last);
            cluster.all_reduce_ns(bytes, &[0, last, u32::MAX]);
        }
        if cluster.devices.len() <= MAX_DEVICES {
            let written = cluster.to_json();
            let read = Cluster::from_json(&written).expect("a written cluster can be read");
            assert_eq!(read, cluster);
            plan_for(&small_graph(), None, &cluster, 24);
        }
    }
}

/// Reads a plan; shows it, checks it against a graph and lays it out.
pub fn plan(data: &[u8]) {
    let Some(plan) = text(data).and_then(|text| Plan::from_json(text).ok()) else { return };
    let written = plan.to_json();
    assert_eq!(Plan::from_json(&written).expect("a written plan can be read"), plan);
    for rows in [0, 7, u64::MAX] {
        plan.report_for(rows);
    }
    let graph = small_graph();
    let fits = plan.check(&graph, plan.world_size).is_ok();
    let small = plan.world_size as usize <= MAX_DEVICES
        && plan.stages.len() <= MAX_NODES
        && plan.microbatches <= 64;
    if small && let Err(error) = play(&plan, &graph) {
        assert!(!fits, "a plan that fits can be carried out: {error}");
    }
}

/// Plans; whatever comes out must hold.
fn plan_for(graph: &Graph, profile: Option<&Profile>, cluster: &Cluster, batch_size: u64) {
    let options = Options { batch_size, max_microbatches: 4, max_blocks: 6, ..Options::default() };
    let plan = match compile(graph, profile, cluster, &options) {
        Ok(plan) => plan,
        Err(PlanError::Schedule(error)) => panic!("the planner's own schedule is wrong: {error}"),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            error.help();
            return;
        }
    };
    assert!(!plan.report().is_empty());
    assert_eq!(Plan::from_json(&plan.to_json()).expect("a written plan can be read"), plan);
    plan.check(graph, plan.world_size).expect("the planner's plans are valid");
    play(&plan, graph).expect("the planner's plans can be carried out");
}

/// Every rank's actions in both modes, and a simulated step.
fn play(plan: &Plan, graph: &Graph) -> Result<(), PlanError> {
    let placement = plan.place(graph)?;
    for mode in [Mode::Training, Mode::Inference] {
        let rows = rannc_plan::even_rows(plan.batch_size.clamp(1, 64), plan.world_size);
        placement.program(rows, true, mode)?;
    }
    let cluster = Cluster::uniform("cpu", 1, plan.world_size)?;
    Planner::new(graph, None).timeline(&cluster, &Options::default(), plan)?;
    Ok(())
}

/// Two layers down, two up, with skip connections.
fn small_graph() -> Graph {
    testing::unet(2, 16)
}

fn text(data: &[u8]) -> Option<&str> {
    std::str::from_utf8(data).ok()
}
