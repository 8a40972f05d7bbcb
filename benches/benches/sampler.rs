//! Time per token of our sampler and of llama.cpp's chain, for vocabularies of 32k, 128k and 256k tokens.
//!
//! `cargo bench --profile release -p minerva-benches --bench sampler`, with a part of a name behind `--` to run less. docs/benchmarks.md has results.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use minerva_benches::sampler::{VOCABULARIES, cases, masks, ours, row, theirs};

fn samplers(criterion: &mut Criterion) {
    for case in cases() {
        let mut group = criterion.benchmark_group(case.name);
        for n_vocab in VOCABULARIES {
            let rows: Vec<Vec<f32>> = (0..4).map(|seed| row(n_vocab, seed)).collect();
            let mut sampler = ours(&case.params, n_vocab);
            let mut next = rows.iter().cycle();
            group.bench_function(BenchmarkId::new("minerva", n_vocab), |bencher| {
                bencher.iter(|| sampler.sample(next.next().expect("endless"), &[], None));
            });
            let mut chain = theirs(&case.params, n_vocab);
            let mut next = rows.iter().cycle();
            group.bench_function(BenchmarkId::new("llama.cpp", n_vocab), |bencher| {
                bencher.iter(|| chain.sample(next.next().expect("endless")));
            });
        }
        group.finish();
    }
    let mut group = criterion.benchmark_group("defaults and 5 log-probabilities");
    for n_vocab in VOCABULARIES {
        let row = row(n_vocab, 1);
        let mut sampler = ours(&minerva_engine::SamplingParams::default(), n_vocab);
        group.bench_function(BenchmarkId::new("minerva", n_vocab), |bencher| {
            bencher.iter(|| sampler.sample(&row, &[], Some(5)));
        });
    }
    group.finish();
}

/// Under the mask of a grammar, beside the same settings without one.
fn masked(criterion: &mut Criterion) {
    const N_VOCAB: usize = 128_256;
    let rows: Vec<Vec<f32>> = (0..4).map(|seed| row(N_VOCAB, seed)).collect();
    for case in cases().into_iter().filter(|case| ["defaults", "greedy", "temperature"].contains(&case.name)) {
        let mut group = criterion.benchmark_group(format!("{} under a mask", case.name));
        let mut sampler = ours(&case.params, N_VOCAB);
        let mut next = rows.iter().cycle();
        group.bench_function(BenchmarkId::new("no mask", N_VOCAB), |bencher| {
            bencher.iter(|| sampler.sample(next.next().expect("endless"), &[], None));
        });
        for (name, mask) in masks(N_VOCAB) {
            group.bench_function(BenchmarkId::new(name, N_VOCAB), |bencher| {
                bencher.iter(|| sampler.sample_allowed(next.next().expect("endless"), &[], &mask, None));
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_millis(600));
    targets = samplers, masked
}
criterion_main!(benches);
