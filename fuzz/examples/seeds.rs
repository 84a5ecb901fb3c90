//! Writes valid files into `corpus/`, for the fuzzer to start from.

use std::fs;
use std::path::Path;

use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::TestRunner;
use rannc_cost::{Calibration, Cluster, Profile, Sample};
use rannc_graph::{Graph, testing};
use rannc_plan::{Options, compile};
use serde_json::{Value, json};

fn main() -> std::io::Result<()> {
    write("graph", "chain.json", &testing::chain(3, 8).to_json())?;
    write("graph", "unet.json", &testing::unet(2, 4).to_json())?;
    write("graph", "loss.json", &returning_a_loss(&testing::chain(3, 8)))?;
    let mut runner = TestRunner::deterministic();
    for number in 0..3 {
        let tree = testing::graphs(6).new_tree(&mut runner).expect("nothing is filtered");
        write("graph", &format!("random{number}.json"), &tree.current().to_json())?;
    }
    let graph = testing::unet(2, 16);
    write("profile", "measured.json", &profile(&graph).to_json())?;
    let cpu = Cluster::parse("cpu:2x2").expect("the text is valid");
    write("cluster", "cpu.json", &cpu.to_json())?;
    write("cluster", "lab.toml", LAB)?;
    write("cluster", "short.txt", "a100-40gb:2x4")?;
    for (number, stages) in [1, 2, 4].into_iter().enumerate() {
        let options = Options { batch_size: 24, num_stages: Some(stages), ..Options::default() };
        let plan = compile(&graph, None, &cpu, &options).expect("the model fits");
        write("plan", &format!("stages{number}.json"), &plan.to_json())?;
    }
    Ok(())
}

fn write(target: &str, name: &str, text: &str) -> std::io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&folder)?;
    fs::write(folder.join(name), text)
}

/// The graph's file with a sum over rows as its result, a view and a write in place.
fn returning_a_loss(graph: &Graph) -> String {
    let mut file: Value = serde_json::from_str(&graph.to_json()).expect("it was just written");
    let loss = graph.outputs()[0];
    let value = &mut file["values"][loss.index()];
    (value["rows"], value["shape"]) = (json!("sum"), json!([]));
    let node = &mut file["nodes"][1];
    (node["mutates"], node["aliases"]) = (json!([node["inputs"][0]]), json!([node["inputs"][0]]));
    file.to_string()
}

fn profile(graph: &Graph) -> Profile {
    let sample = |rows| Sample { rows, forward_ns: rows * 70, backward_ns: rows * 150 + 9 };
    let entries =
        graph.nodes().iter().map(|node| (node.signature.clone(), [2, 4].map(sample).into()));
    Profile {
        device: "cpu".into(),
        settings: [("threads".to_owned(), "1".to_owned())].into(),
        calibration: Calibration { forward_ppm: 990_000, backward_ppm: 1_020_000 },
        entries: entries.collect(),
    }
}

const LAB: &str = r#"name = "lab"
[[devices]]
kind = "v100-32gb"
count = 4
[[devices]]
kind = "mine"
memory_bytes = 1000000000
flops_per_second = 2000000000
half_flops_per_second = 4000000000
memory_bytes_per_second = 3000000000
node = 1
[intra_node]
latency_ns = 8000
bytes_per_second = 150000000000
reduce_bytes_per_second = 90000000000
[inter_node]
latency_ns = 30000
bytes_per_second = 1250000000
[[shared]]
devices = [0, 1, 2]
capacity_ppm = 1500000
"#;
