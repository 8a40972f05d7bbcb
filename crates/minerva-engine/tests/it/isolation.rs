//! Nobody's tokens reach anybody else: under any schedule each request says exactly what it says alone.

use std::thread;
use std::time::Duration;

use minerva_engine::{CacheIsolation, Engine, GenerationError, Request, SimConfig, SimMemory};
use proptest::prelude::*;

use crate::support::{ask_alone, greedy, read, submit, tokens, wait_until_idle};

/// One request of a schedule, and when its caller leaves.
#[derive(Debug, Clone)]
struct Visit {
    request: Request,
    pause_us: u64,
    /// Events after which the stream is dropped.
    leaves_after: Option<usize>,
}

prop_compose! {
    fn visit()(
        shared_text in 0_u64..3,
        n_shared in 0_usize..80,
        secret in 10_u64..10_000,
        n_own in 1_usize..60,
        n in 1_u32..=3,
        max_tokens in 1_u32..30,
        cache_prompt in prop::bool::weighted(0.8),
        pause_us in prop_oneof![Just(0_u64), 0_u64..2_000],
        leaves_after in prop::option::weighted(0.3, 0_usize..10),
        client in 0_u64..3,
        priority in prop::sample::select(vec![0, 0, 0, -1, 3]),
    ) -> Visit {
        let mut prompt = tokens(shared_text, n_shared);
        prompt.extend(tokens(secret, n_own));
        Visit { request: Request { n, cache_prompt, client, priority, ..greedy(prompt, max_tokens) }, pause_us, leaves_after }
    }
}

prop_compose! {
    fn config()(
        n_seq_max in 3_u32..=6,
        unified in any::<bool>(),
        n_cells in 510_u32..1200, // the largest request: 3 choices of 170 tokens
        n_batch in prop::sample::select(vec![8_u32, 32, 256]),
        step_us in prop::sample::select(vec![0_u64, 0, 30]),
        cannot_cut in any::<bool>(),
        memory in prop::sample::select(vec![SimMemory::Cells, SimMemory::Recurrent, SimMemory::Hybrid, SimMemory::Window(24), SimMemory::FullWindow(24)]),
        max_checkpoints in prop::sample::select(vec![0_u32, 2, 32]),
        fail_every_steps in prop::option::weighted(0.3, 5_u64..60),
        period_tokens in prop::option::of(1_u32..20),
        host_cache_bytes in prop::sample::select(vec![0, 400, 4_000, 1 << 20]),
        cache_isolation in prop::sample::select(vec![CacheIsolation::None, CacheIsolation::Key]),
    ) -> SimConfig {
        let n_cells = unified.then_some(n_cells);
        let context_length_tokens = 200;
        SimConfig {
            n_seq_max, unified, n_cells, context_length_tokens, n_batch, step_us, cannot_cut, memory, max_checkpoints, fail_every_steps,
            host_cache_bytes, cache_isolation, period_tokens,
            ..SimConfig::default()
        }
    }
}

proptest! {
    // Threads do not run the same way twice, so shrinking finds little; where a case hangs, it would take hours.
    #![proptest_config(ProptestConfig { cases: 150, max_shrink_iters: 4, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn under_any_schedule_each_request_says_what_it_says_alone(
        config in config(),
        visits in prop::collection::vec(visit(), 1..16),
    ) {
        let engine = Engine::simulate(config.clone());
        let answers: Vec<_> = thread::scope(|scope| {
            let readers: Vec<_> = visits.iter().map(|visit| {
                let mut events = submit(&engine, visit.request.clone());
                if visit.pause_us > 0 {
                    thread::sleep(Duration::from_micros(visit.pause_us));
                }
                let leaves_after = visit.leaves_after;
                scope.spawn(move || match leaves_after {
                    Some(n) => {
                        (0..n).for_each(|_| drop(events.blocking_next()));
                        None
                    }
                    None => Some(read(events)),
                })
            }).collect();
            readers.into_iter().map(|reader| reader.join().expect("no reader panics")).collect()
        });
        wait_until_idle(&engine);
        for (visit, answer) in visits.iter().zip(answers) {
            let Some(answer) = answer else { continue };
            match answer.end {
                Ok(summary) => {
                    let alone = ask_alone(&config, visit.request.clone());
                    prop_assert_eq!(&answer.choices, &alone.choices);
                    prop_assert_eq!(summary.prompt_tokens, alone.summary().prompt_tokens);
                    prop_assert_eq!(summary.completion_tokens, alone.summary().completion_tokens);
                    prop_assert!(summary.cached_tokens < summary.prompt_tokens);
                    prop_assert!(visit.request.cache_prompt || summary.cached_tokens == 0);
                }
                Err(GenerationError::Backend { .. }) => prop_assert!(config.fail_every_steps.is_some()),
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
        let stats = engine.stats();
        prop_assert!(stats.kv_cells_cached <= stats.kv_cells_total);
        prop_assert_eq!(stats.failed_total > 0, stats.failed_steps_total > 0);
    }
}
