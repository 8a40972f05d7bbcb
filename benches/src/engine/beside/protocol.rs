//! What goes between the process that compares and a side's: an order at the start, then tasks and answers, a line each.

use anyhow::Context as _;
use minerva_engine::EngineConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::engine::{Sample, Workload};

/// What the engine plans.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Planned {
    pub(crate) n_gpu_layers: u32,
    /// The largest context of one sequence that fits with all else as planned.
    pub(crate) largest_context_tokens: u32,
    /// Layers on a device whose experts are not.
    pub(crate) n_expert_layers_on_host: u32,
    /// On all devices together.
    pub(crate) device_bytes: u64,
    pub(crate) host_cache_bytes: u64,
    /// Predicted for one sequence.
    pub(crate) tokens_per_second: f64,
    /// Whether both sides fit next to each other.
    pub(super) fits_twice: bool,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum Side {
    Bare,
    Engine,
}

/// What a side's process is started with.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    pub(super) side: Side,
    pub(super) config: EngineConfig,
    pub(super) llama_devices: Vec<usize>,
    pub(super) slow_down_percent: f64,
}

/// What it is told later, a line each.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Task {
    Load,
    Run { workload: Workload, seed: u32 },
}

/// What it says, a line each, or the text of an error.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Planned(Planned),
    Loaded { seconds: f64 },
    Ran(Sample),
}

pub(super) fn parse<T: DeserializeOwned>(line: &str) -> anyhow::Result<T> {
    serde_json::from_str(line).with_context(|| format!("not a line between two sides: {line}"))
}
