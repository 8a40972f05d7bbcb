//! Guesses at the next tokens of a sequence, which are computed along with its last token and kept only as far as sampling agrees.
//!
//! A guess costs rows and never changes an answer: each of its tokens is sampled from the scores that it would have had anyway, and
//! the first one that differs ends it. What a sequence says again is guessed from what it has said before (prompt lookup); how
//! much is worth guessing comes from how often guesses were right and what a row costs.

use super::cost::Costs;
use crate::request::TokenId;

/// So many tokens have to be the same for what followed them to be a guess.
const N_GRAM: usize = 3;

/// How far back they are looked for, so that a step of a long context stays short.
const MOST_SEARCHED_TOKENS: usize = 16 << 10;

/// The longest guess.
const MOST_GUESSED_TOKENS: usize = 12;

/// Trust in the first guess of a request: half of them pay.
const FIRST_TRUST: f64 = 0.7;

/// Weight of the newest guess.
const LEARN: f64 = 0.15;

/// A guess below this is worth nothing.
const LEAST_TRUST: f64 = 0.05;

/// Tokens after which somebody who is not trusted may try again.
const TRY_AGAIN_TOKENS: u32 = 48;

/// How good the guesses for one sequence are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trust {
    /// The share of guessed tokens that were right, the first wrong one of each guess included.
    rate: f64,
    n_since_guess: u32,
}

impl Default for Trust {
    fn default() -> Self {
        Self { rate: FIRST_TRUST, n_since_guess: 0 }
    }
}

impl Trust {
    /// A guess was looked at: of `n_guessed` tokens the first `n_right` were right.
    pub(super) fn learn(&mut self, n_guessed: usize, n_right: usize) {
        self.n_since_guess = 0;
        for i in 0..n_guessed.min(n_right + 1) {
            let right = if i < n_right { 1.0 } else { 0.0 };
            self.rate += LEARN * (right - self.rate);
        }
    }

    /// One more token without a guess.
    pub(super) fn pass(&mut self) {
        self.n_since_guess = self.n_since_guess.saturating_add(1);
    }

    /// How many tokens to guess: as long as the time that a right guess saves, times how likely it is, is more than its row takes.
    pub(super) fn worth(&self, costs: &Costs, n_decode: usize, n_cells: u64) -> usize {
        let (step_us, row_us) = (costs.decode_us(n_decode, n_cells), costs.row_us());
        let (mut n, mut likely, mut tokens, mut time) = (0, 1.0, n_decode as f64, step_us);
        while n < MOST_GUESSED_TOKENS {
            likely *= self.rate;
            if likely < LEAST_TRUST || likely * time < row_us * tokens {
                break;
            }
            n += 1;
            tokens += likely;
            time += row_us;
        }
        // Texts change: a single row now and then finds out.
        if n == 0 && self.n_since_guess >= TRY_AGAIN_TOKENS { 1 } else { n }
    }
}

/// What followed the last time that the text ended like this, `most` tokens of it; nothing when it never did.
pub(super) fn look_up(tokens: &[TokenId], most: usize, guess: &mut Vec<TokenId>) {
    guess.clear();
    let Some(at) = tokens.len().checked_sub(N_GRAM) else { return };
    let (before, end) = tokens.split_at(at);
    let from = before.len().saturating_sub(MOST_SEARCHED_TOKENS);
    // The newest first. It may overlap with the end, as in a row of equal tokens.
    let Some(found) = (from..before.len()).rev().find(|&i| tokens[i..i + N_GRAM] == *end) else { return };
    for next in found + N_GRAM..found + N_GRAM + most {
        // Where the text ends the guess goes on with itself: what repeats itself does so again.
        guess.push(tokens.get(next).copied().unwrap_or_else(|| guess[next - tokens.len()]));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::cost::Work;
    use super::*;

    fn guess(tokens: &[TokenId], most: usize) -> Vec<TokenId> {
        let mut guess = vec![9; 3]; // of another step
        look_up(tokens, most, &mut guess);
        guess
    }

    #[test]
    fn what_followed_the_last_time_is_the_guess() {
        assert_eq!(guess(&[1, 2, 3, 4, 5, 1, 2, 3], 3), [4, 5, 1]);
        assert_eq!(guess(&[1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1), [5], "the newest");
        assert_eq!(guess(&[1, 2, 3, 4, 1, 2, 3], 9), [4, 1, 2, 3, 4, 1, 2, 3, 4], "beyond the end it goes on");
        assert_eq!(guess(&[7, 7, 7, 7], 3), [7, 7, 7]);
        for nothing in [&[1, 2, 3, 4][..], &[1, 2], &[]] {
            assert!(guess(nothing, 9).is_empty());
        }
    }

    proptest! {
        #[test]
        fn a_guess_follows_the_same_tokens_somewhere_before(tokens in prop::collection::vec(0..4, 0..60), most in 0_usize..9) {
            let guess = guess(&tokens, most);
            let has_ended_like_this = tokens.len() > 3 && {
                let (before, end) = (&tokens[..tokens.len() - 1], &tokens[tokens.len() - 3..]);
                before.windows(3).any(|window| window == end)
            };
            prop_assert_eq!(guess.len(), if has_ended_like_this { most } else { 0 });
            if has_ended_like_this && most > 0 {
                let text = [&tokens[..], &guess].concat();
                let like_it = &text[tokens.len() - 3..=tokens.len()];
                prop_assert!(text[..text.len() - 1].windows(4).any(|window| window == like_it));
            }
        }
    }

    fn costs(one_us: u64, row_us: u64) -> Costs {
        let mut costs = Costs::default();
        for n_decode in [1, 2, 4, 8, 4, 2, 1] {
            costs.learn(Work { n_decode, ..Work::default() }, one_us + row_us * (n_decode as u64 - 1));
        }
        costs
    }

    #[test]
    fn guesses_are_as_long_as_they_pay() {
        let mut trust = Trust::default();
        let cheap = costs(10_000, 500);
        let dear = costs(10_000, 9_000);
        assert!(trust.worth(&cheap, 1, 0) >= 4, "{}", trust.worth(&cheap, 1, 0));
        assert_eq!(trust.worth(&dear, 1, 0), 0);
        for _ in 0..20 {
            trust.learn(4, 0);
        }
        assert_eq!(trust.worth(&cheap, 1, 0), 0, "nobody trusts who is always wrong");
        (0..TRY_AGAIN_TOKENS).for_each(|_| trust.pass());
        assert_eq!(trust.worth(&cheap, 1, 0), 1, "but he may try again");
        for _ in 0..20 {
            trust.learn(1, 1);
        }
        assert_eq!(trust.worth(&cheap, 1, 0), MOST_GUESSED_TOKENS);
    }
}
