//! Everything that was found out about this machine, as plain data. Selection and diagnosis work on it alone.

use std::env;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::cgroup::CgroupLimits;
use crate::cpu::CpuInfo;
use crate::device::{DeviceInfo, GpuDevice, cuda_devices};
use crate::driver::Driver;
use crate::findings::{self, DeviceFault};
use crate::nvml::{DriverState, Snapshot, pci_addresses};
use crate::ram::SystemMemory;
use crate::visible::DeviceOrder;

/// One probe of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// `linux`, `macos`, `windows`.
    pub os: String,
    /// Usable and unusable devices; the GPUs in their own order, the CPU last.
    pub devices: Vec<DeviceInfo>,
    /// NVIDIA's driver, or why there is none.
    pub driver: DriverState,
    /// NVIDIA GPUs on the PCI bus, with or without a driver (Linux).
    pub nvidia_pci: Vec<String>,
    /// `CUDA_VISIBLE_DEVICES`, if set.
    pub cuda_visible_devices: Option<String>,
    /// What that variable did that its author may not have meant.
    pub visibility_note: Option<String>,
    /// From `CUDA_DEVICE_ORDER`.
    pub cuda_device_order: DeviceOrder,
    /// The CPU.
    pub cpu: CpuInfo,
    /// The RAM.
    pub memory: SystemMemory,
    /// Container limits.
    pub cgroup: CgroupLimits,
    /// Devices and whole backends that failed when they were tried; each device's `unusable` says so too.
    pub faults: Vec<DeviceFault>,
    /// What the driver said that cannot be, and where its list and CUDA's differ.
    pub doubts: Vec<String>,
}

impl Machine {
    /// Looks at the machine. Never fails: what cannot be read is missing from the answer, with the reason where it matters.
    pub fn probe() -> Self {
        Self::probe_with(Driver::open().as_ref())
    }

    /// [`probe`](Self::probe) with a driver that the caller keeps open.
    pub(crate) fn probe_with(driver: Result<&Driver, &DriverState>) -> Self {
        let root = Path::new("/");
        let variable = |name: &str| env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        let cuda_visible_devices = variable("CUDA_VISIBLE_DEVICES");
        let cuda_device_order = DeviceOrder::parse(variable("CUDA_DEVICE_ORDER").as_deref());
        let cgroup = CgroupLimits::read_under(root);
        let memory = SystemMemory::read_under(root, &cgroup);
        let cpu = CpuInfo::read_under(root, &cgroup);

        let (driver, snapshot) = match driver.map(Driver::snapshot) {
            Ok(Ok(snapshot)) => {
                let state = DriverState::Ready {
                    driver_version: snapshot.driver_version.clone(),
                    cuda_version: snapshot.cuda_version.clone(),
                };
                (state, snapshot)
            }
            Ok(Err(state)) => (state, Snapshot::default()),
            Err(state) => (state.clone(), Snapshot::default()),
        };
        let (mut devices, visibility_note) =
            cuda_devices(&snapshot, cuda_visible_devices.as_deref(), cuda_device_order, &memory);
        #[cfg(target_os = "macos")]
        devices.extend(crate::metal::probe(&cpu, &memory));
        devices.push(DeviceInfo::cpu(&cpu.model, &memory));
        let findings = findings::current();
        let mut doubts = snapshot.doubts;
        doubts.extend(findings.apply(&mut devices, &memory));
        Self {
            os: env::consts::OS.to_owned(),
            devices,
            driver,
            nvidia_pci: pci_addresses(root),
            cuda_visible_devices,
            visibility_note,
            cuda_device_order,
            cpu,
            memory,
            cgroup,
            faults: findings.faults,
            doubts,
        }
    }

    /// Position of the CPU in [`devices`](Self::devices); every machine has it.
    pub(crate) fn cpu_position(&self) -> usize {
        self.devices.iter().rposition(|d| d.kind == GpuDevice::Cpu).unwrap_or(0)
    }

    /// The fault that takes out every device of `kind`, if there is one.
    pub(crate) fn fault_of_all(&self, kind: GpuDevice) -> Option<&DeviceFault> {
        self.faults.iter().find(|fault| fault.kind == kind && fault.name.is_none())
    }

    /// Why there is no NVIDIA GPU, and what to do.
    pub(crate) fn no_nvidia_gpu(&self) -> String {
        match &self.driver {
            DriverState::Ready { .. } => format!(
                "the NVIDIA driver shows no GPU (driver {}): check `nvidia-smi`; start a container with `--gpus all`",
                self.driver
            ),
            state if self.nvidia_pci.is_empty() => format!("no NVIDIA GPU was found: {state}"),
            state => format!("the NVIDIA GPU at {} has no working driver: {state}", self.nvidia_pci.join(", ")),
        }
    }
}
