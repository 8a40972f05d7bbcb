//! Loading rung by rung: a load that fails although it should fit gives way to the next smaller one, and says so.

use std::borrow::Cow;

use minerva_gpu::estimate::Estimate;
use minerva_gpu::plan::{PlanDeviceKind, PlanError, PlanHost, Rung};
use minerva_llama::{ContextParams, DeviceBytes, Simulation};

use super::claims::{Claim, Owner};
use super::drafts::FittedDraft;
use super::machine::{FreeNow, Machine};
use super::placement::{Planned, config_of};
use super::tuning::{self, Tuning};
use super::{Report, drafts, heads, load_weights, overhead, placement, progress, root_cause, start};
use crate::backend::Loaded;
use crate::config::EngineConfig;
use crate::error::LoadError;
use crate::status::{ModelInfo, Placement};
use crate::tune::{TuneReport, TuneSource, TunedSettings};

/// Plans and loads.
pub(super) fn climb_down(
    config: &EngineConfig,
    machine: Machine,
    report: &mut Report<'_>,
) -> Result<(Loaded, ModelInfo), LoadError> {
    let planned = placement::plan(config, machine)?;
    let mut steps: Vec<String> = Vec::new();
    let mut next = 0;
    loop {
        let rung = &planned.plan.rungs[next];
        let failure = match try_rung(&config_of(config, rung), &planned, rung, report) {
            Ok((loaded, mut info)) => {
                steps.append(&mut info.placement.steps_down);
                info.placement.steps_down = steps;
                return Ok((loaded, info));
            }
            Err(failure) => failure,
        };
        let is_last = next + 1 >= planned.plan.rungs.len();
        // Without its draft model the same load goes on where it is. Without its head the model may be sound.
        let is_cancelled = matches!(failure.error, LoadError::Cancelled);
        let may_go_on = failure.is_out_of_memory || heads::of(rung).is_some() && !is_cancelled;
        let loses_draft_only = rung.draft.is_some() && may_go_on && !is_last;
        let goes_one_down = loses_draft_only || failure.is_out_of_memory;
        let below = if goes_one_down { next + 1 } else { planned.plan.rungs.len() - 1 };
        if !loses_draft_only && (rung.is_cpu() || !failure.may_step_down) {
            return Err(failure.error);
        }
        if (!config.fallback_to_cpu && !loses_draft_only) || is_last {
            return Err(no_fallback(&failure.text, &planned));
        }
        tracing::error!("{}", failure.text);
        let lower = &planned.plan.rungs[below];
        if loses_draft_only {
            tracing::warn!("{} is given up", if heads::of(rung).is_some() { "the head" } else { "the draft model" });
        } else {
            let what = match failure.is_out_of_memory {
                true if failure.is_on_host => "Out of memory",
                true => "GPU OOM",
                false => "Load failed",
            };
            let to = if lower.is_cpu() { "CPU".to_owned() } else { lower.to_string() };
            tracing::warn!("{what}, falling back to {to}");
        }
        steps.push(failure.text);
        next = below;
    }
}

fn no_fallback(problem: &str, planned: &Planned) -> LoadError {
    LoadError::NoFallback { problem: problem.to_owned(), table: planned.plan.to_string() }
}

/// Why a rung did not hold.
struct Failure {
    error: LoadError,
    /// For the log, in the guide's words where memory was short.
    text: String,
    is_out_of_memory: bool,
    /// It was the host's memory.
    is_on_host: bool,
    /// A smaller load may succeed where this one failed.
    may_step_down: bool,
}

/// Settings whose exact size was compared with what is free, and whose room is claimed.
struct Fitted<'a> {
    config: Cow<'a, EngineConfig>,
    rung: Cow<'a, Rung>,
    context: ContextParams,
    simulated: Vec<DeviceBytes>,
    claim: Claim,
    draft: Option<FittedDraft>,
}

/// Asks llama.cpp for the exact figures, compares them with what was free before anything of the rung was loaded, and claims it.
fn fit<'a>(
    config: Cow<'a, EngineConfig>,
    rung: Cow<'a, Rung>,
    planned: &Planned,
    free: &FreeNow,
    (simulation, draft): (&Simulation, Option<&Simulation>),
) -> Result<Fitted<'a>, Box<Failure>> {
    let context = planned.context_params(&config, &rung);
    let simulated =
        simulation.memory_bytes(&context).map_err(|error| Box::new(Failure::of(error.into(), planned, &rung)))?;
    let no_room = |error: LoadError| {
        let text = root_cause(&error);
        let is_on_host = matches!(error, LoadError::Plan(PlanError::OutOfMemory { what: "system", .. }));
        Box::new(Failure { error, text, is_out_of_memory: true, is_on_host, may_step_down: true })
    };
    let head = heads::of(&rung).map(|_| heads::fit(simulation, &context)).transpose();
    let head = head.map_err(|error| Box::new(Failure::of(error.into(), planned, &rung)))?;
    let of_both = (simulated.iter().enumerate())
        .map(|(at, bytes)| total(bytes) + head.as_ref().and_then(|head| head.simulated.get(at)).map_or(0, total));
    let claim = claim(planned, &rung, free, &of_both.collect::<Vec<_>>())
        .map_err(|problem| no_room(LoadError::Plan(problem)))?;
    let draft = match draft.zip(rung.draft.as_ref()) {
        None => head,
        Some((simulation, load)) => {
            Some(drafts::fit(&config, planned, load, simulation, (free, &simulated)).map_err(no_room)?)
        }
    };
    Ok(Fitted { config, rung, context, simulated, claim, draft })
}

/// Loads a rung with the settings that were found for it, or are found now.
fn try_rung(
    config: &EngineConfig,
    planned: &Planned,
    rung: &Rung,
    report: &mut Report<'_>,
) -> Result<(Loaded, ModelInfo), Box<Failure>> {
    let failed = |error: LoadError| Box::new(Failure::of(error, planned, rung));
    let model_params = planned.model_params(config, rung);
    let simulation =
        placement::simulate(&config.model_path, &model_params, &planned.model).map_err(|error| failed(error.into()))?;
    let draft = rung.draft.as_ref().filter(|load| !load.is_head);
    let draft = draft.map(|load| drafts::simulate(config, planned, load)).transpose().map_err(failed)?;
    let simulations = (&simulation, draft.as_ref());
    // Once: where settings are measured, the weights are there before the last of them are compared.
    let free = planned.machine.free_now();
    let by_default = || fit(Cow::Borrowed(config), Cow::Borrowed(rung), planned, &free, simulations);
    let with = |settings: &TunedSettings| {
        let machine = &planned.machine.planned;
        let (config, rung) = tuning::tuned(config, planned.shapes(), machine, rung, settings)?;
        fit(config, rung, planned, &free, simulations).ok()
    };
    let not_now = |settings: &TunedSettings, found: TuneReport| TuneReport {
        source: TuneSource::Defaults,
        reason: Some(tuning::does_not_fit(settings)),
        gain: 1.0,
        ..found
    };
    let (mut fitted, mut found, subject) = match tuning::prepare(config, planned, rung) {
        Tuning::Not(found) => (by_default()?, found, None),
        Tuning::Measure(subject) => (by_default()?, TuneReport::default(), Some(subject)),
        Tuning::Found(settings, found) => match with(&settings) {
            Some(fitted) => (fitted, found, None),
            None => (by_default()?, not_now(&settings, found), None),
        },
    };
    let free_before = planned.machine.gpu.estimate_memory().map(|memory| memory.free_bytes);
    let model = load_weights(config, &model_params, report).map_err(failed)?;
    if let Some(subject) = subject {
        let default = subject.default.clone();
        let subject_of = (&model, &simulation, &fitted.context);
        let (settings, measured) =
            tuning::measure(config, planned, rung, subject_of, subject, report).map_err(failed)?;
        found = measured;
        if settings != default {
            drop(fitted); // its claim, before the other is made
            fitted = if let Some(fitted) = with(&settings) {
                fitted
            } else {
                found = not_now(&settings, found);
                by_default()?
            };
        }
    }
    let Fitted { config, rung, context, simulated, claim, draft } = fitted;
    let status = Placement { tuning: found, ..planned.status(&config, &rung, &simulated) };
    let of_draft = draft.as_ref().map_or(0, |fitted| bytes_on_devices(&fitted.simulated));
    let devices = &planned.plan.devices[..rung.placement.n_devices()];
    let start_with = (claim, !rung.is_cpu() && devices.iter().all(|device| device.kind == PlanDeviceKind::Cuda));
    let mut loaded =
        start(&config, &model, &context, rung.context_tokens, status, start_with, report).map_err(failed)?;
    if let Some((fitted, load)) = draft.zip(rung.draft.as_ref()) {
        if load.is_head {
            loaded = heads::add(&config, planned, &model, (load, fitted), loaded, report).map_err(failed)?;
        } else {
            drafts::add(&config, planned, (load, fitted), &mut loaded, report).map_err(failed)?;
        }
    }
    progress(report, "ready", 1.0).map_err(failed)?;
    if let (Ok(before), Ok(after), false) = (free_before, planned.machine.gpu.estimate_memory(), rung.is_cpu()) {
        let device = planned.machine.gpu.device();
        let tensors = bytes_on_devices(&simulated) + of_draft;
        if device.kind == minerva_gpu::GpuDevice::Cuda && planned.plan.devices.len() == 1 {
            overhead::remember(device, before, after.free_bytes, tensors);
        }
    }
    Ok(loaded)
}

fn bytes_on_devices(simulated: &[DeviceBytes]) -> u64 {
    simulated.iter().filter(|bytes| bytes.device != "Host").map(total).sum()
}

/// Claims what llama.cpp says that the load takes on each device and on the host, or has the guide's error when one of them had less
/// room.
fn claim(planned: &Planned, rung: &Rung, free: &FreeNow, needed_bytes: &[u64]) -> Result<Claim, PlanError> {
    let positions = &planned.plan.given_positions[..rung.placement.n_devices()];
    let owners: Vec<Owner> = planned.machine.llama_indices(positions).into_iter().map(Owner::Device).collect();
    // The host comes last.
    let on_host = needed_bytes.last().copied().unwrap_or(0);
    let parts = owners.iter().copied().chain([Owner::Host]).zip(needed_bytes.iter().copied()).collect();
    Claim::unless(parts, |claimed| {
        let devices = planned.plan.devices.iter().zip(positions).zip(&owners);
        let mut devices = devices.zip(needed_bytes);
        let on_devices = devices.find_map(|(((device, &position), &owner), &needed)| {
            let room = planned.machine.room(position, free, claimed(owner));
            (needed > room).then(|| out_of_memory(device.limit_bytes, device.limit_bytes.saturating_sub(room), needed))
        });
        on_devices.or_else(|| host_problem(&planned.plan.host, rung, free.host, on_host))
    })
}

/// Whether the host had too little for what has to be allocated there of `needed_bytes`.
fn host_problem(host: &PlanHost, rung: &Rung, free_bytes: u64, needed_bytes: u64) -> Option<PlanError> {
    // The head's weights are loaded with the model's.
    let estimates = [Some(&rung.estimate), heads::of(rung).map(|head| &head.estimate)];
    let mapped = |estimate: &Estimate| {
        estimate.host.total_bytes().saturating_sub(estimate.host_allocated_bytes(host.maps_weights))
    };
    let allocated = estimates.into_iter().flatten().map(mapped).fold(needed_bytes, u64::saturating_sub);
    (allocated > free_bytes).then(|| PlanError::OutOfMemory {
        what: "system",
        used_bytes: host.total_bytes.saturating_sub(free_bytes),
        needed_bytes: allocated,
        limit_bytes: host.total_bytes,
    })
}

pub(super) fn out_of_memory(limit_bytes: u64, used_bytes: u64, needed_bytes: u64) -> PlanError {
    PlanError::OutOfMemory { what: "GPU", used_bytes, needed_bytes, limit_bytes }
}

pub(super) fn total(bytes: &DeviceBytes) -> u64 {
    bytes.weights_bytes + bytes.kv_bytes + bytes.compute_bytes
}

impl Failure {
    fn of(error: LoadError, planned: &Planned, rung: &Rung) -> Self {
        let cause = root_cause(&error);
        // llama.cpp has no code for it: all of its allocation errors say so in words.
        let is_out_of_memory = ["alloc", "out of memory"].iter().any(|word| cause.to_lowercase().contains(word));
        let may_step_down = matches!(error, LoadError::Llama(_) | LoadError::WarmUp(_)) && !rung.is_cpu();
        let text = if is_out_of_memory && !rung.is_cpu() {
            // The device said that it had the room: only the attempt shows that it has not.
            let needed: u64 = rung.estimate.devices.iter().map(minerva_gpu::estimate::DeviceLoad::total_bytes).sum();
            let used: u64 =
                planned.plan.devices.iter().map(|device| device.total_bytes.saturating_sub(device.free_bytes)).sum();
            let (used, needed) = (minerva_gpu::format_bytes(used), minerva_gpu::format_bytes(needed));
            format!("Out of memory: GPU memory exceeded: {used} + {needed} > what could be allocated ({cause})")
        } else {
            format!("the load failed: {cause}")
        };
        Self { error, text, is_out_of_memory, is_on_host: false, may_step_down }
    }
}
