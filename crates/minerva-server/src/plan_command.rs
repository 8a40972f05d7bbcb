//! `minerva plan`: what a model will take on this machine, or on one that does not exist, without loading it.
//!
//! Its flags are the server's, so that a server's command line can be tried before it is used; those that say how requests are
//! served decide nothing here.
//!
//! Exit codes: 0 with a plan, 2 without.

use std::io::Write as _;
use std::process::ExitCode;

use minerva_engine::{Engine, EngineConfig, LoadError, ProjectorConfig, TuneMode, TuneReport, TuneSource};
use minerva_gpu::estimate::DeviceLoad;
use minerva_gpu::plan::{Plan, PlanDeviceKind, PlanMachine, Rung};
use serde_json::{Value, json};

use crate::config::Config;
use crate::probing;
use crate::program::{print, refuse};

/// Prints a table per device, the plans below it, the largest context that fits, and tokens per second. Only the file's header is
/// read.
pub(crate) fn run(
    config: &Config,
    made_up: Option<PlanMachine>,
    projector: Option<&ProjectorConfig>,
    json: bool,
) -> ExitCode {
    match plan(config, made_up, projector) {
        Ok((plan, tuning)) if json => print(&format!("{:#}\n", as_json(&plan, &tuning))),
        Ok((plan, tuning)) => print(&format!("{plan}{}", said(&tuning))),
        Err(problem) => {
            let code = refuse(&format_args!("{problem:#}"));
            if let Some(LoadError::NoFallback { table, .. }) = problem.downcast_ref()
                && !table.is_empty()
            {
                let _ = writeln!(std::io::stderr(), "what fits:\n{table}");
            }
            code
        }
    }
}

fn plan(
    config: &Config,
    made_up: Option<PlanMachine>,
    projector: Option<&ProjectorConfig>,
) -> anyhow::Result<(Plan, TuneReport)> {
    let mut engine = config.engine()?;
    let machine = if let Some(machine) = made_up {
        engine.tune.mode = TuneMode::Off; // what was found here says nothing about another machine
        limited(machine, &engine)
    } else {
        if engine.tune.mode == TuneMode::Force {
            engine.tune.mode = TuneMode::Cached; // a plan measures nothing
        }
        this_machine(&mut engine, config)?
    };
    Ok(Engine::plan_and_tuning(&engine, &machine, projector)?)
}

/// A line about settings that an earlier load found.
fn said(tuning: &TuneReport) -> String {
    match tuning.source {
        TuneSource::Cached => format!(
            "\nSettings of the first plan were measured at an earlier load: {} ({:.2} of the defaults' speed; `--tune=off` for the \
            defaults)\n",
            tuning.settings, tuning.gain
        ),
        _ => String::new(),
    }
}

fn this_machine(engine: &mut EngineConfig, config: &Config) -> anyhow::Result<PlanMachine> {
    engine.probe = probing::config(config);
    if let Some(probe) = &engine.probe {
        probing::probe(probe);
    }
    Ok(Engine::machine(engine)?)
}

/// What the configuration says about the memory of any machine. Which devices there are is said by the machine itself.
fn limited(mut machine: PlanMachine, engine: &EngineConfig) -> PlanMachine {
    machine.host.maps_weights = engine.use_mmap;
    if let Some(limit_bytes) = engine.memory_limit_bytes {
        if machine.devices.is_empty() {
            machine.host.limit_bytes = limit_bytes.min(machine.host.total_bytes);
        }
        // What a worker lends is limited where it is named.
        for device in machine.devices.iter_mut().filter(|device| device.kind != PlanDeviceKind::Rpc) {
            device.limit_bytes = limit_bytes.min(device.total_bytes);
        }
    }
    machine
}

fn as_json(plan: &Plan, tuning: &TuneReport) -> Value {
    json!({
        "tuning": tuning,
        "devices": plan.devices,
        "given_positions": plan.given_positions,
        "host": plan.host,
        "largest_context_tokens": plan.largest_context_tokens,
        "rungs": plan.rungs.iter().map(rung_as_json).collect::<Vec<_>>(),
    })
}

fn rung_as_json(rung: &Rung) -> Value {
    let load = |load: &DeviceLoad| {
        let mut value = json!(load);
        value["total_bytes"] = json!(load.total_bytes());
        value
    };
    let settings = &rung.settings;
    json!({
        "n_gpu_layers": rung.placement.n_gpu_layers(),
        "n_layers_total": rung.placement.n_layers_total(),
        "layers_per_device": rung.placement.layers_per_device(),
        "expert_layers_on_host": rung.placement.expert_layers_on_host(),
        "context_tokens": rung.context_tokens,
        "n_sequences": settings.n_sequences,
        "n_cells": settings.context_tokens,
        "ubatch_tokens": settings.ubatch_tokens,
        "batch_tokens": settings.batch_tokens,
        "flash_attention": settings.flash_attention,
        "cache_type_k": settings.cache_type_k.name(),
        "cache_type_v": settings.cache_type_v.name(),
        "kv_unified": settings.kv_unified,
        "full_windows": settings.full_windows,
        "devices": rung.estimate.devices.iter().map(load).collect::<Vec<_>>(),
        "host": load(&rung.estimate.host),
        "speed": rung.speed,
        "draft": rung.draft.as_ref().map(|draft| json!({
            "is_head": draft.is_head,
            "device": draft.device,
            "n_gpu_layers": draft.placement.n_gpu_layers(),
            "n_layers_total": draft.placement.n_layers_total(),
            "n_cells": draft.settings.context_tokens,
            "device_bytes": draft.estimate.devices.first().map(load),
            "host": load(&draft.estimate.host),
        })),
        "projector": rung.projector.as_ref().map(|projector| json!({
            "device": projector.device,
            "is_bound": projector.is_bound,
            "image_max_tokens": projector.settings.image_max_tokens,
            "device_bytes": projector.estimate.devices.first().map(load),
            "host": load(&projector.estimate.host),
        })),
        "gave_up": rung.gave_up,
    })
}
