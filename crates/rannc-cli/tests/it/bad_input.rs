//! Files that cannot be used: the error names the file and the place, the code is 2.

use std::time::{Duration, Instant};

use crate::{error_in_json, folder_with_graph, folder_with_plan, rannc, text, write};

/// The graph of a folder with one piece of text replaced.
fn graph_with(from: &str, to: &str) -> String {
    let graph = rannc_graph::testing::chain(2, 8).to_json();
    assert!(graph.contains(from), "{from} is not in {graph}");
    graph.replacen(from, to, 1)
}

fn refused_graph(graph: &str) -> String {
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    write(&folder, "graph.json", graph);
    let arguments = ["plan", "graph.json", "--cluster", "cpu:1x2", "--batch", "8"];
    let output = rannc(folder.path(), &arguments);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    text(&output.stderr).to_owned()
}

#[test]
fn graphs_name_the_place() {
    let found = [
        graph_with("\"inputs\":[0,1]", "\"inputs\":[4,1]"),
        graph_with("\"inputs\":[0,1]", "\"inputs\":[0,4294967295]"),
        graph_with("\"inputs\":[0,1]", "\"inputs\":[0,4294967296]"),
        graph_with("layer1/op#0", "layer0/op#0"),
        graph_with("\"shape\":[64]", "\"shape\":[9223372036854775807]"),
        graph_with("\"shape\":[64]", "\"shape\":[9223372036854775808]"),
        graph_with("\"rows\":8", "\"rows\":18446744073709551615"),
        graph_with("\"outer\":1", "\"outer\":2"),
        graph_with("layer1.weight", "layer0.weight"),
        graph_with("\"outputs\":[2]", "\"outputs\":[2],\"mutates\":[3]"),
        "{\"format\": \"rannc.graph/1\"".to_owned(),
        String::new(),
        format!("{{\"deep\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000)),
    ]
    .map(|graph| refused_graph(&graph));
    for text in &found {
        assert!(
            text.starts_with("error: cannot use the graph `graph.json`\ncaused by: "),
            "{text}"
        );
    }
    let causes = found.map(|text| text.lines().nth(1).unwrap().replace("caused by: ", ""));
    insta::assert_snapshot!(causes.join("\n"), @"
    node `layer0/op#0` reads value `v1` before it is produced: the graph has a cycle, is not in topological order, or lacks the producer
    node `layer0/op#0` uses value 4294967295, but the graph has only 5 values
    the graph file is not valid: invalid value: integer `4294967296`, expected u32 at line 1 column 799
    the node key `layer0/op#0` is used twice
    value `layer0.weight`: with the 8 rows that capture saw, its sizes [9223372036854775807] make it larger than 9007199254740992 bytes
    the graph file is not valid: invalid value: integer `9223372036854775808`, expected a whole number below 2^63, or two of them as `[per_row, fixed]` at line 1 column 311
    `batch`: it has 18446744073709551615 rows, needed at most 1099511627776
    value `x`: rows are said to lie in dimension 0 with 2 x rows x 1 entries, but its sizes are [[1,0],8]
    value `layer0.weight`: its name is used for another part of the model's state
    node `layer0/op#0` has value `layer1.weight` in `mutates`, but not in `inputs`
    the graph file is not valid: EOF while parsing an object at line 1 column 26
    the graph file is not valid: EOF while parsing a value at line 1 column 0
    the graph file is not valid: missing field `format` at line 1 column 200011
    ");
}

#[test]
fn missing_and_binary_files_are_named() {
    let folder = folder_with_graph(2, 8);
    std::fs::write(folder.path().join("binary.json"), [0xff, 0xfe, 0]).unwrap();
    let run = |arguments: &[&str]| {
        let output = rannc(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(2));
        text(&output.stderr).to_owned()
    };
    let missing = run(&["show", "nowhere.json"]);
    assert!(missing.contains("cannot read the deployment file `nowhere.json`"), "{missing}");
    for cluster in ["nowhere.toml", "binary.json", "."] {
        let text = run(&["plan", "graph.json", "--cluster", cluster, "--batch", "8"]);
        assert!(text.contains(&format!("`{cluster}`")), "{text}");
        assert!(text.contains("\nhint: "), "{text}");
    }
    let unknown = run(&["plan", "graph.json", "--cluster", "tpu:1x8", "--batch", "8"]);
    assert!(unknown.contains("there is no device preset `tpu`"));
    assert!(unknown.contains("\nhint: use one of `v100-32gb`"));
    let binary = run(&["plan", "binary.json", "--cluster", "cpu", "--batch", "8"]);
    assert!(binary.starts_with("error: cannot use the graph `binary.json`"));
    let profile =
        run(&["plan", "graph.json", "--cluster", "cpu", "--batch", "8", "--profile", "graph.json"]);
    assert!(profile.contains("caused by: the file has format `rannc.graph/1`"), "{profile}");
}

#[test]
fn errors_in_json_have_causes_and_hints() {
    let folder = folder_with_graph(2, 8);
    write(&folder, "plan.json", "{\"format\": \"rannc.plan/1\"}");
    let output = rannc(folder.path(), &["show", "plan.json", "--json"]);
    assert_eq!(output.status.code(), Some(2));
    let (error, causes, hint) = error_in_json(&output);
    assert_eq!(
        error,
        "the deployment file `plan.json` is damaged or incomplete: missing field `model` at line 1 column 26"
    );
    assert_eq!(causes, [""; 0]);
    assert!(hint.unwrap().starts_with("save the deployment again"));
    let output = rannc(folder.path(), &["check", "plan.json", "nowhere.json", "--json"]);
    let (error, causes, hint) = error_in_json(&output);
    assert_eq!(error, "cannot use the graph `nowhere.json`");
    assert_eq!(causes.len(), 1);
    assert_eq!(hint.as_deref(), Some("name a file that `rannc capture` wrote"));
}

#[test]
fn small_files_with_huge_numbers_take_neither_time_nor_memory() {
    let folder = folder_with_plan();
    write(&folder, "huge.toml", "devices = [{kind = \"cpu\", count = 4294967295}]");
    let plan = std::fs::read_to_string(folder.path().join("plan.json")).unwrap();
    write(&folder, "huge.json", &plan.replace("\"world_size\": 6", "\"world_size\": 4000000000"));
    let start = Instant::now();
    for cluster in ["huge.toml", "cpu:65536x65536", "cpu:4294967295"] {
        let output =
            rannc(folder.path(), &["plan", "graph.json", "--cluster", cluster, "--batch", "8"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains("devices, needed at most 65536"));
    }
    let shown = rannc(folder.path(), &["show", "huge.json"]);
    assert_eq!(shown.status.code(), Some(2));
    assert!(text(&shown.stderr).starts_with("error: cannot use the deployment `huge.json`"));
    assert!(text(&shown.stderr).contains("it has 4000000000 processes, needed 1 to 65536"));
    let checked = rannc(folder.path(), &["check", "huge.json", "graph.json"]);
    assert_eq!(checked.status.code(), Some(1));
    // Each takes milliseconds; filling memory would take far longer.
    assert!(start.elapsed() < Duration::from_secs(20));
}
