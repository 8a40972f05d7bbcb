//! One device as Minerva sees it, and how NVML's GPUs become CUDA's devices.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::findings::MEMORY_UNKNOWN;
use crate::memory::{default_limit_bytes, format_bytes};
use crate::nvml::{MIN_DRIVER_MAJOR, MemoryReading, RawGpu, Snapshot};
use crate::ram::SystemMemory;
use crate::visible::{Candidate, DeviceOrder, Ordinal, enumerate};

/// Maxwell, the oldest generation that the guide supports.
pub const MIN_COMPUTE_CAPABILITY: ComputeCapability = ComputeCapability { major: 5, minor: 0 };

/// What runs the model. Its `Debug` form is the word in the guide's log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GpuDevice {
    /// A Mac's GPU.
    Metal,
    /// An NVIDIA GPU, or a MIG instance of one.
    Cuda,
    /// No GPU.
    Cpu,
}

/// Whose memory a device computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryKind {
    /// Its own.
    Discrete,
    /// The system's RAM: what the device takes, everybody else lacks.
    Unified,
}

/// The CUDA feature level of an NVIDIA GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ComputeCapability {
    /// The generation: 9 is Hopper.
    pub major: u32,
    /// Within the generation.
    pub minor: u32,
}

impl fmt::Display for ComputeCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// One device, as it was when the machine was probed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Metal, CUDA or CPU.
    pub kind: GpuDevice,
    /// The number in `cuda:N`: CUDA's own, after `CUDA_VISIBLE_DEVICES`. `None` if CUDA does not show the device.
    pub index: Option<u32>,
    /// The number that nvidia-smi shows; for a MIG instance its GPU's.
    pub nvml_index: Option<u32>,
    /// The marketing name, for a MIG instance with its profile.
    pub name: String,
    /// `GPU-…` or `MIG-…`.
    pub uuid: Option<String>,
    /// `0000:65:00.0`, as llama.cpp prints its `device_id`: match devices by this or the UUID, never by number.
    pub pci_bus_id: Option<String>,
    /// All memory; for unified memory the system's, after the cgroup's limit.
    pub total_bytes: u64,
    /// Free memory at the time of the probe; [`GpuContext::estimate_memory`](crate::GpuContext::estimate_memory) reads anew.
    pub free_bytes: u64,
    /// NVIDIA only.
    pub compute_capability: Option<ComputeCapability>,
    /// NVIDIA only, such as `535.104.05`.
    pub driver_version: Option<String>,
    /// Bytes per second of its memory; NVIDIA only.
    pub bandwidth: Option<u64>,
    /// Own memory or the system's.
    pub memory_kind: MemoryKind,
    /// The most that Minerva may use: the share of this kind of device, or the user's number.
    pub limit_bytes: u64,
    /// Why the device cannot be used, with what to do about it. `None`: it can.
    pub unusable: Option<String>,
}

impl DeviceInfo {
    /// The `--gpu=` value that selects the device (`cuda:0`, `metal`, `cpu`); `cuda:-` for a hidden one.
    pub fn label(&self) -> String {
        match (self.kind, self.index) {
            (GpuDevice::Metal, _) => "metal".to_owned(),
            (GpuDevice::Cpu, _) => "cpu".to_owned(),
            (GpuDevice::Cuda, Some(index)) => format!("cuda:{index}"),
            (GpuDevice::Cuda, None) => "cuda:-".to_owned(),
        }
    }

    /// Label and name for messages; the name alone when there is no number to select it by.
    pub(crate) fn title(&self) -> String {
        match self.index {
            Some(_) => format!("{} {}", self.label(), self.name),
            None => self.name.clone(),
        }
    }

    /// Whether this is a GPU that can be used.
    pub fn is_usable_gpu(&self) -> bool {
        self.kind != GpuDevice::Cpu && self.unusable.is_none()
    }

    /// The CPU as a device: its memory is the system's.
    pub(crate) fn cpu(name: &str, ram: &SystemMemory) -> Self {
        Self {
            kind: GpuDevice::Cpu,
            index: Some(0),
            nvml_index: None,
            name: name.to_owned(),
            uuid: None,
            pci_bus_id: None,
            total_bytes: ram.total_bytes,
            free_bytes: ram.free_bytes,
            compute_capability: None,
            driver_version: None,
            bandwidth: None,
            memory_kind: MemoryKind::Unified,
            limit_bytes: default_limit_bytes(GpuDevice::Cpu, ram.total_bytes),
            unusable: None,
        }
    }
}

impl fmt::Display for DeviceInfo {
    /// `cuda:0 NVIDIA H100 80GB HBM3, 79.1 GiB free of 79.6 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (free, total) = (format_bytes(self.free_bytes), format_bytes(self.total_bytes));
        write!(f, "{} {}, {free} free of {total}", self.label(), self.name)
    }
}

/// NVML's GPUs as CUDA counts them: visible ones first, in CUDA's order, then the hidden and the broken ones.
///
/// The second part of the answer says what `CUDA_VISIBLE_DEVICES` did that its author may not have meant.
pub(crate) fn cuda_devices(
    snapshot: &Snapshot,
    variable: Option<&str>,
    order: DeviceOrder,
    ram: &SystemMemory,
) -> (Vec<DeviceInfo>, Option<String>) {
    let (working, broken): (Vec<_>, Vec<_>) = snapshot.gpus.iter().partition(|gpu| gpu.error.is_none());
    let candidates: Vec<_> = working.iter().map(|gpu| candidate(gpu)).collect();
    let shown = enumerate(variable, order, &candidates);
    let row = |gpu: &RawGpu, mig: Option<usize>| describe(snapshot, gpu, mig, ram);

    let mut devices = Vec::new();
    for (index, ordinal) in shown.devices.iter().enumerate() {
        let mut device = row(working[ordinal.gpu], ordinal.mig);
        device.index = Some(index as u32);
        devices.push(device);
    }
    for (gpu, raw) in working.iter().enumerate() {
        let parts: Vec<Option<usize>> = match &raw.mig {
            None => vec![None],
            Some(instances) if instances.is_empty() => {
                let mut device = row(raw, None);
                device.unusable = Some(
                    "MIG mode is on and there is no instance: create one (`sudo nvidia-smi mig -cgi <profile> -C`) or turn MIG off (`sudo nvidia-smi -mig 0`)"
                        .to_owned(),
                );
                devices.push(device);
                continue;
            }
            Some(instances) => (0..instances.len()).map(Some).collect(),
        };
        for mig in parts {
            if !shown.devices.contains(&Ordinal { gpu, mig }) {
                let mut device = row(raw, mig);
                device.unusable = Some(hidden_reason(variable, shown.note.as_deref()));
                devices.push(device);
            }
        }
    }
    for gpu in broken {
        devices.push(row(gpu, None));
    }
    (devices, shown.note)
}

fn candidate(gpu: &RawGpu) -> Candidate {
    let uuids = |instances: &Vec<_>| instances.iter().map(|m: &crate::nvml::RawMig| m.uuid.clone()).collect();
    Candidate { uuid: gpu.uuid.clone().unwrap_or_default(), mig: gpu.mig.as_ref().map(uuids), speed: gpu.speed }
}

fn hidden_reason(variable: Option<&str>, note: Option<&str>) -> String {
    match (variable, note) {
        (Some(list), None) => format!("hidden by CUDA_VISIBLE_DEVICES=`{list}`"),
        (Some(list), Some(note)) => format!("hidden by CUDA_VISIBLE_DEVICES=`{list}`: {note}"),
        (None, note) => note.unwrap_or("CUDA does not show it to this process").to_owned(),
    }
}

/// One GPU or MIG instance, not numbered yet.
fn describe(snapshot: &Snapshot, gpu: &RawGpu, mig: Option<usize>, ram: &SystemMemory) -> DeviceInfo {
    let instance = mig.and_then(|i| gpu.mig.as_ref()?.get(i));
    let memory = instance.map_or(&gpu.memory, |instance| &instance.memory);
    let (memory_kind, total_bytes, free_bytes) = match *memory {
        MemoryReading::Bytes { total, free } => (MemoryKind::Discrete, total, free),
        MemoryReading::NotAvailable => (MemoryKind::Unified, ram.total_bytes, ram.free_bytes),
        MemoryReading::Failed(_) => (MemoryKind::Discrete, 0, 0),
    };
    let compute_capability = gpu.compute_capability.map(|(major, minor)| ComputeCapability { major, minor });
    let unusable = gpu
        .error
        .as_ref()
        .map(|error| format!("the driver cannot open it: {error}; `nvidia-smi` and the kernel log say more"))
        .or_else(|| too_old(snapshot.driver_version.as_deref(), compute_capability))
        .or_else(|| match memory {
            MemoryReading::Failed(error) => Some(format!("{MEMORY_UNKNOWN}: {error}")),
            _ => None,
        });
    DeviceInfo {
        kind: GpuDevice::Cuda,
        index: None,
        nvml_index: Some(gpu.nvml_index),
        name: instance.map_or(&gpu.name, |instance| &instance.name).clone(),
        uuid: instance.map_or_else(|| gpu.uuid.clone(), |instance| Some(instance.uuid.clone())),
        pci_bus_id: gpu.pci_bus_id.clone(),
        total_bytes,
        free_bytes,
        compute_capability,
        driver_version: snapshot.driver_version.clone(),
        // A MIG instance has a part of it that NVML does not tell.
        bandwidth: if instance.is_some() { None } else { gpu.bandwidth },
        memory_kind,
        limit_bytes: default_limit_bytes(GpuDevice::Cuda, total_bytes),
        unusable,
    }
}

fn too_old(driver: Option<&str>, capability: Option<ComputeCapability>) -> Option<String> {
    if let Some(capability) = capability.filter(|&c| c < MIN_COMPUTE_CAPABILITY) {
        return Some(format!(
            "its compute capability is {capability}, {MIN_COMPUTE_CAPABILITY} (Maxwell) or newer is needed"
        ));
    }
    let version = driver?;
    let major: u32 = version.split('.').next()?.parse().ok()?;
    (major < MIN_DRIVER_MAJOR)
        .then(|| format!("the NVIDIA driver is {version}, {MIN_DRIVER_MAJOR} or newer is needed: update the driver"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvml::RawMig;
    use crate::testing::gpu;

    const RAM: SystemMemory = SystemMemory {
        total_bytes: 100 << 30,
        free_bytes: 70 << 30,
        machine_total_bytes: 128 << 30,
        machine_free_bytes: 90 << 30,
    };

    fn probe(driver: &str, gpus: Vec<RawGpu>, variable: Option<&str>) -> Vec<DeviceInfo> {
        let snapshot = Snapshot { driver_version: Some(driver.to_owned()), cuda_version: None, gpus, doubts: vec![] };
        cuda_devices(&snapshot, variable, DeviceOrder::PciBusId, &RAM).0
    }

    fn labels(devices: &[DeviceInfo]) -> Vec<(String, Option<u32>)> {
        devices.iter().map(|d| (d.label(), d.nvml_index)).collect()
    }

    #[test]
    fn devices_are_numbered_as_cuda_numbers_them() {
        let devices = probe("535.1", vec![gpu(0), gpu(1), gpu(2)], Some("2,0"));
        let expected = [("cuda:0", 2), ("cuda:1", 0), ("cuda:-", 1)];
        assert_eq!(labels(&devices), expected.map(|(label, nvml)| (label.to_owned(), Some(nvml))));
        assert_eq!(devices[2].unusable.as_deref(), Some("hidden by CUDA_VISIBLE_DEVICES=`2,0`"));
        assert_eq!(devices[0].limit_bytes, (24 << 30) * 8 / 10);
    }

    #[test]
    fn a_broken_gpu_takes_no_number() {
        let broken = RawGpu { error: Some("device fell off the bus".to_owned()), ..gpu(0) };
        let devices = probe("535.1", vec![broken, gpu(1)], None);
        assert_eq!(labels(&devices), [("cuda:0".to_owned(), Some(1)), ("cuda:-".to_owned(), Some(0))]);
        assert!(devices[1].unusable.as_ref().unwrap().contains("fell off the bus"));
    }

    #[test]
    fn old_gpus_and_old_drivers_are_unusable_and_keep_their_number() {
        let kepler = RawGpu { compute_capability: Some((3, 5)), ..gpu(0) };
        let maxwell = RawGpu { compute_capability: Some((5, 0)), ..gpu(1) };
        let devices = probe("470.42.01", vec![kepler, maxwell], None);
        assert_eq!(devices[0].index, Some(0));
        assert!(devices[0].unusable.as_ref().unwrap().contains("is 3.5, 5.0 (Maxwell) or newer"));
        assert_eq!(devices[1].unusable, None);
        let devices = probe("460.91.03", vec![gpu(0)], None);
        assert!(devices[0].unusable.as_ref().unwrap().contains("460.91.03, 470 or newer"));
        // A version that cannot be read is no reason to refuse a GPU that works.
        assert_eq!(probe("weird", vec![gpu(0)], None)[0].unusable, None);
    }

    #[test]
    fn unified_memory_is_the_systems() {
        // GB10 (DGX Spark) and Jetson: NVML answers "N/A".
        let gb10 = RawGpu {
            name: "NVIDIA GB10".to_owned(),
            compute_capability: Some((12, 1)),
            memory: MemoryReading::NotAvailable,
            ..gpu(0)
        };
        let device = &probe("580.95", vec![gb10], None)[0];
        assert_eq!(device.memory_kind, MemoryKind::Unified);
        assert_eq!((device.total_bytes, device.free_bytes), (100 << 30, 70 << 30));
        assert_eq!(device.limit_bytes, 80 << 30);
        assert_eq!(device.unusable, None);
        // An RTX 5090 reports its own memory, whatever its compute capability.
        let rtx5090 = RawGpu {
            compute_capability: Some((12, 0)),
            memory: MemoryReading::Bytes { total: 32 << 30, free: 31 << 30 },
            ..gpu(0)
        };
        assert_eq!(probe("575.1", vec![rtx5090], None)[0].memory_kind, MemoryKind::Discrete);
    }

    #[test]
    fn memory_that_cannot_be_read_makes_a_gpu_unusable() {
        let lost = RawGpu { memory: MemoryReading::Failed("gpu is lost".to_owned()), ..gpu(0) };
        let device = &probe("535.1", vec![lost], None)[0];
        assert_eq!((device.index, device.limit_bytes), (Some(0), 0));
        assert!(device.unusable.as_ref().unwrap().contains("gpu is lost"));
    }

    #[test]
    fn a_mig_instance_stands_for_its_gpu() {
        let instance = |n: u64| RawMig {
            uuid: format!("MIG-{n}"),
            name: format!("NVIDIA A100 MIG {n}g.5gb"),
            memory: MemoryReading::Bytes { total: n << 30, free: n << 30 },
        };
        let split = RawGpu { mig: Some(vec![instance(1), instance(2)]), ..gpu(0) };
        let devices = probe("535.1", vec![split.clone(), gpu(1)], Some("MIG-2"));
        assert_eq!(devices[0].name, "NVIDIA A100 MIG 2g.5gb");
        assert_eq!((devices[0].label().as_str(), devices[0].total_bytes), ("cuda:0", 2 << 30));
        assert_eq!(devices.iter().filter(|d| d.unusable.is_some()).count(), 2);

        let devices = probe("535.1", vec![split, gpu(1)], None);
        assert_eq!(devices[0].uuid.as_deref(), Some("MIG-1"));
        assert!(devices[2].unusable.as_ref().unwrap().contains("one MIG instance"));

        let empty = RawGpu { mig: Some(vec![]), ..gpu(0) };
        let devices = probe("535.1", vec![empty], None);
        assert!(devices[0].unusable.as_ref().unwrap().contains("there is no instance"));
    }

    #[test]
    fn the_log_words_are_the_guides() {
        let words = [GpuDevice::Metal, GpuDevice::Cuda, GpuDevice::Cpu].map(|d| format!("{d:?}"));
        assert_eq!(words, ["Metal", "Cuda", "Cpu"]);
    }
}
