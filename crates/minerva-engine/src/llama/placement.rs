//! Where the model goes: which device, how many layers, how many sequences of how many cells.
//!
//! Every candidate is checked with a load that allocates nothing, so a plan that is returned holds. What the user fixed
//! stays fixed; what was left open shrinks until the plan is within the device's share of memory.

use minerva_gpu::{BuildBackends, DeviceChoice, DeviceInfo, GpuContext, GpuDevice, GpuOptions, MemoryEstimate};
use minerva_llama::{ContextParams, DeviceBytes, DeviceKind, ExtraBuffers, ModelParams, Simulation};

use crate::config::{EngineConfig, FlashAttention, KvType};
use crate::error::LoadError;
use crate::status::{DeviceMemory, Placement};

/// Sequences to aim for when the user does not say.
const DEFAULT_N_SEQ: u32 = 8;

/// The context to aim for when the user does not say: what the model was trained for, up to this.
const DEFAULT_MAX_CONTEXT_TOKENS: u32 = 8192;

/// The smallest context that an open wish is shrunk to.
const MIN_CONTEXT_TOKENS: u32 = 512;

/// A load that is known to fit.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) model: ModelParams,
    pub(crate) context: ContextParams,
    /// The most tokens of one request.
    pub(crate) context_length_tokens: u32,
    pub(crate) placement: Placement,
}

impl Plan {
    pub(crate) fn n_gpu_layers(&self) -> u32 {
        self.model.n_gpu_layers
    }
}

/// Sequences and cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sizes {
    n_seq: u32,
    context_tokens: u32,
    n_cells: u32,
    unified: bool,
}

/// Plans for the device that the configuration asks for.
pub(crate) fn plan(config: &EngineConfig, build: BuildBackends) -> Result<Plan, LoadError> {
    check_kv_types(config)?;
    let mut rpc = Vec::new();
    for server in &config.rpc_servers {
        rpc.extend(minerva_llama::add_rpc_server(server)?);
    }
    let mut gpu = GpuContext::with_options(GpuOptions {
        choice: config.device,
        build,
        memory_limit_bytes: config.memory_limit_bytes,
    })?;
    if let Some(reason) = gpu.fallback_reason().filter(|_| rpc.is_empty()) {
        tracing::warn!("{reason}, falling back to CPU");
    }
    let estimate = gpu.initialize_for_inference()?;
    let mut rooms = Vec::new();
    if gpu.detect_device() != GpuDevice::Cpu {
        rooms.push(Room::local(gpu.device(), &estimate)?);
    }
    rooms.extend(minerva_llama::devices().iter().filter(|device| rpc.contains(&device.index)).map(Room::rpc));
    if rooms.is_empty() {
        return plan_on_cpu(config, &gpu, &estimate);
    }
    match plan_on_gpu(config, &gpu, &estimate, &rooms) {
        Err(error @ LoadError::OutOfMemory { .. }) if config.fallback_to_cpu => {
            tracing::error!("{error}");
            tracing::warn!("GPU OOM, falling back to CPU");
            let mut plan = plan_cpu(config)?;
            plan.placement.reason = error.to_string();
            Ok(plan)
        }
        result => result,
    }
}

/// Plans for the CPU, whatever the configuration asks for: the last rung.
pub(crate) fn plan_cpu(config: &EngineConfig) -> Result<Plan, LoadError> {
    let mut gpu = GpuContext::with_options(GpuOptions {
        choice: DeviceChoice::Cpu,
        build: BuildBackends::default(),
        memory_limit_bytes: None,
    })?;
    let estimate = gpu.initialize_for_inference()?;
    plan_on_cpu(config, &gpu, &estimate)
}

fn plan_on_cpu(config: &EngineConfig, gpu: &GpuContext, estimate: &MemoryEstimate) -> Result<Plan, LoadError> {
    let model = ModelParams { n_gpu_layers: 0, devices: Vec::new(), ..model_params(config) };
    let mut draft = Draft::new(config, gpu, model)?;
    let mut taken = draft.simulate()?;
    while host_bytes(&taken) > estimate.limit_bytes && draft.shrink() {
        taken = draft.simulate()?;
    }
    // The share is what Minerva takes by itself; a model that the user insists on may take what there is. Mapped weights
    // can be dropped and read again, so only what has to be allocated counts against it.
    let host = host_bytes(&taken);
    let needed = if config.use_mmap { host - weights_bytes(&taken) } else { host };
    if needed > estimate.free_bytes {
        let used_bytes = estimate.total_bytes.saturating_sub(estimate.free_bytes);
        let limit_bytes = estimate.total_bytes;
        return Err(LoadError::OutOfMemory { what: "system", needed_bytes: needed, used_bytes, limit_bytes });
    }
    let reason = gpu.fallback_reason().map_or_else(|| "the CPU was asked for".to_owned(), str::to_owned);
    Ok(draft.plan(&taken, gpu.device(), estimate, reason))
}

/// A device that takes layers, and how much of it may be used.
struct Room {
    index: usize,
    name: String,
    /// For RPC devices: whose they are.
    address: Option<String>,
    budget_bytes: u64,
}

impl Room {
    fn local(device: &DeviceInfo, estimate: &MemoryEstimate) -> Result<Self, LoadError> {
        let index = llama_device(device).ok_or_else(|| LoadError::Setting {
            name: "gpu",
            problem: format!("llama.cpp does not see {}", device.name),
        })?;
        let name = minerva_llama::devices().swap_remove(index).name;
        Ok(Self { index, name, address: None, budget_bytes: estimate.budget_bytes })
    }

    /// The size that llama.cpp reports is already cut down to the limit of the server's entry.
    fn rpc(device: &minerva_llama::Device) -> Self {
        let (name, address) = (device.name.clone(), Some(device.description.clone()));
        Self { index: device.index, name, address, budget_bytes: device.free_bytes }
    }

    fn is_overfull(&self, taken: &SimulatedLoad) -> bool {
        taken.devices.iter().any(|device| device.device == self.name && total(device) > self.budget_bytes)
    }
}

fn plan_on_gpu(
    config: &EngineConfig,
    gpu: &GpuContext,
    estimate: &MemoryEstimate,
    rooms: &[Room],
) -> Result<Plan, LoadError> {
    let device = gpu.device();
    let is_too_much = |taken: &SimulatedLoad| rooms.iter().any(|room| room.is_overfull(taken));
    let limit_bytes = if rooms.iter().all(|room| room.address.is_none()) {
        estimate.limit_bytes
    } else {
        rooms.iter().map(|room| room.budget_bytes).sum()
    };
    let indices = rooms.iter().map(|room| room.index).collect();
    let model = ModelParams { devices: indices, n_gpu_layers: u32::MAX, ..model_params(config) };
    let mut draft = Draft::new(config, gpu, model)?;
    let all_layers = draft.n_layers + 1; // the output layer counts
    let wanted = config.n_gpu_layers.unwrap_or(all_layers).min(all_layers);
    draft.model.n_gpu_layers = wanted;
    let mut taken = draft.simulate()?;
    while is_too_much(&taken) && draft.shrink() {
        taken = draft.simulate()?;
    }
    let mut reason = match config.n_gpu_layers {
        Some(n) if n < all_layers => format!("{n} layers were asked for"),
        _ => "all layers fit".to_owned(),
    };
    if is_too_much(&taken) {
        let over = device_bytes(&taken);
        let used_bytes = estimate.total_bytes.saturating_sub(estimate.free_bytes);
        let out = LoadError::OutOfMemory { what: "GPU", needed_bytes: over, used_bytes, limit_bytes };
        if config.n_gpu_layers.is_some() && !config.fallback_to_cpu {
            return Err(out);
        }
        // Bytes grow with the layers: the largest number that fits, by bisection.
        let (mut fits, mut too_many) = (0, wanted);
        while too_many - fits > 1 {
            let middle = u32::midpoint(fits, too_many);
            draft.model.n_gpu_layers = middle;
            if is_too_much(&draft.simulate()?) { too_many = middle } else { fits = middle }
        }
        if fits == 0 {
            return Err(out);
        }
        draft.model.n_gpu_layers = fits;
        taken = draft.simulate()?;
        reason = format!("{wanted} layers need {over} bytes, the limit is {limit_bytes} bytes");
    }
    let mut reasons = vec![reason];
    reasons.extend(rooms.iter().filter_map(|room| Some(format!("{} is {}", room.name, room.address.as_ref()?))));
    let mut plan = draft.plan(&taken, device, estimate, reasons.join("; "));
    let placement = &mut plan.placement;
    placement.limit_bytes = limit_bytes;
    if rooms.iter().all(|room| room.address.is_some()) {
        "Rpc".clone_into(&mut placement.device);
        placement.device_name = rooms.iter().map(|room| room.name.as_str()).collect::<Vec<_>>().join(", ");
    }
    Ok(plan)
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

/// A plan in the making.
struct Draft<'a> {
    config: &'a EngineConfig,
    model: ModelParams,
    sizes: Sizes,
    n_layers: u32,
    n_threads: u32,
    n_threads_batch: u32,
}

impl<'a> Draft<'a> {
    fn new(config: &'a EngineConfig, gpu: &GpuContext, model: ModelParams) -> Result<Self, LoadError> {
        let threads = u32::try_from(gpu.machine().cpu.threads).unwrap_or(1);
        let n_threads = config.n_threads.unwrap_or(threads);
        let mut draft = Self {
            config,
            model,
            sizes: Sizes { n_seq: 1, context_tokens: MIN_CONTEXT_TOKENS, n_cells: MIN_CONTEXT_TOKENS, unified: false },
            n_layers: 0,
            n_threads,
            n_threads_batch: config.n_threads_batch.or(config.n_threads).unwrap_or(threads),
        };
        let shape = draft.simulate()?;
        draft.n_layers = shape.n_layers;
        draft.sizes = first_sizes(config, shape.context_train_tokens)?;
        Ok(draft)
    }

    fn context(&self) -> ContextParams {
        let config = self.config;
        ContextParams {
            n_ctx: self.sizes.n_cells,
            n_batch: config.n_batch,
            n_ubatch: config.n_ubatch.min(config.n_batch),
            n_seq_max: self.sizes.n_seq,
            n_threads: self.n_threads,
            n_threads_batch: self.n_threads_batch,
            flash_attention: match config.flash_attention {
                FlashAttention::Auto => minerva_llama::FlashAttention::Auto,
                FlashAttention::On => minerva_llama::FlashAttention::On,
                FlashAttention::Off => minerva_llama::FlashAttention::Off,
            },
            type_k: kv_type(config.kv_type_k),
            type_v: kv_type(config.kv_type_v),
            kv_unified: self.sizes.unified,
            full_windows: true,
        }
    }

    fn simulate(&self) -> Result<SimulatedLoad, LoadError> {
        let simulation = Simulation::load(&self.config.model_path, &self.model)?;
        Ok(SimulatedLoad {
            devices: simulation.memory_bytes(&self.context())?,
            n_layers: simulation.n_layers(),
            context_train_tokens: simulation.context_train_tokens(),
        })
    }

    /// Halves what the user left open: sequences first, then the context. `false` when nothing is left to give.
    fn shrink(&mut self) -> bool {
        let config = self.config;
        let sizes = &mut self.sizes;
        if config.n_cells.is_some() {
            return false;
        }
        if config.n_seq_max.is_none() && sizes.n_seq > 1 {
            sizes.n_seq /= 2;
        } else if config.context_length_tokens.is_none() && sizes.context_tokens > MIN_CONTEXT_TOKENS {
            sizes.context_tokens = (sizes.context_tokens / 2).max(MIN_CONTEXT_TOKENS);
        } else {
            return false;
        }
        sizes.n_cells = sizes.context_tokens.saturating_mul(sizes.n_seq);
        true
    }

    fn plan(self, taken: &SimulatedLoad, device: &DeviceInfo, estimate: &MemoryEstimate, reason: String) -> Plan {
        let config = self.config;
        let context = self.context();
        let memory = taken.devices.iter().map(|bytes| DeviceMemory {
            device: bytes.device.clone(),
            weights_bytes: bytes.weights_bytes,
            kv_bytes: bytes.kv_bytes,
            compute_bytes: bytes.compute_bytes,
            total_bytes: 0,
            free_bytes: 0,
        });
        let placement = Placement {
            device: format!("{:?}", device.kind),
            device_name: device.name.clone(),
            n_gpu_layers: self.model.n_gpu_layers,
            n_layers_total: self.n_layers + 1,
            reason,
            n_threads: self.n_threads,
            n_threads_batch: self.n_threads_batch,
            flash_attention: format!("{:?}", config.flash_attention).to_lowercase(),
            kv_type: format!("{:?}/{:?}", config.kv_type_k, config.kv_type_v).to_lowercase(),
            kv_unified: self.sizes.unified,
            extra_buffers: match (config.use_extra_buffers, minerva_llama::extra_buffers()) {
                (false, _) => "off".to_owned(),
                (true, ExtraBuffers::Usable) => "on".to_owned(),
                (true, _) => "off: the compiler's AMX code would fault on this CPU".to_owned(),
            },
            memory: memory.collect(),
            limit_bytes: estimate.limit_bytes,
        };
        Plan { model: self.model, context, context_length_tokens: self.sizes.context_tokens, placement }
    }
}

/// Sequences and cells before anything had to shrink.
fn first_sizes(config: &EngineConfig, train_tokens: u32) -> Result<Sizes, LoadError> {
    let wish = config.context_length_tokens.unwrap_or_else(|| train_tokens.clamp(1, DEFAULT_MAX_CONTEXT_TOKENS));
    if wish > train_tokens && train_tokens > 0 {
        tracing::warn!("a context of {wish} tokens is more than the {train_tokens} that the model was trained for");
    }
    let Some(n_cells) = config.n_cells else {
        let n_seq = config.n_seq_max.unwrap_or(DEFAULT_N_SEQ);
        let n_cells = wish.checked_mul(n_seq).ok_or_else(|| LoadError::Setting {
            name: "ctx",
            problem: format!("times `parallel` is more cells than a 32-bit count holds: {wish} x {n_seq}"),
        })?;
        return Ok(Sizes { n_seq, context_tokens: wish, n_cells, unified: config.kv_unified });
    };
    let n_seq = config.n_seq_max.unwrap_or_else(|| (n_cells / wish).clamp(1, DEFAULT_N_SEQ));
    if config.context_length_tokens.is_some_and(|context| context > n_cells) {
        let problem = format!("is {wish} tokens, but all sequences share {n_cells} cells (`--ctx-size`)");
        return Err(LoadError::Setting { name: "ctx", problem });
    }
    // Requests that may be longer than an equal share of the cells need one pool.
    let unified = config.kv_unified || (config.context_length_tokens.is_some() && wish.saturating_mul(n_seq) > n_cells);
    let context_tokens =
        if unified { wish.min(n_cells) } else { config.context_length_tokens.unwrap_or(n_cells / n_seq) };
    Ok(Sizes { n_seq, context_tokens, n_cells, unified })
}

fn model_params(config: &EngineConfig) -> ModelParams {
    ModelParams {
        use_extra_buffers: config.use_extra_buffers && minerva_llama::extra_buffers() == ExtraBuffers::Usable,
        use_mmap: config.use_mmap,
        ..ModelParams::default()
    }
}

/// llama.cpp computes attention over a quantized V only with flash attention, and says so by crashing at some versions.
fn check_kv_types(config: &EngineConfig) -> Result<(), LoadError> {
    if config.flash_attention == FlashAttention::Off && kv_type(config.kv_type_v).is_quantized() {
        let problem =
            format!("{:?} needs flash attention; without it use f32, f16 or bf16", config.kv_type_v).to_lowercase();
        return Err(LoadError::Setting { name: "cache-type-v", problem });
    }
    Ok(())
}

fn kv_type(kv_type: KvType) -> minerva_llama::KvType {
    match kv_type {
        KvType::F32 => minerva_llama::KvType::F32,
        KvType::F16 => minerva_llama::KvType::F16,
        KvType::Bf16 => minerva_llama::KvType::Bf16,
        KvType::Q8_0 => minerva_llama::KvType::Q8_0,
        KvType::Q5_1 => minerva_llama::KvType::Q5_1,
        KvType::Q5_0 => minerva_llama::KvType::Q5_0,
        KvType::Q4_1 => minerva_llama::KvType::Q4_1,
        KvType::Q4_0 => minerva_llama::KvType::Q4_0,
        KvType::Iq4Nl => minerva_llama::KvType::Iq4Nl,
    }
}

fn total(bytes: &minerva_llama::DeviceBytes) -> u64 {
    bytes.weights_bytes + bytes.kv_bytes + bytes.compute_bytes
}

/// What a load would take, and the sizes of the model that a plan needs.
struct SimulatedLoad {
    /// Bytes per device, the host last.
    devices: Vec<DeviceBytes>,
    n_layers: u32,
    context_train_tokens: u32,
}

fn host_bytes(taken: &SimulatedLoad) -> u64 {
    taken.devices.last().map_or(0, total)
}

fn weights_bytes(taken: &SimulatedLoad) -> u64 {
    taken.devices.last().map_or(0, |host| host.weights_bytes)
}

/// Bytes on the devices of a plan: every entry but the host, which is the last.
fn device_bytes(taken: &SimulatedLoad) -> u64 {
    taken.devices.iter().rev().skip(1).map(total).sum()
}
