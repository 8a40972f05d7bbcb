//! Beginnings that were in the cache and had to go: remembered as numbers, so that a prompt that comes too late can be told from a new one.

use std::collections::{HashSet, VecDeque};

use crate::request::TokenId;

/// Numbers that are remembered: 8 for each doubling of a sequence's length, so some hundred long sequences. 64 KiB, and as much again for
/// looking them up.
const MOST: usize = 8192;

/// Shorter beginnings are not remembered.
const LEAST_TOKENS: usize = 16;

/// The last beginnings that had to go.
#[derive(Debug, Default)]
pub(super) struct Lost {
    known: HashSet<u64>,
    /// The oldest first.
    order: VecDeque<u64>,
}

impl Lost {
    /// These tokens are not in the cache any more, at least not where they were.
    pub(super) fn note(&mut self, tokens: &[TokenId], namespace: u64) {
        for (_, number) in numbers(tokens, namespace) {
            if !self.known.insert(number) {
                continue;
            }
            self.order.push_back(number);
            if self.order.len() > MOST
                && let Some(oldest) = self.order.pop_front()
            {
                self.known.remove(&oldest);
            }
        }
    }

    /// How much of `prompt` was there once: at least that, and less than an eighth more.
    pub(super) fn longest(&self, prompt: &[TokenId], namespace: u64) -> usize {
        if self.known.is_empty() {
            return 0;
        }
        numbers(prompt, namespace).filter(|(_, number)| self.known.contains(number)).last().map_or(0, |found| found.0)
    }
}

/// A number for each beginning of a remembered length; equal ones of other texts are as unlikely as it takes for a statistic.
fn numbers(tokens: &[TokenId], namespace: u64) -> impl Iterator<Item = (usize, u64)> {
    let mut state = namespace ^ 0x6a09_e667_f3bc_c909;
    (1..).zip(tokens).filter_map(move |(n_tokens, token): (usize, _)| {
        state = (state.rotate_left(23) ^ u64::from(token.cast_unsigned())).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        is_remembered(n_tokens).then_some((n_tokens, state ^ (state >> 31)))
    })
}

fn is_remembered(n_tokens: usize) -> bool {
    n_tokens >= LEAST_TOKENS && n_tokens.is_multiple_of(LEAST_TOKENS.max((1 << n_tokens.ilog2()) / 8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_once_is_found_to_an_eighth_and_nobody_elses() {
        let mut lost = Lost::default();
        let text: Vec<TokenId> = (0..5000).map(|i| i * 7 % 1001).collect();
        assert_eq!(lost.longest(&text, 1), 0);
        for n_tokens in [15, 16, 100, 1000, 4999] {
            lost.note(&text[..n_tokens], 1);
            let found = lost.longest(&text, 1);
            assert!(found <= n_tokens && found * 8 + 8 * LEAST_TOKENS > n_tokens * 7, "{found} of {n_tokens}");
        }
        assert_eq!(lost.longest(&text, 2), 0, "another namespace");
        assert_eq!(lost.longest(&text[1..], 1), 0, "the same tokens, but not from the start");
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_is_forgotten() {
        let mut lost = Lost::default();
        let text = |salt: TokenId| -> Vec<TokenId> { (0..1000).map(|i| i * 31 + salt * 100_000).collect() };
        for salt in 0..1000 {
            lost.note(&text(salt), 0);
            assert!(lost.order.len() <= MOST && lost.known.len() == lost.order.len());
        }
        assert_eq!((lost.longest(&text(0), 0), lost.longest(&text(999), 0) >= 875), (0, true));
    }
}
