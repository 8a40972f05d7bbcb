//! The weights and the vocabulary of one GGUF file.

use std::ffi::{CString, c_void};
use std::fs::File;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, PoisonError};

use crate::adapters::Adapters;
use crate::error::{CallError, LoadError, call};
use crate::params::RawModelParams;
use crate::rpc::{Link, links_of};
use crate::{ModelParams, backend, log, sys};

/// Loads are one at a time: a simulated load replaces the process-wide log callback, and the last error line of the log
/// is the only reason that llama.cpp gives.
pub(crate) static LOADING: Mutex<()> = Mutex::new(());

/// The weights and the vocabulary of one GGUF file.
#[doc(alias = "llama_model")]
#[derive(Debug)]
pub struct Model {
    raw: NonNull<sys::llama_model>,
    n_vocab: usize,
    has_head: bool,
    adapters: Adapters,
    /// The RPC servers that hold a part of it.
    links: Vec<Arc<Link>>,
}

// SAFETY: a loaded model is read-only: contexts on other threads read the weights, and llama.h documents the
// tokenization functions as thread-safe (docs/ffi.md, "Threads"). The only mutation, freeing, is in `drop`.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Model {
    /// Loads a GGUF file. `progress` gets a fraction from 0 to 1 and may stop the load.
    ///
    /// # Errors
    /// [`LoadError::File`] when the file or that of an adapter cannot be opened, [`LoadError::Cancelled`] when `progress` stopped the load,
    /// [`LoadError::DeviceLost`] when an RPC server went away meanwhile, [`LoadError::Call`] with the last line of
    /// llama.cpp's log when the file is not a model it can load.
    #[doc(alias = "llama_model_load_from_file")]
    pub fn load(
        path: &Path,
        params: &ModelParams,
        progress: &mut dyn FnMut(f32) -> ControlFlow<()>,
    ) -> Result<Arc<Self>, LoadError> {
        Self::load_raw(path, params, params.raw(), progress)
    }

    /// Reads the header and places every tensor, but makes no room for it: only its contexts' sizes can be asked for.
    ///
    /// `overrides` replace metadata of the file, up to the one with an empty key.
    pub(crate) fn load_without_weights(
        path: &Path,
        params: &ModelParams,
        overrides: &[sys::llama_model_kv_override],
    ) -> Result<Arc<Self>, LoadError> {
        let mut raw = params.raw();
        raw.params.kv_overrides = overrides.as_ptr();
        raw.params.no_alloc = true;
        raw.params.load_mode = sys::LLAMA_LOAD_MODE_NONE; // a mapping of the file is an allocation
        Self::load_raw(path, params, raw, &mut |_| ControlFlow::Continue(()))
    }

    fn load_raw(
        path: &Path,
        params: &ModelParams,
        mut raw: RawModelParams,
        progress: &mut dyn FnMut(f32) -> ControlFlow<()>,
    ) -> Result<Arc<Self>, LoadError> {
        let c_path = model_path(path)?;
        let raw_params = &mut raw.params;
        let mut state = Progress { report: progress, cancelled: false };
        let only_sizes = raw_params.no_alloc;
        raw_params.progress_callback = Some(on_progress);
        raw_params.progress_callback_user_data = (&raw mut state).cast::<c_void>();

        let guard = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        log::take_last_error(); // of an earlier call: the reason must be this load's
        let mut raw = ptr::null_mut();
        // SAFETY: path, params, what they point to and `state` outlive the call; `raw` receives the model.
        let result =
            call(|error| unsafe { sys::mnv_model_load(c_path.as_ptr(), &raw const *raw_params, &raw mut raw, error) });
        drop(guard);
        if state.cancelled {
            if let Some(raw) = NonNull::new(raw) {
                // SAFETY: a model that was just made and is used nowhere else.
                unsafe { sys::llama_model_free(raw.as_ptr()) };
            }
            return Err(LoadError::Cancelled);
        }
        let links = links_of(&params.devices);
        if let Some(link) = links.iter().find(|link| link.is_lost()) {
            if let Some(raw) = NonNull::new(raw) {
                // SAFETY: as above.
                unsafe { sys::llama_model_free(raw.as_ptr()) };
            }
            return Err(LoadError::DeviceLost { address: link.address.clone() });
        }
        result?;
        let raw = NonNull::new(raw).ok_or_else(|| CallError::Refused("no model was returned".into()))?;
        // SAFETY: a live model.
        let vocab = unsafe { sys::llama_model_get_vocab(raw.as_ptr()) };
        // SAFETY: a live model's vocabulary.
        let n_vocab = unsafe { sys::llama_vocab_n_tokens(vocab) };
        let n_vocab = usize::try_from(n_vocab).unwrap_or(0);
        // SAFETY: a live model.
        let has_head = params.with_head && unsafe { sys::llama_model_n_layer_nextn(raw.as_ptr()) } == 1;
        let mut model = Self { raw, n_vocab, has_head, adapters: Adapters::default(), links };
        let guard = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        let adapters = Adapters::load(raw, &params.adapters, only_sizes);
        drop(guard);
        if let Some(address) = model.lost_server() {
            return Err(LoadError::DeviceLost { address: address.to_owned() });
        }
        model.adapters = adapters?;
        Ok(Arc::new(model))
    }

    pub(crate) fn adapters(&self) -> &Adapters {
        &self.adapters
    }

    /// The address of an RPC server that held a part of this model and went away: nothing computes on it any more.
    pub fn lost_server(&self) -> Option<&str> {
        self.links.iter().find(|link| link.is_lost()).map(|link| link.address.as_str())
    }

    pub(crate) fn raw(&self) -> *mut sys::llama_model {
        self.raw.as_ptr()
    }

    pub(crate) fn raw_vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: the model is live; the vocabulary lives as long as it does.
        unsafe { sys::llama_model_get_vocab(self.raw.as_ptr()) }
    }

    /// Tokens of the vocabulary, which is also the length of a row of logits.
    pub fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    /// Whether it was loaded with a head for multi-token prediction.
    pub fn has_head(&self) -> bool {
        self.has_head
    }

    /// Width of the hidden state after each token, as a head takes it.
    #[doc(alias = "llama_model_n_embd_out")]
    pub fn n_hidden(&self) -> usize {
        // SAFETY: the model is live.
        usize::try_from(unsafe { sys::llama_model_n_embd_out(self.raw.as_ptr()) }).unwrap_or(0)
    }

    /// llama.cpp's heads take this for granted.
    pub(crate) fn hidden_is_as_wide_as_the_model(&self) -> bool {
        // SAFETY: the model is live.
        let n_embd = unsafe { sys::llama_model_n_embd(self.raw.as_ptr()) };
        usize::try_from(n_embd) == Ok(self.n_hidden())
    }

    /// The context the model was trained for, in tokens.
    pub fn context_train_tokens(&self) -> u32 {
        // SAFETY: the model is live.
        unsafe { sys::llama_model_n_ctx_train(self.raw.as_ptr()) }.unsigned_abs()
    }

    /// Transformer layers.
    pub fn n_layers(&self) -> u32 {
        // SAFETY: the model is live.
        unsafe { sys::llama_model_n_layer(self.raw.as_ptr()) }.unsigned_abs()
    }

    /// Parameters.
    pub fn n_params(&self) -> u64 {
        // SAFETY: the model is live.
        unsafe { sys::llama_model_n_params(self.raw.as_ptr()) }
    }

    /// Bytes of all weights.
    pub fn size_bytes(&self) -> u64 {
        // SAFETY: the model is live.
        unsafe { sys::llama_model_size(self.raw.as_ptr()) }
    }

    /// Whether the model generates text: it has a decoder and no encoder to be fed first.
    pub fn is_generative(&self) -> bool {
        // SAFETY: the model is live.
        let has_decoder = unsafe { sys::llama_model_has_decoder(self.raw.as_ptr()) };
        // SAFETY: the model is live.
        let has_encoder = unsafe { sys::llama_model_has_encoder(self.raw.as_ptr()) };
        has_decoder && !has_encoder
    }

    /// Whether a sequence's memory is a state that cannot be cut at any token (recurrent and hybrid models).
    pub fn is_recurrent(&self) -> bool {
        // SAFETY: the model is live.
        let recurrent = unsafe { sys::llama_model_is_recurrent(self.raw.as_ptr()) };
        // SAFETY: the model is live.
        recurrent || unsafe { sys::llama_model_is_hybrid(self.raw.as_ptr()) }
    }

    /// Whether a state is all that a sequence holds, without any cells.
    #[doc(alias = "llama_model_is_recurrent")]
    pub fn is_only_recurrent(&self) -> bool {
        // SAFETY: the model is live.
        let is_hybrid = unsafe { sys::llama_model_is_hybrid(self.raw.as_ptr()) };
        self.is_recurrent() && !is_hybrid
    }

    /// Tokens that layers with a window look back, if there are such layers; 0 if not.
    #[doc(alias = "llama_model_n_swa")]
    pub fn n_window_tokens(&self) -> u32 {
        // SAFETY: the model is live.
        u32::try_from(unsafe { sys::llama_model_n_swa(self.raw.as_ptr()) }).unwrap_or(0)
    }

    /// llama.cpp's description, such as `llama 135M Q4_1`.
    pub fn description(&self) -> String {
        let mut buffer = [0; 256];
        // SAFETY: the buffer's length is passed; llama.cpp writes a NUL-terminated string into it.
        unsafe { sys::llama_model_desc(self.raw.as_ptr(), buffer.as_mut_ptr(), buffer.len()) };
        backend::text(buffer.as_ptr())
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: made by `mnv_model_load`, freed only here; contexts hold an `Arc` of this, so none is left.
        unsafe { sys::llama_model_free(self.raw.as_ptr()) };
    }
}

/// The path as C wants it, after a look whether it can be opened at all: llama.cpp's own message hides the reason.
pub(crate) fn model_path(path: &Path) -> Result<CString, LoadError> {
    File::open(path).map_err(|source| LoadError::File { path: path.to_path_buf(), source })?;
    CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| CallError::Argument("the model path contains a NUL byte".into()).into())
}

struct Progress<'a> {
    report: &'a mut dyn FnMut(f32) -> ControlFlow<()>,
    cancelled: bool,
}

unsafe extern "C" fn on_progress(fraction: f32, user_data: *mut c_void) -> bool {
    // SAFETY: `Model::load` passes its `Progress`, which outlives the load; llama.cpp calls from the loading thread only.
    let state = unsafe { &mut *user_data.cast::<Progress<'_>>() };
    // A panic must not unwind into C; it ends the load like a cancellation.
    let step = catch_unwind(AssertUnwindSafe(|| (state.report)(fraction))).unwrap_or(ControlFlow::Break(()));
    state.cancelled |= step.is_break();
    step.is_continue()
}
