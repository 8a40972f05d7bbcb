//! What every connection shares: the model's phase, the settings, counters, and who is still being served.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use minerva_engine::{BuildInfo, Engine, LoadProgress};
use tokio::sync::{Notify, Semaphore};

use crate::auth::Keys;
use crate::browser::Policy;
use crate::config::{Config, ServerSettings};
use crate::metrics::Metrics;

/// How far the model is.
#[derive(Clone)]
pub enum Phase {
    /// On its way.
    Loading(LoadProgress),
    /// Answering.
    Ready(Engine),
    /// It will not come; the process is about to end.
    Failed,
}

/// The state of one server, shared by all of its connections.
pub struct App {
    /// The settings of the `server` section.
    pub(crate) settings: ServerSettings,
    /// Tokens that may share one write: see the setting of this name.
    pub(crate) token_buffer: usize,
    /// The keys that requests must carry.
    pub(crate) keys: Keys,
    /// Which hosts and origins are served.
    pub(crate) browser: Policy,
    /// Counters and histograms.
    pub(crate) metrics: Metrics,
    /// Bytes of request bodies in memory.
    pub(crate) body_bytes: Arc<AtomicUsize>,
    /// Large bodies that may be taken apart at once.
    pub(crate) large_bodies: Arc<Semaphore>,
    /// The build, for `/v1/status` and `system_fingerprint`.
    pub(crate) build: BuildInfo,
    /// Generation requests that are being answered.
    pub(crate) in_flight: InFlight,
    phase: RwLock<Phase>,
    is_draining: AtomicBool,
    started: Instant,
    ids: Ids,
}

/// Large bodies that are taken apart at once.
const MAX_LARGE_BODIES: usize = 2;

impl App {
    /// The state of a server that listens on `is_loopback` and has no model yet.
    pub fn new(config: &Config, is_loopback: bool) -> Self {
        let settings = config.server.clone();
        let loading = LoadProgress { stage: "start".to_owned(), fraction: 0.0 };
        Self {
            keys: Keys::new(&settings.api_keys),
            browser: Policy::new(is_loopback, &settings.allow_hosts, &settings.allow_origins),
            token_buffer: config.performance.token_buffer,
            settings,
            metrics: Metrics::default(),
            body_bytes: Arc::new(AtomicUsize::new(0)),
            large_bodies: Arc::new(Semaphore::new(MAX_LARGE_BODIES)),
            build: Engine::build_info(),
            in_flight: InFlight::default(),
            phase: RwLock::new(Phase::Loading(loading)),
            is_draining: AtomicBool::new(false),
            started: Instant::now(),
            ids: Ids::new(),
        }
    }

    /// The phase at this moment.
    pub fn phase(&self) -> Phase {
        self.phase.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Moves to another phase.
    pub fn set_phase(&self, phase: Phase) {
        if let Phase::Ready(_) = phase {
            self.metrics.set_load_seconds(self.started.elapsed());
        }
        *self.phase.write().unwrap_or_else(PoisonError::into_inner) = phase;
    }

    /// Whether new generation requests are refused because the server is about to end.
    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::SeqCst)
    }

    /// No new generation requests from now on.
    pub fn drain(&self) {
        self.is_draining.store(true, Ordering::SeqCst);
        if let Phase::Ready(engine) = self.phase() {
            engine.drain();
        }
    }

    /// Since when the server runs.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// A new identifier: `prefix` and 24 characters that do not repeat and cannot be guessed from earlier ones.
    pub fn new_id(&self, prefix: &str) -> String {
        self.ids.next(prefix)
    }

    /// OpenAI's `system_fingerprint`: changes whenever answers may change because the server did.
    pub fn fingerprint(&self) -> String {
        let llama_cpp = self.build.llama_cpp.split(' ').next().unwrap_or_default();
        format!("minerva-{}-{llama_cpp}", self.build.version)
    }
}

/// Seconds since 1970, as OpenAI's `created`.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Counts generation requests from acceptance until their response is gone, so that shutdown can wait for the last.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    count: Arc<AtomicUsize>,
    changed: Arc<Notify>,
}

impl InFlight {
    pub(crate) fn enter(&self) -> InFlightGuard {
        self.count.fetch_add(1, Ordering::SeqCst);
        InFlightGuard { count: Arc::clone(&self.count), changed: Arc::clone(&self.changed) }
    }

    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Returns once no request is in flight.
    pub(crate) async fn none(&self) {
        loop {
            let changed = self.changed.notified();
            if self.count() == 0 {
                return;
            }
            changed.await;
        }
    }
}

/// One generation request in flight.
#[derive(Debug)]
pub(crate) struct InFlightGuard {
    count: Arc<AtomicUsize>,
    changed: Arc<Notify>,
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::SeqCst);
        self.changed.notify_waiters();
    }
}

/// Identifiers from a counter, hashed with keys that this process drew at random.
struct Ids {
    keys: [RandomState; 2],
    next: AtomicU64,
}

impl Ids {
    fn new() -> Self {
        Self { keys: [RandomState::new(), RandomState::new()], next: AtomicU64::new(0) }
    }

    fn next(&self, prefix: &str) -> String {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
        let [high, low] = [&self.keys[0], &self.keys[1]].map(|key| key.hash_one(count));
        format!("{prefix}{high:016x}{:08x}", low as u32)
    }
}
