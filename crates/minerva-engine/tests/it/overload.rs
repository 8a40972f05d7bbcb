//! Far more is asked for than fits: nobody who was accepted loses anything, and afterwards everything is free.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use minerva_engine::{Engine, EventStream, Request, RequestError, SimConfig};
use proptest::prelude::*;

use crate::support::{Random, ask_alone, greedy, read, tokens, wait_until_idle};

/// How many times the cells that there are all requests together need.
const LOAD: u64 = 4;

/// How long new requests begin.
const DURATION: Duration = Duration::from_secs(3);

/// Tokens of the longest prompt and of the longest answer.
const MOST_PROMPT: u64 = 120;
const MOST_ANSWER: u64 = 80;

/// Request `number`: random lengths, one of three beginnings, three clients, now and then two choices or another priority.
fn request(number: u64) -> Request {
    let mut random = Random::new(number);
    let mut prompt = tokens(random.below(3), random.below(40) as usize);
    prompt.extend(tokens(100 + number, 1 + random.below(MOST_PROMPT - 40) as usize));
    Request {
        n: 1 + u32::from(random.below(8) == 0),
        client: random.below(3),
        priority: i32::from(random.below(10) > 0),
        cache_prompt: random.below(4) > 0,
        ..greedy(prompt, 1 + random.below(MOST_ANSWER) as u32)
    }
}

/// Asks until the queue has room, as clients do.
fn submit_patiently(engine: &Engine, request: &Request, refused: &AtomicU64) -> EventStream {
    loop {
        match engine.generate_blocking(request.clone()) {
            Ok(events) => return events,
            Err(RequestError::QueueFull { .. }) => {
                refused.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// The client of request `number` waits for its answer and compares, or is one of the third that leaves.
fn visit(engine: &Engine, config: &SimConfig, number: u64, refused: &AtomicU64) {
    let request = request(number);
    let mut events = submit_patiently(engine, &request, refused);
    if !number.is_multiple_of(3) {
        assert_eq!(read(events).choices, ask_alone(config, request).choices, "request {number}");
        return;
    }
    let mut random = Random::new(!number);
    match random.below(3) {
        0 => {}
        1 => thread::sleep(Duration::from_millis(random.below(100))),
        _ => (0..random.below(20)).for_each(|_| drop(events.blocking_next())),
    }
}

fn overload(config: &SimConfig, duration: Duration) {
    let engine = Engine::simulate(config.clone());
    let n_cells = engine.stats().kv_cells_total;
    let n_clients = LOAD * n_cells / (u64::midpoint(MOST_PROMPT, MOST_ANSWER));
    let (next, refused, began) = (AtomicU64::new(0), AtomicU64::new(0), Instant::now());
    thread::scope(|scope| {
        for _ in 0..n_clients {
            scope.spawn(|| {
                while began.elapsed() < duration {
                    visit(&engine, config, next.fetch_add(1, Ordering::Relaxed), &refused);
                }
            });
        }
    });
    wait_until_idle(&engine);
    let stats = engine.stats();
    assert_eq!((stats.failed_total, stats.failed_steps_total), (0, 0), "{stats:?}");
    assert!(stats.cancelled_total > 0 && next.into_inner() > n_clients, "{stats:?}");
    assert!(refused.into_inner() > 0, "the queue was never full: this was no overload");
    assert!(stats.kv_cells_cached <= stats.kv_cells_total, "{stats:?}");
    assert!(stats.host_cache_bytes <= config.host_cache_bytes, "{stats:?}");
}

#[test]
fn four_times_the_cells_with_leavers_fails_nobody_and_every_answer_is_the_one_it_gets_alone() {
    let config = SimConfig {
        n_seq_max: 16,
        context_length_tokens: 256,
        n_batch: 64,
        step_us: 200,
        us_per_token: 2,
        max_queued_requests: 60,
        ..SimConfig::default()
    };
    for (unified, host_cache_bytes) in [(false, 1 << 20), (true, 20_000)] {
        overload(
            &SimConfig { unified, n_cells: unified.then_some(3000), host_cache_bytes, ..config.clone() },
            DURATION / 2,
        );
    }
}

/// Whether a request of a schedule leaves, and after how many events.
type Visit = (u64, Option<usize>);

proptest! {
    // One thread submits everything at once and reads one after the other: two runs hardly differ, so what fails shrinks.
    #![proptest_config(ProptestConfig { cases: 1000, max_shrink_iters: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn of_a_thousand_random_schedules_each_answer_is_the_one_of_a_cold_engine(
        visits in prop::collection::vec((0_u64..500, prop::option::weighted(0.3, 0_usize..30)), 1..24),
        n_seq_max in 2_u32..=5,
        unified in any::<bool>(),
        n_batch in prop::sample::select(vec![4_u32, 16, 64]),
        cannot_cut in any::<bool>(),
        host_cache_bytes in prop::sample::select(vec![0_u64, 3_000, 1 << 20]),
    ) {
        let config = SimConfig {
            n_seq_max,
            context_length_tokens: 256,
            unified,
            n_cells: unified.then_some(420), // the largest request: two choices of 200 tokens
            n_batch,
            cannot_cut,
            host_cache_bytes,
            ..SimConfig::default()
        };
        let engine = Engine::simulate(config.clone());
        let visits: Vec<Visit> = visits;
        let streams: Vec<_> = visits
            .iter()
            .map(|(number, _)| engine.generate_blocking(request(*number)).expect("the queue has room"))
            .collect();
        for ((number, leaves_after), mut events) in visits.iter().zip(streams) {
            if let Some(n) = leaves_after {
                (0..*n).for_each(|_| drop(events.blocking_next()));
                continue;
            }
            prop_assert_eq!(read(events).choices, ask_alone(&config, request(*number)).choices, "request {}", number);
        }
        wait_until_idle(&engine);
        let stats = engine.stats();
        prop_assert_eq!(stats.failed_total, 0);
        prop_assert!(stats.kv_cells_cached <= stats.kv_cells_total);
    }
}
