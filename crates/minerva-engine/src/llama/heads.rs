//! The model's own head for multi-token prediction: loaded with the model where the plan has room for it.

use std::sync::Arc;

use minerva_gpu::estimate::{HeadShape, ModelShape};
use minerva_gpu::plan::{DraftLoad, Rung};
use minerva_llama::{Context, ContextKind, ContextParams, DeviceBytes, Model, Simulation};

use super::backend::LlamaBackend;
use super::claims::Claim;
use super::drafts::{self, FittedDraft};
use super::placement::Planned;
use super::{Report, progress, root_cause};
use crate::backend::Loaded;
use crate::config::EngineConfig;
use crate::drafter::followed;
use crate::error::LoadError;
use crate::serving::Speculation;
use crate::status::{DraftInfo, ModelInfo};

/// The head of a model that is to guess with it.
///
/// # Errors
/// [`LoadError::Setting`] when somebody has to guess and there is nobody.
pub(super) fn shape(config: &EngineConfig, model: &ModelShape) -> Result<Option<HeadShape>, LoadError> {
    if config.draft.is_some() || !config.speculation.drafts() {
        return Ok(None);
    }
    let head = HeadShape::of(model);
    if head.is_none() && model.n_head_layers() > 0 {
        tracing::info!(
            "The model's own head is not used: heads of {} files of this kind are not known here",
            model.architecture
        );
    }
    if head.is_none() && config.speculation == Speculation::Draft {
        return Err(LoadError::Setting {
            name: "speculation",
            problem: "is `draft`, and there is nobody to write ahead: the model has no head for multi-token prediction that can be used, and \
                      `--model-draft FILE` names no draft model"
                .to_owned(),
        });
    }
    Ok(head)
}

/// The head of a rung, if it has one.
pub(super) fn of(rung: &Rung) -> Option<&DraftLoad> {
    rung.draft.as_ref().filter(|load| load.is_head)
}

/// What the head's context takes on each device and on the host, by llama.cpp's own figures. Its weights are the model's, and it is
/// claimed with the model.
pub(super) fn fit(simulation: &Simulation, model: &ContextParams) -> Result<FittedDraft, minerva_llama::LoadError> {
    let n_batch = model.n_batch.min(model.n_ubatch).max(model.n_seq_max);
    let context = ContextParams { kind: ContextKind::Head, n_batch, ..model.clone() };
    let simulated = without_weights(simulation.memory_bytes(&context)?);
    Ok(FittedDraft { context, simulated, claim: Claim::nothing() })
}

fn without_weights(bytes: Vec<DeviceBytes>) -> Vec<DeviceBytes> {
    bytes.into_iter().map(|bytes| DeviceBytes { weights_bytes: 0, ..bytes }).collect()
}

/// Makes the head's context, and lets the head follow the model. Where that fails the model goes on alone, and its status says why.
///
/// # Errors
/// [`LoadError::Cancelled`] when `report` says so.
pub(super) fn add(
    config: &EngineConfig,
    planned: &Planned,
    model: &Arc<Model>,
    (load, fitted): (&DraftLoad, FittedDraft),
    (loaded, mut info): (Loaded, ModelInfo),
    report: &mut Report<'_>,
) -> Result<(Loaded, ModelInfo), LoadError> {
    progress(report, "head", 0.96)?;
    let FittedDraft { context, simulated, claim } = fitted;
    let head = Context::new(model, &context).map_err(|error| root_cause(&error)).and_then(|head| {
        let mut head = LlamaBackend::new(head, claim);
        head.warm_up_head().map_err(|error| error.to_string())?;
        Ok(head)
    });
    let head = match head {
        Ok(head) => head,
        Err(problem) => {
            let text = format!("the model's head cannot be used: {problem}");
            tracing::warn!("{text}");
            info.placement.steps_down.push(text);
            return Ok((loaded, info));
        }
    };
    let real = without_weights(head.memory_bytes());
    let simulated: Vec<DeviceBytes> =
        load.device.and_then(|at| simulated.get(at)).into_iter().chain(simulated.last()).cloned().collect();
    let size_bytes = load.estimate.devices.iter().chain([&load.estimate.host]).map(|load| load.weights_bytes).sum();
    tracing::info!("The model's own head writes ahead of it");
    info.draft = Some(DraftInfo {
        name: info.name.clone(),
        description: "the model's own head for multi-token prediction".to_owned(),
        n_params: 0,
        size_bytes,
        n_gpu_layers: load.placement.n_gpu_layers(),
        n_cells: context.n_ctx,
        memory: drafts::memory(planned, load, &simulated, &real),
    });
    let settings = drafts::settings(config, &loaded);
    let (backend, drafter) = followed(loaded.backend, Box::new(head), settings);
    Ok((Loaded { backend: Box::new(backend), drafter: Some(Box::new(drafter)), ..loaded }, info))
}
