//! Everything `--gpu=debug` prints: what is there, what is used, and why not the rest.

use std::fmt::{self, Write};

use serde::{Deserialize, Serialize};

use crate::choice::{BuildBackends, DeviceChoice};
use crate::context::{GpuOptions, apply_limit};
use crate::device::{DeviceInfo, MemoryKind};
use crate::machine::Machine;
use crate::memory::format_bytes;
use crate::select::select;
use crate::visible::DeviceOrder;

/// A report on the machine, the build and the choice. [`Display`](fmt::Display) is for people, serde for programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// The version of this crate.
    pub version: String,
    /// The backends in the build.
    pub build: BuildBackends,
    /// What was asked for.
    pub choice: DeviceChoice,
    /// The user's memory limit, if there is one.
    pub memory_limit_bytes: Option<u64>,
    /// The label of the device that the choice comes down to; `None` when it is refused.
    pub selected: Option<String>,
    /// Why the choice was refused, or why `auto` is the CPU.
    pub reason: Option<String>,
    /// What was found.
    pub machine: Machine,
}

impl Diagnosis {
    /// Probes the machine. Works just as well when the choice cannot be met: that is when it is read.
    pub fn collect(options: GpuOptions) -> Self {
        Self::of(Machine::probe(), options)
    }

    pub(crate) fn of(mut machine: Machine, options: GpuOptions) -> Self {
        let (selected, reason) = match select(&machine, options.choice, options.build) {
            Ok(selection) => {
                apply_limit(&mut machine, selection.device, options.memory_limit_bytes);
                (Some(machine.devices[selection.device].label()), selection.fallback_reason)
            }
            Err(error) => (None, Some(error.to_string())),
        };
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            build: options.build,
            choice: options.choice,
            memory_limit_bytes: options.memory_limit_bytes,
            selected,
            reason,
            machine,
        }
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = &self.machine;
        let yes_or_none = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".to_owned());

        writeln!(f, "Minerva {} on {} {}", self.version, m.os, m.cpu.architecture)?;
        section(f, "Selection")?;
        line(f, "asked for", &format!("--gpu={}", self.choice))?;
        line(f, "build has", &self.build.to_string())?;
        line(f, "selected", &self.selected.clone().unwrap_or_else(|| "nothing, the choice is refused".to_owned()))?;
        if let Some(reason) = &self.reason {
            line(f, "reason", reason)?;
        }

        section(f, "Devices")?;
        device_table(f, self)?;

        for doubt in &m.doubts {
            writeln!(f, "     {doubt}")?;
        }

        section(f, "NVIDIA")?;
        line(f, "driver", &m.driver.to_string())?;
        let on_bus = if m.nvidia_pci.is_empty() { "none".to_owned() } else { m.nvidia_pci.join(", ") };
        line(f, "GPUs on the PCI bus", &on_bus)?;
        line(f, "CUDA_VISIBLE_DEVICES", &visibility(m))?;
        let order = match m.cuda_device_order {
            DeviceOrder::FastestFirst => "FASTEST_FIRST (CUDA's default: the fastest GPU is cuda:0)",
            DeviceOrder::PciBusId => "PCI_BUS_ID (numbers as in nvidia-smi)",
        };
        line(f, "CUDA_DEVICE_ORDER", order)?;

        section(f, "CPU")?;
        line(f, "model", &m.cpu.model)?;
        line(f, "machine", &counts(m.cpu.physical_cores, m.cpu.logical_cpus))?;
        line(f, "affinity mask", &counts(m.cpu.affinity_cores, m.cpu.affinity_cpus))?;
        let quota = m.cgroup.cpu_quota_millis.map(|millis| {
            format!("{}.{:03} CPUs ({})", millis / 1000, millis % 1000, m.cgroup.cpu_source.as_deref().unwrap_or("?"))
        });
        line(f, "cgroup quota", &yes_or_none(&quota))?;
        line(f, "threads", &m.cpu.threads.to_string())?;
        line(f, "instruction sets", &m.cpu.features.join(" "))?;

        section(f, "Memory")?;
        let machine = free_of(m.memory.machine_free_bytes, m.memory.machine_total_bytes);
        line(f, "machine", &machine)?;
        let group = m.cgroup.memory_limit_bytes.map(|limit| {
            let source = m.cgroup.memory_source.as_deref().unwrap_or("?");
            format!("{} ({source})", free_of(m.cgroup.memory_free_bytes.unwrap_or(limit), limit))
        });
        line(f, "cgroup limit", &yes_or_none(&group))?;
        line(f, "usable", &free_of(m.memory.free_bytes, m.memory.total_bytes))?;
        let limit = self
            .memory_limit_bytes
            .map(|bytes| format!("{} (MINERVA_GPU_MEMORY_LIMIT or config)", format_bytes(bytes)));
        line(f, "user's limit", &limit.unwrap_or_else(|| "none: the share of each device".to_owned()))
    }
}

fn section(f: &mut fmt::Formatter<'_>, title: &str) -> fmt::Result {
    writeln!(f, "\n{title}")
}

fn line(f: &mut fmt::Formatter<'_>, name: &str, value: &str) -> fmt::Result {
    writeln!(f, "  {name:<22}{value}")
}

fn counts(cores: usize, cpus: usize) -> String {
    format!("cores {cores}, hardware threads {cpus}")
}

fn free_of(free: u64, total: u64) -> String {
    format!("{} free of {}", format_bytes(free), format_bytes(total))
}

fn visibility(machine: &Machine) -> String {
    match (&machine.cuda_visible_devices, &machine.visibility_note) {
        (None, None) => "not set".to_owned(),
        (None, Some(note)) => format!("not set; {note}"),
        (Some(list), None) => format!("`{list}`"),
        (Some(list), Some(note)) => format!("`{list}`: {note}"),
    }
}

/// A row per device, and below it whatever a column cannot hold.
fn device_table(f: &mut fmt::Formatter<'_>, diagnosis: &Diagnosis) -> fmt::Result {
    let head = ["", "device", "name", "cc", "memory", "total", "free", "limit", "PCI"].map(str::to_owned);
    let row = |device: &DeviceInfo| {
        let selected = diagnosis.selected.as_ref() == Some(&device.label());
        let memory = match device.memory_kind {
            MemoryKind::Discrete => "own",
            MemoryKind::Unified => "system",
        };
        [
            if selected { "*" } else { "" }.to_owned(),
            device.label(),
            device.name.clone(),
            device.compute_capability.map_or("-".to_owned(), |c| c.to_string()),
            memory.to_owned(),
            format_bytes(device.total_bytes),
            format_bytes(device.free_bytes),
            format_bytes(device.limit_bytes),
            device.pci_bus_id.clone().unwrap_or_else(|| "-".to_owned()),
        ]
    };
    let devices = &diagnosis.machine.devices;
    let rows: Vec<_> = devices.iter().map(row).collect();
    let widths: Vec<usize> = (0..head.len())
        .map(|column| rows.iter().chain([&head]).map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut print = |row: &[String]| {
        let mut text = String::from("  ");
        for (cell, width) in row.iter().zip(&widths) {
            write!(text, "{cell:<width$}  ")?;
        }
        writeln!(f, "{}", text.trim_end())
    };
    print(&head)?;
    for row in &rows {
        print(row)?;
    }
    for device in devices {
        let uuid = device.uuid.iter().cloned();
        let reason = device.unusable.iter().map(|reason| format!("not used: {reason}"));
        let notes: Vec<_> = uuid.chain(reason).collect();
        if !notes.is_empty() {
            writeln!(f, "     {}  {}", device.label(), notes.join("  "))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvml::RawGpu;
    use crate::select::tests::machine;
    use crate::testing::gpu;
    use expect_test::expect;

    fn two_gpus() -> Diagnosis {
        let kepler = RawGpu { name: "Tesla K80".to_owned(), compute_capability: Some((3, 7)), ..gpu(1) };
        let mut machine = machine(Some(vec![gpu(0), kepler, gpu(2)]), Some("0,1,9"));
        machine.cpu = crate::CpuInfo {
            model: "AMD EPYC".to_owned(),
            architecture: "x86_64".to_owned(),
            logical_cpus: 32,
            physical_cores: 16,
            affinity_cpus: 32,
            affinity_cores: 16,
            quota_cpus: Some(2),
            threads: 2,
            features: vec!["avx2".to_owned(), "avx512f".to_owned()],
        };
        machine.cgroup.cpu_quota_millis = Some(2500);
        machine.cgroup.cpu_source = Some("/sys/fs/cgroup/cpu.max".to_owned());
        let options = GpuOptions {
            build: BuildBackends { cuda: true, ..BuildBackends::default() },
            memory_limit_bytes: Some(4 << 30),
            ..GpuOptions::default()
        };
        Diagnosis::of(machine, options)
    }

    #[test]
    fn the_report_is_readable() {
        let text = two_gpus().to_string().replace(env!("CARGO_PKG_VERSION"), "x.y.z");
        expect![[r#"
            Minerva x.y.z on linux x86_64

            Selection
              asked for             --gpu=auto
              build has             cpu, cuda
              selected              cuda:0

            Devices
                 device  name                     cc   memory  total     free      limit     PCI
              *  cuda:0  NVIDIA GeForce RTX 4090  8.9  own     24.0 GiB  24.0 GiB  4.0 GiB   0000:65:00.0
                 cuda:1  Tesla K80                3.7  own     24.0 GiB  24.0 GiB  4.0 GiB   0000:66:00.0
                 cuda:-  NVIDIA GeForce RTX 4090  8.9  own     24.0 GiB  24.0 GiB  4.0 GiB   0000:67:00.0
                 cpu     AMD EPYC                 -    system  64.0 GiB  48.0 GiB  16.0 GiB  -
                 cuda:0  GPU-00000000
                 cuda:1  GPU-00000001  not used: its compute capability is 3.7, 5.0 (Maxwell) or newer is needed
                 cuda:-  GPU-00000002  not used: hidden by CUDA_VISIBLE_DEVICES=`0,1,9`: `9` names no device and ends the list

            NVIDIA
              driver                version 535.104.05, runs CUDA up to 12.2
              GPUs on the PCI bus   none
              CUDA_VISIBLE_DEVICES  `0,1,9`: `9` names no device and ends the list
              CUDA_DEVICE_ORDER     PCI_BUS_ID (numbers as in nvidia-smi)

            CPU
              model                 AMD EPYC
              machine               cores 16, hardware threads 32
              affinity mask         cores 16, hardware threads 32
              cgroup quota          2.500 CPUs (/sys/fs/cgroup/cpu.max)
              threads               2
              instruction sets      avx2 avx512f

            Memory
              machine               48.0 GiB free of 64.0 GiB
              cgroup limit          none
              usable                48.0 GiB free of 64.0 GiB
              user's limit          4.0 GiB (MINERVA_GPU_MEMORY_LIMIT or config)
        "#]].assert_eq(&text);
    }

    #[test]
    fn a_refused_choice_is_part_of_the_report() {
        let options = GpuOptions { choice: DeviceChoice::Cuda(Some(3)), ..GpuOptions::default() };
        let report = Diagnosis::collect(options);
        assert_eq!(report.selected, None);
        assert!(report.to_string().contains("nothing, the choice is refused"));
        assert!(report.to_string().contains("`--gpu=cuda:3` was asked for, but this build has no CUDA backend"));
    }

    #[test]
    fn the_report_survives_json() {
        let report = two_gpus();
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Diagnosis>(&json).unwrap(), report);
    }
}
