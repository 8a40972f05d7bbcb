//! How requests are served, apart from what a step computes: limits of the queue, the scheduler's policy, who shares cells.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::EngineConfig;
use crate::request::Request;
use crate::scheduler::Policy;
use crate::shared::QueueLimits;
use crate::status::ModelInfo;

/// The most host memory that copies of sequences take unless somebody says so, in bytes: what llama-server takes by default.
const MOST_HOST_CACHE_BYTES: u64 = 8 << 30;

/// And the share of the host's memory, as 1 / n; of what the model leaves free no more than a quarter.
const HOST_CACHE_SHARE: u64 = 16;

/// Who shares the cells of equal beginnings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheIsolation {
    /// Everybody. A client may find out by the time that an answer takes whether another one sent the same beginning.
    #[default]
    None,
    /// Requests of the same client.
    Key,
}

/// How the next tokens of a sequence are guessed. Guesses are computed along and kept as far as sampling agrees, so they change the
/// time that an answer takes and not its distribution.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Speculation {
    /// Not at all.
    Off,
    /// What followed the same tokens earlier in the sequence, as long as it pays.
    Ngram,
    /// What a draft model writes, or the model's own head for multi-token prediction, as long as it pays.
    Draft,
    /// What followed the same tokens earlier, or else what a draft model or the model's own head writes if there is one.
    #[default]
    Auto,
}

impl Speculation {
    /// Whether what a sequence has said before is guessed to follow again.
    pub fn looks_up(self) -> bool {
        matches!(self, Self::Ngram | Self::Auto)
    }

    /// Whether a draft model or the model's own head is asked, if there is one.
    pub fn drafts(self) -> bool {
        matches!(self, Self::Draft | Self::Auto)
    }
}

/// How requests are served.
#[derive(Debug, Clone)]
pub(crate) struct Serving {
    pub(crate) queue: QueueLimits,
    pub(crate) policy: Policy,
    pub(crate) isolation: CacheIsolation,
    /// Where to write down what is asked of the scheduler.
    pub(crate) trace_path: Option<PathBuf>,
}

impl Serving {
    pub(crate) fn new(config: &EngineConfig, info: &ModelInfo, has_drafter: bool) -> Self {
        Self {
            queue: QueueLimits { requests: config.max_queued_requests, tokens: config.max_queued_tokens },
            policy: Policy {
                max_itl_us: config.max_itl_ms.map(|ms| ms.saturating_mul(1000)),
                guess: config.speculation.looks_up(),
                draft: has_drafter.then(|| config.drafting.limits()),
                max_checkpoints: config.max_checkpoints,
                reservation: config.reservation,
                host_cache_bytes: config.host_cache_bytes.unwrap_or_else(|| default_host_cache_bytes(info)),
                disk_cache_bytes: config.disk_cache.as_ref().map_or(0, |disk| disk.limit_bytes),
            },
            isolation: config.cache_isolation,
            trace_path: config.trace_path.clone(),
        }
    }

    /// Cells are only shared between requests for which this is the same.
    pub(crate) fn namespace(&self, request: &Request) -> u64 {
        match self.isolation {
            CacheIsolation::None => 0,
            CacheIsolation::Key => request.client,
        }
    }
}

fn default_host_cache_bytes(info: &ModelInfo) -> u64 {
    let Some(host) = info.placement.memory.iter().find(|memory| memory.device == "Host") else { return 0 };
    let drafts = info.draft.iter().flat_map(|draft| &draft.memory).filter(|memory| memory.device == "Host");
    let taken = host.planned_bytes + drafts.map(|memory| memory.planned_bytes).sum::<u64>();
    let left = host.free_bytes.saturating_sub(taken) / 4;
    (host.total_bytes / HOST_CACHE_SHARE).min(left).min(MOST_HOST_CACHE_BYTES)
}
