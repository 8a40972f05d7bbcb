//! A model's own head for multi-token prediction, simulated: it follows whatever happens to the model's sequences, and panics when it
//! gets the hidden state of another place.

use minerva_engine::{Engine, Request, SimConfig, SimDraft, Speculation};
use proptest::prelude::*;

use crate::support::{Random, ask, ask_alone, greedy, read, sampled, submit, tokens, wait_until, wait_until_idle};

/// Steps take time, so that it is worth something to save some.
fn with_head(draft: &SimDraft) -> SimConfig {
    let draft = SimDraft { is_head: true, max_tokens: 8, ..draft.clone() };
    SimConfig { draft: Some(draft), speculation: Speculation::Draft, step_us: 1000, ..SimConfig::default() }
}

#[test]
fn a_good_head_takes_most_steps_away_and_changes_nothing() {
    for unified in [false, true] {
        let engine = Engine::simulate(SimConfig { unified, ..with_head(&SimDraft::default()) });
        let answer = ask(&engine, greedy(tokens(1, 700), 200));
        let plain = ask_alone(&SimConfig::default(), greedy(tokens(1, 700), 200));
        assert_eq!(answer.choices, plain.choices);
        let stats = engine.stats();
        assert!(stats.steps_total < 60, "{stats:?}");
        assert_eq!(stats.drafted_tokens_total, stats.right_drafts_total, "it is never wrong");
        assert!(stats.draft_cells_used >= 700, "it has cells for the prompt: {stats:?}");
    }
}

#[test]
fn a_shared_prompt_and_several_choices_have_their_hidden_states() {
    let config = SimConfig { n_seq_max: 4, unified: true, ..with_head(&SimDraft::default()) };
    let engine = Engine::simulate(config.clone());
    let prompt = tokens(1, 300);
    let several = Request { n: 3, ..greedy(prompt.clone(), 60) };
    let plain = SimConfig { draft: None, ..config };
    assert_eq!(ask(&engine, several.clone()).choices, ask_alone(&plain, several).choices);
    let right_before = engine.stats().right_drafts_total;
    for salt in 0..3 {
        let longer = [prompt.clone(), tokens(salt, 5)].concat();
        let answer = ask(&engine, greedy(longer.clone(), 60));
        assert_eq!(answer.choices, ask_alone(&plain, greedy(longer, 60)).choices);
        assert!(answer.summary().cached_tokens > 250, "{:?}", answer.summary());
        assert!(answer.summary().right_guesses > 30, "{:?}", answer.summary());
    }
    let stats = engine.stats();
    assert!(stats.right_drafts_total > right_before);
    assert_eq!(stats.drafted_tokens_total, stats.right_drafts_total, "what was copied is known to the head");
}

#[test]
fn a_request_that_yields_goes_on_with_its_head_when_it_comes_back() {
    let config = SimConfig { n_seq_max: 1, ..with_head(&SimDraft::default()) };
    let engine = Engine::simulate(config);
    let slow = submit(&engine, Request { priority: 1, ..greedy(tokens(1, 40), 300) });
    wait_until("the first is drafted for", || engine.stats().drafted_tokens_total > 0);
    let urgent = ask(&engine, greedy(tokens(2, 40), 60));
    assert_eq!(urgent.choices, ask_alone(&SimConfig::default(), greedy(tokens(2, 40), 60)).choices);
    let right_before = engine.stats().right_drafts_total;
    assert_eq!(read(slow).choices, ask_alone(&SimConfig::default(), greedy(tokens(1, 40), 300)).choices);
    assert_eq!(engine.stats().preempted_total, 1);
    assert!(engine.stats().right_drafts_total > right_before, "{:?}", engine.stats());
}

#[test]
fn a_head_that_fails_is_left_alone_and_no_request_hears_of_it() {
    for fails_at in [1, 2, 7] {
        let config = with_head(&SimDraft { fails_at_step: Some(fails_at), ..SimDraft::default() });
        // With one pool of cells all of them are guessed for.
        let engine = Engine::simulate(SimConfig { unified: true, ..config });
        let streams: Vec<_> = (0..4).map(|i| submit(&engine, greedy(tokens(i, 60), 80))).collect();
        for (i, events) in (0..).zip(streams) {
            let plain = ask_alone(&SimConfig::default(), greedy(tokens(i, 60), 80));
            assert_eq!(read(events).choices, plain.choices);
        }
        let stats = engine.stats();
        assert_eq!((stats.failed_drafts_total, stats.failed_total), (1, 0));
    }
}

#[test]
fn a_head_without_room_guesses_as_far_as_it_has_some() {
    // Room for the prompt and a part of the answer.
    let engine = Engine::simulate(with_head(&SimDraft { n_cells: Some(100), ..SimDraft::default() }));
    let answer = ask(&engine, greedy(tokens(1, 60), 120));
    assert_eq!(answer.choices, ask_alone(&SimConfig::default(), greedy(tokens(1, 60), 120)).choices);
    let stats = engine.stats();
    assert!(stats.right_drafts_total > 20 && stats.failed_drafts_total == 0, "{stats:?}");
    assert!(stats.draft_cells_used <= 100, "{stats:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_a_head_does_changes_what_is_said(
        quality in prop::sample::select(vec![0.0_f32, 0.3, 0.7, 0.95, 1.0]),
        (unified, n_seq_max, cannot_cut) in (any::<bool>(), 1_u32..4, prop::bool::weighted(0.2)),
        (n_cells, max_tokens, min_tokens) in (prop::option::of(16_u32..300), 1_u32..20, 0_u32..4),
        fails_at_step in prop::option::weighted(0.2, 1_u64..60),
        fail_every_steps in prop::option::weighted(0.1, 20_u64..60),
        host_cache_bytes in prop::sample::select(vec![0_u64, 2_000, 1 << 20]),
        speculation in prop::sample::select(vec![Speculation::Draft, Speculation::Auto]),
        (period_tokens, spread) in (prop::option::weighted(0.3, 1_u32..6), prop::sample::select(vec![0.0_f32, 4.0])),
        seed in any::<u64>(),
    ) {
        let plain = SimConfig {
            unified, n_seq_max, cannot_cut, period_tokens, spread, host_cache_bytes, n_batch: 64,
            speculation: Speculation::Off, ..SimConfig::default()
        };
        let draft =
            SimDraft { is_head: true, quality, n_cells, fails_at_step, max_tokens, min_tokens, ..SimDraft::default() };
        let engine =
            Engine::simulate(SimConfig { speculation, draft: Some(draft), fail_every_steps, ..plain.clone() });
        let mut random = Random::new(seed);
        let requests: Vec<_> = (0..8).map(|_| {
            let (salt, n) = (random.below(4), 1 + random.below(90) as u32);
            let request = if random.below(2) == 0 { greedy(tokens(salt, 30), n) } else { sampled(salt, n) };
            Request { priority: random.below(3) as i32, n: 1 + random.below(2) as u32, ..request }
        }).collect();
        let requests: Vec<_> =
            requests.into_iter().map(|r| Request { n: r.n.min(n_seq_max), ..r }).collect();
        let streams: Vec<_> = requests.iter().map(|request| submit(&engine, request.clone())).collect();
        for (request, events) in requests.into_iter().zip(streams) {
            if random.below(5) == 0 {
                drop(events);
                continue;
            }
            let answer = read(events);
            // A step of the model that fails is an error of the requests in it.
            if fail_every_steps.is_none() {
                prop_assert_eq!(answer.choices, ask_alone(&plain, request).choices);
            }
        }
        wait_until_idle(&engine);
        let stats = engine.stats();
        prop_assert!(stats.right_drafts_total <= stats.drafted_tokens_total);
    }
}
