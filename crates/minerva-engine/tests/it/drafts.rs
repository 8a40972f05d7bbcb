//! A draft model beside the main one, both simulated: what is said never changes, whoever guesses how well and whatever fails.

use minerva_engine::{Engine, Request, SimConfig, SimDraft, Speculation};
use proptest::prelude::*;

use crate::support::{Random, ask, ask_alone, greedy, read, sampled, submit, tokens, wait_until, wait_until_idle};

/// Steps take time, so that it is worth something to save some.
fn with_draft(draft: SimDraft) -> SimConfig {
    SimConfig { draft: Some(draft), unified: true, step_us: 1000, ..SimConfig::default() }
}

#[test]
fn a_perfect_draft_model_takes_most_steps_away_and_changes_nothing() {
    let engine = Engine::simulate(with_draft(SimDraft::default()));
    let answer = ask(&engine, greedy(tokens(1, 50), 200));
    let off = SimConfig { speculation: Speculation::Off, ..SimConfig::default() };
    let plain = ask_alone(&off, greedy(tokens(1, 50), 200));
    assert_eq!(answer.choices, plain.choices);
    let (stats, summary) = (engine.stats(), answer.summary());
    assert!(stats.steps_total < 60, "{stats:?}");
    assert_eq!(stats.drafted_tokens_total, stats.right_drafts_total, "it is never wrong");
    let guesses = (u64::from(summary.guessed_tokens), u64::from(summary.right_guesses));
    assert_eq!(guesses, (stats.guessed_tokens_total, stats.right_guesses_total));
    assert_eq!(plain.summary().guessed_tokens, 0);
}

#[test]
fn a_request_that_wants_no_guesses_and_an_engine_that_makes_none_leave_the_draft_model_alone() {
    let engine = Engine::simulate(with_draft(SimDraft::default()));
    ask(&engine, Request { speculate: false, ..greedy(tokens(1, 50), 40) });
    assert_eq!((engine.stats().drafted_tokens_total, engine.stats().draft_cells_used), (0, 0));
    for speculation in [Speculation::Off, Speculation::Ngram] {
        let engine = Engine::simulate(SimConfig { speculation, ..with_draft(SimDraft::default()) });
        ask(&engine, greedy(tokens(1, 50), 40));
        assert_eq!(engine.stats().drafted_tokens_total, 0, "{speculation:?}");
    }
}

#[test]
fn what_was_said_before_is_looked_up_before_the_draft_model_is_asked() {
    let draft = || with_draft(SimDraft { quality: 0.0, ..SimDraft::default() });
    let repeating = SimConfig { period_tokens: Some(4), ..draft() };
    let engine = Engine::simulate(repeating.clone());
    ask(&engine, greedy(tokens(1, 50), 100));
    let auto = engine.stats();
    assert!(auto.right_guesses_total > 60, "{auto:?}");
    let engine = Engine::simulate(SimConfig { speculation: Speculation::Draft, ..repeating });
    ask(&engine, greedy(tokens(1, 50), 100));
    assert_eq!(engine.stats().right_guesses_total, 0, "only the draft model is asked, which is always wrong");
    assert!(engine.stats().drafted_tokens_total > 0);
}

#[test]
fn a_draft_model_that_fails_is_left_alone_and_no_request_hears_of_it() {
    for fails_at in [1, 2, 7] {
        let engine = Engine::simulate(with_draft(SimDraft { fails_at_step: Some(fails_at), ..SimDraft::default() }));
        let streams: Vec<_> = (0..4).map(|i| submit(&engine, greedy(tokens(i, 60), 80))).collect();
        for (i, events) in (0..).zip(streams) {
            let plain = ask_alone(&SimConfig::default(), greedy(tokens(i, 60), 80));
            assert_eq!(read(events).choices, plain.choices);
        }
        let stats = engine.stats();
        assert_eq!((stats.failed_drafts_total, stats.failed_total, stats.draft_cells_used), (1, 0, 0));
    }
}

#[test]
fn the_draft_models_cells_go_with_the_sequence_and_make_room_for_others() {
    // A pool of 128: one of these fits, two do not.
    let engine = Engine::simulate(with_draft(SimDraft { n_cells: Some(128), ..SimDraft::default() }));
    for i in 0..6 {
        let answer = ask(&engine, greedy(tokens(i, 60), 40));
        assert!(answer.summary().right_guesses > 20, "{:?}", answer.summary());
        assert!(engine.stats().draft_cells_used <= 128);
    }
    // One that is too long for the draft model's cells is computed without.
    let long = ask(&engine, greedy(tokens(9, 300), 40));
    assert_eq!(long.summary().guessed_tokens, 0, "{:?}", long.summary());
}

#[test]
fn a_cancelled_request_and_one_that_yields_leave_no_trace_in_the_draft_model() {
    let config =
        SimConfig { n_seq_max: 1, ..with_draft(SimDraft { quality: 0.8, step_us: 20, ..SimDraft::default() }) };
    let engine = Engine::simulate(config);
    let slow = submit(&engine, Request { priority: 1, ..greedy(tokens(1, 40), 300) });
    wait_until("the first is drafted for", || engine.stats().drafted_tokens_total > 0);
    let urgent = ask(&engine, greedy(tokens(2, 40), 60));
    assert_eq!(urgent.choices, ask_alone(&SimConfig::default(), greedy(tokens(2, 40), 60)).choices);
    let slow = read(slow);
    assert_eq!(slow.choices, ask_alone(&SimConfig::default(), greedy(tokens(1, 40), 300)).choices);
    assert_eq!(engine.stats().preempted_total, 1);
    let dropped = submit(&engine, greedy(tokens(3, 40), 500));
    wait_until("it runs", || engine.stats().requests_running > 0);
    drop(dropped);
    wait_until_idle(&engine);
    let after = ask(&engine, greedy(tokens(4, 40), 60));
    assert_eq!(after.choices, ask_alone(&SimConfig::default(), greedy(tokens(4, 40), 60)).choices);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_a_draft_model_does_changes_what_is_said(
        quality in prop::sample::select(vec![0.0_f32, 0.3, 0.7, 0.95, 1.0]),
        (unified, n_seq_max, cannot_cut) in (any::<bool>(), 1_u32..4, prop::bool::weighted(0.2)),
        (n_cells, max_tokens, min_tokens) in (16_u32..400, 1_u32..20, 0_u32..4),
        fails_at_step in prop::option::weighted(0.2, 1_u64..60),
        speculation in prop::sample::select(vec![Speculation::Draft, Speculation::Auto]),
        (period_tokens, spread) in (prop::option::weighted(0.3, 1_u32..6), prop::sample::select(vec![0.0_f32, 4.0])),
        seed in any::<u64>(),
    ) {
        let plain = SimConfig {
            unified, n_seq_max, cannot_cut, period_tokens, spread, n_batch: 64, speculation: Speculation::Off,
            ..SimConfig::default()
        };
        let draft =
            SimDraft { quality, n_cells: Some(n_cells), fails_at_step, max_tokens, min_tokens, ..SimDraft::default() };
        let engine = Engine::simulate(SimConfig { speculation, draft: Some(draft), ..plain.clone() });
        let mut random = Random::new(seed);
        let requests: Vec<_> = (0..6).map(|_| {
            let (salt, n) = (random.below(4), 1 + random.below(90) as u32);
            if random.below(2) == 0 { greedy(tokens(salt, 30), n) } else { sampled(salt, n) }
        }).collect();
        let streams: Vec<_> = requests.iter().map(|request| submit(&engine, request.clone())).collect();
        for (request, events) in requests.into_iter().zip(streams) {
            if random.below(5) == 0 {
                drop(events);
                continue;
            }
            prop_assert_eq!(read(events).choices, ask_alone(&plain, request).choices);
        }
        wait_until_idle(&engine);
        let stats = engine.stats();
        prop_assert!(stats.draft_cells_used <= u64::from(n_cells));
        prop_assert!(stats.right_drafts_total <= stats.drafted_tokens_total && stats.failed_total == 0);
    }
}
