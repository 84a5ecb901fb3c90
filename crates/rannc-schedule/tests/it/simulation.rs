//! What the simulator says about time and memory.

use proptest::prelude::*;
use rannc_schedule::{
    Action, GradientGroup, Memory, Mode, Pipeline, Place, Program, RankId, ScheduleError,
    ScheduleKind, StageId, Timeline, Timing, Transport, chrome_trace, compile, simulate,
};

use crate::pipelines::{Case, batch, cases, chain};
use crate::properties::program;

/// Stage `s` takes `10 + s` forward and twice that backward, whatever the rows.
struct Steady {
    transfer_ns: u64,
}

impl Timing for Steady {
    fn forward_ns(&self, stage: StageId, _: RankId, _: u64) -> u64 {
        10 + u64::from(stage.0)
    }
    fn backward_ns(&self, stage: StageId, rank: RankId, rows: u64) -> u64 {
        2 * self.forward_ns(stage, rank, rows)
    }
    fn transfer_ns(&self, _: u64, _: RankId, _: RankId) -> u64 {
        self.transfer_ns
    }
    fn reduce_gradients_ns(&self, group: &GradientGroup) -> u64 {
        3 * group.ranks.len() as u64
    }
    fn reduce_output_ns(&self, _: u64, ranks: &[RankId]) -> u64 {
        3 * ranks.len() as u64
    }
}

/// A byte a row.
struct Rows;

impl Memory for Rows {
    fn saved_bytes(&self, _: StageId, rows: u64) -> u64 {
        rows
    }
}

pub(crate) fn timeline(
    program: &Program,
    pipeline: &Pipeline,
    transfer_ns: u64,
) -> Result<Timeline, ScheduleError> {
    simulate(program, pipeline, &Steady { transfer_ns }, &Rows)
}

/// The longest way of rows up through the stages.
fn critical_path(pipeline: &Pipeline) -> u64 {
    let timing = Steady { transfer_ns: 0 };
    let mut ends = Vec::new();
    for (index, _) in pipeline.stages.iter().enumerate() {
        let place = Place::Stage(StageId::new(index));
        let flows = pipeline.flows.iter();
        let before =
            flows.filter(|flow| flow.transport == Transport::Split && flow.to.contains(&place));
        let ready = before.map(|flow| match flow.from {
            Place::Stage(stage) => ends[stage.index()],
            _ => 0,
        });
        ends.push(ready.max().unwrap_or(0) + timing.forward_ns(StageId::new(index), RankId(0), 1));
    }
    ends.into_iter().max().unwrap_or(0)
}

proptest! {
    #[test]
    fn no_step_is_shorter_than_its_work(case in cases(), transfer_ns in 0..20u64) {
        let program = program(&case);
        let timeline = timeline(&program, &case.pipeline, transfer_ns).unwrap();
        prop_assert!(timeline.makespan_ns >= critical_path(&case.pipeline));
        for (rank, lists) in timeline.ranks.iter().zip(&program.forward) {
            prop_assert!(timeline.makespan_ns >= rank.busy_ns);
            prop_assert_eq!(rank.busy_ns + rank.bubble_ns, timeline.makespan_ns);
            prop_assert!(rank.busy_ns > 0 || !lists.iter().any(Action::is_compute));
        }
        let work = timeline.events.iter().filter(|event| event.action.is_compute());
        for pair in work.collect::<Vec<_>>().windows(2) {
            prop_assert!(pair[0].rank != pair[1].rank || pair[0].end_ns <= pair[1].start_ns);
        }
    }
}

fn training(case: &Case) -> Timeline {
    timeline(&program(case), &case.pipeline, 0).unwrap()
}

fn four_stages(schedule: ScheduleKind) -> Case {
    let mut pipeline = chain(4, &[&[0], &[1], &[2], &[3]]);
    for flow in &mut pipeline.flows {
        flow.bytes = rannc_graph::Affine::fixed(0);
    }
    Case { pipeline, batch: batch(&[6, 6, 6, 6], 8), schedule, mode: Mode::Training }
}

#[test]
fn one_f_one_b_keeps_fewer_microbatches() {
    let peaks = |schedule| {
        let timeline = training(&four_stages(schedule));
        timeline.ranks.iter().map(|rank| rank.peak_activation_bytes / 3).collect::<Vec<_>>()
    };
    assert_eq!(peaks(ScheduleKind::FillDrain), [8, 8, 8, 8]);
    assert_eq!(peaks(ScheduleKind::OneForwardOneBackward), [4, 3, 2, 1]);
}

#[test]
fn the_bubble_is_the_textbook_one() {
    // The slowest stage takes 13 + 26 ns and waits for the others once up and once down.
    for schedule in ScheduleKind::ALL {
        let timeline = training(&four_stages(schedule));
        assert_eq!(timeline.ranks[3].busy_ns, 8 * 39);
        assert_eq!(
            timeline.makespan_ns,
            10 + 11 + 12 + 8 * 39 + 24 + 22 + 20 + 4 * 3,
            "{schedule}"
        );
    }
}

#[test]
fn inference_keeps_nothing() {
    let mut case = four_stages(ScheduleKind::FillDrain);
    case.mode = Mode::Inference;
    let timeline = training(&case);
    assert!(timeline.ranks.iter().all(|rank| rank.peak_activation_bytes == 0));
    assert_eq!(timeline.makespan_ns, 10 + 11 + 12 + 8 * 13 + 4 * 3);
}

#[test]
fn the_trace_is_json() {
    let pipeline = chain(2, &[&[0], &[1]]);
    let program =
        compile(&pipeline, &batch(&[2, 2], 2), ScheduleKind::FillDrain, Mode::Training).unwrap();
    let trace = chrome_trace(&timeline(&program, &pipeline, 1500).unwrap());
    let trace: serde_json::Value = serde_json::from_str(&trace).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let work = events.iter().filter(|event| event["cat"] == "forward").count();
    assert_eq!(work, 4);
    let send = events.iter().find(|event| event["cat"] == "send").unwrap();
    assert_eq!((&send["name"], &send["dur"]), (&"0SEND_F0".into(), &1.5.into()));
}
