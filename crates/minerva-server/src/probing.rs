//! How the programs use the engine's probe: the child is this very program, and so is what takes its place when the GPUs must be
//! hidden from backends that crash before anything can be left out.

use std::process::ExitCode;

use minerva_engine::probe::{self, ProbeConfig, ProbeReport, run_probe_child};

use crate::config::{Config, PROBE};

/// Hands what a process found to the one that takes its place: problems as JSON.
pub(crate) const KNOWN_PROBLEMS: &str = "MINERVA_KNOWN_PROBLEMS";

/// Metal compiles its kernels on the first start after an installation, which takes seconds and is no reason to do without.
const METAL_FACTOR: u32 = 3;

/// The child's side, for the arguments after [`PROBE`].
pub(crate) fn run_child() -> ExitCode {
    run_probe_child(std::env::args_os().skip(2).map(|arg| arg.to_string_lossy().into_owned()))
}

/// What to start and how long to wait; `None` when the configuration wants no probe, or this program cannot be found.
pub(crate) fn config(config: &Config) -> Option<ProbeConfig> {
    let time_limit = config.gpu.probe_seconds.duration() * if cfg!(target_os = "macos") { METAL_FACTOR } else { 1 };
    let time_limit_ms = u64::try_from(time_limit.as_millis()).unwrap_or(u64::MAX);
    Some(ProbeConfig { time_limit_ms, ..default_config()? }).filter(|_| config.gpu.probe)
}

/// As [`config`], for a program without one.
pub(crate) fn default_config() -> Option<ProbeConfig> {
    let program = std::env::current_exe().ok()?;
    let known = std::env::var(KNOWN_PROBLEMS).ok().and_then(|json| serde_json::from_str(&json).ok());
    Some(ProbeConfig {
        cache_file: minerva_engine::cache_dir().map(|folder| folder.join("probe.json")),
        known: known.unwrap_or_default(),
        ..ProbeConfig::new(program, [PROBE.to_owned()])
    })
}

/// Tries everything, or believes what an earlier process found. If backends of this program crash as soon as they start, this
/// process becomes one that hides the GPUs from them.
pub(crate) fn probe(config: &ProbeConfig) -> &'static ProbeReport {
    let report = probe::probe(config);
    hide_gpus(report);
    report
}

/// As [`probe`], but tries everything anew.
pub(crate) fn probe_afresh(config: &ProbeConfig) -> &'static ProbeReport {
    let report = probe::probe_afresh(config);
    hide_gpus(report);
    report
}

/// Starts this program anew in its own place, because its variables cannot be changed for the libraries that it has loaded. Does
/// nothing when nothing is to be hidden, and where a process cannot be replaced: then the load refuses, and says what to set.
fn hide_gpus(report: &ProbeReport) {
    #[cfg(unix)]
    if !report.hide_gpus.is_empty()
        && let (Ok(program), Ok(known)) = (std::env::current_exe(), serde_json::to_string(&report.problems))
    {
        use std::os::unix::process::CommandExt as _;
        tracing::warn!("starting anew with the GPUs hidden");
        let mut command = std::process::Command::new(program);
        let hidden = report.hide_gpus.iter().cloned();
        let problem = command.args(std::env::args_os().skip(1)).envs(hidden).env(KNOWN_PROBLEMS, known).exec();
        tracing::error!("cannot start anew: {problem}");
    }
    #[cfg(not(unix))]
    let _ = report;
}
