//! Bias and the three penalties: what changes the logits of a few tokens. The cost grows with the window, not with the vocabulary.

use std::collections::BTreeMap;

use super::params::{BAN_BIAS, SamplingParams, window_tokens};
use crate::request::TokenId;

/// The request's `logit_bias`, once for each token, sorted by token.
pub(super) fn bias(params: &SamplingParams, n_vocab: usize) -> Vec<(TokenId, f32)> {
    let mut by_token = BTreeMap::<TokenId, f32>::new();
    for &(token, bias) in params.logit_bias.iter().filter(|(token, _)| in_vocab(*token, n_vocab)) {
        *by_token.entry(token).or_default() += if bias <= BAN_BIAS { f32::NEG_INFINITY } else { bias };
    }
    by_token.into_iter().collect()
}

/// The penalties, and how often the window has each token.
#[derive(Debug, Clone)]
pub(super) struct Penalties {
    repeat: f32,
    frequency: f32,
    presence: f32,
    window_tokens: usize,
    /// Ordered, because patches come out sorted.
    counts: BTreeMap<TokenId, u32>,
}

impl Penalties {
    pub(super) fn new(params: &SamplingParams) -> Self {
        Self {
            repeat: params.repeat_penalty,
            frequency: params.frequency_penalty,
            presence: params.presence_penalty,
            window_tokens: if params.has_penalties() { window_tokens(params.repeat_last_n) } else { 0 },
            counts: BTreeMap::new(),
        }
    }

    pub(super) fn window_tokens(&self) -> usize {
        self.window_tokens
    }

    /// Takes `token` into the window and the oldest token out of it: `last` is the history before `token`.
    pub(super) fn accept(&mut self, token: TokenId, last: &[TokenId]) {
        if self.window_tokens == 0 {
            return;
        }
        if last.len() >= self.window_tokens {
            self.forget(last[last.len() - self.window_tokens]);
        }
        *self.counts.entry(token).or_default() += 1;
    }

    fn forget(&mut self, token: TokenId) {
        if let Some(n) = self.counts.get_mut(&token) {
            *n -= 1;
            if *n == 0 {
                self.counts.remove(&token);
            }
        }
    }

    /// Each token of the window and how often it has it, by ascending id.
    pub(super) fn counts(&self) -> impl Iterator<Item = (TokenId, u32)> + '_ {
        self.counts.iter().map(|(&token, &n)| (token, n))
    }

    /// The logit of a token that the window has `n` times.
    ///
    /// Source: `llama_sampler_penalties_apply` at the pinned commit. Dividing a negative logit would reward repetition, so those are
    /// multiplied.
    pub(super) fn penalised(&self, logit: f32, n: u32) -> f32 {
        let repeated = if logit <= 0.0 { logit * self.repeat } else { logit / self.repeat };
        repeated - n as f32 * self.frequency - self.presence
    }
}

pub(super) fn in_vocab(token: TokenId, n_vocab: usize) -> bool {
    usize::try_from(token).is_ok_and(|token| token < n_vocab)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn penalties_follow_the_table() {
        let params = SamplingParams {
            repeat_penalty: 2.0,
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            ..SamplingParams::default()
        };
        let penalties = Penalties::new(&params);
        for (logit, n, expected) in [(4.0, 2, 0.75), (-1.0, 1, -2.75), (0.0, 1, -0.75)] {
            assert!((penalties.penalised(logit, n) - expected).abs() < 1e-6, "{logit}, {n} times");
        }
    }

    #[test]
    fn bias_adds_up_and_bans_from_minus_100() {
        const NEG_INF: f32 = f32::NEG_INFINITY;
        let params = SamplingParams {
            logit_bias: vec![(0, 1.5), (3, 1.0), (0, 1.5), (1, -100.0), (2, NEG_INF), (99, 5.0), (-1, 5.0)],
            ..SamplingParams::default()
        };
        assert_eq!(bias(&params, 4), [(0, 3.0), (1, NEG_INF), (2, NEG_INF), (3, 1.0)]);
    }

    #[test]
    fn the_window_forgets_its_oldest_token() {
        let params = SamplingParams { repeat_last_n: 2, presence_penalty: 1.0, ..SamplingParams::default() };
        let mut penalties = Penalties::new(&params);
        let mut history = Vec::new();
        for (token, expected) in [
            (0, vec![(0, 1)]),
            (1, vec![(0, 1), (1, 1)]),
            (1, vec![(1, 2)]),
            (2, vec![(1, 1), (2, 1)]),
            (2, vec![(2, 2)]),
        ] {
            penalties.accept(token, &history);
            history.push(token);
            assert_eq!(penalties.counts().collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn a_window_of_minus_one_keeps_everything_and_switched_off_penalties_keep_nothing() {
        let everything = SamplingParams { repeat_last_n: -1, presence_penalty: 1.0, ..SamplingParams::default() };
        for (params, n_kept) in [(everything, 5_000), (SamplingParams::default(), 0)] {
            let mut penalties = Penalties::new(&params);
            let mut history = Vec::new();
            for i in 0..5_000 {
                penalties.accept(i % 10, &history);
                history.push(i % 10);
            }
            assert_eq!(penalties.counts().map(|(_, n)| n).sum::<u32>(), n_kept);
        }
    }
}
