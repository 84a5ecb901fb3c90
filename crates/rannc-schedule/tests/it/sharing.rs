//! Steps of ranks that compute with the same cores.

use proptest::prelude::*;
use rannc_schedule::{
    GradientGroup, Memory, Mode, Program, RankId, ScheduleError, Shared, StageId, Timeline, Timing,
    compile, estimate, simulate,
};

use crate::pipelines::{Case, batch, cases, chain};
use crate::properties::program;

/// Forwards take 10, backwards 20; all ranks share.
struct Crowd {
    ranks: u32,
    capacity_ppm: Option<u64>,
    transfer_ns: u64,
}

impl Timing for Crowd {
    fn forward_ns(&self, _: StageId, _: RankId, _: u64) -> u64 {
        10
    }
    fn backward_ns(&self, _: StageId, _: RankId, _: u64) -> u64 {
        20
    }
    fn transfer_ns(&self, _: u64, _: RankId, _: RankId) -> u64 {
        self.transfer_ns
    }
    fn reduce_gradients_ns(&self, _: &GradientGroup) -> u64 {
        5
    }
    fn reduce_output_ns(&self, _: u64, _: &[RankId]) -> u64 {
        5
    }
    fn shared(&self) -> Vec<Shared> {
        let ranks = (0..self.ranks).map(RankId).collect();
        self.capacity_ppm.map(|capacity_ppm| Shared { ranks, capacity_ppm }).into_iter().collect()
    }
}

impl Memory for Crowd {
    fn saved_bytes(&self, _: StageId, rows: u64) -> u64 {
        rows
    }
}

fn step(case: &Case, program: &Program, room: Option<u64>, transfer_ns: u64) -> Timeline {
    let ranks = case.pipeline.world_size;
    let capacity_ppm = room.map(|room| room * 1_000_000);
    let crowd = Crowd { ranks, capacity_ppm, transfer_ns };
    simulate(program, &case.pipeline, &crowd, &crowd).unwrap()
}

fn busy(timeline: &Timeline) -> u64 {
    timeline.ranks.iter().map(|rank| rank.busy_ns).sum()
}

proptest! {
    #[test]
    fn room_for_all_changes_nothing(case in cases(), transfer_ns in 0..20u64) {
        let program = program(&case);
        let alone = step(&case, &program, None, transfer_ns);
        let roomy = step(&case, &program, Some(case.pipeline.world_size.into()), transfer_ns);
        prop_assert_eq!(busy(&roomy), busy(&alone));
        prop_assert_eq!(roomy.makespan_ns, alone.makespan_ns);
    }

    #[test]
    fn one_core_does_all_work_one_after_the_other(case in cases(), transfer_ns in 0..20u64) {
        let program = program(&case);
        let work = busy(&step(&case, &program, None, transfer_ns));
        let crowded = step(&case, &program, Some(1), transfer_ns);
        prop_assert!(crowded.makespan_ns >= work);
        prop_assert_eq!(crowded, step(&case, &program, Some(1), transfer_ns));
    }
}

#[test]
fn only_those_who_compute_at_the_same_time_slow_each_other_down() -> Result<(), ScheduleError> {
    // Two stages of which the second starts when the first has ended: nobody shares anything.
    let pipeline = chain(2, &[&[0], &[1]]);
    let batch = batch(&[4, 4], 1);
    let schedule = rannc_schedule::ScheduleKind::FillDrain;
    let program = compile(&pipeline, &batch, schedule, Mode::Training)?;
    let crowd = |capacity_ppm| Crowd { ranks: 2, capacity_ppm, transfer_ns: 0 };
    let makespan = |crowd: &Crowd| Ok(simulate(&program, &pipeline, crowd, crowd)?.makespan_ns);
    assert_eq!(makespan(&crowd(Some(1_000_000)))?, makespan(&crowd(None))?);
    // On half a core everything takes twice as long.
    let (half, none) = (crowd(Some(500_000)), crowd(None));
    assert_eq!(makespan(&half)? - makespan(&none)?, 60);
    let short = estimate(&pipeline, &batch, schedule, Mode::Training, &half, &half)?;
    assert_eq!(short.makespan_ns, makespan(&half)?);
    Ok(())
}
