//! Prompt lookup: what followed the same tokens earlier in a sequence is guessed to follow again.

use super::{Draft, DraftError, Drafted, Drafter, Wish};
use crate::backend::SeqId;
use crate::request::TokenId;

/// So many tokens have to be the same for what followed them to be a guess.
const N_GRAM: usize = 3;

/// How far back they are looked for, so that a step of a long context stays short.
const MOST_SEARCHED_TOKENS: usize = 16 << 10;

/// Guesses from the sequence itself. It holds nothing and takes no time worth counting.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lookup;

impl Drafter for Lookup {
    fn draft(&mut self, wishes: &[(Wish, &[TokenId])]) -> Result<Drafted, DraftError> {
        let drafts = wishes.iter().map(|(wish, history)| {
            let mut tokens = Vec::new();
            look_up(history, wish.n_most as usize, &mut tokens);
            Draft { seq: wish.seq, tokens, n_held: 0, is_complete: true }
        });
        Ok(Drafted { drafts: drafts.collect(), ..Drafted::default() })
    }

    fn truncate(&mut self, _seq: SeqId, _n_tokens: u32) {}

    fn n_cells(&self) -> u64 {
        0
    }
}

/// Where what the text ends with was said before, if it was: the place of what followed.
fn said_before(tokens: &[TokenId]) -> Option<usize> {
    let (before, end) = tokens.split_at(tokens.len().checked_sub(N_GRAM)?);
    let from = before.len().saturating_sub(MOST_SEARCHED_TOKENS);
    // The newest first. It may overlap with the end, as in a row of equal tokens.
    let found = (from..before.len()).rev().find(|&i| tokens[i..i + N_GRAM] == *end)?;
    Some(found + N_GRAM)
}

impl Lookup {
    /// Whether it has a guess.
    pub(crate) fn has_guess(tokens: &[TokenId]) -> bool {
        said_before(tokens).is_some()
    }
}

/// What followed the last time that the text ended like this, `most` tokens of it; nothing when it never did.
pub(crate) fn look_up(tokens: &[TokenId], most: usize, guess: &mut Vec<TokenId>) {
    guess.clear();
    let Some(first) = said_before(tokens) else { return };
    for next in first..first + most {
        // Where the text ends the guess goes on with itself: what repeats itself does so again.
        guess.push(tokens.get(next).copied().unwrap_or_else(|| guess[next - tokens.len()]));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
}
