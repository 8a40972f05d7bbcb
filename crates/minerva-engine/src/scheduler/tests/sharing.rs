//! Prompts that begin alike while all of them run: computed once, copied by the rest.

use std::collections::BTreeMap;

use expect_test::expect;

use super::replay::Replay;
use super::{Script, limits, pool, request, simulate};
use crate::backend::BackendLimits;

#[test]
fn a_burst_with_one_beginning_computes_it_once() {
    let burst = ["a", "b", "c"].map(|name| request(name).shares("s", 0..20).prompt(2).generate(2));
    let trace = simulate(limits(3, 8), &burst);
    expect![[r#"
        tick 0 | a prefill 0..8
        tick 1 | a prefill 8..16
        tick 2 | a prefill 16..22
        tick 3 | b shares 20 | c shares 20 | a decode | b prefill 20..22 | c prefill 20..22
        tick 4 | b decode | c decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn who_comes_later_gets_what_is_there_at_once_also_from_an_answer_that_is_still_being_written() {
    let a = request("a").prompt(6).generate(8);
    let b = request("b").at_tick(4).continues(&request("a").prompt(6).generate(3)).prompt(2).generate(2);
    let trace = simulate(limits(2, 16), &[a, b]);
    expect![[r#"
        tick 0 | a prefill 0..6
        tick 1 | a decode
        tick 2 | a decode
        tick 3 | a decode
        tick 4 | b shares 9 | a decode | b prefill 9..11
        tick 5 | a decode | b decode
        tick 6 | a decode
        tick 7 | a decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn the_end_of_a_long_conversation_survives_a_prompt_that_begins_like_it() {
    let trace = simulate(
        limits(3, 32),
        &[
            request("a").shares("s", 0..6).prompt(20).generate(2),
            request("b").at_tick(4).shares("s", 0..6).prompt(3).generate(2),
            request("c").at_tick(8).shares("s", 0..6).continues(&request("a").prompt(20).generate(0)).prompt(1),
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..26
        tick 1 | a decode
        tick 4 | b shares 6 | b prefill 6..9
        tick 5 | b decode
        tick 8 | c reuses 26 | c prefill 26..27
    "#]]
    .assert_eq(&trace);
}

#[test]
fn when_the_first_is_cancelled_the_next_goes_on_where_he_stopped() {
    let trace = simulate(
        limits(3, 8),
        &[
            request("a").shares("s", 0..20).prompt(2).cancelled_at(1),
            request("b").shares("s", 0..20).prompt(2),
            request("c").shares("s", 0..20).prompt(2),
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..8
        tick 1 | a is cancelled | b shares 8 | b prefill 8..16
        tick 2 | b prefill 16..22
        tick 3 | c shares 20 | c prefill 20..22
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_chain_of_beginnings_waits_link_by_link_and_a_request_without_reuse_for_nobody() {
    let trace = simulate(
        limits(4, 8),
        &[
            request("a").shares("s", 0..8),
            request("b").shares("s", 0..16),
            request("c").shares("s", 0..20),
            request("d").shares("s", 0..12).without_reuse(),
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..8
        tick 1 | b shares 8 | b prefill 8..16
        tick 2 | c shares 16 | c prefill 16..20 | d prefill 0..4
        tick 3 | d prefill 4..12
    "#]]
    .assert_eq(&trace);
}

#[test]
fn choices_share_their_prompt_and_that_shares_its_beginning() {
    let trace = simulate(
        limits(4, 16),
        &[request("a").shares("s", 0..10).prompt(1), request("b").shares("s", 0..10).prompt(2).choices(2).generate(2)],
    );
    expect![[r#"
        tick 0 | a prefill 0..11
        tick 1 | b.0 shares 10 | b.0 prefill 10..12 | b.1 copies b.0
        tick 2 | b.0 decode | b.1 decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_pool_that_is_short_gives_up_other_sequences_before_the_beginning_that_is_about_to_be_copied() {
    let c = Script { n_spare: 22, ..request("c").at_tick(6).shares("s", 0..10).prompt(2).generate(2) };
    let trace =
        simulate(pool(3, 60), &[request("a").shares("s", 0..20).prompt(1), request("b").at_tick(3).prompt(16), c]);
    expect![[r#"
        tick 0 | a prefill 0..16
        tick 1 | a prefill 16..21
        tick 3 | b prefill 0..16
        tick 6 | parks 16 | evicts 16 | c shares 10 | c prefill 10..12
        tick 7 | c decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn copies_that_fail_are_tried_again_after_a_while() {
    let mut replay = Replay::new(limits(4, 32));
    let pair = |names: [&str; 2], text, at_tick| {
        names.map(|name| request(name).at_tick(at_tick).shares(text, 0..16).prompt(2).generate(20))
    };
    let [first, soon, later] = [(["a", "b"], "s", 0), (["c", "d"], "t", 24), (["e", "f"], "u", 80)]
        .map(|(names, text, at_tick)| pair(names, text, at_tick));
    replay.cannot_copy = true;
    replay.run(&first, &BTreeMap::new());
    replay.cannot_copy = false;
    replay.run(&soon, &BTreeMap::new());
    assert!(!replay.trace.contains("shares"), "{}", replay.trace);
    replay.run(&[request("x").at_tick(50).prompt(3).generate(30)], &BTreeMap::new());
    replay.run(&later, &BTreeMap::new());
    assert!(replay.trace.contains("f shares 16"), "{}", replay.trace);
}

#[test]
fn what_came_back_with_its_last_window_is_used_whole_or_not_at_all() {
    let windowed = BackendLimits { n_copied_window_tokens: 9, ..limits(1, 32) };
    let a = request("a").shares("s", 0..20).generate(4);
    let [b, c] = [("b", 8), ("d", 16)].map(|(name, at_tick)| request(name).at_tick(at_tick).prompt(20));
    let again = request("c").at_tick(12).continues(&a).prompt(2);
    let shorter = request("e").at_tick(20).shares("s", 0..18).prompt(3);
    let trace = simulate(windowed, &[a, b, again, c, shorter]);
    expect![[r#"
        tick 0 | a prefill 0..20
        tick 1 | a decode
        tick 2 | a decode
        tick 3 | a decode
        tick 8 | parks 23 | b prefill 0..20
        tick 12 | parks 20 | c reuses 23 | c prefill 23..26
        tick 16 | d prefill 0..20
        tick 20 | parks 20 | e prefill 0..21
    "#]]
    .assert_eq(&trace);
}
