//! What comes back: plain data, one stream of events per request.

use serde::{Deserialize, Serialize};

use crate::request::TokenId;

/// One step of an answer. A stream ends with exactly one [`Event::Done`] or [`Event::Failed`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum Event {
    /// The request waits; sent when something changed, at most once a second, to those with
    /// [`queue_updates`](crate::Request::queue_updates).
    Queued {
        /// How many are to begin before it, and itself: 1 is next.
        position: u32,
        /// When it will begin, from now, in milliseconds; `None` while nothing is known of how long requests take.
        estimate_ms: Option<u64>,
    },
    /// The request waits no longer; sent once, to the same ones.
    Started,
    /// New text of one choice.
    Delta(Delta),
    /// One choice is complete; no more deltas of it follow.
    Finished {
        /// Which of the `n` continuations.
        choice: u32,
        /// Why it ended.
        reason: FinishReason,
        /// The stop text that ended it, when one did.
        stop: Option<String>,
    },
    /// Every choice is complete.
    Done(Summary),
    /// The engine could not finish the request.
    Failed(GenerationError),
}

/// A piece of one choice's text: never half a character, never part of a stop text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Delta {
    /// Which of the `n` continuations, from 0.
    pub choice: u32,
    /// The new text. It can be empty while a character or a possible stop text is incomplete.
    pub text: String,
    /// The tokens whose text begins in this delta. Their log-probabilities are there when the request asked for them.
    pub tokens: Vec<TokenInfo>,
}

/// One generated token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenInfo {
    /// The token.
    pub id: TokenId,
    /// Its bytes, which may be part of a character only.
    pub bytes: Vec<u8>,
    /// The natural logarithm of the probability that the model gave it, before sampling parameters.
    pub logprob: Option<f32>,
    /// The most likely tokens at this place with their log-probabilities, likeliest first.
    pub top: Vec<TopToken>,
}

/// An alternative at one place of the answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopToken {
    /// The token.
    pub id: TokenId,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The natural logarithm of its probability.
    pub logprob: f32,
}

/// Why a continuation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop text would have appeared.
    Stop,
    /// `max_tokens`, the end of the context or the request's deadline was reached.
    Length,
}

/// What a request used, sent with [`Event::Done`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of those, tokens whose cells were reused and not computed again.
    pub cached_tokens: u32,
    /// Tokens generated over all choices, the end-of-generation token included.
    pub completion_tokens: u32,
    /// Tokens that were guessed and computed along with the one before.
    pub guessed_tokens: u32,
    /// Of those, the ones that were right.
    pub right_guesses: u32,
    /// From submission until the first prompt token was computed.
    pub queue_ms: f64,
    /// From there until the first token was sampled.
    pub prefill_ms: f64,
    /// From there until the last token was sampled.
    pub decode_ms: f64,
}

/// Why an accepted request could not be finished.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case", tag = "kind")]
#[non_exhaustive]
pub enum GenerationError {
    /// llama.cpp could not compute a step that this request was part of.
    #[error("the backend failed to compute a step: {message}")]
    Backend {
        /// What the backend said.
        message: String,
    },
    /// The model's scores were unusable (all NaN, or everything banned).
    #[error("no token could be sampled: {message}")]
    Sampling {
        /// What was wrong with the scores.
        message: String,
    },
    /// The request's deadline was over before it could begin.
    #[error("the deadline of {deadline_ms} ms was over before the request could begin: it waited {waited_ms} ms")]
    DeadlineExpired {
        /// What the request asked for.
        deadline_ms: u64,
        /// How long it waited.
        waited_ms: u64,
    },
    /// The grammar that constrains the answer cannot go on from here: it is too complex at this place, or the vocabulary has no
    /// tokens for what has to follow.
    #[error("the answer cannot follow its constraint any further: {message}")]
    Constraint {
        /// What went wrong.
        message: String,
    },
    /// The engine was shut down before the request was done.
    #[error("the engine shut down before the request was finished")]
    Shutdown,
}
