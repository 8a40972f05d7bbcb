//! Who is next, who yields, and how those who yielded go on.

use std::collections::BTreeMap;

use expect_test::expect;

use super::replay::Replay;
use super::{Script, limits, pool, request, simulate};
use crate::scheduler::{Policy, Scheduler, Step, Terms};

/// Runs the requests without host memory and returns a line per step.
fn simulate_without_host_memory<const N: usize>(n_seq_max: u32, scripts: &[Script; N]) -> String {
    let mut replay = Replay::with_policy(limits(n_seq_max, 16), Policy::default());
    replay.run(scripts, &BTreeMap::new());
    replay.trace
}

#[test]
fn a_client_with_one_request_takes_a_seat_from_one_who_has_them_all() {
    let flood = ["a", "b", "c", "d"].map(|name| request(name).prompt(3).generate(5).of_client(1));
    let [a, b, c, d] = flood;
    let trace = simulate(limits(3, 16), &[a, b, c, d, request("x").at_tick(2).prompt(3).generate(2).of_client(2)]);
    expect![[r#"
        tick 0 | a prefill 0..3 | b prefill 0..3 | c prefill 0..3
        tick 1 | a decode | b decode | c decode
        tick 2 | c yields | parks 4 | a decode | b decode | x prefill 0..3
        tick 3 | a decode | b decode | x decode
        tick 4 | c resumes with 4 | a decode | b decode | c prefill 4..5
        tick 5 | moves 7 | c decode | d prefill 0..3
        tick 6 | d decode | c decode
        tick 7 | d decode
        tick 8 | d decode
        tick 9 | d decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn without_host_memory_who_yielded_computes_again_what_he_had() {
    let trace = simulate_without_host_memory(
        2,
        &[
            request("a").prompt(3).generate(5).of_client(1),
            request("b").prompt(3).generate(5).of_client(1),
            request("x").at_tick(2).prompt(3).generate(2).of_client(2),
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..3 | b prefill 0..3
        tick 1 | a decode | b decode
        tick 2 | b yields | a decode | x prefill 0..3
        tick 3 | a decode | x decode
        tick 4 | b resumes with 0 | a decode | b prefill 0..5
        tick 5 | b decode
        tick 6 | b decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_better_priority_takes_the_seat_of_a_worse_one_and_an_equal_one_waits() {
    let trace = simulate(
        limits(1, 16),
        &[
            request("a").prompt(2).generate(4).priority(5),
            request("b").at_tick(1).prompt(2).generate(2),
            request("c").at_tick(1).prompt(2).generate(1),
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..2
        tick 1 | a yields | parks 2 | b prefill 0..2
        tick 2 | b decode
        tick 3 | c prefill 0..2
        tick 4 | a resumes with 2 | a prefill 2..3
        tick 5 | a decode
        tick 6 | a decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn with_one_pool_as_many_yield_as_there_have_to_be() {
    let trace = simulate(
        pool(4, 30),
        &[
            request("a").prompt(6).generate(4).of_client(1),
            request("b").prompt(6).generate(4).of_client(1),
            request("c").prompt(6).generate(4).of_client(1),
            request("x").at_tick(1).prompt(8).generate(2).priority(-1).of_client(2),
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..6 | b prefill 0..6 | c prefill 0..4
        tick 1 | c yields | parks 4 | evicts 4 | a decode | b decode
        tick 2 | a decode | b decode | x prefill 0..8
        tick 3 | a decode | b decode | x decode
        tick 4 | evicts 9 | c resumes with 4 | c prefill 4..6
        tick 5 | c decode
        tick 6 | c decode
        tick 7 | c decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one_and_the_long_one_gets_on() {
    let trace = simulate(
        limits(4, 4),
        &[
            request("l").prompt(30).generate(1),
            request("s").at_tick(1).prompt(3).generate(1),
            request("t").at_tick(2).prompt(4).generate(1),
        ],
    );
    expect![[r#"
        tick 0 | l prefill 0..4
        tick 1 | s prefill 0..3 | l prefill 4..5
        tick 2 | moves 3 | t prefill 0..4
        tick 3 | l prefill 5..9
        tick 4 | l prefill 9..13
        tick 5 | l prefill 13..17
        tick 6 | l prefill 17..21
        tick 7 | l prefill 21..25
        tick 8 | l prefill 25..29
        tick 9 | l prefill 29..30
    "#]]
    .assert_eq(&trace);
}

#[test]
fn prompts_are_not_shared_between_namespaces() {
    let shares = |name: &str, namespace| {
        let script = request(name).shares("t", 0..16).prompt(2);
        Script { terms: Terms { namespace, ..Terms::default() }, ..script }
    };
    let trace = simulate(limits(3, 64), &[shares("a", 1), shares("b", 2), shares("c", 1)]);
    expect![[r#"
        tick 0 | a prefill 0..18 | b prefill 0..18
        tick 1 | c shares 16 | c prefill 16..18
    "#]]
    .assert_eq(&trace);
}

#[test]
fn requests_are_taken_in_order_of_priority_deadline_and_arrival_and_the_late_ones_not_at_all() {
    let mut scheduler = Scheduler::new(limits(1, 16), Policy::default());
    let mut enqueue = |name: &str, at_us, priority, deadline_us| {
        let terms = Terms { priority, deadline_us, ..Terms::default() };
        scheduler.enqueue(Script { terms, ..request(name).prompt(2) }.job(), at_us);
    };
    enqueue("a", 0, 0, None);
    enqueue("b", 1, 0, Some(50_000_000));
    enqueue("c", 2, -1, None);
    enqueue("d", 3, 0, Some(3_000_000));
    // Ten seconds of waiting are worth a priority, so it is older than 100,000 ones.
    enqueue("e", 4, 7, None);
    assert_eq!(scheduler.queued(), (5, 10));
    assert_eq!(scheduler.expired(2_999_999), Vec::<u64>::new());
    assert_eq!(scheduler.expired(3_000_000), vec![u64::from(b'd')]);
    let mut order = String::new();
    for now_us in [4_000_000, 4_000_001, 4_000_002] {
        let admission = scheduler.admit(now_us).expect("the seat is free");
        order.push(char::from(admission.id as u8));
        assert_eq!(scheduler.admit(now_us), None);
        scheduler.release(0);
    }
    assert_eq!(order, "cba");
    // However long a client has waited, the one with fewer sequences is next.
    let mut scheduler_of_two = Scheduler::new(limits(2, 16), Policy::default());
    for (name, client, at_us) in [("a", 1, 0), ("b", 1, 1), ("x", 2, 90_000_000)] {
        scheduler_of_two.enqueue(request(name).prompt(2).of_client(client).job(), at_us);
    }
    let next = |scheduler: &mut Scheduler| scheduler.admit(90_000_001).map(|admission| admission.id as u8 as char);
    assert_eq!([next(&mut scheduler_of_two), next(&mut scheduler_of_two)], [Some('a'), Some('x')]);
    let (late, now_us) = (request("f").prompt(2).priority(0).job(), 75_000_000);
    scheduler.enqueue(late, now_us);
    assert_eq!(scheduler.admit(now_us).map(|admission| admission.id), Some(u64::from(b'e')), "it waited 75 s");
}

/// Admits all that can be and returns their names.
fn admitted(scheduler: &mut Scheduler, now_us: u64) -> String {
    let admissions = std::iter::from_fn(|| scheduler.admit(now_us));
    admissions.map(|admission| char::from(admission.id as u8)).collect()
}

#[test]
fn who_has_waited_for_its_seat_keeps_it_and_who_has_only_run_does_not() {
    let mut scheduler = Scheduler::new(limits(1, 16), Policy::default());
    let second = 1_000_000;
    scheduler.enqueue(request("a").prompt(2).job(), 0);
    assert_eq!(admitted(&mut scheduler, 0), "a");
    scheduler.enqueue(request("b").prompt(2).priority(5).job(), 0);
    scheduler.enqueue(request("c").prompt(2).job(), 70 * second);
    assert_eq!(admitted(&mut scheduler, 70 * second), "");
    scheduler.release(0);
    assert_eq!(admitted(&mut scheduler, 70 * second), "b", "its 70 s are worth more than five priorities");
    assert_eq!(admitted(&mut scheduler, 71 * second), "", "so it does not yield to the next one");
    scheduler.enqueue(request("d").prompt(2).priority(-2).job(), 71 * second);
    assert_eq!(admitted(&mut scheduler, 71 * second), "", "nor to two better ones: it is worth seven");
    scheduler.enqueue(request("e").prompt(2).priority(-3).job(), 71 * second);
    assert_eq!(admitted(&mut scheduler, 71 * second), "e");
    // As good as `d`, and it came first.
    scheduler.release(0);
    assert_eq!(admitted(&mut scheduler, 72 * second), "b");
    let mut running_long = Scheduler::new(limits(1, 16), Policy::default());
    running_long.enqueue(request("a").prompt(2).priority(5).job(), 0);
    assert_eq!(admitted(&mut running_long, 0), "a");
    for (name, at) in [("b", 100), ("c", 101)] {
        running_long.enqueue(request(name).prompt(2).job(), at * second);
    }
    assert_eq!(admitted(&mut running_long, 101 * second), "b");
    running_long.release(0);
    assert_eq!(admitted(&mut running_long, 102 * second), "c", "the first one ran for 100 s and has waited for one");
}

#[test]
fn nobody_takes_the_seat_of_an_equal_or_better_one_by_having_waited() {
    for worse in [0, 5] {
        let mut scheduler = Scheduler::new(limits(1, 16), Policy::default());
        let second = 1_000_000;
        scheduler.enqueue(request("r").prompt(2).job(), 0);
        assert_eq!(admitted(&mut scheduler, 0), "r");
        scheduler.enqueue(request("s").prompt(2).priority(worse).job(), second);
        scheduler.enqueue(request("m").prompt(2).priority(-1).job(), 100 * second);
        assert_eq!(admitted(&mut scheduler, 100 * second), "", "the one that has waited is next, and has to wait");
        scheduler.release(0);
        assert_eq!(admitted(&mut scheduler, 101 * second), "s");
    }
}

#[test]
fn a_prompt_behind_better_ones_is_computed_in_the_end() {
    let mut scheduler = Scheduler::new(limits(2, 4), Policy::default());
    scheduler.enqueue(request("a").prompt(8).priority(5).job(), 0);
    scheduler.enqueue(request("b").prompt(40).job(), 0);
    assert_eq!(admitted(&mut scheduler, 0), "ba");
    let mut step = Step::default();
    let mut served = Vec::new();
    for _ in 0..4 {
        scheduler.step(&mut step);
        served.push(step.rows[0].seq);
        scheduler.computed(&step, 20_000_000);
    }
    assert_eq!(served, [0, 0, 0, 1], "after a minute it is as good as the other, and shorter");
}
