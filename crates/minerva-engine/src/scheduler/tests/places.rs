//! Busy sequences stay side by side, and nothing is forgotten for it that is younger than something else.

use expect_test::expect;

use super::{limits, pool, request, simulate};
use crate::backend::BackendLimits;
use crate::scheduler::{CacheOp, Policy, Scheduler, Step};

#[test]
fn what_a_finished_sequence_left_between_busy_ones_moves_and_is_still_reused() {
    let b = request("b").prompt(6).generate(1);
    let trace = simulate(
        limits(4, 32),
        &[
            request("a").prompt(3).generate(6),
            b.clone(),
            request("c").prompt(3).generate(6),
            request("d").at_tick(2).prompt(3).generate(3),
            request("e").at_tick(3).continues(&b).prompt(2),
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..3 | c prefill 0..3 | b prefill 0..6
        tick 1 | a decode | c decode
        tick 2 | moves 6 | a decode | c decode | d prefill 0..3
        tick 3 | e reuses 6 | a decode | d decode | c decode | e prefill 6..9
        tick 4 | a decode | d decode | c decode
        tick 5 | a decode | c decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn in_one_pool_of_cells_nothing_moves() {
    let trace = simulate(
        pool(3, 60),
        &[
            request("a").prompt(6).generate(4),
            request("b").prompt(6).generate(1),
            request("c").prompt(6).generate(4),
            request("d").at_tick(2).prompt(6).generate(1),
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..6 | b prefill 0..6 | c prefill 0..4
        tick 1 | a decode
        tick 2 | a decode | c prefill 4..6 | d prefill 0..6
        tick 3 | a decode | c decode
        tick 4 | c decode
        tick 5 | c decode
    "#]]
    .assert_eq(&trace);
}

/// Seats three requests, ends the one in the middle, and seats a fourth.
fn fourth(limits: BackendLimits) -> (u32, Vec<CacheOp>) {
    let mut scheduler = Scheduler::new(limits, Policy::default());
    for name in ["a", "b", "c"] {
        scheduler.enqueue(request(name).prompt(4).generate(4).job(), 0);
    }
    let seqs: Vec<u32> = std::iter::from_fn(|| scheduler.admit(0)).map(|admission| admission.seqs[0]).collect();
    assert_eq!(seqs, [0, 1, 2]);
    let mut step = Step::default();
    scheduler.step(&mut step);
    scheduler.computed(&step, 1000);
    scheduler.release(1);
    scheduler.enqueue(request("d").prompt(4).job(), 0);
    let admission = scheduler.admit(0).expect("there is room");
    (admission.seqs[0], admission.ops)
}

#[test]
fn the_gap_is_filled_unless_a_move_would_copy_too_much() {
    let moved = [CacheOp::Move { src: 1, dst: 3, n_tokens: 4 }, CacheOp::Keep { seq: 1, n_tokens: 0 }];
    assert_eq!(fourth(limits(6, 32)), (1, moved.to_vec()));
    assert_eq!(fourth(BackendLimits { stream_bytes: 1 << 30, ..limits(6, 32) }), (3, vec![]));
}
