//! Steps that leave gradients where they are, and programs that only add them up.

use insta::assert_snapshot;
use proptest::prelude::*;
use rannc_schedule::{
    Action, Mode, Pipeline, Program, ScheduleKind, Sharding, check, compile, listing,
};

use crate::pipelines::{Case, batch, cases, chain};

const ONE_F_ONE_B: ScheduleKind = ScheduleKind::OneForwardOneBackward;

fn reductions(program: &Program) -> Vec<(u32, usize)> {
    let passes = program.passes();
    let lists = passes.iter().flat_map(|(_, lists)| lists.iter().enumerate());
    let mut found: Vec<(u32, usize)> = lists
        .flat_map(|(rank, list)| list.iter().map(move |action| (action, rank)))
        .filter_map(|(action, rank)| match action {
            Action::ReduceGradients { group } => Some((*group, rank)),
            _ => None,
        })
        .collect();
    found.sort_unstable();
    found
}

fn replicas() -> Pipeline {
    let mut pipeline = chain(3, &[&[0, 1], &[0, 1, 2]]);
    pipeline.gradient_groups[1].sharding = Sharding::Optimizer;
    pipeline
}

#[test]
fn divided_gradients_never_accumulate() {
    let (pipeline, batch) = (replicas(), batch(&[2, 2, 2], 2));
    let program = |mode| compile(&pipeline, &batch, ONE_F_ONE_B, mode).unwrap();
    let all = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)];
    assert_eq!(reductions(&program(Mode::Training)), all);
    assert_eq!(reductions(&program(Mode::Accumulation)), all[2..]);
    assert_snapshot!(listing(&program(Mode::Reduction)), @r"
    rank 0 forward
      REDUCE_GRADIENTS 0
    rank 1 forward
      REDUCE_GRADIENTS 0
    ");
}

#[test]
fn a_program_of_another_mode_is_refused() {
    let (pipeline, batch) = (replicas(), batch(&[2, 2, 2], 2));
    let modes = [Mode::Inference, Mode::Training, Mode::Accumulation, Mode::Reduction];
    for made in modes {
        let program = compile(&pipeline, &batch, ScheduleKind::FillDrain, made).unwrap();
        for checked in modes {
            let verdict = check(&program, &pipeline, &batch, checked);
            assert_eq!(verdict.is_ok(), made == checked, "{made:?} as {checked:?}: {verdict:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn what_a_step_leaves_is_reduced_later(case in cases(), divided in any::<u32>()) {
        let Case { mut pipeline, batch, schedule, .. } = case;
        for stage in &mut pipeline.stages {
            stage.sharding = Sharding::None;
        }
        for (index, group) in pipeline.gradient_groups.iter_mut().enumerate() {
            group.sharding =
                if divided >> index & 1 == 1 { Sharding::Optimizer } else { Sharding::None };
        }
        let of = |mode| reductions(&compile(&pipeline, &batch, schedule, mode).unwrap());
        let mut both = [of(Mode::Accumulation), of(Mode::Reduction)].concat();
        both.sort_unstable();
        prop_assert_eq!(both, of(Mode::Training));
    }
}
