//! Pipelines for tests: chains, and random ones.

use proptest::prelude::*;
use proptest::sample::subsequence;
use rannc_graph::Affine;
use rannc_schedule::{
    Batch, Flow, GradientGroup, Mode, Pipeline, Place, RankId, ScheduleKind, Sharding, Stage,
    StageId, Transport,
};

pub(crate) fn stage(index: u32) -> Place {
    Place::Stage(StageId(index))
}

pub(crate) fn ranks(ranks: &[u32]) -> Vec<RankId> {
    ranks.iter().map(|&rank| RankId(rank)).collect()
}

/// A flow of 4 bytes a row (or in all) with a gradient, unless it is a model input.
pub(crate) fn flow(value: u32, transport: Transport, from: Place, to: &[Place]) -> Flow {
    let bytes = if transport == Transport::Split { Affine::per_row(4) } else { Affine::fixed(4) };
    Flow { value, transport, from, to: to.to_vec(), gradient: from != Place::Source, bytes }
}

/// Value 0 goes in, value `i` out of stage `i - 1`; the last is the sum of the losses.
pub(crate) fn chain(world_size: u32, replicas: &[&[u32]]) -> Pipeline {
    let last = u32::try_from(replicas.len()).unwrap();
    let mut flows = vec![flow(0, Transport::Split, Place::Source, &[stage(0)])];
    for index in 1..last {
        flows.push(flow(index, Transport::Split, stage(index - 1), &[stage(index)]));
    }
    flows.push(flow(last, Transport::Sum, stage(last - 1), &[Place::Sink]));
    let stages = replicas.iter().map(|list| Stage {
        ranks: ranks(list),
        shares: Vec::new(),
        backward: true,
        sharding: Sharding::None,
    });
    let groups = replicas.iter().zip(0..).map(|(list, id)| GradientGroup {
        id,
        ranks: ranks(list),
        stages: vec![StageId(id)],
        bytes: 100,
        sharding: Sharding::None,
    });
    Pipeline { world_size, stages: stages.collect(), flows, gradient_groups: groups.collect() }
}

pub(crate) fn batch(rows: &[u64], microbatches: u64) -> Batch {
    Batch { rows: rows.to_vec(), gather: true, microbatches }
}

/// One thing to compile.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) pipeline: Pipeline,
    pub(crate) batch: Batch,
    pub(crate) schedule: ScheduleKind,
    pub(crate) mode: Mode,
}

/// Everything at once: stages that share ranks or have none in common, uneven shares, idle ranks, ranks
/// and replicas without rows, sharding, values over several stages, all transports, missing gradients, tied parameters.
pub(crate) fn cases() -> impl Strategy<Value = Case> {
    (1..=5u32, 1..=5usize).prop_flat_map(|(world_size, num_stages)| {
        let all: Vec<u32> = (0..world_size).collect();
        let most = all.len().min(4);
        let shares = prop_oneof![Just(Vec::new()), prop::collection::vec(1..6u64, most)];
        let level = prop_oneof![2 => Just(0), 1 => 1..Sharding::ALL.len()];
        let stage = (subsequence(all, 1..=most), shares, prop::bool::weighted(0.85), level);
        let flow = (0..3u8, 0..num_stages, any::<u32>(), prop::bool::weighted(0.8));
        (
            prop::collection::vec(stage, num_stages),
            prop::collection::vec(flow, 0..6),
            prop::collection::vec(prop_oneof![Just(0), 0..8u64], world_size as usize),
            (any::<bool>(), 1..=5u64, any::<bool>(), modes()),
        )
            .prop_map(|(stages, extra, rows, options)| case(&stages, &extra, rows, options))
    })
}

fn modes() -> impl Strategy<Value = Mode> {
    prop_oneof![3 => Just(Mode::Training), 1 => Just(Mode::Accumulation), 1 => Just(Mode::Inference)]
}

fn case(
    stages: &[(Vec<u32>, Vec<u64>, bool, usize)],
    extra: &[(u8, usize, u32, bool)],
    mut rows: Vec<u64>,
    (gather, microbatches, interleaved, mode): (bool, u64, bool, Mode),
) -> Case {
    let lists: Vec<&[u32]> = stages.iter().map(|(ranks, ..)| ranks.as_slice()).collect();
    let mut pipeline = chain(u32::try_from(rows.len()).unwrap(), &lists);
    let groups = pipeline.gradient_groups.iter_mut();
    for ((stage, group), (ranks, shares, backward, level)) in
        pipeline.stages.iter_mut().zip(groups).zip(stages)
    {
        stage.backward = *backward;
        (stage.sharding, group.sharding) = (Sharding::ALL[*level], Sharding::ALL[*level]);
        stage.shares = shares.iter().copied().take(ranks.len()).collect();
    }
    for &(kind, from, to, gradient) in extra {
        let value = u32::try_from(pipeline.flows.len()).unwrap() + 10;
        pipeline.flows.extend(random_flow(value, kind, from, to, gradient, stages.len()));
    }
    let schedule =
        if interleaved { ScheduleKind::OneForwardOneBackward } else { ScheduleKind::FillDrain };
    for flow in &mut pipeline.flows {
        if let Place::Stage(stage) = flow.from {
            flow.gradient &= pipeline.stages[stage.index()].backward;
        }
        let output = flow.to.contains(&Place::Sink) && flow.transport != Transport::Sum;
        flow.gradient &= !(interleaved && output);
    }
    tie(&mut pipeline);
    if !gather {
        rows[1..].fill(0);
    }
    if rows.iter().sum::<u64>() == 0 {
        rows[0] = 3;
    }
    Case { pipeline, batch: Batch { rows, gather, microbatches }, schedule, mode }
}

/// A flow from the source or stage `from - 1` to some of the later places.
fn random_flow(
    value: u32,
    kind: u8,
    from: usize,
    to: u32,
    gradient: bool,
    num_stages: usize,
) -> Option<Flow> {
    let from_stage = u32::try_from(from).unwrap().checked_sub(1);
    let source = from_stage.map_or(Place::Source, stage);
    let transport = match kind {
        0 => Transport::Split,
        1 if source != Place::Source => Transport::Sum,
        _ => Transport::Whole,
    };
    let later = (from..num_stages).map(|index| stage(u32::try_from(index).unwrap()));
    let mut places: Vec<Place> = later.chain([Place::Sink]).collect();
    let mut bits = to;
    places.retain(|_| {
        bits >>= 1;
        bits & 1 == 1
    });
    let mut flow = flow(value, transport, source, &places);
    flow.gradient = gradient;
    (!places.is_empty()).then_some(flow)
}

/// Adds a group for parameters that the first and the last stage share.
fn tie(pipeline: &mut Pipeline) {
    let last = pipeline.stages.len() - 1;
    let mut shared =
        [pipeline.stages[0].ranks.clone(), pipeline.stages[last].ranks.clone()].concat();
    shared.sort_unstable();
    shared.dedup();
    let stages = vec![StageId(0), StageId::new(last)];
    pipeline.gradient_groups.push(GradientGroup {
        id: 9,
        ranks: shared,
        stages,
        bytes: 8,
        sharding: Sharding::None,
    });
}
