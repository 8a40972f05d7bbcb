//! The last step of a draw: as the probabilities say, by Mirostat, or by adaptive-p. The latter two remember what they drew.

use serde::{Deserialize, Serialize};

use super::field::Field;
use super::params::SamplingParams;
use super::stage::SamplerStage;
use crate::request::TokenId;

/// How tokens are drawn, and what that remembers. The numbers are `f32` as in llama.cpp, and survive JSON to the bit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Draw {
    Plain,
    Mirostat(Mirostat),
    Adaptive(Adaptive),
}

/// Keeps the surprise of the drawn tokens near `tau` bits by cutting off those that surprise more than `mu`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Mirostat {
    is_v2: bool,
    tau: f32,
    eta: f32,
    mu: f32,
}

/// Draws near a probability that moves so that the drawn tokens' average is `target`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Adaptive {
    target: f32,
    decay: f32,
    /// Of the drawn tokens' probabilities, older ones counting less; and what a probability of 1 would have given.
    weighted_sum: f32,
    total_weight: f32,
    /// The token drawn last and its probability, until the caller accepts it.
    #[serde(skip)]
    pending: Option<(TokenId, f32)>,
}

impl Draw {
    pub(super) fn new(params: &SamplingParams) -> Self {
        let &SamplingParams { mirostat, mirostat_tau: tau, mirostat_eta: eta, adaptive_target, adaptive_decay, .. } =
            params;
        if mirostat != 0 {
            return Self::Mirostat(Mirostat { is_v2: mirostat == 2, tau, eta, mu: 2.0 * tau });
        }
        if params.samplers.contains(&SamplerStage::AdaptiveP) && adaptive_target >= 0.0 {
            // As if all tokens so far had hit the target.
            let total_weight = 1.0 / (1.0 - adaptive_decay);
            return Self::Adaptive(Adaptive {
                target: adaptive_target,
                decay: adaptive_decay,
                weighted_sum: adaptive_target * total_weight,
                total_weight,
                pending: None,
            });
        }
        Self::Plain
    }

    /// Draws from the field with `uniform`, a number from `[0, 1)`.
    pub(super) fn draw(&mut self, field: &mut Field<'_>, uniform: f64) -> Option<TokenId> {
        match self {
            Self::Plain => field.draw(uniform),
            Self::Mirostat(mirostat) => mirostat.draw(field, uniform),
            Self::Adaptive(adaptive) => adaptive.draw(field, uniform),
        }
    }

    pub(super) fn accept(&mut self, token: TokenId) {
        if let Self::Adaptive(adaptive) = self {
            adaptive.accept(token);
        }
    }
}

impl Mirostat {
    /// Source: `llama_sampler_mirostat_apply` and `llama_sampler_mirostat_v2_apply` at the pinned commit.
    fn draw(&mut self, field: &mut Field<'_>, uniform: f64) -> Option<TokenId> {
        if self.is_v2 {
            field.keep_unsurprising(f64::from(self.mu));
        } else {
            let k = self.n_kept(field);
            field.keep_top_k(k);
        }
        let candidates = field.settle();
        let drawn = candidates.draw(uniform)?;
        let surprise = -candidates.probability(drawn).log2() as f32;
        self.mu -= self.eta * (surprise - self.tau);
        Some(candidates.list[drawn].token)
    }

    /// How many of the best tokens the first version keeps: it takes the probabilities for a power law (Zipf's), fits the exponent to
    /// the best tokens, and asks for how many tokens the expected surprise is `mu`.
    fn n_kept(&self, field: &mut Field<'_>) -> usize {
        /// Tokens for the fit; llama-server's number.
        const N_FITTED: usize = 100;
        let logits = field.best_logits(N_FITTED);
        let (mut products, mut squares) = (0.0, 0.0);
        for (i, pair) in logits.windows(2).enumerate() {
            let step = ((i + 2) as f64 / (i + 1) as f64).ln();
            products += step * f64::from(pair[0] - pair[1]);
            squares += step * step;
        }
        let exponent: f64 = products / squares;
        let excess = exponent - 1.0;
        let n_vocab = field.n_vocab() as f64;
        let k = (excess * f64::from(self.mu).exp2() / (1.0 - n_vocab.powf(-excess))).powf(exponent.recip());
        (k as usize).max(1) // NaN, as of a single token, becomes 0
    }
}

impl Adaptive {
    /// Source: `llama_sampler_adaptive_p_apply` at the pinned commit.
    fn draw(&mut self, field: &mut Field<'_>, uniform: f64) -> Option<TokenId> {
        /// Width of the peak, its logit, and how fast the logits fall beside it. Source: constants of the same names there.
        const DISTRIBUTION_WIDTH: f32 = 0.3;
        const PEAK_LOGIT_VALUE: f32 = 5.0;
        const SHARPNESS: f32 = 10.0;

        let target = (2.0 * self.target - self.weighted_sum / self.total_weight).clamp(0.0, 1.0);
        let candidates = field.settle();
        candidates.replace_by_probability(|probability| {
            let distance = ((probability - target) / DISTRIBUTION_WIDTH).abs();
            PEAK_LOGIT_VALUE - SHARPNESS * distance * distance / (1.0 + distance)
        });
        let drawn = candidates.draw(uniform)?;
        let token = candidates.list[drawn].token;
        self.pending = Some((token, candidates.replaced_probability(drawn)));
        Some(token)
    }

    fn accept(&mut self, token: TokenId) {
        if let Some((_, probability)) = self.pending.take().filter(|(drawn, _)| *drawn == token) {
            self.weighted_sum = probability + self.decay * self.weighted_sum;
            self.total_weight = 1.0 + self.decay * self.total_weight;
        }
    }
}
