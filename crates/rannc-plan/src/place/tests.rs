use rannc_cost::{ScheduleKind, Sharding};
use rannc_graph::{Batch, Graph, testing};
use rannc_schedule::{Action, Mode};

use crate::{Plan, PlanStage};

/// A plan for a chain of five operators in two stages on a rank each, with groups of operators by
/// number to compute again.
fn plan(graph: &Graph, recompute: [&[&[usize]]; 2]) -> Plan {
    let key = |&index: &usize| graph.nodes()[index].key.clone();
    let stages = [&[0, 1, 2][..], &[3, 4]].into_iter().zip(recompute).zip(0..);
    Plan {
        model: graph.name().into(),
        model_identity: graph.identity(),
        world_size: 2,
        batch_size: 8,
        microbatches: 2,
        schedule: ScheduleKind::FillDrain,
        stages: stages
            .map(|((nodes, groups), rank)| PlanStage {
                ranks: vec![rank],
                shares: vec![],
                sharding: Sharding::None,
                nodes: nodes.iter().map(key).collect(),
                recompute: groups.iter().map(|group| group.iter().map(key).collect()).collect(),
            })
            .collect(),
        estimates: None,
    }
}

fn problem(recompute: [&[&[usize]]; 2]) -> String {
    let graph = testing::chain(5, 4);
    plan(&graph, recompute).check(&graph, 2).unwrap_err().to_string()
}

#[test]
fn groups_to_compute_again_reach_their_stage() {
    let graph = testing::chain(5, 4);
    let plan = plan(&graph, [&[&[1, 0], &[2]], &[&[3, 4]]]);
    plan.check(&graph, 2).unwrap();
    let placement = plan.place(&graph).unwrap();
    let groups = placement.stages.iter().map(|stage| stage.recompute.clone());
    let groups: Vec<Vec<Vec<u32>>> = groups
        .map(|stage| stage.iter().map(|group| group.iter().map(|id| id.0).collect()).collect())
        .collect();
    assert_eq!(groups, [vec![vec![0, 1], vec![2]], vec![vec![3, 4]]]);
}

#[test]
fn a_form_whose_batch_must_stay_whole_runs_on_one_replica() {
    let graph = testing::chain(5, 4);
    let mut plan = plan(&graph, [&[], &[]]);
    plan.world_size = 3;
    plan.stages[1].ranks = vec![1, 2];
    plan.check(&graph, 3).unwrap();
    let whole = Graph::new(
        graph.name().into(),
        Batch { rows: 8, splittable: false, reason: None },
        graph.values().to_vec(),
        graph.nodes().to_vec(),
        graph.inputs().to_vec(),
        graph.outputs().to_vec(),
    );
    for (form, rows) in [(graph, [24, 12, 12]), (whole.unwrap(), [24, 24, 0])] {
        let placement = plan.place(&form).unwrap();
        let program = placement.program(vec![8, 8, 8], true, Mode::Training).unwrap();
        let computed = program.forward.iter().map(|actions| {
            let computed = actions.iter().map(|action| match action {
                Action::Forward { rows, .. } => *rows,
                _ => 0,
            });
            computed.sum::<u64>()
        });
        assert_eq!(computed.collect::<Vec<_>>(), rows);
    }
}

#[test]
fn groups_must_be_parts_of_their_stage() {
    insta::assert_snapshot!(
        problem([&[&[1, 3]], &[]]),
        @"the deployment is not valid: group 0 of stage 0's `recompute` has `layer3/op#0`, which is of stage 1"
    );
    insta::assert_snapshot!(
        problem([&[&[0], &[1, 0]], &[]]),
        @"the deployment is not valid: group 1 of stage 0's `recompute` has `layer0/op#0`, which is in group 0 already"
    );
    insta::assert_snapshot!(
        problem([&[], &[&[]]]),
        @"the deployment is not valid: group 0 of stage 1's `recompute` is empty; leave it out"
    );
    let graph = testing::chain(5, 4);
    let mut plan = plan(&graph, [&[&[0]], &[]]);
    plan.stages[0].recompute[0][0] = "layer9/op#0".into();
    insta::assert_snapshot!(
        plan.check(&graph, 2).unwrap_err(),
        @"the deployment is not valid: group 0 of stage 0's `recompute` has `layer9/op#0`, which no stage lists"
    );
}

#[test]
fn groups_must_be_convex() {
    insta::assert_snapshot!(
        problem([&[&[0, 2]], &[]]),
        @"the deployment is not valid: group 0 of stage 0's `recompute` is not convex: a path leaves it, to `layer1/op#0`, and enters it again"
    );
    let graph = testing::chain(5, 4);
    let placement = plan(&graph, [&[&[0, 2]], &[&[3]]]).place(&graph).unwrap();
    assert!(placement.stages[0].recompute.is_empty(), "another capture may not allow a group");
    assert_eq!(placement.stages[1].recompute.len(), 1);
}

#[test]
fn bad_shares_are_refused() {
    let refused = |shares: &[u64]| {
        let stage = PlanStage {
            ranks: vec![0, 2],
            shares: shares.to_vec(),
            sharding: Sharding::None,
            nodes: Vec::new(),
            recompute: Vec::new(),
        };
        let plan = Plan {
            model: "M".into(),
            model_identity: String::new(),
            world_size: 3,
            batch_size: 8,
            microbatches: 1,
            schedule: ScheduleKind::FillDrain,
            stages: vec![stage],
            estimates: None,
        };
        plan.check_form().unwrap_err().to_string()
    };
    let found = [refused(&[1]), refused(&[1, 0]), refused(&[1, u64::MAX])];
    insta::assert_snapshot!(found.join("\n"), @r"
    the deployment is not valid: stage 0 has 1 shares for 2 ranks, needed one for each
    the deployment is not valid: stage 0 has a share of 0, needed 1 to 1099511627776
    the deployment is not valid: stage 0 has a share of 18446744073709551615, needed 1 to 1099511627776
    ");
}
