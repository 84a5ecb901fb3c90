//! Small programs, to be read.

use insta::assert_snapshot;
use rannc_schedule::{
    Batch, Mode, Pipeline, Place, Program, ScheduleError, ScheduleKind, Transport, compile, grid,
    listing,
};

use crate::pipelines::{batch, chain, flow, stage};

fn training(pipeline: &Pipeline, batch: &Batch, schedule: ScheduleKind) -> Program {
    compile(pipeline, batch, schedule, Mode::Training).unwrap()
}

fn picture(replicas: &[&[u32]], rows: &[u64], microbatches: u64, schedule: ScheduleKind) -> String {
    let pipeline = chain(u32::try_from(rows.len()).unwrap(), replicas);
    let program = training(&pipeline, &batch(rows, microbatches), schedule);
    grid(&program, &pipeline).unwrap()
}

#[test]
fn fill_drain() {
    let picture = picture(&[&[0], &[1], &[2]], &[2, 2, 2], 3, ScheduleKind::FillDrain);
    assert_snapshot!(picture, @r"
    rank 0 | 0F0 0F1 0F2 .   .   .   .   0B0 0B1 0B2
    rank 1 | .   1F0 1F1 1F2 .   .   1B0 1B1 1B2 .
    rank 2 | .   .   2F0 2F1 2F2 2B0 2B1 2B2 .   .
    ");
}

#[test]
fn one_forward_one_backward() {
    let schedule = ScheduleKind::OneForwardOneBackward;
    assert_snapshot!(picture(&[&[0], &[1], &[2]], &[2, 2, 2], 5, schedule), @r"
    rank 0 | 0F0 0F1 0F2 .   .   0B0 0F3 0B1 0F4 0B2 .   0B3 .   0B4
    rank 1 | .   1F0 1F1 .   1B0 1F2 1B1 1F3 1B2 1F4 1B3 .   1B4 .
    rank 2 | .   .   2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 2F4 2B4 .   .
    ");
}

#[test]
fn replicas_without_rows_do_nothing() {
    let schedule = ScheduleKind::OneForwardOneBackward;
    assert_snapshot!(picture(&[&[0, 1], &[2]], &[1, 0, 2], 2, schedule), @r"
    rank 0 | 0F0 .   .   0B0 .   .
    rank 1 | 0F0 0F1 .   0B0 .   0B1
    rank 2 | .   1F0 1B0 1F1 1B1 .
    ");
}

#[test]
fn stages_on_one_rank_take_turns() {
    let schedule = ScheduleKind::OneForwardOneBackward;
    assert_snapshot!(picture(&[&[0], &[1], &[0], &[1]], &[2, 2], 4, schedule), @r"
    rank 0 | 0F0 0F1 0F2 2F0 0F3 2F1 2B0 2F2 2B1 0B0 .   2F3 2B2 0B1 .   2B3 0B2 0B3
    rank 1 | .   1F0 1F1 1F2 3F0 3B0 3F1 3B1 1B0 3F2 1F3 3B2 1B1 3F3 3B3 1B2 1B3 .
    ");
}

#[test]
fn lists_of_two_stages() {
    let pipeline = chain(3, &[&[0, 1], &[2]]);
    let program = training(&pipeline, &batch(&[4, 1, 1], 2), ScheduleKind::FillDrain);
    assert_snapshot!(listing(&program), @r"
    rank 0 forward
      inCOPY_F v0[0:1]>0_F0 v0[0:1/1]
      inSEND_F v0[1:2]>1
      inCOPY_F v0[2:3]>0_F1 v0[0:1/1]
      inSEND_F v0[3:4]>1!
      0F0[1]
      0SEND_F0 v1[0:1]>2!
      0F1[1]
      0SEND_F1 v1[0:1]>2!
      REDUCE_OUTPUT 2
    rank 1 forward
      0RECV_F0 v0[0:1/2]<0
      inCOPY_F v0[0:1]>0_F0 v0[1:2/2]!
      0RECV_F1 v0[0:1/2]<0
      0RECV_F1 v0[1:2/2]<2
      0F0[2]
      0SEND_F0 v1[0:2]>2!
      0F1[2]
      0SEND_F1 v1[0:2]>2!
      REDUCE_OUTPUT 2
    rank 2 forward
      inSEND_F v0[0:1]>1!
      1RECV_F0 v1[0:1/3]<0
      1RECV_F0 v1[1:3/3]<1
      1RECV_F1 v1[0:1/3]<0
      1RECV_F1 v1[1:3/3]<1
      1F0[3]
      1COPY_F0 v2>out_F v2[/3]!
      1F1[3]
      1COPY_F1 v2>out_F v2[/3]!
      REDUCE_OUTPUT 2
    rank 0 backward
      0RECV_B0 v1[0:1/1]<2
      0B0[1]
      0RECV_B1 v1[0:1/1]<2
      0B1[1]
      REDUCE_GRADIENTS 0
    rank 1 backward
      0RECV_B0 v1[0:2/2]<2
      0B0[2]
      0RECV_B1 v1[0:2/2]<2
      0B1[2]
      REDUCE_GRADIENTS 0
    rank 2 backward
      outCOPY_B v2>1_B0 v2[/3]
      outCOPY_B v2>1_B1 v2[/3]!
      1B0[3]
      1SEND_B0 v1[0:1]>0
      1SEND_B0 v1[1:3]>1!
      1B1[3]
      1SEND_B1 v1[0:1]>0
      1SEND_B1 v1[1:3]>1!
    ");
}

#[test]
fn one_stage_everywhere_moves_nothing() {
    let pipeline = chain(2, &[&[0, 1]]);
    let program = training(&pipeline, &batch(&[3, 1], 1), ScheduleKind::OneForwardOneBackward);
    assert_snapshot!(listing(&program), @r"
    rank 0 forward
      inCOPY_F v0[0:3]>0_F0 v0[0:3/3]!
      outCOPY_B v1>0_B0 v1[/3]!
      0F0[3]
      0COPY_F0 v1>out_F v1[/3]!
      0B0[3]
      REDUCE_GRADIENTS 0
      REDUCE_OUTPUT 1
    rank 1 forward
      inCOPY_F v0[0:1]>0_F0 v0[0:1/1]!
      outCOPY_B v1>0_B0 v1[/1]!
      0F0[1]
      0COPY_F0 v1>out_F v1[/1]!
      0B0[1]
      REDUCE_GRADIENTS 0
      REDUCE_OUTPUT 1
    ");
}

#[test]
fn uneven_shares_move_rows() {
    let mut pipeline = chain(2, &[&[0, 1]]);
    pipeline.stages[0].shares = vec![3, 1];
    let program = training(&pipeline, &batch(&[2, 2], 1), ScheduleKind::OneForwardOneBackward);
    assert_snapshot!(listing(&program), @r"
    rank 0 forward
      inCOPY_F v0[0:2]>0_F0 v0[0:2/3]!
      0RECV_F0 v0[2:3/3]<1
      outCOPY_B v1>0_B0 v1[/3]!
      0F0[3]
      0COPY_F0 v1>out_F v1[/3]!
      0B0[3]
      REDUCE_GRADIENTS 0
      REDUCE_OUTPUT 1
    rank 1 forward
      inSEND_F v0[0:1]>0
      inCOPY_F v0[1:2]>0_F0 v0[0:1/1]!
      outCOPY_B v1>0_B0 v1[/1]!
      0F0[1]
      0COPY_F0 v1>out_F v1[/1]!
      0B0[1]
      REDUCE_GRADIENTS 0
      REDUCE_OUTPUT 1
    ");
}

#[test]
fn inputs_of_rank_0_only() {
    let mut pipeline = chain(2, &[&[0, 1]]);
    pipeline.flows[1] = flow(1, Transport::Split, stage(0), &[Place::Sink]);
    let batch = Batch { rows: vec![2, 0], gather: false, microbatches: 1 };
    let program = training(&pipeline, &batch, ScheduleKind::FillDrain);
    assert_snapshot!(listing(&program), @r"
    rank 0 forward
      inCOPY_F v0[0:1]>0_F0 v0[0:1/1]
      inSEND_F v0[1:2]>1!
      0F0[1]
      0COPY_F0 v1[0:1]>out_F v1[0:1/2]
      0SEND_F0 v1[0:1]>1!
      outRECV_F v1[1:2/2]<1
    rank 1 forward
      0RECV_F0 v0[0:1/1]<0
      outRECV_F v1[0:1/2]<0
      0F0[1]
      0SEND_F0 v1[0:1]>0
      0COPY_F0 v1[0:1]>out_F v1[1:2/2]!
    rank 0 backward
      outCOPY_B v1[0:1]>0_B0 v1[0:1/1]
      outSEND_B v1[1:2]>1!
      0B0[1]
      REDUCE_GRADIENTS 0
    rank 1 backward
      0RECV_B0 v1[0:1/1]<0
      0B0[1]
      REDUCE_GRADIENTS 0
    ");
}

#[test]
fn errors_say_what_to_do() {
    let mut pipeline = chain(1, &[&[0]]);
    pipeline.flows[1] = flow(1, Transport::Split, stage(0), &[Place::Sink]);
    let schedule = ScheduleKind::OneForwardOneBackward;
    let text =
        |error: ScheduleError| format!("{error}\nhint: {}", error.help().unwrap_or_default());
    let error = compile(&pipeline, &batch(&[2], 1), schedule, Mode::Training).unwrap_err();
    assert_snapshot!(text(error), @r"
    schedule `1f1b` needs a model that returns nothing but its loss, but a gradient flows back from output value 1
    hint: use schedule `fill_drain`, or let the model return its loss only
    ");
    let error = compile(&pipeline, &batch(&[0], 1), schedule, Mode::Inference).unwrap_err();
    assert_snapshot!(text(error), @r"
    the batch has 0 rows, needed 1 to 1099511627776
    hint: skip the step when no rank has any rows
    ");
    pipeline.flows[0].to = vec![stage(3)];
    let error = compile(&pipeline, &batch(&[2], 1), schedule, Mode::Inference).unwrap_err();
    assert_snapshot!(text(error), @r"
    the pipeline is not valid: value 0: it names stage 3 of 1
    hint:
    ");
}
