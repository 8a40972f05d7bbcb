//! Loading through llama.cpp: where the model goes, the load itself, and what to say about it afterwards.

mod backend;
mod claims;
mod drafts;
mod heads;
mod ladder;
mod machine;
mod overhead;
mod parts;
mod placement;
mod speeds;
mod tokenizer;
mod tuning;
#[cfg(test)]
mod uncut;

use std::ops::ControlFlow;
use std::sync::Arc;

use minerva_gpu::BuildBackends;
use minerva_gpu::plan::{Plan, PlanMachine};
use minerva_llama::{Context, ContextParams, Model, ModelParams};

use self::backend::LlamaBackend;
use self::claims::Claim;
use self::machine::Machine;
use self::tokenizer::LlamaTokenizer;
use crate::backend::Loaded;
use crate::config::{EngineConfig, ProjectorConfig};
use crate::error::LoadError;
use crate::status::{AdapterInfo, BuildInfo, DeviceMemory, LoadProgress, ModelInfo, Placement};
use crate::tune::TuneReport;

type Report<'a> = dyn FnMut(&LoadProgress) -> ControlFlow<()> + Send + 'a;

/// Plans, loads, warms up. A load that fails gives way to a smaller one where the configuration allows it.
pub(crate) fn load(config: &EngineConfig, report: &mut Report<'_>) -> Result<(Loaded, ModelInfo), LoadError> {
    progress(report, "plan", 0.0)?;
    let machine = probed(config)?;
    ladder::climb_down(config, machine, report)
}

/// What this process may use: what the probe left, where the configuration wants one.
fn probed(config: &EngineConfig) -> Result<Machine, LoadError> {
    if let Some(probe) = &config.probe {
        crate::probe::probe(probe).check()?;
    }
    Machine::of(config, build_backends())
}

/// Plans a load without doing it, with the settings that an earlier load found, if one did.
pub(crate) fn plan(
    config: &EngineConfig,
    machine: &PlanMachine,
    projector: Option<&ProjectorConfig>,
) -> Result<(Plan, TuneReport), LoadError> {
    let (shapes, plan) = placement::plan_for(config, machine, projector)?;
    let config = placement::config_of(config, plan.best());
    Ok(tuning::planned(&config, (&shapes.model, shapes.head.as_ref()), machine, plan))
}

/// This machine, for a plan that people read: its speed is measured even where it decides nothing.
pub(crate) fn machine(config: &EngineConfig) -> Result<PlanMachine, LoadError> {
    let mut machine = probed(config)?;
    if let Some(reason) = machine.no_gpu(config) {
        return Err(LoadError::NoFallback { problem: reason.to_owned(), table: String::new() });
    }
    machine.measure_host(config);
    Ok(machine.planned)
}

/// Loads the weights of one rung of a plan.
fn load_weights(config: &EngineConfig, params: &ModelParams, report: &mut Report<'_>) -> Result<Arc<Model>, LoadError> {
    tracing::debug!("Loading model with gpu_layers={}", params.n_gpu_layers);
    let weights = &mut |fraction: f32| match progress(report, "weights", 0.05 + 0.8 * fraction) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    let model = Model::load(&config.model_path, params, weights).map_err(|error| match error {
        minerva_llama::LoadError::Cancelled => LoadError::Cancelled,
        error => LoadError::Llama(error),
    })?;
    if !model.is_generative() {
        return Err(LoadError::NotGenerative { name: config.model_name() });
    }
    Ok(model)
}

/// Makes the context over loaded weights and computes a first token, or a first full batch.
fn start(
    config: &EngineConfig,
    model: &Arc<Model>,
    context_params: &ContextParams,
    context_tokens: u32,
    placement: Placement,
    (claim, warms_fully): (Claim, bool),
    report: &mut Report<'_>,
) -> Result<(Loaded, ModelInfo), LoadError> {
    progress(report, "context", 0.93)?;
    let tokenizer = LlamaTokenizer::new(model, config.chat_template.as_deref())?;
    let context = Context::new(model, context_params)?;
    let has_chat_template = tokenizer.has_chat_template();
    let context_length_tokens = context_tokens.min(context.n_ctx_seq());
    let mut backend = LlamaBackend::new(context, claim);
    progress(report, "warm-up", 0.95)?;
    backend.warm_up();
    if warms_fully {
        backend.warm_up_fully().map_err(LoadError::WarmUp)?;
    }
    let info = ModelInfo {
        name: config.model_name(),
        description: model.description(),
        n_params: model.n_params(),
        size_bytes: model.size_bytes(),
        n_layers: model.n_layers(),
        n_vocab: model.n_vocab() as u32,
        context_train_tokens: model.context_train_tokens(),
        context_length_tokens,
        n_seq_max: context_params.n_seq_max,
        n_cells: context_params.n_ctx,
        has_chat_template,
        draft: None,
        adapters: config.adapters.iter().map(AdapterInfo::from).collect(),
        placement: Placement { memory: measured(&placement.memory, &backend), ..placement },
    };
    Ok((Loaded { backend: Box::new(backend), tokenizer: Arc::new(tokenizer), drafter: None }, info))
}

/// The plan's bytes replaced by those that the context really has.
fn measured(planned: &[DeviceMemory], backend: &LlamaBackend) -> Vec<DeviceMemory> {
    let real = backend.memory_bytes();
    let mut memory = planned.to_vec();
    for device in &mut memory {
        if let Some(real) = real.iter().find(|real| real.device == device.device) {
            device.weights_bytes = real.weights_bytes;
            device.kv_bytes = real.kv_bytes;
            device.compute_bytes = real.compute_bytes;
        }
    }
    memory
}

fn progress(report: &mut Report<'_>, stage: &str, fraction: f32) -> Result<(), LoadError> {
    match report(&LoadProgress { stage: stage.to_owned(), fraction }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(LoadError::Cancelled),
    }
}

pub(crate) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// The GPU backends that this build of llama.cpp has, whether or not it finds a device for them.
pub(crate) fn build_backends() -> BuildBackends {
    BuildBackends {
        cuda: minerva_llama::has_backend(c"CUDA"),
        metal: minerva_llama::has_backend(c"MTL"),
        vulkan: minerva_llama::has_backend(c"Vulkan"),
    }
}

/// What this build is.
pub(crate) fn build_info() -> BuildInfo {
    let build = build_backends();
    let backends = [("cuda", build.cuda), ("metal", build.metal), ("vulkan", build.vulkan), ("cpu", true)];
    BuildInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        llama_cpp: minerva_llama::version(),
        backends: backends.iter().filter(|(_, there)| *there).map(|(name, _)| (*name).to_owned()).collect(),
        cpu_features: minerva_llama::cpu_features(),
        compiler: format!("{} (AMX code {})", minerva_llama::compiler(), minerva_llama::amx_state()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::KvType;

    #[test]
    fn a_plan_is_what_the_load_then_takes() {
        const MIB: u64 = 1 << 20;
        let model =
            std::env::var_os("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model");
        for (kv_type, n_seq_max, kv_unified, use_mmap) in
            [(KvType::F16, 4, false, true), (KvType::Q8_0, 1, false, false), (KvType::F16, 3, true, true)]
        {
            let config = EngineConfig {
                device: minerva_gpu::DeviceChoice::Cpu,
                context_length_tokens: Some(1024),
                n_seq_max: Some(n_seq_max),
                n_threads: Some(1),
                kv_type_k: kv_type,
                kv_type_v: kv_type,
                kv_unified,
                use_mmap,
                ..EngineConfig::new(std::path::PathBuf::from(&model))
            };
            let (loaded, info) = load(&config, &mut |_| ControlFlow::Continue(())).expect("it loads");
            let limits = loaded.backend.limits();
            assert_eq!((limits.n_seq_max, limits.unified), (n_seq_max, kv_unified));
            assert_eq!(limits.n_cells, info.n_cells);
            assert_eq!(limits.n_ubatch, 512, "not the batch, which is {}", limits.n_batch);
            for device in &info.placement.memory {
                let real = device.weights_bytes + device.kv_bytes + device.compute_bytes;
                // Mapped weights are counted from the first to the last tensor in the file.
                let slack = if use_mmap { 2 * MIB } else { MIB };
                assert!(device.planned_bytes.abs_diff(real) <= slack, "{device:?} ({kv_type:?})");
            }
        }
    }
}
