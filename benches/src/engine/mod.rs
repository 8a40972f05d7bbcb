//! What the engine costs beside llama.cpp: the same work through a bare `llama_decode` loop and through the engine, alternating,
//! with the same settings and a thread pool in both. [`run`] does so in one process, `beside` in one for each side.

mod bare;
mod beside;
mod pair;
mod report;
mod through_engine;

use std::path::Path;

use minerva_engine::{EngineConfig, FlashAttention, Speculation};
use minerva_gpu::DeviceChoice;
use serde::{Deserialize, Serialize};

pub(crate) use beside::{Beside, Planned, Programs, Round, Runs, work as be_a_side};
use pair::Pair;
pub(crate) use pair::Sides;
pub use report::Report;
pub(crate) use through_engine::run as run_engine;

/// What is measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Workload {
    /// Sequences at once.
    pub n_seq: u32,
    /// Tokens of each prompt; every prompt is different.
    pub prompt_tokens: u32,
    /// Tokens generated per sequence.
    pub generate_tokens: u32,
}

impl Workload {
    /// Cells that one sequence needs.
    pub(crate) fn context_tokens(&self) -> u32 {
        (self.prompt_tokens + self.generate_tokens + 8).next_multiple_of(256)
    }

    /// The same steps, fewer of them.
    fn warm_up(self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens.min((512 / self.n_seq).max(8)),
            generate_tokens: self.generate_tokens.min(8),
            ..self
        }
    }
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
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
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

    /// Until every sequence had its first token, in seconds.
    pub(crate) fn prefill_s(&self) -> f64 {
        self.total_s - self.decode_s
    }
}

/// What both sides start from: the engine guesses nothing, because the bare loop computes every token by a step of its own. With a
/// text that repeats itself the ratio would be one of tokens to steps, and could hide that a step takes longer.
pub(crate) fn same_work(model: &Path) -> EngineConfig {
    EngineConfig { speculation: Speculation::Off, ..EngineConfig::new(model) }
}

/// Runs one workload on both sides, on the CPU.
///
/// # Errors
/// When the model does not load or a step fails.
pub fn run(model_path: &Path, workload: Workload, settings: Settings) -> anyhow::Result<Report> {
    let config = EngineConfig {
        device: DeviceChoice::Cpu,
        n_seq_max: Some(workload.n_seq),
        context_length_tokens: Some(workload.context_tokens()),
        n_threads: Some(settings.n_threads),
        flash_attention: if settings.flash_attention_off { FlashAttention::Off } else { FlashAttention::Auto },
        kv_unified: settings.kv_unified,
        use_extra_buffers: settings.extra_buffers,
        ..same_work(model_path)
    };
    let pair = Pair::new(config, &[])?;
    let mut report = Report::new(workload, settings);
    for round in 0..settings.rounds {
        let Sides { bare, engine } = pair.round(workload, round)?;
        report.push(bare, engine);
    }
    Ok(report)
}

/// Prompt tokens that differ from sequence to sequence and from seed to seed, but not from run to run.
fn prompt(n_vocab: u32, workload: Workload, seq: u32, seed: u32) -> Vec<i32> {
    let mut state = 0x9e37_79b9_u64 ^ (u64::from(seq) << 32) ^ u64::from(seed);
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
