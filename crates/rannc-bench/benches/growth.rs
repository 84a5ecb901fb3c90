//! Planning time and memory by number of operators and of devices, and on the shapes on which earlier
//! planners were timed.
//!
//! ```text
//! cargo bench -p rannc-bench --bench growth                      everything
//! cargo bench -p rannc-bench --bench growth -- --quick           up to 10,000 operators
//! cargo bench -p rannc-bench --bench growth -- --case GPT        operators, devices, again,
//!                                                                or a part of a shape's name
//! ```
//!
//! Times are wall clock and processor time for `Planner::new` and `Planner::plan` in one process; the graph is there
//! before. Peak memory is that of the process, the graph included.

use std::io::Write as _;

use rannc_bench::models::{
    Transformer, bert, chain, densenet430, gnmt, gnmt78, gpt, in_bfloat16, piper_bert96,
};
use rannc_bench::resources::{Usage, measure};
use rannc_bench::table::{Table, exponent, time};
use rannc_cost::Cluster;
use rannc_graph::Graph;
use rannc_plan::{Options, Plan, PlanError, Planner, Sharding};

/// Operators in a layer of `gpt`.
const OPERATORS_IN_LAYER: i64 = 18;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Cargo says `--bench` when it wants a measurement rather than a test.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let wanted = arguments.iter().position(|argument| argument == "--case");
    let wanted = wanted.and_then(|at| arguments.get(at + 1));
    let is_wanted = |part: &str| wanted.is_none_or(|name| name == part);
    if is_wanted("operators") {
        by_operators(quick);
    }
    if is_wanted("devices") {
        by_devices(quick);
    }
    if is_wanted("again") {
        again();
    }
    shapes(|name| wanted.is_none_or(|part| name.contains(part.as_str())));
}

fn show(text: &str) {
    let mut out = std::io::stdout();
    // A closed pipe is nobody's error.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn plan(graph: &Graph, cluster: &Cluster, batch_rows: u64) -> (Result<Plan, PlanError>, Usage) {
    let options = Options { batch_size: batch_rows, ..Options::default() };
    measure(|| Planner::new(graph, None).plan(cluster, &options, &()))
}

fn cluster(text: &str) -> Cluster {
    Cluster::parse(text).expect("the benches name presets")
}

fn megabytes(usage: &Usage) -> String {
    usage.peak_bytes.map_or("unknown".into(), |bytes| format!("{:.0} MB", bytes as f64 / 1e6))
}

fn processor(usage: &Usage) -> String {
    usage.processor_ns.map_or("unknown".into(), time)
}

fn outcome(plan: &Result<Plan, PlanError>) -> String {
    let plan = match plan {
        Ok(plan) => plan,
        Err(error) => return error.to_string(),
    };
    format!("{} stages, {} microbatches, {}", plan.stages.len(), plan.microbatches, plan.schedule)
}

fn by_operators(quick: bool) {
    let mut points = Vec::new();
    let columns = ["model", "operators", "devices", "planning", "processor", "peak memory", "plan"];
    let mut table = Table::new(&columns);
    show(table.text());
    let all: [i64; 5] = [1_000, 3_000, 10_000, 30_000, 100_000];
    for operators in all.into_iter().filter(|&count| !quick || count <= 10_000) {
        let graph = gpt(Transformer::new(operators / OPERATORS_IN_LAYER, 512, 512));
        let devices = cluster("a100-40gb:8x8");
        let (found, usage) = plan(&graph, &devices, 256);
        points.push((graph.nodes().len() as f64, usage.nanoseconds as f64));
        show(&table.row(&row("gpt", &graph, &devices, &found, &usage)));
    }
    show(&format!("\ntime grows as operators to the power {:.2}\n\n", exponent(&points)));
    let mut points = Vec::new();
    let mut table = Table::new(&columns);
    show(table.text());
    for layers in [4, 8, 16, 32, 64].into_iter().filter(|&layers| !quick || layers <= 16) {
        let graph = gnmt(layers, 512, 64, 8 * layers.min(8));
        let devices = cluster("a100-40gb:8x8");
        let (found, usage) = plan(&graph, &devices, 256);
        points.push((graph.nodes().len() as f64, usage.nanoseconds as f64));
        show(&table.row(&row("gnmt", &graph, &devices, &found, &usage)));
    }
    show(&format!("\ntime grows as operators to the power {:.2}\n\n", exponent(&points)));
}

fn by_devices(quick: bool) {
    let graph = gpt(Transformer::new(96, 4096, 1024));
    let mut points = Vec::new();
    let columns = ["model", "operators", "devices", "planning", "processor", "peak memory", "plan"];
    let mut table = Table::new(&columns);
    show(table.text());
    let all = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];
    for nodes in all.into_iter().filter(|&nodes| !quick || nodes <= 64) {
        let devices = cluster(&format!("a100-80gb:{nodes}x8"));
        let (found, usage) = plan(&graph, &devices, 4096);
        if found.is_ok() {
            points.push((devices.devices.len() as f64, usage.nanoseconds as f64));
        }
        show(&table.row(&row("gpt 20B", &graph, &devices, &found, &usage)));
    }
    show(&format!("\ntime grows as devices to the power {:.2}\n\n", exponent(&points)));
}

fn row(
    model: &str,
    graph: &Graph,
    devices: &Cluster,
    found: &Result<Plan, PlanError>,
    usage: &Usage,
) -> Vec<String> {
    vec![
        model.to_owned(),
        graph.nodes().len().to_string(),
        devices.devices.len().to_string(),
        time(usage.nanoseconds),
        processor(usage),
        megabytes(usage),
        outcome(found),
    ]
}

/// A shape, where, with how many rows, and the time that it should stay below.
struct Shape {
    name: &'static str,
    graph: Graph,
    cluster: Cluster,
    batch_rows: u64,
    /// What the plan may shard: a trillion parameters fit no other way.
    sharding: Sharding,
    target: &'static str,
}

fn shapes(is_wanted: impl Fn(&str) -> bool) {
    let shape = |name, graph, text: &str, batch_rows, target| Shape {
        name,
        graph,
        cluster: cluster(text),
        batch_rows,
        sharding: Sharding::None,
        target,
    };
    let mut long = shape("chain of 1,024", chain(1024, 8192, 16), "a100-40gb:128x8", 4096, "5 s");
    for device in &mut long.cluster.devices {
        // Two layers with their gradients and optimizer state take 2 GiB: hundreds of stages.
        device.memory_bytes = 5 << 30;
    }
    let trillion = Transformer::new(128, 25_600, 2048);
    let mut all = vec![
        shape("BERT-96 (101 nodes)", piper_bert96(), "a100-40gb:128x8", 1024, "0.5 s"),
        shape("DenseNet (430 states)", densenet430(), "a100-40gb:8x8", 2048, "1 s"),
        shape("GNMT (78 nodes, wide)", gnmt78(), "a100-40gb:1x2", 256, "1 s"),
        long,
        shape("BERT 100B", bert(Transformer::new(124, 8192, 512)), "a100-40gb:128x8", 1024, "1 s"),
        Shape {
            sharding: Sharding::Optimizer,
            ..shape("GPT 1T, 16 bits", in_bfloat16(&gpt(trillion)), "h100-80gb:384x8", 3072, "5 s")
        },
    ];
    all.retain(|shape| is_wanted(shape.name));
    if all.is_empty() {
        return;
    }
    let mut table = Table::new(&[
        "shape",
        "operators",
        "devices",
        "planning",
        "processor",
        "target",
        "peak memory",
        "plan",
    ]);
    show(table.text());
    for shape in all {
        let (batch_size, sharding) = (shape.batch_rows, shape.sharding);
        let options = Options { batch_size, sharding, ..Options::default() };
        let (found, usage) =
            measure(|| Planner::new(&shape.graph, None).plan(&shape.cluster, &options, &()));
        let mut cells = row(shape.name, &shape.graph, &shape.cluster, &found, &usage);
        cells.insert(5, shape.target.to_owned());
        show(&table.row(&cells));
    }
    show("\n");
}

/// Planning again for what changed, from the first plan and afresh.
fn again() {
    let graph = bert(Transformer::new(124, 8192, 512));
    let whole = cluster("a100-40gb:128x8");
    let options = Options { batch_size: 1024, ..Options::default() };
    let planner = Planner::new(&graph, None);
    let first = planner.plan(&whole, &options, &()).expect("it fits");
    let mut table = Table::new(&[
        "change to BERT 100B on 1,024",
        "again",
        "target",
        "step (simulated)",
        "afresh",
        "step (simulated)",
        "plan",
    ]);
    show(table.text());
    let mut run = |name: &str, target: &str, devices: &Cluster, options: &Options| {
        let (again, usage) = measure(|| planner.replan(&first, devices, options, &()));
        let (afresh, long) = measure(|| planner.plan(devices, options, &()));
        let step = |plan: &Result<Plan, PlanError>| {
            let estimates = plan.as_ref().ok().and_then(|plan| plan.estimates.as_ref());
            estimates.map_or_else(String::new, |estimates| time(estimates.step_ns))
        };
        let cells = [
            name.into(),
            time(usage.nanoseconds),
            target.into(),
            step(&again),
            time(long.nanoseconds),
            step(&afresh),
            outcome(&again),
        ];
        show(&table.row(&cells));
    };
    run("none", "", &whole, &options);
    let mut fewer = whole.clone();
    fewer.devices.remove(700);
    run("a lost device", "100 ms", &fewer, &options);
    let mut three = fewer.clone();
    for rank in [12, 300, 301] {
        three.devices.remove(rank);
    }
    run("four lost devices", "", &three, &options);
    fewer.devices.retain(|device| device.node != 87);
    run("a lost node", "", &fewer, &options);
    run("a batch of 2,048 rows", "", &whole, &Options { batch_size: 2048, ..options.clone() });
    let less = Options { memory_limit_gib: Some(30.0), ..options };
    run("30 GiB of memory", "", &whole, &less);
}
