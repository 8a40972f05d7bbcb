//! What a request takes over from the sequence that it is seated in.

use expect_test::expect;

use super::{limits, request, simulate};

#[test]
fn the_next_turn_of_a_conversation_computes_only_what_is_new() {
    let a = request("a").prompt(6).generate(3);
    let b = request("b").at_tick(5).continues(&a).prompt(4).generate(2);
    let c = request("c").at_tick(10).continues(&b).prompt(1).generate(1);
    // The last token of an answer was never computed, so each turn has one more to compute than is new.
    let trace = simulate(limits(2, 16), &[a, b, c]);
    expect![[r#"
        tick 0 | a prefill 0..6
        tick 1 | a decode
        tick 2 | a decode
        tick 5 | b reuses 8 | b prefill 8..13
        tick 6 | b decode
        tick 10 | c reuses 14 | c prefill 14..16
    "#]]
    .assert_eq(&trace);
}

#[test]
fn the_longest_common_prefix_is_reused_and_one_token_is_always_computed() {
    let trace = simulate(
        limits(2, 16),
        &[
            request("a").shares("s", 0..4).prompt(2),
            request("b").shares("s", 0..6).prompt(2),
            request("c").at_tick(3).shares("s", 0..8), // 6 with b, 4 with a
            request("d").at_tick(6).shares("s", 0..8), // the whole prompt is there: all but its last token
            request("e").at_tick(9).shares("s", 1..8), // the same tokens, but not from the start
            request("f").at_tick(12).shares("s", 1..8).without_reuse(),
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..6
        tick 1 | b shares 4 | b prefill 4..8
        tick 3 | c reuses 6 | c prefill 6..8
        tick 6 | d reuses 7 | d prefill 7..8
        tick 9 | e prefill 0..7
        tick 12 | f prefill 0..7
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_prefix_of_a_sequence_that_still_runs_is_not_touched() {
    let trace = simulate(
        limits(2, 16),
        &[request("a").shares("s", 0..6).generate(4), request("b").at_tick(1).shares("s", 0..6).generate(2)],
    );
    expect![[r#"
        tick 0 | a prefill 0..6
        tick 1 | b shares 5 | a decode | b prefill 5..6
        tick 2 | a decode | b decode
        tick 3 | a decode
    "#]]
    .assert_eq(&trace);
}
