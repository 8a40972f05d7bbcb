//! llama.cpp's own samplers, for tests and benchmarks that compare ours with them; nothing that serves requests uses them.
//!
//! Start with [`SamplerChain::push`]. One chain is what llama-server keeps for one request.

use std::ffi::{CString, c_char};
use std::ptr::NonNull;

use crate::{Model, Token, sys};

/// One sampler of a chain, with its parameters as llama.cpp names them.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "documented in llama.h")]
pub enum ChainStage<'a> {
    LogitBias {
        n_vocab: usize,
        bias: &'a [(Token, f32)],
    },
    Penalties {
        n_vocab: usize,
        last_n: i32,
        repeat: f32,
        frequency: f32,
        presence: f32,
    },
    /// `breakers` need a model, whose vocabulary they are looked up in.
    Dry {
        model: Option<&'a Model>,
        multiplier: f32,
        base: f32,
        allowed_length: i32,
        last_n: i32,
        breakers: &'a [&'a str],
    },
    TopNSigma(f32),
    TopK(i32),
    TypicalP {
        p: f32,
        min_keep: usize,
    },
    TopP {
        p: f32,
        min_keep: usize,
    },
    MinP {
        p: f32,
        min_keep: usize,
    },
    Xtc {
        probability: f32,
        threshold: f32,
        min_keep: usize,
        seed: u32,
    },
    Temperature {
        temperature: f32,
        range: f32,
        exponent: f32,
    },
    Mirostat {
        n_vocab: usize,
        seed: u32,
        tau: f32,
        eta: f32,
    },
    MirostatV2 {
        seed: u32,
        tau: f32,
        eta: f32,
    },
    AdaptiveP {
        target: f32,
        decay: f32,
        seed: u32,
    },
    Dist {
        seed: u32,
    },
    Greedy,
}

/// A chain of llama.cpp's samplers and the array of the whole vocabulary that they work on.
#[doc(alias = "llama_sampler")]
pub struct SamplerChain {
    raw: NonNull<sys::llama_sampler>,
    array: Vec<sys::llama_token_data>,
    /// Where in `array` the tokens that are left lie, and which of them was chosen.
    kept: std::ops::Range<usize>,
    selected: Option<usize>,
}

// SAFETY: a chain has no ties to a thread, and every call takes `&mut self`. Deliberately not `Sync`.
unsafe impl Send for SamplerChain {}

impl SamplerChain {
    /// An empty chain.
    ///
    /// # Panics
    /// When llama.cpp gives none, which it documents nowhere.
    pub fn new() -> Self {
        // SAFETY: returns a plain struct.
        let mut params = unsafe { sys::llama_sampler_chain_default_params() };
        params.no_perf = true;
        // SAFETY: takes the struct by value.
        let raw = unsafe { sys::llama_sampler_chain_init(params) };
        Self { raw: NonNull::new(raw).expect("llama.cpp gives a chain"), array: Vec::new(), kept: 0..0, selected: None }
    }

    /// Appends a sampler.
    ///
    /// # Panics
    /// When a breaker of [`ChainStage::Dry`] has a zero byte, or comes without a model.
    pub fn push(&mut self, stage: &ChainStage<'_>) {
        let sampler = init(stage);
        // SAFETY: the chain is live and takes ownership of a sampler that nobody else has.
        unsafe { sys::llama_sampler_chain_add(self.raw.as_ptr(), sampler) };
    }

    /// Notes a token for the samplers that remember tokens.
    pub fn accept(&mut self, token: Token) {
        // SAFETY: the chain is live.
        unsafe { sys::llama_sampler_accept(self.raw.as_ptr(), token) };
    }

    /// Runs the chain over `logits` as llama-server does for each token: fills the array, applies every sampler. Returns the chosen
    /// token, or `None` if no sampler of the chain chooses.
    pub fn sample(&mut self, logits: &[f32]) -> Option<Token> {
        self.array.clear();
        let ids = 0..Token::try_from(logits.len()).unwrap_or(Token::MAX);
        self.array.extend(ids.zip(logits).map(|(id, &logit)| sys::llama_token_data { id, logit, p: 0.0 }));
        let data = self.array.as_mut_ptr();
        let size = self.array.len();
        let mut view = sys::llama_token_data_array { data, size, selected: -1, sorted: false };
        // SAFETY: the chain is live, the view describes a live array; samplers shrink the view and move its start, never beyond.
        unsafe { sys::llama_sampler_apply(self.raw.as_ptr(), &raw mut view) };
        let start = (view.data.addr() - data.addr()) / size_of::<sys::llama_token_data>();
        self.kept = start..start + view.size;
        self.selected = usize::try_from(view.selected).ok();
        self.selected.and_then(|i| self.array[self.kept.clone()].get(i)).map(|chosen| chosen.id)
    }

    /// The tokens that the last [`sample`](Self::sample) left, with their logits, by ascending id; those at `-inf` are none.
    pub fn kept(&self) -> Vec<(Token, f32)> {
        let possible = self.array[self.kept.clone()].iter().filter(|token| token.logit > f32::NEG_INFINITY);
        let mut kept: Vec<_> = possible.map(|token| (token.id, token.logit)).collect();
        kept.sort_by_key(|token| token.0);
        kept
    }
}

impl Clone for SamplerChain {
    /// A chain in the same state, which goes on by itself.
    fn clone(&self) -> Self {
        // SAFETY: the chain is live, and a clone shares nothing with it.
        let raw = unsafe { sys::llama_sampler_clone(self.raw.as_ptr()) };
        let raw = NonNull::new(raw).expect("llama.cpp gives a chain");
        Self { raw, array: Vec::new(), kept: 0..0, selected: None }
    }
}

impl Default for SamplerChain {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for SamplerChain {
    fn drop(&mut self) {
        // SAFETY: made by `llama_sampler_chain_init`, freed only here, its samplers with it.
        unsafe { sys::llama_sampler_free(self.raw.as_ptr()) };
    }
}

fn init(stage: &ChainStage<'_>) -> *mut sys::llama_sampler {
    let n = |n_vocab: usize| i32::try_from(n_vocab).unwrap_or(i32::MAX);
    match *stage {
        ChainStage::LogitBias { n_vocab, bias } => {
            let bias: Vec<_> = bias.iter().map(|&(token, bias)| sys::llama_logit_bias { token, bias }).collect();
            // SAFETY: the list lives through the call, which copies it.
            unsafe { sys::llama_sampler_init_logit_bias(n(n_vocab), n(bias.len()), bias.as_ptr()) }
        }
        ChainStage::Penalties { n_vocab, last_n, repeat, frequency, presence } => {
            // SAFETY: numbers only.
            unsafe { sys::llama_sampler_init_penalties(n(n_vocab), last_n, repeat, frequency, presence) }
        }
        ChainStage::Dry { model, multiplier, base, allowed_length, last_n, breakers } => {
            assert!(model.is_some() || breakers.is_empty(), "breakers need a vocabulary");
            let vocab = model.map_or(std::ptr::null(), Model::raw_vocab);
            let texts: Vec<CString> = breakers.iter().map(|&text| CString::new(text).expect("no zero byte")).collect();
            let mut pointers: Vec<*const c_char> = texts.iter().map(|text| text.as_ptr()).collect();
            let (list, len) = (pointers.as_mut_ptr(), pointers.len());
            // SAFETY: the texts live through the call; without breakers the vocabulary is not read.
            unsafe { sys::llama_sampler_init_dry(vocab, multiplier, base, allowed_length, last_n, list, len) }
        }
        // SAFETY: numbers only, here and below.
        ChainStage::TopNSigma(sigmas) => unsafe { sys::llama_sampler_init_top_n_sigma(sigmas) },
        // SAFETY: as above.
        ChainStage::TopK(k) => unsafe { sys::llama_sampler_init_top_k(k) },
        // SAFETY: as above.
        ChainStage::TypicalP { p, min_keep } => unsafe { sys::llama_sampler_init_typical(p, min_keep) },
        // SAFETY: as above.
        ChainStage::TopP { p, min_keep } => unsafe { sys::llama_sampler_init_top_p(p, min_keep) },
        // SAFETY: as above.
        ChainStage::MinP { p, min_keep } => unsafe { sys::llama_sampler_init_min_p(p, min_keep) },
        ChainStage::Xtc { probability, threshold, min_keep, seed } => {
            // SAFETY: as above.
            unsafe { sys::llama_sampler_init_xtc(probability, threshold, min_keep, seed) }
        }
        ChainStage::Temperature { temperature, range, exponent } => {
            // SAFETY: as above.
            unsafe { sys::llama_sampler_init_temp_ext(temperature, range, exponent) }
        }
        ChainStage::Mirostat { n_vocab, seed, tau, eta } => {
            /// llama-server's number of tokens for the estimate of the slope.
            const M: i32 = 100;
            // SAFETY: as above.
            unsafe { sys::llama_sampler_init_mirostat(n(n_vocab), seed, tau, eta, M) }
        }
        // SAFETY: as above.
        ChainStage::MirostatV2 { seed, tau, eta } => unsafe { sys::llama_sampler_init_mirostat_v2(seed, tau, eta) },
        ChainStage::AdaptiveP { target, decay, seed } => {
            // SAFETY: as above.
            unsafe { sys::llama_sampler_init_adaptive_p(target, decay, seed) }
        }
        // SAFETY: as above.
        ChainStage::Dist { seed } => unsafe { sys::llama_sampler_init_dist(seed) },
        // SAFETY: as above.
        ChainStage::Greedy => unsafe { sys::llama_sampler_init_greedy() },
    }
}
