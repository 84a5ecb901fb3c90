//! Planning time by number of operators and devices, and compiling a step's program.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use rannc_cost::Cluster;
use rannc_graph::testing;
use rannc_plan::{Options, compile, even_rows};
use rannc_schedule::Mode;

fn plan(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    group.sample_size(10);
    for (layers, devices) in [(100, 8), (1_000, 8), (10_000, 8), (1_000, 64)] {
        let graph = testing::chain(layers, 1024);
        let cluster = Cluster::uniform("a100-40gb", devices / 8, 8).expect("the preset exists");
        let options = Options { batch_size: 1024, ..Options::default() };
        let name = BenchmarkId::new(format!("{layers} operators"), format!("{devices} devices"));
        group.bench_function(name, |bencher| {
            bencher.iter(|| compile(black_box(&graph), None, &cluster, &options));
        });
    }
    group.finish();
}

fn program(criterion: &mut Criterion) {
    let graph = testing::chain(100, 1024);
    let cluster = Cluster::uniform("a100-40gb", 1, 8).expect("the preset exists");
    let options = Options {
        batch_size: 1024,
        num_stages: Some(4),
        microbatches: Some(32),
        ..Options::default()
    };
    let plan = compile(&graph, None, &cluster, &options).expect("it fits");
    let placement = plan.place(&graph).expect("the plan is for this graph");
    criterion.bench_function("program of 4 stages, 8 ranks, 32 microbatches", |bencher| {
        bencher.iter(|| placement.program(even_rows(1024, 8), true, Mode::Training));
    });
}

criterion_group!(benches, plan, program);
criterion_main!(benches);
