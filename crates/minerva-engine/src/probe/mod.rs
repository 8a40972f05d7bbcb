//! Devices, backend modules and the NVIDIA driver are tried in a child process first.
//!
//! A broken driver, an instruction that the CPU lacks or a wedged GPU ends or hangs whoever touches it. So a child touches it:
//! it loads each module, asks each device what it is, allocates a little of its memory and computes one small product, and says
//! before each step what it is about to do. What ends the child is left out here, with a line in the log that says why and what
//! to do. A finding without problems is kept until the next boot, driver or build (`cache.rs`).
//!
//! The child is a program that calls [`run_probe_child`], usually the same one: see [`ProbeConfig`]. Without one nothing is
//! tried, and a broken backend takes the process along. Start with [`probe`]; `parent.rs` runs the child, `child.rs` is it.

mod cache;
mod child;
mod parent;
mod protocol;
mod report;

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Instant;

use minerva_gpu::GpuDevice;
use minerva_gpu::findings::{self, DeviceFault, Findings, ListedDevice};
use minerva_llama::DeviceKind;
use serde::{Deserialize, Serialize};

pub use child::run_probe_child;
pub use report::{Failure, ProbeReport, ProbedDevice, Problem, Step, Subject};

/// How to try things out.
///
/// # Examples
/// A program that lets a copy of itself crash in its place:
/// ```no_run
/// use minerva_engine::probe::{ProbeConfig, run_probe_child};
/// let mut args = std::env::args().skip(1);
/// if args.next().as_deref() == Some("probe-child") {
///     std::process::exit(if run_probe_child(args) == std::process::ExitCode::SUCCESS { 0 } else { 1 });
/// }
/// let probe = ProbeConfig::new(std::env::current_exe()?, ["probe-child".to_owned()]);
/// let config = minerva_engine::EngineConfig { probe: Some(probe), ..minerva_engine::EngineConfig::new("model.gguf") };
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeConfig {
    /// The program to start; it calls [`run_probe_child`] with the arguments after [`args`](Self::args).
    pub program: PathBuf,
    /// What makes the program do so.
    pub args: Vec<String>,
    /// How long one step may take, in milliseconds; all of it takes at most a second more.
    pub time_limit_ms: u64,
    /// Where a finding without problems is kept; `None` keeps nothing.
    pub cache_file: Option<PathBuf>,
    /// What is known before: a process that hid the GPUs and started anew hands over why.
    pub known: Vec<Problem>,
}

impl ProbeConfig {
    /// Five seconds, nothing kept.
    pub fn new(program: impl Into<PathBuf>, args: impl IntoIterator<Item = String>) -> Self {
        Self {
            program: program.into(),
            args: args.into_iter().collect(),
            time_limit_ms: 5_000,
            cache_file: None,
            known: Vec::new(),
        }
    }
}

static REPORT: OnceLock<ProbeReport> = OnceLock::new();

/// Tries everything once per process, or reads what an earlier process found; leaves out what failed, and logs it. To be called
/// before anything else touches llama.cpp: [`Engine::load`](crate::Engine::load) with a
/// [`probe`](crate::EngineConfig::probe) in its configuration does.
pub fn probe(config: &ProbeConfig) -> &'static ProbeReport {
    REPORT.get_or_init(|| {
        let cached = if config.known.is_empty() { cached(config) } else { None };
        let report = cached.unwrap_or_else(|| afresh(config));
        leave_out(&report);
        log(&report);
        report
    })
}

/// As [`probe`], but never believes an earlier process.
pub fn probe_afresh(config: &ProbeConfig) -> &'static ProbeReport {
    REPORT.get_or_init(|| {
        let report = afresh(config);
        leave_out(&report);
        report
    })
}

/// What this process found; `None` when nothing was tried.
pub fn report() -> Option<&'static ProbeReport> {
    REPORT.get()
}

fn cached(config: &ProbeConfig) -> Option<ProbeReport> {
    let started = Instant::now();
    let report = cache::read(config.cache_file.as_ref()?, &cache::Key::now(config)?)?;
    Some(ProbeReport { took_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX), ..report })
}

fn afresh(config: &ProbeConfig) -> ProbeReport {
    if !config.known.is_empty() {
        return parent::probe(config);
    }
    let key = config.cache_file.as_ref().and_then(|file| Some((file, cache::Key::now(config)?)));
    let report = parent::probe(config);
    if let Some((file, key)) = key
        && let Err(problem) = cache::write(file, key, &report)
    {
        tracing::debug!("cannot keep what the probe found in {}: {problem}", file.display());
    }
    report
}

fn log(report: &ProbeReport) {
    tracing::debug!(cached = report.is_cached, took_ms = report.took_ms, devices = ?report.devices, "probe");
    if let Some(reason) = &report.gave_up {
        tracing::warn!("devices are used untried: {reason}");
    }
    for problem in &report.problems {
        tracing::warn!("{problem}");
    }
}

/// Makes the rest of this process do without what failed.
fn leave_out(report: &ProbeReport) {
    if report.gave_up.is_some() || !report.hide_gpus.is_empty() {
        return; // nothing is known, or nothing may be touched
    }
    // The child tried the CPU first; ggml has its own order, and with it go the numbers of devices.
    let groups = minerva_llama::module_groups();
    let order: Vec<_> = groups.iter().flat_map(|group| group.variants.iter().chain(&group.plain)).collect();
    let mut modules = report.modules.clone();
    modules.sort_by_key(|module| order.iter().position(|known| *known == module));
    minerva_llama::use_modules(modules);
    let mut left_out: Vec<_> = report.devices.iter().filter(|device| !device.works).map(|d| d.name.clone()).collect();
    left_out.extend(report.problems.iter().filter_map(|problem| match &problem.subject {
        Subject::Device(name) => Some(name.clone()),
        _ => None,
    }));
    // The child may have had no time to list every device.
    let listed = |name: &String| report.devices.iter().any(|device| device.name == *name);
    left_out.extend(minerva_llama::device_names().into_iter().filter(|name| !listed(name)));
    minerva_llama::leave_out_devices(left_out.clone());
    if report.problems.iter().any(|problem| matches!(problem.subject, Subject::Repacked(_))) {
        minerva_llama::leave_out_extra_buffers();
    }
    findings::record(findings(report, &left_out));
}

fn findings(report: &ProbeReport, left_out: &[String]) -> Findings {
    let devices = minerva_llama::devices();
    let gpus = devices.iter().filter(|device| matches!(device.kind, DeviceKind::Gpu | DeviceKind::IntegratedGpu));
    let listed = gpus.map(|device| {
        // A device that is left out is not asked for its address, but the child was told.
        let tried = report.devices.iter().find(|tried| tried.name == device.name);
        ListedDevice {
            name: device.name.clone(),
            description: device.description.clone(),
            pci_bus_id: device.pci_bus_id.clone().or_else(|| tried?.pci_bus_id.clone()),
            is_integrated: device.kind == DeviceKind::IntegratedGpu,
            total_bytes: device.total_bytes,
            free_bytes: device.free_bytes,
        }
    });
    Findings {
        cuda_was_asked: minerva_llama::has_backend(c"CUDA"),
        listed: listed.collect(),
        faults: faults(report, left_out),
        driver_fault: report
            .problems
            .iter()
            .find(|p| p.subject == Subject::Driver)
            .map(|p| format!("the process that tried it {}", p.failure)),
    }
}

fn faults(report: &ProbeReport, left_out: &[String]) -> Vec<DeviceFault> {
    let of_device = left_out.iter().filter_map(|name| {
        let problem = report.problems.iter().find(|p| p.subject == Subject::Device(name.clone()));
        let reason =
            problem.map_or_else(|| "it was not tried, because the time was used up".to_owned(), Problem::to_string);
        Some(DeviceFault { name: Some(name.clone()), kind: kind_of(name)?, reason })
    });
    let of_backend = report.problems.iter().flat_map(|problem| {
        let fault = |kind: &GpuDevice| DeviceFault { name: None, kind: *kind, reason: problem.to_string() };
        kinds_in(&problem.subject).iter().map(fault).collect::<Vec<_>>()
    });
    of_device.chain(of_backend).collect()
}

/// The kinds of GPU that are out of reach without `subject`.
fn kinds_in(subject: &Subject) -> &'static [GpuDevice] {
    let file = match subject {
        Subject::Backends => return &[GpuDevice::Cuda, GpuDevice::Metal],
        Subject::Module(path) => path.file_name().unwrap_or_default().to_string_lossy(),
        _ => return &[],
    };
    match file.as_ref() {
        cuda if cuda.contains("ggml-cuda") => &[GpuDevice::Cuda],
        metal if metal.contains("ggml-metal") => &[GpuDevice::Metal],
        _ => &[],
    }
}

fn kind_of(name: &str) -> Option<GpuDevice> {
    let kinds = [("CUDA", GpuDevice::Cuda), ("MTL", GpuDevice::Metal), ("Metal", GpuDevice::Metal)];
    kinds.into_iter().find(|(start, _)| name.starts_with(start)).map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(subject: Subject) -> Problem {
        Problem { subject, step: Step::Load, failure: Failure::Hung { waited_ms: 5_000 } }
    }

    #[test]
    fn a_module_takes_its_whole_backend_out_and_a_device_only_itself() {
        let report = ProbeReport {
            problems: vec![
                problem(Subject::Module("/m/libggml-cuda.so".into())),
                problem(Subject::Module("/m/libggml-cpu-zen4.so".into())),
                problem(Subject::Device("CUDA1".to_owned())),
            ],
            ..ProbeReport::default()
        };
        let faults = faults(&report, &["CUDA1".to_owned(), "CUDA2".to_owned(), "RPC0".to_owned()]);
        let seen: Vec<_> = faults.iter().map(|fault| (fault.name.as_deref(), fault.kind)).collect();
        assert_eq!(seen, [(Some("CUDA1"), GpuDevice::Cuda), (Some("CUDA2"), GpuDevice::Cuda), (None, GpuDevice::Cuda)]);
        assert!(faults[1].reason.contains("was not tried"), "{}", faults[1].reason);
        assert_eq!(kinds_in(&Subject::Backends), [GpuDevice::Cuda, GpuDevice::Metal]);
        assert!(faults[2].reason.contains("libggml-cuda.so did not answer for 5.0 s"), "{}", faults[2].reason);
    }
}
