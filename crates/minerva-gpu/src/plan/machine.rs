//! The machine of a plan: devices and a host, real or made up.

use std::borrow::Cow;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Rung;
use crate::device::GpuDevice;
use crate::estimate::{DeviceTraits, HostTraits};
use crate::memory::{default_limit_bytes, parse_bytes};

/// What kind of device takes layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlanDeviceKind {
    /// An NVIDIA GPU.
    Cuda,
    /// A Mac's GPU.
    Metal,
    /// Another process's device, over RPC.
    Rpc,
}

impl PlanDeviceKind {
    /// How memory on such a device is counted.
    pub fn traits(self) -> DeviceTraits {
        match self {
            Self::Cuda => DeviceTraits::CUDA,
            Self::Metal => DeviceTraits::METAL,
            Self::Rpc => DeviceTraits::RPC,
        }
    }

    /// What a device of this kind reads per second where nobody measured: an RTX 4090, an M-series Pro, a loopback worker.
    fn default_bandwidth(self) -> u64 {
        of_nominal_bandwidth(match self {
            Self::Cuda => 1_000_000_000_000,
            Self::Metal => 200_000_000_000,
            Self::Rpc => HOST_NOMINAL_BANDWIDTH,
        })
    }

    /// A copy of a few kilobytes and a wait; over RPC, half a round trip through a socket and the threads at its ends.
    fn default_crossing_ns(self) -> u64 {
        match self {
            Self::Cuda | Self::Metal => 20_000,
            Self::Rpc => 100_000,
        }
    }

    /// What the backend itself takes before the first tensor: the CUDA context and its libraries' workspaces.
    fn default_overhead_bytes(self) -> u64 {
        match self {
            Self::Cuda => 500 << 20,
            Self::Metal | Self::Rpc => 0,
        }
    }
}

/// Two channels of DDR5.
const HOST_NOMINAL_BANDWIDTH: u64 = 50_000_000_000;

/// What matrix-vector products reach of the bandwidth that a data sheet or a driver tells.
pub fn of_nominal_bandwidth(bytes_per_second: u64) -> u64 {
    bytes_per_second / 4 * 3
}

/// What a plan leaves free on a large device; llama.cpp's `--fit-target` is as much. A twentieth of a small one.
const MOST_SPARED_BYTES: u64 = 1 << 30;

/// A device that may take layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanDevice {
    /// What people call it.
    pub name: String,
    /// What it is.
    pub kind: PlanDeviceKind,
    /// All its memory.
    pub total_bytes: u64,
    /// Free now.
    pub free_bytes: u64,
    /// The most that may be used, by all models of a process together: the share or the user's limit.
    pub limit_bytes: u64,
    /// What other models of this process hold of the limit.
    #[serde(default)]
    pub taken_bytes: u64,
    /// What the backend takes for itself, out of the free bytes.
    pub overhead_bytes: u64,
    /// Bytes of weights that matrix-vector products read per second.
    pub bandwidth: u64,
    /// What it costs to move the hidden state there or back, in nanoseconds.
    #[serde(default)]
    pub crossing_ns: u64,
    /// Whether its memory is the host's: what it takes, the host lacks.
    pub unified: bool,
}

impl PlanDevice {
    /// A device with nothing on it, at the guide's share, with the usual speed of its kind.
    pub fn empty(name: impl Into<String>, kind: PlanDeviceKind, total_bytes: u64) -> Self {
        let limit_bytes = match kind {
            PlanDeviceKind::Cuda => default_limit_bytes(GpuDevice::Cuda, total_bytes),
            PlanDeviceKind::Metal => default_limit_bytes(GpuDevice::Metal, total_bytes),
            PlanDeviceKind::Rpc => total_bytes,
        };
        Self {
            name: name.into(),
            kind,
            total_bytes,
            free_bytes: total_bytes,
            limit_bytes,
            taken_bytes: 0,
            overhead_bytes: kind.default_overhead_bytes(),
            bandwidth: kind.default_bandwidth(),
            crossing_ns: kind.default_crossing_ns(),
            unified: kind == PlanDeviceKind::Metal,
        }
    }

    /// What a plan gives to tensors: within the limit, and of what is free not all, since whoever else uses the device may want a
    /// little more before the load is done. The backend's overhead is taken off.
    pub fn budget_bytes(&self) -> u64 {
        let spared = match self.kind {
            PlanDeviceKind::Rpc => 0, // what its worker offers is there for us
            PlanDeviceKind::Cuda | PlanDeviceKind::Metal => (self.total_bytes / 20).min(MOST_SPARED_BYTES),
        };
        Self { free_bytes: self.free_bytes.saturating_sub(spared), ..self.clone() }.room_bytes()
    }

    /// What tensors can take at most: what a load that was planned is checked against.
    pub fn room_bytes(&self) -> u64 {
        self.open_bytes().saturating_sub(self.overhead_bytes)
    }

    /// What is left of the limit and free, for tensors and the backend itself.
    pub fn open_bytes(&self) -> u64 {
        self.limit_bytes.saturating_sub(self.taken_bytes).min(self.free_bytes)
    }
}

/// The host's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanHost {
    /// All of it, after every limit.
    pub total_bytes: u64,
    /// Free now.
    pub free_bytes: u64,
    /// What Minerva takes by itself, for all models of a process together; one that the user insists on may take what is free.
    pub limit_bytes: u64,
    /// What other models of this process hold of the limit.
    #[serde(default)]
    pub taken_bytes: u64,
    /// Bytes of weights that matrix-vector products read per second, all threads together.
    pub bandwidth: u64,
    /// Weights are mapped from the file: the system can drop and read them again, so they need not fit. Those that are repacked
    /// must.
    pub maps_weights: bool,
    /// Weight types that are repacked.
    #[serde(skip)]
    pub traits: HostTraits,
}

impl PlanHost {
    /// A host with nothing on it, at the guide's share.
    pub fn empty(total_bytes: u64) -> Self {
        Self {
            total_bytes,
            free_bytes: total_bytes,
            limit_bytes: default_limit_bytes(GpuDevice::Cpu, total_bytes),
            taken_bytes: 0,
            bandwidth: of_nominal_bandwidth(HOST_NOMINAL_BANDWIDTH),
            maps_weights: true,
            traits: HostTraits::default(),
        }
    }
}

/// Devices and a host.
///
/// As text: `cuda:24GiB,cuda:8GiB@600GB/s,ram:32GiB`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanMachine {
    /// Devices that may take layers.
    pub devices: Vec<PlanDevice>,
    /// The host.
    pub host: PlanHost,
}

impl PlanMachine {
    /// The machine as a rung has it: without a layout of the host's own for weights, where it does without.
    pub(super) fn of_rung(&self, rung: &Rung) -> Cow<'_, Self> {
        if !rung.as_stored {
            return Cow::Borrowed(self);
        }
        let host = PlanHost { traits: HostTraits::default(), ..self.host.clone() };
        Cow::Owned(Self { host, ..self.clone() })
    }
}

/// Why a text is not a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{part}` is no device: write `cuda:24GiB`, `metal:16GiB`, `rpc:8GiB` or `ram:32GiB`, with `@900GB/s` if you know it"
)]
pub struct ParseMachineError {
    part: String,
}

impl FromStr for PlanMachine {
    type Err = ParseMachineError;

    fn from_str(text: &str) -> Result<Self, ParseMachineError> {
        let mut devices = Vec::new();
        let mut host = None;
        for part in text.split(',') {
            let error = || ParseMachineError { part: part.to_owned() };
            let (kind, size) = part.trim().split_once(':').ok_or_else(error)?;
            let (size, speed) = size.split_once('@').map_or((size, None), |(size, speed)| (size, Some(speed)));
            let bytes = parse_bytes(size).ok().filter(|&bytes| bytes > 0).ok_or_else(error)?;
            let bandwidth = match speed {
                Some(speed) => Some(parse_speed(speed).ok_or_else(error)?),
                None => None,
            };
            let kind = match kind {
                "cuda" => PlanDeviceKind::Cuda,
                "metal" => PlanDeviceKind::Metal,
                "rpc" => PlanDeviceKind::Rpc,
                "ram" if host.is_none() => {
                    let empty = PlanHost::empty(bytes);
                    host = Some(PlanHost { bandwidth: bandwidth.unwrap_or(empty.bandwidth), ..empty });
                    continue;
                }
                _ => return Err(error()),
            };
            let device = PlanDevice::empty(part.trim(), kind, bytes);
            devices.push(PlanDevice { bandwidth: bandwidth.unwrap_or(device.bandwidth), ..device });
        }
        let host = host.ok_or_else(|| ParseMachineError { part: text.to_owned() })?;
        Ok(Self { devices, host })
    }
}

/// `900GB/s`, in decimal gigabytes as data sheets have it; what of it products reach.
fn parse_speed(text: &str) -> Option<u64> {
    let gigabytes: u64 = text.strip_suffix("GB/s")?.trim().parse().ok()?;
    gigabytes.checked_mul(1_000_000_000).map(of_nominal_bandwidth).filter(|&speed| speed > 0)
}
