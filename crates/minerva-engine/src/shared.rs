//! Counters and gauges that the engine thread writes and everybody reads, without locks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::disk::Counters;
use crate::error::RequestError;
use crate::scheduler::{Guesses, Miss};
use crate::status::{EngineStats, PrefixMisses};

/// Numbers that need no order among each other: each is true by itself.
#[derive(Debug)]
pub(crate) struct Shared {
    start: Instant,
    closed: AtomicBool,
    cells_total: u64,
    n_seq_max: u64,
    queued_requests: AtomicU64,
    queued_tokens: AtomicU64,
    running: AtomicU64,
    cells_used: AtomicU64,
    cells_cached: AtomicU64,
    parked_bytes: AtomicU64,
    draft_cells: AtomicU64,
    checkpoint_bytes: AtomicU64,
    host_cache_limit_bytes: u64,
    disk: Option<Arc<Counters>>,
    totals: Totals,
    /// Time inside the samplers of all choices, in nanoseconds: a token takes less than a microsecond with some parameters.
    sampler_ns: AtomicU64,
    /// Mean time of a request in microseconds, for Retry-After.
    request_us: AtomicU64,
    /// When the next request in the queue will begin, in microseconds from when it was estimated; 0 while that is unknown.
    next_start_us: AtomicU64,
    /// Prompts that were computed, by the place of the reason in [`Miss::ALL`].
    misses: [AtomicU64; Miss::ALL.len()],
    /// When the running step began, in microseconds since `start`; 0 when none runs.
    step_began_us: AtomicU64,
    /// Steps that failed since the last one that did not, and when the newest did, as above.
    failed_in_a_row: AtomicU64,
    step_failed_us: AtomicU64,
}

/// What only grows.
#[derive(Debug, Default)]
struct Totals {
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    steps: AtomicU64,
    backend_us: AtomicU64,
    overhead_us: AtomicU64,
    cancelled: AtomicU64,
    failed: AtomicU64,
    failed_steps: AtomicU64,
    guessed_tokens: AtomicU64,
    right_guesses: AtomicU64,
    drafted_tokens: AtomicU64,
    right_drafts: AtomicU64,
    draft_us: AtomicU64,
    failed_drafts: AtomicU64,
    preempted: AtomicU64,
    restored_tokens: AtomicU64,
    checkpoints_taken: AtomicU64,
    checkpoints_restored: AtomicU64,
}

/// How many requests and prompt tokens may wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QueueLimits {
    pub(crate) requests: usize,
    pub(crate) tokens: usize,
}

impl Shared {
    pub(crate) fn new(
        cells_total: u64,
        n_seq_max: u64,
        host_cache_limit_bytes: u64,
        disk: Option<Arc<Counters>>,
    ) -> Self {
        Self {
            start: Instant::now(),
            closed: AtomicBool::new(false),
            cells_total,
            n_seq_max,
            queued_requests: AtomicU64::default(),
            queued_tokens: AtomicU64::default(),
            running: AtomicU64::default(),
            cells_used: AtomicU64::default(),
            cells_cached: AtomicU64::default(),
            parked_bytes: AtomicU64::default(),
            draft_cells: AtomicU64::default(),
            failed_in_a_row: AtomicU64::default(),
            step_failed_us: AtomicU64::default(),
            checkpoint_bytes: AtomicU64::default(),
            host_cache_limit_bytes,
            disk,
            totals: Totals::default(),
            sampler_ns: AtomicU64::default(),
            request_us: AtomicU64::default(),
            next_start_us: AtomicU64::default(),
            misses: std::array::from_fn(|_| AtomicU64::default()),
            step_began_us: AtomicU64::default(),
        }
    }

    pub(crate) fn stats(&self) -> EngineStats {
        let totals = &self.totals;
        EngineStats {
            requests_running: self.running.load(Relaxed),
            requests_queued: self.queued_requests.load(Relaxed),
            kv_cells_used: self.cells_used.load(Relaxed),
            kv_cells_cached: self.cells_cached.load(Relaxed),
            kv_cells_total: self.cells_total,
            prompt_tokens_total: totals.prompt_tokens.load(Relaxed),
            cached_tokens_total: totals.cached_tokens.load(Relaxed),
            generated_tokens_total: totals.generated_tokens.load(Relaxed),
            steps_total: totals.steps.load(Relaxed),
            backend_us_total: totals.backend_us.load(Relaxed),
            overhead_us_total: totals.overhead_us.load(Relaxed),
            cancelled_total: totals.cancelled.load(Relaxed),
            failed_total: totals.failed.load(Relaxed),
            failed_steps_total: totals.failed_steps.load(Relaxed),
            guessed_tokens_total: totals.guessed_tokens.load(Relaxed),
            right_guesses_total: totals.right_guesses.load(Relaxed),
            drafted_tokens_total: totals.drafted_tokens.load(Relaxed),
            right_drafts_total: totals.right_drafts.load(Relaxed),
            draft_us_total: totals.draft_us.load(Relaxed),
            failed_drafts_total: totals.failed_drafts.load(Relaxed),
            draft_cells_used: self.draft_cells.load(Relaxed),
            preempted_total: totals.preempted.load(Relaxed),
            restored_tokens_total: totals.restored_tokens.load(Relaxed),
            prefix_misses: PrefixMisses::new(|miss| self.misses[miss as usize].load(Relaxed)),
            sampler_us_total: self.sampler_ns.load(Relaxed) / 1_000,
            host_cache_bytes: self.parked_bytes.load(Relaxed),
            checkpoints_taken_total: totals.checkpoints_taken.load(Relaxed),
            checkpoints_restored_total: totals.checkpoints_restored.load(Relaxed),
            checkpoint_bytes: self.checkpoint_bytes.load(Relaxed),
            host_cache_limit_bytes: self.host_cache_limit_bytes,
            disk_cache: self.disk.as_ref().map(|disk| disk.stats()).unwrap_or_default(),
        }
    }

    /// No new requests from now on.
    pub(crate) fn close(&self) {
        self.closed.store(true, Relaxed);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Relaxed)
    }

    /// Takes a place in the queue; [`left_queue`](Self::left_queue) gives it back.
    pub(crate) fn join_queue(&self, n_prompt: usize, limits: QueueLimits) -> Result<(), RequestError> {
        let full = |unit, queued: u64, limit| {
            Err(RequestError::QueueFull { unit, queued: queued as usize, limit, retry_after_s: self.retry_after_s() })
        };
        let requests = self.queued_requests.fetch_add(1, Relaxed);
        if requests >= limits.requests as u64 {
            self.queued_requests.fetch_sub(1, Relaxed);
            return full("requests", requests, limits.requests);
        }
        let tokens = self.queued_tokens.fetch_add(n_prompt as u64, Relaxed);
        // A prompt that is larger than the limit by itself may still be alone in the queue.
        if tokens > 0 && tokens + n_prompt as u64 > limits.tokens as u64 {
            self.left_queue(n_prompt);
            return full("prompt tokens", tokens, limits.tokens);
        }
        Ok(())
    }

    /// A request got its sequences, or left before.
    pub(crate) fn left_queue(&self, n_prompt: usize) {
        self.queued_requests.fetch_sub(1, Relaxed);
        self.queued_tokens.fetch_sub(n_prompt as u64, Relaxed);
    }

    /// When the queue may have a place again: what those who wait are told, and before anybody waited the mean time of a request over the
    /// sequences that work on it.
    fn retry_after_s(&self) -> u32 {
        let us = match self.next_start_us.load(Relaxed) {
            0 => self.request_us.load(Relaxed) / self.n_seq_max.max(1),
            estimated => estimated,
        };
        us.div_ceil(1_000_000).clamp(1, 60) as u32
    }

    /// When the next in the queue will begin, if somebody waits and that can be said.
    pub(crate) fn publish_next_start(&self, us: Option<u64>) {
        self.next_start_us.store(us.map_or(0, |us| us.max(1)), Relaxed);
    }

    pub(crate) fn learn_duration(&self, seconds: f64) {
        let before = self.request_us.load(Relaxed) as f64;
        let sample = seconds * 1e6;
        let mean = if before == 0.0 { sample } else { before + 0.1 * (sample - before) };
        self.request_us.store(mean as u64, Relaxed);
    }

    pub(crate) fn publish(&self, running: u64, cells_used: u64, cells_cached: u64) {
        self.running.store(running, Relaxed);
        self.cells_used.store(cells_used, Relaxed);
        self.cells_cached.store(cells_cached, Relaxed);
    }

    /// The engine thread is at its end: nothing runs or waits, and nothing is accepted.
    pub(crate) fn engine_ended(&self) {
        self.close();
        self.queued_requests.store(0, Relaxed);
        self.queued_tokens.store(0, Relaxed);
        self.publish(0, 0, 0);
        self.publish_draft_cells(0);
        self.step_ended();
    }

    pub(crate) fn step_begins(&self, now: Instant) {
        self.step_began_us.store((now.duration_since(self.start).as_micros() as u64).max(1), Relaxed);
    }

    pub(crate) fn step_ended(&self) {
        self.step_began_us.store(0, Relaxed);
    }

    /// How long the step that now runs has been running.
    pub(crate) fn step_age(&self) -> Option<Duration> {
        let began = self.step_began_us.load(Relaxed);
        (began > 0).then(|| self.start.elapsed().saturating_sub(Duration::from_micros(began)))
    }

    /// How many steps failed since the last one that did not, and how long ago the newest did.
    pub(crate) fn failing_steps(&self) -> Option<(u64, Duration)> {
        let n = self.failed_in_a_row.load(Relaxed);
        let at = Duration::from_micros(self.step_failed_us.load(Relaxed));
        (n > 0).then(|| (n, self.start.elapsed().saturating_sub(at)))
    }

    pub(crate) fn count_step(&self, n_prefill: u64, backend_us: u64) {
        self.failed_in_a_row.store(0, Relaxed);
        self.totals.steps.fetch_add(1, Relaxed);
        self.totals.prompt_tokens.fetch_add(n_prefill, Relaxed);
        self.totals.backend_us.fetch_add(backend_us, Relaxed);
    }

    pub(crate) fn count_overhead(&self, us: u64) {
        self.totals.overhead_us.fetch_add(us, Relaxed);
    }

    pub(crate) fn count_sampler(&self, time: Duration) {
        self.sampler_ns.fetch_add(time.as_nanos() as u64, Relaxed);
    }

    pub(crate) fn count_miss(&self, miss: Miss) {
        self.misses[miss as usize].fetch_add(1, Relaxed);
    }

    pub(crate) fn count_cached(&self, n_tokens: u64) {
        self.totals.cached_tokens.fetch_add(n_tokens, Relaxed);
    }

    pub(crate) fn count_generated(&self) {
        self.totals.generated_tokens.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_cancelled(&self) {
        self.totals.cancelled.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_failed(&self) {
        self.totals.failed.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_guesses(&self, guesses: Guesses) {
        let Guesses { n_guessed, n_right, n_drafted, n_right_drafts } = guesses;
        self.totals.guessed_tokens.fetch_add(n_guessed, Relaxed);
        self.totals.right_guesses.fetch_add(n_right, Relaxed);
        self.totals.drafted_tokens.fetch_add(n_drafted, Relaxed);
        self.totals.right_drafts.fetch_add(n_right_drafts, Relaxed);
    }

    pub(crate) fn count_draft(&self, us: u64) {
        self.totals.draft_us.fetch_add(us, Relaxed);
    }

    pub(crate) fn count_draft_failed(&self) {
        self.totals.failed_drafts.fetch_add(1, Relaxed);
    }

    /// Cells that the draft model holds.
    pub(crate) fn publish_draft_cells(&self, n_cells: u64) {
        self.draft_cells.store(n_cells, Relaxed);
    }

    pub(crate) fn count_preempted(&self) {
        self.totals.preempted.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_restored(&self, n_tokens: u64) {
        self.totals.restored_tokens.fetch_add(n_tokens, Relaxed);
    }

    pub(crate) fn count_checkpoint_taken(&self) {
        self.totals.checkpoints_taken.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_checkpoints_restored(&self, n: u64) {
        self.totals.checkpoints_restored.fetch_add(n, Relaxed);
    }

    /// Bytes of host memory that hold copies of sequences, and of checkpoints among them.
    pub(crate) fn publish_parked(&self, bytes: u64, checkpoint_bytes: u64) {
        self.parked_bytes.store(bytes, Relaxed);
        self.checkpoint_bytes.store(checkpoint_bytes, Relaxed);
    }

    pub(crate) fn count_failed_step(&self) {
        self.totals.failed_steps.fetch_add(1, Relaxed);
        self.step_failed_us.store(self.start.elapsed().as_micros() as u64, Relaxed);
        self.failed_in_a_row.fetch_add(1, Relaxed);
    }
}
