//! Bias, penalties and bans: the few tokens of a row whose logit is not the model's own.
//!
//! They become [`Patch`]es, sorted by token, and [`Row`](super::row::Row) reads the logits through them; nothing here
//! touches the other tokens, so the cost grows with the window and not with the vocabulary.

use std::collections::{BTreeMap, VecDeque};

use super::params::{BAN_BIAS, MAX_REPEAT_LAST_N, SamplingParams};
use super::row::Patch;
use crate::request::TokenId;

/// What is known about one token: its bias, and how often the window has it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Adjustment {
    bias: f32,
    n_in_window: u32,
}

/// The adjusted tokens of one request, kept up to date as tokens are accepted.
#[derive(Debug, Clone)]
pub(super) struct Adjustments {
    n_vocab: usize,
    repeat: f32,
    frequency: f32,
    presence: f32,
    /// The last accepted tokens, oldest first, at most `window_tokens` of them.
    window: VecDeque<TokenId>,
    window_tokens: usize,
    /// Ordered, because patches must come out sorted; an entry goes when it would change nothing.
    by_token: BTreeMap<TokenId, Adjustment>,
}

impl Adjustments {
    pub(super) fn new(params: &SamplingParams, n_vocab: usize) -> Self {
        let window_tokens = match params.repeat_last_n {
            _ if !params.has_penalties() => 0,
            n if n < 0 => MAX_REPEAT_LAST_N as usize,
            n => n as usize,
        };
        let mut by_token = BTreeMap::<TokenId, Adjustment>::new();
        for &(token, bias) in params.logit_bias.iter().filter(|(token, _)| in_vocab(*token, n_vocab)) {
            by_token.entry(token).or_default().bias += if bias <= BAN_BIAS { f32::NEG_INFINITY } else { bias };
        }
        Self {
            n_vocab,
            repeat: params.repeat_penalty,
            frequency: params.frequency_penalty,
            presence: params.presence_penalty,
            window: VecDeque::new(),
            window_tokens,
            by_token,
        }
    }

    /// Moves `token` into the window and, once that is full, the oldest one out. Ids outside the vocabulary are ignored.
    pub(super) fn accept(&mut self, token: TokenId) {
        if self.window_tokens == 0 || !in_vocab(token, self.n_vocab) {
            return;
        }
        if self.window.len() == self.window_tokens
            && let Some(oldest) = self.window.pop_front()
        {
            self.forget(oldest);
        }
        self.window.push_back(token);
        self.by_token.entry(token).or_default().n_in_window += 1;
    }

    fn forget(&mut self, token: TokenId) {
        if let Some(adjustment) = self.by_token.get_mut(&token) {
            adjustment.n_in_window -= 1;
            if *adjustment == Adjustment::default() {
                self.by_token.remove(&token);
            }
        }
    }

    /// The window, oldest token first: with the parameters, all that is needed to build this again.
    pub(super) fn window(&self) -> impl Iterator<Item = TokenId> + '_ {
        self.window.iter().copied()
    }

    /// Writes the adjusted logits of one row to `patches`, sorted by token, each token once.
    pub(super) fn patch(&self, logits: &[f32], banned: &[TokenId], patches: &mut Vec<Patch>) {
        patches.clear();
        patches.extend(self.by_token.iter().map(|(&token, adjustment)| {
            let token = token as usize; // never negative: checked on the way in
            Patch { token, logit: self.adjusted(logits[token], *adjustment) }
        }));
        if banned.is_empty() {
            return;
        }
        let banned = banned.iter().filter(|token| in_vocab(**token, self.n_vocab));
        patches.extend(banned.map(|&token| Patch { token: token as usize, logit: f32::NEG_INFINITY }));
        // Stable, so that the ban ends up behind the patch it overrules.
        patches.sort_by_key(|patch| patch.token);
        patches.dedup_by(|later, kept| {
            let is_same = later.token == kept.token;
            if is_same {
                kept.logit = later.logit;
            }
            is_same
        });
    }

    /// Source: `llama_sampler_penalties_apply` at the pinned commit. Dividing a negative logit would reward repetition,
    /// so those are multiplied.
    fn adjusted(&self, logit: f32, Adjustment { bias, n_in_window }: Adjustment) -> f32 {
        let logit = logit + bias;
        if n_in_window == 0 {
            return logit;
        }
        let repeated = if logit <= 0.0 { logit * self.repeat } else { logit / self.repeat };
        repeated - n_in_window as f32 * self.frequency - self.presence
    }
}

fn in_vocab(token: TokenId, n_vocab: usize) -> bool {
    usize::try_from(token).is_ok_and(|token| token < n_vocab)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEG_INF: f32 = f32::NEG_INFINITY;

    fn patches(adjustments: &Adjustments, logits: &[f32], banned: &[TokenId]) -> Vec<(usize, f32)> {
        let mut patches = Vec::new();
        adjustments.patch(logits, banned, &mut patches);
        patches.iter().map(|patch| (patch.token, patch.logit)).collect()
    }

    #[test]
    fn penalties_follow_the_table() {
        let params = SamplingParams {
            repeat_penalty: 2.0,
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            ..SamplingParams::default()
        };
        let mut adjustments = Adjustments::new(&params, 5);
        for token in [1, 3, 1, 4] {
            adjustments.accept(token);
        }
        // token 1 twice: 4 / 2 - 2 * 0.5 - 0.25; token 3 once: -1 * 2 - 0.5 - 0.25; token 4 once: 0 * 2 - 0.5 - 0.25
        let expected = [(1, 0.75), (3, -2.75), (4, -0.75)];
        assert_eq!(patches(&adjustments, &[9.0, 4.0, 9.0, -1.0, 0.0], &[]), expected);
    }

    #[test]
    fn bias_adds_up_comes_before_the_penalties_and_bans_from_minus_100() {
        let params = SamplingParams {
            repeat_penalty: 2.0,
            logit_bias: vec![(0, 1.5), (0, 1.5), (1, -100.0), (2, NEG_INF), (3, 1.0), (99, 5.0), (-1, 5.0)],
            ..SamplingParams::default()
        };
        let mut adjustments = Adjustments::new(&params, 4);
        adjustments.accept(0);
        adjustments.accept(1);
        let expected = [(0, 2.0), (1, NEG_INF), (2, NEG_INF), (3, 2.0)];
        assert_eq!(patches(&adjustments, &[1.0; 4], &[]), expected);
    }

    #[test]
    fn a_ban_overrules_whatever_else_is_known_about_a_token() {
        let params = SamplingParams { logit_bias: vec![(2, 50.0)], ..SamplingParams::default() };
        let adjustments = Adjustments::new(&params, 4);
        let expected = [(0, NEG_INF), (2, NEG_INF)];
        assert_eq!(patches(&adjustments, &[1.0; 4], &[2, 0, 2, 77, -5]), expected);
    }

    #[test]
    fn the_window_forgets_its_oldest_token() {
        let params = SamplingParams { repeat_last_n: 2, presence_penalty: 1.0, ..SamplingParams::default() };
        let mut adjustments = Adjustments::new(&params, 4);
        for (token, expected) in [
            (0, vec![(0, -1.0)]),
            (1, vec![(0, -1.0), (1, -1.0)]),
            (1, vec![(1, -1.0)]), // one occurrence of 1 leaves next, the other stays
            (2, vec![(1, -1.0), (2, -1.0)]),
            (2, vec![(2, -1.0)]),
        ] {
            adjustments.accept(token);
            assert_eq!(patches(&adjustments, &[0.0; 4], &[]), expected);
        }
        assert_eq!(adjustments.window().collect::<Vec<_>>(), [2, 2]);
    }

    #[test]
    fn a_window_of_minus_one_keeps_everything_and_switched_off_penalties_keep_nothing() {
        let everything = SamplingParams { repeat_last_n: -1, presence_penalty: 1.0, ..SamplingParams::default() };
        for (params, n_kept) in [(everything, 5_000), (SamplingParams::default(), 0)] {
            let mut adjustments = Adjustments::new(&params, 10);
            for i in 0..5_000 {
                adjustments.accept(i % 10);
            }
            adjustments.accept(10); // not in the vocabulary
            assert_eq!(adjustments.window().count(), n_kept);
        }
    }
}
