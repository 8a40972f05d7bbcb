//! Loads the model on its own thread, beside a server that already answers health checks.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use minerva_engine::{Engine, EngineConfig, LoadError, LoadProgress, SimConfig, SimDisk, WarmError};
use tokio::sync::oneshot;
use tracing::{debug, error, info};

use crate::config::{Config, ConfigError};
use crate::state::{App, Phase};
use crate::warm_file::WarmFile;

/// What to load, checked before the server listens.
pub(crate) enum Source {
    Model(Box<EngineConfig>),
    Simulator(Box<SimConfig>),
}

impl Source {
    pub(crate) fn new(config: &Config) -> Result<Self, ConfigError> {
        let Some(step_ms) = config.model.simulate else { return Ok(Self::Model(Box::new(config.engine()?))) };
        let mut sim = SimConfig {
            step_us: u64::from(step_ms) * 1_000,
            max_queued_requests: config.performance.max_queued_requests,
            max_queued_tokens: config.performance.max_queued_tokens,
            max_itl_ms: config.performance.max_itl_ms,
            reservation: config.performance.reserve,
            cache_isolation: config.performance.cache_isolation,
            speculation: config.performance.speculation,
            trace_path: config.performance.trace_file.clone(),
            disk: config.disk_cache().map(|cache| SimDisk { cache, ..SimDisk::default() }),
            ..SimConfig::default()
        };
        if let Some(n) = config.performance.batch_size {
            sim.n_seq_max = n;
        }
        if let Some(bytes) = config.performance.cache_size_mb {
            sim.host_cache_bytes = bytes;
        }
        if let Some(tokens) = config.gpu.context_size {
            sim.context_length_tokens = tokens;
        }
        if let Some(name) = &config.model.name {
            sim.model_name.clone_from(name);
        }
        Ok(Self::Simulator(Box::new(sim)))
    }
}

/// A load under way.
pub(crate) struct Load {
    cancel: Arc<AtomicBool>,
    done: oneshot::Receiver<Result<(), LoadError>>,
}

impl Load {
    /// Begins to load `source`; `app` is told how far it is, and given the engine.
    pub(crate) fn start(app: Arc<App>, source: Source, warm: Option<WarmFile>) -> std::io::Result<Self> {
        let cancel = Arc::new(AtomicBool::new(false));
        let (send, done) = oneshot::channel();
        let is_cancelled = Arc::clone(&cancel);
        std::thread::Builder::new().name("minerva-load".to_owned()).spawn(move || {
            let _ = send.send(load(&app, source, warm.as_ref(), &is_cancelled));
        })?;
        Ok(Self { cancel, done })
    }

    /// Asks the load to end. It hears of it at its next sign of progress.
    pub(crate) fn cancel(&self) {
        self.cancel.store(true, Ordering::SeqCst);
    }

    /// The result; a load that ended without one panicked.
    pub(crate) async fn finished(&mut self) -> Option<Result<(), LoadError>> {
        (&mut self.done).await.ok()
    }
}

fn load(app: &App, source: Source, warm: Option<&WarmFile>, is_cancelled: &AtomicBool) -> Result<(), LoadError> {
    let config = match source {
        Source::Simulator(sim) => {
            info!("answering with the simulator: there is no model");
            let engine = Engine::simulate(*sim);
            let warmed = warm.map_or(Ok(()), |warm| warm_up(app, &engine, warm, is_cancelled));
            return warmed.map(|()| app.set_phase(Phase::Ready(engine))).inspect_err(|problem| failed(app, problem));
        }
        Source::Model(config) => config,
    };
    // The name is enough: logs are sent around, and a path tells of the machine.
    let file = config
        .model_path
        .file_name()
        .map_or_else(|| Path::new("?").display(), |name| Path::new(name).display())
        .to_string();
    info!(file, "loading the model");
    let started = Instant::now();
    let mut shown = 0;
    let progress = |progress: &LoadProgress| {
        let percent = (progress.fraction.clamp(0.0, 1.0) * 100.0) as u32;
        if percent / 10 > shown {
            shown = percent / 10;
            debug!(stage = progress.stage, percent, "loading");
        }
        app.set_phase(Phase::Loading(progress.clone()));
        if is_cancelled.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let loaded = Engine::load(*config, progress);
    let warmed = loaded
        .and_then(|engine| warm.map_or(Ok(()), |warm| warm_up(app, &engine, warm, is_cancelled)).map(|()| engine));
    match warmed {
        Ok(engine) => {
            // Before anybody is told: who reads the log asks at once.
            app.set_phase(Phase::Ready(engine.clone()));
            if app.is_draining() {
                app.drain(); // the signal came just before the engine: it must hear of it too
            }
            let info = engine.info();
            let placement = &info.placement;
            info!(
                model = info.name,
                device = placement.device,
                gpu_layers = format_args!("{}/{}", placement.n_gpu_layers, placement.n_layers_total),
                reason = placement.reason,
                context = info.context_length_tokens,
                sequences = info.n_seq_max,
                threads = placement.n_threads,
                seconds = started.elapsed().as_secs_f32(),
                "ready"
            );
            Ok(())
        }
        Err(problem) => {
            failed(app, &problem);
            Err(problem)
        }
    }
}

fn failed(app: &App, problem: &LoadError) {
    if !matches!(problem, LoadError::Cancelled) {
        error!("cannot load the model: {}", chain(problem));
        app.set_phase(Phase::Failed);
    }
}

/// Computes what is to be there before the first request.
fn warm_up(app: &App, engine: &Engine, warm: &WarmFile, is_cancelled: &AtomicBool) -> Result<(), LoadError> {
    let (started, n) = (Instant::now(), warm.prompts.len());
    let progress = |index: usize| {
        let fraction = index as f32 / n.max(1) as f32;
        app.set_phase(Phase::Loading(LoadProgress { stage: "warming prompts".to_owned(), fraction }));
        if is_cancelled.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let in_line = |index: usize, source: &dyn std::error::Error| LoadError::Setting {
        name: "performance.warm_file",
        problem: format!("cannot be used: {}, line {}: {}", warm.path.display(), warm.line(index), chain(source)),
    };
    let report = engine.warm(&warm.prompts, progress).map_err(|problem| match problem {
        WarmError::Cancelled => LoadError::Cancelled,
        WarmError::Prompt { index, source } => in_line(index, &source),
        WarmError::Failed { index, source } => in_line(index, &source),
        problem => LoadError::Setting {
            name: "performance.warm_file",
            problem: format!("cannot be used: {problem}; `--cache-size` raises it"),
        },
    })?;
    let (tokens, computed, pinned_bytes) = (report.n_tokens, report.n_computed, report.pinned_bytes);
    info!(prompts = n, tokens, computed, pinned_bytes, seconds = started.elapsed().as_secs_f32(), "prompts are warm");
    Ok(())
}

/// An error with everything below it.
fn chain(problem: &dyn std::error::Error) -> String {
    let mut text = problem.to_string();
    let mut source = problem.source();
    while let Some(below) = source {
        text = format!("{text}: {below}");
        source = below.source();
    }
    text
}
