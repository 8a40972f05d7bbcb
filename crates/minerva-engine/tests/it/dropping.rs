//! Whoever leaves gives back everything at once, in whatever phase, and nobody else notices.

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use futures_util::FutureExt;
use minerva_engine::{Engine, Event, EventStream, Request, SamplingParams, SimConfig};

use crate::support::{Random, ask, ask_alone, greedy, read, submit, tokens, wait_until, wait_until_idle};

/// Cells that the bystander can hold.
const BYSTANDER_CELLS: u64 = 320;

fn slow(n_seq_max: u32) -> SimConfig {
    SimConfig { n_seq_max, step_us: 1000, n_batch: 16, ..SimConfig::default() }
}

/// Runs `leave` beside a request that decodes all the time. `leave` gets the stream when `is_phase` holds for it.
fn leaves_without_a_trace(
    config: &SimConfig,
    leaver: &Request,
    is_phase: impl Fn(&Engine) -> bool,
    leave: impl FnOnce(EventStream),
) {
    let engine = Engine::simulate(config.clone());
    let bystander = greedy(tokens(1, 20), 300);
    let mut watched = submit(&engine, bystander.clone());
    let first = watched.blocking_next(); // it decodes from here on
    let leaving = submit(&engine, leaver.clone());
    wait_until("the phase", || is_phase(&engine));
    leave(leaving);
    wait_until("the cells are free", || {
        let stats = engine.stats();
        (stats.requests_running, stats.requests_queued) == (1, 0) && stats.kv_cells_used <= BYSTANDER_CELLS
    });
    assert_eq!(engine.stats().cancelled_total, 1);
    let rest = read(watched);
    let Some(Event::Delta(delta)) = first else { panic!("{first:?}") };
    assert_eq!(delta.text + rest.text(), ask_alone(config, bystander).text());
    wait_until_idle(&engine);
    // The seat is as good as new, prefix and all.
    let again = Request { max_tokens: Some(8), ..leaver.clone() };
    assert_eq!(ask(&engine, again.clone()).text(), ask_alone(config, again).text());
}

#[test]
fn a_stream_dropped_while_it_is_queued_never_runs() {
    let leaver = greedy(tokens(2, 900), 50);
    let queued = |engine: &Engine| engine.stats().requests_queued == 1;
    leaves_without_a_trace(&slow(1), &leaver, queued, drop);
}

#[test]
fn a_stream_dropped_in_prefill_frees_its_cells() {
    let leaver = greedy(tokens(2, 900), 50);
    let mid_prompt = |engine: &Engine| engine.stats().kv_cells_used > BYSTANDER_CELLS + 100;
    leaves_without_a_trace(&slow(2), &leaver, mid_prompt, drop);
}

#[test]
fn a_stream_dropped_in_decode_frees_its_cells() {
    let leaver = greedy(tokens(2, 30), 500);
    leaves_without_a_trace(
        &slow(2),
        &leaver,
        |_| true,
        |mut events| {
            for _ in 0..5 {
                assert!(matches!(events.blocking_next(), Some(Event::Delta(_))));
            }
        },
    );
}

#[test]
fn a_stream_dropped_between_two_of_its_choices_frees_the_cells_of_the_other() {
    let with_seed = |seed| {
        let sampling =
            SamplingParams { temperature: 30.0, top_p: 1.0, min_p: 0.0, seed: Some(seed), ..SamplingParams::default() };
        Request { n: 2, stop: vec!["e".into()], sampling, ..greedy(tokens(2, 30), 400) }
    };
    // A seed with which one choice ends long before the other.
    let leaver = (0..100).map(with_seed).find(|request| {
        let answer = ask_alone(&slow(3), request.clone());
        answer.choices[0].text.len().abs_diff(answer.choices[1].text.len()) > 100
    });
    let leaver = leaver.expect("some seed does that");
    let engine = Engine::simulate(slow(3));
    let mut events = submit(&engine, leaver);
    while !matches!(events.blocking_next().expect("not yet at the end"), Event::Finished { .. }) {}
    assert_eq!(engine.stats().requests_running, 1);
    drop(events);
    wait_until_idle(&engine);
    assert_eq!(engine.stats().cancelled_total, 1);
}

#[test]
fn a_stream_dropped_with_unread_events_after_the_end_is_no_cancellation() {
    let engine = Engine::simulate(SimConfig::default());
    let events = submit(&engine, greedy(tokens(3, 10), 20));
    wait_until("it is done", || engine.stats().generated_tokens_total == 20);
    wait_until_idle(&engine);
    drop(events);
    assert_eq!(ask(&engine, greedy(tokens(4, 10), 5)).summary().completion_tokens, 5);
    assert_eq!(engine.stats().cancelled_total, 0);
}

#[test]
fn a_dropped_future_of_generate_cancels_the_request() {
    let engine = Engine::simulate(slow(1));
    for salt in 0..20 {
        // Polled once: the request is on its way to the intake thread, and nobody waits for the answer.
        let accepted = engine.generate(greedy(tokens(salt, 40), 400)).now_or_never();
        drop(accepted);
    }
    wait_until("all of them were cancelled", || engine.stats().cancelled_total == 20);
    wait_until_idle(&engine);
}

#[test]
fn of_200_requests_of_32_clients_a_third_leaves_at_random_and_the_others_get_their_text() {
    let config =
        SimConfig { n_seq_max: 8, context_length_tokens: 512, n_batch: 64, step_us: 100, ..SimConfig::default() };
    let engine = Engine::simulate(config.clone());
    let next = AtomicU32::new(0);
    let left = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= 200 {
                        break;
                    }
                    let mut random = Random::new(u64::from(number));
                    let mut prompt = tokens(random.below(3), 60); // three system prompts
                    prompt.extend(tokens(1000 + u64::from(number), 1 + random.below(150) as usize));
                    let request =
                        Request { n: 1 + random.below(2) as u32, ..greedy(prompt, 1 + random.below(40) as u32) };
                    let mut events = submit(&engine, request.clone());
                    if !number.is_multiple_of(3) {
                        assert_eq!(read(events).choices, ask_alone(&config, request).choices, "request {number}");
                        continue;
                    }
                    left.fetch_add(1, Ordering::Relaxed);
                    match random.below(3) {
                        0 => {}
                        1 => thread::sleep(Duration::from_micros(random.below(20_000))),
                        _ => (0..random.below(20)).for_each(|_| drop(events.blocking_next())),
                    }
                }
            });
        }
    });
    wait_until_idle(&engine);
    let stats = engine.stats();
    assert_eq!(stats.failed_total, 0);
    assert_eq!(left.into_inner(), 67);
    assert!((1..=67).contains(&stats.cancelled_total), "{stats:?}");
    assert!(stats.kv_cells_cached <= stats.kv_cells_total);
}
