//! Draining, shutting down, and the last handle.

use minerva_engine::{Engine, Event, GenerationError, RequestError, SimConfig};

use crate::support::{ask_alone, greedy, read, submit, tokens, wait_until, wait_until_idle};

fn slow() -> SimConfig {
    SimConfig { n_seq_max: 1, step_us: 500, ..SimConfig::default() }
}

#[test]
fn drain_refuses_new_requests_and_finishes_the_old_ones() {
    let engine = Engine::simulate(slow());
    let request = greedy(tokens(1, 10), 40);
    let running = submit(&engine, request.clone());
    let queued = submit(&engine, request.clone());
    engine.drain();
    assert!(matches!(engine.generate_blocking(request.clone()), Err(RequestError::ShuttingDown)));
    let alone = ask_alone(&slow(), request);
    assert_eq!(read(running).choices, alone.choices);
    assert_eq!(read(queued).choices, alone.choices);
    wait_until_idle(&engine);
    assert_eq!(engine.stats().failed_total, 0);
}

#[test]
fn shutdown_fails_what_runs_and_what_waits() {
    let engine = Engine::simulate(slow());
    let mut running = submit(&engine, greedy(tokens(1, 10), 500));
    assert!(matches!(running.blocking_next(), Some(Event::Delta(_))));
    let queued: Vec<_> = (0..5).map(|salt| submit(&engine, greedy(tokens(salt, 10), 500))).collect();
    engine.shutdown();
    assert_eq!(read(running).end, Err(GenerationError::Shutdown));
    for events in queued {
        let answer = read(events);
        assert_eq!(answer.end, Err(GenerationError::Shutdown));
        assert!(answer.choices.is_empty());
    }
    wait_until_idle(&engine);
    assert!(matches!(engine.generate_blocking(greedy([1], 1)), Err(RequestError::ShuttingDown)));
    assert_eq!(engine.step_age(), None);
    engine.shutdown(); // once more does no harm
}

#[test]
fn requests_on_their_way_during_a_shutdown_end_too() {
    for _ in 0..20 {
        let engine = Engine::simulate(slow());
        std::thread::scope(|scope| {
            for salt in 0..4 {
                let engine = engine.clone();
                scope.spawn(move || {
                    while let Ok(events) = engine.generate_blocking(greedy(tokens(salt, 10), 2)) {
                        let end = read(events).end;
                        assert!(matches!(end, Ok(_) | Err(GenerationError::Shutdown)), "{end:?}");
                    }
                });
            }
            wait_until("some work is done", || engine.stats().steps_total > 3);
            engine.shutdown();
        });
    }
}

#[test]
fn a_stream_keeps_the_engine_alive() {
    let engine = Engine::simulate(slow());
    let request = greedy(tokens(1, 10), 40);
    let events = submit(&engine, request.clone());
    drop(engine);
    assert_eq!(read(events).choices, ask_alone(&slow(), request).choices);
}

#[test]
fn the_age_of_a_step_is_seen_while_it_is_computed() {
    let engine = Engine::simulate(SimConfig { step_us: 20_000, ..SimConfig::default() });
    assert_eq!(engine.step_age(), None);
    let events = submit(&engine, greedy(tokens(1, 10), 50));
    wait_until("a step is half done", || engine.step_age().is_some_and(|age| age.as_millis() >= 10));
    drop(events);
    wait_until("no step runs", || engine.step_age().is_none());
}
