//! What constraints cost: counted by the threads that do the work, read by whoever asks.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use crate::timing::{Timing, TimingStats};

/// The counters of one engine.
#[derive(Debug, Default)]
pub(crate) struct Meters {
    /// Compilations that ended, well or not.
    pub(super) compile: Timing,
    pub(super) hits: AtomicU64,
    pub(super) misses: AtomicU64,
    /// Entries of the cache, and their bytes.
    pub(super) entries: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) mask: Timing,
    /// How long sampling waited for masks that were not ready.
    pub(super) wait: Timing,
}

/// What constraints have cost an engine so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConstraintStats {
    /// Compilations of constraints that ended, failed ones included.
    pub compile: TimingStats,
    /// Constraints that were compiled already when a request came with them.
    pub cache_hits_total: u64,
    /// Constraints that had to be compiled, or that a compilation already under way was waited for.
    pub cache_misses_total: u64,
    /// Constraints that are kept.
    pub cache_entries: u64,
    /// What these take, by estimate, in bytes.
    pub cache_bytes: u64,
    /// Masks, on the threads that compute them.
    pub mask: TimingStats,
    /// Times that sampling waited because a mask was not ready when the scores were.
    pub mask_wait: TimingStats,
}

impl Meters {
    pub(crate) fn stats(&self) -> ConstraintStats {
        ConstraintStats {
            compile: self.compile.stats(),
            cache_hits_total: self.hits.load(Relaxed),
            cache_misses_total: self.misses.load(Relaxed),
            cache_entries: self.entries.load(Relaxed),
            cache_bytes: self.bytes.load(Relaxed),
            mask: self.mask.stats(),
            mask_wait: self.wait.stats(),
        }
    }
}
