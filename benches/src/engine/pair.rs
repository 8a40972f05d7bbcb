//! Both sides of a comparison, loaded, run and dropped by turns.
//!
//! One side at a time, each on threads that end with it: OpenMP keeps a team for every thread that computed, and spins less
//! once there are more of them than cores, so a side that stays would slow down the other.

use std::ops::ControlFlow;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, bail};
use minerva_engine::{Engine, EngineConfig, FlashAttention, KvType};
use minerva_gpu::gguf::GgmlType;
use minerva_gpu::plan::{Plan, Rung};
use minerva_llama::{ContextParams, ExtraBuffers, ModelParams};
use serde::Serialize;

use super::bare::Bare;
use super::{Sample, Workload, through_engine};
use crate::machine::OthersWatch;

/// The engine with one configuration, and the bare loop with exactly what the engine plans for it.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    config: EngineConfig,
    plan: Plan,
    model: ModelParams,
    context: ContextParams,
    slow_down_percent: f64,
}

/// One side's turn: a load, then the workloads in order.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Turn {
    /// From the start of the load until a step can be computed, in seconds; the first token of it included.
    pub(crate) load_s: f64,
    pub(crate) samples: Vec<Sample>,
}

/// A turn of each side.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Round {
    pub(crate) bare: Turn,
    pub(crate) engine: Turn,
    /// Cores that other programs kept busy meanwhile; `None` where the system does not tell.
    pub(crate) others_cores: Option<f64>,
}

impl Pair {
    /// Plans for the configuration. `llama_devices` are llama.cpp's numbers of the planned machine's devices, in its order.
    pub(crate) fn new(config: EngineConfig, llama_devices: &[usize]) -> anyhow::Result<Self> {
        let machine = Engine::machine(&config)?;
        let plan = Engine::plan(&config, &machine).context("the engine's plan")?;
        let rung = plan.best();
        let positions = &plan.given_positions[..rung.placement.n_devices()];
        let model = ModelParams {
            devices: positions.iter().filter_map(|&position| llama_devices.get(position).copied()).collect(),
            n_gpu_layers: rung.placement.n_gpu_layers(),
            layers_per_device: rung.placement.layers_per_device(),
            expert_layers_on_host: rung.placement.expert_layers_on_host(),
            use_extra_buffers: config.use_extra_buffers && minerva_llama::extra_buffers() == ExtraBuffers::Usable,
            use_mmap: config.use_mmap,
        };
        if model.devices.len() != positions.len() {
            bail!("llama.cpp does not see all of the plan's devices");
        }
        let context = context_params(&config, rung)?;
        Ok(Self { config, plan, model, context, slow_down_percent: 0.0 })
    }

    /// Makes every step of the engine take so much longer.
    #[must_use]
    pub(crate) fn slowed_down(mut self, percent: f64) -> Self {
        self.slow_down_percent = percent;
        self
    }

    /// What the engine plans.
    pub(crate) fn rung(&self) -> &Rung {
        self.plan.best()
    }

    /// A turn of each side. Who goes first alternates with `round`, so that a machine that gets faster or slower favours
    /// neither.
    pub(crate) fn round(&self, workloads: &[Workload], round: u32) -> anyhow::Result<Round> {
        let watch = OthersWatch::start_here();
        let (bare, engine) = if round.is_multiple_of(2) {
            let bare = self.bare(workloads, round)?;
            (bare, self.engine(workloads, round)?)
        } else {
            let engine = self.engine(workloads, round)?;
            (self.bare(workloads, round)?, engine)
        };
        Ok(Round { bare, engine, others_cores: watch.and_then(|watch| watch.cores()) })
    }

    /// A turn of the bare loop.
    pub(crate) fn bare(&self, workloads: &[Workload], round: u32) -> anyhow::Result<Turn> {
        let turn = || -> anyhow::Result<Turn> {
            let began = Instant::now();
            let mut bare = Bare::load(&self.config.model_path, &self.model, &self.context)?;
            let load_s = began.elapsed().as_secs_f64();
            let samples = run_all(workloads, round, |workload, seed| bare.run(workload, seed))?;
            Ok(Turn { load_s, samples })
        };
        let joined = thread::scope(|scope| scope.spawn(turn).join());
        joined.map_err(|_| anyhow::anyhow!("the bare loop panicked"))?.context("the bare loop")
    }

    fn engine(&self, workloads: &[Workload], round: u32) -> anyhow::Result<Turn> {
        let began = Instant::now();
        let engine = self.load_engine()?;
        let load_s = began.elapsed().as_secs_f64();
        let samples = run_all(workloads, round, |workload, seed| through_engine::run(&engine, workload, seed))?;
        Ok(Turn { load_s, samples })
    }

    fn load_engine(&self) -> anyhow::Result<Engine> {
        let config = self.config.clone();
        let engine = if self.slow_down_percent > 0.0 {
            Engine::load_slowed(&config, self.slow_down_percent)
        } else {
            Engine::load(config, |_| ControlFlow::Continue(()))
        };
        let engine = engine.context("the engine's model")?;
        let (planned, real) = (self.model.n_gpu_layers, engine.info().placement.n_gpu_layers);
        if planned != real {
            bail!("the engine stepped down to {real} layers on devices, the plan has {planned}");
        }
        Ok(engine)
    }
}

/// Each workload with prompts of its own, after a short run of it that does not count.
fn run_all(
    workloads: &[Workload],
    round: u32,
    mut run: impl FnMut(Workload, u32) -> anyhow::Result<Sample>,
) -> anyhow::Result<Vec<Sample>> {
    let seeds = (0..).map(|index| (round << 8) | index);
    let measured = workloads.iter().zip(seeds).map(|(&workload, seed)| {
        run(workload.warm_up(), !seed)?;
        run(workload, seed)
    });
    measured.collect()
}

/// As the engine makes them from its plan.
fn context_params(config: &EngineConfig, rung: &Rung) -> anyhow::Result<ContextParams> {
    let (settings, threads) = (&rung.settings, super::default_threads());
    Ok(ContextParams {
        n_ctx: settings.context_tokens,
        n_batch: settings.batch_tokens,
        n_ubatch: settings.ubatch_tokens,
        n_seq_max: settings.n_sequences,
        n_threads: config.n_threads.unwrap_or(threads),
        n_threads_batch: config.n_threads_batch.or(config.n_threads).unwrap_or(threads),
        flash_attention: match config.flash_attention {
            FlashAttention::Auto => minerva_llama::FlashAttention::Auto,
            FlashAttention::On => minerva_llama::FlashAttention::On,
            FlashAttention::Off => minerva_llama::FlashAttention::Off,
        },
        type_k: cache_type(config.kv_type_k, settings.cache_type_k)?,
        type_v: cache_type(config.kv_type_v, settings.cache_type_v)?,
        kv_unified: settings.kv_unified,
        full_windows: settings.full_windows,
    })
}

/// Benchmarks run with the default cache alone.
fn cache_type(wished: KvType, planned: GgmlType) -> anyhow::Result<minerva_llama::KvType> {
    match (wished, planned) {
        (KvType::F16, GgmlType::F16) => Ok(minerva_llama::KvType::F16),
        (_, planned) => bail!("no floor for a cache of {}", planned.name()),
    }
}
