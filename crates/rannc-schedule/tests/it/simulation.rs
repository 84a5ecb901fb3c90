//! What the simulator says about time and memory.

use proptest::prelude::*;
use rannc_schedule::{
    Action, GradientGroup, Memory, Mode, Pipeline, Place, Program, RankId, ScheduleError,
    ScheduleKind, StageId, Timeline, Timing, Transport, chrome_trace, compile, simulate,
    timeline_text,
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
    assert_eq!((&send["name"], &send["dur"]), (&"send F 0 0".into(), &1.5.into()));
}

#[test]
fn a_trace_has_all_that_a_viewer_needs() {
    let pipeline = chain(2, &[&[0], &[1]]);
    let program =
        compile(&pipeline, &batch(&[1, 0], 1), ScheduleKind::FillDrain, Mode::Training).unwrap();
    let trace = chrome_trace(&timeline(&program, &pipeline, 1500).unwrap());
    let trace: serde_json::Value = serde_json::from_str(&trace).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let short = |event: &serde_json::Value| {
        let field = |name: &str| event.get(name).map_or(String::new(), |value| format!(" {value}"));
        let fields = ["ph", "pid", "tid", "ts", "dur", "id", "name"].map(field);
        fields.concat().replace('"', "").trim_start().to_owned()
    };
    insta::assert_snapshot!(events.iter().map(short).collect::<Vec<_>>().join("\n"), @r"
    M 0 0 process_name
    M 0 0 process_sort_index
    M 0 0 thread_name
    M 0 1 thread_name
    M 0 2 thread_name
    M 1 0 process_name
    M 1 0 process_sort_index
    M 1 0 thread_name
    M 1 1 thread_name
    M 1 2 thread_name
    X 0 0 0.0 0.01 F 0 0
    X 0 1 0.01 1.5 send F 0 0
    X 0 0 1.521 0.006 reduce output 2
    X 0 2 1.549 1.5 receive B 0 0
    X 0 0 3.049 0.02 B 0 0
    X 1 2 0.01 1.5 receive F 1 0
    X 1 0 1.51 0.011 F 1 0
    X 1 0 1.521 0.006 reduce output 2
    X 1 0 1.527 0.022 B 1 0
    X 1 1 1.549 1.5 send B 1 0
    s 0 1 0.01 0 transfer
    f 1 2 0.01 0 transfer
    s 1 1 1.549 1 transfer
    f 0 2 1.549 1 transfer
    ");
}

#[test]
fn a_timeline_fits_on_lines() {
    let case = four_stages(ScheduleKind::OneForwardOneBackward);
    let text = timeline_text(&training(&case), 100);
    insta::assert_snapshot!(text, @r"
    simulated step of 0.000 ms, 0.000 ms a column: F forward, B backward, R reduce, - transfer, . idle
    rank 0 |FFFFFFFFFF..................BBBBBFF..BBBBBFF..BBBBBFFF..BBBBFFF..BBBBB....BBBBB....BBBBB....BBBBBRRR|  56 % busy
    rank 1 |..FFFFFFFF.............BBBBBFFF.BBBBBFFF.BBBBBFFF.BBBBBBFF..BBBBBFFF.BBBBB....BBBBB....BBBBBB....RRR|  62 % busy
    rank 2 |.....FFFFFF......BBBBBBFFFBBBBBBFFFBBBBBBFFF.BBBBBFFF.BBBBBBFFFBBBBBBFFFBBBBBB....BBBBB..........RRR|  68 % busy
    rank 3 |........FFFBBBBBBFFFBBBBBBFFFFBBBBBFFFFBBBBBBFFFBBBBBBFFFBBBBBBFFFBBBBBBFFFFBBBBBB...............RRR|  73 % busy
    ");
    let pipeline = chain(3, &[&[0, 1], &[2]]);
    let program =
        compile(&pipeline, &batch(&[2, 2, 2], 2), ScheduleKind::FillDrain, Mode::Training).unwrap();
    let text = timeline_text(&timeline(&program, &pipeline, 15).unwrap(), 60);
    insta::assert_snapshot!(text, @r"
    simulated step of 0.000 ms, 0.000 ms a column: F forward, B backward, R reduce, - transfer, . idle
    rank 0 |FFFFFF------............RRR......-----BBBBBB----BBBBBB....RR|  29 % busy
    rank 1 |-----FFF-FFF---------...RRR...........----BBBBBB----BBBBBBRR|  29 % busy
    rank 2 |----------------FFFF-FFFRRRBBBBBBBBBBBBB--..---------.......|  32 % busy
    ");
    assert_eq!(timeline_text(&Timeline::default(), 10).lines().count(), 1);
}

#[test]
fn gradients_are_reduced_while_other_stages_work() {
    let schedule = ScheduleKind::OneForwardOneBackward;
    let pipeline = chain(4, &[&[0, 1], &[2, 3]]);
    let program = compile(&pipeline, &batch(&[2; 4], 4), schedule, Mode::Training).unwrap();
    let timeline = timeline(&program, &pipeline, 0).unwrap();
    let last = |rank, wanted: fn(&Action) -> bool| {
        let mut events = timeline.events.iter();
        events.rfind(|event| event.rank == RankId(rank) && wanted(&event.action)).unwrap()
    };
    let backward = |rank| last(rank, |action| matches!(action, Action::Backward { .. }));
    let reduce = |rank| last(rank, |action| matches!(action, Action::ReduceGradients { .. }));
    for rank in 0..4 {
        assert_eq!(reduce(rank).start_ns, backward(rank).end_ns, "rank {rank}");
    }
    assert!(reduce(2).end_ns < backward(0).end_ns);
}
