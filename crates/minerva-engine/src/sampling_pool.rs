//! Work on the rows of one step by several threads: sampling a row needs its logits and its request's sampler, and no other row.
//!
//! Helpers are started for the step and end with it. A pool whose threads wait for work would need memory that outlives the step, which
//! borrowed logits and samplers do not; and a thread that does not exist takes no core from llama.cpp's compute threads. Starting one
//! takes as long as sampling a few rows of 128k logits, hence a least number of logits for each.

use std::num::NonZero;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Logits for which one more thread pays: on a busy machine eight rows of 128k take as long with it as without (docs/benchmarks.md).
const WORTH_A_HELPER: usize = 1 << 20;

/// The most threads beside the engine thread; memory bandwidth does not feed more.
const MAX_HELPERS: usize = 7;

/// When helpers are started.
#[derive(Debug, Clone, Copy)]
pub struct SamplingPool {
    worth_a_helper: usize,
}

impl Default for SamplingPool {
    fn default() -> Self {
        Self { worth_a_helper: WORTH_A_HELPER }
    }
}

impl SamplingPool {
    /// How many threads beside the caller's are worth it for `n_rows` rows of `n_vocab` logits.
    pub fn n_helpers(self, n_rows: usize, n_vocab: usize) -> usize {
        let worth = n_rows.saturating_mul(n_vocab) / self.worth_a_helper;
        if worth == 0 {
            return 0; // without asking the system
        }
        let n_cores = thread::available_parallelism().map_or(1, NonZero::get);
        worth.min(n_cores - 1).min(n_rows.saturating_sub(1)).min(MAX_HELPERS)
    }
}

/// Calls `work` once for each item, on the caller's thread and `n_helpers` others.
///
/// # Panics
/// When `work` does, once all are done.
pub fn for_each<T: Send>(items: Vec<T>, n_helpers: usize, work: impl Fn(T) + Sync) {
    if n_helpers == 0 {
        return items.into_iter().for_each(work);
    }
    // Item by item, because rows differ: a helper that the system starts late takes fewer.
    let items = Mutex::new(items.into_iter());
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let take_all = || {
        while let Some(item) = next() {
            work(item);
        }
    };
    thread::scope(|scope| {
        for _ in 0..n_helpers {
            let helper = thread::Builder::new().name("minerva-sample".into());
            if let Err(error) = helper.spawn_scoped(scope, take_all) {
                tracing::debug!("a sampling thread could not be started: {error}");
                break; // the others do its work
            }
        }
        take_all();
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::sync::{Arc, mpsc};
    use std::time::Instant;

    use super::*;
    use crate::event::Event;
    use crate::generation::Accepted;
    use crate::request::{Request, TokenId};
    use crate::sampler::{Sampler, SamplerStage, SamplingParams};
    use crate::shared::{QueueLimits, Shared};
    use crate::sim::{self, SimConfig};
    use crate::worker::{Command, Worker};

    #[test]
    fn small_steps_get_no_helper_and_large_ones_no_more_than_cores() {
        let n_helpers = |n_rows, n_vocab| SamplingPool::default().n_helpers(n_rows, n_vocab);
        assert_eq!(n_helpers(1, 262_144), 0);
        assert_eq!(n_helpers(4, 128_256), 0);
        assert_eq!(n_helpers(16, 49_152), 0);
        let n_cores = thread::available_parallelism().unwrap().get();
        assert_eq!(n_helpers(9, 128_256), 1.min(n_cores - 1));
        assert_eq!(n_helpers(1_000, 128_256), MAX_HELPERS.min(n_cores - 1));
        assert_eq!(n_helpers(2, usize::MAX), 1.min(n_cores - 1));
    }

    #[test]
    fn every_item_is_worked_on_once() {
        for n_helpers in 0..4 {
            let counts: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
            for_each(counts.iter().collect(), n_helpers, |count| _ = count.fetch_add(1, Relaxed));
            assert!(counts.iter().all(|count| count.load(Relaxed) == 1));
            for_each(Vec::<usize>::new(), n_helpers, |_| unreachable!("there is none"));
        }
    }

    #[test]
    #[should_panic(expected = "scoped thread panicked")]
    fn a_panic_of_a_helper_is_the_callers() {
        let caller = thread::current().id();
        // The caller's items take long enough that a helper gets one.
        for_each((0..64).collect(), 2, |_: i32| {
            assert_eq!(thread::current().id(), caller, "a helper's item");
            thread::sleep(std::time::Duration::from_millis(2));
        });
    }

    #[test]
    fn a_seed_gives_the_same_tokens_whatever_the_number_of_threads_and_the_order_of_rows() {
        const N_VOCAB: usize = 3_000;
        let logits = |request: usize, step: usize| -> Vec<f32> {
            (0..N_VOCAB).map(|i| ((i * 7919 + request * 104_729 + step * 31) % 1009) as f32 / 90.0).collect()
        };
        let tokens = |n_helpers: usize, reversed: bool| {
            let samplers = SamplerStage::DEFAULT_ORDER.into_iter().chain([SamplerStage::AdaptiveP]).collect();
            let params = SamplingParams {
                repeat_penalty: 1.2,
                dry_multiplier: 1.0,
                xtc_probability: 0.5,
                adaptive_target: 0.4,
                samplers,
                ..SamplingParams::default()
            };
            let mut requests: Vec<(usize, Sampler, Vec<i32>)> =
                (0..12).map(|i| (i, Sampler::new(&params, N_VOCAB, i as u64), Vec::new())).collect();
            for step in 0..20 {
                let mut rows: Vec<_> = requests.iter_mut().collect();
                if reversed {
                    rows.reverse();
                }
                for_each(rows, n_helpers, |(request, sampler, tokens)| {
                    let token = sampler.sample(&logits(*request, step), &[], None).unwrap().token;
                    sampler.accept(token);
                    tokens.push(token);
                });
            }
            requests.into_iter().map(|request| request.2).collect::<Vec<_>>()
        };
        let serial = tokens(0, false);
        for n_helpers in 0..4 {
            assert_eq!(tokens(n_helpers, n_helpers % 2 == 0), serial);
        }
    }

    /// The tokens of each choice of each request, from an engine that starts helpers as `pool` says.
    fn generate(pool: SamplingPool, requests: &[Request]) -> Vec<Vec<TokenId>> {
        let n_seq_max = 16;
        let (loaded, _) = sim::load(SimConfig { n_seq_max, ..SimConfig::default() });
        let shared = Arc::new(Shared::new(16 * 1024, n_seq_max.into(), 0, None));
        let (commands, mailbox) = mpsc::channel();
        let mut streams = Vec::new();
        for (id, request) in (0..).zip(requests) {
            let (events, stream) = tokio::sync::mpsc::unbounded_channel();
            let prompt: Vec<TokenId> = format!("request {id}").bytes().map(TokenId::from).collect();
            shared.join_queue(prompt.len(), QueueLimits { requests: 64, tokens: 1 << 20 }).unwrap();
            let accepted = Accepted {
                prompt,
                request: request.clone(),
                max_tokens: request.max_tokens.unwrap(),
                matchers: Vec::new(),
                seed: request.sampling.seed.unwrap(),
                warms: None,
                breakers: Arc::default(),
                namespace: 0,
                submitted: Instant::now(),
                events,
            };
            commands.send(Command::Submit(id, Box::new(accepted))).unwrap();
            streams.push((request.n, stream));
        }
        let mut worker = Worker::new(loaded, &SimConfig::default().serving(), mailbox, shared);
        worker.pool = pool;
        let worker = thread::spawn(move || worker.run());
        let tokens = |(n, mut stream): (u32, tokio::sync::mpsc::UnboundedReceiver<Event>)| {
            let mut choices = vec![Vec::new(); n as usize];
            loop {
                match stream.blocking_recv().expect("an end") {
                    Event::Delta(delta) => {
                        choices[delta.choice as usize].extend(delta.tokens.iter().map(|token| token.id));
                    }
                    Event::Done(_) => return choices,
                    Event::Finished { .. } | Event::Queued { .. } | Event::Started => {}
                    Event::Failed(error) => panic!("{error}"),
                }
            }
        };
        let all = streams.into_iter().flat_map(tokens).collect();
        drop(commands); // ends the engine
        worker.join().expect("the engine thread ends");
        all
    }

    #[test]
    fn an_engine_with_helpers_answers_as_one_without_and_as_one_that_has_nothing_else_to_do() {
        let request = |i: u64| {
            let sampling = SamplingParams { temperature: 4.0, min_p: 0.0, seed: Some(i), ..SamplingParams::default() };
            let (n, logprobs) = (1 + i as u32 % 3, i.is_multiple_of(2).then_some(2));
            Request { n, sampling, logprobs, ignore_eos: true, ..Request::text("") }.max_tokens(20)
        };
        let requests: Vec<Request> = (0..8).map(request).collect();
        let together = generate(SamplingPool::default(), &requests);
        assert!(together.iter().all(|tokens| tokens.len() == 20));
        assert_eq!(generate(SamplingPool { worth_a_helper: 1 }, &requests), together);
        assert_eq!(generate(SamplingPool::default(), &requests[..1]), together[..1]);
    }

    #[test]
    #[ignore = "a measurement: cargo test --release -p minerva-engine --lib -- --ignored --nocapture helpers_take"]
    fn how_long_rows_with_and_without_helpers_take() {
        const N_VOCAB: usize = 128_256;
        let rows: Vec<Vec<f32>> =
            (0..32).map(|row| (0..N_VOCAB).map(|i| ((i * 7919 + row * 31) % 100_003) as f32 / 9e3).collect()).collect();
        let mut samplers: Vec<Sampler> =
            (0..32).map(|seed| Sampler::new(&SamplingParams::default(), N_VOCAB, seed)).collect();
        for n_rows in [4, 8, 16, 32] {
            let mut best = [u128::MAX; 2];
            for turn in 0..200 {
                let began = Instant::now();
                for_each(samplers.iter_mut().zip(&rows).take(n_rows).collect(), turn % 2, |(sampler, row)| {
                    std::hint::black_box(sampler.sample(row, &[], None).unwrap());
                });
                best[turn % 2] = best[turn % 2].min(began.elapsed().as_micros());
            }
            println!("{n_rows} rows: {} us, {} us with a helper", best[0], best[1]);
        }
    }
}
