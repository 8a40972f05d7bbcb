//! Where the model runs: the CPU, the GPU, or a worker process that stands in for one.

use std::path::Path;

use anyhow::Context as _;
use minerva_engine::{EngineConfig, RpcServer};
use minerva_gpu::{BuildBackends, CpuInfo, DeviceChoice, GpuContext, GpuDevice, GpuOptions};
use minerva_llama::DeviceKind;
use serde::Serialize;

use crate::engine::{Beside, Programs, same_work};

/// What kind of place it is; the name is the column's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    Cpu,
    Gpu,
    /// Another process that computes on this machine's CPU: shows that the columns work, says nothing of a GPU.
    RpcWorker,
}

impl Kind {
    /// The word in metrics.
    pub(super) fn key(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
            Self::RpcWorker => "rpc",
        }
    }

    /// The word in tables.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Cpu => "CPU",
            Self::Gpu => "GPU",
            Self::RpcWorker => "RPC worker (not a GPU)",
        }
    }
}

/// A place with what it takes to load a model there on either side.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Place {
    pub(super) kind: Kind,
    /// The hardware's name.
    pub(super) name: String,
    #[serde(skip)]
    choice: DeviceChoice,
    #[serde(skip)]
    rpc: Option<RpcServer>,
    /// llama.cpp's numbers.
    #[serde(skip)]
    llama_devices: Vec<usize>,
}

/// Sizes of a context.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) n_seq: u32,
    /// Tokens of each sequence.
    pub(super) context_tokens: u32,
}

impl Place {
    pub(super) fn cpu() -> Self {
        Self {
            kind: Kind::Cpu,
            name: cpu_name(&CpuInfo::read()),
            choice: DeviceChoice::Cpu,
            rpc: None,
            llama_devices: Vec::new(),
        }
    }

    /// The GPU that the engine would choose, or why there is none.
    pub(super) fn gpu() -> Result<Self, String> {
        let build = BuildBackends {
            cuda: minerva_llama::has_backend(c"CUDA"),
            metal: minerva_llama::has_backend(c"MTL"),
            vulkan: minerva_llama::has_backend(c"Vulkan"),
        };
        let gpu = GpuContext::with_options(GpuOptions { build, ..GpuOptions::default() }).map_err(|e| e.to_string())?;
        let device = gpu.device();
        if device.kind == GpuDevice::Cpu {
            return Err(gpu.fallback_reason().unwrap_or("no GPU was found").to_owned());
        }
        let wanted = device.index.map(|index| format!("CUDA{index}"));
        let mut gpus = minerva_llama::devices().into_iter();
        let found = gpus.find(|gpu| match &wanted {
            Some(name) => gpu.name == *name,
            None => matches!(gpu.kind, DeviceKind::Gpu | DeviceKind::IntegratedGpu),
        });
        let found = found.ok_or_else(|| format!("llama.cpp does not see {}", device.name))?;
        // By its own label, so that the engine takes this device and no second one.
        let choice = device.label().parse().map_err(|e| format!("{}: {e}", device.name))?;
        Ok(Self { kind: Kind::Gpu, name: device.name.clone(), choice, rpc: None, llama_devices: vec![found.index] })
    }

    /// The devices of a worker. Nothing connects to it before a side does: it serves one connection.
    pub(super) fn rpc_worker(address: &str) -> Self {
        Self {
            kind: Kind::RpcWorker,
            name: format!("a worker process on {}", cpu_name(&CpuInfo::read())),
            choice: DeviceChoice::Cpu,
            rpc: Some(RpcServer::new(address)),
            llama_devices: Vec::new(),
        }
    }

    /// The engine's configuration for this place; `layers` on the device, or as many as fit.
    pub(super) fn config(&self, model: &Path, sizes: Sizes, layers: Option<u32>, threads: Option<u32>) -> EngineConfig {
        EngineConfig {
            device: self.choice,
            rpc_servers: self.rpc.iter().cloned().collect(),
            n_gpu_layers: layers,
            n_seq_max: Some(sizes.n_seq),
            context_length_tokens: Some(sizes.context_tokens),
            n_threads: threads,
            ..same_work(model)
        }
    }

    /// The same with no more of the device than this.
    pub(super) fn limited(&self, config: &EngineConfig, limit_bytes: u64) -> EngineConfig {
        let limit = Some(limit_bytes);
        if self.rpc.is_some() {
            let rpc_servers = config.rpc_servers.iter().map(|s| RpcServer { memory_limit_bytes: limit, ..s.clone() });
            EngineConfig { rpc_servers: rpc_servers.collect(), ..config.clone() }
        } else {
            EngineConfig { memory_limit_bytes: limit, ..config.clone() }
        }
    }

    /// llama.cpp's numbers of its devices.
    pub(super) fn llama_devices(&self) -> &[usize] {
        &self.llama_devices
    }

    /// Both sides on this place.
    pub(super) fn beside(
        &self,
        config: &EngineConfig,
        slow_down: f64,
        programs: Programs<'_>,
    ) -> anyhow::Result<Beside> {
        let sides = Beside::new(programs, config, &self.llama_devices, slow_down);
        sides.with_context(|| self.kind.title().to_owned())
    }
}

/// A name for files: lower-case letters, digits and single dashes.
pub(super) fn slug(name: &str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-")
}

/// The name and the cores that this process may use: a baseline of two cores says nothing about four.
fn cpu_name(cpu: &CpuInfo) -> String {
    let model = if cpu.model.is_empty() { &cpu.architecture } else { &cpu.model };
    format!("{model}, {} {}", cpu.threads, if cpu.threads == 1 { "core" } else { "cores" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_file_names() {
        assert_eq!(slug("NVIDIA H100 80GB HBM3"), "nvidia-h100-80gb-hbm3");
        assert_eq!(slug("Intel(R) Core(TM) i7, 8 cores"), "intel-r-core-tm-i7-8-cores");
        let cpu = |threads| CpuInfo { model: "AMD EPYC".into(), threads, ..CpuInfo::default() };
        assert_eq!((cpu_name(&cpu(1)), cpu_name(&cpu(2))), ("AMD EPYC, 1 core".into(), "AMD EPYC, 2 cores".into()));
    }
}
