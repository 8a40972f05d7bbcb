//! Secrets: under cancels, forks, preemptions and reuse, nobody's answer is made of anything that somebody else sent.
//!
//! The simulator writes letters that depend on every token of a sequence, so an answer is its prompt's fingerprint: it is compared
//! with the one that an engine without a past gives. A secret that was seen on its way (a token or a byte of another
//! prompt in an answer) would not be in the alphabet of answers at all.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use minerva_engine::{CacheIsolation, Engine, Request, SimConfig, TokenId};

use crate::support::{Answer, Random, ask_alone, greedy, read, submit, tokens, wait_until_idle};

const N_REQUESTS: u64 = 10_000;
const N_CLIENTS: u64 = 8;

/// Digits and capitals, none of which the simulator writes.
fn secret(number: u64) -> Vec<TokenId> {
    let mut random = Random::new(number + 1_000_000);
    (0..12).map(|_| TokenId::from(b"0123456789ABCDEFGHIJKLMNOPQRSTUV"[random.below(32) as usize])).collect()
}

/// One of two system prompts that all share, and the request's own secret.
fn request(number: u64) -> Request {
    let mut random = Random::new(number);
    let mut prompt = tokens(random.below(2), 24);
    prompt.extend(secret(number));
    Request {
        n: 1 + u32::from(random.below(4) == 0),
        cache_prompt: random.below(2) == 0,
        client: 1 + number % 2,
        priority: i32::from(random.below(6) > 0),
        ..greedy(prompt, 1 + random.below(12) as u32)
    }
}

/// Everything that the answer tells: its text and its tokens' bytes.
fn said(answer: &Answer) -> Vec<u8> {
    let choices = answer.choices.iter();
    choices
        .flat_map(|choice| choice.text.bytes().chain(choice.tokens.iter().flat_map(|token| token.bytes.clone())))
        .collect()
}

fn run(config: &SimConfig, n_requests: u64) {
    let engine = Engine::simulate(config.clone());
    let (next, n_left) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..N_CLIENTS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= n_requests {
                        break;
                    }
                    let mut random = Random::new(!number);
                    let mut events = submit(&engine, request(number));
                    if random.below(3) == 0 {
                        n_left.fetch_add(1, Ordering::Relaxed);
                        match random.below(2) {
                            0 => thread::sleep(Duration::from_micros(random.below(300))),
                            _ => (0..random.below(8)).for_each(|_| drop(events.blocking_next())),
                        }
                        continue;
                    }
                    let answer = read(events);
                    let told = said(&answer);
                    assert!(
                        told.iter().all(|byte| byte.is_ascii_lowercase() || *byte == b' '),
                        "request {number}: {answer:?}"
                    );
                    assert_eq!(answer.choices, ask_alone(config, request(number)).choices, "request {number}");
                }
            });
        }
    });
    wait_until_idle(&engine);
    let stats = engine.stats();
    assert_eq!(stats.failed_total, 0, "{stats:?}");
    assert!(n_left.into_inner() > n_requests / 4 && stats.cancelled_total > 0, "{stats:?}");
    assert!(stats.cached_tokens_total > 0, "nothing was shared: {stats:?}");
    assert!(stats.preempted_total > 0, "nobody had to yield: {stats:?}");
}

#[test]
fn in_ten_thousand_requests_with_secrets_no_answer_knows_anything_of_another() {
    let base = SimConfig { n_seq_max: 4, context_length_tokens: 64, n_batch: 32, step_us: 20, ..SimConfig::default() };
    // Both layouts, with and without host memory for whoever yields, shared by all and by key.
    for (unified, host_cache_bytes, cache_isolation) in [
        (false, 1 << 16, CacheIsolation::None),
        (false, 0, CacheIsolation::Key),
        (true, 1 << 16, CacheIsolation::Key),
        (true, 0, CacheIsolation::None),
    ] {
        let n_cells = unified.then_some(150);
        run(&SimConfig { unified, n_cells, host_cache_bytes, cache_isolation, ..base.clone() }, N_REQUESTS / 4);
    }
}
