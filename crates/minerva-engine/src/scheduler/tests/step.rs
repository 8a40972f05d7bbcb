//! What a step computes: the order of its rows, and the share of prompts in it.

use expect_test::expect;

use super::{limits, request, simulate};
use crate::backend::BackendLimits;
use crate::scheduler::Budget;

#[test]
fn long_prompt_prefills_in_chunks_while_another_sequence_decodes() {
    let trace =
        simulate(limits(2, 4), &[request("a").prompt(2).generate(4), request("b").at_tick(1).prompt(6).generate(2)]);
    expect![[r#"
        tick 0 | a prefill 0..2
        tick 1 | a decode | b prefill 0..3
        tick 2 | a decode | b prefill 3..6
        tick 3 | a decode | b decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn decoding_sequences_come_first_and_in_the_order_of_their_numbers() {
    let trace = simulate(
        limits(3, 8),
        &[
            request("a").prompt(3).generate(3),
            request("b").prompt(3).generate(5),
            request("c").prompt(3).generate(4),
            request("d").prompt(5).generate(2), // gets the seat of a, and decodes in its place
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..3 | b prefill 0..3 | c prefill 0..2
        tick 1 | a decode | b decode | c prefill 2..3
        tick 2 | a decode | b decode | c decode
        tick 3 | b decode | c decode | d prefill 0..5
        tick 4 | d decode | b decode | c decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn two_prompts_are_computed_one_after_the_other_in_one_step_where_they_fit() {
    let trace = simulate(limits(2, 8), &[request("a").prompt(5).generate(2), request("b").prompt(6).generate(2)]);
    expect![[r#"
        tick 0 | a prefill 0..5 | b prefill 0..3
        tick 1 | a decode | b prefill 3..6
        tick 2 | b decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn prompts_get_smaller_shares_of_a_step_when_steps_are_slow() {
    let mut budget = Budget::new(BackendLimits { n_batch: 2048, n_ubatch: 512, ..limits(8, 2048) });
    let mut trace = Vec::new();
    let mut note = |what: &str, budget: &Budget| trace.push(format!("{what}: {}\n", budget.prefill_tokens(4, 1)));
    note("nothing known", &budget);
    for (what, decode_us, token_us) in [
        ("a GPU", 10_000, 20),
        ("a fast CPU", 10_000, 700),
        ("a slow CPU", 80_000, 2_000),
        ("a board", 400_000, 90_000),
    ] {
        for _ in 0..50 {
            budget.learn(4, 0, decode_us);
            budget.learn(4, 64, decode_us + 64 * token_us);
        }
        note(what, &budget);
    }
    let mut crowded = Budget::new(BackendLimits { n_batch: 2048, n_ubatch: 512, ..limits(8, 2048) });
    crowded.learn(1, 0, 10_000);
    crowded.learn(1, 64, 10_000 + 64 * 700);
    trace.push(format!("a fast CPU, one stream and nine prompts: {}\n", crowded.prefill_tokens(1, 9)));
    assert_eq!(budget.prefill_tokens(0, 1), 2048, "nobody decodes, nobody waits");
    expect![[r#"
        nothing known: 128
        a GPU: 512
        a fast CPU: 28
        a slow CPU: 79
        a board: 16
        a fast CPU, one stream and nine prompts: 512
    "#]]
    .assert_eq(&trace.concat());
}

#[test]
fn a_few_prompt_tokens_and_steps_of_no_time_do_not_unsettle_the_budget() {
    let mut budget = Budget::new(limits(8, 2048));
    for _ in 0..100 {
        budget.learn(0, 1, 500_000); // the step's fixed cost, not the token's
        budget.learn(4, 0, 0);
        budget.learn(4, 64, 0);
        assert!((16..=2048).contains(&budget.prefill_tokens(3, 1)));
    }
}
