//! What trying the backends out has shown, and how it changes the picture that the driver paints.
//!
//! This crate calls no backend, so its callers tell it: [`record`] once per process, before the first
//! [`GpuContext`](crate::GpuContext). Like the drivers and backends that it is about, it holds for the whole process. From then
//! on the backends' own list decides which devices there are and how they are numbered; NVML adds what only it knows. The two
//! lists are joined by PCI address, because their numbers need not agree.

use std::sync::{PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use crate::device::{DeviceInfo, GpuDevice, MemoryKind};
use crate::memory::{default_limit_bytes, format_bytes};
use crate::ram::SystemMemory;

/// A device as its backend lists it in this process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedDevice {
    /// The backend's name for it, such as `CUDA0`.
    pub name: String,
    /// The hardware's name.
    pub description: String,
    /// `0000:65:00.0`, where the backend tells.
    pub pci_bus_id: Option<String>,
    /// Whether it computes in the system's memory.
    pub is_integrated: bool,
    /// All of its memory in bytes.
    pub total_bytes: u64,
    /// Free memory in bytes.
    pub free_bytes: u64,
}

impl ListedDevice {
    /// The number in `CUDA3`; `None` for devices of other backends.
    fn cuda_index(&self) -> Option<u32> {
        self.name.strip_prefix("CUDA")?.parse().ok()
    }
}

/// A device that must not be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFault {
    /// The backend's name for it; `None` stands for every device of [`kind`](Self::kind).
    pub name: Option<String>,
    /// What kind it is.
    pub kind: GpuDevice,
    /// What is wrong with it and what to do about it.
    pub reason: String,
}

/// What is known about the backends of this process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    /// Whether a CUDA backend was asked for its devices; without that, NVML's list stands.
    pub cuda_was_asked: bool,
    /// The devices of all backends.
    pub listed: Vec<ListedDevice>,
    /// Devices that failed.
    pub faults: Vec<DeviceFault>,
    /// Why NVIDIA's driver library must not be called at all.
    pub driver_fault: Option<String>,
}

static FINDINGS: RwLock<Option<Findings>> = RwLock::new(None);

/// Takes note of what was found. It holds for every machine probed from now on in this process; a later call replaces it.
pub fn record(findings: Findings) {
    *FINDINGS.write().unwrap_or_else(PoisonError::into_inner) = Some(findings);
}

/// What was recorded last; nothing by default.
pub(crate) fn current() -> Findings {
    FINDINGS.read().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default()
}

impl Findings {
    /// Joins the backends' list with NVML's devices and marks what failed. Returns what was not as the driver said.
    pub(crate) fn apply(&self, devices: &mut Vec<DeviceInfo>, ram: &SystemMemory) -> Vec<String> {
        let mut notes = Vec::new();
        if self.cuda_was_asked {
            self.join_cuda(devices, ram, &mut notes);
        }
        for fault in &self.faults {
            let index = fault.name.as_ref().and_then(|name| name.strip_prefix("CUDA")?.parse::<u32>().ok());
            let is_meant = |device: &&mut DeviceInfo| {
                device.kind == fault.kind
                    && (fault.name.is_none() || fault.kind != GpuDevice::Cuda || device.index == index)
            };
            for device in devices.iter_mut().filter(is_meant) {
                device.unusable = Some(fault.reason.clone());
            }
        }
        notes
    }

    fn join_cuda(&self, devices: &mut Vec<DeviceInfo>, ram: &SystemMemory, notes: &mut Vec<String>) {
        let (nvml, others): (Vec<_>, Vec<_>) = devices.drain(..).partition(|device| device.kind == GpuDevice::Cuda);
        let mut nvml: Vec<Option<DeviceInfo>> = nvml.into_iter().map(Some).collect();
        let mut joined = Vec::new();
        for listed in &self.listed {
            let Some(index) = listed.cuda_index() else { continue };
            let place = same_device(&nvml, listed, index);
            let mut device = match place.and_then(|place| nvml[place].take()) {
                Some(device) => device,
                None => unknown_to_nvml(listed, ram),
            };
            if device.index.is_some_and(|expected| expected != index) {
                notes.push(format!(
                    "CUDA calls {} at {} device {index}, where the driver's order suggests {}: `--gpu=cuda:N` counts as CUDA does",
                    device.name,
                    device.pci_bus_id.as_deref().unwrap_or("an unknown address"),
                    device.index.unwrap_or_default(),
                ));
            }
            if device.index.is_none() {
                device.unusable = None; // taken for hidden, but CUDA shows it
            }
            device.index = Some(index);
            believe_backend_on_memory(&mut device, listed, ram, notes);
            joined.push(device);
        }
        for mut device in nvml.into_iter().flatten() {
            if device.index.take().is_some() && device.unusable.is_none() {
                device.unusable = Some(
                    "the driver shows it and CUDA does not: in a container pass the device node (/dev/nvidia*) too, on a machine compare the versions of driver and CUDA"
                        .to_owned(),
                );
            }
            joined.push(device);
        }
        joined.sort_by_key(|device| (device.index.is_none(), device.index));
        devices.extend(joined);
        devices.extend(others);
    }
}

/// The device of NVML's that is `listed`: by PCI address; MIG instances share theirs, so of several the one with its number.
fn same_device(nvml: &[Option<DeviceInfo>], listed: &ListedDevice, index: u32) -> Option<usize> {
    let address = listed.pci_bus_id.as_ref()?.to_ascii_lowercase();
    let at_address = |device: &DeviceInfo| device.pci_bus_id.as_ref() == Some(&address);
    let places = |is_it: &dyn Fn(&DeviceInfo) -> bool| {
        nvml.iter().position(|device| device.as_ref().is_some_and(|device| at_address(device) && is_it(device)))
    };
    places(&|device| device.index == Some(index))
        .or_else(|| places(&|device| device.index.is_some()))
        .or_else(|| places(&|_| true))
}

/// A device of the backend's that NVML does not show, or that cannot be asked: it works all the same.
fn unknown_to_nvml(listed: &ListedDevice, ram: &SystemMemory) -> DeviceInfo {
    DeviceInfo {
        kind: GpuDevice::Cuda,
        index: None,
        nvml_index: None,
        name: listed.description.clone(),
        pci_bus_id: listed.pci_bus_id.clone(),
        ..DeviceInfo::cpu("", ram)
    }
    .with_memory_of(listed, ram)
}

/// Sizes differ a little, since the driver keeps some memory for itself. More than that is a lie, and CUDA is who allocates.
fn believe_backend_on_memory(
    device: &mut DeviceInfo,
    listed: &ListedDevice,
    ram: &SystemMemory,
    notes: &mut Vec<String>,
) {
    const MOST_PERCENT_APART: u64 = 20;
    if listed.total_bytes == 0 || listed.is_integrated {
        return;
    }
    let apart = device.total_bytes.abs_diff(listed.total_bytes);
    if apart / listed.total_bytes.div_ceil(100) <= MOST_PERCENT_APART {
        return;
    }
    let said = match &device.unusable {
        Some(reason) => reason.clone(),
        None => format!("the driver says that it has {}", format_bytes(device.total_bytes)),
    };
    notes.push(format!(
        "memory of {} is taken from CUDA, {}: {said}",
        device.title(),
        format_bytes(listed.total_bytes)
    ));
    let memory_was_the_reason = device.unusable.as_ref().is_some_and(|reason| reason.starts_with(MEMORY_UNKNOWN));
    *device = device.clone().with_memory_of(listed, ram);
    if memory_was_the_reason {
        device.unusable = None;
    }
}

/// How the reason begins when only the memory of a device is unknown.
pub(crate) const MEMORY_UNKNOWN: &str = "its memory cannot be read";

impl DeviceInfo {
    fn with_memory_of(mut self, listed: &ListedDevice, ram: &SystemMemory) -> Self {
        (self.memory_kind, self.total_bytes, self.free_bytes) = if listed.is_integrated {
            (MemoryKind::Unified, ram.total_bytes, ram.free_bytes)
        } else {
            (MemoryKind::Discrete, listed.total_bytes, listed.free_bytes.min(listed.total_bytes))
        };
        self.limit_bytes = default_limit_bytes(self.kind, self.total_bytes);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvml::{MemoryReading, RawGpu};
    use crate::select::tests::machine;
    use crate::testing::gpu;
    use expect_test::expect;

    const RAM: SystemMemory = SystemMemory {
        total_bytes: 64 << 30,
        free_bytes: 48 << 30,
        machine_total_bytes: 64 << 30,
        machine_free_bytes: 48 << 30,
    };

    fn listed(n: u32, bus: u32) -> ListedDevice {
        ListedDevice {
            name: format!("CUDA{n}"),
            description: "NVIDIA GeForce RTX 4090".to_owned(),
            pci_bus_id: Some(format!("0000:{bus:02x}:00.0")),
            is_integrated: false,
            total_bytes: 24 << 30,
            free_bytes: 20 << 30,
        }
    }

    fn asked(listed: Vec<ListedDevice>) -> Findings {
        Findings { cuda_was_asked: true, listed, ..Findings::default() }
    }

    /// A line per device and note.
    fn join(gpus: Option<Vec<RawGpu>>, findings: &Findings) -> String {
        let mut devices = machine(gpus, None).devices;
        let notes = findings.apply(&mut devices, &RAM);
        let line = |device: &DeviceInfo| {
            let state = device.unusable.as_deref().unwrap_or("usable");
            format!("{} nvml {:?} {}: {state}", device, device.nvml_index, device.pci_bus_id.as_deref().unwrap_or("-"))
        };
        devices.iter().map(line).chain(notes).map(|line| line + "\n").collect()
    }

    #[test]
    fn devices_are_joined_by_pci_address_whatever_their_numbers() {
        let text = join(Some(vec![gpu(0), gpu(1)]), &asked(vec![listed(0, 0x66), listed(1, 0x65)]));
        expect![[r#"
            cuda:0 NVIDIA GeForce RTX 4090, 24.0 GiB free of 24.0 GiB nvml Some(1) 0000:66:00.0: usable
            cuda:1 NVIDIA GeForce RTX 4090, 24.0 GiB free of 24.0 GiB nvml Some(0) 0000:65:00.0: usable
            cpu AMD EPYC, 48.0 GiB free of 64.0 GiB nvml None -: usable
            CUDA calls NVIDIA GeForce RTX 4090 at 0000:66:00.0 device 0, where the driver's order suggests 1: `--gpu=cuda:N` counts as CUDA does
            CUDA calls NVIDIA GeForce RTX 4090 at 0000:65:00.0 device 1, where the driver's order suggests 0: `--gpu=cuda:N` counts as CUDA does
        "#]].assert_eq(&text);
    }

    #[test]
    fn a_gpu_works_without_the_drivers_library() {
        let text = join(None, &asked(vec![listed(0, 0x65)]));
        expect![[r#"
            cuda:0 NVIDIA GeForce RTX 4090, 20.0 GiB free of 24.0 GiB nvml None 0000:65:00.0: usable
            cpu AMD EPYC, 48.0 GiB free of 64.0 GiB nvml None -: usable
        "#]]
        .assert_eq(&text);
    }

    #[test]
    fn a_gpu_that_cuda_does_not_show_is_not_used() {
        let text = join(Some(vec![gpu(0), gpu(1)]), &asked(vec![listed(0, 0x65)]));
        expect![[r#"
            cuda:0 NVIDIA GeForce RTX 4090, 24.0 GiB free of 24.0 GiB nvml Some(0) 0000:65:00.0: usable
            cuda:- NVIDIA GeForce RTX 4090, 24.0 GiB free of 24.0 GiB nvml Some(1) 0000:66:00.0: the driver shows it and CUDA does not: in a container pass the device node (/dev/nvidia*) too, on a machine compare the versions of driver and CUDA
            cpu AMD EPYC, 48.0 GiB free of 64.0 GiB nvml None -: usable
        "#]].assert_eq(&text);
    }

    #[test]
    fn cuda_is_believed_on_memory_where_the_driver_lies() {
        let lost = RawGpu { memory: MemoryReading::Failed("the driver says that it has none".to_owned()), ..gpu(0) };
        let large = RawGpu { memory: MemoryReading::Bytes { total: 90 << 30, free: 90 << 30 }, ..gpu(1) };
        let text = join(Some(vec![lost, large]), &asked(vec![listed(0, 0x65), listed(1, 0x66)]));
        expect![[r#"
            cuda:0 NVIDIA GeForce RTX 4090, 20.0 GiB free of 24.0 GiB nvml Some(0) 0000:65:00.0: usable
            cuda:1 NVIDIA GeForce RTX 4090, 20.0 GiB free of 24.0 GiB nvml Some(1) 0000:66:00.0: usable
            cpu AMD EPYC, 48.0 GiB free of 64.0 GiB nvml None -: usable
            memory of cuda:0 NVIDIA GeForce RTX 4090 is taken from CUDA, 24.0 GiB: its memory cannot be read: the driver says that it has none
            memory of cuda:1 NVIDIA GeForce RTX 4090 is taken from CUDA, 24.0 GiB: the driver says that it has 90.0 GiB
        "#]].assert_eq(&text);
    }

    #[test]
    fn a_faulty_device_is_unusable_and_a_faulty_backend_takes_all_of_its_devices() {
        let fault = |name: Option<&str>| DeviceFault {
            name: name.map(str::to_owned),
            kind: GpuDevice::Cuda,
            reason: "it crashed".to_owned(),
        };
        let states = |name: Option<&str>| {
            let mut findings = asked(vec![listed(0, 0x65), listed(1, 0x66)]);
            findings.faults.push(fault(name));
            let mut devices = machine(Some(vec![gpu(0), gpu(1)]), None).devices;
            findings.apply(&mut devices, &RAM);
            devices.iter().map(|device| device.unusable.is_none()).collect::<Vec<_>>()
        };
        assert_eq!(states(Some("CUDA1")), [true, false, true]);
        assert_eq!(states(None), [false, false, true]);
    }

    #[test]
    fn without_a_cuda_backend_the_drivers_list_stands() {
        let before = machine(Some(vec![gpu(0), gpu(1)]), None).devices;
        let mut devices = before.clone();
        assert_eq!(Findings::default().apply(&mut devices, &RAM), Vec::<String>::new());
        assert_eq!(devices, before);
    }
}
