//! What an engine is told at its start.

use std::path::{Path, PathBuf};

use minerva_gpu::DeviceChoice;
use minerva_gpu::plan::{ProjectorPlace, ProjectorWishes};
use minerva_llama::RpcServer;
use serde::{Deserialize, Serialize};

use crate::disk::DiskCache;
use crate::probe::ProbeConfig;
use crate::scheduler::{DraftLimits, Reservation};
use crate::serving::{CacheIsolation, Speculation};
use crate::tune::TuneConfig;

/// How to load a model and how much of the machine to give it. Fields that are `None` are chosen by the engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EngineConfig {
    /// The GGUF file (the first one of a split model).
    pub model_path: PathBuf,
    /// The name that the model goes by; `None` is its file name without `.gguf`.
    pub model_name: Option<String>,
    /// Where to run.
    pub device: DeviceChoice,
    /// RPC servers whose devices take layers too, beside the GPU if there is one. One that does not answer is an error.
    pub rpc_servers: Vec<RpcServer>,
    /// Layers on the GPU; never more than the model has.
    pub n_gpu_layers: Option<u32>,
    /// Layers whose experts stay on the host, the first ones of the model.
    pub n_expert_layers_on_host: Option<u32>,
    /// Run on the CPU when the GPU has no room, instead of failing.
    pub fallback_to_cpu: bool,
    /// The most device memory to use, in bytes. `None` is the default share of the device.
    pub memory_limit_bytes: Option<u64>,
    /// The most tokens one request may have, prompt and answer together.
    pub context_length_tokens: Option<u32>,
    /// KV cells that all sequences share.
    pub n_cells: Option<u32>,
    /// Sequences that are computed at once.
    pub n_seq_max: Option<u32>,
    /// The most tokens of one step.
    pub n_batch: u32,
    /// The most tokens that the device computes at once; `None` is 512, or less when memory is short.
    pub n_ubatch: Option<u32>,
    /// Compute threads while one token per sequence is decoded.
    pub n_threads: Option<u32>,
    /// Compute threads for prompts.
    pub n_threads_batch: Option<u32>,
    /// Flash attention.
    pub flash_attention: FlashAttention,
    /// Element type of the K cache.
    pub kv_type_k: KvType,
    /// Element type of the V cache.
    pub kv_type_v: KvType,
    /// An f16 cache may become q8_0 when memory is short: half the size, and slightly other answers.
    pub kv_may_quantize: bool,
    /// One pool of cells for all sequences, instead of a stream of cells per sequence.
    pub kv_unified: bool,
    /// Let the CPU backend repack weights for its matrix units (AMX, AVX-VNNI and such).
    pub use_extra_buffers: bool,
    /// Map the model file instead of reading it.
    pub use_mmap: bool,
    /// Requests that may wait; one more is refused.
    pub max_queued_requests: usize,
    /// Prompt tokens that may wait; a request that would pass this is refused.
    pub max_queued_tokens: usize,
    /// The longest gap between two tokens of a stream that prompts of others may cause, in milliseconds, as far as steps can be cut
    /// that short. `None`: about two and a half times what it is without them.
    pub max_itl_ms: Option<u64>,
    /// Host memory for what sequences held when they had to give their cells away, in bytes; 0 for none. `None` is a sixteenth
    /// of the host's memory, at most 8 GiB and a quarter of what the model leaves free.
    pub host_cache_bytes: Option<u64>,
    /// The most checkpoints of one text in that memory, where a sequence's memory cannot be cut (recurrent, hybrid and windowed models);
    /// 0 for none.
    pub max_checkpoints: u32,
    /// With one pool of cells (`kv_unified`), how many of them are set aside for a request.
    pub reservation: Reservation,
    /// Files for what does not fit there, and for later runs; `None` for none.
    pub disk_cache: Option<DiskCache>,
    /// A file for what is asked of the scheduler and what it answers, without any token of a prompt or answer; `cargo xtask replay`
    /// runs it again.
    pub trace_path: Option<PathBuf>,
    /// How the next tokens of a sequence are guessed.
    pub speculation: Speculation,
    /// A small model of the same vocabulary that writes ahead of the main one. It is given up before layers of the main model are.
    pub draft: Option<DraftConfig>,
    /// How far that model, or the model's own head, writes ahead.
    pub drafting: DraftingConfig,
    /// Low-rank adapters of the model, all of them used for every request.
    pub adapters: Vec<AdapterConfig>,
    /// Who shares the cells of equal beginnings.
    pub cache_isolation: CacheIsolation,
    /// A chat template to use in place of the model's.
    pub chat_template: Option<String>,
    /// Try devices in a child process before this one touches them. `None`: whatever crashes when it is touched takes this
    /// process along.
    pub probe: Option<ProbeConfig>,
    /// Measure the settings that are left open (flash attention, cache, threads, micro-batch) and take the fastest. Off by default.
    pub tune: TuneConfig,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            model_path: PathBuf::new(),
            model_name: None,
            device: DeviceChoice::Auto,
            rpc_servers: Vec::new(),
            n_gpu_layers: None,
            n_expert_layers_on_host: None,
            fallback_to_cpu: true,
            memory_limit_bytes: None,
            context_length_tokens: None,
            n_cells: None,
            n_seq_max: None,
            n_batch: 2048,
            n_ubatch: None,
            n_threads: None,
            n_threads_batch: None,
            flash_attention: FlashAttention::Auto,
            kv_type_k: KvType::F16,
            kv_type_v: KvType::F16,
            kv_may_quantize: false,
            kv_unified: false,
            use_extra_buffers: true,
            use_mmap: true,
            max_queued_requests: 256,
            max_queued_tokens: 1 << 20,
            max_itl_ms: None,
            host_cache_bytes: None,
            max_checkpoints: 32,
            reservation: Reservation::Expected,
            disk_cache: None,
            trace_path: None,
            speculation: Speculation::Auto,
            draft: None,
            drafting: DraftingConfig::default(),
            adapters: Vec::new(),
            cache_isolation: CacheIsolation::None,
            chat_template: None,
            probe: None,
            tune: TuneConfig::default(),
        }
    }
}

/// A low-rank adapter (LoRA) and how much of it is used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    /// The GGUF file.
    pub path: PathBuf,
    /// What it adds is multiplied by this, beside the file's own `alpha`.
    pub scale: f32,
}

/// A projector of images or sound that a plan leaves room for. The engine does not load projectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProjectorConfig {
    /// The GGUF file: `general.architecture` is `clip`.
    pub path: PathBuf,
    /// It goes onto the host, whatever room there is on devices.
    pub on_host: bool,
    /// The most tokens of one picture, for kinds that have no fixed size.
    pub image_max_tokens: Option<u32>,
}

impl ProjectorConfig {
    /// What is fixed about it, for the planner.
    pub(crate) fn wishes(&self) -> ProjectorWishes {
        let place = if self.on_host { ProjectorPlace::Host } else { ProjectorPlace::Beside };
        ProjectorWishes { place, image_max_tokens: self.image_max_tokens }
    }
}

/// A draft model, and where it goes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DraftConfig {
    /// The GGUF file (the first one of a split model).
    pub model_path: PathBuf,
    /// Where to run: `auto` is beside most layers of the main model, `cpu` the host; anything else has to be one of the main
    /// model's devices.
    pub device: DeviceChoice,
    /// Layers on the device; never more than the model has. `None`: all.
    pub n_gpu_layers: Option<u32>,
    /// KV cells of the draft model. `None`: as many as one sequence of the main model has, or all share.
    pub n_cells: Option<u32>,
}

/// How far a draft model, or the model's own head for multi-token prediction, writes ahead.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DraftingConfig {
    /// The most tokens of a guess; how many pay is found out.
    pub max_tokens: u32,
    /// Where no guess of so many tokens has room, or whoever guesses is sure of fewer, there is none.
    pub min_tokens: u32,
    /// A token less likely than this ends a guess, 0 to 1.
    pub min_probability: f32,
}

impl Default for DraftingConfig {
    fn default() -> Self {
        Self { max_tokens: 16, min_tokens: 0, min_probability: 0.5 }
    }
}

impl DraftConfig {
    /// The defaults for one model file.
    pub fn new(model_path: impl AsRef<Path>) -> Self {
        Self { model_path: model_path.as_ref().to_path_buf(), ..Self::default() }
    }
}

impl DraftingConfig {
    /// How long guesses may be.
    pub(crate) fn limits(&self) -> DraftLimits {
        DraftLimits { max_tokens: self.max_tokens, min_tokens: self.min_tokens }
    }
}

impl EngineConfig {
    /// The defaults for one model file.
    pub fn new(model_path: impl AsRef<Path>) -> Self {
        Self { model_path: model_path.as_ref().to_path_buf(), ..Self::default() }
    }

    /// The name that the model goes by.
    pub fn model_name(&self) -> String {
        self.model_name.clone().unwrap_or_else(|| {
            self.model_path.file_stem().map_or_else(|| "model".to_owned(), |stem| stem.to_string_lossy().into_owned())
        })
    }
}

/// Whether attention is computed without storing the whole score matrix.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlashAttention {
    /// Where the device supports it.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never. A quantized V cache needs flash attention and is refused.
    Off,
}

impl From<FlashAttention> for minerva_llama::FlashAttention {
    fn from(wished: FlashAttention) -> Self {
        match wished {
            FlashAttention::Auto => Self::Auto,
            FlashAttention::On => Self::On,
            FlashAttention::Off => Self::Off,
        }
    }
}

/// Element type of the KV cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names are ggml's type names")]
pub enum KvType {
    F32,
    #[default]
    F16,
    Bf16,
    #[serde(rename = "q8_0")]
    Q8_0,
    #[serde(rename = "q5_1")]
    Q5_1,
    #[serde(rename = "q5_0")]
    Q5_0,
    #[serde(rename = "q4_1")]
    Q4_1,
    #[serde(rename = "q4_0")]
    Q4_0,
    #[serde(rename = "iq4_nl")]
    Iq4Nl,
}

impl KvType {
    /// ggml's name of the type.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q5_1 => "q5_1",
            Self::Q5_0 => "q5_0",
            Self::Q4_1 => "q4_1",
            Self::Q4_0 => "q4_0",
            Self::Iq4Nl => "iq4_nl",
        }
    }

    /// Whether the type stores blocks of several elements; a V cache of it needs flash attention.
    pub(crate) fn is_quantized(self) -> bool {
        minerva_llama::KvType::from(self).is_quantized()
    }
}

impl From<KvType> for minerva_llama::KvType {
    fn from(kv_type: KvType) -> Self {
        match kv_type {
            KvType::F32 => Self::F32,
            KvType::F16 => Self::F16,
            KvType::Bf16 => Self::Bf16,
            KvType::Q8_0 => Self::Q8_0,
            KvType::Q5_1 => Self::Q5_1,
            KvType::Q5_0 => Self::Q5_0,
            KvType::Q4_1 => Self::Q4_1,
            KvType::Q4_0 => Self::Q4_0,
            KvType::Iq4Nl => Self::Iq4Nl,
        }
    }
}
