//! Guessed tokens: computed along, kept as far as they were right, and never in anybody's way.

use expect_test::expect;

use std::collections::BTreeMap;

use super::replay::Replay;
use super::{Script, limits, pool, request, simulate};
use crate::backend::BackendLimits;
use crate::scheduler::{DraftLimits, Policy};

fn repeating(name: &str, period: usize, n_generate: u32) -> Script {
    Script { period: Some(period), ..request(name).prompt(3).generate(n_generate) }
}

#[test]
fn a_text_that_repeats_itself_takes_fewer_steps_and_a_guess_that_goes_too_far_is_taken_back() {
    let trace = simulate(limits(1, 16), &[repeating("a", 3, 22)]);
    expect![[r#"
        tick 0 | a prefill 0..3
        tick 1 | a decode
        tick 2 | a decode
        tick 3 | a decode
        tick 4 | a decode
        tick 5 | a decode
        tick 6 | a decode and 2
        tick 7 | a decode and 8
        tick 8 | a decode and 3
    "#]]
    .assert_eq(&trace);
}

#[test]
fn with_a_stream_per_sequence_only_a_lone_sequence_is_guessed_for() {
    let trace = simulate(limits(2, 16), &[repeating("a", 1, 9), request("b").at_tick(1).prompt(2).generate(7)]);
    expect![[r#"
        tick 0 | a prefill 0..3
        tick 1 | a decode | b prefill 0..2
        tick 2 | a decode | b decode
        tick 3 | a decode | b decode
        tick 4 | a decode | b decode
        tick 5 | a decode | b decode
        tick 6 | a decode | b decode
        tick 7 | a decode | b decode
        tick 8 | a decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn with_one_pool_guesses_are_made_for_all_as_far_as_a_batch_has_room() {
    let trace = simulate(pool(2, 64), &[repeating("a", 1, 12), repeating("b", 2, 12)]);
    expect![[r#"
        tick 0 | a prefill 0..3 | b prefill 0..3
        tick 1 | a decode | b decode
        tick 2 | a decode | b decode
        tick 3 | a decode | b decode
        tick 4 | a decode and 2 | b decode
        tick 5 | a decode and 4 | b decode and 1
        tick 6 | b decode and 4
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_request_that_wants_no_guesses_gets_none() {
    let trace = simulate(limits(1, 16), &[Script { guess: false, ..repeating("a", 1, 6) }]);
    expect![[r#"
        tick 0 | a prefill 0..3
        tick 1 | a decode
        tick 2 | a decode
        tick 3 | a decode
        tick 4 | a decode
        tick 5 | a decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn tokens_that_have_to_follow_are_computed_in_one_step_where_that_is_one_pass() {
    let trace = simulate(limits(2, 16), &[Script { forces: true, ..request("a").prompt(3).generate(14) }]);
    expect![[r#"
        tick 0 | a prefill 0..3
        tick 1 | a decode
        tick 2 | a decode
        tick 3 | a decode and 3
        tick 4 | a decode
        tick 5 | a decode
        tick 6 | a decode and 3
        tick 7 | a decode
    "#]]
    .assert_eq(&trace);
    let forcing = |name: &str| Script { forces: true, ..request(name).prompt(3).generate(8) };
    let trace = simulate(limits(2, 16), &[forcing("a"), request("b").prompt(2).generate(6)]);
    expect![[r#"
        tick 0 | b prefill 0..2 | a prefill 0..3
        tick 1 | a decode | b decode
        tick 2 | a decode | b decode
        tick 3 | a decode | b decode
        tick 4 | a decode | b decode
        tick 5 | a decode | b decode
        tick 6 | a decode
        tick 7 | a decode
    "#]]
    .assert_eq(&trace);
}

/// Runs the requests beside a draft model that is right so often and takes so long. Returns a line per step and the drafted tokens.
fn drafted(limits: BackendLimits, quality: f64, us_per_draft: u64, scripts: &[Script]) -> (String, usize) {
    let draft = Some(DraftLimits { max_tokens: 8, min_tokens: 0 });
    let mut replay = Replay::with_policy(limits, Policy { draft, ..Policy::default() });
    (replay.draft_quality, replay.us_per_draft) = (Some(quality), us_per_draft);
    replay.run(scripts, &BTreeMap::new());
    (replay.trace, replay.n_drafted)
}

#[test]
fn a_draft_model_that_is_right_takes_steps_away_and_one_that_is_behind_is_not_waited_for() {
    let (trace, _) = drafted(limits(1, 16), 1.0, 50, &[request("a").prompt(6).generate(22)]);
    expect![[r#"
        tick 0 | a prefill 0..6
        tick 1 | a decode
        tick 2 | a decode and 6
        tick 3 | a decode and 8
        tick 4 | a decode and 3
    "#]]
    .assert_eq(&trace);
}

#[test]
fn nobody_is_drafted_for_who_wants_no_guesses_or_shares_a_step_where_that_is_two_passes() {
    let (_, n) = drafted(limits(1, 16), 1.0, 50, &[Script { guess: false, ..request("a").prompt(3).generate(9) }]);
    assert_eq!(n, 0);
    let both = [request("a").prompt(3).generate(9), request("b").prompt(3).generate(9)];
    assert_eq!(drafted(limits(2, 16), 1.0, 50, &both).1, 0);
    assert!(drafted(pool(2, 64), 1.0, 50, &both).1 > 0);
}

#[test]
fn a_draft_model_that_does_not_pay_is_asked_less_and_less() {
    let long = BackendLimits { n_cells_per_seq: 2048, n_cells: 2048, ..limits(1, 32) };
    let n_drafted = |quality, us| drafted(long, quality, us, &[request("a").prompt(3).generate(1000)]).1;
    let (right, wrong, slow) = (n_drafted(1.0, 50), n_drafted(0.0, 50), n_drafted(1.0, 5_000));
    assert!(right > 700, "{right}");
    assert!(wrong < 80, "{wrong} tokens of a model that is always wrong");
    assert!(slow < 80, "{slow} tokens of a model that is slower than the steps that it saves");
}
