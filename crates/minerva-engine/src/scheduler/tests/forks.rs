//! Several choices: one prompt, computed once and copied.

use expect_test::expect;

use super::{limits, request, simulate};
use crate::scheduler::{Policy, Scheduler, Step};

#[test]
fn the_prompt_of_several_choices_is_computed_once() {
    let trace = simulate(limits(3, 4), &[request("a").prompt(6).generate(3).choices(3)]);
    expect![[r#"
        tick 0 | a.0 prefill 0..4
        tick 1 | a.0 prefill 4..6 | a.1 copies a.0 | a.2 copies a.0
        tick 2 | a.0 decode | a.1 decode | a.2 decode
        tick 3 | a.0 decode | a.1 decode | a.2 decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn the_prompt_of_several_choices_is_computed_once_even_if_the_first_ends_at_its_first_token() {
    let trace = simulate(limits(3, 8), &[request("a").prompt(6).generate(1).choices(3)]);
    expect![[r#"
        tick 0 | a.0 prefill 0..6 | a.1 copies a.0 | a.2 copies a.0
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_cancelled_request_gives_back_the_seats_that_wait_for_its_prompt() {
    let trace = simulate(
        limits(3, 4),
        &[
            request("a").prompt(10).generate(3).choices(2).cancelled_at(2),
            request("b").prompt(3).generate(2).choices(3),
        ],
    );
    expect![[r#"
        tick 0 | a.0 prefill 0..4
        tick 1 | a.0 prefill 4..8
        tick 2 | a is cancelled | b.0 prefill 0..3 | b.1 copies b.0 | b.2 copies b.0
        tick 3 | b.2 decode | b.1 decode | b.0 decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_seat_whose_source_is_released_early_computes_the_prompt_for_the_rest() {
    let mut scheduler = Scheduler::new(limits(3, 4), Policy::default());
    scheduler.enqueue(request("a").prompt(6).choices(3).job(), 0);
    let seqs = scheduler.admit(0).expect("there is room").seqs;
    let mut step = Step::default();
    scheduler.step(&mut step);
    scheduler.computed(&step, 1000);
    scheduler.release(seqs[0]);
    for n_rows in [4, 2] {
        scheduler.step(&mut step);
        assert!(step.rows.iter().all(|row| row.seq == seqs[1]), "{step:?}");
        assert_eq!(step.rows.len(), n_rows);
        scheduler.computed(&step, 1000);
    }
    assert_eq!(scheduler.forks(seqs[1]), [seqs[2]]);
    scheduler.release(seqs[2]);
    scheduler.release(seqs[1]);
    assert!(scheduler.is_idle());
}
