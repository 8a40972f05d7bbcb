//! One typed error per documented return code, and the texts of caught C++ exceptions.

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::path::PathBuf;

use crate::{log, sys};

/// A C++ call that did not go through.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// A C++ exception was caught at the boundary.
    #[error("llama.cpp threw: {0}")]
    Exception(String),
    /// The system had no memory left for the call.
    #[error("out of host memory inside llama.cpp")]
    NoMemory,
    /// llama.cpp returned nothing; the text is what its log said.
    #[error("llama.cpp refused: {0}")]
    Refused(String),
    /// A value does not fit the C API.
    #[error("{0}")]
    Argument(String),
}

/// Why a model or its context could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot read the model file {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The progress callback asked to stop.
    #[error("loading was cancelled")]
    Cancelled,
    /// An RPC server that was to hold a part of the model went away.
    #[error("the RPC server {address} was lost")]
    DeviceLost {
        /// As it was given.
        address: String,
    },
    /// llama.cpp failed.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// Why a decode did not finish: one variant per documented return code of `llama_decode`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Code 1. The cache is unchanged: free a sequence or send fewer tokens.
    #[error("no KV cache room for a batch of {n_tokens} tokens")]
    NoRoom {
        /// Tokens of the batch.
        n_tokens: usize,
    },
    /// Code 2, from the abort callback. Part of the batch may be in the cache: drop its sequences.
    #[error("the computation of {n_tokens} tokens was aborted")]
    Aborted {
        /// Tokens of the batch.
        n_tokens: usize,
    },
    /// Code -1. The cache is unchanged.
    #[error("llama.cpp found a batch of {n_tokens} tokens invalid: {reason}")]
    InvalidBatch {
        /// Tokens of the batch.
        n_tokens: usize,
        /// What its log said.
        reason: String,
    },
    /// Below -1. Part of the batch may be in the cache: drop its sequences.
    #[error("llama.cpp failed to decode {n_tokens} tokens (code {code}): {reason}")]
    Failed {
        /// Tokens of the batch.
        n_tokens: usize,
        /// The code.
        code: i32,
        /// What its log said.
        reason: String,
    },
    /// An RPC server that holds a part of the model went away. Nothing computes on this model any more.
    #[error("the RPC server {address} was lost, and the part of the model that it held")]
    DeviceLost {
        /// As it was given.
        address: String,
    },
    /// An exception was caught. Part of the batch may be in the cache: drop its sequences.
    #[error(transparent)]
    Call(#[from] CallError),
}

impl DecodeError {
    /// Whether the cells of the batch's sequences are as they were before.
    pub fn cache_unchanged(&self) -> bool {
        matches!(self, Self::NoRoom { .. } | Self::InvalidBatch { .. })
    }
}

/// Why a token cannot join a batch. Checked here because llama.cpp reads out of bounds or aborts on these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// The batch holds as many tokens as it may.
    #[error("the batch is full: {capacity} tokens")]
    Full {
        /// Its limit.
        capacity: usize,
    },
    /// The token is not in the vocabulary.
    #[error("token {token} is outside the vocabulary of {n_vocab}")]
    Token {
        /// The token.
        token: i32,
        /// Tokens of the vocabulary.
        n_vocab: usize,
    },
    /// The sequence does not exist.
    #[error("sequence {seq} does not exist: the context has {n_seq_max}")]
    Sequence {
        /// The sequence.
        seq: u32,
        /// Sequences of the context.
        n_seq_max: u32,
    },
    /// The hidden state is not one that the context takes with a token.
    #[error("a hidden state of {given} numbers, the context takes {n_hidden}")]
    Hidden {
        /// Its width.
        given: usize,
        /// The width that the context takes, 0 unless it is a head's.
        n_hidden: usize,
    },
    /// The position is past the context of a sequence.
    #[error("position {pos} is past the {n_ctx_seq} cells of a sequence")]
    Position {
        /// The position.
        pos: u32,
        /// Cells of one sequence.
        n_ctx_seq: u32,
    },
}

/// Runs one shim call and turns its status and text into a result. `MNV_TOO_SMALL` is for the caller to read.
pub(crate) fn call(f: impl FnOnce(*mut sys::mnv_error) -> c_int) -> Result<c_int, CallError> {
    let mut error = MaybeUninit::<sys::mnv_error>::zeroed();
    let status = f(error.as_mut_ptr());
    // SAFETY: all bytes were zeroed, which is a valid `[c_char; 512]`, and the shim only writes text into it.
    let error = unsafe { error.assume_init() };
    let text = || {
        let bytes: Vec<u8> = error.text.iter().take_while(|&&c| c != 0).map(|&c| c.cast_unsigned()).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    match status {
        sys::MNV_OK | sys::MNV_TOO_SMALL => Ok(status),
        sys::MNV_NULL => Err(CallError::Refused(log::take_last_error().unwrap_or_else(|| match text() {
            said if said.is_empty() => "no reason in its log".into(),
            said => said,
        }))),
        sys::MNV_NO_MEMORY => Err(CallError::NoMemory),
        _ => Err(CallError::Exception(text())),
    }
}
