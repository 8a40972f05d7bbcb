//! Parameters of a model and of a context, as plain values.

use std::ffi::CString;
use std::path::PathBuf;
use std::ptr;

use crate::{CallError, backend, sys};

/// How to load a model.
#[derive(Debug, Clone)]
pub struct ModelParams {
    /// Devices to use, as [`Device::index`](crate::Device::index). Empty: the CPU only.
    pub devices: Vec<usize>,
    /// Layers on those devices; the output layer counts as one.
    pub n_gpu_layers: u32,
    /// How many of those layers each device gets, in the order of `devices`. Empty: in proportion to their free memory.
    pub layers_per_device: Vec<u32>,
    /// Layers whose experts stay on the host although the layer does not.
    pub expert_layers_on_host: Vec<u32>,
    /// Let the CPU backend repack weights for its matrix units.
    pub use_extra_buffers: bool,
    /// Map the file instead of reading it.
    pub use_mmap: bool,
    /// Low-rank adapters, which every context of the model computes with.
    pub adapters: Vec<Adapter>,
    /// Load the head that predicts a further token too, if the file has one ([`ContextKind::Head`]).
    pub with_head: bool,
}

/// A low-rank adapter (LoRA), and how much of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// Its GGUF file.
    pub path: PathBuf,
    /// What its products are multiplied by, beside what the file says; 0 switches it off.
    pub scale: f32,
}

impl Default for ModelParams {
    fn default() -> Self {
        Self {
            devices: Vec::new(),
            n_gpu_layers: 0,
            layers_per_device: Vec::new(),
            expert_layers_on_host: Vec::new(),
            use_extra_buffers: true,
            use_mmap: true,
            adapters: Vec::new(),
            with_head: false,
        }
    }
}

/// The C struct, with what it points to. Moving it keeps the pointers: they lead to the heap.
pub(crate) struct RawModelParams {
    pub(crate) params: sys::llama_model_params,
    _devices: Vec<sys::ggml_backend_dev_t>,
    _split: Vec<f32>,
    _patterns: Vec<CString>,
    _overrides: Vec<sys::llama_model_tensor_buft_override>,
}

/// Devices that llama.cpp reads a share for, whatever the list of devices (`llama_max_devices`).
const MAX_DEVICES: usize = 128;

impl ModelParams {
    pub(crate) fn raw(&self) -> RawModelParams {
        backend::init();
        let n_devices = backend::n_devices();
        let mut devices: Vec<_> =
            self.devices.iter().filter(|&&index| index < n_devices).map(|&index| backend::raw_device(index)).collect();
        devices.push(ptr::null_mut());
        let mut split: Vec<f32> =
            self.layers_per_device.iter().map(|&n| f32::from(u16::try_from(n).unwrap_or(u16::MAX))).collect();
        let patterns = self.host_patterns();
        let mut overrides: Vec<_> = patterns
            .iter()
            .map(|pattern| sys::llama_model_tensor_buft_override {
                pattern: pattern.as_ptr(),
                // SAFETY: no preconditions; a static buffer type.
                buft: unsafe { sys::ggml_backend_cpu_buffer_type() },
            })
            .collect();
        // SAFETY: returns a plain struct.
        let mut params = unsafe { sys::llama_model_default_params() };
        params.devices = devices.as_mut_ptr();
        params.n_gpu_layers = i32::try_from(self.n_gpu_layers).unwrap_or(i32::MAX);
        params.load_mode = if self.use_mmap { sys::LLAMA_LOAD_MODE_MMAP } else { sys::LLAMA_LOAD_MODE_NONE };
        params.use_extra_bufts = self.use_extra_buffers;
        params.load_mtp = self.with_head;
        if split.iter().any(|&share| share > 0.0) {
            split.resize(MAX_DEVICES, 0.0);
            params.tensor_split = split.as_ptr();
        }
        if !overrides.is_empty() {
            overrides.push(sys::llama_model_tensor_buft_override { pattern: ptr::null(), buft: ptr::null_mut() });
            params.tensor_buft_overrides = overrides.as_ptr();
        }
        RawModelParams { params, _devices: devices, _split: split, _patterns: patterns, _overrides: overrides }
    }

    /// One expression for all experts that stay: llama.cpp tries each pattern on each tensor.
    fn host_patterns(&self) -> Vec<CString> {
        if self.expert_layers_on_host.is_empty() {
            return Vec::new();
        }
        let layers: Vec<String> = self.expert_layers_on_host.iter().map(u32::to_string).collect();
        let pattern = format!(r"^blk\.({})\.ffn_(up|down|gate|gate_up)_(ch|)exps", layers.join("|"));
        CString::new(pattern).into_iter().collect()
    }
}

/// Whether attention is computed without storing the score matrix.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum FlashAttention {
    /// Where the device supports it.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// Element type of the KV cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are ggml's type names")]
pub enum KvType {
    F32,
    #[default]
    F16,
    Bf16,
    Q8_0,
    Q5_1,
    Q5_0,
    Q4_1,
    Q4_0,
    Iq4Nl,
}

impl KvType {
    /// Whether the type stores blocks of several elements; llama.cpp then needs flash attention for V.
    pub fn is_quantized(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    fn raw(self) -> sys::ggml_type {
        match self {
            Self::F32 => sys::GGML_TYPE_F32,
            Self::F16 => sys::GGML_TYPE_F16,
            Self::Bf16 => sys::GGML_TYPE_BF16,
            Self::Q8_0 => sys::GGML_TYPE_Q8_0,
            Self::Q5_1 => sys::GGML_TYPE_Q5_1,
            Self::Q5_0 => sys::GGML_TYPE_Q5_0,
            Self::Q4_1 => sys::GGML_TYPE_Q4_1,
            Self::Q4_0 => sys::GGML_TYPE_Q4_0,
            Self::Iq4Nl => sys::GGML_TYPE_IQ4_NL,
        }
    }
}

/// What a context computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ContextKind {
    /// The model.
    #[default]
    Model,
    /// The model, whose hidden state after each token can be read ([`Context::hidden`](crate::Context::hidden)).
    ModelWithHidden,
    /// The model's own head for multi-token prediction (MTP, NextN): from the hidden state after a token and the token that follows,
    /// the scores of the one after that. It has cells of its own, for its one layer. llama.cpp ends the process over a head that
    /// does not go with the rest of its file: look at the header first, as `minerva_gpu::estimate::HeadShape::of` does.
    Head,
}

/// How to make a context.
#[derive(Debug, Clone)]
pub struct ContextParams {
    /// What it computes.
    pub kind: ContextKind,
    /// KV cells of all sequences together.
    pub n_ctx: u32,
    /// The most tokens of one batch.
    pub n_batch: u32,
    /// The most tokens that the device computes at once.
    pub n_ubatch: u32,
    /// Sequences.
    pub n_seq_max: u32,
    /// Threads while one token per sequence is decoded.
    pub n_threads: u32,
    /// Threads for prompts.
    pub n_threads_batch: u32,
    /// Flash attention.
    pub flash_attention: FlashAttention,
    /// Element type of the K cache.
    pub type_k: KvType,
    /// Element type of the V cache.
    pub type_v: KvType,
    /// One pool of cells for all sequences, instead of a stream of `n_ctx / n_seq_max` cells for each.
    pub kv_unified: bool,
    /// Layers with a sliding window keep the whole context, so that a sequence can be cut anywhere.
    pub full_windows: bool,
}

impl Default for ContextParams {
    fn default() -> Self {
        Self {
            kind: ContextKind::Model,
            n_ctx: 4096,
            n_batch: 2048,
            n_ubatch: 512,
            n_seq_max: 1,
            n_threads: 1,
            n_threads_batch: 1,
            flash_attention: FlashAttention::Auto,
            type_k: KvType::F16,
            type_v: KvType::F16,
            kv_unified: false,
            full_windows: true,
        }
    }
}

impl ContextParams {
    /// llama.cpp reserves an output for every sequence, and ends the process where a batch has no room for so many.
    pub(crate) fn check(&self) -> Result<(), CallError> {
        if self.n_batch < self.n_seq_max {
            let (n_batch, n_seq_max) = (self.n_batch, self.n_seq_max);
            return Err(CallError::Argument(format!(
                "a batch of {n_batch} tokens is too small for {n_seq_max} sequences"
            )));
        }
        Ok(())
    }

    pub(crate) fn raw(&self) -> sys::llama_context_params {
        let threads = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
        // SAFETY: returns a plain struct.
        let mut raw = unsafe { sys::llama_context_default_params() };
        if self.kind == ContextKind::Head {
            raw.ctx_type = sys::LLAMA_CONTEXT_TYPE_MTP;
        }
        raw.n_ctx = self.n_ctx;
        raw.n_batch = self.n_batch;
        raw.n_ubatch = self.n_ubatch;
        raw.n_seq_max = self.n_seq_max;
        raw.n_threads = threads(self.n_threads);
        raw.n_threads_batch = threads(self.n_threads_batch);
        raw.flash_attn_type = match self.flash_attention {
            FlashAttention::Auto => sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
            FlashAttention::On => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
            FlashAttention::Off => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
        };
        raw.type_k = self.type_k.raw();
        raw.type_v = self.type_v.raw();
        raw.kv_unified = self.kv_unified;
        raw.swa_full = self.full_windows;
        raw.no_perf = true;
        raw
    }
}
