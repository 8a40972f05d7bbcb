//! The machine that a load is planned for: local GPUs, RPC devices and the host, each with llama.cpp's own number.

use minerva_gpu::estimate::HostTraits;
use minerva_gpu::gguf::GgmlType;
use minerva_gpu::plan::{PlanDevice, PlanDeviceKind, PlanHost, PlanMachine, of_nominal_bandwidth};
use minerva_gpu::{
    BuildBackends, CpuInfo, DeviceChoice, DeviceInfo, GpuContext, GpuDevice, GpuOptions, MemoryEstimate, MemoryKind,
    SystemMemory,
};
use minerva_llama::{Device, DeviceKind};

use super::claims::{Owner, claimed};
use super::overhead;
use super::speeds::measured;
use crate::config::EngineConfig;
use crate::error::LoadError;

/// What is there, and how to reach it.
pub(super) struct Machine {
    pub(super) gpu: GpuContext,
    pub(super) planned: PlanMachine,
    /// llama.cpp's index of each planned device.
    llama_indices: Vec<usize>,
    /// For RPC devices: whose they are.
    pub(super) addresses: Vec<Option<String>>,
    /// For local devices: which they are.
    local: Vec<Option<DeviceInfo>>,
}

/// What was free at one moment.
#[derive(Debug, Clone)]
pub(super) struct FreeNow {
    /// On each device of the planned machine.
    devices: Vec<u64>,
    pub(super) host: u64,
}

impl Machine {
    /// Looks at the devices that the configuration allows. RPC servers are connected to.
    pub(super) fn of(config: &EngineConfig, build: BuildBackends) -> Result<Self, LoadError> {
        let mut rpc = Vec::new();
        for server in &config.rpc_servers {
            rpc.extend(minerva_llama::add_rpc_server(server)?);
        }
        let options = GpuOptions { choice: config.device, build, memory_limit_bytes: config.memory_limit_bytes };
        let mut gpu = GpuContext::with_options(options)?;
        if let Some(reason) = gpu.fallback_reason().filter(|_| rpc.is_empty() && config.fallback_to_cpu) {
            tracing::warn!("{reason}, falling back to CPU");
        }
        let memory = gpu.initialize_for_inference()?;
        let host = host(config, &gpu, &memory);
        let planned = PlanMachine { devices: Vec::new(), host };
        let mut machine = Self { gpu, planned, llama_indices: Vec::new(), addresses: Vec::new(), local: Vec::new() };
        machine.add_local_devices(config.device)?;
        for device in minerva_llama::devices().iter().filter(|device| rpc.contains(&device.index)) {
            machine.add_rpc_device(device, n_threads(config, &machine.gpu.machine().cpu));
        }
        if !machine.planned.devices.is_empty() {
            machine.measure_host(config); // what is better left on it depends on how slow it is
        }
        Ok(machine)
    }

    /// Why there is no GPU, where one is wanted and nothing else may do.
    pub(super) fn no_gpu(&self, config: &EngineConfig) -> Option<&str> {
        let is_wanted = !config.fallback_to_cpu && config.n_gpu_layers != Some(0);
        self.gpu.fallback_reason().filter(|_| is_wanted && self.planned.devices.is_empty())
    }

    /// Takes what the host really reads per second for what hosts usually do.
    pub(super) fn measure_host(&mut self, config: &EngineConfig) {
        let cpu = minerva_llama::devices().into_iter().find(|device| device.kind == DeviceKind::Cpu);
        let n_threads = n_threads(config, &self.gpu.machine().cpu);
        if let Some(speed) = cpu.and_then(|cpu| measured(&cpu, n_threads)) {
            self.planned.host.bandwidth = speed.bandwidth;
        }
    }

    /// llama.cpp's numbers of devices at these positions of the planned machine.
    pub(super) fn llama_indices(&self, positions: &[usize]) -> Vec<usize> {
        positions.iter().filter_map(|&position| self.llama_indices.get(position).copied()).collect()
    }

    /// What is free now: another process may have come since the plan was made.
    pub(super) fn free_now(&self) -> FreeNow {
        let seen = minerva_llama::devices();
        let devices = self.planned.devices.iter().enumerate().map(|(position, device)| match &self.local[position] {
            // A driver that does not answer fails the load itself.
            Some(local) => self.gpu.free_bytes(local).unwrap_or(device.free_bytes),
            None => {
                self.llama_indices.get(position).and_then(|&index| seen.get(index)).map_or(0, |seen| seen.free_bytes)
            }
        });
        FreeNow { devices: devices.collect(), host: SystemMemory::read().free_bytes }
    }

    /// What could be used of the device at this position of the planned machine when `free` was seen. Other models of this process hold
    /// `taken_bytes` of it.
    pub(super) fn room(&self, position: usize, free: &FreeNow, taken_bytes: u64) -> u64 {
        let free_bytes = free.devices[position];
        PlanDevice { free_bytes, taken_bytes, ..self.planned.devices[position].clone() }.room_bytes()
    }

    /// The selected GPU, and with `auto` or `cuda` every other usable one of its kind.
    fn add_local_devices(&mut self, choice: DeviceChoice) -> Result<(), LoadError> {
        let selected = self.gpu.device().clone();
        if selected.kind == GpuDevice::Cpu {
            return Ok(());
        }
        let takes_all = matches!(choice, DeviceChoice::Auto | DeviceChoice::Cuda(None));
        let is_taken = |device: &DeviceInfo| {
            device.is_usable_gpu() && device.kind == selected.kind && (takes_all || device.index == selected.index)
        };
        for device in self.gpu.devices().to_vec().iter().filter(|device| is_taken(device)) {
            let problem = || format!("llama.cpp does not see {}", device.name);
            let index = llama_device(device).ok_or_else(|| LoadError::Setting { name: "gpu", problem: problem() })?;
            // llama.cpp has made a CUDA device's context to look at it: what that took is not free any more.
            let free_bytes = self.gpu.free_bytes(device).unwrap_or(device.free_bytes);
            self.add(PlanDevice { free_bytes, ..local(device) }, index, None, Some(device.clone()));
        }
        Ok(())
    }

    /// The size that llama.cpp reports is already cut down to the limit of the server's entry.
    fn add_rpc_device(&mut self, device: &Device, n_threads: u32) {
        let empty = PlanDevice::empty(device.name.clone(), PlanDeviceKind::Rpc, device.total_bytes);
        let mut planned = PlanDevice { free_bytes: device.free_bytes, ..empty };
        if let Some(speed) = measured(device, n_threads) {
            (planned.bandwidth, planned.crossing_ns) = (speed.bandwidth, speed.crossing_ns);
        }
        self.add(planned, device.index, Some(device.description.clone()), None);
    }

    fn add(&mut self, device: PlanDevice, llama_index: usize, address: Option<String>, local: Option<DeviceInfo>) {
        let taken_bytes = claimed(Owner::Device(llama_index));
        self.planned.devices.push(PlanDevice { taken_bytes, ..device });
        self.llama_indices.push(llama_index);
        self.addresses.push(address);
        self.local.push(local);
    }
}

/// Compute threads of a step: all that the process may use, unless the user says.
pub(super) fn n_threads(config: &EngineConfig, cpu: &CpuInfo) -> u32 {
    config.n_threads.unwrap_or_else(|| u32::try_from(cpu.threads).unwrap_or(1))
}

fn local(device: &DeviceInfo) -> PlanDevice {
    let kind = if device.kind == GpuDevice::Metal { PlanDeviceKind::Metal } else { PlanDeviceKind::Cuda };
    let empty = PlanDevice::empty(device.name.clone(), kind, device.total_bytes);
    PlanDevice {
        free_bytes: device.free_bytes,
        limit_bytes: device.limit_bytes,
        overhead_bytes: overhead::remembered(device).unwrap_or(empty.overhead_bytes),
        bandwidth: device.bandwidth.map_or(empty.bandwidth, of_nominal_bandwidth),
        unified: device.memory_kind == MemoryKind::Unified,
        ..empty
    }
}

fn host(config: &EngineConfig, gpu: &GpuContext, memory: &MemoryEstimate) -> PlanHost {
    let ram = &gpu.machine().memory;
    let empty = PlanHost::empty(ram.total_bytes);
    // On the CPU alone the user's limit is the CPU's.
    let limit_bytes = if memory.device == GpuDevice::Cpu { memory.limit_bytes } else { empty.limit_bytes };
    let repacked = minerva_llama::repacked_types(config.use_extra_buffers);
    PlanHost {
        free_bytes: ram.free_bytes,
        limit_bytes,
        taken_bytes: claimed(Owner::Host),
        maps_weights: config.use_mmap,
        traits: HostTraits { repacked_types: repacked.iter().filter_map(|name| GgmlType::from_name(name)).collect() },
        ..empty
    }
}

/// llama.cpp's index of the device: CUDA numbers as the process sees them, one device otherwise.
fn llama_device(device: &DeviceInfo) -> Option<usize> {
    let devices = minerva_llama::devices();
    let mut gpus = devices.iter().filter(|d| matches!(d.kind, DeviceKind::Gpu | DeviceKind::IntegratedGpu));
    match device.index {
        Some(index) => {
            let name = format!("CUDA{index}");
            gpus.find(|gpu| gpu.name == name).map(|gpu| gpu.index)
        }
        None => gpus.next().map(|gpu| gpu.index),
    }
}
