//! `plan`, `show`, `check` and `program`.

use crate::{
    PLAN, error_in_json, folder_with_graph, folder_with_plan, rannc, rannc_threads, text, write,
};

#[test]
fn plans_are_byte_identical() {
    let folder = folder_with_graph(40, 512);
    let mut plans = Vec::new();
    for threads in ["1", "2"] {
        for _ in 0..3 {
            let arguments = [&PLAN[..], &["-o", "plan.json"]].concat();
            let output = rannc_threads(folder.path(), threads, &arguments);
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
    let planned = rannc(folder.path(), &[&PLAN[..], &forced].concat());
    assert!(planned.status.success(), "{}", text(&planned.stderr));
    let shown = rannc(folder.path(), &["show", "plan.json"]);
    assert_eq!(text(&shown.stdout), text(&planned.stdout));
    assert!(text(&shown.stdout).starts_with("deployment of Sketch: 2 stages on 6 processes"));
    let cut = rannc(folder.path(), &["show", "plan.json", "--batch", "12"]);
    assert!(text(&cut.stdout).contains("with 12 rows: microbatches of up to 6"));
    let checked = rannc(folder.path(), &["check", "plan.json", "graph.json"]);
    assert_eq!(text(&checked.stdout), "the deployment fits the graph\n");
    let program = rannc(folder.path(), &["program", "plan.json", "graph.json"]);
    assert!(text(&program.stdout).contains("1B1"), "{}", text(&program.stderr));
}

#[test]
fn results_in_json_are_the_files() {
    let folder = folder_with_graph(4, 64);
    let planned = rannc(folder.path(), &[&PLAN[..], &["-o", "plan.json", "--json"]].concat());
    let file = std::fs::read(folder.path().join("plan.json")).unwrap();
    assert_eq!(text(&planned.stdout), text(&file));
    let shown = rannc(folder.path(), &["show", "plan.json", "--json"]);
    assert_eq!(text(&shown.stdout), text(&file));
    let checked = rannc(folder.path(), &["check", "plan.json", "graph.json", "--json"]);
    let answer: serde_json::Value = serde_json::from_slice(&checked.stdout).unwrap();
    assert_eq!(answer["fits"], true);
}

#[test]
fn a_deployment_is_adapted_to_fewer_devices() {
    let folder = folder_with_plan();
    let fewer = ["--from", "plan.json", "--devices", "5", "--json"];
    let again = rannc(folder.path(), &[&PLAN[..], &fewer].concat());
    assert!(again.status.success(), "{}", text(&again.stderr));
    let plan: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(plan["world_size"], 5);
    write(&folder, "other.json", &rannc_graph::testing::chain(5, 64).to_json());
    let arguments = ["plan", "other.json", "--batch", "12", "--cluster", "v100-32gb:6"];
    let other = rannc(folder.path(), &[&arguments[..], &["--from", "plan.json"]].concat());
    assert_eq!(other.status.code(), Some(1));
    assert!(text(&other.stderr).contains("another model"), "{}", text(&other.stderr));
}

#[test]
fn clusters_are_files_or_presets_of_which_a_part_can_be_used() {
    let folder = folder_with_graph(4, 64);
    write(&folder, "lab.toml", "devices = [{kind = \"v100-32gb\", count = 6}]\nname = \"lab\"");
    write(&folder, "lab", "devices = [{kind = \"v100-32gb\", count = 6}]\nname = \"lab\"");
    let world_size = |cluster: &str, devices: &[&str]| {
        let arguments = ["plan", "graph.json", "--batch", "12", "--json", "--cluster", cluster];
        let output = rannc(folder.path(), &[&arguments, devices].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        plan["world_size"].as_u64().unwrap()
    };
    assert_eq!(world_size("lab.toml", &[]), 6);
    assert_eq!(world_size("lab", &["--devices", "4"]), 4);
    assert_eq!(world_size("v100-32gb:2x3", &["--devices", "1"]), 1);
    let arguments = [&PLAN[..], &["--devices", "7"]].concat();
    let more = rannc(folder.path(), &arguments);
    assert_eq!(more.status.code(), Some(2));
    assert_eq!(
        text(&more.stderr),
        "error: `--devices` asks for 7 devices, but the cluster has 6\n"
    );
}

#[test]
fn a_plan_for_too_little_memory_is_a_no_with_a_hint() {
    let folder = folder_with_graph(4, 64);
    let arguments = [&PLAN[..], &["--memory-limit-gib", "0.0000001"]].concat();
    let output = rannc(folder.path(), &arguments);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).starts_with("error: no partition fits"),
        "{}",
        text(&output.stderr)
    );
    assert!(text(&output.stderr).contains("\nhint: "));
    let output = rannc(folder.path(), &[&arguments[..], &["--json"]].concat());
    assert_eq!(output.status.code(), Some(1));
    let (error, causes, hint) = error_in_json(&output);
    assert!(error.starts_with("no partition fits"));
    assert_eq!(causes, [""; 0]);
    assert!(hint.unwrap().contains("device"));
}

#[test]
fn a_deployment_of_another_model_is_a_no() {
    let folder = folder_with_plan();
    write(&folder, "other.json", &rannc_graph::testing::chain(5, 64).to_json());
    for command in ["check", "program"] {
        let output = rannc(folder.path(), &[command, "plan.json", "other.json"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).starts_with("error: the deployment belongs to another model"));
        assert!(text(&output.stderr).contains("\nhint: load the deployment of this model"));
    }
}

#[test]
fn help_says_what_the_exit_codes_mean() {
    let folder = tempfile::tempdir().unwrap();
    for command in ["capture", "plan", "show", "simulate", "check", "program"] {
        let help = rannc(folder.path(), &[command, "--help"]);
        assert!(help.status.success());
        assert!(text(&help.stdout).contains("1  the answer is no"));
    }
}

#[test]
fn what_cannot_be_meant_is_bad_usage() {
    let folder = folder_with_graph(2, 8);
    let refused = |arguments: &[&str]| {
        let output = rannc(folder.path(), &[&PLAN[..4], arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        text(&output.stderr).to_owned()
    };
    for arguments in [
        &["--batch", "0"],
        &["--batch", "99999999999999999999"],
        &["--batch", "-1"],
        &["--batch", "many"],
    ] {
        refused(arguments);
    }
    for (option, value) in [
        ("--stages", "0"),
        ("--replicas", "0"),
        ("--microbatches", "0"),
        ("--max-microbatches", "0"),
        ("--devices", "0"),
        ("--memory-limit-gib", "nan"),
        ("--memory-limit-gib", "0"),
        ("--memory-margin", "1"),
        ("--optimizer-state-factor", "-1"),
        ("--optimizer-state-factor", "inf"),
        ("--schedule", "gpipe"),
        ("--sharding", "zero"),
    ] {
        assert!(refused(&["--batch", "8", option, value]).contains(value), "{option} {value}");
    }
}
