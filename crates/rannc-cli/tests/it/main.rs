//! The command as users run it.

mod bad_input;
mod capturing;
mod corpus;
mod planning;
mod simulating;

use std::path::Path;
use std::process::{Command, Output};

use rannc_graph::testing;
use tempfile::TempDir;

/// Runs the command in a folder.
fn rannc(folder: &Path, arguments: &[&str]) -> Output {
    rannc_threads(folder, "1", arguments)
}

fn rannc_threads(folder: &Path, threads: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rannc"))
        .args(arguments)
        .current_dir(folder)
        .env("RAYON_NUM_THREADS", threads)
        .env_remove("VIRTUAL_ENV")
        .output()
        .expect("the binary was built for this test")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("the command prints UTF-8")
}

fn write(folder: &TempDir, name: &str, contents: &str) {
    std::fs::write(folder.path().join(name), contents).expect("the folder is writable");
}

/// A folder with a graph of this many tutorial layers.
fn folder_with_graph(layers: usize, width: i64) -> TempDir {
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    write(&folder, "graph.json", &testing::chain(layers, width).to_json());
    folder
}

/// A folder with a graph and its deployment on two stages.
fn folder_with_plan() -> TempDir {
    let folder = folder_with_graph(4, 64);
    let forced = ["--stages", "2", "--microbatches", "2", "-o", "plan.json"];
    let output = rannc(folder.path(), &[&PLAN[..], &forced].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    folder
}

/// What an error in JSON says: the error, its causes and the hint.
fn error_in_json(output: &Output) -> (String, Vec<String>, Option<String>) {
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
    let error: serde_json::Value =
        serde_json::from_slice(&output.stderr).expect("the error is JSON");
    serde_json::from_value(serde_json::json!([error["error"], error["causes"], error["hint"]]))
        .expect("the error has all fields")
}

const PLAN: [&str; 6] = ["plan", "graph.json", "--cluster", "v100-32gb:2x3", "--batch", "96"];
