//! [`GpuContext`]: the device that was selected, and what may be allocated on it.

use crate::choice::{BuildBackends, DeviceChoice};
use crate::device::{DeviceInfo, GpuDevice, MemoryKind};
use crate::diagnosis::Diagnosis;
use crate::driver::Driver;
use crate::error::GpuError;
use crate::machine::Machine;
use crate::memory::{LimitSource, MemoryEstimate, share_percent};
use crate::nvml::{DriverState, MemoryReading};
use crate::ram::SystemMemory;
use crate::select::{Selection, select};

/// What the caller wants and what its build can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GpuOptions {
    /// `--gpu=`.
    pub choice: DeviceChoice,
    /// The backends in this build of llama.cpp. The default is none, so `auto` is the CPU.
    pub build: BuildBackends,
    /// `MINERVA_GPU_MEMORY_LIMIT`: replaces the share of the selected device and of every GPU. More than a device has means all
    /// of it.
    pub memory_limit_bytes: Option<u64>,
}

/// The selected device and the machine around it. Devices are enumerated once, when it is made.
///
/// # Examples
/// ```
/// let mut gpu = minerva_gpu::GpuContext::new()?;
/// let memory = gpu.initialize_for_inference()?; // logs "GPU Context initialized: device=…, max_memory=…MB"
/// assert!(memory.budget_bytes <= memory.limit_bytes);
/// # Ok::<(), minerva_gpu::GpuError>(())
/// ```
#[derive(Debug)]
pub struct GpuContext {
    options: GpuOptions,
    machine: Machine,
    selection: Selection,
    driver: Result<Driver, DriverState>,
}

impl GpuContext {
    /// The best device of this machine, as if the build had every backend. Callers that run llama.cpp say what theirs has, with
    /// [`with_options`](Self::with_options).
    ///
    /// # Errors
    /// None today: without a GPU it is the CPU.
    pub fn new() -> Result<Self, GpuError> {
        Self::with_options(GpuOptions { build: BuildBackends::ALL, ..GpuOptions::default() })
    }

    /// Probes the machine and selects a device.
    ///
    /// # Errors
    /// A [`GpuError`] when the choice names a GPU that is not there, not usable or not in the build.
    pub fn with_options(options: GpuOptions) -> Result<Self, GpuError> {
        let driver = Driver::open();
        let mut machine = Machine::probe_with(driver.as_ref());
        let selection = select(&machine, options.choice, options.build)?;
        apply_limit(&mut machine, selection.device, options.memory_limit_bytes);
        if options.choice != DeviceChoice::Cpu {
            machine.doubts.iter().for_each(|doubt| tracing::warn!("{doubt}"));
            for device in &machine.devices {
                if let Some(reason) = &device.unusable {
                    tracing::info!("{} is not used: {reason}", device.title());
                }
            }
        }
        Ok(Self { options, machine, selection, driver })
    }

    /// The kind of the selected device.
    pub fn detect_device(&self) -> GpuDevice {
        self.device().kind
    }

    /// Reads the selected device's memory now. Cheap enough to ask every second.
    ///
    /// # Errors
    /// [`GpuError::DeviceLost`] when the driver no longer answers for the device.
    pub fn estimate_memory(&self) -> Result<MemoryEstimate, GpuError> {
        let mut device = self.device().clone();
        device.free_bytes = self.free_bytes(&device)?;
        let limit_source = match self.options.memory_limit_bytes {
            Some(_) => LimitSource::Override,
            None => LimitSource::Share { percent: share_percent(device.kind) },
        };
        Ok(MemoryEstimate::of(&device, limit_source))
    }

    /// What is free now on one of [`devices`](Self::devices).
    ///
    /// # Errors
    /// As [`estimate_memory`](Self::estimate_memory).
    pub fn free_bytes(&self, device: &DeviceInfo) -> Result<u64, GpuError> {
        let mut device = device.clone();
        match device.memory_kind {
            MemoryKind::Unified => device.free_bytes = SystemMemory::read().free_bytes,
            MemoryKind::Discrete => {}
        }
        // A device that only its backend knows has no memory that NVML could read: what was free at the start stands.
        if device.kind == GpuDevice::Cuda && device.nvml_index.is_some() {
            self.ask_driver(&mut device)?;
        }
        Ok(device.free_bytes)
    }

    /// Makes sure that the device still answers and logs the guide's line. The CUDA or Metal context itself is llama.cpp's, made
    /// when a model is loaded.
    ///
    /// # Errors
    /// As [`estimate_memory`](Self::estimate_memory).
    pub fn initialize_for_inference(&mut self) -> Result<MemoryEstimate, GpuError> {
        let memory = self.estimate_memory()?;
        self.machine.devices[self.selection.device].free_bytes = memory.free_bytes;
        let max_memory_mb = memory.limit_bytes / 1_000_000; // the guide's megabytes are decimal: 20 GiB is 21474
        tracing::info!("GPU Context initialized: device={:?}, max_memory={max_memory_mb}MB", memory.device);
        tracing::debug!(device = %self.device(), budget_bytes = memory.budget_bytes, "memory of the device");
        Ok(memory)
    }

    /// The selected device.
    pub fn device(&self) -> &DeviceInfo {
        &self.machine.devices[self.selection.device]
    }

    /// Every device of the machine, usable or not; the CPU is the last.
    pub fn devices(&self) -> &[DeviceInfo] {
        &self.machine.devices
    }

    /// Why `auto` chose the CPU, in one line for the log; `None` when it chose a GPU or nobody asked for one.
    pub fn fallback_reason(&self) -> Option<&str> {
        self.selection.fallback_reason.as_deref()
    }

    /// The machine as it was found.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Everything `--gpu=debug` prints.
    pub fn diagnosis(&self) -> Diagnosis {
        Diagnosis::of(self.machine.clone(), self.options)
    }

    /// Fills in what the driver says now. A unified device has no memory of its own to read, but must still answer.
    fn ask_driver(&self, device: &mut DeviceInfo) -> Result<(), GpuError> {
        let lost = |reason: String| GpuError::DeviceLost { device: device.title(), reason };
        let driver = self.driver.as_ref().map_err(|state| lost(state.to_string()))?;
        match driver.memory(device.uuid.as_deref(), device.nvml_index.unwrap_or(0)) {
            MemoryReading::Bytes { free, .. } => device.free_bytes = free.min(device.total_bytes),
            MemoryReading::NotAvailable => {}
            MemoryReading::Failed(reason) => return Err(lost(reason)),
        }
        Ok(())
    }
}

/// Puts the user's limit in place of the shares: for the selected device, and for each GPU a plan may add.
pub(crate) fn apply_limit(machine: &mut Machine, selected: usize, limit_bytes: Option<u64>) {
    let Some(limit_bytes) = limit_bytes else {
        return;
    };
    for (position, device) in machine.devices.iter_mut().enumerate() {
        if position == selected || device.kind != GpuDevice::Cpu {
            device.limit_bytes = limit_bytes.min(device.total_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::tests::machine;
    use crate::testing::gpu;
    use std::io;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn on_cpu(memory_limit_bytes: Option<u64>) -> GpuContext {
        GpuContext::with_options(GpuOptions { choice: DeviceChoice::Cpu, memory_limit_bytes, ..GpuOptions::default() })
            .unwrap()
    }

    #[test]
    fn the_log_line_is_the_guides_word_for_word() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .without_time()
            .with_target(false)
            .with_writer(move || writer.clone())
            .finish();
        let mut context = on_cpu(None);
        context.machine.devices[context.selection.device].limit_bytes = 20 << 30;
        tracing::subscriber::with_default(subscriber, || context.initialize_for_inference().unwrap());
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.trim(), "INFO GPU Context initialized: device=Cpu, max_memory=21474MB");
    }

    #[test]
    fn the_guides_flow_works_on_this_machine() {
        let mut context = GpuContext::new().unwrap();
        let estimate = context.estimate_memory().unwrap();
        assert_eq!(estimate.device, context.detect_device());
        assert!(estimate.total_bytes > 0);
        assert!(estimate.budget_bytes <= estimate.limit_bytes && estimate.limit_bytes <= estimate.total_bytes);
        assert_eq!(context.initialize_for_inference().unwrap().limit_bytes, estimate.limit_bytes);
        assert_eq!(context.devices().last().map(|d| d.kind), Some(GpuDevice::Cpu));
        // Nothing hidden: on a machine without a usable GPU the reason is there.
        assert_eq!(context.fallback_reason().is_some(), context.detect_device() == GpuDevice::Cpu);
    }

    #[test]
    fn the_cpu_gets_its_share_unless_the_user_says_otherwise() {
        let memory = on_cpu(None).estimate_memory().unwrap();
        assert_eq!(memory.limit_source, LimitSource::Share { percent: 25 });
        assert_eq!(memory.limit_bytes, crate::default_limit_bytes(GpuDevice::Cpu, memory.total_bytes));
        let memory = on_cpu(Some(1 << 20)).estimate_memory().unwrap();
        assert_eq!((memory.limit_source, memory.limit_bytes), (LimitSource::Override, 1 << 20));
        let memory = on_cpu(Some(u64::MAX)).estimate_memory().unwrap();
        assert_eq!(memory.limit_bytes, memory.total_bytes);
    }

    #[test]
    fn the_users_limit_holds_for_every_gpu_and_for_the_cpu_only_if_it_is_selected() {
        let limits = |selected| {
            let mut machine = machine(Some(vec![gpu(0), gpu(1)]), None);
            apply_limit(&mut machine, selected, Some(4 << 30));
            machine.devices.iter().map(|d| d.limit_bytes >> 30).collect::<Vec<_>>()
        };
        assert_eq!(limits(0), [4, 4, 16]); // the CPU keeps 25 % of 64 GiB
        assert_eq!(limits(2), [4, 4, 4]);
    }

    #[test]
    fn contexts_can_be_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<GpuContext>();
    }
}
