//! What an engine says about itself: the loaded model, where it runs, and counters. Reading them never waits for a step.

use serde::{Deserialize, Serialize};

use crate::config::AdapterConfig;
use crate::scheduler::Miss;
use crate::tune::TuneReport;

/// The loaded model and where it runs; fixed for the life of the engine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// The name that requests use.
    pub name: String,
    /// llama.cpp's description, such as `llama 135M Q4_1`.
    pub description: String,
    /// Parameters of the model.
    pub n_params: u64,
    /// Bytes of all weights.
    pub size_bytes: u64,
    /// Transformer layers.
    pub n_layers: u32,
    /// Tokens of the vocabulary.
    pub n_vocab: u32,
    /// The context the model was trained for, in tokens.
    pub context_train_tokens: u32,
    /// The most tokens that one request may have, prompt and answer together.
    pub context_length_tokens: u32,
    /// Sequences that are computed at once.
    pub n_seq_max: u32,
    /// KV cells of all sequences.
    pub n_cells: u32,
    /// Whether the model has a chat template.
    pub has_chat_template: bool,
    /// The model that writes ahead of it, if one does.
    pub draft: Option<DraftInfo>,
    /// Low-rank adapters that every request is computed with.
    pub adapters: Vec<AdapterInfo>,
    /// Where it runs.
    pub placement: Placement,
}

/// A low-rank adapter that is loaded.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AdapterInfo {
    /// Its file's name without `.gguf`.
    pub name: String,
    /// What it adds is multiplied by this.
    pub scale: f32,
}

impl From<&AdapterConfig> for AdapterInfo {
    fn from(config: &AdapterConfig) -> Self {
        let name = config.path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        Self { name, scale: config.scale }
    }
}

/// A draft model: what it is, where it runs and what it takes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DraftInfo {
    /// Its file's name without `.gguf`.
    pub name: String,
    /// llama.cpp's description.
    pub description: String,
    /// Parameters of the model.
    pub n_params: u64,
    /// Bytes of all weights.
    pub size_bytes: u64,
    /// Layers on its device.
    pub n_gpu_layers: u32,
    /// KV cells.
    pub n_cells: u32,
    /// The memory of its device and of the host; what is free there is without what the main model takes.
    pub memory: Vec<DeviceMemory>,
}

/// Where the model runs, how much memory that takes, and why it is so.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    /// `Cpu`, `Cuda` or `Metal`; `Rpc` when all layers that are not on the CPU are on RPC servers.
    pub device: String,
    /// The device's own name.
    pub device_name: String,
    /// Layers on the GPU.
    pub n_gpu_layers: u32,
    /// Layers that could be there: the model's layers and its output layer.
    pub n_layers_total: u32,
    /// Layers on the GPU whose experts are not.
    pub n_expert_layers_on_host: u32,
    /// Why not more layers are on the GPU, or why this device was chosen.
    pub reason: String,
    /// What the plan has less of than was wished for.
    pub gave_up: Vec<String>,
    /// Larger plans that failed when they were loaded, and why.
    pub steps_down: Vec<String>,
    /// Compute threads for decoding.
    pub n_threads: u32,
    /// Compute threads for prompts.
    pub n_threads_batch: u32,
    /// Whether flash attention is on, as asked for.
    pub flash_attention: String,
    /// Element types of the K and V cache.
    pub kv_type: String,
    /// One pool of cells for all sequences, or a stream of cells per sequence.
    pub kv_unified: bool,
    /// Whether weights may be repacked for the CPU's matrix units, or why not.
    pub extra_buffers: String,
    /// How these settings were chosen where nobody fixed them.
    pub tuning: TuneReport,
    /// The memory of each device.
    pub memory: Vec<DeviceMemory>,
    /// The share of memory that was allowed, in bytes.
    pub limit_bytes: u64,
}

/// What the model takes on one device, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceMemory {
    /// llama.cpp's name of the device; `Host` is the system's memory.
    pub device: String,
    /// Weights.
    pub weights_bytes: u64,
    /// KV cache and recurrent state.
    pub kv_bytes: u64,
    /// Scratch for one step.
    pub compute_bytes: u64,
    /// The sum of these that was planned from the file's header.
    pub planned_bytes: u64,
    /// All memory of the device.
    pub total_bytes: u64,
    /// Free memory of the device before the load.
    pub free_bytes: u64,
}

/// Counters and gauges of a running engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineStats {
    /// Requests with at least one sequence running.
    pub requests_running: u64,
    /// Requests that wait for a sequence.
    pub requests_queued: u64,
    /// Cells that running sequences hold.
    pub kv_cells_used: u64,
    /// Cells that finished sequences left for reuse.
    pub kv_cells_cached: u64,
    /// All cells.
    pub kv_cells_total: u64,
    /// Prompt tokens computed.
    pub prompt_tokens_total: u64,
    /// Prompt tokens whose cells were reused.
    pub cached_tokens_total: u64,
    /// Tokens sampled.
    pub generated_tokens_total: u64,
    /// Steps submitted to the backend.
    pub steps_total: u64,
    /// Time inside the backend, in microseconds.
    pub backend_us_total: u64,
    /// Time of the engine thread's own work between steps, in microseconds.
    pub overhead_us_total: u64,
    /// Requests that were cancelled by their caller.
    pub cancelled_total: u64,
    /// Requests that failed after they were accepted.
    pub failed_total: u64,
    /// Steps that the backend failed to compute.
    pub failed_steps_total: u64,
    /// Tokens that were guessed and computed along with the one before.
    pub guessed_tokens_total: u64,
    /// Of those, the ones that were right.
    pub right_guesses_total: u64,
    /// Guessed tokens that a draft model wrote.
    pub drafted_tokens_total: u64,
    /// Of those, the ones that were right.
    pub right_drafts_total: u64,
    /// Time of the draft model, in microseconds.
    pub draft_us_total: u64,
    /// Failures of a draft model; after the first it is not asked any more.
    pub failed_drafts_total: u64,
    /// Cells of the draft model that hold tokens.
    pub draft_cells_used: u64,
    /// Sequences that had to give their seat to somebody else and wait again.
    pub preempted_total: u64,
    /// Tokens whose cells came back from host memory.
    pub restored_tokens_total: u64,
    /// Requests whose prompt was computed, wholly or beyond what was reused, by the reason.
    pub prefix_misses: PrefixMisses,
    /// Time inside the samplers, over all threads, in microseconds. What they wait for a constraint's mask is not in it.
    pub sampler_us_total: u64,
    /// Host memory that holds copies of sequences, in bytes.
    pub host_cache_bytes: u64,
    /// Checkpoints of sequences that were taken, where memory cannot be cut.
    pub checkpoints_taken_total: u64,
    /// Checkpoints that a prompt went on from.
    pub checkpoints_restored_total: u64,
    /// Host memory that holds checkpoints, in bytes; part of [`host_cache_bytes`](Self::host_cache_bytes).
    pub checkpoint_bytes: u64,
    /// The most that it may be.
    pub host_cache_limit_bytes: u64,
    /// The disk tier; all 0 where there is none.
    pub disk_cache: DiskCacheStats,
}

/// Requests whose prompt was computed, by the reason: see [`Miss`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PrefixMisses {
    /// [`Miss::First`]
    pub first: u64,
    /// [`Miss::Extended`]
    pub extended: u64,
    /// [`Miss::Diverged`]
    pub diverged: u64,
    /// [`Miss::Evicted`]
    pub evicted: u64,
    /// [`Miss::Spared`]
    pub spared: u64,
    /// [`Miss::MemoryCannotBeCut`]
    pub memory_cannot_be_cut: u64,
    /// [`Miss::Preempted`]
    pub preempted: u64,
    /// [`Miss::Disabled`]
    pub disabled: u64,
}

impl PrefixMisses {
    pub(crate) fn new(count: impl Fn(Miss) -> u64) -> Self {
        Self {
            first: count(Miss::First),
            extended: count(Miss::Extended),
            diverged: count(Miss::Diverged),
            evicted: count(Miss::Evicted),
            spared: count(Miss::Spared),
            memory_cannot_be_cut: count(Miss::MemoryCannotBeCut),
            preempted: count(Miss::Preempted),
            disabled: count(Miss::Disabled),
        }
    }

    /// How many there were for one reason.
    pub fn of(&self, miss: Miss) -> u64 {
        match miss {
            Miss::First => self.first,
            Miss::Extended => self.extended,
            Miss::Diverged => self.diverged,
            Miss::Evicted => self.evicted,
            Miss::Spared => self.spared,
            Miss::MemoryCannotBeCut => self.memory_cannot_be_cut,
            Miss::Preempted => self.preempted,
            Miss::Disabled => self.disabled,
        }
    }
}

/// What is in the disk tier of the prefix cache, and what became of its files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCacheStats {
    /// Bytes of all files.
    pub bytes: u64,
    /// The most that they may be.
    pub limit_bytes: u64,
    /// Files, those for other models included.
    pub files: u64,
    /// Files that were written.
    pub written_total: u64,
    /// Files that were read back.
    pub hits_total: u64,
    /// Files that had to go for others, or that a longer one made needless.
    pub removed_total: u64,
    /// Files that were dropped because they were none of ours,
    pub not_ours_total: u64,
    /// had another version of the format,
    pub version_total: u64,
    /// were larger than the limit,
    pub too_large_total: u64,
    /// had another length than they said,
    pub length_total: u64,
    /// had a wrong checksum,
    pub checksum_total: u64,
    /// or could not be read.
    pub unreadable_total: u64,
    /// It could not be written and is not used any more.
    pub switched_off: bool,
}

/// The build: what a bug report should say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildInfo {
    /// Minerva's version.
    pub version: String,
    /// The pinned release of llama.cpp.
    pub llama_cpp: String,
    /// GPU backends in this build.
    pub backends: Vec<String>,
    /// What llama.cpp was compiled to use on this CPU.
    pub cpu_features: Vec<String>,
    /// The C++ compiler that built llama.cpp.
    pub compiler: String,
}

/// How far a load is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadProgress {
    /// What is being done, such as `weights`.
    pub stage: String,
    /// From 0 to 1 within the whole load.
    pub fraction: f32,
}
