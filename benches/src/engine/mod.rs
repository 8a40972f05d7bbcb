//! What the engine costs beside llama.cpp: the same work through a bare `llama_decode` loop and through the engine, in one
//! process, alternating, with the same settings and a thread pool in both.

mod bare;
mod report;
mod through_engine;

use std::ops::ControlFlow;
use std::path::Path;
use std::thread;

use anyhow::Context as _;
use minerva_engine::{Engine, EngineConfig, FlashAttention};
use minerva_llama::{ContextParams, Model, ModelParams};
use serde::Serialize;

pub use report::Report;

/// What is measured.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Workload {
    /// Sequences at once.
    pub n_seq: u32,
    /// Tokens of each prompt; every prompt is different.
    pub prompt_tokens: u32,
    /// Tokens generated per sequence.
    pub generate_tokens: u32,
}

/// Settings that both sides share.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Settings {
    /// Compute threads.
    pub n_threads: u32,
    /// Whether flash attention is off instead of llama.cpp's choice.
    pub flash_attention_off: bool,
    /// One pool of cells for all sequences.
    pub kv_unified: bool,
    /// Repacked weights.
    pub extra_buffers: bool,
    /// How often each side runs; the median counts.
    pub rounds: u32,
}

/// One run of one side.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sample {
    /// From the first prompt token to the last generated one, in seconds.
    pub total_s: f64,
    /// The part of it in which tokens were only decoded, in seconds.
    pub decode_s: f64,
    /// Tokens that were generated in `decode_s`.
    pub decode_tokens: u64,
    /// Time inside `llama_decode`, in seconds.
    pub backend_s: f64,
    /// Time of the engine thread outside `llama_decode`, in seconds; 0 for the bare loop.
    pub overhead_s: f64,
    /// Steps.
    pub steps: u64,
}

impl Sample {
    /// Generated tokens per second while only decoding.
    pub fn decode_rate(&self) -> f64 {
        self.decode_tokens as f64 / self.decode_s
    }
}

/// Runs one workload on both sides.
///
/// # Errors
/// When the model does not load or a step fails.
pub fn run(model_path: &Path, workload: Workload, settings: Settings) -> anyhow::Result<Report> {
    let n_ctx_seq = (workload.prompt_tokens + workload.generate_tokens + 8).next_multiple_of(256);
    let params = ModelParams { use_extra_buffers: settings.extra_buffers, ..ModelParams::default() };
    let model =
        Model::load(model_path, &params, &mut |_| ControlFlow::Continue(())).context("the bare loop's model")?;
    let context = ContextParams {
        n_ctx: n_ctx_seq * workload.n_seq,
        n_seq_max: workload.n_seq,
        n_threads: settings.n_threads,
        n_threads_batch: settings.n_threads,
        flash_attention: if settings.flash_attention_off {
            minerva_llama::FlashAttention::Off
        } else {
            minerva_llama::FlashAttention::Auto
        },
        kv_unified: settings.kv_unified,
        ..ContextParams::default()
    };
    let config = EngineConfig {
        n_seq_max: Some(workload.n_seq),
        context_length_tokens: Some(n_ctx_seq),
        n_threads: Some(settings.n_threads),
        flash_attention: if settings.flash_attention_off { FlashAttention::Off } else { FlashAttention::Auto },
        kv_unified: settings.kv_unified,
        use_extra_buffers: settings.extra_buffers,
        ..EngineConfig::new(model_path)
    };
    let mut report = Report::new(workload, settings);
    for round in 0..settings.rounds {
        // One side at a time, each on threads that end with it: OpenMP keeps a team for every thread that computed, and
        // spins less once there are more of them than cores, so a side that stays would slow down the other.
        let bare =
            thread::scope(|scope| scope.spawn(|| bare::Bare::new(&model, &context)?.run_twice(workload, round)).join());
        let bare = bare.map_err(|_| anyhow::anyhow!("the bare loop panicked"))??;
        let engine = Engine::load(config.clone(), |_| ControlFlow::Continue(())).context("the engine's model")?;
        through_engine::run(&engine, workload, WARM_UP)?;
        report.push(bare, through_engine::run(&engine, workload, round)?);
    }
    Ok(report)
}

/// The round whose prompts warm up each side and are not counted.
const WARM_UP: u32 = u32::MAX;

/// Prompt tokens that differ from sequence to sequence and from round to round, but not from run to run.
fn prompt(n_vocab: u32, workload: Workload, seq: u32, round: u32) -> Vec<i32> {
    let mut state = 0x9e37_79b9_u64 ^ (u64::from(seq) << 32) ^ u64::from(round);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Ordinary tokens: control tokens lie at the ends of a vocabulary.
        1000 + ((state >> 33) as u32 % (n_vocab / 2)) as i32
    };
    (0..workload.prompt_tokens).map(|_| next()).collect()
}

/// The threads that the engine takes by itself on this machine.
pub fn default_threads() -> u32 {
    u32::try_from(minerva_gpu::CpuInfo::read().threads).unwrap_or(1)
}
