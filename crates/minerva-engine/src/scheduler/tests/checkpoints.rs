//! Memory that cannot be cut: where prompts stop, what is kept there, and who goes on from it.

use std::collections::BTreeMap;

use expect_test::expect;

use super::replay::Replay;
use super::{limits, request, simulate};
use crate::backend::BackendLimits;
use crate::scheduler::Policy;

/// A state and nothing else.
pub(super) fn recurrent(limits: BackendLimits) -> BackendLimits {
    BackendLimits { keeps_beginnings: false, cell_bytes: 0, state_bytes: 7, ..limits }
}

/// Cells and a state.
pub(super) fn hybrid(limits: BackendLimits) -> BackendLimits {
    BackendLimits { keeps_beginnings: false, state_bytes: 7, checkpoints_need_cells: true, ..limits }
}

/// Cells, some of which stay only for so many tokens.
pub(super) fn window(limits: BackendLimits, n_window_tokens: u32) -> BackendLimits {
    BackendLimits {
        keeps_beginnings: false,
        window_cell_bytes: 1,
        n_window_tokens,
        checkpoints_need_cells: true,
        ..limits
    }
}

#[test]
fn the_next_turn_goes_on_shortly_before_the_end_of_the_last_prompt() {
    // The answer comes back in other words, as when a template drops a chain of thought.
    let a = request("a").shares("s", 0..30).generate(3);
    let b = request("b").at_tick(8).shares("s", 0..28).prompt(12).generate(2);
    let c = request("c").at_tick(16).shares("s", 0..28).shares("b", 0..10).prompt(4);
    let trace = simulate(hybrid(limits(1, 64)), &[a.clone(), b.clone(), c.clone()]);
    expect![[r#"
        tick 0 | a prefill 0..22 | a keeps 22
        tick 1 | a prefill 22..30
        tick 2 | a decode
        tick 3 | a decode
        tick 8 | goes back to 22 | b reuses 22 | b prefill 22..32 | b keeps 32
        tick 9 | b prefill 32..40
        tick 10 | b decode
        tick 16 | goes back to 32 | c reuses 32 | c prefill 32..42
    "#]]
    .assert_eq(&trace);
    let trace = simulate(recurrent(limits(1, 64)), &[a.clone(), b.clone(), c.clone()]);
    expect![[r#"
        tick 0 | a prefill 0..22 | a keeps 22
        tick 1 | a prefill 22..30
        tick 2 | a decode
        tick 3 | a decode
        tick 8 | b reuses 22 | b prefill 22..32 | b keeps 32
        tick 9 | b prefill 32..40
        tick 10 | b decode
        tick 16 | c reuses 32 | c prefill 32..42
    "#]]
    .assert_eq(&trace);
    let trace = simulate(window(limits(1, 64), 12), &[a, b, c]);
    expect![[r#"
        tick 0 | a prefill 0..22 | a keeps 22
        tick 1 | a prefill 22..30
        tick 2 | a decode
        tick 3 | a decode
        tick 8 | goes back to 22 | b reuses 22 | b prefill 22..32 | b keeps 32
        tick 9 | b prefill 32..40
        tick 10 | b decode
        tick 16 | goes back to 32 | c reuses 32 | c prefill 32..42
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_burst_with_one_beginning_computes_it_once_and_who_comes_later_goes_on_there() {
    let burst = ["a", "b", "c"].map(|name| request(name).shares("s", 0..20).prompt(6).generate(2));
    let [a, b, c] = burst;
    let d = request("d").at_tick(12).shares("s", 0..20).prompt(3);
    let trace = simulate(recurrent(limits(3, 16)), &[a.clone(), b.clone(), c.clone(), d.clone()]);
    expect![[r#"
        tick 0 | a prefill 0..16
        tick 1 | a prefill 16..18 | a keeps 18
        tick 2 | a prefill 18..20 | a keeps 20
        tick 3 | b shares 20 | c shares 20 | a prefill 20..26 | b prefill 20..26 | c prefill 20..24
        tick 4 | a decode | b decode
        tick 5 | c prefill 24..26
        tick 6 | c decode
        tick 12 | d reuses 20 | d prefill 20..23
    "#]]
    .assert_eq(&trace);
    let trace = simulate(hybrid(limits(3, 16)), &[a, b, c, d]);
    expect![[r#"
        tick 0 | a prefill 0..16
        tick 1 | a prefill 16..18 | a keeps 18
        tick 2 | a prefill 18..20 | a keeps 20
        tick 3 | b shares 20 | c shares 20 | a prefill 20..26 | b prefill 20..26 | c prefill 20..24
        tick 4 | a decode | b decode
        tick 5 | c prefill 24..26
        tick 6 | c decode
        tick 12 | goes back to 20 | d reuses 20 | d prefill 20..23
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_prompt_stops_where_one_separates_that_still_waits_for_a_seat() {
    let a = request("a").shares("s", 0..30).generate(2);
    let b = request("b").shares("s", 0..18).prompt(4);
    let trace = simulate(hybrid(limits(1, 64)), &[a, b]);
    expect![[r#"
        tick 0 | a prefill 0..18 | a keeps 18
        tick 1 | a prefill 18..22 | a keeps 22
        tick 2 | a prefill 22..30
        tick 3 | a decode
        tick 4 | goes back to 18 | b reuses 18 | b prefill 18..22
    "#]]
    .assert_eq(&trace);
}

#[test]
fn without_host_memory_or_checkpoints_nobody_stops_for_them() {
    let scripts = [request("a").shares("s", 0..30).generate(2), request("b").at_tick(4).shares("s", 0..28).prompt(3)];
    let run = |host_cache_bytes, max_checkpoints| {
        let policy = Policy { host_cache_bytes, max_checkpoints, ..Policy::default() };
        let mut replay = Replay::with_policy(hybrid(limits(2, 64)), policy);
        replay.run(&scripts, &BTreeMap::new());
        replay.trace
    };
    expect![[r#"
        tick 0 | a prefill 0..30
        tick 1 | a decode
        tick 4 | b prefill 0..31
    "#]]
    .assert_eq(&run(200, 0));
    assert_eq!(run(0, 8), run(200, 0));
}

#[test]
fn what_would_hold_up_a_stream_for_long_is_not_copied_beside_it() {
    // 40 MB a state is 20 ms there and back.
    let large = BackendLimits { state_bytes: 40 << 20, ..hybrid(limits(2, 64)) };
    let mut replay =
        Replay::with_policy(large, Policy { host_cache_bytes: 1 << 30, max_checkpoints: 8, ..Policy::default() });
    replay.us_per_row = 100_000;
    replay.most_parked_bytes = 1 << 30;
    let a = request("a").prompt(30).generate(6);
    let b = request("b").at_tick(3).prompt(30).generate(2);
    replay.run(&[a, b], &BTreeMap::new());
    expect![[r#"
        tick 0 | a prefill 0..22 | a keeps 22
        tick 1 | a prefill 22..30
        tick 2 | a decode
        tick 3 | a decode | b prefill 0..16
        tick 4 | a decode | b prefill 16..30
        tick 5 | a decode | b decode
        tick 6 | a decode
    "#]]
    .assert_eq(&replay.trace);
}

#[test]
fn of_too_many_checkpoints_of_one_text_the_closest_go_first() {
    let policy = Policy { host_cache_bytes: 200, max_checkpoints: 2, ..Policy::default() };
    let mut replay = Replay::with_policy(hybrid(limits(1, 64)), policy);
    let a = request("a").shares("s", 0..22);
    let b = request("b").at_tick(4).shares("s", 0..20).prompt(10);
    let c = request("c").at_tick(8).shares("s", 0..20).shares("b", 0..8).prompt(20);
    let d = request("d").at_tick(12).shares("s", 0..20).shares("b", 0..8).shares("c", 0..16).prompt(10);
    replay.run(&[a, b, c, d], &BTreeMap::new());
    expect![[r#"
        tick 0 | a prefill 0..14 | a keeps 14
        tick 1 | a prefill 14..22
        tick 4 | goes back to 14 | b reuses 14 | b prefill 14..22 | b keeps 22
        tick 5 | b prefill 22..30
        tick 8 | goes back to 22 | c reuses 22 | c prefill 22..40 | c keeps 40
        tick 9 | c prefill 40..48
        tick 12 | goes back to 40 | d reuses 40 | d prefill 40..46 | d keeps 46
        tick 13 | d prefill 46..54
    "#]]
    .assert_eq(&replay.trace);
    // 14 and 22 were closest when 40 came, then 40 was closest to 46.
    assert_eq!(replay.checkpoint_lengths(), [22, 46]);
}
