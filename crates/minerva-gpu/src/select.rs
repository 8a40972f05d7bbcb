//! Which device runs the model: the user's choice against what the machine has and what the build can do. Pure.

use crate::choice::{BuildBackends, DeviceChoice};
use crate::device::{DeviceInfo, GpuDevice};
use crate::error::GpuError;
use crate::findings::DeviceFault;
use crate::machine::Machine;

/// The outcome of a selection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Selection {
    /// Position in [`Machine::devices`].
    pub(crate) device: usize,
    /// Why `auto` came down to the CPU.
    pub(crate) fallback_reason: Option<String>,
}

/// Selects a device. `auto` and `cpu` always succeed; a GPU that was asked for is there or it is an error.
pub(crate) fn select(machine: &Machine, choice: DeviceChoice, build: BuildBackends) -> Result<Selection, GpuError> {
    let device = match choice {
        DeviceChoice::Auto => {
            return Ok(match best(machine, |d| built(build, d.kind)) {
                Some(device) => Selection { device, fallback_reason: None },
                None => Selection { device: machine.cpu_position(), fallback_reason: Some(why_no_gpu(machine, build)) },
            });
        }
        DeviceChoice::Cpu => machine.cpu_position(),
        DeviceChoice::Metal => metal(machine, choice, build)?,
        DeviceChoice::Cuda(index) => cuda(machine, choice, index, build)?,
    };
    Ok(Selection { device, fallback_reason: None })
}

fn built(build: BuildBackends, kind: GpuDevice) -> bool {
    match kind {
        GpuDevice::Metal => build.metal,
        GpuDevice::Cuda => build.cuda,
        GpuDevice::Cpu => true,
    }
}

/// The usable GPU with the most free memory, then the newest; of equals the first.
fn best(machine: &Machine, allowed: impl Fn(&DeviceInfo) -> bool) -> Option<usize> {
    let gpus = machine.devices.iter().enumerate().rev(); // `max_by_key` takes the last of equals
    let usable = gpus.filter(|(_, d)| d.is_usable_gpu() && allowed(d));
    usable.max_by_key(|(_, d)| (d.free_bytes, d.compute_capability)).map(|(position, _)| position)
}

fn metal(machine: &Machine, choice: DeviceChoice, build: BuildBackends) -> Result<usize, GpuError> {
    if machine.os != "macos" {
        let why = format!("Metal exists on macOS only and this is {}: use `--gpu=auto`", machine.os);
        return Err(GpuError::NotFound { choice, why });
    }
    if let Some(fault) = machine.fault_of_all(GpuDevice::Metal) {
        return Err(broken_backend(choice, "Metal", fault));
    }
    if !build.metal {
        return Err(not_in_build(choice, GpuDevice::Metal));
    }
    best(machine, |d| d.kind == GpuDevice::Metal).ok_or_else(|| GpuError::NotFound {
        choice,
        why: "this Mac has neither Apple Silicon nor an AMD GPU with Metal: use `--gpu=cpu`".to_owned(),
    })
}

fn cuda(machine: &Machine, choice: DeviceChoice, index: Option<u32>, build: BuildBackends) -> Result<usize, GpuError> {
    // Before the build: a module that crashed was not loaded, and then the build seems to have none.
    if let Some(fault) = machine.fault_of_all(GpuDevice::Cuda) {
        return Err(broken_backend(choice, "CUDA", fault));
    }
    if !build.cuda {
        return Err(not_in_build(choice, GpuDevice::Cuda));
    }
    let cuda: Vec<_> = machine.devices.iter().filter(|d| d.kind == GpuDevice::Cuda).collect();
    let Some(first) = cuda.first() else {
        let why = machine.no_nvidia_gpu();
        return Err(GpuError::NotFound { choice, why });
    };
    let Some(index) = index else {
        return best(machine, |d| d.kind == GpuDevice::Cuda).ok_or_else(|| unusable(choice, first));
    };
    let numbered = |d: &DeviceInfo| d.kind == GpuDevice::Cuda && d.index == Some(index);
    match machine.devices.iter().position(numbered) {
        Some(position) if machine.devices[position].is_usable_gpu() => Ok(position),
        Some(position) => Err(unusable(choice, &machine.devices[position])),
        None => Err(GpuError::NoSuchIndex { choice, available: available(machine, &cuda) }),
    }
}

fn not_in_build(choice: DeviceChoice, kind: GpuDevice) -> GpuError {
    let (backend, feature, needs) = match kind {
        GpuDevice::Metal => ("Metal", "metal", " on a Mac with Xcode's command line tools"),
        _ => ("CUDA", "cuda", " (needs the CUDA toolkit, `nvcc`) or run the bundle's `backends/cuda/build.sh`"),
    };
    GpuError::NotInBuild { choice, backend, feature, needs }
}

fn broken_backend(choice: DeviceChoice, backend: &str, fault: &DeviceFault) -> GpuError {
    GpuError::Unusable { choice, device: format!("the {backend} backend"), reason: fault.reason.clone() }
}

fn unusable(choice: DeviceChoice, device: &DeviceInfo) -> GpuError {
    GpuError::Unusable { choice, device: device.title(), reason: device.unusable.clone().unwrap_or_default() }
}

fn available(machine: &Machine, cuda: &[&DeviceInfo]) -> String {
    let shown: Vec<_> = cuda.iter().filter(|d| d.index.is_some()).map(|d| d.label()).collect();
    let list = if shown.is_empty() { "no device".to_owned() } else { shown.join(", ") };
    let variable = match &machine.cuda_visible_devices {
        Some(list) => format!(" under CUDA_VISIBLE_DEVICES=`{list}`, which renumbers them"),
        None => String::new(),
    };
    format!("CUDA shows {list} to this process{variable}")
}

/// Why `auto` has no GPU to choose, in one line.
fn why_no_gpu(machine: &Machine, build: BuildBackends) -> String {
    if let Some(position) = best(machine, |_| true) {
        let device = &machine.devices[position];
        let cure = match device.kind {
            GpuDevice::Metal => "rebuild with `--features metal`",
            _ => "rebuild with `--features cuda`, or run the bundle's `backends/cuda/build.sh`",
        };
        return format!("{} is there, but this build has only {build}: {cure}", device.title());
    }
    let broken = machine.devices.iter().find_map(|d| Some((d, d.unusable.as_ref()?)));
    if broken.is_none() {
        for (kind, backend) in [(GpuDevice::Cuda, "CUDA"), (GpuDevice::Metal, "Metal")] {
            if let Some(fault) = machine.fault_of_all(kind) {
                return format!("the {backend} backend cannot be used: {}", fault.reason);
            }
        }
    }
    match broken {
        Some((device, reason)) => format!("{} cannot be used: {reason}", device.title()),
        None if machine.os == "macos" => "this Mac has neither Apple Silicon nor an AMD GPU with Metal".to_owned(),
        None if !build.cuda && machine.nvidia_pci.is_empty() => {
            format!("no NVIDIA GPU was found, and this build has only {build}")
        }
        None => machine.no_nvidia_gpu(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::nvml::{DriverState, MemoryReading, RawGpu, Snapshot};
    use crate::ram::SystemMemory;
    use crate::testing::gpu;
    use crate::visible::DeviceOrder;

    const CUDA: BuildBackends = BuildBackends { cuda: true, metal: false, vulkan: false };
    const CPU: BuildBackends = BuildBackends { cuda: false, metal: false, vulkan: false };

    /// A Linux machine with these GPUs, or without a driver.
    pub(crate) fn machine(gpus: Option<Vec<RawGpu>>, visible: Option<&str>) -> Machine {
        let memory = SystemMemory {
            total_bytes: 64 << 30,
            free_bytes: 48 << 30,
            machine_total_bytes: 64 << 30,
            machine_free_bytes: 48 << 30,
        };
        let driver = match gpus {
            Some(_) => DriverState::Ready {
                driver_version: Some("535.104.05".to_owned()),
                cuda_version: Some("12.2".to_owned()),
            },
            None => DriverState::LibraryMissing,
        };
        let snapshot = Snapshot {
            driver_version: Some("535.104.05".to_owned()),
            cuda_version: Some("12.2".to_owned()),
            gpus: gpus.unwrap_or_default(),
            doubts: vec![],
        };
        let (mut devices, visibility_note) =
            crate::device::cuda_devices(&snapshot, visible, DeviceOrder::PciBusId, &memory);
        devices.push(DeviceInfo::cpu("AMD EPYC", &memory));
        Machine {
            os: "linux".to_owned(),
            devices,
            driver,
            nvidia_pci: Vec::new(),
            cuda_visible_devices: visible.map(str::to_owned),
            visibility_note,
            cuda_device_order: DeviceOrder::PciBusId,
            cpu: crate::cpu::CpuInfo::default(),
            memory,
            cgroup: crate::cgroup::CgroupLimits::default(),
            faults: vec![],
            doubts: vec![],
        }
    }

    fn with_free(nvml_index: u32, free: u64) -> RawGpu {
        RawGpu { memory: MemoryReading::Bytes { total: 24 << 30, free }, ..gpu(nvml_index) }
    }

    fn mac(device: bool) -> Machine {
        let mut machine = machine(None, None);
        machine.os = "macos".to_owned();
        if device {
            let metal = DeviceInfo { kind: GpuDevice::Metal, ..machine.devices[0].clone() };
            machine.devices.insert(0, metal);
        }
        machine
    }

    fn label(machine: &Machine, choice: &str, build: BuildBackends) -> String {
        let selection = select(machine, choice.parse().unwrap(), build).unwrap();
        machine.devices[selection.device].label()
    }

    fn refusal(machine: &Machine, choice: &str, build: BuildBackends) -> String {
        select(machine, choice.parse().unwrap(), build).unwrap_err().to_string()
    }

    fn fallback(machine: &Machine, build: BuildBackends) -> String {
        let selection = select(machine, DeviceChoice::Auto, build).unwrap();
        assert_eq!(machine.devices[selection.device].kind, GpuDevice::Cpu);
        let reason = selection.fallback_reason.unwrap();
        assert!(!reason.contains('\n'));
        reason
    }

    #[test]
    fn auto_takes_the_usable_gpu_with_the_most_free_memory() {
        let gpus = vec![with_free(0, 3 << 30), with_free(1, 20 << 30), with_free(2, 20 << 30)];
        let machine = machine(Some(gpus), None);
        assert_eq!(label(&machine, "auto", CUDA), "cuda:1");
        assert_eq!(label(&machine, "cuda", CUDA), "cuda:1");
        assert_eq!(label(&machine, "cuda:0", CUDA), "cuda:0");
        assert_eq!(label(&machine, "cpu", CUDA), "cpu");
        assert_eq!(select(&machine, DeviceChoice::Auto, CUDA).unwrap().fallback_reason, None);
    }

    #[test]
    fn auto_skips_an_unusable_gpu_even_if_it_is_the_larger() {
        let kepler = RawGpu { compute_capability: Some((3, 7)), ..with_free(0, 24 << 30) };
        let machine = machine(Some(vec![kepler, with_free(1, 1 << 30)]), None);
        assert_eq!(label(&machine, "auto", CUDA), "cuda:1");
        assert!(refusal(&machine, "cuda:0", CUDA).contains("compute capability is 3.7"));
    }

    #[test]
    fn auto_says_why_it_took_the_cpu() {
        let one = || Some(vec![gpu(0)]);
        assert!(fallback(&machine(one(), None), CPU).contains("rebuild with `--features cuda`"));
        assert!(fallback(&machine(one(), Some("")), CUDA).contains("hidden by CUDA_VISIBLE_DEVICES"));
        assert!(fallback(&machine(None, None), CUDA).contains("install driver 470 or newer"));
        assert!(fallback(&machine(None, None), CPU).contains("and this build has only cpu"));
        assert!(fallback(&machine(Some(vec![]), None), CUDA).contains("`--gpus all`"));
        let mut on_the_bus = machine(None, None);
        on_the_bus.nvidia_pci = vec!["0000:65:00.0".to_owned()];
        assert!(fallback(&on_the_bus, CUDA).contains("NVIDIA GPU at 0000:65:00.0 has no working driver"));
        assert!(fallback(&mac(true), CPU).contains("`--features metal`"));
        assert!(fallback(&mac(false), BuildBackends::ALL).contains("neither Apple Silicon"));
    }

    #[test]
    fn a_backend_that_failed_is_the_reason_even_if_the_build_then_seems_to_have_none() {
        let mut broken = machine(Some(vec![gpu(0)]), None);
        let reason = "its module crashed while it was loaded".to_owned();
        broken.devices[0].unusable = Some(reason.clone());
        broken.faults = vec![DeviceFault { name: None, kind: GpuDevice::Cuda, reason }];
        for build in [CUDA, CPU] {
            let text = refusal(&broken, "cuda", build);
            assert!(text.contains("the CUDA backend cannot be used: its module crashed"), "{text}");
            assert!(fallback(&broken, build).contains("its module crashed"));
        }
        // The driver hangs too, so there is no device to say it of.
        broken.devices.remove(0);
        assert!(fallback(&broken, CPU).contains("the CUDA backend cannot be used: its module crashed"));
    }

    #[test]
    fn a_gpu_that_was_asked_for_is_there_or_the_error_says_what_to_do() {
        let two = machine(Some(vec![gpu(0), gpu(1)]), None);
        assert!(
            refusal(&two, "cuda", CPU)
                .contains("no CUDA backend: rebuild with `--features cuda` (needs the CUDA toolkit")
        );
        assert!(refusal(&two, "cuda:3", CUDA).contains("CUDA shows cuda:0, cuda:1 to this process"));
        assert!(refusal(&two, "metal", BuildBackends::ALL).contains("macOS only"));
        assert!(refusal(&machine(None, None), "cuda", CUDA).contains("install driver 470"));
        assert!(refusal(&machine(None, None), "cuda:0", CUDA).contains("install driver 470"));
        let masked = machine(Some(vec![gpu(0), gpu(1)]), Some("1"));
        assert_eq!(label(&masked, "cuda:0", CUDA), "cuda:0");
        let text = refusal(&masked, "cuda:1", CUDA);
        assert!(text.contains("CUDA shows cuda:0 to this process under CUDA_VISIBLE_DEVICES=`1`"), "{text}");
        let hidden = machine(Some(vec![gpu(0)]), Some("-1"));
        assert!(refusal(&hidden, "cuda", CUDA).contains("hidden by CUDA_VISIBLE_DEVICES"));
        assert!(refusal(&hidden, "cuda:0", CUDA).contains("CUDA shows no device"));
        assert!(refusal(&mac(true), "metal", CPU).contains("`--features metal`"));
        assert!(refusal(&mac(false), "metal", BuildBackends::ALL).contains("--gpu=cpu"));
        assert_eq!(label(&mac(true), "metal", BuildBackends::ALL), "metal");
        assert_eq!(label(&mac(true), "auto", BuildBackends::ALL), "metal");
    }
}
