//! NVIDIA's GPUs, through the driver's own library (NVML), which is loaded at run time.
//!
//! The one module that talks to the driver. No CUDA is needed to build it, and a machine without a driver is a state with an
//! explanation ([`DriverState`]), not an error. Any call in here may hang for good, so nobody but [`Driver`](crate::driver)
//! makes one, from a thread that can be left behind. What the driver says is checked before it is believed.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use nvml_wrapper::enum_wrappers::device::Clock;
use nvml_wrapper::error::{NvmlError, nvml_try};
use nvml_wrapper::{Device, Nvml, cuda_driver_version_major, cuda_driver_version_minor};
use nvml_wrapper_sys::bindings::nvmlMemory_t;
use serde::{Deserialize, Serialize};

/// The oldest driver that the guide supports: the first with CUDA 11.4.
pub const MIN_DRIVER_MAJOR: u32 = 470;

/// Where the library lies when the loader does not know it: WSL 2 and NixOS.
#[cfg(target_os = "linux")]
const OTHER_PLACES: &[&str] = &["/usr/lib/wsl/lib/libnvidia-ml.so.1", "/run/opengl-driver/lib/libnvidia-ml.so.1"];
#[cfg(not(target_os = "linux"))]
const OTHER_PLACES: &[&str] = &[];

/// What became of the attempt to talk to NVIDIA's driver. [`Display`](fmt::Display) explains it and says what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
#[non_exhaustive]
pub enum DriverState {
    /// The driver answers.
    Ready {
        /// Such as `535.104.05`.
        driver_version: Option<String>,
        /// The newest CUDA that this driver runs, such as `12.2`.
        cuda_version: Option<String>,
    },
    /// There is no driver library: no driver, or a container without it.
    LibraryMissing,
    /// The library is there, the kernel module is not loaded.
    NotLoaded,
    /// Library and kernel module are of different versions: updated, not yet rebooted.
    VersionMismatch,
    /// This user or this container may not open the GPU.
    NoPermission,
    /// A call into it did not return. It is not asked again in this process.
    NoAnswer {
        /// How long was waited.
        waited_ms: u64,
    },
    /// It ended the process that tried it first, so this one leaves it alone.
    NotTried {
        /// What happened there.
        detail: String,
    },
    /// Anything else.
    Failed {
        /// What the driver said.
        detail: String,
    },
}

impl fmt::Display for DriverState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready { driver_version, cuda_version } => {
                let (driver, cuda) = (driver_version.as_deref(), cuda_version.as_deref());
                write!(f, "version {}, runs CUDA up to {}", driver.unwrap_or("unknown"), cuda.unwrap_or("unknown"))
            }
            Self::LibraryMissing => write!(
                f,
                "the driver library (libnvidia-ml, nvml.dll) cannot be loaded; install driver {MIN_DRIVER_MAJOR} or newer, and start a container with `--gpus all` (nvidia-container-toolkit)"
            ),
            Self::NotLoaded => f.write_str(
                "the NVIDIA driver is installed but its kernel module is not loaded: run `sudo modprobe nvidia` or reboot; start a container with `--gpus all`",
            ),
            Self::VersionMismatch => f.write_str(
                "the NVIDIA library and kernel module have different versions: the driver was updated, reboot to finish",
            ),
            Self::NoPermission => f.write_str(
                "the NVIDIA driver refuses access: check the permissions of /dev/nvidia* and the container's device list",
            ),
            Self::NoAnswer { waited_ms } => write!(
                f,
                "the NVIDIA driver did not answer within {:.1} s: look for `Xid` in the kernel log, reset the GPU (`sudo nvidia-smi --gpu-reset`) or reboot",
                Duration::from_millis(*waited_ms).as_secs_f64()
            ),
            Self::NotTried { detail } => {
                write!(f, "the NVIDIA driver library is left alone ({detail}): reinstall the driver, then reboot")
            }
            Self::Failed { detail } => write!(
                f,
                "the NVIDIA driver does not answer ({detail}): if `nvidia-smi` fails too, reboot; restart a container whose GPU went away"
            ),
        }
    }
}

impl From<NvmlError> for DriverState {
    fn from(error: NvmlError) -> Self {
        match error {
            NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound => Self::LibraryMissing,
            NvmlError::DriverNotLoaded => Self::NotLoaded,
            NvmlError::LibRmVersionMismatch => Self::VersionMismatch,
            NvmlError::NoPermission => Self::NoPermission,
            other => Self::Failed { detail: other.to_string() },
        }
    }
}

/// The bytes of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MemoryReading {
    Bytes {
        total: u64,
        free: u64,
    },
    /// NVML's "N/A": the device has no memory of its own (GB10, Jetson).
    NotAvailable,
    Failed(String),
}

/// A MIG instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawMig {
    pub(crate) uuid: String,
    pub(crate) name: String,
    pub(crate) memory: MemoryReading,
}

/// A GPU as NVML reports it, before visibility and limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawGpu {
    pub(crate) nvml_index: u32,
    pub(crate) name: String,
    pub(crate) uuid: Option<String>,
    pub(crate) pci_bus_id: Option<String>,
    pub(crate) compute_capability: Option<(u32, u32)>,
    pub(crate) memory: MemoryReading,
    /// Cores times clock; 0 when unknown.
    pub(crate) speed: u64,
    /// Bytes per second between the memory and its chip, when both parts of it are known.
    pub(crate) bandwidth: Option<u64>,
    /// `None` when MIG is off or unknown to the GPU.
    pub(crate) mig: Option<Vec<RawMig>>,
    /// Why the driver cannot open it.
    pub(crate) error: Option<String>,
}

/// Everything NVML says at one moment; `gpus` come by PCI address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) driver_version: Option<String>,
    pub(crate) cuda_version: Option<String>,
    pub(crate) gpus: Vec<RawGpu>,
    /// What it said that cannot be.
    pub(crate) doubts: Vec<String>,
}

/// More GPUs than any machine has; a driver that counts more is not believed.
const MOST_GPUS: u32 = 256;

/// More memory than any device has.
const MOST_BYTES: u64 = 1 << 44;

/// From an old laptop's to a hundred times today's.
const BELIEVABLE_BANDWIDTHS: RangeInclusive<u64> = 1_000_000_000..=500_000_000_000_000;

/// The open driver library. Each call may hang.
#[derive(Debug)]
pub(crate) struct Library(Nvml);

impl Library {
    /// Loads the library from its usual places.
    pub(crate) fn open() -> Result<Self, DriverState> {
        let first = Nvml::init().map(Self).map_err(DriverState::from);
        if !matches!(first, Err(DriverState::LibraryMissing)) {
            return first;
        }
        let mut others = OTHER_PLACES.iter().map(|place| Self::open_at(Path::new(place)));
        others.find(|driver| !matches!(driver, Err(DriverState::LibraryMissing))).unwrap_or(first)
    }

    pub(crate) fn open_at(path: &Path) -> Result<Self, DriverState> {
        Ok(Self(Nvml::builder().lib_path(path.as_os_str()).init()?))
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let mut doubts = Vec::new();
        let count = match self.0.device_count() {
            Ok(count) if count > MOST_GPUS => {
                doubts.push(format!("the NVIDIA driver counts {count} GPUs, which cannot be: none of them is used"));
                0
            }
            Ok(count) => count,
            Err(error) => {
                doubts.push(format!("the NVIDIA driver cannot count its GPUs: {error}; `nvidia-smi` says more"));
                0
            }
        };
        let cuda = self.0.sys_cuda_driver_version().ok();
        let mut gpus: Vec<_> = (0..count).map(|index| self.gpu(index)).collect();
        gpus.sort_by_key(|gpu| (gpu.pci_bus_id.is_none(), gpu.pci_bus_id.clone(), gpu.nvml_index));
        Snapshot {
            driver_version: self.0.sys_driver_version().ok(),
            cuda_version: cuda.map(|v| format!("{}.{}", cuda_driver_version_major(v), cuda_driver_version_minor(v))),
            gpus,
            doubts,
        }
    }

    /// Reads a device's memory anew. MIG instances have UUIDs of their own.
    pub(crate) fn memory(&self, uuid: Option<&str>, nvml_index: u32) -> MemoryReading {
        let device = match uuid {
            Some(uuid) => self.0.device_by_uuid(uuid),
            None => self.0.device_by_index(nvml_index),
        };
        match device {
            Ok(device) => read_memory(&self.0, &device),
            Err(error) => MemoryReading::Failed(error.to_string()),
        }
    }

    fn gpu(&self, nvml_index: u32) -> RawGpu {
        match self.0.device_by_index(nvml_index) {
            Ok(device) => describe(&self.0, &device, nvml_index),
            Err(error) => RawGpu {
                nvml_index,
                name: "NVIDIA GPU".to_owned(),
                uuid: None,
                pci_bus_id: None,
                compute_capability: None,
                memory: MemoryReading::Failed(error.to_string()),
                speed: 0,
                bandwidth: None,
                mig: None,
                error: Some(error.to_string()),
            },
        }
    }
}

/// Everything that a GPU does not answer (old ones, WSL) stays `None`.
fn describe(nvml: &Nvml, device: &Device<'_>, nvml_index: u32) -> RawGpu {
    let cores = device.num_cores().unwrap_or(0);
    let clock = device.max_clock_info(Clock::SM).unwrap_or(0);
    let capability = device.cuda_compute_capability().ok();
    RawGpu {
        nvml_index,
        name: device.name().unwrap_or_else(|_| "NVIDIA GPU".to_owned()),
        uuid: device.uuid().ok(),
        pci_bus_id: device.pci_info().ok().map(|pci| short_pci_bus_id(&pci.bus_id)),
        compute_capability: capability.and_then(|c| Some((c.major.try_into().ok()?, c.minor.try_into().ok()?))),
        memory: read_memory(nvml, device),
        speed: u64::from(cores) * u64::from(clock),
        bandwidth: memory_bandwidth(device),
        mig: mig_instances(nvml, device),
        error: None,
    }
}

/// Width of the bus times clock times two, since the memory of every GPU that NVML knows sends twice a clock: 3.35 TB/s for an
/// H100 SXM, 1.01 TB/s for an RTX 4090, as their data sheets say.
fn memory_bandwidth(device: &Device<'_>) -> Option<u64> {
    let bits = u64::from(device.memory_bus_width().ok()?);
    let megahertz = u64::from(device.max_clock_info(Clock::Memory).ok()?);
    Some(bits / 8 * megahertz * 2 * 1_000_000).filter(|bandwidth| BELIEVABLE_BANDWIDTHS.contains(bandwidth))
}

fn mig_instances(nvml: &Nvml, device: &Device<'_>) -> Option<Vec<RawMig>> {
    let on = device.mig_mode().is_ok_and(|mode| mode.current == 1);
    on.then(|| {
        let places = 0..device.mig_device_count().unwrap_or(0);
        let instance = |place| {
            let instance = device.mig_device_by_index(place).ok()?; // most places are empty
            Some(RawMig {
                uuid: instance.uuid().ok()?,
                name: instance.name().unwrap_or_else(|_| "MIG instance".to_owned()),
                memory: read_memory(nvml, &instance),
            })
        };
        places.filter_map(instance).collect()
    })
}

fn read_memory(nvml: &Nvml, device: &Device<'_>) -> MemoryReading {
    let reading = match device.memory_info() {
        Ok(memory) => Ok((memory.total, memory.free)),
        Err(NvmlError::NotSupported) => return MemoryReading::NotAvailable,
        // Drivers before 510 lack this query; the first version of it lacks only `reserved`, which is not read here.
        Err(error) => memory_v1(nvml, device).map_err(|v1| match v1 {
            NvmlError::FailedToLoadSymbol(_) => error,
            v1 => v1,
        }),
    };
    match reading {
        Ok((total, free)) => believable(total, free),
        Err(NvmlError::NotSupported) => MemoryReading::NotAvailable,
        Err(error) => MemoryReading::Failed(error.to_string()),
    }
}

/// A plan built on a wrong size would fail late and far from its cause.
fn believable(total: u64, free: u64) -> MemoryReading {
    let amount = crate::format_bytes;
    if total == 0 {
        MemoryReading::Failed("the driver says that it has none".to_owned())
    } else if free > total {
        MemoryReading::Failed(format!("the driver says that {} of {} are free", amount(free), amount(total)))
    } else if total > MOST_BYTES {
        MemoryReading::Failed(format!("the driver says that it has {}", amount(total)))
    } else {
        MemoryReading::Bytes { total, free }
    }
}

/// Total and free bytes by the query of drivers 470 to 509, which nvml-wrapper does not wrap.
#[allow(unsafe_code)]
fn memory_v1(nvml: &Nvml, device: &Device<'_>) -> Result<(u64, u64), NvmlError> {
    let query = nvml.lib().nvmlDeviceGetMemoryInfo.as_ref();
    let query = query.map_err(|error| NvmlError::FailedToLoadSymbol(error.to_string()))?;
    let mut memory = nvmlMemory_t { total: 0, free: 0, used: 0 };
    // SAFETY: the handle is used only below, while `device` and the `nvml` that it came from are borrowed.
    let handle = unsafe { device.handle() };
    // SAFETY: the symbol was loaded from the library that `nvml` keeps open, the handle is that library's, and the struct is
    // the one this version of the query fills in.
    nvml_try(unsafe { query(handle, &raw mut memory) })?;
    Ok((memory.total, memory.free))
}

/// `00000000:65:00.0` as the kernel and llama.cpp write it: `0000:65:00.0`.
fn short_pci_bus_id(bus_id: &str) -> String {
    let bus_id = bus_id.to_ascii_lowercase();
    match bus_id.split_once(':') {
        Some((domain, rest)) if domain.len() == 8 && domain.starts_with("0000") => {
            format!("{}:{rest}", &domain[4..])
        }
        _ => bus_id,
    }
}

/// PCI addresses of NVIDIA display controllers, whether or not a driver is there.
pub(crate) fn pci_addresses(root: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(root.join("sys/bus/pci/devices")) else {
        return Vec::new();
    };
    let reads = |path: &Path, name: &str, start: &str| {
        std::fs::read_to_string(path.join(name)).is_ok_and(|text| text.starts_with(start))
    };
    let mut addresses: Vec<_> = entries
        .flatten()
        .filter(|e| reads(&e.path(), "vendor", "0x10de") && reads(&e.path(), "class", "0x03"))
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    addresses.sort();
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeLibrary, FakeRoot};

    #[test]
    fn a_machine_without_a_driver_is_a_state_that_says_what_to_do() {
        let state = Library::open_at(Path::new("/nonexistent/libnvidia-ml.so.1")).unwrap_err();
        assert_eq!(state, DriverState::LibraryMissing);
        assert!(state.to_string().contains("install driver 470 or newer"));
        assert!(state.to_string().contains("--gpus all"));
    }

    /// The fake driver, opened without a deadline.
    fn fake(options: &[&str], env: &[(&str, &str)]) -> (Result<Library, DriverState>, FakeLibrary) {
        let fake = FakeLibrary::build(options, env);
        (Library::open_at(&fake.path()), fake)
    }

    #[test]
    fn a_driver_library_is_loaded_and_read() {
        let (driver, _library) = fake(&[], &[]);
        let driver = driver.unwrap();
        let seen = driver.snapshot();
        assert_eq!(seen.driver_version.as_deref(), Some("535.104.05"));
        assert_eq!(seen.cuda_version.as_deref(), Some("12.2"));
        let order: Vec<_> = seen.gpus.iter().map(|gpu| gpu.nvml_index).collect();
        assert_eq!(order, [3, 0, 1, 2]); // by PCI address, the lost one last

        let h100 = &seen.gpus[1];
        assert_eq!(h100.name, "NVIDIA H100 80GB HBM3");
        assert_eq!(h100.uuid.as_deref(), Some("GPU-h100"));
        assert_eq!(h100.pci_bus_id.as_deref(), Some("0000:65:00.0"));
        assert_eq!(h100.compute_capability, Some((9, 0)));
        let (total, free) = (80 << 30, 79 << 30);
        assert_eq!(h100.memory, MemoryReading::Bytes { total, free });
        assert_eq!((h100.speed, &h100.mig), (16_896 * 1_980, &None));
        assert_eq!(h100.bandwidth, Some(3_352_320_000_000));
        assert_eq!(seen.gpus[2].bandwidth, None, "a GB10 has no bus of its own");
        assert_eq!(seen.gpus[2].memory, MemoryReading::NotAvailable); // GB10
        let error = seen.gpus[3].error.as_ref().unwrap();
        assert!(error.contains("fell off the bus"), "{error}");

        let instances = seen.gpus[0].mig.as_ref().unwrap();
        let uuids: Vec<_> = instances.iter().map(|m| m.uuid.as_str()).collect();
        assert_eq!(uuids, ["MIG-zero", "MIG-three"]);
        let (total, free) = (10 << 30, 9 << 30);
        let memory = MemoryReading::Bytes { total, free };
        assert_eq!(instances[1].memory, memory);
        assert_eq!(driver.memory(Some("MIG-three"), 3), memory);
        let gone = driver.memory(Some("GPU-gone"), 9);
        assert!(matches!(gone, MemoryReading::Failed(_)));
    }

    #[test]
    fn drivers_before_510_are_asked_by_the_first_memory_query() {
        let (driver, _library) = fake(&["--cfg=old"], &[("FAKE_DRIVER", "470.42.01")]);
        let seen = driver.unwrap().snapshot();
        assert_eq!(seen.driver_version.as_deref(), Some("470.42.01"));
        let (total, free) = (80 << 30, 79 << 30);
        assert_eq!(seen.gpus[1].memory, MemoryReading::Bytes { total, free });
        assert_eq!(seen.gpus[2].memory, MemoryReading::NotAvailable);
    }

    #[test]
    fn a_driver_that_refuses_is_a_state_that_says_what_to_do() {
        for (code, state, advice) in [
            ("9", DriverState::NotLoaded, "modprobe nvidia"),
            ("18", DriverState::VersionMismatch, "reboot"),
            ("4", DriverState::NoPermission, "/dev/nvidia*"),
        ] {
            let (driver, _library) = fake(&[], &[("FAKE_INIT", code)]);
            let seen = driver.unwrap_err();
            assert_eq!(seen, state);
            assert!(seen.to_string().contains(advice), "{seen}");
        }
        let (driver, _library) = fake(&[], &[("FAKE_INIT", "999")]);
        let seen = driver.unwrap_err().to_string();
        assert!(seen.contains("an internal driver error"), "{seen}");
    }

    #[test]
    fn a_driver_that_lies_is_not_believed() {
        for (lie, words) in [
            ("zero", "the driver says that it has none"),
            ("free", "81.0 GiB of 80.0 GiB are free"),
            ("huge", "the driver says that it has 1048576.0 TiB"),
        ] {
            let (driver, _library) = fake(&[], &[("FAKE_LIE", lie)]);
            match &driver.unwrap().snapshot().gpus[1].memory {
                MemoryReading::Failed(text) => assert!(text.contains(words), "{text}"),
                believed => panic!("{lie}: {believed:?}"),
            }
        }
        let (driver, _library) = fake(&[], &[("FAKE_LIE", "count")]);
        let seen = driver.unwrap().snapshot();
        assert!(seen.gpus.is_empty() && seen.doubts[0].contains("counts 4000000000 GPUs"), "{:?}", seen.doubts);
    }

    #[test]
    fn a_driver_that_returns_errors_says_which() {
        let (driver, _library) = fake(&[], &[("FAKE_ERROR", "count")]);
        let seen = driver.unwrap().snapshot();
        assert!(seen.gpus.is_empty() && seen.doubts[0].contains("cannot count its GPUs"), "{:?}", seen.doubts);
        let (driver, _library) = fake(&[], &[("FAKE_ERROR", "memory")]);
        let gpus = driver.unwrap().snapshot().gpus;
        assert!(matches!(&gpus[1].memory, MemoryReading::Failed(text) if text.contains("internal")), "{gpus:?}");
    }

    #[test]
    fn pci_addresses_are_written_as_llama_cpp_writes_them() {
        assert_eq!(short_pci_bus_id("00000000:65:00.0"), "0000:65:00.0");
        assert_eq!(short_pci_bus_id("0000FFFF:0A:00.0"), "ffff:0a:00.0");
        assert_eq!(short_pci_bus_id("00010000:0A:00.0"), "00010000:0a:00.0"); // beyond 16 bits: nothing to cut
        assert_eq!(short_pci_bus_id("0000:65:00.0"), "0000:65:00.0");
        assert_eq!(short_pci_bus_id(""), "");
    }

    #[test]
    fn gpus_are_found_on_the_pci_bus_without_a_driver() {
        let root = FakeRoot::new();
        for (address, vendor, class) in [
            ("0000:65:00.0", "0x10de\n", "0x030200\n"),
            ("0000:17:00.0", "0x10de\n", "0x030000\n"),
            ("0000:65:00.1", "0x10de\n", "0x040300\n"), // its sound device
            ("0000:00:02.0", "0x8086\n", "0x030000\n"),
        ] {
            root.write(&format!("sys/bus/pci/devices/{address}/vendor"), vendor);
            root.write(&format!("sys/bus/pci/devices/{address}/class"), class);
        }
        assert_eq!(pci_addresses(root.path()), ["0000:17:00.0", "0000:65:00.0"]);
        assert!(pci_addresses(FakeRoot::new().path()).is_empty());
    }
}
