//! One pool of cells: requests run at once that might need more than all of it, and none loses a token when they do.

use minerva_engine::{Engine, Request, Reservation, SimBrake, SimConfig};

use crate::support::{ask, ask_alone, greedy, read, submit, tokens, wait_until, wait_until_idle};

fn config(reservation: Reservation) -> SimConfig {
    SimConfig {
        n_seq_max: 4,
        context_length_tokens: 400,
        unified: true,
        n_cells: Some(400),
        reservation,
        ..SimConfig::default()
    }
}

#[test]
fn requests_without_a_limit_run_at_once_unless_all_is_reserved() {
    for (reservation, n_at_once) in [(Reservation::Expected, 2), (Reservation::Full, 1)] {
        let engine = Engine::simulate(SimConfig { step_us: 5_000, ..config(reservation) }); // two seconds, at the most
        ask(&engine, greedy(tokens(9, 10), 20)); // answers usually are short
        let streams: Vec<_> =
            (0..3).map(|salt| submit(&engine, Request { max_tokens: None, ..greedy(tokens(salt, 40), 1) })).collect();
        wait_until("they run", || engine.stats().requests_running + engine.stats().requests_queued == 3);
        wait_until("as many as should", || engine.stats().requests_running >= n_at_once);
        if reservation == Reservation::Full {
            assert_eq!(engine.stats().requests_running, 1);
        }
        drop(streams);
        wait_until_idle(&engine);
    }
}

#[test]
fn answers_that_are_longer_than_expected_are_what_they_are_alone() {
    for host_cache_bytes in [0, 1 << 20] {
        let brake = SimBrake::default();
        let config = SimConfig { host_cache_bytes, brake: brake.clone(), ..config(Reservation::Expected) };
        let engine = Engine::simulate(config.clone());
        for _ in 0..10 {
            ask(&engine, greedy(tokens(9, 10), 4));
        }
        let requests: Vec<Request> = (0..4).map(|salt| greedy(tokens(salt, 40), 200)).collect();
        brake.hold(); // or the first is over before the last one comes
        let streams: Vec<_> = requests.iter().map(|request| submit(&engine, request.clone())).collect();
        brake.release();
        for (events, request) in streams.into_iter().zip(requests) {
            assert_eq!(read(events).choices, ask_alone(&config, request).choices);
        }
        let stats = engine.stats();
        assert!(stats.preempted_total > 0, "960 tokens were in 400 cells: {stats:?}");
        assert_eq!(stats.failed_total, 0);
        wait_until_idle(&engine);
    }
}
