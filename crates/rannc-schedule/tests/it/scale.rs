//! Large programs stay fast enough to be written at every new batch shape.

use rannc_schedule::{Mode, Place, RankId, ScheduleKind, Sharding, Stage, Transport, compile};

use crate::pipelines::{batch, chain, flow, stage};

#[test]
fn eight_ranks_with_fifty_flows() {
    let mut pipeline = chain(8, &[&[0, 1], &[2, 3], &[4, 5], &[6, 7]]);
    for value in 0..45 {
        let from = value % 3;
        let extra = flow(100 + value, Transport::Split, stage(from), &[stage(from + 1)]);
        pipeline.flows.push(extra);
    }
    let rows = batch(&[32; 8], 32);
    let schedule = ScheduleKind::OneForwardOneBackward;
    let program = compile(&pipeline, &rows, schedule, Mode::Training).unwrap();
    let actions: usize = program.forward.iter().map(Vec::len).sum();
    assert!(actions > 10_000);
}

#[test]
#[ignore = "takes seconds without optimisation"]
fn a_thousand_ranks() {
    let mut pipeline = chain(1024, &[&[0u32] as &[u32]; 8]);
    for (index, stage) in pipeline.stages.iter_mut().enumerate() {
        let first = 128 * u32::try_from(index).unwrap();
        *stage = Stage {
            ranks: (first..first + 128).map(RankId).collect(),
            shares: Vec::new(),
            backward: true,
            sharding: Sharding::None,
        };
        pipeline.gradient_groups[index].ranks.clone_from(&stage.ranks);
    }
    pipeline.flows.push(flow(50, Transport::Split, stage(0), &[stage(7), Place::Sink]));
    pipeline.flows.push(flow(51, Transport::Split, Place::Source, &[stage(7)]));
    let rows = batch(&[64; 1024], 64);
    let program = compile(&pipeline, &rows, ScheduleKind::FillDrain, Mode::Training).unwrap();
    assert_eq!(program.backward.len(), 1024);
}
