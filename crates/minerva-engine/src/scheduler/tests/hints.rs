//! What hints keep, what they cost whom, and why prompts are computed.

use std::collections::BTreeMap;

use super::replay::Replay;
use super::{Keep, Script, Terms, limits, request};
use crate::backend::BackendLimits;
use crate::scheduler::{ClientId, Miss, Policy, RequestId};

const HOUR_MS: u64 = 60 * 60 * 1000;

fn keeps(script: Script, keep: Keep) -> Script {
    Script { terms: Terms { keep, ..script.terms }, ..script }
}

fn asked() -> Keep {
    Keep::new(None, Some(HOUR_MS), 0)
}

fn keyed(key: u64, at_tick: usize) -> Keep {
    Keep::new(Some(key), None, at_tick as u64 * 1000)
}

/// Runs the requests without host memory.
fn run(limits: BackendLimits, scripts: &[Script]) -> Replay {
    with_host_memory(limits, 0, scripts)
}

fn with_host_memory(limits: BackendLimits, host_cache_bytes: u64, scripts: &[Script]) -> Replay {
    let mut replay = Replay::with_policy(limits, Policy { host_cache_bytes, ..Policy::default() });
    replay.run(scripts, &BTreeMap::new());
    replay
}

/// Two prompts of two clients, a third that needs a place, and then the first two again: which of these are still there.
fn survivors(first: Keep, second: Keep, clients: [ClientId; 2], host_cache_bytes: u64) -> [bool; 2] {
    let a = keeps(request("a").prompt(40).of_client(clients[0]), first);
    let b = keeps(request("b").at_tick(5).prompt(40).of_client(clients[1]), second);
    let c = request("c").at_tick(10).prompt(40).of_client(clients[0]);
    let mut scripts = vec![a.clone(), b.clone(), c];
    // In the order in which nothing that is there has to go for the one before.
    for (name, again) in [("x", &a), ("y", &b)] {
        scripts.push(Script { id: RequestId::from(name.as_bytes()[0]), at_tick: 20, ..again.clone() });
    }
    let alone = |which: usize| {
        let mut scripts = scripts.clone();
        scripts.remove(if which == 0 { 4 } else { 3 });
        let trace = with_host_memory(limits(2, 64), host_cache_bytes, &scripts).trace;
        trace.contains(if which == 0 { "x reuses 39" } else { "y reuses 39" })
    };
    [alone(0), alone(1)]
}

#[test]
fn what_a_client_wants_to_keep_goes_last_of_what_it_left() {
    let none = Keep::default();
    assert_eq!(survivors(none, none, [0, 0], 0), [false, true], "the oldest goes");
    assert_eq!(survivors(asked(), none, [0, 0], 0), [true, false]);
    assert_eq!(survivors(keyed(7, 0), none, [0, 0], 0), [true, false]);
    assert_eq!(
        survivors(keyed(7, 0), asked(), [0, 0], 0),
        [false, true],
        "a time that was asked for comes before a key"
    );
    assert_eq!(survivors(asked(), keyed(7, 5), [0, 0], 0), [true, false]);
    assert_eq!(survivors(asked(), asked(), [0, 0], 0), [false, true], "among equals the oldest goes");
    assert_eq!(survivors(Keep::new(None, Some(3), 0), none, [0, 0], 0), [false, true], "its time is over");
}

#[test]
fn nobody_keeps_anything_at_the_cost_of_another_client() {
    assert_eq!(survivors(asked(), Keep::default(), [1, 2], 0), [false, true]);
    assert_eq!(survivors(keyed(7, 0), Keep::default(), [1, 2], 0), [false, true]);
}

#[test]
fn hints_hold_in_host_memory_too() {
    // Two seats and host memory for one more: what c needs a place for goes there, and then gives way or does not.
    let none = Keep::default();
    let scripts = |first: Keep| {
        let a = keeps(request("a").prompt(40), first);
        let mut scripts = vec![a.clone()];
        scripts.extend((1..=4_usize).map(|i| {
            let name = ["b", "c", "d", "e"][i - 1];
            request(name).at_tick(5 * i).prompt(40)
        }));
        scripts.push(Script { id: 120, at_tick: 40, ..a });
        scripts
    };
    let is_there = |first: Keep| with_host_memory(limits(2, 64), 85, &scripts(first)).trace.contains("x reuses 39");
    assert!(!is_there(none), "two copies of 40 tokens fit, and newer ones came");
    assert!(is_there(asked()));
}

#[test]
fn a_key_is_refreshed_by_each_request_that_has_it() {
    let minutes = |minutes: u64| minutes * 60 * 1_000_000;
    let seat_of = |mut keep: Keep, at_us: u64| {
        keep.refresh(&Keep::new(Some(7), None, at_us));
        keep.key_until_us
    };
    assert_eq!(seat_of(keyed(7, 0), minutes(9)), minutes(19));
    assert_eq!(seat_of(keyed(8, 0), minutes(9)), minutes(10));
    let trace = run(
        limits(2, 64),
        &[
            keeps(request("a").shares("s", 0..40), keyed(7, 0)),
            keeps(request("b").at_tick(4).shares("s", 0..30).prompt(10), keyed(7, 4)),
        ],
    );
    assert!(trace.trace.contains("b reuses 30"), "{}", trace.trace);
}

#[test]
fn each_prompt_that_is_computed_has_its_reason() {
    let scripts = [
        request("a").shares("s", 0..30),
        request("b").at_tick(3).shares("s", 0..30).shares("t", 0..5), // goes on where `a` ended
        request("c").at_tick(6).shares("s", 0..30).shares("u", 0..10),
        request("d").at_tick(9).shares("s", 0..30).shares("u", 0..10), // all of it is there
        request("e").at_tick(12).shares("s", 0..30).shares("t", 0..5), // was there before `c` came
        request("f").at_tick(15).shares("s", 0..35).without_reuse(),
        request("g").at_tick(18).prompt(1), // nothing but its last token to compute
        request("h").at_tick(21).shares("s", 0..2).prompt(9), // two tokens are no beginning
    ];
    let replay = run(limits(1, 64), &scripts);
    let reasons: Vec<_> = scripts.iter().map(|script| replay.misses[&script.id]).collect();
    let expected = [
        Some(Miss::First),
        Some(Miss::Extended),
        Some(Miss::Diverged),
        None,
        Some(Miss::Evicted), // 32 of its 35 tokens are remembered, and 30 are there
        Some(Miss::Disabled),
        None,
        Some(Miss::First),
    ];
    assert_eq!(reasons, expected);
}

#[test]
fn what_had_to_go_is_told_from_what_was_never_there() {
    let scripts = [
        request("a").prompt(40),
        request("b").at_tick(3).prompt(40),
        Script { id: u64::from(b'c'), at_tick: 6, ..request("a").prompt(40) },
        Script {
            id: u64::from(b'd'),
            at_tick: 9,
            terms: Terms { namespace: 5, ..Terms::default() },
            ..request("a").prompt(40)
        },
    ];
    let replay = run(limits(1, 64), &scripts);
    let reason = |name: u8| replay.misses[&u64::from(name)];
    assert_eq!([b'a', b'b', b'c', b'd'].map(reason), [Miss::First, Miss::First, Miss::Evicted, Miss::First].map(Some));
}

#[test]
fn a_longer_text_that_is_not_given_up_is_a_reason_and_so_is_memory_that_cannot_be_cut() {
    let scripts = [request("a").shares("s", 0..50), request("b").at_tick(3).shares("s", 0..12).prompt(4)];
    let reason = |limits| run(limits, &scripts).misses[&u64::from(b'b')];
    assert_eq!(reason(limits(1, 64)), Some(Miss::Spared));
    assert_eq!(reason(limits(3, 64)), Some(Miss::Diverged), "with more seats it gets a copy");
    assert_eq!(reason(BackendLimits { keeps_beginnings: false, ..limits(3, 64) }), Some(Miss::MemoryCannotBeCut));
}

#[test]
fn who_gave_a_seat_away_computes_again_for_that_reason() {
    let scripts = [request("a").prompt(20).generate(20), request("b").at_tick(4).prompt(8).generate(2).priority(-1)];
    let replay = run(limits(1, 64), &scripts);
    assert!(replay.trace.contains("a yields"), "{}", replay.trace);
    assert_eq!(replay.misses[&u64::from(b'a')], Some(Miss::Preempted), "its last admission");
}
