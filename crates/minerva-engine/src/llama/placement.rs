//! From a plan's rung to llama.cpp's parameters, and to what `/v1/status` says about it.

use std::fmt::Display;
use std::path::Path;

use minerva_gpu::estimate::{HeadShape, LoadSettings, ModelShape, ProjectorShape};
use minerva_gpu::gguf::{GgmlType, Header};
use minerva_gpu::plan::{Companions, Plan, PlanError, PlanMachine, ProjectorWishes, Rung, Wishes, plan_with};
use minerva_llama::{
    Adapter, ContextKind, ContextParams, DeviceBytes, ExtraBuffers, ModelParams, Simulation, VocabSize,
};

use super::machine::{Machine, n_threads};
use super::{drafts, heads};
use crate::config::{AdapterConfig, EngineConfig, FlashAttention, KvType, ProjectorConfig};
use crate::error::LoadError;
use crate::status::{DeviceMemory, Placement};
use crate::tune::TuneReport;

/// A plan and the machine that it was made for.
pub(super) struct Planned {
    pub(super) machine: Machine,
    pub(super) plan: Plan,
    pub(super) model: ModelShape,
    pub(super) draft: Option<ModelShape>,
    head: Option<HeadShape>,
}

/// What plans are made of: the shapes of the model, of its draft model, and of a projector.
pub(super) struct Shapes {
    pub(super) model: ModelShape,
    draft: Option<ModelShape>,
    pub(super) head: Option<HeadShape>,
    projector: Option<(ProjectorShape, ProjectorWishes)>,
}

/// Plans for a machine that was looked at.
pub(super) fn plan(config: &EngineConfig, machine: Machine) -> Result<Planned, LoadError> {
    let (shapes, plan) = plan_for(config, &machine.planned, None)?;
    if let Some(reason) = machine.no_gpu(config) {
        return Err(LoadError::NoFallback { problem: reason.to_owned(), table: plan.to_string() });
    }
    Ok(Planned { machine, plan, model: shapes.model, draft: shapes.draft, head: shapes.head })
}

/// Reads the headers and plans.
pub(super) fn plan_for(
    config: &EngineConfig,
    machine: &PlanMachine,
    projector: Option<&ProjectorConfig>,
) -> Result<(Shapes, Plan), LoadError> {
    let header = Header::open(&config.model_path)?;
    let mut model = ModelShape::of(&header).map_err(LoadError::Estimate)?;
    for adapter in &config.adapters {
        add_adapter(&mut model, adapter)?;
    }
    let draft = drafts::shape(config, &header)?;
    let head = heads::shape(config, &model)?;
    let projector = projector.map(projector_shape).transpose()?;
    let shapes = Shapes { model, draft, head, projector };
    let model = &shapes.model;
    let wishes = config.wishes();
    if let Some(context) = wishes.context_tokens.filter(|&context| context > model.context_train_tokens) {
        let trained = model.context_train_tokens;
        tracing::warn!("a context of {context} tokens is more than the {trained} that the model was trained for");
    }
    let plan = shapes.plan(config, &wishes, machine).map_err(|problem| match problem {
        PlanError::Wish { setting, problem } => LoadError::Setting { name: setting, problem },
        PlanError::OutOfMemory { .. } if !config.fallback_to_cpu => {
            // Nothing else may run; the table says what would.
            let anything = Wishes { cpu_fallback: true, gpu_layers: None, ..wishes.clone() };
            let table = minerva_gpu::plan::plan(model, &anything, machine)
                .map_or_else(|_| String::new(), |plan| plan.to_string());
            LoadError::NoFallback { problem: problem.to_string(), table }
        }
        problem => LoadError::Plan(problem),
    })?;
    Ok((shapes, plan))
}

/// Reads an adapter's header and makes it a part of the model's shape.
fn add_adapter(model: &mut ModelShape, adapter: &AdapterConfig) -> Result<(), LoadError> {
    let wrong = |problem: &dyn Display| LoadError::Setting {
        name: "lora",
        problem: format!("{}: {problem}", adapter.path.display()),
    };
    let header = Header::open(&adapter.path).map_err(|problem| wrong(&problem))?;
    model.add_adapter(&header).map_err(|problem| wrong(&problem))
}

impl Shapes {
    fn plan(&self, config: &EngineConfig, wishes: &Wishes, machine: &PlanMachine) -> Result<Plan, PlanError> {
        let projector = self.projector.as_ref().map(|(shape, asked)| (shape, *asked));
        let drafts = self.draft.as_ref().zip(config.draft.as_ref());
        let draft = match drafts.filter(|_| self.model.can_be_cut()) {
            Some((shape, asked)) => Some((shape, drafts::wishes(asked, config.device, machine)?)),
            None => None,
        };
        let mut plan =
            plan_with(&self.model, wishes, machine, &Companions { draft, head: self.head.as_ref(), projector })?;
        if drafts.is_some() && draft.is_none() {
            let gave_up = "the draft model: what the main model computed along cannot be taken back";
            plan.rungs.iter_mut().for_each(|rung| rung.gave_up.push(gave_up.to_owned()));
        }
        Ok(plan)
    }
}

/// The configuration as a rung has it: without weights in the CPU's own layout if it has no room for them.
pub(super) fn config_of(config: &EngineConfig, rung: &Rung) -> EngineConfig {
    EngineConfig { use_extra_buffers: config.use_extra_buffers && !rung.as_stored, ..config.clone() }
}

/// A load without weights and without the tokenizer, for exact sizes.
pub(super) fn simulate(
    path: &Path,
    params: &ModelParams,
    shape: &ModelShape,
) -> Result<Simulation, minerva_llama::LoadError> {
    let vocab = VocabSize { architecture: &shape.architecture, n_tokens: shape.n_vocab };
    Simulation::load_without_vocabulary(path, params, vocab)
}

/// Reads a projector's header.
fn projector_shape(projector: &ProjectorConfig) -> Result<(ProjectorShape, ProjectorWishes), LoadError> {
    let setting = |problem: String| LoadError::Setting { name: "mmproj", problem };
    let header = Header::open(&projector.path).map_err(|problem| setting(format!("cannot be read: {problem}")))?;
    let shape = ProjectorShape::of(&header).map_err(|problem| setting(format!("is no projector: {problem}")))?;
    Ok((shape, projector.wishes()))
}

impl Planned {
    /// The model, alone and with its head.
    pub(super) fn shapes(&self) -> (&ModelShape, Option<&HeadShape>) {
        (&self.model, self.head.as_ref())
    }

    pub(super) fn model_params(&self, config: &EngineConfig, rung: &Rung) -> ModelParams {
        let n_devices = rung.placement.n_devices();
        ModelParams {
            devices: self.machine.llama_indices(&self.plan.given_positions[..n_devices]),
            n_gpu_layers: rung.placement.n_gpu_layers(),
            layers_per_device: rung.placement.layers_per_device(),
            expert_layers_on_host: rung.placement.expert_layers_on_host(),
            use_extra_buffers: config.use_extra_buffers && minerva_llama::extra_buffers() == ExtraBuffers::Usable,
            use_mmap: config.use_mmap,
            adapters: config.adapters.iter().map(Adapter::from).collect(),
            with_head: heads::of(rung).is_some(),
        }
    }

    pub(super) fn context_params(&self, config: &EngineConfig, rung: &Rung) -> ContextParams {
        let settings = &rung.settings;
        let LoadSettings { context_tokens, n_sequences, batch_tokens, ubatch_tokens, .. } = *settings;
        let n_threads = n_threads(config, &self.machine.gpu.machine().cpu);
        ContextParams {
            kind: if heads::of(rung).is_some() { ContextKind::ModelWithHidden } else { ContextKind::Model },
            n_ctx: context_tokens,
            n_batch: batch_tokens,
            n_ubatch: ubatch_tokens,
            n_seq_max: n_sequences,
            n_threads,
            n_threads_batch: config.n_threads_batch.unwrap_or(n_threads),
            flash_attention: config.flash_attention.into(),
            type_k: kv_type(settings.cache_type_k).into(),
            type_v: kv_type(settings.cache_type_v).into(),
            kv_unified: settings.kv_unified,
            full_windows: settings.full_windows,
        }
    }

    /// What people are told; `simulated` are llama.cpp's own figures for the rung.
    pub(super) fn status(&self, config: &EngineConfig, rung: &Rung, simulated: &[DeviceBytes]) -> Placement {
        let (device, context) = (self.machine.gpu.device(), self.context_params(config, rung));
        let devices = &self.plan.devices[..rung.placement.n_devices()];
        let free = devices.iter().map(|device| (device.total_bytes, device.free_bytes));
        let host = (self.plan.host.total_bytes, self.plan.host.free_bytes);
        let estimated = rung.estimate.devices.iter().chain([&rung.estimate.host]);
        let memory =
            simulated.iter().zip(free.chain([host])).zip(estimated).map(|((bytes, (total, free)), estimate)| {
                DeviceMemory {
                    device: bytes.device.clone(),
                    weights_bytes: bytes.weights_bytes,
                    kv_bytes: bytes.kv_bytes,
                    compute_bytes: bytes.compute_bytes,
                    planned_bytes: estimate.total_bytes(),
                    total_bytes: total,
                    free_bytes: free,
                }
            });
        let on_rpc_only = !devices.is_empty() && self.machine.addresses.iter().all(Option::is_some);
        let kind = if rung.is_cpu() { "Cpu".to_owned() } else { format!("{:?}", device.kind) };
        let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
        Placement {
            device: if on_rpc_only { "Rpc".to_owned() } else { kind },
            device_name: if names.is_empty() { self.machine.gpu.machine().cpu.model.clone() } else { names.join(", ") },
            n_gpu_layers: rung.placement.n_gpu_layers(),
            n_layers_total: rung.placement.n_layers_total(),
            n_expert_layers_on_host: u32::try_from(rung.placement.expert_layers_on_host().len()).unwrap_or(u32::MAX),
            reason: self.reason(rung),
            gave_up: rung.gave_up.clone(),
            steps_down: Vec::new(),
            n_threads: context.n_threads,
            n_threads_batch: context.n_threads_batch,
            flash_attention: format!("{:?}", config.flash_attention).to_lowercase(),
            kv_type: format!("{:?}/{:?}", context.type_k, context.type_v).to_lowercase(),
            kv_unified: context.kv_unified,
            extra_buffers: match (config.use_extra_buffers, minerva_llama::extra_buffers()) {
                (false, _) => "off".to_owned(),
                (true, ExtraBuffers::Usable) => "on".to_owned(),
                (true, _) => "off: the compiler's AMX code would fault on this CPU".to_owned(),
            },
            tuning: TuneReport::default(),
            memory: memory.collect(),
            limit_bytes: self.limit_bytes(rung),
        }
    }

    fn reason(&self, rung: &Rung) -> String {
        let mut reasons = Vec::new();
        if rung.is_cpu() {
            let asked = || "the CPU was asked for".to_owned();
            reasons.push(self.machine.gpu.fallback_reason().map_or_else(asked, str::to_owned));
        } else if rung.gave_up.is_empty() {
            reasons.push("everything fits".to_owned());
        }
        reasons.extend(rung.gave_up.iter().cloned());
        let devices = self.plan.devices.iter().zip(&self.plan.given_positions);
        let addresses = devices.filter_map(|(device, &position)| {
            Some(format!("{} is {}", device.name, self.machine.addresses.get(position)?.as_ref()?))
        });
        reasons.extend(addresses);
        reasons.join("; ")
    }

    fn limit_bytes(&self, rung: &Rung) -> u64 {
        if rung.is_cpu() {
            self.plan.host.limit_bytes
        } else {
            self.plan.devices.iter().map(|device| device.limit_bytes).sum()
        }
    }
}

impl EngineConfig {
    /// What the user fixed, for the planner.
    pub fn wishes(&self) -> Wishes {
        let fixed = |kv_type: KvType| (kv_type != KvType::F16 || !self.kv_may_quantize).then(|| ggml_type(kv_type));
        Wishes {
            gpu_layers: self.n_gpu_layers,
            expert_layers_on_host: self.n_expert_layers_on_host,
            context_tokens: self.context_length_tokens,
            n_cells: self.n_cells,
            n_sequences: self.n_seq_max,
            batch_tokens: self.n_batch,
            ubatch_tokens: self.n_ubatch,
            flash_attention: match self.flash_attention {
                FlashAttention::Auto => None,
                FlashAttention::On => Some(true),
                FlashAttention::Off => Some(false),
            },
            cache_type_k: fixed(self.kv_type_k),
            cache_type_v: fixed(self.kv_type_v),
            may_quantise_cache: self.kv_may_quantize,
            kv_unified: self.kv_unified,
            full_windows: None,
            cpu_fallback: self.fallback_to_cpu,
        }
    }
}

impl From<&AdapterConfig> for Adapter {
    fn from(config: &AdapterConfig) -> Self {
        Self { path: config.path.clone(), scale: config.scale }
    }
}

pub(super) fn ggml_type(kv_type: KvType) -> GgmlType {
    match kv_type {
        KvType::F32 => GgmlType::F32,
        KvType::F16 => GgmlType::F16,
        KvType::Bf16 => GgmlType::BF16,
        KvType::Q8_0 => GgmlType::Q8_0,
        KvType::Q5_1 => GgmlType::Q5_1,
        KvType::Q5_0 => GgmlType::Q5_0,
        KvType::Q4_1 => GgmlType::Q4_1,
        KvType::Q4_0 => GgmlType::Q4_0,
        KvType::Iq4Nl => GgmlType::IQ4_NL,
    }
}

/// The planner chooses only among the types that [`ggml_type`] names.
pub(super) fn kv_type(ggml_type: GgmlType) -> KvType {
    match ggml_type {
        GgmlType::F32 => KvType::F32,
        GgmlType::BF16 => KvType::Bf16,
        GgmlType::Q8_0 => KvType::Q8_0,
        GgmlType::Q5_1 => KvType::Q5_1,
        GgmlType::Q5_0 => KvType::Q5_0,
        GgmlType::Q4_1 => KvType::Q4_1,
        GgmlType::Q4_0 => KvType::Q4_0,
        GgmlType::IQ4_NL => KvType::Iq4Nl,
        _ => KvType::F16,
    }
}
