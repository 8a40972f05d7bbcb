//! What those who wait are told: their places and when they will begin.

use super::{Script, limits, request};
use crate::backend::BackendLimits;
use crate::scheduler::{Policy, RequestId, Scheduler, Step};

/// What a prompt's token and a decoding step take in here, in microseconds.
const TOKEN_US: u64 = 1_000;
const STEP_US: u64 = 500;

/// A schedule that has been running for a while.
struct Running {
    scheduler: Scheduler,
    now_us: u64,
    begun: Vec<(RequestId, u64)>,
    /// Tokens that each request still generates, and where it runs.
    left: Vec<(RequestId, u32, u32)>,
}

impl Running {
    fn new(limits: BackendLimits) -> Self {
        Self { scheduler: Scheduler::new(limits, Policy::default()), now_us: 0, begun: Vec::new(), left: Vec::new() }
    }

    fn enqueue(&mut self, script: &Script) {
        self.scheduler.enqueue(script.job(), self.now_us);
    }

    fn enqueue_all(&mut self, scripts: &[Script]) {
        for script in scripts {
            self.enqueue(script);
        }
    }

    fn turn(&mut self, scripts: &[Script]) {
        while let Some(admission) = self.scheduler.admit(self.now_us) {
            self.begun.push((admission.id, self.now_us));
            let script = scripts.iter().find(|script| script.id == admission.id).expect("one of them");
            self.left.push((admission.id, script.n_generate, admission.seqs[0]));
        }
        let mut step = Step::default();
        self.scheduler.step(&mut step);
        let n_prefill = step.n_prefill as u64;
        let step_us = n_prefill * TOKEN_US + if n_prefill < step.rows.len() as u64 { STEP_US } else { 0 };
        self.now_us += step_us;
        self.scheduler.computed(&step, step_us);
        for output in &step.outputs {
            self.scheduler.sampled(output.seq, 1 + self.now_us as i32);
            let at = self.left.iter().position(|left| left.2 == output.seq).expect("it runs");
            self.left[at].1 -= 1;
            if self.left[at].1 == 0 {
                self.left.remove(at);
                self.scheduler.release(output.seq);
            }
        }
    }
}

#[test]
fn places_are_known_at_once_and_estimates_once_there_was_something_to_learn_from() {
    let mut running = Running::new(limits(1, 16));
    let scripts = [request("a").prompt(16).generate(20), request("b").prompt(16).generate(20)];
    running.enqueue_all(&scripts);
    let places = running.scheduler.outlook(0);
    let seen: Vec<_> = places.iter().map(|place| (place.id, place.position, place.estimate_us)).collect();
    assert_eq!(seen, [(u64::from(b'a'), 1, None), (u64::from(b'b'), 2, None)]);
    running.turn(&scripts);
    running.turn(&scripts);
    let places = running.scheduler.outlook(running.now_us);
    assert_eq!((places.len(), places[0].id, places[0].position), (1, u64::from(b'b'), 1));
    assert!(places[0].estimate_us.is_some());
}

#[test]
fn estimates_are_near_what_happens_when_requests_are_alike() {
    for n_seats in [1, 3] {
        let mut running = Running::new(limits(n_seats, 32));
        let scripts: Vec<Script> = (0..20).map(|i| Script { id: i, ..request("a") }.prompt(24).generate(20)).collect();
        running.enqueue_all(&scripts);
        while running.begun.len() < 6 {
            running.turn(&scripts);
        }
        let (asked_at_us, places) = (running.now_us, running.scheduler.outlook(running.now_us));
        assert_eq!(places.iter().map(|place| place.position).collect::<Vec<_>>(), (1..=14).collect::<Vec<_>>());
        while !running.scheduler.is_idle() {
            running.turn(&scripts);
        }
        for place in places {
            let began_us = running.begun.iter().find(|begun| begun.0 == place.id).expect("it began").1;
            let (really_us, estimate_us) = ((began_us - asked_at_us) as f64, place.estimate_us.expect("known") as f64);
            // A place in the middle of a step, or of a round of seats, is as near as it gets.
            let slack_us = 30_000.0;
            assert!(
                estimate_us < really_us * 1.6 + slack_us && estimate_us > really_us * 0.6 - slack_us,
                "{n_seats} seats, place {}: {estimate_us} for {really_us}",
                place.position
            );
        }
    }
}

#[test]
fn clients_take_turns_in_what_they_are_told_as_in_what_happens() {
    let mut running = Running::new(limits(1, 32));
    let of = |id: RequestId, client| Script { id, ..request("a") }.prompt(8).generate(3).of_client(client);
    let scripts: Vec<Script> =
        [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (5, 3)].map(|(id, client)| of(id, client)).to_vec();
    running.enqueue_all(&scripts);
    running.turn(&scripts);
    let told: Vec<RequestId> = running.scheduler.outlook(running.now_us).iter().map(|place| place.id).collect();
    assert_eq!(told[..2], [4, 5], "who has nothing running comes before who has");
    while !running.scheduler.is_idle() {
        running.turn(&scripts);
    }
    let begun: Vec<RequestId> = running.begun.iter().map(|begun| begun.0).collect();
    assert_eq!(begun[0], 0);
    assert_eq!(told, begun[1..]);
}

#[test]
fn an_estimate_survives_a_pool_without_room_and_many_choices() {
    let mut running = Running::new(BackendLimits { unified: true, n_cells: 64, ..limits(4, 32) });
    let scripts: Vec<Script> = (0..4).map(|i| Script { id: i, ..request("a") }.prompt(20).generate(20)).collect();
    running.enqueue_all(&scripts);
    for _ in 0..5 {
        running.turn(&scripts);
    }
    let wide = request("w").prompt(3).choices(4).generate(2);
    running.enqueue(&wide);
    let places = running.scheduler.outlook(running.now_us);
    assert_eq!(places.len(), 4);
    let estimates: Vec<u64> = places.iter().map(|place| place.estimate_us.expect("known")).collect();
    assert!(estimates[0] > 0 && estimates.is_sorted(), "a seat is free, its cells are not: {estimates:?}");
}
