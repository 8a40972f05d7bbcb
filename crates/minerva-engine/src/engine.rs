//! The handle: loads a model, starts the engine's threads, hands requests over.

use minerva_gpu::plan::{Plan, PlanMachine};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::backend::{Loaded, Tokenizer};
use crate::config::{EngineConfig, ProjectorConfig};
use crate::constrain::{Compilers, ConstraintStats, Meters};
use crate::disk::{self, Opened};
use crate::error::{LoadError, RequestError};
use crate::intake::{Intake, Task};
use crate::llama;
use crate::request::{Request, TokenId};
use crate::serving::Serving;
use crate::shared::Shared;
use crate::sim::{self, SimConfig};
use crate::slowed::Slowed;
use crate::status::{BuildInfo, EngineStats, LoadProgress, ModelInfo};
use crate::stream::EventStream;
use crate::tune::TuneReport;
use crate::warm::{self, Room, WarmError, WarmPrompt, WarmReport};
use crate::worker::{Command, Worker};

/// A loaded model that answers requests. Cheap to clone; every clone, and every stream of events, keeps it alive.
///
/// # Examples
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use minerva_engine::{ChatMessage, Engine, Event, Request};
///
/// let engine = Engine::open("model.gguf")?;
/// let mut events = engine.generate(Request::chat([ChatMessage::user("Hello!")]).max_tokens(64)).await?;
/// while let Some(event) = events.next().await {
///     if let Event::Delta(delta) = event {
///         print!("{}", delta.text);
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

/// What handles and streams share. Dropping the last one ends the threads, and frees the model before it returns.
pub(crate) struct Inner {
    info: ModelInfo,
    shared: Arc<Shared>,
    constraints: Arc<Meters>,
    next_id: AtomicU64,
    commands: Sender<Command>,
    // From here on in the order of the end: no more tasks, both threads, and what is then the last owner of the model.
    tasks: Sender<Task>,
    _intake: Joined,
    _worker: Joined,
    tokenizer: Arc<dyn Tokenizer>,
    room: Room,
}

/// A thread that is waited for when this is dropped.
struct Joined(Option<JoinHandle<()>>);

impl Drop for Joined {
    fn drop(&mut self) {
        // The last handle can be dropped on one of the engine's own threads; a thread cannot wait for itself.
        if let Some(thread) = self.0.take().filter(|thread| thread.thread().id() != thread::current().id()) {
            let _ = thread.join();
        }
    }
}

impl Engine {
    /// Loads a model with default settings. Blocks for as long as that takes.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn open(model_path: impl AsRef<Path>) -> Result<Self, LoadError> {
        Self::load(EngineConfig::new(model_path), |_| ControlFlow::Continue(()))
    }

    /// Loads a model. Blocks for as long as that takes; `progress` is called as it goes on and can stop it.
    ///
    /// # Errors
    /// [`LoadError`]: the device is not there, the model does not fit, the file is no model, `progress` stopped it.
    #[expect(clippy::needless_pass_by_value, reason = "callers build a configuration for one load")]
    pub fn load(
        config: EngineConfig,
        mut progress: impl FnMut(&LoadProgress) -> ControlFlow<()> + Send,
    ) -> Result<Self, LoadError> {
        let (loaded, info) = llama::load(&config, &mut progress)?;
        Self::start_loaded(&config, loaded, info)
    }

    /// [`load`](Self::load), and then every step takes `percent` longer: with it a benchmark proves that it notices.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    #[doc(hidden)] // no setting, so that nobody can leave it on
    pub fn load_slowed(config: &EngineConfig, percent: f64) -> Result<Self, LoadError> {
        let (mut loaded, info) = llama::load(config, &mut |_| ControlFlow::Continue(()))?;
        loaded.backend = Box::new(Slowed::new(loaded.backend, percent));
        Self::start_loaded(config, loaded, info)
    }

    /// Plans a load without doing it: what goes where, what it takes, and the smaller plans below. Reads the file's header, and
    /// nothing else of it but what tells it from other models. Settings that an earlier load found are part of the plan; nothing
    /// is measured.
    ///
    /// # Errors
    /// [`LoadError`]: nothing fits, or the file is no model.
    pub fn plan(config: &EngineConfig, machine: &PlanMachine) -> Result<Plan, LoadError> {
        Self::plan_and_tuning(config, machine, None).map(|(plan, _)| plan)
    }

    /// [`plan`](Self::plan), and where its settings come from. A projector is given room beside the model; [`load`](Self::load) loads
    /// none.
    ///
    /// # Errors
    /// As [`plan`](Self::plan), and for a file that is no projector.
    pub fn plan_and_tuning(
        config: &EngineConfig,
        machine: &PlanMachine,
        projector: Option<&ProjectorConfig>,
    ) -> Result<(Plan, TuneReport), LoadError> {
        llama::plan(config, machine, projector)
    }

    /// This machine, as [`load`](Self::load) would plan for it. RPC servers are connected to.
    ///
    /// # Errors
    /// [`LoadError`]: a device that was asked for is not there.
    pub fn machine(config: &EngineConfig) -> Result<PlanMachine, LoadError> {
        llama::machine(config)
    }

    /// An engine over the simulator: no model and no llama.cpp, the same scheduling. For tests of whatever is above.
    ///
    /// # Panics
    /// When the system refuses a thread.
    pub fn simulate(config: SimConfig) -> Self {
        let (serving, disk) = (config.serving(), config.open_disk());
        let (loaded, info) = sim::load(config);
        Self::start(loaded, info, serving, disk).expect("the system can start a thread")
    }

    fn start_loaded(config: &EngineConfig, loaded: Loaded, info: ModelInfo) -> Result<Self, LoadError> {
        let serving = Serving::new(config, &info, loaded.drafter.is_some());
        let wished =
            config.disk_cache.as_ref().filter(|disk| disk.limit_bytes > 0 && serving.policy.host_cache_bytes > 0);
        let disk = wished.and_then(|disk| disk.open(disk::of_model(config, &info)));
        Self::start(loaded, info, serving, disk)
    }

    pub(crate) fn start(
        loaded: Loaded,
        info: ModelInfo,
        serving: Serving,
        disk: Option<Opened>,
    ) -> Result<Self, LoadError> {
        let limits = loaded.backend.limits();
        let host_cache_bytes = serving.policy.host_cache_bytes;
        let counters = disk.as_ref().map(|disk| Arc::clone(&disk.counters));
        let (n_cells, n_seq_max) = (u64::from(limits.n_cells), u64::from(limits.n_seq_max));
        let shared = Arc::new(Shared::new(n_cells, n_seq_max, host_cache_bytes, counters));
        let tokenizer = Arc::clone(&loaded.tokenizer);
        let (commands, mailbox) = mpsc::channel();
        let (tasks, inbox) = mpsc::channel();
        let n_ctx = info.context_length_tokens as usize;
        let mut worker = Worker::new(loaded, &serving, mailbox, Arc::clone(&shared));
        if let Some(disk) = disk {
            worker.use_disk(disk, commands.clone())?;
        }
        let breakers = Arc::default();
        let compilers = Compilers::new(Arc::clone(&tokenizer), limits.n_vocab);
        let constraints = Arc::clone(compilers.meters());
        let intake = Intake { tokenizer: Arc::clone(&tokenizer), limits, n_ctx, serving, breakers, compilers };
        let intake = thread::Builder::new().name("minerva-intake".into()).spawn(move || intake.run(&inbox))?;
        let worker = thread::Builder::new().name("minerva-engine".into()).spawn(move || worker.run())?;
        let inner = Inner {
            info,
            shared,
            constraints,
            next_id: AtomicU64::new(1),
            commands,
            tasks,
            _intake: Joined(Some(intake)),
            _worker: Joined(Some(worker)),
            tokenizer,
            room: Room { limits, host_cache_bytes },
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Renders, tokenizes, checks and queues a request on a thread of the engine. Resolves as soon as the request is
    /// accepted or refused, not when it runs. Dropping the future cancels the request.
    ///
    /// # Errors
    /// [`RequestError`]: nothing of the request was or will be computed.
    pub async fn generate(&self, request: Request) -> Result<EventStream, RequestError> {
        self.hand_over(request, None)?.await.unwrap_or(Err(RequestError::ShuttingDown))
    }

    /// [`generate`](Self::generate) for threads without an executor.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn generate_blocking(&self, request: Request) -> Result<EventStream, RequestError> {
        self.hand_over(request, None)?.blocking_recv().unwrap_or(Err(RequestError::ShuttingDown))
    }

    fn hand_over(
        &self,
        request: Request,
        warms: Option<bool>,
    ) -> Result<oneshot::Receiver<Result<EventStream, RequestError>>, RequestError> {
        let (answer, receiver) = oneshot::channel();
        let engine = Arc::clone(&self.inner);
        self.inner.task(Task::Generate {
            request: Box::new(request),
            submitted: Instant::now(),
            engine,
            warms,
            answer,
        })?;
        Ok(receiver)
    }

    /// Computes prefixes before anybody asks for them and keeps them in host memory for everybody; blocks until that is done.
    /// `progress` is called before each with its index and can stop it. What the disk tier has is not computed.
    ///
    /// # Errors
    /// [`WarmError`]: a prefix is no prompt for this model, or the pinned ones need more host memory than there may be. Then nothing
    /// was computed. Or computing one failed, or `progress` stopped it.
    pub fn warm(
        &self,
        prompts: &[WarmPrompt],
        progress: impl FnMut(usize) -> ControlFlow<()>,
    ) -> Result<WarmReport, WarmError> {
        let submit = |request, is_pinned| {
            let answer = self.hand_over(request, Some(is_pinned))?;
            let events = answer.blocking_recv().unwrap_or(Err(RequestError::ShuttingDown))?;
            Ok(warm::cached_tokens(events))
        };
        warm::warm(prompts, &*self.inner.tokenizer, self.inner.room, submit, progress)
    }

    /// Tokens of a text; `add_special` adds BOS and EOS where the model wants them.
    ///
    /// # Errors
    /// [`RequestError::Tokenize`] when the tokenizer fails on the text.
    pub async fn tokenize(&self, text: String, add_special: bool) -> Result<Vec<TokenId>, RequestError> {
        let (answer, receiver) = oneshot::channel();
        self.inner.task(Task::Tokenize { text, add_special, answer })?;
        receiver.await.unwrap_or(Err(RequestError::ShuttingDown))
    }

    /// The bytes that tokens stand for; control tokens stand for none. They need not be whole characters.
    pub fn detokenize(&self, tokens: &[TokenId]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &token in tokens {
            self.inner.tokenizer.token_bytes(token, &mut bytes);
        }
        bytes
    }

    /// The model and where it runs.
    pub fn info(&self) -> &ModelInfo {
        &self.inner.info
    }

    /// Counters and gauges. Never waits for a step.
    pub fn stats(&self) -> EngineStats {
        self.inner.shared.stats()
    }

    /// What constraints cost. Never waits for anything.
    pub fn constraint_stats(&self) -> ConstraintStats {
        self.inner.constraints.stats()
    }

    /// How long the step that is being computed has been running; `None` between steps. A step that is far older than
    /// any before it means that the device hangs.
    pub fn step_age(&self) -> Option<Duration> {
        self.inner.shared.step_age()
    }

    /// How many steps failed since the last one that did not, and how long ago the newest did; `None` when the last step was
    /// computed. Several in a row mean that the device is lost.
    pub fn failing_steps(&self) -> Option<(u64, Duration)> {
        self.inner.shared.failing_steps()
    }

    /// Whether the engine takes requests: not after [`drain`](Self::drain) or [`shutdown`](Self::shutdown), and not when its
    /// thread ended by a bug of ours.
    pub fn is_accepting(&self) -> bool {
        !self.inner.is_closed()
    }

    /// What this build is.
    pub fn build_info() -> BuildInfo {
        llama::build_info()
    }

    /// Refuses new requests from now on; accepted ones finish.
    pub fn drain(&self) {
        self.inner.shared.close();
    }

    /// Ends the engine: what still runs or waits fails with [`GenerationError::Shutdown`](crate::GenerationError).
    pub fn shutdown(&self) {
        self.inner.shared.close();
        self.inner.send(Command::Shutdown);
    }
}

impl Inner {
    fn task(&self, task: Task) -> Result<(), RequestError> {
        if self.is_closed() {
            return Err(RequestError::ShuttingDown);
        }
        self.tasks.send(task).map_err(|_| RequestError::ShuttingDown)
    }

    /// A command for the engine thread; it is lost only when that thread has ended.
    pub(crate) fn send(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    pub(crate) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.shared.is_closed()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.send(Command::Shutdown); // the fields do the rest
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("model", &self.info.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, BackendLimits, Row, SeqId, StepError};
    use crate::event::{Event, GenerationError};

    /// A backend with a bug.
    struct Broken(BackendLimits);

    impl Backend for Broken {
        fn limits(&self) -> BackendLimits {
            self.0
        }

        fn decode(&mut self, _rows: &[Row]) -> Result<(), StepError> {
            panic!("a bug")
        }

        fn logits(&self, _i: usize) -> Option<&[f32]> {
            None
        }

        fn truncate(&mut self, _seq: SeqId, _n_tokens: u32) -> bool {
            true
        }

        fn copy(&mut self, _src: SeqId, _dst: SeqId, _n_tokens: u32) -> bool {
            true
        }

        fn save(&mut self, _seq: SeqId) -> Option<minerva_llama::SavedState> {
            None
        }

        fn restore(&mut self, _seq: SeqId, _state: &[u8]) -> bool {
            false
        }
    }

    #[test]
    fn the_model_is_free_when_the_last_handle_is_gone() {
        for _ in 0..100 {
            let (loaded, info) = sim::load(SimConfig::default());
            let model = Arc::downgrade(&loaded.tokenizer);
            let engine = Engine::start(loaded, info, SimConfig::default().serving(), None);
            let engine = engine.expect("the system can start a thread");
            let events = engine.generate_blocking(Request::text("x").max_tokens(500)).expect("accepted");
            drop(engine);
            assert!(model.upgrade().is_some(), "a stream keeps the engine");
            drop(events);
            assert!(model.upgrade().is_none());
        }
    }

    #[test]
    fn a_panic_of_the_engine_thread_ends_every_stream_and_refuses_what_comes_next() {
        let (mut loaded, info) = sim::load(SimConfig { n_seq_max: 1, ..SimConfig::default() });
        loaded.backend = Box::new(Broken(loaded.backend.limits()));
        let serving = SimConfig::default().serving();
        let engine = Engine::start(loaded, info, serving, None).expect("the system can start a thread");
        let streams = (0..3).map_while(|_| engine.generate_blocking(Request::text("x").max_tokens(5)).ok());
        for mut events in streams.collect::<Vec<_>>() {
            assert_eq!(events.blocking_next(), Some(Event::Failed(GenerationError::Shutdown)));
            assert_eq!(events.blocking_next(), None);
        }
        while !engine.inner.is_closed() {
            thread::yield_now();
        }
        assert!(matches!(engine.generate_blocking(Request::text("x")), Err(RequestError::ShuttingDown)));
        let stats = engine.stats();
        assert_eq!((stats.requests_running, stats.requests_queued, stats.kv_cells_used), (0, 0, 0));
        assert_eq!(engine.step_age(), None);
    }
}
