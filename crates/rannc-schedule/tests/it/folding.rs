//! A few copies in place of many: the same times and memory.

use proptest::prelude::*;
use rannc_cost::Cluster;
use rannc_graph::Affine;
use rannc_schedule::{
    Batch, Estimate, GradientGroup, Memory, Mode, Place, RankId, ScheduleKind, Stage, StageId,
    Timing, Transport, compile, estimate, fold, roughly_ns, simulate,
};

use crate::pipelines::{Case, batch, cases, chain, flow, stage};

/// Nodes of four ranks; the second half of the ranks is slower.
struct Nodes {
    world_size: u32,
    slow: bool,
    /// Whether transfers take no time.
    costless: bool,
}

impl Timing for Nodes {
    fn forward_ns(&self, stage: StageId, rank: RankId, rows: u64) -> u64 {
        let slow = self.slow && 2 * rank.0 >= self.world_size;
        (10 + u64::from(stage.0) + 5 * rows) * (1 + u64::from(slow))
    }
    fn backward_ns(&self, stage: StageId, rank: RankId, rows: u64) -> u64 {
        2 * self.forward_ns(stage, rank, rows)
    }
    fn transfer_ns(&self, bytes: u64, from: RankId, to: RankId) -> u64 {
        if self.costless {
            return 0;
        }
        if from.0 / 4 == to.0 / 4 { 1 + bytes / 8 } else { 4 + bytes / 2 }
    }
    fn reduce_gradients_ns(&self, group: &GradientGroup) -> u64 {
        u64::from(group.ranks.iter().map(|rank| rank.0).sum::<u32>())
    }
    fn reduce_output_ns(&self, _: u64, ranks: &[RankId]) -> u64 {
        3 * ranks.len() as u64
    }
}

impl Memory for Nodes {
    fn saved_bytes(&self, stage: StageId, rows: u64) -> u64 {
        3 * rows + u64::from(stage.0)
    }
}

/// The simulation of all ranks.
fn whole(case: &Case, nodes: &Nodes) -> Estimate {
    let Case { pipeline, batch, schedule, mode } = case;
    let program = compile(pipeline, batch, *schedule, *mode).unwrap();
    let timeline = simulate(&program, pipeline, nodes, nodes).unwrap();
    Estimate { makespan_ns: timeline.makespan_ns, ranks: timeline.ranks }
}

fn short(case: &Case, nodes: &Nodes) -> Estimate {
    estimate(&case.pipeline, &case.batch, case.schedule, case.mode, nodes, nodes).unwrap()
}

/// `copies` of a random pipeline beside each other, the ranks of each in a row.
fn copied() -> impl Strategy<Value = Case> {
    (cases(), 2..5u32, 1..4u64).prop_map(|(mut case, copies, rows)| {
        let size = case.pipeline.world_size;
        let all = |ranks: &[RankId]| -> Vec<RankId> {
            let shift = |copy: u32| ranks.iter().map(move |rank| RankId(copy * size + rank.0));
            (0..copies).flat_map(shift).collect()
        };
        for stage in &mut case.pipeline.stages {
            *stage = Stage { ranks: all(&stage.ranks), shares: Vec::new(), ..*stage };
        }
        for group in &mut case.pipeline.gradient_groups {
            group.ranks = all(&group.ranks);
        }
        case.pipeline.world_size = copies * size;
        let rows = vec![rows * case.batch.microbatches; (copies * size) as usize];
        case.batch = Batch { rows, gather: true, ..case.batch };
        case
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn folding_changes_nothing(case in copied(), slow in any::<bool>()) {
        let nodes = Nodes { world_size: case.pipeline.world_size, slow, costless: false };
        if is_exact(&case, &nodes) {
            prop_assert_eq!(short(&case, &nodes), whole(&case, &nodes));
        }
    }

    #[test]
    fn folding_costless_links_changes_nothing(case in copied(), slow in any::<bool>()) {
        let nodes = Nodes { world_size: case.pipeline.world_size, slow, costless: true };
        prop_assert_eq!(short(&case, &nodes), whole(&case, &nodes));
    }

    #[test]
    fn estimates_are_simulations(case in cases()) {
        let nodes = Nodes { world_size: case.pipeline.world_size, slow: true, costless: false };
        if is_exact(&case, &nodes) {
            prop_assert_eq!(short(&case, &nodes), whole(&case, &nodes));
        }
    }
}

/// Whether nothing is folded, or nothing is lost.
fn is_exact(case: &Case, nodes: &Nodes) -> bool {
    fold(&case.pipeline, &case.batch, case.mode, nodes).is_none_or(|folded| folded.exact)
}

/// Two stages of four replicas on the ranks that `place` gives for stage and replica.
fn two_stages(rows: u64, place: fn(u32, u32) -> u32) -> Case {
    let mut lists = [0, 1].map(|stage| [0, 1, 2, 3].map(|replica| place(stage, replica)));
    for list in &mut lists {
        list.sort_unstable();
    }
    Case {
        pipeline: chain(8, &[&lists[0], &lists[1]]),
        batch: batch(&[rows; 8], 2),
        schedule: ScheduleKind::OneForwardOneBackward,
        mode: Mode::Training,
    }
}

fn folded(case: &Case, nodes: &Nodes) -> Option<(u32, Vec<u32>, bool)> {
    let folded = fold(&case.pipeline, &case.batch, case.mode, nodes)?;
    let ranks = folded.rank_of.iter().map(|rank| rank.0).collect();
    Some((folded.copies, ranks, folded.exact))
}

const EQUAL: Nodes = Nodes { world_size: 8, slow: false, costless: false };
const MIXED: Nodes = Nodes { world_size: 8, slow: true, costless: false };

#[test]
fn one_copy_of_each_kind_is_kept() {
    let side_by_side = two_stages(2, |stage, replica| 2 * replica + stage);
    assert_eq!(folded(&side_by_side, &EQUAL), Some((4, vec![0, 1], true)));
    assert_eq!(folded(&side_by_side, &MIXED), Some((4, vec![0, 1, 4, 5], true)));
    let stage_by_stage = two_stages(2, |stage, replica| 4 * stage + replica);
    assert_eq!(folded(&stage_by_stage, &MIXED), Some((4, vec![0, 4], false)));
}

#[test]
fn what_differs_is_not_folded() {
    let changed = |change: fn(&mut Case)| {
        let mut case = two_stages(2, |stage, replica| 2 * replica + stage);
        change(&mut case);
        folded(&case, &EQUAL)
    };
    assert_eq!(changed(|case| case.batch.rows[0] = 3), None);
    assert_eq!(changed(|case| case.batch.microbatches = 3), None);
    assert_eq!(changed(|case| case.pipeline.stages[0].shares = vec![1, 1, 1, 2]), None);
    assert_eq!(changed(|case| case.pipeline.stages[0].ranks.truncate(3)), None);
    assert_eq!(
        changed(|case| {
            case.pipeline.flows.push(flow(9, Transport::Whole, stage(0), &[Place::Sink]));
        }),
        None
    );
    assert_eq!(changed(|case| case.pipeline.gradient_groups.clear()), Some((4, vec![0, 1], true)));
}

/// Nodes of eight A100, 2 ms a row.
struct Eights(Cluster);

impl Timing for Eights {
    fn forward_ns(&self, _: StageId, _: RankId, rows: u64) -> u64 {
        2_000_000 * rows
    }
    fn backward_ns(&self, _: StageId, _: RankId, rows: u64) -> u64 {
        4_000_000 * rows
    }
    fn transfer_ns(&self, bytes: u64, from: RankId, to: RankId) -> u64 {
        self.0.transfer_ns(bytes, from.0, to.0)
    }
    fn reduce_gradients_ns(&self, _: &GradientGroup) -> u64 {
        20_000_000
    }
    fn reduce_output_ns(&self, _: u64, _: &[RankId]) -> u64 {
        300_000
    }
}

#[test]
fn inputs_from_other_copies_change_little() {
    let nodes = Eights(Cluster::parse("a100-40gb:10x8").unwrap());
    for (num_stages, replicas, microbatches) in [(4, 8, 16), (2, 12, 8), (4, 20, 8)] {
        let lists: Vec<Vec<u32>> = (0..num_stages)
            .map(|stage| (stage * replicas..(stage + 1) * replicas).collect())
            .collect();
        let lists: Vec<&[u32]> = lists.iter().map(Vec::as_slice).collect();
        let mut pipeline = chain(num_stages * replicas, &lists);
        // Inputs are images of 224 x 224 in float32, what flows between stages is 4 MiB a row.
        pipeline.flows[0].bytes = Affine::per_row(4 * 3 * 224 * 224);
        for flow in &mut pipeline.flows[1..num_stages as usize] {
            flow.bytes = Affine::per_row(4 << 20);
        }
        let batch = batch(&vec![microbatches; (num_stages * replicas) as usize], microbatches);
        assert!(!fold(&pipeline, &batch, Mode::Training, &nodes).unwrap().exact);
        let none = Nodes { costless: true, ..EQUAL };
        for (schedule, parts) in
            [(ScheduleKind::OneForwardOneBackward, 50), (ScheduleKind::FillDrain, 1000)]
        {
            let mode = Mode::Training;
            let program = compile(&pipeline, &batch, schedule, mode).unwrap();
            let whole = simulate(&program, &pipeline, &nodes, &none).unwrap().makespan_ns;
            let short = estimate(&pipeline, &batch, schedule, mode, &nodes, &none).unwrap();
            let difference = whole.abs_diff(short.makespan_ns);
            assert!(parts * difference < whole, "{schedule}: {difference} of {whole} ns");
        }
    }
}

#[test]
fn an_outline_of_single_replicas_is_the_simulation() {
    for schedule in ScheduleKind::ALL {
        let case = Case {
            pipeline: chain(3, &[&[0], &[1], &[2]]),
            batch: batch(&[4, 4, 4], 4),
            schedule,
            mode: Mode::Training,
        };
        let Case { pipeline, batch, mode, .. } = &case;
        let rough = roughly_ns(pipeline, batch, schedule, *mode, &EQUAL).unwrap();
        assert_eq!(rough, Some(whole(&case, &EQUAL).makespan_ns));
    }
}

#[test]
fn an_outline_of_unequal_replicas_comes_close() {
    let nodes = Eights(Cluster::parse("a100-40gb:10x8").unwrap());
    let none = Nodes { costless: true, ..EQUAL };
    let counts: [&[u32]; 3] = [&[8, 7, 8, 8], &[5, 3, 4], &[16, 12, 15, 16, 16]];
    for counts in counts {
        let mut next = 0;
        let mut lists: Vec<Vec<u32>> = Vec::new();
        for &count in counts {
            lists.push((next..next + count).collect());
            next += count;
        }
        let lists: Vec<&[u32]> = lists.iter().map(Vec::as_slice).collect();
        let mut pipeline = chain(next, &lists);
        for flow in &mut pipeline.flows[1..counts.len()] {
            flow.bytes = Affine::per_row(1 << 20);
        }
        // So many rows that one more or less for a replica is little.
        let batch = batch(&vec![160; next as usize], 16);
        for schedule in ScheduleKind::ALL {
            let program = compile(&pipeline, &batch, schedule, Mode::Training).unwrap();
            let whole = simulate(&program, &pipeline, &nodes, &none).unwrap().makespan_ns;
            let rough = roughly_ns(&pipeline, &batch, schedule, Mode::Training, &nodes).unwrap();
            let difference = whole.abs_diff(rough.unwrap());
            assert!(50 * difference < whole, "{counts:?} {schedule}: {difference} of {whole} ns");
        }
    }
}

#[test]
fn what_several_stages_do_on_one_rank_has_no_outline() {
    let pipeline = chain(2, &[&[0, 1], &[1]]);
    let (schedule, mode) = (ScheduleKind::FillDrain, Mode::Training);
    let rough = roughly_ns(&pipeline, &batch(&[2, 2], 2), schedule, mode, &EQUAL).unwrap();
    assert_eq!(rough, None);
}
