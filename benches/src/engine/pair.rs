//! Both sides of a comparison from one plan: the engine, and the bare loop with exactly what the engine plans for itself.

use std::ops::ControlFlow;
use std::thread;

use anyhow::{Context as _, bail};
use minerva_engine::{Engine, EngineConfig, KvType};
use minerva_gpu::gguf::GgmlType;
use minerva_gpu::plan::{Plan, Rung};
use minerva_llama::{ContextKind, ContextParams, ExtraBuffers, ModelParams};
use serde::Serialize;

use super::bare::Bare;
use super::{Sample, Workload, through_engine};

/// One configuration of the engine, and what a bare loop needs to do the same.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    config: EngineConfig,
    plan: Plan,
    model: ModelParams,
    context: ContextParams,
    slow_down_percent: f64,
}

/// Something of either side.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Sides<T> {
    pub(crate) bare: T,
    pub(crate) engine: T,
}

impl Pair {
    /// Plans for the configuration. `llama_devices` are llama.cpp's numbers of the planned machine's devices, in its order.
    pub(super) fn new(config: EngineConfig, llama_devices: &[usize]) -> anyhow::Result<Self> {
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
            ..ModelParams::default()
        };
        if model.devices.len() != positions.len() {
            bail!("llama.cpp does not see all of the plan's devices");
        }
        let context = context_params(&config, rung)?;
        Ok(Self { config, plan, model, context, slow_down_percent: 0.0 })
    }

    /// Makes every step of the engine take so much longer.
    #[must_use]
    pub(super) fn slowed_down(mut self, percent: f64) -> Self {
        self.slow_down_percent = percent;
        self
    }

    /// What the engine plans.
    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Whether both sides can be loaded at once and neither has to give anything up.
    pub(super) fn fits_twice(&self) -> bool {
        let estimate = &self.plan.best().estimate;
        let devices = self.plan.devices.iter().zip(&estimate.devices);
        let mut rooms = devices.map(|(device, load)| {
            let room = device.free_bytes.min(device.limit_bytes);
            2 * (load.total_bytes() + device.overhead_bytes) <= room
        });
        rooms.all(|fits| fits) && 2 * estimate.host.total_bytes() <= self.plan.host.free_bytes
    }

    /// A run of each side in this process. Who goes first alternates with `round`, so that a machine that gets faster or
    /// slower favours neither.
    ///
    /// One side at a time, each on threads that end with it: OpenMP keeps a team for every thread that computed, and spins
    /// less once there are more of them than cores, so a side that stays would slow down the other.
    pub(super) fn round(&self, workload: Workload, round: u32) -> anyhow::Result<Sides<Sample>> {
        if round.is_multiple_of(2) {
            let bare = self.bare(workload, round)?;
            Ok(Sides { bare, engine: self.engine(workload, round)? })
        } else {
            let engine = self.engine(workload, round)?;
            Ok(Sides { bare: self.bare(workload, round)?, engine })
        }
    }

    /// A load and a run of the bare loop.
    fn bare(&self, workload: Workload, seed: u32) -> anyhow::Result<Sample> {
        let turn = || -> anyhow::Result<Sample> {
            let mut bare = self.load_bare()?;
            bare.run(workload.warm_up(), !seed)?;
            bare.run(workload, seed)
        };
        let joined = thread::scope(|scope| scope.spawn(turn).join());
        joined.map_err(|_| anyhow::anyhow!("the bare loop panicked"))?.context("the bare loop")
    }

    fn engine(&self, workload: Workload, seed: u32) -> anyhow::Result<Sample> {
        let engine = self.load_engine()?;
        through_engine::run(&engine, workload.warm_up(), !seed)?;
        through_engine::run(&engine, workload, seed)
    }

    pub(super) fn load_bare(&self) -> anyhow::Result<Bare> {
        Bare::load(&self.config.model_path, &self.model, &self.context)
    }

    pub(super) fn load_engine(&self) -> anyhow::Result<Engine> {
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

/// As the engine makes them from its plan.
fn context_params(config: &EngineConfig, rung: &Rung) -> anyhow::Result<ContextParams> {
    let (settings, threads) = (&rung.settings, super::default_threads());
    Ok(ContextParams {
        kind: ContextKind::Model,
        n_ctx: settings.context_tokens,
        n_batch: settings.batch_tokens,
        n_ubatch: settings.ubatch_tokens,
        n_seq_max: settings.n_sequences,
        n_threads: config.n_threads.unwrap_or(threads),
        n_threads_batch: config.n_threads_batch.or(config.n_threads).unwrap_or(threads),
        flash_attention: config.flash_attention.into(),
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
