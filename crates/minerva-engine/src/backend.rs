//! What the engine needs of whatever computes: one trait for llama.cpp and for the simulator.

mod limits;

use std::sync::Arc;

use minerva_llama::SavedState;

pub use self::limits::{BackendLimits, Row, SeqId, StepError};
use crate::drafter::Drafter;
use crate::error::RequestError;
use crate::request::{ChatMessage, TokenId};

/// Computes steps. Owned by the engine thread; nobody else touches it.
pub trait Backend: Send {
    /// Fixed sizes, asked once.
    fn limits(&self) -> BackendLimits;

    /// Computes the rows. On success [`logits`](Self::logits) can be read for each row that asked for output.
    ///
    /// # Errors
    /// [`StepError`]; its `cache_unchanged` tells whether the rows' sequences are still what they were.
    fn decode(&mut self, rows: &[Row]) -> Result<(), StepError>;

    /// Scores after row `i` of the last step: shape `[n_vocab]`, before softmax. `None` if the row asked for no output.
    fn logits(&self, i: usize) -> Option<&[f32]>;

    /// The hidden state after each row of the last step, for a head: shape `[n_rows, n_hidden]`. Empty where none are kept.
    fn hidden(&mut self) -> &[f32] {
        &[]
    }

    /// Keeps the first `n_tokens` of `seq` and frees the rest. `false` when the memory cannot be cut there; the sequence
    /// is then empty.
    fn truncate(&mut self, seq: SeqId, n_tokens: u32) -> bool;

    /// Makes `dst` hold the first `n_tokens` of `src`. `false` when the memory cannot be cut there; `dst` is then empty. What is done
    /// to `src` afterwards does not change it, and it can be saved at once.
    fn copy(&mut self, src: SeqId, dst: SeqId, n_tokens: u32) -> bool;

    /// All that `seq` holds, for [`restore`](Self::restore). `None` when it cannot be copied out or memory is missing.
    fn save(&mut self, seq: SeqId) -> Option<SavedState>;

    /// Makes `seq` hold what was saved, and nothing else. `false` when it cannot be; `seq` is then empty.
    fn restore(&mut self, seq: SeqId, state: &[u8]) -> bool;

    /// What [`rewind`](Self::rewind) needs to come back to this place once `seq` has gone on: of memory that cannot be cut the part that
    /// does not stay in the cells. `None` when it cannot be copied out or memory is missing. Only asked of memory that cannot be cut.
    fn save_part(&mut self, _seq: SeqId) -> Option<SavedState> {
        None
    }

    /// Makes `seq`, whose first `n_tokens` cells are those of the sequence that `state` was taken of by
    /// [`save_part`](Self::save_part) at that length, hold these tokens and no more. `false` when it cannot be; `seq` is then empty.
    fn rewind(&mut self, _seq: SeqId, _state: &[u8], _n_tokens: u32) -> bool {
        false
    }
}

/// A model's head for multi-token prediction. It has sequences and cells as the model has.
pub trait HeadBackend: Backend {
    /// Computes the rows; `hidden` is the state after the token before each of them, the model's or the head's own: shape
    /// `[n_rows, n_hidden]`. A sequence may begin at any position.
    ///
    /// # Errors
    /// As [`decode`](Backend::decode).
    fn decode_after(&mut self, rows: &[Row], hidden: &[f32]) -> Result<(), StepError>;
}

/// Text to tokens and back, shared by all threads.
pub trait Tokenizer: Send + Sync {
    /// Tokens of `text`. `add_special` adds BOS and EOS where the model wants them; `parse_special` reads the text of
    /// control tokens as these tokens.
    ///
    /// # Errors
    /// [`RequestError::Tokenize`] when the tokenizer fails on the text.
    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<TokenId>, RequestError>;

    /// Appends the bytes of one token. Control tokens have none.
    fn token_bytes(&self, token: TokenId, out: &mut Vec<u8>);

    /// Whether the token ends a generation.
    fn is_end_of_generation(&self, token: TokenId) -> bool;

    /// Every token that ends a generation.
    fn end_of_generation(&self) -> &[TokenId];

    /// Tokens that the model's file says are never to be sampled (`tokenizer.ggml.suppress_tokens`).
    fn suppressed(&self) -> &[TokenId] {
        &[]
    }

    /// The most bytes that one token stands for, to refuse a text before it is tokenized.
    fn max_token_bytes(&self) -> usize;

    /// The prompt that asks for an answer to `messages`.
    ///
    /// # Errors
    /// [`RequestError::NoChatTemplate`], or [`RequestError::ChatTemplate`] with the template's own message.
    fn render_chat(&self, messages: &[ChatMessage]) -> Result<RenderedChat, RequestError>;
}

/// A conversation as the model wants it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RenderedChat {
    /// The prompt, with control tokens as text.
    pub prompt: String,
    /// Texts that end an answer in this template's format, beside the end-of-generation tokens.
    pub stops: Vec<String>,
}

/// A backend and its tokenizer, as the engine takes them.
pub(crate) struct Loaded {
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) tokenizer: Arc<dyn Tokenizer>,
    /// A draft model that writes ahead.
    pub(crate) drafter: Option<Box<dyn Drafter>>,
}
