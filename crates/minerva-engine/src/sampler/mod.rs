//! Chooses the next token from a row of logits: bias, penalties, filters, temperature, a seeded draw; all of llama-server's stages, in
//! its order or the request's.
//!
//! [`Sampler`] belongs to one request and runs on any thread. It gives exactly the distribution that [`SamplingParams`]
//! describes, but neither copies nor sorts the vocabulary: one pass over the row finds the maximum of each block of tokens,
//! and everything after it works on the few tokens that can still be drawn. It knows no text and no model, and of a grammar
//! only the [`TokenMask`].
//! Start with [`Sampler::sample`]; `plan` has the steps of a request, `field` what they work on, `draw` the end.
//!
//! # Invariants
//! - The same parameters, seed, accepted tokens and logits give the same tokens, on every platform. Ties go to the lowest id.
//! - Every sampled token takes one draw of the generator, a greedy one and one that a grammar forces none, XTC one more.
//! - After the first tokens nothing is allocated, except for the list of top log-probabilities, the fit of Mirostat 1, and by
//!   penalties and DRY where their windows grow.
mod candidates;
mod draw;
mod dry;
mod field;
mod history;
mod mask;
mod math;
mod params;
mod penalties;
mod plan;
mod rng;
mod row;
mod stage;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use self::candidates::Candidates;
use self::draw::Draw;
pub use self::dry::Breakers;
use self::dry::Dry;
use self::field::Field;
use self::history::History;
pub use self::mask::TokenMask;
pub use self::params::{BAN_BIAS, InvalidParam, MAX_REPEAT_LAST_N, SamplingParams};
use self::penalties::{Penalties, bias, in_vocab};
use self::plan::{Step, plan};
use self::rng::SplitMix64;
use self::row::{Patch, Row};
pub use self::stage::SamplerStage;
use crate::request::TokenId;

/// The likeliest token of a row and how likely it is before any sampling; `None` for a row without one.
pub fn likeliest(logits: &[f32]) -> Option<(TokenId, f32)> {
    let row = Row::new(logits);
    let mut blocks = Vec::new();
    let top = row.find_maxima(&mut blocks);
    let token = row.first_at(top, &blocks).filter(|_| top.is_finite())?;
    let all = row.weigh(top, 1.0, &mut blocks);
    Some((token, (1.0 / all) as f32))
}

/// The sampler of one request.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    n_vocab: usize,
    plan: Vec<Step>,
    bias: Vec<(TokenId, f32)>,
    penalties: Penalties,
    dry: Dry,
    /// As long as the longer of the two windows.
    history: History,
    rng: SplitMix64,
    draw: Draw,
    scratch: Scratch,
    /// The row with `-inf` for what a grammar does not allow; keeps its room too.
    masked: Vec<f32>,
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

/// All that a [`Sampler`] needs to go on elsewhere with the very same draws, but for the DRY breakers of its vocabulary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplerState {
    params: SamplingParams,
    n_vocab: usize,
    rng: SplitMix64,
    draw: Draw,
    /// The tokens that penalties and DRY look back at, oldest first.
    history: Vec<TokenId>,
}

impl Sampler {
    /// A sampler for parameters that [`SamplingParams::validate`] has accepted. `seed` is `params.seed` or the engine's
    /// own choice.
    pub fn new(params: &SamplingParams, n_vocab: usize, seed: u64) -> Self {
        let (penalties, dry) = (Penalties::new(params), Dry::new(params));
        Self {
            params: params.clone(),
            n_vocab,
            plan: plan(params),
            bias: bias(params, n_vocab),
            history: History::new(penalties.window_tokens().max(dry.window_tokens())),
            penalties,
            dry,
            rng: SplitMix64::new(seed),
            draw: Draw::new(params),
            scratch: Scratch::default(),
            masked: Vec::new(),
        }
    }

    /// The same sampler with the token sequences that end a repetition for DRY; there are none without this.
    #[must_use]
    pub fn with_breakers(mut self, breakers: Arc<Breakers>) -> Self {
        self.dry.set_breakers(breakers);
        self
    }

    /// What to write down so that [`resume`](Self::resume) continues as this sampler would.
    pub fn state(&self) -> SamplerState {
        SamplerState {
            params: self.params.clone(),
            n_vocab: self.n_vocab,
            rng: self.rng,
            draw: self.draw.clone(),
            history: self.history.last(usize::MAX).to_vec(),
        }
    }

    /// The sampler that [`state`](Self::state) described. Between a draw and its [`accept`](Self::accept) there is no state to resume.
    ///
    /// # Errors
    /// As [`SamplingParams::validate`]: a state may come from another process.
    pub fn resume(state: SamplerState) -> Result<Self, InvalidParam> {
        state.params.validate(state.n_vocab)?;
        let mut sampler = Self::new(&state.params, state.n_vocab, 0);
        for token in state.history {
            sampler.accept(token);
        }
        sampler.rng = state.rng;
        sampler.draw = state.draw;
        Ok(sampler)
    }

    /// How many tokens before the next one count for it.
    pub fn window_tokens(&self) -> usize {
        self.penalties.window_tokens().max(self.dry.window_tokens())
    }

    /// Notes a token of the prompt or of the output for what looks back. Ids outside the vocabulary are ignored.
    pub fn accept(&mut self, token: TokenId) {
        if !in_vocab(token, self.n_vocab) {
            return;
        }
        self.penalties.accept(token, self.history.last(self.penalties.window_tokens()));
        self.history.push(token);
        self.draw.accept(token);
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
        self.check_length(logits)?;
        let token = self.choose(logits, banned)?;
        self.report(token, logits, n_top_logprobs)
    }

    /// [`sample`](Self::sample), but from the tokens in `mask` only, as if the others had a logit of `-inf`.
    ///
    /// Log-probabilities stay those of the model alone.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn sample_allowed(
        &mut self,
        logits: &[f32],
        banned: &[TokenId],
        mask: &TokenMask,
        n_top_logprobs: Option<usize>,
    ) -> Result<Sampled, SampleError> {
        self.check_length(logits)?;
        let mut masked = std::mem::take(&mut self.masked);
        mask.write(logits, &mut masked);
        let token = self.choose(&masked, banned);
        self.masked = masked;
        self.score(token?, logits, n_top_logprobs)
    }

    /// What [`sample`](Self::sample) says about a token that is not a choice, because a grammar forces it: no draw is taken,
    /// and without log-probabilities the scores do not matter.
    ///
    /// # Errors
    /// As [`sample`](Self::sample), where log-probabilities are asked for.
    pub fn score(
        &mut self,
        token: TokenId,
        logits: &[f32],
        n_top_logprobs: Option<usize>,
    ) -> Result<Sampled, SampleError> {
        self.check_length(logits)?;
        if n_top_logprobs.is_some() {
            Field::new(Row::new(logits), &mut self.scratch);
        }
        self.report(token, logits, n_top_logprobs)
    }

    /// Log-probabilities beside a token, if they are asked for. Right after [`Field::new`] for the same row.
    fn report(&mut self, token: TokenId, logits: &[f32], n_top: Option<usize>) -> Result<Sampled, SampleError> {
        let Some(n_top) = n_top else {
            return Ok(Sampled { token, logprob: None, top: Vec::new() });
        };
        let (log_total, top) = self.scratch.logprobs(logits, n_top)?;
        let logit = usize::try_from(token).ok().and_then(|token| logits.get(token));
        Ok(Sampled { token, logprob: logit.map(|logit| logit - log_total), top })
    }

    fn check_length(&self, logits: &[f32]) -> Result<(), SampleError> {
        if logits.len() == self.n_vocab {
            return Ok(());
        }
        Err(SampleError::WrongLength { given: logits.len(), n_vocab: self.n_vocab })
    }

    fn choose(&mut self, logits: &[f32], banned: &[TokenId]) -> Result<TokenId, SampleError> {
        let mut field = Field::new(Row::new(logits), &mut self.scratch);
        field.adjust(self.bias.iter().copied(), |logit, bias| logit + bias);
        field.ban(banned);
        field.check()?;
        let min_keep = self.params.min_keep as usize;
        for step in &self.plan {
            match *step {
                Step::Penalties => {
                    field.adjust(self.penalties.counts(), |logit, n| self.penalties.penalised(logit, n));
                }
                Step::Dry => {
                    let tokens = self.history.last(self.dry.window_tokens());
                    field.adjust(self.dry.penalties(tokens), |logit, penalty| logit - penalty);
                }
                Step::TopNSigma(n) => field.keep_top_n_sigma(n),
                Step::TopK(k) => field.keep_top_k(k),
                Step::TypicalP(p) => field.settle().keep_typical(p, min_keep),
                Step::TopP { p, then_min_p } => field.keep_top_p(p, min_keep, then_min_p),
                Step::MinP(p) => field.keep_min_p(p, min_keep),
                Step::Xtc { probability, threshold } => {
                    if self.rng.uniform() < f64::from(probability) {
                        field.settle().remove_top_choices(threshold, min_keep);
                    }
                }
                Step::Temperature(temperature) => field.heat(temperature),
                Step::DynamicTemperature { low, high, exponent } => {
                    if let Some(entropy) = field.settle().relative_entropy() {
                        let share = entropy.powf(f64::from(exponent)) as f32;
                        field.heat(low + (high - low) * share);
                    }
                }
                Step::Best => return field.best().ok_or(SampleError::NoCandidate),
            }
        }
        let uniform = self.rng.uniform();
        self.draw.draw(&mut field, uniform).ok_or(SampleError::NoCandidate)
    }
}

impl Scratch {
    /// The logarithm of the sum of `exp(logit)` over the model's own row, and its best `n_top` tokens. Right after [`Field::new`] for
    /// the same row: its block maxima serve again.
    fn logprobs(&mut self, logits: &[f32], n_top: usize) -> Result<(f32, Vec<(TokenId, f32)>), SampleError> {
        let mut field = Field::again(Row::new(logits), self);
        field.check()?;
        let log_total = field.log_total();
        if n_top == 0 {
            return Ok((log_total, Vec::new()));
        }
        field.keep_top_k(n_top);
        let mut best: Vec<_> = field.settle().list.iter().map(|best| (best.token, best.logit)).collect();
        // By logits: two of them may round to one log probability. Stable, so that ties stay in order of their ids.
        best.sort_by(|a, b| b.1.total_cmp(&a.1));
        Ok((log_total, best.into_iter().map(|(token, logit)| (token, logit - log_total)).collect()))
    }
}

fn checked_top(top: f32) -> Result<(), SampleError> {
    match top {
        f32::NEG_INFINITY => Err(SampleError::NoCandidate),
        f32::INFINITY => Err(SampleError::InfiniteLogit),
        _ => Ok(()),
    }
}
