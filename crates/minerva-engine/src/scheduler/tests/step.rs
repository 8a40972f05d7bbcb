//! What a step computes: the order of its rows, and the share of prompts in it.

use expect_test::expect;

use super::{limits, request, simulate};
use crate::backend::BackendLimits;
use crate::scheduler::{Budget, Demand, Work};

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

fn budget() -> Budget {
    Budget::new(BackendLimits { n_batch: 2048, n_ubatch: 512, ..limits(8, 2048) })
}

fn demand(n_decode: usize, n_prompts: usize) -> Demand {
    Demand { n_decode, n_prompts, ..Demand::default() }
}

/// Steps that only decode, and steps with 64 prompt tokens beside.
fn learn(budget: &mut Budget, n_decode: usize, decode_us: u64, token_us: u64) {
    for _ in 0..50 {
        budget.learn(Work { n_decode, ..Work::default() }, decode_us);
        budget.learn(Work { n_decode, n_prefill: 64, ..Work::default() }, decode_us + 64 * token_us);
    }
}

#[test]
fn prompts_get_smaller_shares_of_a_step_when_steps_are_slow() {
    let mut budget_of_all = budget();
    let mut trace = Vec::new();
    let mut note = |what: &str, budget: &Budget| {
        let alone = budget.prefill_tokens(demand(0, 1));
        let limited = budget.prefill_tokens(Demand { max_itl_us: Some(50_000), ..demand(4, 9) });
        trace.push(format!("{what}: {}, alone {alone}, in 50 ms {limited}\n", budget.prefill_tokens(demand(4, 1))));
    };
    note("nothing known", &budget_of_all);
    for (what, decode_us, token_us) in [
        ("a GPU", 10_000, 20),
        ("a fast CPU", 10_000, 700),
        ("a slow CPU", 80_000, 2_000),
        ("a board", 400_000, 90_000),
    ] {
        learn(&mut budget_of_all, 4, decode_us, token_us);
        note(what, &budget_of_all);
    }
    let mut crowded = budget();
    learn(&mut crowded, 1, 10_000, 700);
    trace.push(format!("a fast CPU, one stream and nine prompts: {}\n", crowded.prefill_tokens(demand(1, 9))));
    expect![[r#"
        nothing known: 128, alone 512, in 50 ms 128
        a GPU: 512, alone 2048, in 50 ms 512
        a fast CPU: 21, alone 512, in 50 ms 57
        a slow CPU: 58, alone 512, in 50 ms 16
        a board: 16, alone 512, in 50 ms 16
        a fast CPU, one stream and nine prompts: 512
    "#]]
    .assert_eq(&trace.concat());
}

#[test]
fn a_few_prompt_tokens_and_steps_of_no_time_do_not_unsettle_the_budget() {
    let mut budget = Budget::new(limits(8, 2048));
    for _ in 0..100 {
        budget.learn(Work { n_prefill: 1, ..Work::default() }, 500_000); // the step's fixed cost, not the token's
        learn(&mut budget, 4, 0, 0);
        assert!((16..=2048).contains(&budget.prefill_tokens(demand(3, 1))));
    }
}
