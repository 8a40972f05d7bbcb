//! Our sampler and llama.cpp's chain on the same rows in one process: for the criterion bench and for the gate in the tests.

use std::time::{Duration, Instant};

use minerva_engine::sampler::{Sampler, TokenMask};
use minerva_engine::sampling_pool::{self, SamplingPool};
use minerva_engine::{SamplingParams, TokenId};
use minerva_llama::{ChainStage, SamplerChain};

pub use crate::rows::{history, row};

/// Vocabularies of small, usual and large models.
pub const VOCABULARIES: [usize; 3] = [32_000, 128_256, 262_144];

/// A setting that both sides can have.
pub struct Case {
    /// For reports.
    pub name: &'static str,
    /// Ours.
    pub params: SamplingParams,
}

/// The measured settings; the first is the one that has a gate.
pub fn cases() -> Vec<Case> {
    let plain = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..SamplingParams::default() };
    let defaults = SamplingParams::default();
    let case = |name, params| Case { name, params };
    vec![
        case("top_k+top_p+temperature", SamplingParams { min_p: 0.0, ..defaults.clone() }),
        case("defaults", defaults.clone()),
        case("greedy", SamplingParams::greedy()),
        case("temperature", plain.clone()),
        case("top_p", SamplingParams { top_p: 0.95, ..plain.clone() }),
        case("min_p", SamplingParams { min_p: 0.05, ..plain.clone() }),
        case("typical_p", SamplingParams { typical_p: 0.9, ..plain.clone() }),
        case("top_n_sigma", SamplingParams { top_n_sigma: 1.0, ..plain.clone() }),
        case("mirostat 2", SamplingParams { mirostat: 2, ..plain }),
        case("penalties", SamplingParams { repeat_penalty: 1.1, presence_penalty: 0.2, ..defaults.clone() }),
        case("dry", SamplingParams { dry_multiplier: 0.8, dry_penalty_last_n: 1024, ..defaults }),
    ]
}

/// Masks as grammars make them over `n_vocab` tokens: what allows a few tokens (the structure of JSON), a tenth of them and most of them
/// (the inside of a string).
pub fn masks(n_vocab: usize) -> [(&'static str, TokenMask); 3] {
    let mask = |is_allowed: &dyn Fn(usize) -> bool| -> TokenMask {
        (0..n_vocab).filter(|&token| is_allowed(token)).map(|token| token as TokenId).collect()
    };
    // Tokens that a grammar allows lie anywhere in the vocabulary.
    let spread = |token: usize| (token as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    [
        ("8 tokens", mask(&|token| token % (n_vocab / 8) == 1)),
        ("a tenth", mask(&|token| spread(token).is_multiple_of(10))),
        ("nine tenths", mask(&|token| !spread(token).is_multiple_of(10))),
    ]
}

/// Our sampler for a setting.
pub fn ours(params: &SamplingParams, n_vocab: usize) -> Sampler {
    let mut sampler = Sampler::new(params, n_vocab, 1);
    history().for_each(|token| sampler.accept(token));
    sampler
}

/// llama-server's chain for a setting.
pub fn theirs(params: &SamplingParams, n_vocab: usize) -> SamplerChain {
    let mut chain = SamplerChain::new();
    let temperature = ChainStage::Temperature { temperature: params.temperature, range: 0.0, exponent: 1.0 };
    if params.mirostat == 2 {
        chain.push(&temperature);
        chain.push(&ChainStage::MirostatV2 { seed: 1, tau: params.mirostat_tau, eta: params.mirostat_eta });
        return chain;
    }
    chain.push(&ChainStage::Penalties {
        n_vocab,
        last_n: params.repeat_last_n,
        repeat: params.repeat_penalty,
        frequency: params.frequency_penalty,
        presence: params.presence_penalty,
    });
    chain.push(&ChainStage::Dry {
        model: None,
        multiplier: params.dry_multiplier,
        base: params.dry_base,
        allowed_length: params.dry_allowed_length,
        last_n: params.dry_penalty_last_n,
        breakers: &[],
    });
    chain.push(&ChainStage::TopNSigma(params.top_n_sigma));
    chain.push(&ChainStage::TopK(params.top_k));
    chain.push(&ChainStage::TypicalP { p: params.typical_p, min_keep: 0 });
    chain.push(&ChainStage::TopP { p: params.top_p, min_keep: 0 });
    chain.push(&ChainStage::MinP { p: params.min_p, min_keep: 0 });
    chain.push(&temperature);
    chain.push(&ChainStage::Dist { seed: 1 });
    history().for_each(|token| chain.accept(token));
    chain
}

/// The quickest of several turns on each side, one token for each of `rows`: ours, llama.cpp's. The turns alternate, so that a busy
/// neighbour meets both. Each row has a sampler of its own, as each request has in both servers; ours are worked on as the engine does
/// it, with helpers where they pay, llama.cpp's one after the other as llama-server does it.
///
/// # Panics
/// When a row has no token to choose.
pub fn quickest(params: &SamplingParams, rows: &[Vec<f32>], n_turns: usize) -> (Duration, Duration) {
    let n_vocab = rows.first().map_or(0, Vec::len);
    let mut ours: Vec<Sampler> = rows.iter().map(|_| ours(params, n_vocab)).collect();
    let mut theirs: Vec<SamplerChain> = rows.iter().map(|_| theirs(params, n_vocab)).collect();
    let mut best = (Duration::MAX, Duration::MAX);
    for _ in 0..n_turns {
        let began = Instant::now();
        let n_helpers = SamplingPool::default().n_helpers(rows.len(), n_vocab);
        sampling_pool::for_each(ours.iter_mut().zip(rows).collect(), n_helpers, |(sampler, row)| {
            std::hint::black_box(sampler.sample(row, &[], None).expect("a token is left"));
        });
        best.0 = best.0.min(began.elapsed());
        let began = Instant::now();
        for (chain, row) in theirs.iter_mut().zip(rows) {
            std::hint::black_box(chain.sample(row));
        }
        best.1 = best.1.min(began.elapsed());
    }
    best
}
