//! `minerva doctor`: tries every device anew, and says what works, what does not, and what to do about it.
//!
//! Exit codes: 0 when a model can run as configured, 1 when not.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use minerva_engine::Engine;
use minerva_engine::probe::{ProbeReport, Problem, Subject};
use minerva_gpu::{BuildBackends, DeviceInfo, Diagnosis, DriverState, GpuDevice, GpuOptions, Machine, format_bytes};

use crate::config::Config;
use crate::probing;
use crate::program::{print, refuse};

/// Prints the findings.
pub(crate) fn run(config: &Config) -> ExitCode {
    let choice = match config.device() {
        Ok(choice) => choice,
        Err(problem) => return refuse(&problem),
    };
    let report = probing::config(config).map(|probe| probing::probe_afresh(&probe));
    if let Some(reason) = report.and_then(ProbeReport::nothing_works) {
        print(&format!("{}\nNothing here can run a model: {reason}\n", probe_section(report)));
        return ExitCode::FAILURE;
    }
    let build = Engine::build_info();
    let has = |name: &str| build.backends.iter().any(|backend| backend == name);
    let backends = BuildBackends { cuda: has("cuda"), metal: has("metal"), vulkan: has("vulkan") };
    let options = GpuOptions { choice, build: backends, memory_limit_bytes: config.gpu.max_memory_mb };
    let diagnosis = Diagnosis::collect(options);
    print(&checkup(report, &diagnosis));
    if diagnosis.selected.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The whole text.
fn checkup(report: Option<&ProbeReport>, diagnosis: &Diagnosis) -> String {
    let machine = &diagnosis.machine;
    let mut text = String::from("Devices\n");
    let rows: Vec<_> = machine.devices.iter().map(|device| row(device, report)).collect();
    table(&mut text, &["device", "name", "state", "why"], &rows);
    let _ = write!(text, "\n{}", probe_section(report));
    let _ = write!(text, "\nNVIDIA driver\n  {}\n", machine.driver);
    let _ = write!(text, "\nLimits\n{}", limits(machine));
    let advice = advice(report, machine);
    if advice.is_empty() {
        text.push_str("\nNothing to mend.\n");
    } else {
        text.push_str("\nWhat to do\n");
        for (n, line) in advice.iter().enumerate() {
            let _ = writeln!(text, "  {}. {line}", n + 1);
        }
    }
    let verdict = match (&diagnosis.selected, &diagnosis.reason) {
        (Some(device), Some(reason)) => format!("`--gpu={}` runs on {device}: {reason}", diagnosis.choice),
        (Some(device), None) => format!("`--gpu={}` runs on {device}", diagnosis.choice),
        (None, reason) => format!("nothing can run: {}", reason.as_deref().unwrap_or("no reason is known")),
    };
    let _ = write!(text, "\nVerdict\n  {verdict}\n");
    text
}

fn row(device: &DeviceInfo, report: Option<&ProbeReport>) -> [String; 4] {
    let (state, why) = match (&device.unusable, report) {
        (Some(reason), _) => ("left out", reason.as_str()),
        (None, None) => ("untried", "the probe is switched off (`gpu.probe`)"),
        (None, Some(report)) if report.gave_up.is_some() => ("untried", "the probe itself failed, see below"),
        (None, Some(report)) if was_tried(device, report) => ("works", ""),
        (None, Some(_)) => ("untried", "this build has no backend for it"),
    };
    [device.label(), device.name.clone(), state.to_owned(), why.to_owned()]
}

fn was_tried(device: &DeviceInfo, report: &ProbeReport) -> bool {
    report.devices.iter().filter(|tried| tried.works).any(|tried| match (device.kind, device.index) {
        (GpuDevice::Cpu, _) => tried.name == "CPU",
        (GpuDevice::Cuda, Some(index)) => tried.name == format!("CUDA{index}"),
        (GpuDevice::Cuda, None) => false,
        (GpuDevice::Metal, _) => tried.name.starts_with("MTL") || tried.name.starts_with("Metal"),
    })
}

/// What was tried and how it went: the last section of `--gpu=debug` too.
pub(crate) fn probe_section(report: Option<&ProbeReport>) -> String {
    let Some(report) = report else { return "Probe\n  switched off (`gpu.probe`)\n".to_owned() };
    let age = if report.is_cached { ", as found earlier since the last boot" } else { "" };
    let mut text = format!("Probe ({} ms{age})\n", report.took_ms);
    if let Some(reason) = &report.gave_up {
        let _ = writeln!(text, "  did not work, devices are used untried: {reason}");
    }
    let file = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut rows: Vec<_> = report.modules.iter().map(|path| [file(path), "loaded".to_owned()]).collect();
    for device in &report.devices {
        let name = format!("{} {}", device.name, device.description).trim().to_owned();
        let place = device.pci_bus_id.as_ref().map_or_else(String::new, |id| format!(" ({id})"));
        let state = if device.works && report.problem_of(device).is_none() { "works" } else { "left out" };
        rows.push([name + &place, state.to_owned()]);
    }
    let others = report.problems.iter().filter(|problem| !matches!(problem.subject, Subject::Device(_)));
    rows.extend(others.map(|problem| [problem.subject.to_string(), "left out".to_owned()]));
    table(&mut text, &[], &rows);
    for problem in &report.problems {
        let _ = writeln!(text, "  {problem}");
    }
    text
}

fn limits(machine: &Machine) -> String {
    let amount = |bytes| format_bytes(bytes);
    let memory = match (machine.cgroup.memory_limit_bytes, &machine.cgroup.memory_source) {
        (Some(limit), source) => format!(
            "{} of the machine's {}, {} of it free ({})",
            amount(limit.min(machine.memory.machine_total_bytes)),
            amount(machine.memory.machine_total_bytes),
            amount(machine.memory.free_bytes),
            source.as_deref().unwrap_or("cgroup")
        ),
        (None, _) => format!(
            "none: {} free of {}",
            amount(machine.memory.machine_free_bytes),
            amount(machine.memory.machine_total_bytes)
        ),
    };
    let cpu = match machine.cgroup.cpu_quota_millis {
        Some(millis) => format!(
            "{}.{:03} CPUs of {} ({})",
            millis / 1000,
            millis % 1000,
            machine.cpu.logical_cpus,
            machine.cgroup.cpu_source.as_deref().unwrap_or("cgroup")
        ),
        None => format!("none: {} of {} hardware threads", machine.cpu.affinity_cpus, machine.cpu.logical_cpus),
    };
    format!("  memory   {memory}\n  CPU time {cpu}\n")
}

/// One line per thing that somebody can do, the gravest first.
fn advice(report: Option<&ProbeReport>, machine: &Machine) -> Vec<String> {
    let mut lines = Vec::new();
    for problem in report.into_iter().flat_map(|report| &report.problems) {
        lines.push(format!("{}: {}", problem.subject, Problem::advice(problem)));
    }
    let driver_is_broken = !matches!(machine.driver, DriverState::Ready { .. } | DriverState::LibraryMissing);
    if driver_is_broken || (machine.driver == DriverState::LibraryMissing && !machine.nvidia_pci.is_empty()) {
        lines.push(machine.driver.to_string());
    }
    for device in &machine.devices {
        // What the probe found is said above, with the device's name in llama.cpp.
        let of_probe = machine.faults.iter().any(|fault| Some(&fault.reason) == device.unusable.as_ref());
        if let Some(reason) = device.unusable.as_ref().filter(|_| !of_probe) {
            lines.push(format!("{} {}: {reason}", device.label(), device.name));
        }
    }
    lines.extend(machine.doubts.iter().cloned());
    let memory = &machine.memory;
    if memory.total_bytes < memory.machine_total_bytes / 2 {
        lines.push(format!(
            "the control group leaves {} of the machine's {} of memory: raise the container's memory limit (`docker run --memory`, \
            `MemoryMax=` of the service) if models do not fit",
            format_bytes(memory.total_bytes),
            format_bytes(memory.machine_total_bytes)
        ));
    }
    if machine.cgroup.cpu_quota_millis.is_some_and(|millis| millis < 1000) {
        lines.push(
            "the control group leaves less than one CPU: steps stall while the quota is used up; raise it (`docker run --cpus`, \
            `CPUQuota=` of the service)"
                .to_owned(),
        );
    }
    lines
}

/// Columns as wide as their widest cell; the last one as long as it is.
fn table<const N: usize>(text: &mut String, head: &[&str], rows: &[[String; N]]) {
    let mut all: Vec<Vec<&str>> = rows.iter().map(|row| row.iter().map(String::as_str).collect()).collect();
    if !head.is_empty() {
        all.insert(0, head.to_vec());
    }
    let width = |column: usize| all.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in &all {
        let mut line = String::from("  ");
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minerva_engine::probe::{Failure, ProbedDevice, Step};
    use minerva_gpu::DeviceChoice;

    fn on_cpu() -> Diagnosis {
        let mut diagnosis = Diagnosis::collect(GpuOptions { choice: DeviceChoice::Cpu, ..GpuOptions::default() });
        diagnosis.machine.devices.retain(|device| device.kind == GpuDevice::Cpu);
        diagnosis.machine.driver = DriverState::LibraryMissing;
        diagnosis.machine.nvidia_pci.clear();
        diagnosis.machine.doubts.clear();
        diagnosis.machine.memory.total_bytes = diagnosis.machine.memory.machine_total_bytes;
        diagnosis.machine.cgroup.cpu_quota_millis = None;
        diagnosis
    }

    fn tried(name: &str, works: bool) -> ProbedDevice {
        let (description, is_gpu) = ("a chip".to_owned(), name != "CPU");
        ProbedDevice { name: name.to_owned(), description, pci_bus_id: None, is_gpu, module: None, works }
    }

    #[test]
    fn a_sound_machine_has_nothing_to_mend() {
        let report = ProbeReport { devices: vec![tried("CPU", true)], ..ProbeReport::default() };
        let text = checkup(Some(&report), &on_cpu());
        assert!(text.contains("Nothing to mend.") && text.contains("`--gpu=cpu` runs on cpu"), "{text}");
        assert!(checkup(None, &on_cpu()).contains("untried"));
    }

    #[test]
    fn every_problem_is_a_line_with_what_to_do() {
        let mut diagnosis = on_cpu();
        let machine = &mut diagnosis.machine;
        machine.memory.machine_total_bytes = 64 << 30;
        machine.memory.total_bytes = 1 << 30;
        machine.cgroup.cpu_quota_millis = Some(500);
        machine.nvidia_pci = vec!["0000:65:00.0".to_owned()];
        machine.doubts = vec!["CUDA calls it 0, the driver 1".to_owned()];
        let failure =
            Failure::Crashed { cause: "aborted".to_owned(), detail: "no kernel image is available".to_owned() };
        let subject = Subject::Device("CUDA0".to_owned());
        let report = ProbeReport {
            devices: vec![tried("CPU", true), tried("CUDA0", false)],
            problems: vec![Problem { subject, step: Step::Compute, failure }],
            ..ProbeReport::default()
        };
        let text = checkup(Some(&report), &diagnosis);
        let advice: Vec<_> = text.lines().skip_while(|line| *line != "What to do").skip(1).collect();
        for (n, words) in [
            "1. the device CUDA0: this build has no code for the GPU's compute capability",
            "2. the driver library (libnvidia-ml, nvml.dll) cannot be loaded; install driver 470",
            "3. CUDA calls it 0, the driver 1",
            "4. the control group leaves 1.0 GiB of the machine's 64.0 GiB",
            "5. the control group leaves less than one CPU",
        ]
        .iter()
        .enumerate()
        {
            assert!(advice[n].contains(words), "{text}");
        }
        assert!(text.contains("CUDA0 a chip  left out"), "{text}");
    }
}
