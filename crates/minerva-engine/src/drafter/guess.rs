//! What a guess is, and who gives it.

use serde::{Deserialize, Serialize};

use crate::backend::{SeqId, StepError};
use crate::request::TokenId;

/// A guess that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// The sequence.
    pub seq: SeqId,
    /// The most tokens to guess; at least 1.
    pub n_most: u32,
    /// The most tokens of the sequence that may be computed for it if the drafter is behind.
    pub n_feed: u32,
}

/// What is guessed to follow.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draft {
    /// The sequence.
    pub seq: SeqId,
    /// The tokens, none when the drafter is not sure of any.
    pub tokens: Vec<TokenId>,
    /// Tokens of the sequence that the drafter has computed and keeps.
    pub n_held: u32,
    /// Whether it was asked for tokens at all; not when it was too far behind.
    pub is_complete: bool,
}

/// Guesses, and what they took.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drafted {
    /// One for each wish.
    pub drafts: Vec<Draft>,
    /// Times that the drafter computed one more token of each guess.
    pub n_rounds: u32,
    /// Guesses that these worked on, added up over the rounds.
    pub n_round_guesses: u32,
    /// Time of all rounds, in microseconds.
    pub rounds_us: u64,
    /// Tokens of sequences that it was behind by, as far as they were computed now.
    pub n_fed: u32,
    /// Time of these, in microseconds.
    pub fed_us: u64,
}

/// Why nothing can be guessed any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DraftError {
    /// The draft model, or the head, could not compute a step.
    #[error("a step failed: {0}")]
    Step(#[from] StepError),
    /// A step that it computed has no scores.
    #[error("a step has no scores")]
    NoScores,
}

/// Guesses what follows. Owned by the engine thread.
pub trait Drafter: Send {
    /// A guess for each wish; beside it, all tokens that its sequence has.
    ///
    /// # Errors
    /// [`DraftError`]: it is not asked again.
    fn draft(&mut self, wishes: &[(Wish, &[TokenId])]) -> Result<Drafted, DraftError>;

    /// A sequence keeps its first `n_tokens` tokens at most: what is kept for more of them can go.
    fn truncate(&mut self, seq: SeqId, n_tokens: u32);

    /// Cells that it holds.
    fn n_cells(&self) -> u64;
}
