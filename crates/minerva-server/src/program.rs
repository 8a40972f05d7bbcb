//! What the two binaries do: read the configuration, then serve, or print something and exit. `minerva rpc-worker` is in
//! `rpc_worker.rs`, `minerva doctor` in `doctor.rs`, `minerva plan` in `plan_command.rs`, `minerva tune` in
//! `tune_command.rs`.
//!
//! Exit codes: 0 after a shutdown by signal, 1 when the server or the load failed or nothing can run, 2 for a configuration that cannot be used,
//! 130 or 143 for a second signal.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use minerva_engine::probe::ProbeReport;
use minerva_engine::{Engine, LoadError};
use minerva_gpu::{BuildBackends, Diagnosis, GpuOptions};
use tracing::{info, warn};

use crate::config::{self, Action, Config, ConfigError, Invocation, Loaded, Program, ReportFormat};
use crate::load::{Load, Source};
use crate::server::Server;
use crate::shutdown::{Signals, end_now};
use crate::warm_file::WarmFile;
use crate::{doctor, limits, logging, plan_command, probing, rpc_worker, tune_command};

/// How long a load may take to notice that it was cancelled.
const CANCEL_TIME: Duration = Duration::from_secs(2);

/// Runs `program` with the process's arguments and environment.
pub fn run(program: Program) -> ExitCode {
    let command = std::env::args_os().nth(1);
    if command.as_ref().is_some_and(|command| command == config::PROBE) {
        return probing::run_child();
    }
    if program == Program::Minerva && command.is_some_and(|command| command == config::RPC_WORKER) {
        return rpc_worker::run();
    }
    match invoke(program) {
        Ok(code) => code,
        Err(ConfigError::CommandLine(text)) => {
            // clap's errors include the texts of --help and --version, which are no failures.
            let _ = text.print();
            ExitCode::from(if text.use_stderr() { 2 } else { 0 })
        }
        Err(problem) => refuse(&problem),
    }
}

/// The environment. Names that are not UTF-8 are none of ours, and neither is what others put into theirs.
fn variables() -> Result<Vec<(String, String)>, ConfigError> {
    let mut variables = Vec::new();
    for (name, value) in std::env::vars_os() {
        let Ok(name) = name.into_string() else { continue };
        match value.into_string() {
            Ok(value) => variables.push((name, value)),
            Err(_) if name.starts_with("MINERVA_") => {
                let (given, allowed) = ("not usable".to_owned(), "UTF-8".to_owned());
                return Err(ConfigError::Value { place: format!("`{name}`"), given, allowed });
            }
            Err(_) => {}
        }
    }
    Ok(variables)
}

fn invoke(program: Program) -> Result<ExitCode, ConfigError> {
    let invocation = Invocation::parse(program, std::env::args_os())?;
    if invocation.action == Action::Config(ReportFormat::Markdown) {
        return Ok(print(&config::reference())); // the same on every machine, whatever its configuration
    }
    let loaded = config::load(&invocation, variables()?)?;
    Ok(match invocation.action {
        Action::Serve => serve(loaded),
        Action::Config(format) => print(&loaded.report.print(format)),
        Action::Diagnose => diagnose(&loaded.config),
        Action::Doctor => doctor::run(&loaded.config),
        Action::Plan { machine, projector, json } => {
            plan_command::run(&loaded.config, machine, projector.as_ref(), json)
        }
        Action::Tune { json } => {
            tune_command::run(&loaded.config, &loaded.report.source("performance.tune_seconds"), json)
        }
    })
}

fn serve(loaded: Loaded) -> ExitCode {
    let Loaded { mut config, warnings, .. } = loaded;
    let filter = std::env::var("RUST_LOG").ok();
    if let Err(problem) = logging::init(filter.as_deref(), config.server.log_timestamps) {
        return refuse(&problem);
    }
    for warning in warnings {
        warn!("{warning}");
    }
    let warm = config.performance.warm_file.as_deref().map(WarmFile::read).transpose();
    let checked =
        warm.and_then(|warm| config.address().and_then(|_| Source::new(&config)).map(|source| (source, warm)));
    let (source, warm) = match checked {
        Ok(checked) => checked,
        Err(problem) => return refuse(&problem),
    };
    config.server.max_connections = limits::allow_connections(config.server.max_connections);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.server.worker_threads)
        .thread_name("minerva-http")
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(serve_until_signal(config, source, warm));
            runtime.shutdown_timeout(Duration::from_millis(100));
            result
        }
        Err(problem) => Err(anyhow::Error::new(problem).context("cannot start the runtime")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            tracing::error!("{problem:#}");
            match problem.downcast_ref::<LoadError>() {
                // What was asked for does not fit and nothing else may run: the table says what would.
                Some(LoadError::NoFallback { table, .. }) if table.is_empty() => refuse(&"nothing fits"),
                Some(LoadError::NoFallback { table, .. }) => refuse(&format_args!("what fits:\n{table}")),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

async fn serve_until_signal(config: Config, mut source: Source, warm: Option<WarmFile>) -> anyhow::Result<()> {
    // Before anything slow: the first process of a container has no other way to hear of them.
    let signals = Signals::new().context("cannot listen for signals")?;
    let mut signal = std::pin::pin!(signals.received());
    // Before the server listens: it asks llama.cpp what it is.
    if let Source::Model(engine) = &mut source {
        engine.probe = probing::config(&config);
        let probe = engine.probe.clone();
        let probed =
            tokio::task::spawn_blocking(move || probe.and_then(|probe| probing::probe(&probe).nothing_works()));
        tokio::select! {
            problem = probed => if let Some(problem) = problem.context("the probe ended in a panic")? {
                anyhow::bail!("nothing here can run a model: {problem}");
            },
            () = &mut signal => return Ok(()), // its children end with their time
        }
    }
    let server = Server::bind(config).await?;
    let address = server.local_address()?;
    info!("listening on http://{address}");
    let mut load = Load::start(server.app(), source, warm).context("cannot start a thread")?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(server.run(async {
        let _ = stopped.await;
    }));
    // The load's end comes first, unless a signal cancels it.
    let is_loaded = tokio::select! {
        result = load.finished() => match result {
            Some(Ok(())) => true,
            Some(Err(problem)) => return Err(anyhow::Error::new(problem).context("cannot load the model")),
            None => anyhow::bail!("the load ended in a panic"),
        },
        () = &mut signal => false,
    };
    if is_loaded {
        signal.await;
    }
    let _ = stop.send(());
    let outcome = running.await.context("the server ended in a panic")?;
    info!(?outcome, "bye");
    if !is_loaded {
        load.cancel();
        if tokio::time::timeout(CANCEL_TIME, load.finished()).await.is_err() {
            end_now(0); // llama.cpp is in the middle of something long; there is nothing to lose
        }
    }
    Ok(())
}

/// `--gpu=debug`: everything that decides where a model runs.
fn diagnose(config: &Config) -> ExitCode {
    let device = match config.device() {
        Ok(device) => device,
        Err(problem) => return refuse(&problem),
    };
    let probed = probing::config(config).map(|probe| probing::probe(&probe));
    if let Some(problem) = probed.and_then(ProbeReport::nothing_works) {
        return refuse(&problem);
    }
    let build = Engine::build_info();
    let has = |name: &str| build.backends.iter().any(|backend| backend.eq_ignore_ascii_case(name));
    let backends = BuildBackends { cuda: has("cuda"), metal: has("metal"), vulkan: has("vulkan") };
    let options = GpuOptions { choice: device, build: backends, memory_limit_bytes: config.gpu.max_memory_mb };
    let list = |items: &[String]| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
    let text = format!(
        "{}\nBuild\n  minerva        {}\n  llama.cpp      {}\n  GPU backends   {}\n  CPU features   {}\n  C++ compiler   {}\n\n{}",
        Diagnosis::collect(options),
        build.version,
        build.llama_cpp,
        list(&build.backends),
        list(&build.cpu_features),
        build.compiler,
        doctor::probe_section(probed),
    );
    print(&text)
}

pub(crate) fn print(text: &str) -> ExitCode {
    // A closed pipe (`| head`) is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

pub(crate) fn refuse(problem: &dyn std::fmt::Display) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "error: {problem}");
    ExitCode::from(2)
}
