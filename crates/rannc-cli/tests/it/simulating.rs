//! `simulate`.

use crate::{PLAN, error_in_json, folder_with_graph, folder_with_plan, rannc, text, write};

const SIMULATE: [&str; 5] = ["simulate", "plan.json", "graph.json", "--cluster", "v100-32gb:2x3"];

#[test]
fn a_step_is_shown_as_a_timeline_with_memory() {
    let folder = folder_with_plan();
    let output = rannc(folder.path(), &SIMULATE);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    for part in [
        "Sketch: ",
        " rows a second, simulated with costs estimated from the data of v100-32gb\n",
        "\nsimulated step of ",
        "FF",
        "% busy\n",
        " of 31.7 GiB (activations of the step ",
    ] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
}

#[test]
fn a_step_in_json_agrees_with_the_plan() {
    let folder = folder_with_graph(4, 64);
    // Without replicas the planner's shorter simulation is exact.
    let forced = ["--stages", "3", "--replicas", "1", "-o", "plan.json"];
    let planned = rannc(folder.path(), &[&PLAN[..], &forced].concat());
    assert!(planned.status.success(), "{}", text(&planned.stderr));
    let output = rannc(folder.path(), &[&SIMULATE[..], &["--json"]].concat());
    let step: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let plan = std::fs::read(folder.path().join("plan.json")).unwrap();
    let plan: serde_json::Value = serde_json::from_slice(&plan).unwrap();
    assert_eq!(step["step_ns"], plan["estimates"]["step_ns"]);
    let ranks = step["ranks"].as_array().unwrap();
    assert_eq!(ranks.len(), 6);
    for (rank, planned) in ranks.iter().zip(plan["estimates"]["ranks"].as_array().unwrap()) {
        assert_eq!(rank["memory"], planned["memory"]);
        let whole = rank["busy_ns"].as_u64().unwrap() + rank["bubble_ns"].as_u64().unwrap();
        assert_eq!(step["step_ns"], whole);
        assert!((0.0..=1.0).contains(&rank["utilisation"].as_f64().unwrap()));
    }
}

#[test]
fn the_trace_has_the_work_of_all_ranks() {
    let folder = folder_with_plan();
    let output = rannc(folder.path(), &[&SIMULATE[..], &["--trace", "trace.json"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let trace = std::fs::read(folder.path().join("trace.json")).unwrap();
    let trace: serde_json::Value = serde_json::from_slice(&trace).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    for rank in 0..6 {
        let works =
            |kind: &str| events.iter().any(|event| event["pid"] == rank && event["cat"] == kind);
        assert!(works("forward") && works("backward"), "rank {rank}");
    }
    let output = rannc(folder.path(), &[&SIMULATE[..], &["--trace", "nowhere/t.json"]].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).starts_with("error: cannot write the trace `nowhere/t.json`"));
}

#[test]
fn another_number_of_devices_is_a_no_and_a_lacking_profile_no_answer() {
    let folder = folder_with_plan();
    let output = rannc(folder.path(), &[&SIMULATE[..4], &["v100-32gb:1x8", "--json"]].concat());
    assert_eq!(output.status.code(), Some(1));
    let (error, _, hint) = error_in_json(&output);
    assert_eq!(error, "the deployment was made for 6 processes, but 8 are running");
    assert!(hint.is_some());
    let profile = "{\"format\": \"rannc.profile/1\", \"device\": \"cpu\", \"entries\": {}}";
    write(&folder, "profile.json", profile);
    let output = rannc(folder.path(), &[&SIMULATE[..], &["--profile", "profile.json"]].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).starts_with("error: the profile of `cpu` has no samples for"));
}
