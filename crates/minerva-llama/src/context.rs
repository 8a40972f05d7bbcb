//! The KV cache and compute buffers of one model, and the step function.

use std::ptr::{self, NonNull};
use std::slice;
use std::sync::{Arc, PoisonError};

use crate::error::{CallError, DecodeError, LoadError, call};
use crate::model::LOADING;
use crate::{Batch, ContextKind, ContextParams, Model, ThreadPool, log, sys};

/// The KV cache and compute buffers of one [`Model`].
#[doc(alias = "llama_context")]
#[derive(Debug)]
pub struct Context {
    raw: NonNull<sys::llama_context>,
    /// Which tokens of the last decode have logits.
    outputs: Vec<i8>,
    kind: ContextKind,
    /// Width of a hidden state.
    n_hidden: usize,
    n_batch: u32,
    n_ubatch: u32,
    n_seq_max: u32,
    n_ctx: u32,
    n_ctx_seq: u32,
    kv_unified: bool,
    full_windows: bool,
    // Fields drop in this order, after `Drop::drop` freed `raw`: the pools and the weights outlive the context.
    pools: Vec<ThreadPool>,
    model: Arc<Model>,
}

// SAFETY: llama.cpp asks for one object on one thread at a time (docs/ffi.md, "Threads"). Each call that reaches `raw`
// takes `&mut self` or only reads what does not change, so this holds after a move. Deliberately not `Sync`.
unsafe impl Send for Context {}

impl Context {
    /// Makes a context with thread pools of its own.
    ///
    /// # Errors
    /// [`LoadError::DeviceLost`] when an RPC server went away, [`LoadError::Call`] when memory for cells or buffers is missing, or the parameters do not fit the model.
    #[doc(alias = "llama_init_from_model")]
    pub fn new(model: &Arc<Model>, params: &ContextParams) -> Result<Self, LoadError> {
        if params.kind == ContextKind::Head && !model.has_head() {
            return Err(CallError::Argument("the model was loaded without a head".into()).into());
        }
        if params.kind != ContextKind::Model && !model.hidden_is_as_wide_as_the_model() {
            return Err(
                CallError::Argument("the model's hidden states have another width than a head takes".into()).into()
            );
        }
        params.check()?;
        let raw_params = params.raw();
        let guard = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut raw = ptr::null_mut();
        // SAFETY: a live model and live parameters; `raw` receives the context.
        let result =
            call(|error| unsafe { sys::mnv_context_new(model.raw(), &raw const raw_params, &raw mut raw, error) });
        drop(guard);
        if let Some(address) = model.lost_server() {
            if !raw.is_null() {
                // SAFETY: a context that was just made and is used nowhere else.
                unsafe { sys::llama_free(raw) };
            }
            return Err(LoadError::DeviceLost { address: address.to_owned() });
        }
        result?;
        let raw = NonNull::new(raw).ok_or_else(|| CallError::Refused("no context was returned".into()))?;
        let mut context = Self {
            raw,
            outputs: Vec::new(),
            kind: params.kind,
            n_hidden: model.n_hidden(),
            // SAFETY: a live context.
            n_batch: unsafe { sys::llama_n_batch(raw.as_ptr()) },
            // SAFETY: a live context.
            n_ubatch: unsafe { sys::llama_n_ubatch(raw.as_ptr()) },
            // SAFETY: a live context.
            n_seq_max: unsafe { sys::llama_n_seq_max(raw.as_ptr()) },
            // SAFETY: a live context.
            n_ctx: unsafe { sys::llama_n_ctx(raw.as_ptr()) },
            // SAFETY: a live context.
            n_ctx_seq: unsafe { sys::llama_n_ctx_seq(raw.as_ptr()) },
            kv_unified: params.kv_unified,
            full_windows: params.full_windows,
            pools: Vec::new(),
            model: Arc::clone(model),
        };
        context.attach_pools(params)?;
        context.model.adapters().use_in(raw)?;
        if params.kind != ContextKind::Model {
            // SAFETY: a live context that nobody computes with yet.
            call(|error| unsafe { sys::mnv_keep_hidden(raw.as_ptr(), error) })?;
        }
        Ok(context)
    }

    fn attach_pools(&mut self, params: &ContextParams) -> Result<(), CallError> {
        let decode = ThreadPool::new(params.n_threads, ThreadPool::DEFAULT_POLL)?;
        let batch = if params.n_threads_batch == params.n_threads {
            None
        } else {
            Some(ThreadPool::new(params.n_threads_batch, ThreadPool::DEFAULT_POLL)?)
        };
        let batch_raw = batch.as_ref().map_or(decode.raw(), ThreadPool::raw);
        // SAFETY: a live context; both pools are kept beside it and freed after it.
        unsafe { sys::llama_attach_threadpool(self.raw.as_ptr(), decode.raw(), batch_raw) };
        self.pools.push(decode);
        self.pools.extend(batch);
        Ok(())
    }

    /// Computes one step. On success the logits of the tokens that asked for them can be read.
    ///
    /// # Errors
    /// One variant per code of `llama_decode`; [`DecodeError::cache_unchanged`] tells whether the step's sequences are
    /// still what they were.
    #[doc(alias = "llama_decode")]
    pub fn decode(&mut self, batch: &mut Batch) -> Result<(), DecodeError> {
        let n_tokens = batch.len();
        self.outputs.clear();
        if n_tokens == 0 {
            return Ok(());
        }
        if batch.n_hidden() != self.n_hidden_in() {
            // It was made for another context.
            return Err(DecodeError::InvalidBatch {
                n_tokens,
                reason: "the hidden states are those of another context".into(),
            });
        }
        self.check_servers()?;
        let raw_batch = batch.raw();
        let mut code = 0;
        // SAFETY: `raw_batch` points into `batch`, which is borrowed for the call, and was checked token by token.
        call(|error| unsafe { sys::mnv_decode(self.raw.as_ptr(), &raw const raw_batch, &raw mut code, error) })?;
        if code != 0 {
            self.check_servers()?; // the better reason
        }
        let reason = || log::take_last_error().unwrap_or_else(|| "no reason in its log".into());
        match code {
            0 => {
                // SAFETY: a live context. Waits for devices that compute in the background, under the shim's guard.
                call(|error| unsafe { sys::mnv_synchronize(self.raw.as_ptr(), error) })?;
                self.check_servers()?; // after the wait: what a lost server did not send reads as zeros
                self.outputs.extend_from_slice(batch.outputs());
                Ok(())
            }
            1 => Err(DecodeError::NoRoom { n_tokens }),
            2 => Err(DecodeError::Aborted { n_tokens }),
            -1 => Err(DecodeError::InvalidBatch { n_tokens, reason: reason() }),
            code => Err(DecodeError::Failed { n_tokens, code, reason: reason() }),
        }
    }

    fn check_servers(&self) -> Result<(), DecodeError> {
        match self.model.lost_server() {
            None => Ok(()),
            Some(address) => Err(DecodeError::DeviceLost { address: address.to_owned() }),
        }
    }

    /// Scores for the batch token `i` of the last [`decode`](Self::decode): shape `[n_vocab]`, before softmax.
    /// `None` if that token asked for no output. The slice borrows the context, so no decode can run under it.
    #[doc(alias = "llama_get_logits_ith")]
    pub fn logits(&self, i: usize) -> Option<&[f32]> {
        // Checked here: a debug build of llama.cpp aborts on a bad index.
        if self.outputs.get(i).is_none_or(|&output| output == 0) {
            return None;
        }
        let index = i32::try_from(i).ok()?;
        // SAFETY: `raw` is live, token `i` asked for output, and `decode` already synchronised, so this only reads;
        // the context is not `Sync`, so no other thread is in it.
        let row = NonNull::new(unsafe { sys::llama_get_logits_ith(self.raw.as_ptr(), index) })?;
        // SAFETY: a non-null row is `n_vocab` floats that stay put until the next `&mut self` call.
        Some(unsafe { slice::from_raw_parts(row.as_ptr(), self.model.n_vocab()) })
    }

    /// The hidden state after each token of the last [`decode`](Self::decode), whether or not it asked for output: shape
    /// `[n_tokens, n_hidden]`. Empty for a context that keeps none.
    pub fn hidden(&mut self) -> &[f32] {
        let n = self.outputs.len() * self.n_hidden;
        if self.kind == ContextKind::Model || n == 0 {
            return &[];
        }
        let mut rows = ptr::null();
        // SAFETY: a live context, which this thread has alone. Puts the rows into the order of the batch.
        let done = call(|error| unsafe { sys::mnv_hidden(self.raw.as_ptr(), &raw mut rows, error) });
        match NonNull::new(rows.cast_mut()) {
            // SAFETY: the last step, which succeeded, left a row of `n_hidden` floats for each of its tokens; they stay put until the
            // next `&mut self` call.
            Some(rows) if done.is_ok() => unsafe { slice::from_raw_parts(rows.as_ptr(), n) },
            _ => &[],
        }
    }

    /// Room on the host for the hidden states of a batch, which llama.cpp's own figures leave out, in bytes.
    pub(crate) fn hidden_bytes(&self) -> u64 {
        if self.kind == ContextKind::Model { 0 } else { 4 * self.n_hidden as u64 * u64::from(self.n_batch) }
    }

    /// Width of the hidden state that its batches have with each token: 0 unless it is a head's.
    pub(crate) fn n_hidden_in(&self) -> usize {
        if self.kind == ContextKind::Head { self.n_hidden } else { 0 }
    }

    /// The model that this context runs.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The most tokens of one batch.
    pub fn n_batch(&self) -> u32 {
        self.n_batch
    }

    /// The most tokens that the device computes at once.
    pub fn n_ubatch(&self) -> u32 {
        self.n_ubatch
    }

    /// Sequences.
    pub fn n_seq_max(&self) -> u32 {
        self.n_seq_max
    }

    /// KV cells of all sequences.
    pub fn n_ctx(&self) -> u32 {
        self.n_ctx
    }

    /// The most KV cells that one sequence can have.
    pub fn n_ctx_seq(&self) -> u32 {
        self.n_ctx_seq
    }

    /// Whether the beginning of a sequence can be copied after the sequence has gone on: not from recurrent memory, and not where
    /// windowed layers keep their window only.
    pub fn keeps_beginnings(&self) -> bool {
        !self.model.is_recurrent() && !self.has_short_windows()
    }

    /// Whether layers with a window keep nothing else.
    pub(crate) fn has_short_windows(&self) -> bool {
        !self.full_windows && self.model.n_window_tokens() > 0
    }

    /// Whether all sequences share one pool of cells.
    pub fn kv_unified(&self) -> bool {
        self.kv_unified
    }

    pub(crate) fn raw(&self) -> *mut sys::llama_context {
        self.raw.as_ptr()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by `mnv_context_new`, freed only here; its pools and its model are still alive.
        unsafe { sys::llama_free(self.raw.as_ptr()) };
    }
}
