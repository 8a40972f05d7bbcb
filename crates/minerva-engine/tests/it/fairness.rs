//! Clients share the seats, priorities go first, deadlines are kept, and whoever had to yield goes on as if nothing had been.

use std::time::{Duration, Instant};

use minerva_engine::{CacheIsolation, Engine, FinishReason, GenerationError, Request, SimConfig};

use crate::real_model;
use crate::support::{ask, ask_alone, greedy, read, submit, tokens, wait_until, wait_until_idle};

/// Steps of 2 ms.
fn config() -> SimConfig {
    SimConfig { n_seq_max: 4, step_us: 2_000, ..SimConfig::default() }
}

fn of_client(client: u64, request: Request) -> Request {
    Request { client, ..request }
}

#[test]
fn one_request_does_not_wait_for_the_two_hundred_of_another_client() {
    for host_cache_bytes in [1 << 20, 0] {
        let config = SimConfig { host_cache_bytes, ..config() };
        let engine = Engine::simulate(config.clone());
        let flood: Vec<_> = (0..200).map(|i| of_client(1, greedy(tokens(i, 20), 100))).collect();
        let streams: Vec<_> = flood.iter().map(|request| submit(&engine, request.clone())).collect();
        wait_until("all seats are taken", || engine.stats().requests_running == 4);
        let began = Instant::now();
        let mut one = submit(&engine, of_client(2, greedy(tokens(999, 20), 3)));
        assert!(one.blocking_next().is_some());
        // A flood of 200 takes ten seconds.
        assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
        drop(one);
        assert!(engine.stats().preempted_total >= 1);
        for (request, events) in flood.iter().zip(streams).take(8) {
            assert_eq!(read(events).choices, ask_alone(&config, request.clone()).choices);
        }
        wait_until_idle(&engine);
        assert!(engine.stats().host_cache_bytes <= host_cache_bytes, "{:?}", engine.stats());
    }
}

#[test]
fn a_deadline_holds_for_a_request_that_had_to_yield() {
    let engine = Engine::simulate(SimConfig { n_seq_max: 1, step_us: 2_000, ..SimConfig::default() });
    let late = submit(&engine, Request { priority: 5, deadline_ms: Some(400), ..greedy(tokens(1, 5), 900) });
    wait_until("it has begun", || engine.stats().generated_tokens_total > 10);
    let better = submit(&engine, greedy(tokens(2, 5), 900));
    let answer = read(late);
    assert_eq!(answer.choices[0].reason(), FinishReason::Length);
    assert!(!answer.choices[0].text.is_empty(), "what it had is its answer");
    assert_eq!(engine.stats().requests_running, 1, "the other goes on, which takes two seconds");
    assert_eq!(read(better).summary().completion_tokens, 900);
    wait_until_idle(&engine);
    assert_eq!((engine.stats().requests_queued, engine.stats().failed_total), (0, 0));
}

#[test]
fn a_request_whose_deadline_passes_in_the_queue_never_begins_and_one_that_runs_is_cut_off() {
    let engine = Engine::simulate(SimConfig { n_seq_max: 1, step_us: 5_000, ..SimConfig::default() });
    let running = submit(&engine, Request { deadline_ms: Some(2_000), ..greedy(tokens(1, 5), 900) });
    wait_until("it has the only seat", || engine.stats().requests_running == 1);
    let late = submit(&engine, Request { deadline_ms: Some(30), ..greedy(tokens(2, 5), 5) });
    let Err(GenerationError::DeadlineExpired { deadline_ms: 30, waited_ms }) = read(late).end else {
        panic!("its deadline was over")
    };
    assert!((30..2_000).contains(&waited_ms), "{waited_ms}");
    let answer = read(running);
    assert_eq!(answer.choices[0].reason(), FinishReason::Length);
    assert!((2..800).contains(&answer.summary().completion_tokens), "{:?}", answer.summary());
    let stats = engine.stats();
    assert_eq!((stats.failed_total, stats.requests_queued), (1, 0));
}

#[test]
fn a_better_priority_runs_at_once_and_the_other_goes_on_afterwards() {
    let config = SimConfig { n_seq_max: 1, step_us: 1_000, ..SimConfig::default() };
    let engine = Engine::simulate(config.clone());
    let (slow, urgent) = (greedy(tokens(1, 40), 300), Request { priority: -1, ..greedy(tokens(2, 5), 20) });
    let running = submit(&engine, slow.clone());
    wait_until("it has begun", || engine.stats().generated_tokens_total > 5);
    let began = Instant::now();
    assert_eq!(ask(&engine, urgent.clone()).choices, ask_alone(&config, urgent).choices);
    assert!(began.elapsed() < Duration::from_millis(250), "{:?}", began.elapsed());
    assert_eq!(read(running).choices, ask_alone(&config, slow).choices);
    let stats = engine.stats();
    assert_eq!(stats.preempted_total, 1);
    assert!(stats.restored_tokens_total > 40, "{stats:?}");
}

#[test]
fn with_isolation_by_key_a_prompt_is_shared_with_requests_of_the_same_client_only() {
    for (cache_isolation, other_may) in [(CacheIsolation::None, true), (CacheIsolation::Key, false)] {
        let engine = Engine::simulate(SimConfig { cache_isolation, ..config() });
        let prompt = || greedy(tokens(1, 100), 2);
        let n_cached = |client| ask(&engine, of_client(client, prompt())).summary().cached_tokens;
        assert_eq!((n_cached(1), n_cached(1)), (0, 99));
        assert_eq!(n_cached(2) > 0, other_may, "{cache_isolation:?}");
    }
}

#[test]
fn a_long_conversation_comes_back_from_host_memory() {
    let engine = Engine::simulate(SimConfig { n_seq_max: 2, us_per_token: 5, ..SimConfig::default() });
    let long = tokens(1, 600);
    ask(&engine, greedy(long.clone(), 2));
    for other in 2..6 {
        ask(&engine, greedy(tokens(other, 300), 2)); // takes both seats, twice
    }
    assert!(engine.stats().host_cache_bytes > 0);
    let again = ask(&engine, greedy(long, 2));
    assert_eq!(again.summary().cached_tokens, 599);
    assert!(engine.stats().restored_tokens_total >= 600);
}

#[test]
fn on_the_real_model_who_yielded_says_what_he_says_alone() {
    for host_cache_bytes in [Some(256 << 20), Some(0)] {
        let mut config = real_model::config();
        (config.n_seq_max, config.host_cache_bytes) = (Some(1), host_cache_bytes);
        let engine = Engine::load(config, |_| std::ops::ControlFlow::Continue(())).expect("the test model loads");
        let story = Request { cache_prompt: false, ..Request::text("Once upon a time there was a king who").greedy() };
        let story = story.max_tokens(48);
        let alone = ask(&engine, story.clone());
        let generated = engine.stats().generated_tokens_total;
        let running = submit(&engine, story);
        wait_until("it has begun", || engine.stats().generated_tokens_total > generated + 8);
        ask(
            &engine,
            Request { priority: -1, cache_prompt: false, ..Request::text("Seven is a").greedy().max_tokens(4) },
        );
        // Recomputed scores may differ in their last bits, which this text survives.
        assert_eq!(read(running).text(), alone.text(), "{host_cache_bytes:?}");
        let stats = engine.stats();
        assert_eq!((stats.preempted_total, stats.restored_tokens_total > 0), (1, host_cache_bytes != Some(0)));
    }
}

#[test]
fn a_client_that_leaves_while_its_request_waits_to_go_on_takes_nothing_with_it() {
    let engine = Engine::simulate(SimConfig { n_seq_max: 1, step_us: 1_000, ..SimConfig::default() });
    let running = submit(&engine, greedy(tokens(1, 40), 900));
    wait_until("it has begun", || engine.stats().generated_tokens_total > 5);
    let urgent = submit(&engine, Request { priority: -1, ..greedy(tokens(2, 5), 100) });
    wait_until("it had to yield", || engine.stats().preempted_total == 1);
    drop(running);
    wait_until("it is gone", || engine.stats().cancelled_total == 1);
    assert_eq!(engine.stats().host_cache_bytes, 0);
    read(urgent).summary();
    wait_until_idle(&engine);
}
