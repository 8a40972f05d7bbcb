//! What a turn of the scheduler costs, without a model: `cargo bench -p minerva-benches --bench scheduler`.
//!
//! A step of the smallest model takes milliseconds; a turn has to be lost in that, with 128 sequences too.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use minerva_engine::TokenId;
use minerva_engine::backend::BackendLimits;
use minerva_engine::scheduler::{Job, Policy, Scheduler, Step, Terms};

/// Turns of one measurement.
const TURNS: u32 = 64;

/// Tokens of a system prompt, and of what follows it.
const SHARED_TOKENS: TokenId = 1000;
const OWN_TOKENS: TokenId = 24;

fn scheduler(n_seq_max: u32) -> Scheduler {
    let n_cells_per_seq = 2048;
    let limits = BackendLimits {
        n_seq_max,
        n_cells_per_seq,
        n_cells: n_seq_max * n_cells_per_seq,
        unified: false,
        stream_bytes: 0,
        cell_bytes: 0,
        state_bytes: 0,
        keeps_beginnings: true,
        checkpoints_need_cells: false,
        n_window_tokens: 0,
        window_cell_bytes: 0,
        n_batch: 2048,
        n_ubatch: 512,
        n_vocab: 32_000,
    };
    Scheduler::new(limits, Policy::default())
}

/// A request with the system prompt and its own text.
fn job(id: u64) -> Job {
    let own = (0..OWN_TOKENS).map(|i| 2000 + id as TokenId * 100 + i);
    Job {
        id,
        prompt: (0..SHARED_TOKENS).chain(own).collect(),
        n: 1,
        max_tokens: 500,
        reuse: true,
        guess: false,
        terms: Terms { client: id % 4, ..Terms::default() },
    }
}

/// One turn as the worker takes it, over a backend that does nothing. Returns the rows of the step.
fn turn(scheduler: &mut Scheduler, step: &mut Step) -> usize {
    scheduler.copies();
    while scheduler.admit(0).is_some() {
        scheduler.copies();
    }
    scheduler.step(step);
    scheduler.computed(step, 10_000);
    for output in &step.outputs {
        scheduler.sampled(output.seq, 7);
    }
    step.rows.len()
}

/// `n` requests that decode.
fn decoding(n: u32) -> (Scheduler, Step) {
    let (mut scheduler, mut step) = (scheduler(n), Step::default());
    for id in 0..u64::from(n) {
        scheduler.enqueue(job(id), 0);
    }
    while turn(&mut scheduler, &mut step) != n as usize {}
    (scheduler, step)
}

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
    let finished = || {
        let (mut scheduler, step) = decoding(32);
        let seqs: Vec<_> = scheduler.running().collect();
        for seq in seqs {
            scheduler.release(seq);
        }
        (scheduler, step)
    };
    group.bench_function("32 admissions with a known beginning", |bencher| {
        bencher.iter_batched(
            finished,
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
