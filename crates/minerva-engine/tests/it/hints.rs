//! Hints about prompts to come, why prompts are computed, and news for those who wait.

use std::time::Duration;

use minerva_engine::{Engine, Event, EventStream, Miss, Request, RequestError, SimConfig};

use crate::support::{ask, greedy, read, submit, tokens, wait_until};

fn two_seats() -> SimConfig {
    SimConfig { n_seq_max: 2, host_cache_bytes: 0, ..SimConfig::default() }
}

#[test]
fn what_is_to_be_kept_is_still_there_when_others_needed_a_place() {
    for (first, n_cached) in [
        (Request::default(), 0),
        (Request { keep_ms: Some(60_000), ..Request::default() }, 99),
        (Request { cache_key: Some("tenant 7".into()), ..Request::default() }, 99),
    ] {
        let engine = Engine::simulate(two_seats());
        let prompt = greedy(tokens(1, 100), 1);
        ask(&engine, Request { keep_ms: first.keep_ms, cache_key: first.cache_key.clone(), ..prompt.clone() });
        for salt in 2..6 {
            ask(&engine, greedy(tokens(salt, 100), 1));
        }
        assert_eq!(ask(&engine, prompt).summary().cached_tokens, n_cached, "{first:?}");
    }
}

#[test]
fn the_hints_of_one_client_cost_another_nothing() {
    let with = |keep_ms| {
        let engine = Engine::simulate(two_seats());
        let mine = Request { client: 1, ..greedy(tokens(1, 100), 1) };
        let hoard = |salt| Request { client: 2, keep_ms, ..greedy(tokens(salt, 100), 1) };
        ask(&engine, hoard(2));
        ask(&engine, mine.clone());
        ask(&engine, hoard(3));
        ask(&engine, mine).summary().cached_tokens
    };
    assert_eq!((with(None), with(Some(3_600_000))), (99, 99));
}

#[test]
fn each_computed_prompt_is_counted_under_one_reason() {
    let engine = Engine::simulate(SimConfig { n_seq_max: 1, host_cache_bytes: 0, ..SimConfig::default() });
    let text = tokens(1, 100);
    let go = |prompt: Vec<i32>| ask(&engine, greedy(prompt, 1));
    go(text.clone()); // first
    go(text.clone()); // all but its last token is there
    go([&text[..], &tokens(2, 20)].concat()); // extended
    go([&text[..], &tokens(3, 30)].concat()); // diverged
    go(tokens(4, 100)); // first
    go(text.clone()); // evicted
    ask(&engine, Request { cache_prompt: false, ..greedy(text, 1) }); // disabled
    let misses = engine.stats().prefix_misses;
    assert_eq!(Miss::ALL.map(|miss| misses.of(miss)), [2, 1, 1, 1, 0, 0, 0, 1]);
}

#[test]
fn memory_that_cannot_be_cut_is_the_reason_where_a_cut_was_tried() {
    let engine = Engine::simulate(SimConfig { n_seq_max: 1, cannot_cut: true, ..SimConfig::default() });
    let text = tokens(1, 100);
    ask(&engine, greedy(text.clone(), 1));
    let answer = ask(&engine, greedy([&text[..80], &tokens(2, 20)].concat(), 1));
    assert_eq!(answer.summary().cached_tokens, 0);
    let misses = engine.stats().prefix_misses;
    assert_eq!((misses.of(Miss::First), misses.of(Miss::MemoryCannotBeCut)), (1, 1));
}

#[test]
fn hints_out_of_range_are_refused() {
    let engine = Engine::simulate(SimConfig::default());
    for (request, param) in [
        (Request { cache_key: Some("k".repeat(513)), ..greedy([1], 1) }, "prompt_cache_key"),
        (Request { keep_ms: Some(0), ..greedy([1], 1) }, "keep_ms"),
        (Request { keep_ms: Some(3_600_001), ..greedy([1], 1) }, "keep_ms"),
    ] {
        match engine.generate_blocking(request) {
            Err(RequestError::InvalidParam(invalid)) => assert_eq!(invalid.param, param),
            other => panic!("{other:?}"),
        }
    }
    assert!(engine.generate_blocking(Request { cache_key: Some("k".repeat(512)), ..greedy([1], 1) }).is_ok());
}

/// The news that a stream has before its first delta: positions, and whether it was told that it begins.
fn news(mut events: EventStream) -> (Vec<u32>, bool) {
    let (mut positions, mut started) = (Vec::new(), false);
    loop {
        match events.blocking_next().expect("a delta") {
            Event::Queued { position, .. } if !started => positions.push(position),
            Event::Started => started = true,
            Event::Delta(_) => return (positions, started),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn who_waits_and_wants_to_know_hears_its_place() {
    let engine = Engine::simulate(SimConfig { n_seq_max: 1, step_us: 4_000, ..SimConfig::default() });
    let ask = |salt, queue_updates, n| Request { queue_updates, ..greedy(tokens(salt, 20), n) };
    let running = submit(&engine, ask(1, false, 150));
    wait_until("it runs", || engine.stats().requests_running == 1);
    let second = submit(&engine, ask(2, true, 150));
    wait_until("it waits", || engine.stats().requests_queued == 1);
    std::thread::sleep(Duration::from_millis(300));
    let third = submit(&engine, ask(3, true, 5));
    let silent = submit(&engine, ask(4, false, 5));
    let (positions, started) = news(second);
    assert!(started && positions[0] == 1, "{positions:?}");
    let (positions, started) = news(third);
    assert!(started && positions[0] == 2 && positions.is_sorted_by(|a, b| a >= b), "{positions:?}");
    assert_eq!(news(silent), (vec![], false));
    drop(running);
    let at_once = Request { queue_updates: true, ..greedy(tokens(5, 20), 5) };
    wait_until("nobody waits", || engine.stats().requests_queued + engine.stats().requests_running == 0);
    assert_eq!(news(submit(&engine, at_once)), (vec![], true), "who does not wait hears only that it begins");
}

#[test]
fn who_is_refused_hears_when_the_next_one_will_begin() {
    let config = SimConfig { n_seq_max: 1, step_us: 10_000, max_queued_requests: 1, ..SimConfig::default() };
    let engine = Engine::simulate(config);
    read(submit(&engine, greedy(tokens(1, 40), 300))); // something to learn from: three seconds
    let _running = submit(&engine, greedy(tokens(2, 40), 300));
    wait_until("it runs", || engine.stats().requests_running == 1);
    let _waiting = submit(&engine, greedy(tokens(3, 40), 300));
    std::thread::sleep(Duration::from_millis(200));
    match engine.generate_blocking(greedy(tokens(4, 40), 300)) {
        Err(RequestError::QueueFull { retry_after_s, .. }) => {
            assert!((2..=5).contains(&retry_after_s), "{retry_after_s}");
        }
        other => panic!("{other:?}"),
    }
}
