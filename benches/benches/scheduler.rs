//! What a turn of the scheduler costs, without a model: `cargo bench -p minerva-benches --bench scheduler`.
//!
//! A step of the smallest model takes milliseconds; a turn has to be lost in that, with 128 sequences too.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use minerva_engine::{backend, scheduler};

#[path = "../counts/src/turns.rs"]
pub mod turns;

use turns::{decoding, finished, job, turn};

/// As the crate has it that counts instructions.
mod request {
    pub(crate) use minerva_engine::TokenId;
}

/// Turns of one measurement.
const TURNS: u32 = 64;

fn turns(c: &mut Criterion) {
    let mut group = c.benchmark_group("scheduler");
    group.throughput(Throughput::Elements(TURNS.into())).warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(1)).sample_size(20);
    for n in [1, 8, 32, 128] {
        group.bench_with_input(BenchmarkId::new("turns that decode", n), &n, |bencher, &n| {
            bencher.iter_batched(
                || decoding(n),
                |(mut scheduler, mut step)| {
                    for _ in 0..TURNS {
                        black_box(turn(&mut scheduler, &mut step));
                    }
                    scheduler
                },
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

/// Seats 32 requests whose beginning is in the cache, or that find another one's there.
fn sharing(c: &mut Criterion) {
    let mut group = c.benchmark_group("prefix");
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1)).sample_size(20);
    group.throughput(Throughput::Elements(32));
    group.bench_function("32 admissions with a known beginning", |bencher| {
        bencher.iter_batched(
            || finished(32),
            |(mut scheduler, mut step)| {
                for id in 0..32 {
                    scheduler.enqueue(job(id), 0);
                }
                black_box(turn(&mut scheduler, &mut step));
                scheduler
            },
            BatchSize::LargeInput,
        );
    });
    group.bench_function("a cold burst of 32 until all decode", |bencher| {
        bencher.iter_batched(|| (), |()| black_box(decoding(32)), BatchSize::LargeInput);
    });
    group.finish();
}

criterion_group!(benches, turns, sharing);
criterion_main!(benches);
