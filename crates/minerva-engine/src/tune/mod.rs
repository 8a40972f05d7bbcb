//! Auto-tune: measures the few settings that decide how fast a model runs on a device, once, and keeps the result.
//!
//! Flash attention, the cache's element type and its layout, threads and micro-batch are worth tens of percent one way on one
//! machine and the other way on the next (docs/tuning.md), so they are measured and not guessed. The weights are loaded once;
//! small contexts over them compute by turns. The defaults stay unless something else is better by more than the noise, for one
//! stream, for many, for a prompt, and with a context that is no longer short.
//!
//! Start with [`session`]: which comparisons are made, in which order, in how much time. [`candidates`] says what may change,
//! [`choose`] what wins, [`measure`] computes, [`record`] keeps. How a load uses them is in `llama/tuning.rs`.
//!
//! # Invariants
//! - What the user fixed is never changed, and nothing is tried that would not fit where the load was planned.
//! - A candidate that fails is dropped with its reason. Tuning never fails a load.
//! - It ends when its time is over, within one step.

pub(crate) mod candidates;
pub(crate) mod choose;
pub(crate) mod measure;
pub(crate) mod record;
pub(crate) mod session;
mod table;

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::{FlashAttention, KvType};

/// Whether settings that nobody fixed are measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TuneMode {
    /// Never: the defaults.
    #[default]
    Off,
    /// At the first load of a model on a device; later loads use what was found. Without a cache folder nothing is measured.
    Cached,
    /// At this load, whatever was found before.
    Force,
}

/// How to tune.
///
/// Off by default, because the choice depends on the machine and on the moment, and greedy answers may differ in the last
/// digits between settings: a program that embeds the engine says when it wants that. The server does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TuneConfig {
    /// Whether.
    pub mode: TuneMode,
    /// How long measuring may take, in milliseconds. From [`THOROUGH_MS`] on the layouts of the cache are compared too.
    pub budget_ms: u64,
    /// The element types of the cache are what the user wants, also where they are the defaults.
    pub fixed_kv_types: bool,
    /// So is the layout of the cache.
    pub fixed_kv_layout: bool,
}

impl Default for TuneConfig {
    fn default() -> Self {
        Self { mode: TuneMode::Off, budget_ms: DEFAULT_BUDGET_MS, fixed_kv_types: false, fixed_kv_layout: false }
    }
}

/// How long measuring may take when nobody says.
pub const DEFAULT_BUDGET_MS: u64 = 6_000;
/// With so much time everything is measured, and each figure several times.
pub const THOROUGH_MS: u64 = 20_000;

/// The settings that are measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunedSettings {
    /// Flash attention.
    pub flash_attention: FlashAttention,
    /// Element type of the K cache.
    pub kv_type_k: KvType,
    /// Element type of the V cache.
    pub kv_type_v: KvType,
    /// One pool of cells for all sequences.
    pub kv_unified: bool,
    /// Compute threads for decoding.
    pub n_threads: u32,
    /// Compute threads for prompts.
    pub n_threads_batch: u32,
    /// The most tokens that the device computes at once.
    pub n_ubatch: u32,
}

impl fmt::Display for TunedSettings {
    /// `fa auto, kv f16, 8+8 threads, ubatch 512`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flash_attention = format!("{:?}", self.flash_attention).to_lowercase();
        write!(f, "fa {flash_attention}, kv {}", self.kv_type_k.name())?;
        if self.kv_type_v != self.kv_type_k {
            write!(f, "/{}", self.kv_type_v.name())?;
        }
        if self.kv_unified {
            f.write_str(" unified")?;
        }
        write!(f, ", {}+{} threads, ubatch {}", self.n_threads, self.n_threads_batch, self.n_ubatch)
    }
}

/// Where the settings of a load come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TuneSource {
    /// The defaults and what the user fixed; nothing was measured.
    #[default]
    Defaults,
    /// Measured at this load.
    Measured,
    /// Measured at an earlier load.
    Cached,
}

/// What was chosen, from what, and why.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TuneReport {
    /// Where the settings come from.
    pub source: TuneSource,
    /// Why nothing was measured, or why what was found is not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The settings in words.
    pub settings: String,
    /// How fast they are, as a multiple of the defaults over the mix of work; 1 for the defaults.
    pub gain: f64,
    /// How long measuring took, in milliseconds.
    pub took_ms: u64,
    /// Other programs used the cores, and nothing better than the defaults was found: a later load looks again.
    #[serde(default)]
    pub is_disturbed: bool,
    /// Everything that was tried.
    pub rows: Vec<TuneRow>,
}

/// Settings that were tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TuneRow {
    /// What was compared: `cache`, `threads`, `prompts`, `layout`.
    pub stage: String,
    /// The settings in words.
    pub settings: String,
    /// Tokens per second.
    pub rates: Rates,
    /// How fast, as a multiple of the first row of its comparison; `None` if it was not measured.
    pub ratio: Option<f64>,
    /// `chosen`; `stays`, of a base that nothing beat; or why not.
    pub outcome: String,
}

/// Tokens per second of each kind of work; `None` where it was not measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// One sequence, about a hundred tokens in its cache.
    pub alone: Option<f64>,
    /// As many sequences as there are, up to 32, all together.
    pub many: Option<f64>,
    /// One sequence with a longer context.
    pub long: Option<f64>,
    /// Tokens of that context while it was computed.
    pub prefill: Option<f64>,
    /// Many sequences behind one beginning.
    pub shared: Option<f64>,
}

impl TuneReport {
    /// Nothing was measured.
    pub(crate) fn none(settings: &TunedSettings, reason: Option<String>) -> Self {
        Self { reason, settings: settings.to_string(), gain: 1.0, ..Self::default() }
    }

    /// For people: a row for everything that was tried.
    pub fn table(&self) -> String {
        table::print(self)
    }
}

impl TuneConfig {
    pub(crate) fn budget(&self) -> Duration {
        Duration::from_millis(self.budget_ms)
    }

    pub(crate) fn is_thorough(&self) -> bool {
        self.budget_ms >= THOROUGH_MS
    }
}
