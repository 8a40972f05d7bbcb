//! Loads the model on its own thread, beside a server that already answers health checks.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use minerva_engine::{Engine, EngineConfig, LoadError, LoadProgress, SimConfig};
use tokio::sync::oneshot;
use tracing::{debug, error, info};

use crate::config::{Config, ConfigError};
use crate::state::{App, Phase};

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
            cache_isolation: config.performance.cache_isolation,
            speculation: config.performance.speculation,
            trace_path: config.performance.trace_file.clone(),
            ..SimConfig::default()
        };
        if let Some(n) = config.performance.batch_size {
            sim.n_seq_max = n;
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
    pub(crate) fn start(app: Arc<App>, source: Source) -> std::io::Result<Self> {
        let cancel = Arc::new(AtomicBool::new(false));
        let (send, done) = oneshot::channel();
        let is_cancelled = Arc::clone(&cancel);
        std::thread::Builder::new().name("minerva-load".to_owned()).spawn(move || {
            let _ = send.send(load(&app, source, &is_cancelled));
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

fn load(app: &App, source: Source, is_cancelled: &AtomicBool) -> Result<(), LoadError> {
    let config = match source {
        Source::Simulator(sim) => {
            info!("answering with the simulator: there is no model");
            app.set_phase(Phase::Ready(Engine::simulate(*sim)));
            return Ok(());
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
    match Engine::load(*config, progress) {
        Ok(engine) => {
            let info = engine.info();
            let placement = &info.placement;
            info!(
                model = info.name,
                device = placement.device,
                gpu_layers = format_args!("{}/{}", placement.n_gpu_layers, placement.n_layers_total),
                context = info.context_length_tokens,
                sequences = info.n_seq_max,
                threads = placement.n_threads,
                seconds = started.elapsed().as_secs_f32(),
                "ready"
            );
            app.set_phase(Phase::Ready(engine));
            if app.is_draining() {
                app.drain(); // the signal came just before the engine: it must hear of it too
            }
            Ok(())
        }
        Err(problem) => {
            if !matches!(problem, LoadError::Cancelled) {
                error!("cannot load the model: {}", chain(&problem));
                app.set_phase(Phase::Failed);
            }
            Err(problem)
        }
    }
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
