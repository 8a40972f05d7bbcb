//! `minerva plan`: what a model will take on this machine, or on one that does not exist, without loading it.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use minerva_engine::{Engine, EngineConfig, FlashAttention, KvType, LoadError};
use minerva_gpu::estimate::DeviceLoad;
use minerva_gpu::plan::{Plan, PlanMachine, Rung};
use serde_json::{Value, json};

use crate::config::{self, Config, Invocation};
use crate::probing;

/// Says what a model will take, and where: a table per device, the plans below it, the largest context that fits, and tokens
/// per second. Nothing is loaded; only the file's header is read.
///
/// The configuration file and the environment count as they do for the server; flags are stronger.
#[derive(Debug, Parser)]
#[command(name = "minerva plan", version)]
struct Args {
    /// The GGUF file (the first one of a split model) [default: the configured model]
    model: Option<PathBuf>,
    /// A machine that does not exist: `cuda:24GiB,cuda:8GiB@600GB/s,ram:32GiB`
    #[arg(long, value_name = "DEVICES")]
    device: Option<PlanMachine>,
    /// The most tokens of one request
    #[arg(long, value_name = "N")]
    ctx: Option<u32>,
    /// Sequences that are computed at once
    #[arg(long, visible_alias = "np", value_name = "N")]
    parallel: Option<u32>,
    /// KV cells that all sequences share
    #[arg(long, short = 'c', value_name = "N")]
    ctx_size: Option<u32>,
    /// Layers on devices
    #[arg(long, visible_alias = "ngl", value_name = "N")]
    n_gpu_layers: Option<u32>,
    /// The most tokens that a device computes at once
    #[arg(long, visible_alias = "ub", value_name = "N")]
    ubatch_size: Option<u32>,
    /// Element type of the K cache
    #[arg(long, visible_alias = "ctk", value_name = "TYPE", value_parser = kv_type)]
    cache_type_k: Option<KvType>,
    /// Element type of the V cache
    #[arg(long, visible_alias = "ctv", value_name = "TYPE", value_parser = kv_type)]
    cache_type_v: Option<KvType>,
    /// An f16 cache may become q8_0 when memory is short
    #[arg(long)]
    cache_may_quantize: bool,
    /// Flash attention
    #[arg(long, visible_alias = "fa", value_name = "on|off", value_parser = flash_attention)]
    flash_attn: Option<FlashAttention>,
    /// Only what was asked for: a plan on the CPU, or with fewer layers, is no answer
    #[arg(long)]
    no_fallback: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command with the process's arguments; the one at position 1 brought us here.
pub(crate) fn run() -> ExitCode {
    // Long flags with one dash, as llama.cpp's users write them.
    let args = std::env::args_os().enumerate().filter(|(position, _)| *position != 1).map(|(_, arg)| {
        let short = ["-np", "-ngl", "-ub", "-ctk", "-ctv", "-fa"];
        if short.iter().any(|flag| arg == *flag) { format!("-{}", arg.to_string_lossy()).into() } else { arg }
    });
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(text) => {
            let _ = text.print();
            return ExitCode::from(if text.use_stderr() { 2 } else { 0 });
        }
    };
    match plan(&args) {
        Ok(text) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(problem) => {
            let _ = writeln!(std::io::stderr(), "error: {problem:#}");
            if let Some(LoadError::NoFallback { table, .. }) = problem.downcast_ref() {
                let _ = writeln!(std::io::stderr(), "what fits:\n{table}");
            }
            ExitCode::from(2)
        }
    }
}

fn plan(args: &Args) -> anyhow::Result<String> {
    let vars =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let mut config = config::load(&Invocation::default(), vars)?.config;
    if let Some(model) = &args.model {
        config.model.path = Some(model.clone());
    }
    let mut engine = engine_config(&config, args)?;
    let machine = if let Some(machine) = &args.device {
        machine.clone()
    } else {
        engine.probe = probing::config(&config);
        if let Some(probe) = &engine.probe {
            probing::probe(probe);
        }
        Engine::machine(&engine)?
    };
    let plan = Engine::plan(&engine, &machine)?;
    Ok(if args.json { format!("{:#}\n", as_json(&plan)) } else { plan.to_string() })
}

fn engine_config(config: &Config, args: &Args) -> anyhow::Result<EngineConfig> {
    let engine = config.engine()?;
    Ok(EngineConfig {
        context_length_tokens: args.ctx.or(engine.context_length_tokens),
        n_seq_max: args.parallel.or(engine.n_seq_max),
        n_cells: args.ctx_size.or(engine.n_cells),
        n_gpu_layers: args.n_gpu_layers.or(engine.n_gpu_layers),
        n_ubatch: args.ubatch_size.or(engine.n_ubatch),
        kv_type_k: args.cache_type_k.unwrap_or(engine.kv_type_k),
        kv_type_v: args.cache_type_v.unwrap_or(engine.kv_type_v),
        kv_may_quantize: args.cache_may_quantize || engine.kv_may_quantize,
        flash_attention: args.flash_attn.unwrap_or(engine.flash_attention),
        fallback_to_cpu: engine.fallback_to_cpu && !args.no_fallback,
        ..engine
    })
}

fn kv_type(text: &str) -> Result<KvType, String> {
    serde_json::from_value(json!(text))
        .map_err(|_| "not a cache type: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl".into())
}

fn flash_attention(text: &str) -> Result<FlashAttention, String> {
    serde_json::from_value(json!(text)).map_err(|_| "not `on`, `off` or `auto`".into())
}

fn as_json(plan: &Plan) -> Value {
    json!({
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
        "gave_up": rung.gave_up,
    })
}
