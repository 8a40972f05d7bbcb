//! The tokens of one step.

use std::ptr;

use crate::error::BatchError;
use crate::{Context, Token, sys};

/// The tokens of one [`Context::decode`], each with its position, its sequence and whether its logits are wanted.
///
/// Everything that llama.cpp would index with is checked in [`push`](Self::push). Buffers are reused between steps.
#[doc(alias = "llama_batch")]
#[derive(Debug)]
pub struct Batch {
    tokens: Vec<Token>,
    positions: Vec<sys::llama_pos>,
    sequences: Vec<sys::llama_seq_id>,
    n_sequences: Vec<i32>,
    outputs: Vec<i8>,
    /// Of a head's context: shape `[n_tokens, n_hidden]`.
    hidden: Vec<f32>,
    sequence_pointers: Vec<*mut sys::llama_seq_id>,
    limits: Limits,
}

// SAFETY: the raw pointers point into `sequences` of the same struct and are written anew before each use.
unsafe impl Send for Batch {}

#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_field_names, reason = "llama.cpp's names of the four counts")]
struct Limits {
    n_batch: usize,
    n_vocab: usize,
    n_seq_max: u32,
    n_ctx_seq: u32,
    /// Width of the hidden state that comes with each token; 0 of a model's context.
    n_hidden: usize,
}

impl Batch {
    /// An empty batch for `context`, with its limits.
    pub fn new(context: &Context) -> Self {
        let n_batch = context.n_batch() as usize;
        Self {
            tokens: Vec::with_capacity(n_batch),
            positions: Vec::with_capacity(n_batch),
            sequences: Vec::with_capacity(n_batch),
            n_sequences: Vec::with_capacity(n_batch),
            outputs: Vec::with_capacity(n_batch),
            hidden: Vec::new(),
            sequence_pointers: Vec::with_capacity(n_batch + 1),
            limits: Limits {
                n_batch,
                n_vocab: context.model().n_vocab(),
                n_seq_max: context.n_seq_max(),
                n_ctx_seq: context.n_ctx_seq(),
                n_hidden: context.n_hidden_in(),
            },
        }
    }

    /// Adds a token and returns its index, which [`Context::logits`] takes when `output` is set.
    ///
    /// # Errors
    /// [`BatchError`] when the batch is full, token, sequence or position do not exist in the context, or the context is a head's.
    pub fn push(&mut self, token: Token, pos: u32, seq: u32, output: bool) -> Result<usize, BatchError> {
        self.push_after(&[], token, pos, seq, output)
    }

    /// The same for a head's context: `hidden` is the model's hidden state after the token before this one, shape `[n_hidden]`.
    ///
    /// # Errors
    /// As [`push`](Self::push), and for a state of another width.
    pub fn push_after(
        &mut self,
        hidden: &[f32],
        token: Token,
        pos: u32,
        seq: u32,
        output: bool,
    ) -> Result<usize, BatchError> {
        let Limits { n_batch, n_vocab, n_seq_max, n_ctx_seq, n_hidden } = self.limits;
        if hidden.len() != n_hidden {
            return Err(BatchError::Hidden { given: hidden.len(), n_hidden });
        }
        if self.tokens.len() >= n_batch {
            return Err(BatchError::Full { capacity: n_batch });
        }
        if usize::try_from(token).map_or(true, |token| token >= n_vocab) {
            return Err(BatchError::Token { token, n_vocab });
        }
        if seq >= n_seq_max {
            return Err(BatchError::Sequence { seq, n_seq_max });
        }
        if pos >= n_ctx_seq {
            return Err(BatchError::Position { pos, n_ctx_seq });
        }
        self.tokens.push(token);
        self.positions.push(pos.cast_signed());
        self.sequences.push(seq.cast_signed());
        self.n_sequences.push(1);
        self.outputs.push(i8::from(output));
        self.hidden.extend_from_slice(hidden);
        Ok(self.tokens.len() - 1)
    }

    /// Empties the batch and keeps its buffers.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.n_sequences.clear();
        self.outputs.clear();
        self.hidden.clear();
    }

    /// Tokens in the batch.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether the batch has no token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Which tokens asked for logits.
    pub(crate) fn outputs(&self) -> &[i8] {
        &self.outputs
    }

    /// Width of the hidden state that each of its tokens has.
    pub(crate) fn n_hidden(&self) -> usize {
        self.limits.n_hidden
    }

    /// The C view, valid until the next change of `self`.
    pub(crate) fn raw(&mut self) -> sys::llama_batch {
        self.sequence_pointers.clear();
        self.sequence_pointers.extend(self.sequences.iter_mut().map(ptr::from_mut));
        sys::llama_batch {
            n_tokens: i32::try_from(self.tokens.len()).unwrap_or(i32::MAX),
            token: self.tokens.as_mut_ptr(),
            embd: if self.limits.n_hidden == 0 { ptr::null_mut() } else { self.hidden.as_mut_ptr() },
            pos: self.positions.as_mut_ptr(),
            n_seq_id: self.n_sequences.as_mut_ptr(),
            seq_id: self.sequence_pointers.as_mut_ptr(),
            logits: self.outputs.as_mut_ptr(),
        }
    }
}
