//! Compiling, simulating and estimating one step of a chain of stages, by ranks and microbatches.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use rannc_graph::Affine;
use rannc_schedule::{
    Batch, Flow, GradientGroup, Memory, Mode, Pipeline, Place, RankId, ScheduleKind, Sharding,
    Stage, StageId, Timing, Transport, compile, estimate, simulate,
};

/// A forward takes a nanosecond a row, everything else in proportion.
struct PerRow;

impl Timing for PerRow {
    fn forward_ns(&self, _: StageId, _: RankId, rows: u64) -> u64 {
        rows
    }
    fn backward_ns(&self, _: StageId, _: RankId, rows: u64) -> u64 {
        2 * rows
    }
    fn transfer_ns(&self, bytes: u64, _: RankId, _: RankId) -> u64 {
        bytes / 64
    }
    fn reduce_gradients_ns(&self, group: &GradientGroup) -> u64 {
        group.bytes
    }
    fn reduce_output_ns(&self, bytes: u64, _: &[RankId]) -> u64 {
        bytes
    }
}

impl Memory for PerRow {
    fn saved_bytes(&self, _: StageId, rows: u64) -> u64 {
        rows
    }
}

/// As many stages as there are replica counts; the last one makes the loss.
fn chain(replicas: &[u32]) -> Pipeline {
    let place = |stage: usize| Place::Stage(StageId::new(stage));
    let mut pipeline = Pipeline::default();
    for (index, &count) in replicas.iter().enumerate() {
        let first = pipeline.world_size;
        pipeline.world_size += count;
        let ranks: Vec<RankId> = (first..pipeline.world_size).map(RankId).collect();
        let (from, is_last) = (index.checked_sub(1), index + 1 == replicas.len());
        let flow = |value: usize, transport, from, to, gradient| Flow {
            value: u32::try_from(value).expect("there are few stages"),
            transport,
            from,
            to: vec![to],
            gradient,
            bytes: Affine::per_row(64),
        };
        let input = from.map_or(Place::Source, place);
        pipeline.flows.push(flow(index, Transport::Split, input, place(index), from.is_some()));
        if is_last {
            let loss = flow(index + 1, Transport::Sum, place(index), Place::Sink, true);
            pipeline.flows.push(loss);
        }
        pipeline.gradient_groups.push(GradientGroup {
            id: u32::try_from(index).expect("there are few stages"),
            ranks: ranks.clone(),
            stages: vec![StageId::new(index)],
            bytes: 1000,
            sharding: Sharding::None,
        });
        pipeline.stages.push(Stage {
            ranks,
            shares: Vec::new(),
            backward: true,
            sharding: Sharding::None,
        });
    }
    pipeline
}

fn step(criterion: &mut Criterion) {
    let schedule = ScheduleKind::OneForwardOneBackward;
    // The replica counts of the last have no common divisor, so that nothing is folded.
    let uneven = vec![129, 128, 127, 128, 126, 130, 127, 129];
    for (replicas, microbatches) in
        [(vec![128; 8], 64), (vec![512; 8], 64), (vec![1; 1024], 64), (uneven, 64)]
    {
        let pipeline = chain(&replicas);
        let rows = vec![microbatches; pipeline.world_size as usize];
        let batch = Batch { rows, gather: true, microbatches };
        let name = format!("{} stages x {}", replicas.len(), replicas[0]);
        let mut group = criterion.benchmark_group(name);
        group.sample_size(10);
        let id = |what: &str| BenchmarkId::new(what, format!("{microbatches} microbatches"));
        group.bench_function(id("compile"), |bencher| {
            bencher.iter(|| compile(black_box(&pipeline), &batch, schedule, Mode::Training));
        });
        let program = compile(&pipeline, &batch, schedule, Mode::Training).expect("it is valid");
        group.bench_function(id("simulate"), |bencher| {
            bencher.iter(|| simulate(black_box(&program), &pipeline, &PerRow, &PerRow));
        });
        let mode = Mode::Training;
        group.bench_function(id("estimate"), |bencher| {
            let pipeline = black_box(&pipeline);
            bencher.iter(|| estimate(pipeline, &batch, schedule, mode, &PerRow, &PerRow));
        });
        group.finish();
    }
}

criterion_group!(benches, step);
criterion_main!(benches);
