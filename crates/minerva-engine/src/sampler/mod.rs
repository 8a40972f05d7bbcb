//! Chooses the next token from a row of logits: bias, penalties, filters, temperature, a seeded draw.
//!
//! [`Sampler`] belongs to one request and runs on any thread. It gives exactly the distribution that [`SamplingParams`]
//! describes, but neither copies nor sorts the vocabulary: one pass over the row finds the maximum of each block of tokens,
//! and everything after it works on the few tokens that can still be drawn. It knows no text, no grammar and no model.
//! Start with [`Sampler::sample`].
//!
//! # Invariants
//! - The same parameters, seed, accepted tokens and logits give the same tokens, on every platform. Ties go to the lowest id.
//! - Every sampled token takes one draw of the generator, a greedy one none.
//! - After the first tokens nothing is allocated, except for the list of top log-probabilities, and by penalties where
//!   their window grows.
mod adjust;
mod candidates;
mod math;
mod params;
mod rng;
mod row;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use self::adjust::Adjustments;
use self::candidates::{Candidates, min_p_bound};
pub use self::params::{BAN_BIAS, InvalidParam, MAX_REPEAT_LAST_N, SamplingParams};
use self::rng::SplitMix64;
use self::row::{Patch, Row};
use crate::request::TokenId;

/// The sampler of one request.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    n_vocab: usize,
    rng: SplitMix64,
    adjustments: Adjustments,
    scratch: Scratch,
}

/// Buffers that keep their room from token to token, and nothing else.
#[derive(Debug, Clone, Default)]
struct Scratch {
    patches: Vec<Patch>,
    maxima: Vec<f32>,
    /// A second number per block: ranked maxima, or shares of the weight.
    blocks: Vec<f32>,
    candidates: Candidates,
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token; the caller passes it to [`Sampler::accept`] if it keeps it.
    pub token: TokenId,
    /// Its log-probability by the model alone, before bias, penalties, filters and temperature; `None` if not asked for.
    pub logprob: Option<f32>,
    /// The tokens that the model alone finds most likely, best first, with their log-probabilities.
    pub top: Vec<(TokenId, f32)>,
}

/// Why no token could be chosen: the request cannot go on, others can.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// The model produced nothing usable, or bias and bans left nothing of it.
    #[error("no token can be chosen: every logit is NaN or -inf, or its token is banned")]
    NoCandidate,
    /// A logit is `+inf`, so there is no distribution.
    #[error("a logit is +inf")]
    InfiniteLogit,
    /// The row belongs to another model.
    #[error("the row has {given} logits, the vocabulary {n_vocab} tokens")]
    WrongLength {
        /// Logits in the row.
        given: usize,
        /// Tokens in the vocabulary.
        n_vocab: usize,
    },
}

/// All that a [`Sampler`] needs to go on elsewhere with the very same draws.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplerState {
    params: SamplingParams,
    n_vocab: usize,
    rng: SplitMix64,
    /// The penalty window, oldest token first.
    window: Vec<TokenId>,
}

impl Sampler {
    /// A sampler for parameters that [`SamplingParams::validate`] has accepted. `seed` is `params.seed` or the engine's
    /// own choice.
    pub fn new(params: &SamplingParams, n_vocab: usize, seed: u64) -> Self {
        Self {
            params: params.clone(),
            n_vocab,
            rng: SplitMix64::new(seed),
            adjustments: Adjustments::new(params, n_vocab),
            scratch: Scratch::default(),
        }
    }

    /// What to write down so that [`resume`](Self::resume) continues as this sampler would.
    pub fn state(&self) -> SamplerState {
        SamplerState {
            params: self.params.clone(),
            n_vocab: self.n_vocab,
            rng: self.rng,
            window: self.adjustments.window().collect(),
        }
    }

    /// The sampler that [`state`](Self::state) described.
    ///
    /// # Errors
    /// As [`SamplingParams::validate`]: a state may come from another process.
    pub fn resume(state: SamplerState) -> Result<Self, InvalidParam> {
        state.params.validate(state.n_vocab)?;
        let mut sampler = Self::new(&state.params, state.n_vocab, 0);
        sampler.rng = state.rng;
        for token in state.window {
            sampler.accept(token);
        }
        Ok(sampler)
    }

    /// Notes a token of the prompt or of the output for the penalties.
    pub fn accept(&mut self, token: TokenId) {
        self.adjustments.accept(token);
    }

    /// Chooses a token from `logits`, of shape `[n_vocab]`. A NaN counts as `-inf`.
    ///
    /// Tokens in `banned` are out for this call, such as the end of generation while the request ignores it.
    /// `n_top_logprobs` asks for log-probabilities: that of the chosen token, and of so many of the most likely ones.
    ///
    /// # Errors
    /// [`SampleError`]; the sampler stays usable.
    pub fn sample(
        &mut self,
        logits: &[f32],
        banned: &[TokenId],
        n_top_logprobs: Option<usize>,
    ) -> Result<Sampled, SampleError> {
        if logits.len() != self.n_vocab {
            return Err(SampleError::WrongLength { given: logits.len(), n_vocab: self.n_vocab });
        }
        let token = self.choose(logits, banned)?;
        let Some(n_top) = n_top_logprobs else {
            return Ok(Sampled { token, logprob: None, top: Vec::new() });
        };
        let (log_total, top) = self.scratch.logprobs(logits, n_top)?;
        Ok(Sampled { token, logprob: Some(logits[token as usize] - log_total), top })
    }

    fn choose(&mut self, logits: &[f32], banned: &[TokenId]) -> Result<TokenId, SampleError> {
        self.adjustments.patch(logits, banned, &mut self.scratch.patches);
        let Scratch { patches, maxima, blocks, candidates } = &mut self.scratch;
        let row = Row::new(logits, patches);
        let top = checked_top(row.find_maxima(maxima))?;
        if self.params.temperature <= 0.0 {
            return row.first_at(top, maxima).ok_or(SampleError::NoCandidate);
        }
        let scale = self.params.temperature.recip().min(f32::MAX);
        let uniform = self.rng.uniform();
        let drawn = if filter(row, top, &self.params, maxima, blocks, candidates) {
            candidates.draw(scale, uniform)
        } else {
            let total = row.weigh(top, scale, blocks);
            row.at_weight(uniform * total, top, scale, blocks)
        };
        drawn.ok_or(SampleError::NoCandidate)
    }
}

impl Scratch {
    /// The logarithm of the sum of `exp(logit)` over the model's own row, and its best `n_top` tokens.
    fn logprobs(&mut self, logits: &[f32], n_top: usize) -> Result<(f32, Vec<(TokenId, f32)>), SampleError> {
        let Self { maxima, blocks, candidates, .. } = self;
        let row = Row::new(logits, &[]);
        let top = checked_top(row.find_maxima(maxima))?;
        let log_total = (f64::from(top) + row.weigh(top, 1.0, blocks).ln()) as f32;
        if n_top == 0 {
            return Ok((log_total, Vec::new()));
        }
        gather_top_k(row, n_top, maxima, blocks, candidates);
        let mut best: Vec<_> = candidates.list.iter().map(|best| (best.token, best.logit - log_total)).collect();
        best.sort_by(|a, b| b.1.total_cmp(&a.1)); // stable, so that ties stay in order of their ids
        Ok((log_total, best))
    }
}

fn checked_top(top: f32) -> Result<f32, SampleError> {
    match top {
        f32::NEG_INFINITY => Err(SampleError::NoCandidate),
        f32::INFINITY => Err(SampleError::InfiniteLogit),
        top => Ok(top),
    }
}

/// Runs the filters and leaves the tokens to draw from in `candidates`. `false` if no filter is on, so that the whole row
/// stays in play.
fn filter(
    row: Row<'_>,
    top: f32,
    params: &SamplingParams,
    maxima: &[f32],
    blocks: &mut Vec<f32>,
    candidates: &mut Candidates,
) -> bool {
    let &SamplingParams { top_p, min_p, typical_p, .. } = params;
    let (has_top_p, has_min_p, has_typical) = (top_p < 1.0, min_p > 0.0, typical_p < 1.0);
    // Weight of all tokens that top_p has to consider, where that is more than the candidates.
    let mut total = None;
    match usize::try_from(params.top_k) {
        Ok(k) if k > 0 => gather_top_k(row, k, maxima, blocks, candidates),
        _ if has_typical => row.gather(f32::NEG_INFINITY, maxima, &mut candidates.list),
        _ if has_top_p => {
            let row_weight = row.weigh(top, 1.0, blocks);
            gather_top_p(row, top, params, row_weight, maxima, candidates);
            total = Some(row_weight);
        }
        _ if has_min_p => row.gather(min_p_bound(top, min_p), maxima, &mut candidates.list),
        _ => return false,
    }
    if has_typical {
        candidates.keep_typical(typical_p);
    }
    if has_top_p {
        let total = total.unwrap_or_else(|| candidates.weight(candidates.top()));
        candidates.keep_top_p(top_p, total);
    }
    if has_min_p {
        candidates.keep_min_p(min_p);
    }
    true
}

/// Gathers the `k` best tokens of the row.
///
/// The `k` blocks with the largest maxima hold at least `k` tokens from the smallest of these maxima up, so no token below
/// it can be among the best `k`.
fn gather_top_k(row: Row<'_>, k: usize, maxima: &[f32], blocks: &mut Vec<f32>, candidates: &mut Candidates) {
    let bound = if k < maxima.len() {
        blocks.clear();
        blocks.extend_from_slice(maxima);
        *blocks.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
    } else {
        f32::NEG_INFINITY
    };
    row.gather(bound, maxima, &mut candidates.list);
    candidates.keep_top_k(k);
}

/// Gathers the best tokens of the row, at least until they hold `top_p` of its weight, or to the bound of `min_p`.
///
/// Cutting there changes nothing: `min_p` would drop what lies below its bound, and what `top_p` keeps above the bound does
/// not depend on it.
fn gather_top_p(
    row: Row<'_>,
    top: f32,
    params: &SamplingParams,
    row_weight: f64,
    maxima: &[f32],
    candidates: &mut Candidates,
) {
    /// Above the rounding error of the two sums that are compared; a needless second turn only costs time.
    const MARGIN: f64 = 1.0 + 1e-5;
    /// Nats below the best token at which [`math::weight`] has reached 0.
    const WEIGHTLESS: f32 = 88.0;

    let floor = min_p_bound(top, params.min_p).max(top - WEIGHTLESS);
    let mut depth = 3.0;
    loop {
        let bound = (top - depth).max(floor);
        row.gather(bound, maxima, &mut candidates.list);
        if bound <= floor || candidates.weight(top) >= f64::from(params.top_p) * row_weight * MARGIN {
            return;
        }
        depth *= 2.0;
    }
}
