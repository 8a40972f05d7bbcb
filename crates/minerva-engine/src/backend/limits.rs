//! The sizes of a backend, and what a step is made of: all that the scheduler knows of it.

use serde::{Deserialize, Serialize};

use crate::request::TokenId;

/// The seat of a token history in the KV cache, `0..n_seq_max`.
pub type SeqId = u32;

/// The sizes of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendLimits {
    /// Sequences.
    pub n_seq_max: u32,
    /// The most cells of one sequence.
    pub n_cells_per_seq: u32,
    /// Cells of all sequences.
    pub n_cells: u32,
    /// Whether all sequences draw on one pool of cells.
    pub unified: bool,
    /// What copying one sequence to another copies, whatever it holds, in bytes; 0 where cells are shared.
    pub stream_bytes: u64,
    /// What each cell adds to a sequence that is copied out, in bytes.
    pub cell_bytes: u64,
    /// What a sequence that is copied out takes beside its cells, in bytes.
    pub state_bytes: u64,
    /// Whether the beginning of a sequence can be copied after the sequence has gone on.
    pub keeps_beginnings: bool,
    /// What each of the last [`n_window_tokens`](Self::n_window_tokens) cells adds to that, and to a checkpoint, in bytes.
    #[serde(default)]
    pub window_cell_bytes: u64,
    /// Tokens that layers with a window look back, where they keep no more; shorter sequences can be cut. 0 without such layers, and
    /// with recurrent ones beside them.
    #[serde(default)]
    pub n_window_tokens: u32,
    /// Tokens of layers with a window that are copied out, where their cells keep more: what comes back can go on, and cannot be cut
    /// shorter. 0 where copies have all that the cells have.
    #[serde(default)]
    pub n_copied_window_tokens: u32,
    /// Whether a checkpoint is of use only where the cells of the same tokens are: not where a state is all that there is.
    #[serde(default)]
    pub checkpoints_need_cells: bool,
    /// The most rows of one step.
    pub n_batch: u32,
    /// The most rows that the device computes at once.
    pub n_ubatch: u32,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
}

impl BackendLimits {
    /// How short a sequence of `n_tokens` can be made after it was copied out and back.
    pub(crate) fn least_of_copy(&self, n_tokens: usize) -> usize {
        let is_whole = self.n_copied_window_tokens == 0 || n_tokens <= self.n_copied_window_tokens as usize;
        if is_whole { 0 } else { n_tokens }
    }

    /// Whether copies can be cut as the cells can.
    pub(crate) fn copies_keep_beginnings(&self) -> bool {
        self.keeps_beginnings && self.n_copied_window_tokens == 0
    }
}

/// One token of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The sequence it extends.
    pub seq: SeqId,
    /// The token.
    pub token: TokenId,
    /// Its place in the sequence, from 0.
    pub pos: u32,
    /// Whether the scores after it are wanted.
    pub output: bool,
}

/// A step that was not computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct StepError {
    /// Whether the cells of the step's sequences are as they were.
    pub cache_unchanged: bool,
    /// Whether they have to begin anew all the same: they are not what they were believed to be.
    pub begins_anew: bool,
    /// What went wrong.
    pub message: String,
}

impl StepError {
    /// A step that failed while its sequences were what they were believed to be.
    pub fn new(cache_unchanged: bool, message: impl Into<String>) -> Self {
        Self { cache_unchanged, begins_anew: false, message: message.into() }
    }
}
