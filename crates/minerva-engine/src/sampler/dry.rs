//! DRY ("don't repeat yourself"): the longer a repetition a token would continue, the larger its penalty.
//!
//! Where the last `n` tokens of the history also stand earlier in it, the token that followed them there loses
//! `multiplier * base ^ (n - allowed_length)`. Breakers end a repetition: what lies before the last one does not count.
//! Source of the rules: `llama_sampler_dry_apply` at the pinned commit.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::params::{SamplingParams, window_tokens};
use crate::request::TokenId;

/// Token sequences that end a repetition: for each first token, what may follow it. A token that is a breaker by itself has an
/// empty rest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Breakers {
    rests: BTreeMap<TokenId, Vec<Vec<TokenId>>>,
}

impl Breakers {
    /// Adds the sequence of `head` and `rest`, once.
    pub fn add(&mut self, head: TokenId, rest: Vec<TokenId>) {
        let rests = self.rests.entry(head).or_default();
        if !rests.contains(&rest) {
            rests.push(rest);
        }
    }

    fn is_breaker(&self, token: TokenId) -> bool {
        self.rests.get(&token).is_some_and(|rests| rests.iter().any(Vec::is_empty))
    }

    /// Tokens after the last breaker of `tokens`; all of them if there is none.
    ///
    /// Of several that begin at the same token the longest counts, as in llama.cpp.
    fn since_last(&self, tokens: &[TokenId]) -> usize {
        for (i, head) in tokens.iter().enumerate().rev() {
            let Some(rests) = self.rests.get(head) else { continue };
            let after = &tokens[i + 1..];
            let longest = rests.iter().filter(|rest| after.starts_with(rest)).map(Vec::len).max();
            if let Some(n) = longest {
                return after.len() - n;
            }
        }
        tokens.len()
    }
}

/// The stage of one request.
#[derive(Debug, Clone)]
pub(super) struct Dry {
    multiplier: f32,
    base: f32,
    allowed_length: usize,
    window_tokens: usize,
    breakers: Arc<Breakers>,
    /// Length of the repetition that ends `i + 1` tokens before the end.
    lengths: Vec<usize>,
    /// The longest repetition that each token would continue. Ordered, because patches come out sorted.
    continued: BTreeMap<TokenId, usize>,
}

impl Dry {
    pub(super) fn new(params: &SamplingParams) -> Self {
        Self {
            multiplier: params.dry_multiplier,
            base: params.dry_base,
            allowed_length: params.dry_allowed_length as usize,
            window_tokens: if params.has_dry() { window_tokens(params.dry_penalty_last_n) } else { 0 },
            breakers: Arc::default(),
            lengths: Vec::new(),
            continued: BTreeMap::new(),
        }
    }

    pub(super) fn set_breakers(&mut self, breakers: Arc<Breakers>) {
        self.breakers = breakers;
    }

    pub(super) fn window_tokens(&self) -> usize {
        self.window_tokens
    }

    /// The tokens that would continue a repetition of `tokens` and what each loses, by ascending id.
    pub(super) fn penalties(&mut self, tokens: &[TokenId]) -> impl Iterator<Item = (TokenId, f32)> + '_ {
        self.find_repetitions(tokens);
        let Self { multiplier, base, allowed_length, breakers, continued, .. } = self;
        continued.iter().filter(|(token, _)| !breakers.is_breaker(**token)).map(|(&token, &length)| {
            let exponent = (length - *allowed_length).min(max_exponent(*base)) as i32;
            let penalty = f64::from(*multiplier) * f64::from(*base).powi(exponent);
            (token, penalty.min(f64::from(f32::MAX)) as f32) // finite: the only candidate is still one
        })
    }

    fn find_repetitions(&mut self, tokens: &[TokenId]) {
        self.continued.clear();
        let n = tokens.len();
        if n <= self.allowed_length {
            return;
        }
        let longest = self.breakers.since_last(tokens);
        if longest < self.allowed_length {
            return;
        }
        measure_repetitions(tokens, &mut self.lengths);
        for (i, &length) in self.lengths.iter().enumerate() {
            let length = length.min(longest);
            if length >= self.allowed_length {
                let continued = self.continued.entry(tokens[n - 1 - i]).or_default();
                *continued = (*continued).max(length);
            }
        }
    }
}

/// For each `i` from 0, how many tokens before the last `i + 1` are the same as the last tokens of all.
///
/// The Z-function of the reversed tokens, in linear time: what lies inside of an earlier match was compared there already.
fn measure_repetitions(tokens: &[TokenId], lengths: &mut Vec<usize>) {
    let n = tokens.len();
    let from_end = |i: usize| tokens[n - 1 - i];
    lengths.clear();
    let (mut left, mut right) = (0, 0); // the match that reaches furthest back, as a range of distances from the end
    for k in 1..n {
        let mut length = 0;
        if k < right {
            length = (right - k).min(lengths[k - left - 1]);
        }
        while k + length < n && from_end(length) == from_end(k + length) {
            length += 1;
        }
        if k + length > right {
            (left, right) = (k, k + length);
        }
        lengths.push(length);
    }
}

/// The largest exponent whose power of `base` an `f32` holds.
fn max_exponent(base: f32) -> usize {
    const LN_MAX: f64 = 88.722_839; // of the largest `f32`
    if base > 1.000_001 { (LN_MAX / f64::from(base).ln()) as usize } else { i32::MAX as usize }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn params(allowed_length: i32) -> SamplingParams {
        SamplingParams {
            dry_multiplier: 1.0,
            dry_base: 2.0,
            dry_allowed_length: allowed_length,
            ..SamplingParams::default()
        }
    }

    fn penalties(dry: &mut Dry, text: &str) -> Vec<(char, f32)> {
        let tokens: Vec<TokenId> = text.bytes().map(TokenId::from).collect();
        dry.penalties(&tokens).map(|(token, penalty)| (char::from(token as u8), penalty)).collect()
    }

    #[test]
    fn what_would_continue_a_repetition_loses_more_the_longer_it_is() {
        let mut dry = Dry::new(&params(2));
        assert_eq!(penalties(&mut dry, "abcdabc"), [('d', 2.0)]);
        assert_eq!(penalties(&mut dry, "xbcyabcdabc"), [('d', 2.0), ('y', 1.0)]);
        assert_eq!(penalties(&mut dry, "abab"), [('a', 1.0)]);
        assert_eq!(penalties(&mut dry, "abcde"), []);
        assert_eq!(penalties(&mut dry, "ab"), [], "no longer than what is allowed");
        assert_eq!(penalties(&mut dry, ""), []);
    }

    #[test]
    fn a_breaker_ends_a_repetition_and_is_never_penalised() {
        let mut dry = Dry::new(&params(2));
        let mut breakers = Breakers::default();
        breakers.add(TokenId::from(b':'), Vec::new());
        breakers.add(TokenId::from(b'<'), vec![TokenId::from(b'b'), TokenId::from(b'>')]);
        dry.set_breakers(Arc::new(breakers));
        assert_eq!(penalties(&mut dry, "abcdabc"), [('d', 2.0)]);
        assert_eq!(penalties(&mut dry, "a:bcd:bc"), [('d', 1.0)], "only what follows the breaker counts");
        assert_eq!(penalties(&mut dry, "abc:ab:c"), [], "one token follows it");
        assert_eq!(penalties(&mut dry, "abc:abc"), [], "the breaker itself goes on as it likes");
        assert_eq!(penalties(&mut dry, "a<b>cdefa<b>cde"), [('f', 2.0)]);
        assert_eq!(penalties(&mut dry, "a<b-cdefa<b-cde"), [('f', 32.0)], "half a breaker is none");
    }

    #[test]
    fn a_long_repetition_has_a_finite_penalty() {
        let mut dry = Dry::new(&SamplingParams { dry_base: 1000.0, ..params(0) });
        let found = penalties(&mut dry, &"a".repeat(5_000));
        assert!(found.len() == 1 && found[0].1.is_finite() && found[0].1 > 1e30, "{found:?}");
        let mut dry = Dry::new(&SamplingParams { dry_base: 1000.0, dry_multiplier: 1000.0, ..params(0) });
        assert_eq!(penalties(&mut dry, &"a".repeat(5_000)), [('a', f32::MAX)]);
        let mut flat = Dry::new(&SamplingParams { dry_base: 1.0, ..params(0) });
        assert_eq!(penalties(&mut flat, &"a".repeat(5_000)), [('a', 1.0)]);
    }

    proptest! {
        #[test]
        fn repetitions_are_those_that_a_plain_comparison_finds(tokens in prop::collection::vec(0..3_i32, 0..60)) {
            let mut lengths = Vec::new();
            measure_repetitions(&tokens, &mut lengths);
            let n = tokens.len();
            let plain: Vec<usize> = (1..n)
                .map(|k| (0..n - k).take_while(|i| tokens[n - 1 - i] == tokens[n - 1 - i - k]).count())
                .collect();
            prop_assert_eq!(lengths, plain);
        }
    }
}
