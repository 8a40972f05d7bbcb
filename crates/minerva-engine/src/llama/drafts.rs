//! The draft model: whether it fits the main one, where it goes, and its load.
//!
//! A draft model that cannot be loaded is done without; one of another vocabulary is a mistake that the user hears of.

use std::ops::ControlFlow;

use minerva_gpu::DeviceChoice;
use minerva_gpu::estimate::ModelShape;
use minerva_gpu::gguf::Header;
use minerva_gpu::plan::{DraftLoad, DraftPlace, DraftWishes, PlanDeviceKind, PlanError, PlanMachine};
use minerva_llama::{Context, ContextKind, ContextParams, DeviceBytes, ExtraBuffers, Model, ModelParams, Simulation};

use super::backend::LlamaBackend;
use super::claims::{Claim, Owner};
use super::ladder::{out_of_memory, total};
use super::machine::{FreeNow, n_threads};
use super::placement::{self, Planned, kv_type};
use super::{Report, progress, root_cause};
use crate::backend::Loaded;
use crate::config::{DraftConfig, EngineConfig};
use crate::drafter::{DraftSettings, ModelDrafter};
use crate::error::LoadError;
use crate::status::{DeviceMemory, DraftInfo, ModelInfo};

/// The configuration's draft model, if it is to be used.
fn asked(config: &EngineConfig) -> Option<&DraftConfig> {
    config.draft.as_ref().filter(|_| config.speculation.drafts())
}

fn setting(problem: String) -> LoadError {
    LoadError::Setting { name: "model-draft", problem }
}

/// Reads the draft model's header and compares its vocabulary with the main model's.
pub(super) fn shape(config: &EngineConfig, main: &Header) -> Result<Option<ModelShape>, LoadError> {
    let Some(draft) = asked(config) else { return Ok(None) };
    let header = Header::open(&draft.model_path).map_err(|problem| setting(format!("cannot be read: {problem}")))?;
    main.check_same_vocabulary(&header)
        .map_err(|difference| setting(format!("has another vocabulary than the model: {difference}")))?;
    let shape = ModelShape::of(&header).map_err(LoadError::Estimate)?;
    if !shape.causal || !shape.can_be_cut() {
        return Err(setting(format!(
            "is of the kind `{}`, whose memory cannot be cut where a guess was wrong",
            shape.architecture
        )));
    }
    Ok(Some(shape))
}

/// What is fixed about the draft model, for the planner.
pub(super) fn wishes(
    draft: &DraftConfig,
    main_device: DeviceChoice,
    machine: &PlanMachine,
) -> Result<DraftWishes, PlanError> {
    let of_kind = |kind: PlanDeviceKind| {
        let positions = machine.devices.iter().enumerate().filter(move |(_, device)| device.kind == kind);
        positions.map(|(position, _)| position).collect::<Vec<_>>()
    };
    let nth = |kind: PlanDeviceKind, n: usize| {
        let found = of_kind(kind).get(n).copied();
        found.map(DraftPlace::Device).ok_or_else(|| PlanError::Wish {
            setting: "device-draft",
            problem: format!("is `{}`: it has to be one of the main model's devices, or `cpu`", draft.device),
        })
    };
    let place = match (draft.device, main_device) {
        (DeviceChoice::Auto, _) => DraftPlace::Beside,
        (DeviceChoice::Cpu, _) => DraftPlace::Host,
        (DeviceChoice::Metal, _) => nth(PlanDeviceKind::Metal, 0)?,
        (DeviceChoice::Cuda(None), _) => nth(PlanDeviceKind::Cuda, 0)?,
        // A main model with one device by number knows no other.
        (DeviceChoice::Cuda(Some(n)), DeviceChoice::Cuda(Some(main))) if n == main => nth(PlanDeviceKind::Cuda, 0)?,
        (DeviceChoice::Cuda(Some(_)), DeviceChoice::Cuda(Some(_))) => nth(PlanDeviceKind::Cuda, usize::MAX)?,
        (DeviceChoice::Cuda(Some(n)), _) => nth(PlanDeviceKind::Cuda, n as usize)?,
    };
    Ok(DraftWishes { place, gpu_layers: draft.n_gpu_layers, n_cells: draft.n_cells })
}

fn model_params(config: &EngineConfig, planned: &Planned, load: &DraftLoad) -> ModelParams {
    let positions: Vec<usize> = load.device.iter().map(|&at| planned.plan.given_positions[at]).collect();
    ModelParams {
        devices: planned.machine.llama_indices(&positions),
        n_gpu_layers: load.placement.n_gpu_layers(),
        layers_per_device: Vec::new(),
        expert_layers_on_host: Vec::new(),
        use_extra_buffers: config.use_extra_buffers && minerva_llama::extra_buffers() == ExtraBuffers::Usable,
        use_mmap: config.use_mmap,
        adapters: Vec::new(),
        with_head: false,
    }
}

/// Its threads are the main model's: they never compute at once, and with OpenMP they are the same ones.
fn context_params(config: &EngineConfig, planned: &Planned, load: &DraftLoad) -> ContextParams {
    let settings = &load.settings;
    let n_threads = n_threads(config, &planned.machine.gpu.machine().cpu);
    ContextParams {
        kind: ContextKind::Model,
        n_ctx: settings.context_tokens,
        n_batch: settings.batch_tokens,
        n_ubatch: settings.ubatch_tokens,
        n_seq_max: settings.n_sequences,
        n_threads,
        n_threads_batch: config.n_threads_batch.unwrap_or(n_threads),
        flash_attention: config.flash_attention.into(),
        type_k: kv_type(settings.cache_type_k).into(),
        type_v: kv_type(settings.cache_type_v).into(),
        kv_unified: settings.kv_unified,
        full_windows: settings.full_windows,
    }
}

/// A draft model or a head whose exact size was compared with what is free, and whose room is claimed.
pub(super) struct FittedDraft {
    pub(super) context: ContextParams,
    pub(super) simulated: Vec<DeviceBytes>,
    pub(super) claim: Claim,
}

/// A load without weights, for exact sizes.
pub(super) fn simulate(config: &EngineConfig, planned: &Planned, load: &DraftLoad) -> Result<Simulation, LoadError> {
    let draft = config.draft.as_ref().zip(planned.draft.as_ref());
    let (draft, shape) = draft.ok_or_else(|| setting("is missing".to_owned()))?;
    placement::simulate(&draft.model_path, &model_params(config, planned, load), shape)
        .map_err(|error| setting(format!("cannot be loaded: {}", root_cause(&error))))
}

/// Compares what llama.cpp says that the draft model takes with what is free beside the main one, and claims it.
///
/// # Errors
/// Why there is no room for it.
pub(super) fn fit(
    config: &EngineConfig,
    planned: &Planned,
    load: &DraftLoad,
    simulation: &Simulation,
    (free, main): (&FreeNow, &[DeviceBytes]),
) -> Result<FittedDraft, LoadError> {
    let context = context_params(config, planned, load);
    let simulated = simulation
        .memory_bytes(&context)
        .map_err(|error| setting(format!("has no context here: {}", root_cause(&error))))?;
    let position = load.device.map(|at| planned.plan.given_positions[at]);
    let owner = position.and_then(|position| planned.machine.llama_indices(&[position]).first().copied());
    let owners = owner.map(Owner::Device).into_iter().chain([Owner::Host]);
    let parts: Vec<_> = owners.zip(simulated.iter().map(total)).collect();
    let needed = parts.first().map_or(0, |(_, bytes)| *bytes);
    let claim = Claim::unless(parts, |claimed| {
        let (at, position, owner) = (load.device?, position?, Owner::Device(owner?));
        let of_main = main.get(at).map_or(0, total);
        let room = planned.machine.room(position, free, claimed(owner).saturating_sub(of_main));
        let limit = planned.plan.devices[at].limit_bytes;
        let all = needed.saturating_add(of_main);
        (all > room).then(|| out_of_memory(limit, limit.saturating_sub(room), all))
    });
    Ok(FittedDraft { context, simulated, claim: claim.map_err(LoadError::Plan)? })
}

/// Loads the draft model beside the main one. Where that fails the main one goes on alone, and its status says why.
///
/// # Errors
/// [`LoadError::Cancelled`] when `report` says so.
pub(super) fn add(
    config: &EngineConfig,
    planned: &Planned,
    (load, fitted): (&DraftLoad, FittedDraft),
    (loaded, info): &mut (Loaded, ModelInfo),
    report: &mut Report<'_>,
) -> Result<(), LoadError> {
    progress(report, "draft model", 0.96)?;
    let Some(draft) = config.draft.as_ref() else { return Ok(()) };
    match open(config, draft, planned, (load, fitted), loaded, report) {
        Ok((drafter, about)) => {
            tracing::info!("Draft model: {} ({})", about.name, about.description);
            loaded.drafter = Some(Box::new(drafter));
            info.draft = Some(about);
        }
        Err(LoadError::Cancelled) => return Err(LoadError::Cancelled),
        Err(error) => {
            let text = format!("the draft model could not be loaded: {}", root_cause(&error));
            tracing::warn!("{text}");
            info.placement.steps_down.push(text);
        }
    }
    Ok(())
}

fn open(
    config: &EngineConfig,
    draft: &DraftConfig,
    planned: &Planned,
    (load, fitted): (&DraftLoad, FittedDraft),
    loaded: &Loaded,
    report: &mut Report<'_>,
) -> Result<(ModelDrafter, DraftInfo), LoadError> {
    let FittedDraft { context, simulated, claim } = fitted;
    let weights = &mut |fraction: f32| match progress(report, "draft model", 0.96 + 0.03 * fraction) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    let model = Model::load(&draft.model_path, &model_params(config, planned, load), weights).map_err(|error| {
        if matches!(error, minerva_llama::LoadError::Cancelled) { LoadError::Cancelled } else { error.into() }
    })?;
    let mut backend = LlamaBackend::new(Context::new(&model, &context)?, claim);
    backend.warm_up();
    let info = DraftInfo {
        name: EngineConfig::new(&draft.model_path).model_name(),
        description: model.description(),
        n_params: model.n_params(),
        size_bytes: model.size_bytes(),
        n_gpu_layers: load.placement.n_gpu_layers(),
        n_cells: context.n_ctx,
        memory: memory(planned, load, &simulated, &backend.memory_bytes()),
    };
    Ok((ModelDrafter::new(Box::new(backend), settings(config, loaded)), info))
}

/// How guesses are made.
pub(super) fn settings(config: &EngineConfig, loaded: &Loaded) -> DraftSettings {
    DraftSettings {
        min_probability: config.drafting.min_probability,
        min_tokens: config.drafting.min_tokens,
        n_vocab: loaded.backend.limits().n_vocab,
        ends: loaded.tokenizer.end_of_generation().to_vec(),
    }
}

/// The plan's bytes beside those that the context really has.
pub(super) fn memory(
    planned: &Planned,
    load: &DraftLoad,
    simulated: &[DeviceBytes],
    real: &[DeviceBytes],
) -> Vec<DeviceMemory> {
    let device = load.device.map(|at| &planned.plan.devices[at]).map(|device| (device.total_bytes, device.free_bytes));
    let places = device.into_iter().chain([(planned.plan.host.total_bytes, planned.plan.host.free_bytes)]);
    let estimates = load.estimate.devices.iter().chain([&load.estimate.host]);
    let memory = simulated.iter().zip(places).zip(estimates).map(|((bytes, (total_bytes, free_bytes)), estimate)| {
        let bytes = real.iter().find(|real| real.device == bytes.device).unwrap_or(bytes);
        DeviceMemory {
            device: bytes.device.clone(),
            weights_bytes: bytes.weights_bytes,
            kv_bytes: bytes.kv_bytes,
            compute_bytes: bytes.compute_bytes,
            planned_bytes: estimate.total_bytes(),
            total_bytes,
            free_bytes,
        }
    });
    memory.collect()
}
