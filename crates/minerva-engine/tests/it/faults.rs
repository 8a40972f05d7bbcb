//! A step that fails takes its own requests with it and nothing else.

use minerva_engine::{Engine, GenerationError, SimConfig, SimMemory};

use crate::support::{ask, ask_alone, greedy, read, submit, tokens, wait_until, wait_until_idle};

fn failed() -> GenerationError {
    GenerationError::Backend { message: "a simulated fault".into() }
}

#[test]
fn a_failed_step_fails_its_requests_and_the_queued_one_runs() {
    let config = SimConfig { n_seq_max: 2, step_us: 500, fail_every_steps: Some(20), ..SimConfig::default() };
    let engine = Engine::simulate(config.clone());
    let doomed = [submit(&engine, greedy(tokens(1, 10), 100)), submit(&engine, greedy(tokens(2, 10), 100))];
    wait_until("both run", || engine.stats().requests_running == 2);
    let queued = greedy(tokens(3, 10), 10);
    let waiting = submit(&engine, queued.clone());
    for events in doomed {
        let answer = read(events);
        assert_eq!(answer.end, Err(failed()));
        assert!(!answer.choices[0].text.is_empty(), "what was computed before was sent");
    }
    assert_eq!(read(waiting).text(), ask_alone(&config, queued).text());
    wait_until_idle(&engine);
    let stats = engine.stats();
    assert_eq!((stats.failed_total, stats.failed_steps_total, stats.cancelled_total), (2, 1, 0));
}

#[test]
fn cells_of_a_failed_step_are_not_reused() {
    let config = SimConfig { n_seq_max: 1, fail_every_steps: Some(5), ..SimConfig::default() };
    let engine = Engine::simulate(config.clone());
    let request = greedy(tokens(1, 50), 4);
    let first = ask(&engine, request.clone()); // steps 1 to 4
    assert_eq!(first.text(), ask_alone(&config, request.clone()).text());
    assert_eq!(ask(&engine, request.clone()).end, Err(failed())); // step 5, which would have reused 49 cells
    assert_eq!(engine.stats().kv_cells_cached, 0);
    let third = ask(&engine, request);
    assert_eq!(third.summary().cached_tokens, 0, "they were half written");
    assert_eq!(third.choices, first.choices);
}

#[test]
fn with_recurrent_states_a_failed_step_leaves_nothing_of_other_sequences() {
    for (memory, is_kept) in [(SimMemory::Cells, true), (SimMemory::Recurrent, false), (SimMemory::Hybrid, false)] {
        let config = SimConfig { n_seq_max: 2, memory, fail_every_steps: Some(6), ..SimConfig::default() };
        let engine = Engine::simulate(config.clone());
        let request = greedy(tokens(1, 50), 3);
        let first = ask(&engine, request.clone());
        assert_eq!(ask(&engine, greedy(tokens(2, 50), 9)).end, Err(failed())); // in the other sequence
        wait_until_idle(&engine);
        assert_eq!(engine.stats().kv_cells_cached > 0, is_kept, "{memory:?}");
        assert_eq!(ask(&engine, request).choices, first.choices);
    }
}

#[test]
fn a_failed_step_with_several_choices_fails_the_request_once() {
    let config = SimConfig { n_seq_max: 4, fail_every_steps: Some(3), ..SimConfig::default() };
    let engine = Engine::simulate(config);
    let answer = ask(&engine, minerva_engine::Request { n: 3, ..greedy(tokens(1, 10), 100) });
    assert_eq!(answer.end, Err(failed()));
    wait_until_idle(&engine);
    assert_eq!(engine.stats().failed_total, 1);
    assert_eq!(ask(&engine, greedy(tokens(2, 10), 2)).summary().completion_tokens, 2);
}

#[test]
fn scores_without_a_usable_token_fail_the_request_and_not_its_neighbour() {
    let engine = Engine::simulate(SimConfig { step_us: 300, ..SimConfig::default() });
    let neighbour = submit(&engine, greedy(tokens(1, 10), 50));
    let mut banned = greedy(tokens(2, 10), 10);
    banned.sampling.logit_bias = (0..259).map(|token| (token, f32::NEG_INFINITY)).collect();
    banned.n = 2;
    assert!(matches!(ask(&engine, banned).end, Err(GenerationError::Sampling { .. })));
    assert_eq!(read(neighbour).summary().completion_tokens, 50);
    wait_until_idle(&engine);
    assert_eq!(engine.stats().failed_total, 1);
}
