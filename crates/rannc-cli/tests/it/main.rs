//! The command as users run it.

use std::path::Path;
use std::process::{Command, Output};

use rannc_graph::testing;
use tempfile::TempDir;

fn rannc(folder: &Path, threads: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rannc"))
        .args(arguments)
        .current_dir(folder)
        .env("RAYON_NUM_THREADS", threads)
        .output()
        .expect("the binary was built for this test")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("the command prints UTF-8")
}

/// A folder with a graph of this many tutorial layers.
fn folder_with_graph(layers: usize, width: i64) -> TempDir {
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    let graph = testing::chain(layers, width).to_json();
    std::fs::write(folder.path().join("graph.json"), graph).expect("the folder is writable");
    folder
}

const PLAN: [&str; 6] = ["plan", "graph.json", "--cluster", "v100-32gb:2x3", "--batch", "96"];

#[test]
fn plans_are_byte_identical() {
    let folder = folder_with_graph(40, 512);
    let mut plans = Vec::new();
    for threads in ["1", "2"] {
        for _ in 0..3 {
            let output = rannc(folder.path(), threads, &[&PLAN[..], &["-o", "plan.json"]].concat());
            assert!(output.status.success(), "{}", text(&output.stderr));
            plans.push(std::fs::read(folder.path().join("plan.json")).unwrap());
        }
    }
    plans.dedup();
    assert_eq!(plans.len(), 1);
}

#[test]
fn a_plan_can_be_shown_checked_and_played() {
    let folder = folder_with_graph(4, 64);
    let forced = ["--stages", "2", "--microbatches", "2", "-o", "plan.json"];
    let planned = rannc(folder.path(), "1", &[&PLAN[..], &forced].concat());
    assert!(planned.status.success(), "{}", text(&planned.stderr));
    let shown = rannc(folder.path(), "1", &["show", "plan.json"]);
    assert_eq!(text(&shown.stdout), text(&planned.stdout));
    assert!(text(&shown.stdout).starts_with("deployment of Sketch: 2 stages on 6 processes"));
    let checked = rannc(folder.path(), "1", &["check", "plan.json", "graph.json"]);
    assert_eq!(text(&checked.stdout), "the deployment fits the graph\n");
    let program = rannc(folder.path(), "1", &["program", "plan.json", "graph.json"]);
    assert!(text(&program.stdout).contains("1B1"), "{}", text(&program.stderr));
}

#[test]
fn errors_carry_a_hint_and_a_code() {
    let folder = folder_with_graph(4, 64);
    let run = |arguments: &[&str]| rannc(folder.path(), "1", arguments);
    let small = run(&[&PLAN[..], &["--memory-limit-gib", "0.0000001"]].concat());
    assert_eq!(small.status.code(), Some(1));
    assert!(text(&small.stderr).starts_with("error: no partition fits"), "{}", text(&small.stderr));
    assert!(text(&small.stderr).contains("\nhint: "));
    let missing = run(&["show", "nowhere.json"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(text(&missing.stderr).contains("cannot read the deployment file `nowhere.json`"));
    let unknown = run(&["plan", "graph.json", "--cluster", "tpu:1x8", "--batch", "8"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(text(&unknown.stderr).contains("there is no device preset `tpu`"));
}
