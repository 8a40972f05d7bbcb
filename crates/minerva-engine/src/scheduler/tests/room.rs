//! One pool of cells, and answers that are not as long as they might be, or longer than others were.

use std::collections::BTreeMap;

use expect_test::expect;

use super::replay::Replay;
use super::{Script, pool, request};
use crate::scheduler::{Policy, Reservation};

fn replay(n_seq_max: u32, n_cells: u32, host_cache_bytes: u64) -> Replay {
    let policy = Policy { reservation: Reservation::Expected, host_cache_bytes, ..Policy::default() };
    Replay::with_policy(pool(n_seq_max, n_cells), policy)
}

/// It might say a lot.
fn modest(name: &str, n_generate: u32) -> Script {
    Script { n_spare: 30 - n_generate, ..request(name) }.prompt(4).generate(n_generate)
}

#[test]
fn requests_that_might_say_much_run_at_once_when_answers_are_short() {
    // Each might need 34 of 60 cells.
    let scripts = ["a", "b", "c", "d"].map(|name| modest(name, 4).at_tick(if name == "a" { 0 } else { 5 }));
    let mut replay = replay(4, 60, 200);
    replay.run(&scripts, &BTreeMap::new());
    expect![[r#"
        tick 0 | a prefill 0..4
        tick 1 | a decode
        tick 2 | a decode
        tick 3 | a decode
        tick 5 | b prefill 0..4 | c prefill 0..4 | d prefill 0..4
        tick 6 | b decode | c decode | d decode
        tick 7 | b decode | c decode | d decode
        tick 8 | b decode | c decode | d decode
    "#]]
    .assert_eq(&replay.trace);
    assert_eq!(replay.n_yielded, 0);
}

#[test]
fn the_last_to_come_yields_to_a_longer_answer_and_goes_on_where_it_was() {
    let scripts = [modest("a", 4), modest("b", 28).at_tick(5), modest("c", 26).at_tick(5)];
    let mut replay = replay(3, 40, 200);
    replay.run(&scripts, &BTreeMap::new());
    expect![[r#"
        tick 0 | a prefill 0..4
        tick 1 | a decode
        tick 2 | a decode
        tick 3 | a decode
        tick 5 | b prefill 0..4 | c prefill 0..4
        tick 6 | b decode | c decode
        tick 7 | b decode | c decode
        tick 8 | b decode | c decode
        tick 9 | b decode | c decode
        tick 10 | b decode | c decode
        tick 11 | b decode | c decode
        tick 12 | b decode | c decode
        tick 13 | b decode | c decode
        tick 14 | b decode | c decode
        tick 15 | b decode | c decode
        tick 16 | b decode | c decode
        tick 17 | b decode | c decode
        tick 18 | evicts 7 | b decode | c decode
        tick 19 | b decode | c decode
        tick 20 | b decode | c decode
        tick 21 | b decode | c decode
        tick 22 | c yields | parks 20 | evicts 20 | b decode
        tick 23 | b decode
        tick 24 | b decode
        tick 25 | b decode
        tick 26 | b decode
        tick 27 | b decode
        tick 28 | b decode
        tick 29 | b decode
        tick 30 | b decode
        tick 31 | b decode
        tick 32 | b decode
        tick 33 | parks 31 | evicts 31 | c resumes with 20 | c prefill 20..21
        tick 34 | c decode
        tick 35 | c decode
        tick 36 | c decode
        tick 37 | c decode
        tick 38 | c decode
        tick 39 | c decode
        tick 40 | c decode
        tick 41 | c decode
    "#]]
    .assert_eq(&replay.trace);
    assert!(replay.n_yielded > 0);
    // All of the answer that was interrupted is learned, but for the last token as of any: a tenth of 27 and 25 each time.
    assert_eq!(replay.scheduler.seats.claims.answers.to_come(0), 7);
}

#[test]
fn what_finished_sequences_left_goes_before_anybody_yields() {
    let scripts = [modest("a", 4), modest("b", 4), modest("c", 30).at_tick(12)];
    let mut replay = replay(3, 36, 0);
    replay.run(&scripts, &BTreeMap::new());
    assert_eq!(replay.n_yielded, 0);
    assert_eq!(replay.trace.matches("evicts").count(), 2, "{}", replay.trace);
}

#[test]
fn with_full_reservation_nobody_yields() {
    let scripts = [modest("a", 4), modest("b", 28).at_tick(5), modest("c", 26).at_tick(5)];
    let mut replay = Replay::with_policy(pool(3, 40), Policy::default());
    replay.run(&scripts, &BTreeMap::new());
    assert_eq!(replay.n_yielded, 0);
}
