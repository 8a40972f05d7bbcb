//! The last tokens of a request, for the stages that look back.

use crate::request::TokenId;

/// The last `capacity` accepted tokens, in one piece.
#[derive(Debug, Clone)]
pub(super) struct History {
    /// Up to twice the capacity, so that making room moves each token once on average.
    tokens: Vec<TokenId>,
    capacity: usize,
}

impl History {
    pub(super) fn new(capacity: usize) -> Self {
        Self { tokens: Vec::new(), capacity }
    }

    pub(super) fn push(&mut self, token: TokenId) {
        if self.capacity == 0 {
            return;
        }
        if self.tokens.len() >= self.capacity.saturating_mul(2) {
            self.tokens.drain(..self.tokens.len() - self.capacity);
        }
        self.tokens.push(token);
    }

    /// The last `n` tokens, oldest first; fewer where there are fewer, or where the capacity is smaller.
    pub(super) fn last(&self, n: usize) -> &[TokenId] {
        let n = n.min(self.capacity).min(self.tokens.len());
        &self.tokens[self.tokens.len() - n..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_the_last_tokens_however_many_there_were() {
        for capacity in 0..9 {
            let mut history = History::new(capacity);
            for n_pushed in 0..100 {
                let kept: Vec<_> = (0..n_pushed).collect();
                for n in [0, 1, 3, 8, 200] {
                    let expected = kept.len().saturating_sub(n.min(capacity));
                    assert_eq!(history.last(n), &kept[expected..], "{n} of {n_pushed} with room for {capacity}");
                }
                history.push(n_pushed);
                assert!(history.tokens.len() <= 2 * capacity);
            }
        }
    }
}
