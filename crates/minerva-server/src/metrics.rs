//! Counters, gauges and histograms for `/metrics`, in Prometheus' text format 0.0.4.
//!
//! Only atomics are touched while tokens flow; the one lock (requests by route and status) is taken once per request.
//! What the engine counts itself is read from it when somebody asks.

mod constraints;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use minerva_engine::Miss;

use crate::state::{App, Phase};

/// What the server counts.
#[derive(Default)]
pub(crate) struct Metrics {
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    queue: Histogram,
    request_duration: Histogram,
    responses: Mutex<BTreeMap<(&'static str, u16), u64>>,
    rejections: Mutex<BTreeMap<&'static str, u64>>,
    pub(crate) connections_open: AtomicU64,
    pub(crate) connections_evicted: AtomicU64,
    pub(crate) connections_refused: AtomicU64,
    load_ms: AtomicU64,
}

impl Metrics {
    /// From acceptance of a request to its first token.
    pub(crate) fn observe_first_token(&self, time: Duration) {
        self.time_to_first_token.observe(time);
    }

    /// Between two tokens of one choice.
    pub(crate) fn observe_token_gap(&self, time: Duration) {
        self.inter_token_latency.observe(time);
    }

    /// From submission to the first computed prompt token.
    pub(crate) fn observe_queue(&self, time: Duration) {
        self.queue.observe(time);
    }

    /// One response is complete, or its client has gone.
    pub(crate) fn observe_response(&self, endpoint: &'static str, status: u16, time: Duration, is_generation: bool) {
        *self.responses.lock().unwrap_or_else(PoisonError::into_inner).entry((endpoint, status)).or_default() += 1;
        if is_generation {
            self.request_duration.observe(time);
        }
    }

    /// A request was refused; `reason` is the error's code.
    pub(crate) fn count_rejection(&self, reason: &'static str) {
        *self.rejections.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += 1;
    }

    pub(crate) fn set_load_seconds(&self, time: Duration) {
        self.load_ms.store(time.as_millis() as u64, Ordering::Relaxed);
    }
}

/// Buckets from a millisecond to ten minutes: fine enough for gaps between tokens, wide enough for whole requests.
const BUCKETS_SECONDS: [f64; 18] =
    [0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0];

#[derive(Default)]
struct Histogram {
    /// One per bucket, not cumulative, and the last for everything above.
    counts: [AtomicU64; BUCKETS_SECONDS.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bucket = BUCKETS_SECONDS.partition_point(|limit| *limit < seconds);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }

    fn print(&self, text: &mut Text, name: &str, help: &str) {
        text.head(name, "histogram", help);
        let mut total = 0;
        for (i, count) in self.counts.iter().enumerate() {
            total += count.load(Ordering::Relaxed);
            let limit = BUCKETS_SECONDS.get(i).map_or_else(|| "+Inf".to_owned(), ToString::to_string);
            let _ = writeln!(text.0, "minerva_{name}_bucket{{le=\"{limit}\"}} {total}");
        }
        let sum = self.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(text.0, "minerva_{name}_sum {sum}\nminerva_{name}_count {total}");
    }
}

/// The whole text of `/metrics`.
pub(crate) fn print(app: &App) -> String {
    let mut text = Text(String::with_capacity(16 << 10));
    let metrics = &app.metrics;
    metrics.time_to_first_token.print(&mut text, "time_to_first_token_seconds", "From request to first token.");
    metrics.inter_token_latency.print(&mut text, "inter_token_latency_seconds", "Between tokens of one choice.");
    metrics.queue.print(&mut text, "queue_seconds", "From submission to the first computed prompt token.");
    metrics.request_duration.print(
        &mut text,
        "request_duration_seconds",
        "Generation requests, from request to last byte.",
    );
    print_labelled(&mut text, metrics);
    let phase = app.phase();
    print_engine(&mut text, &phase);
    let gauge = |text: &mut Text, name: &str, help: &str, value: f64| text.single(name, "gauge", help, value);
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64;
    gauge(&mut text, "ready", "Whether requests are answered.", f64::from(u8::from(is_ready(app, &phase))));
    gauge(&mut text, "model_load_seconds", "From start until the model was loaded.", load(&metrics.load_ms) / 1e3);
    gauge(&mut text, "connections_open", "Open connections.", load(&metrics.connections_open));
    let evicted = load(&metrics.connections_evicted);
    text.single("connections_evicted_total", "counter", "Idle connections closed to make room for others.", evicted);
    let refused = load(&metrics.connections_refused);
    text.single("connections_refused_total", "counter", "Connections refused because all others were busy.", refused);
    gauge(&mut text, "uptime_seconds", "Since the server started.", app.uptime().as_secs_f64());
    let build = [("version", app.build.version.as_str()), ("llama_cpp", app.build.llama_cpp.as_str())];
    text.head("build_info", "gauge", "The build.");
    text.sample("build_info", &build, 1.0);
    text.0
}

fn is_ready(app: &App, phase: &Phase) -> bool {
    matches!(phase, Phase::Ready(_)) && !app.is_draining()
}

fn print_labelled(text: &mut Text, metrics: &Metrics) {
    text.head("http_requests_total", "counter", "Responses by endpoint and status; 499 where the client had left.");
    for ((endpoint, status), count) in &*metrics.responses.lock().unwrap_or_else(PoisonError::into_inner) {
        let labels = [("endpoint", *endpoint), ("status", &status.to_string())];
        text.sample("http_requests_total", &labels, *count as f64);
    }
    text.head("requests_rejected_total", "counter", "Refused requests by reason.");
    for (reason, count) in &*metrics.rejections.lock().unwrap_or_else(PoisonError::into_inner) {
        text.sample("requests_rejected_total", &[("reason", *reason)], *count as f64);
    }
}

fn print_engine(text: &mut Text, phase: &Phase) {
    let (stats, constraint_stats, info) = match phase {
        Phase::Ready(engine) => (engine.stats(), engine.constraint_stats(), Some(engine.info())),
        Phase::Loading(_) | Phase::Failed => Default::default(),
    };
    for (name, help, value) in [
        ("requests_running", "Requests with a running sequence.", stats.requests_running),
        ("requests_queued", "Requests that wait for a sequence.", stats.requests_queued),
        ("kv_cells_used", "KV cells of running sequences.", stats.kv_cells_used),
        ("kv_cells_cached", "KV cells kept for reuse.", stats.kv_cells_cached),
        ("kv_cells_total", "All KV cells.", stats.kv_cells_total),
        (
            "draft_kv_cells_used",
            "KV cells that the draft model, or the model's own head, holds.",
            stats.draft_cells_used,
        ),
        ("host_cache_bytes", "Host memory with copies of sequences.", stats.host_cache_bytes),
        ("checkpoint_bytes", "Host memory with checkpoints, part of the copies of sequences.", stats.checkpoint_bytes),
        ("host_cache_limit_bytes", "The most that it may be.", stats.host_cache_limit_bytes),
        ("disk_cache_bytes", "Files of the disk cache.", stats.disk_cache.bytes),
        ("disk_cache_limit_bytes", "The most that they may be.", stats.disk_cache.limit_bytes),
        ("disk_cache_files", "Files of the disk cache.", stats.disk_cache.files),
        ("disk_cache_switched_off", "Whether the disk could not be written.", u64::from(stats.disk_cache.switched_off)),
    ] {
        text.single(name, "gauge", help, value as f64);
    }
    for (name, help, value) in [
        ("prompt_tokens_total", "Prompt tokens computed.", stats.prompt_tokens_total),
        ("cached_prompt_tokens_total", "Prompt tokens reused from the cache.", stats.cached_tokens_total),
        ("generated_tokens_total", "Tokens sampled.", stats.generated_tokens_total),
        ("requests_cancelled_total", "Requests whose client went away.", stats.cancelled_total),
        ("requests_failed_total", "Accepted requests that failed.", stats.failed_total),
        ("guessed_tokens_total", "Tokens that were guessed and computed along.", stats.guessed_tokens_total),
        ("right_guesses_total", "Guessed tokens that were right.", stats.right_guesses_total),
        (
            "draft_tokens_total",
            "Guessed tokens that the draft model, or the model's own head, wrote.",
            stats.drafted_tokens_total,
        ),
        ("draft_tokens_accepted_total", "Of these tokens, those that were right.", stats.right_drafts_total),
        (
            "draft_failures_total",
            "Failures of the draft model or the head; nothing is written ahead after one.",
            stats.failed_drafts_total,
        ),
        ("preemptions_total", "Sequences that had to yield and wait again.", stats.preempted_total),
        ("restored_tokens_total", "Tokens whose cells came back from host memory.", stats.restored_tokens_total),
        ("checkpoints_taken_total", "Checkpoints taken of memory that cannot be cut.", stats.checkpoints_taken_total),
        ("checkpoints_restored_total", "Checkpoints that a prompt went on from.", stats.checkpoints_restored_total),
        ("disk_cache_hits_total", "Files of the disk cache that were read back.", stats.disk_cache.hits_total),
        ("disk_cache_writes_total", "Files of the disk cache that were written.", stats.disk_cache.written_total),
        ("engine_steps_total", "Steps submitted to the backend.", stats.steps_total),
        ("engine_failed_steps_total", "Steps that the backend failed to compute.", stats.failed_steps_total),
    ] {
        text.single(name, "counter", help, value as f64);
    }
    text.head("prefix_cache_misses_total", "counter", "Requests whose prompt was computed, by why it was not reused.");
    for miss in Miss::ALL {
        let count = stats.prefix_misses.of(miss) as f64;
        text.sample("prefix_cache_misses_total", &[("reason", miss.name())], count);
    }
    let disk = &stats.disk_cache;
    text.head("disk_cache_drops_total", "counter", "Files of the disk cache that are gone, by reason.");
    for (reason, n) in [
        ("no_room", disk.removed_total),
        ("not_ours", disk.not_ours_total),
        ("version", disk.version_total),
        ("too_large", disk.too_large_total),
        ("length", disk.length_total),
        ("checksum", disk.checksum_total),
        ("unreadable", disk.unreadable_total),
    ] {
        text.sample("disk_cache_drops_total", &[("reason", reason)], n as f64);
    }
    let seconds = |us: u64| us as f64 / 1e6;
    text.single("engine_backend_seconds_total", "counter", "Time inside the backend.", seconds(stats.backend_us_total));
    text.single(
        "engine_draft_seconds_total",
        "counter",
        "Time inside the draft model, or inside the head while it guesses.",
        seconds(stats.draft_us_total),
    );
    text.single("engine_overhead_seconds_total", "counter", "Time between steps.", seconds(stats.overhead_us_total));
    text.single("sampler_seconds_total", "counter", "Time inside samplers.", seconds(stats.sampler_us_total));
    constraints::print(text, &constraint_stats);
    if let Some(info) = info {
        text.head("model_info", "gauge", "The loaded model and its device.");
        text.sample("model_info", &[("model", info.name.as_str()), ("device", info.placement.device.as_str())], 1.0);
        text.single("gpu_layers", "gauge", "Layers on the GPU.", f64::from(info.placement.n_gpu_layers));
        let n_steps = info.placement.steps_down.len() as f64;
        text.single("load_steps_down", "gauge", "Larger plans that failed before the model was loaded.", n_steps);
    }
}

/// The text format: names get our prefix, label values are escaped.
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP minerva_{name} {help}\n# TYPE minerva_{name} {kind}");
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.head(name, kind, help);
        self.sample(name, &[], value);
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let _ = write!(self.0, "minerva_{name}");
        for (i, (label, text)) in labels.iter().enumerate() {
            let text = text.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
            let _ = write!(self.0, "{}{label}=\"{text}\"", if i == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_the_last_counts_everything() {
        let histogram = Histogram::default();
        for ms in [1, 2, 40, 700_000] {
            histogram.observe(Duration::from_millis(ms));
        }
        let mut text = Text(String::new());
        histogram.print(&mut text, "x_seconds", "Help.");
        for line in [
            "# TYPE minerva_x_seconds histogram",
            "minerva_x_seconds_bucket{le=\"0.001\"} 1",
            "minerva_x_seconds_bucket{le=\"0.0025\"} 2",
            "minerva_x_seconds_bucket{le=\"0.05\"} 3",
            "minerva_x_seconds_bucket{le=\"600\"} 3",
            "minerva_x_seconds_bucket{le=\"+Inf\"} 4",
            "minerva_x_seconds_count 4",
            "minerva_x_seconds_sum 700.043",
        ] {
            assert!(text.0.lines().any(|found| found == line), "{line} in\n{}", text.0);
        }
    }

    #[test]
    fn label_values_cannot_break_out() {
        let mut text = Text(String::new());
        text.sample("x", &[("a", "q\"\\\n"), ("b", "c")], 1.0);
        assert_eq!(text.0, "minerva_x{a=\"q\\\"\\\\\\n\",b=\"c\"} 1\n");
    }
}
