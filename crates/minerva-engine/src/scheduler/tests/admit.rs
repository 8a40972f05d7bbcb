//! Who is seated: first come, first served, and never without the cells that may be needed.

use expect_test::expect;

use super::{Script, limits, pool, request, simulate};

#[test]
fn nobody_overtakes_a_request_that_waits_for_more_room() {
    let trace = simulate(
        limits(2, 16),
        &[
            request("a").prompt(2).generate(3),
            request("b").prompt(2).generate(2).choices(2), // needs both seats
            request("c").prompt(2).generate(2),            // one seat is free all along
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..2
        tick 1 | a decode
        tick 2 | a decode
        tick 3 | b.0 prefill 0..2 | b.1 copies b.0
        tick 4 | b.1 decode | b.0 decode
        tick 5 | c prefill 0..2
        tick 6 | c decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_cancelled_request_at_the_head_of_the_queue_lets_the_next_one_in() {
    let trace = simulate(
        limits(2, 16),
        &[
            request("a").prompt(2).generate(6),
            request("b").prompt(2).generate(2).choices(2).cancelled_at(2),
            request("c").prompt(2).generate(2),
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..2
        tick 1 | a decode
        tick 2 | b is cancelled | a decode | c prefill 0..2
        tick 3 | a decode | c decode
        tick 4 | a decode
        tick 5 | a decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn one_pool_of_cells_admits_only_what_it_can_promise() {
    // 20 cells: a may need 10, b 8, c 6; c has to wait for a, which ends before it used all it could.
    let trace = simulate(
        pool(3, 20),
        &[
            Script { n_spare: 2, ..request("a").prompt(6).generate(2) },
            request("b").prompt(4).generate(4),
            request("c").prompt(4).generate(2),
        ],
    );
    expect![[r#"
        tick 0 | b prefill 0..4 | a prefill 0..6
        tick 1 | a decode | b decode
        tick 2 | evicts 7 | b decode | c prefill 0..4
        tick 3 | b decode | c decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn one_pool_of_cells_evicts_the_oldest_finished_sequence_first_and_no_more_than_it_must() {
    let trace = simulate(
        pool(4, 24),
        &[
            request("a").prompt(6),
            request("b").at_tick(2).prompt(7),
            request("c").at_tick(4).prompt(5),             // a, b and c leave 18 cells
            request("d").at_tick(6).prompt(8).generate(2), // 10 more: a has to go, b may stay
            request("e").at_tick(9).shares("b", 0..7).prompt(1), // b is still there
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..6
        tick 2 | b prefill 0..7
        tick 4 | c prefill 0..5
        tick 6 | evicts 6 | d prefill 0..8
        tick 7 | d decode
        tick 9 | e reuses 7 | e prefill 7..8
    "#]]
    .assert_eq(&trace);
}
