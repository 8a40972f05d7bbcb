//! Prompt lookup: what followed the same tokens earlier in a sequence is guessed to follow again.

use crate::request::TokenId;

/// So many tokens have to be the same for what followed them to be a guess.
const N_GRAM: usize = 3;

/// More than these are not compared.
const MOST_SAME_TOKENS: usize = 16;

/// How far back they are looked for, so that a step of a long context stays short.
const MOST_SEARCHED_TOKENS: usize = 16 << 10;

/// What a text ends with was said before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Said {
    /// The place of what followed.
    next: usize,
    /// How many tokens before it are the same as at the end, as far as they are compared.
    pub(crate) n_same: usize,
}

/// Where the text ended like this the last time, if it did.
pub(crate) fn said_before(tokens: &[TokenId]) -> Option<Said> {
    let (before, end) = tokens.split_at(tokens.len().checked_sub(N_GRAM)?);
    let from = before.len().saturating_sub(MOST_SEARCHED_TOKENS);
    // The newest first. It may overlap with the end, as in a row of equal tokens.
    let found = (from..before.len()).rev().find(|&i| tokens[i..i + N_GRAM] == *end)?;
    let next = found + N_GRAM;
    let same = tokens[..next].iter().rev().zip(tokens.iter().rev()).take(MOST_SAME_TOKENS);
    Some(Said { next, n_same: same.take_while(|(then, now)| then == now).count() })
}

impl Said {
    /// `most` tokens of what followed.
    pub(crate) fn guess(self, tokens: &[TokenId], most: usize, guess: &mut Vec<TokenId>) {
        guess.clear();
        for next in self.next..self.next + most {
            // Where the text ends the guess goes on with itself: what repeats itself does so again.
            guess.push(tokens.get(next).copied().unwrap_or_else(|| guess[next - tokens.len()]));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn guess(tokens: &[TokenId], most: usize) -> Vec<TokenId> {
        let mut guess = vec![9; 3]; // of another step
        match said_before(tokens) {
            Some(said) => said.guess(tokens, most, &mut guess),
            None => guess.clear(),
        }
        guess
    }

    #[test]
    fn it_is_known_how_much_was_the_same() {
        let n_same = |tokens: &[TokenId]| said_before(tokens).map(|said| said.n_same);
        assert_eq!(n_same(&[1, 2, 3, 9, 1, 2, 3]), Some(3));
        assert_eq!(n_same(&[8, 1, 2, 3, 4, 5, 7, 1, 2, 3, 4, 5]), Some(5));
        assert_eq!(n_same(&[1, 2, 3, 4]), None);
        assert_eq!(n_same(&[6; 40]), Some(MOST_SAME_TOKENS));
        assert_eq!(n_same(&[6; 8]), Some(7), "no more than there are");
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
