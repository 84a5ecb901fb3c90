//! Random pipelines: what every program must be.

use proptest::prelude::*;
use rannc_schedule::{Action, Pass, Program, RankId, check, compile};

use crate::interpreter::Interpreter;
use crate::pipelines::{Case, cases};

pub(crate) fn program(case: &Case) -> Program {
    let program = compile(&case.pipeline, &case.batch, case.schedule, case.mode);
    program.unwrap_or_else(|error| panic!("{error}"))
}

fn pass(action: &Action) -> Pass {
    if matches!(action, Action::Backward { .. }) { Pass::Backward } else { Pass::Forward }
}

/// What replicas that run a stage together have in common.
fn without_rows(action: Action) -> Action {
    match action {
        Action::Forward { stage, microbatch, .. } => Action::Forward { stage, microbatch, rows: 0 },
        Action::Backward { stage, microbatch, .. } => {
            Action::Backward { stage, microbatch, rows: 0 }
        }
        other => other,
    }
}

/// Whether the lists of a pass run to the end if every send waits for its receive and no receive is posted
/// before the rank gets there.
fn meets(lists: &[Vec<Action>], case: &Case) -> bool {
    let mut steps = vec![0; lists.len()];
    loop {
        let head = |rank: usize, steps: &[usize]| lists[rank].get(steps[rank]).copied();
        let mut moved = false;
        for rank in 0..lists.len() {
            let Some(action) = head(rank, &steps) else { continue };
            let together: Vec<usize> = match action {
                Action::Send { peer, .. } => match head(peer.index(), &steps) {
                    Some(Action::Recv { peer: back, .. }) if back.index() == rank => {
                        vec![rank, peer.index()]
                    }
                    _ => continue,
                },
                Action::Recv { .. } => continue,
                Action::ReduceGradients { group } => {
                    let groups = &case.pipeline.gradient_groups;
                    let group = groups.iter().find(|other| other.id == group).unwrap();
                    group.ranks.iter().map(|rank: &RankId| rank.index()).collect()
                }
                Action::ReduceOutput { .. } => (0..lists.len()).collect(),
                Action::Forward { stage, .. } | Action::Backward { stage, .. }
                    if case.pipeline.stages[stage.index()].is_joint(pass(&action)) =>
                {
                    let ranks = &case.pipeline.stages[stage.index()].ranks;
                    ranks.iter().map(|rank| rank.index()).collect()
                }
                _ => vec![rank],
            };
            let meets = |other: usize| head(other, &steps).map(without_rows);
            let transfers = matches!(action, Action::Send { .. }); // the receiver was looked at
            let meet = |&other: &usize| meets(other) == Some(without_rows(action));
            if !transfers && !together.iter().all(meet) {
                continue;
            }
            for rank in together {
                steps[rank] += 1;
            }
            moved = true;
        }
        if !moved {
            return steps.iter().zip(lists).all(|(&step, list)| step == list.len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn programs_compute_the_step(case in cases()) {
        let program = program(&case);
        check(&program, &case.pipeline, &case.batch, case.mode).unwrap();
        Interpreter::new(&case, &program).run();
    }

    #[test]
    fn programs_do_not_even_need_buffers(case in cases()) {
        let program = program(&case);
        prop_assert!(meets(&program.forward, &case));
        prop_assert!(meets(&program.backward, &case));
    }

    #[test]
    fn actions_round_trip_as_text(case in cases()) {
        let program = program(&case);
        for (_, lists) in program.passes() {
            for action in lists.iter().flatten() {
                prop_assert_eq!(&action.to_string().parse::<Action>().unwrap(), action);
            }
        }
    }

    #[test]
    fn compiling_twice_gives_the_same(case in cases()) {
        prop_assert_eq!(program(&case), program(&case));
    }
}
