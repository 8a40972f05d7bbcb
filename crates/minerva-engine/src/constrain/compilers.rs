//! The threads that compile: a bounded number, with a bounded queue and a time limit, apart from everything that streams.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use llguidance::ParserFactory;

use super::cache::Cache;
use super::compile::{Compiled, MAX_SOURCE_BYTES, compile};
use super::matcher::{Masks, Matcher};
use super::meters::Meters;
use super::{Constraint, ConstraintError, vocabulary};
use crate::backend::Tokenizer;
use crate::error::RequestError;

/// Compilations that requests wait for at the same time.
const N_COORDINATORS: usize = 2;

/// Compilations that run at the same time, counting those that took too long and cannot be stopped.
const MAX_RUNNING: usize = 4;

/// Requests that wait for a compilation.
const MAX_WAITING: usize = 256;

/// The time that one compilation may take.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// llguidance recurses on schemas and on rules that lead to rules.
const STACK_BYTES: usize = 128 << 20;

/// Compiled grammars that are kept.
const MAX_CACHED: usize = 256;
const MAX_CACHED_BYTES: usize = 64 << 20;

/// What a compiled grammar takes for each byte of its text, roughly, and at least.
const CACHED_BYTES_PER_BYTE: usize = 40;
const CACHED_BYTES_AT_LEAST: usize = 64 << 10;

/// One constraint that a request waits for.
pub(crate) trait Waiting: Send {
    /// Whether nobody waits any more.
    fn is_gone(&self) -> bool;

    /// The grammars of its choices are there, or will never be.
    fn resolve(self: Box<Self>, result: Result<Vec<Matcher>, RequestError>);
}

/// A constraint on its way.
struct Job {
    constraint: Constraint,
    key: String,
    n: u32,
    waiting: Box<dyn Waiting>,
}

/// Compiles constraints and keeps them. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Compilers {
    /// To the threads, which are started for the first constraint and end with the last handle.
    jobs: Arc<Mutex<Option<SyncSender<Job>>>>,
    kept: Arc<Kept>,
}

type Outcome = Result<Arc<Compiled>, ConstraintError>;

/// What outlives a job.
struct Kept {
    tokenizer: Arc<dyn Tokenizer>,
    n_vocab: usize,
    /// Made for the first constraint: most servers never see one.
    factory: OnceLock<Result<ParserFactory, String>>,
    masks: OnceLock<Masks>,
    cache: Mutex<Cache<Outcome>>,
    meters: Arc<Meters>,
    n_running: AtomicUsize,
}

impl Compilers {
    pub(crate) fn new(tokenizer: Arc<dyn Tokenizer>, n_vocab: usize) -> Self {
        let kept = Kept {
            tokenizer,
            n_vocab,
            factory: OnceLock::new(),
            masks: OnceLock::new(),
            cache: Mutex::new(Cache::new(MAX_CACHED, MAX_CACHED_BYTES)),
            meters: Arc::default(),
            n_running: AtomicUsize::new(0),
        };
        Self { jobs: Arc::default(), kept: Arc::new(kept) }
    }

    /// What constraints cost; it can be read after the threads have ended.
    pub(crate) fn meters(&self) -> &Arc<Meters> {
        &self.kept.meters
    }

    fn jobs(&self) -> std::io::Result<SyncSender<Job>> {
        let mut started = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(jobs) = &*started {
            return Ok(jobs.clone());
        }
        let (jobs, queue) = mpsc::sync_channel(MAX_WAITING);
        let queue = Arc::new(Mutex::new(queue));
        for i in 0..N_COORDINATORS {
            let (queue, kept) = (Arc::clone(&queue), Arc::clone(&self.kept));
            thread::Builder::new().name(format!("minerva-compile-{i}")).spawn(move || coordinate(&queue, &kept))?;
        }
        *started = Some(jobs.clone());
        Ok(jobs)
    }

    /// Gets `n` grammars for `waiting`: at once if the constraint is known, else when it is compiled. Never blocks.
    pub(crate) fn compile(&self, constraint: Constraint, n: u32, waiting: Box<dyn Waiting>) {
        let key = match key(&constraint) {
            Ok(key) => key,
            Err(error) => return waiting.resolve(Err(error.into())),
        };
        let meters = &self.kept.meters;
        if let Some(outcome) = self.kept.cached(&key) {
            meters.hits.fetch_add(1, Ordering::Relaxed);
            return waiting.resolve(self.kept.matchers(outcome, n));
        }
        meters.misses.fetch_add(1, Ordering::Relaxed);
        let jobs = match self.jobs() {
            Ok(jobs) => jobs,
            Err(error) => return waiting.resolve(Err(ConstraintError::whole(error.to_string()).into())),
        };
        if let Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) =
            jobs.try_send(Job { constraint, key, n, waiting })
        {
            job.waiting.resolve(Err(busy(MAX_WAITING)));
        }
    }
}

/// What a constraint is known by: its kind and its text, as it is, since the order of a schema's properties matters.
fn key(constraint: &Constraint) -> Result<String, ConstraintError> {
    let mut text = Bounded(Vec::new());
    match serde_json::to_writer(&mut text, constraint) {
        Ok(()) => Ok(String::from_utf8_lossy(&text.0).into_owned()),
        Err(_) => Err(ConstraintError::whole(format!("it has more than {MAX_SOURCE_BYTES} bytes, which is the limit"))),
    }
}

/// Stops whoever writes too much, so that a long constraint costs no more than a short one.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_SOURCE_BYTES {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn busy(n: usize) -> RequestError {
    RequestError::QueueFull { unit: "constraints to compile", queued: n, limit: n, retry_after_s: 1 }
}

impl Kept {
    fn cached(&self, key: &str) -> Option<Outcome> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(key)
    }

    fn keep(&self, key: String, outcome: Outcome) {
        let n_bytes = match &outcome {
            Ok(_) => CACHED_BYTES_AT_LEAST.max(key.len() * CACHED_BYTES_PER_BYTE),
            Err(_) => 1024,
        };
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.insert(key, outcome, n_bytes);
        let (n_entries, n_bytes) = cache.size();
        self.meters.entries.store(n_entries as u64, Ordering::Relaxed);
        self.meters.bytes.store(n_bytes as u64, Ordering::Relaxed);
    }

    /// One grammar for each choice. They share nothing: what one makes of it does not slow or break another.
    fn matchers(&self, outcome: Outcome, n: u32) -> Result<Vec<Matcher>, RequestError> {
        let compiled = outcome?;
        let masks = self.masks()?;
        let matcher = |_| Matcher::new(compiled.grammar.deep_clone(), compiled.next.clone(), masks.clone());
        Ok((0..n).map(matcher).collect())
    }

    fn masks(&self) -> Result<&Masks, ConstraintError> {
        if self.masks.get().is_none() {
            let started = Masks::start(&self.meters).map_err(|error| ConstraintError::whole(error.to_string()))?;
            let _ = self.masks.set(started); // another was faster: ours end with their handle
        }
        self.masks.get().ok_or_else(|| ConstraintError::whole("there are no threads for masks"))
    }

    fn factory(&self) -> Result<&ParserFactory, ConstraintError> {
        let factory = self.factory.get_or_init(|| vocabulary::factory(&self.tokenizer, self.n_vocab));
        factory.as_ref().map_err(|problem| ConstraintError::whole(problem.clone()))
    }
}

/// A place among the compilations that run; free again when this is dropped.
struct Running(Arc<Kept>);

impl Running {
    fn new(kept: &Arc<Kept>) -> Option<Self> {
        let running = Self(Arc::clone(kept));
        (kept.n_running.fetch_add(1, Ordering::Relaxed) < MAX_RUNNING).then_some(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.n_running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Works on one constraint at a time until every handle is gone.
fn coordinate(queue: &Mutex<Receiver<Job>>, kept: &Arc<Kept>) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { constraint, key, n, waiting }) = job else { return };
        if waiting.is_gone() {
            continue;
        }
        // It may have been compiled for another request meanwhile.
        let result = match kept.cached(&key) {
            Some(outcome) => Ok(outcome),
            None => compile_within_limit(kept, constraint, key),
        };
        waiting.resolve(result.and_then(|outcome| kept.matchers(outcome, n)));
    }
}

/// Compiles on a thread that can be left behind: a compilation cannot be stopped from outside.
fn compile_within_limit(kept: &Arc<Kept>, constraint: Constraint, key: String) -> Result<Outcome, RequestError> {
    kept.factory()?; // the vocabulary is not the constraint's fault
    let Some(running) = Running::new(kept) else { return Err(busy(MAX_RUNNING)) };
    let (done, outcome) = mpsc::channel();
    let run = move || {
        let kept = &running.0;
        let began = Instant::now();
        let result = kept.factory().and_then(|factory| compile(factory, &constraint)).map(Arc::new);
        kept.meters.compile.observe(began.elapsed());
        kept.keep(key, result.clone());
        drop(running);
        let _ = done.send(result); // where that is too late, it is kept for the next
    };
    thread::Builder::new()
        .name("minerva-compile".into())
        .stack_size(STACK_BYTES)
        .spawn(run)
        .map_err(|error| ConstraintError::whole(error.to_string()))?;
    match outcome.recv_timeout(TIME_LIMIT) {
        Ok(outcome) => Ok(outcome),
        Err(RecvTimeoutError::Timeout) => {
            let problem = format!("it takes longer to compile than the limit of {} s", TIME_LIMIT.as_secs());
            Ok(Err(ConstraintError::whole(problem)))
        }
        Err(RecvTimeoutError::Disconnected) => Ok(Err(ConstraintError::whole("it makes the compiler panic"))),
    }
}
