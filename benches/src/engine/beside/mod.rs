//! Both sides in processes of their own, loaded next to each other and run by turns, so that little time lies between two runs
//! that are compared.
//!
//! A machine whose neighbours use its memory decodes 5 % faster or slower a moment later and 14 % a few seconds later, which is
//! what a load in between takes. In one process the sides would share OpenMP, whose threads spin less when there are more of
//! them than cores. Where the plan does not fit twice, each side is loaded when the other is gone.
//! `process` starts and asks them, `side` is what runs in them, `protocol` what goes between.

mod process;
mod protocol;
mod side;

use std::path::Path;
use std::time::{Duration, Instant};

use minerva_engine::EngineConfig;
use serde::Serialize;

use super::pair::Sides;
use super::{Sample, Workload};
use crate::machine::OthersWatch;

use process::{Process, Program};
use protocol::{Order, Side};

pub(crate) use protocol::Planned;
pub(crate) use side::work;

/// The files whose processes the sides are; each calls [`work`] with what follows `--side-worker`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Programs<'a> {
    pub(crate) own: &'a Path,
    /// Another build, whose engine takes the bare loop's place.
    pub(crate) against: Option<&'a Path>,
}

/// Two sides that can be loaded and run, any number of times.
#[derive(Debug, Clone)]
pub(crate) struct Beside {
    sides: Sides<Program>,
    at_once: bool,
    plan: Planned,
}

/// Loads of both sides, and runs by turns.
#[derive(Debug, Serialize)]
pub(crate) struct Round {
    /// From the start of a load until a step can be computed, in seconds; the first token of it included.
    pub(crate) load_s: Sides<f64>,
    /// By workload, then one after the other.
    pub(crate) runs: Vec<Vec<Sides<Sample>>>,
    /// Cores that other programs kept busy meanwhile; `None` where the system does not tell.
    pub(crate) others_cores: Option<f64>,
}

/// How often each workload is run in a round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Runs {
    pub(crate) most: u32,
    /// No second run after so long.
    pub(crate) patience: Duration,
}

impl Beside {
    /// The engine with one configuration, and the bare loop with what the engine plans for it.
    pub(crate) fn new(
        programs: Programs<'_>,
        config: &EngineConfig,
        llama_devices: &[usize],
        slow_down_percent: f64,
    ) -> anyhow::Result<Self> {
        let order = |side, slow_down_percent| {
            let (config, llama_devices) = (config.clone(), llama_devices.to_vec());
            Order { side, config, llama_devices, slow_down_percent }
        };
        let engine = Program::new("the engine", programs.own, &order(Side::Engine, slow_down_percent))?;
        let bare = match programs.against {
            Some(against) => Program::new("the other build's engine", against, &order(Side::Engine, 0.0))?,
            None => Program::new("the bare loop", programs.own, &order(Side::Bare, 0.0))?,
        };
        // Not planned in this process, which would stay on the device.
        let plan = bare.plan()?;
        let at_once = plan.fits_twice && serves_two(config);
        Ok(Self { sides: Sides { bare, engine }, at_once, plan })
    }

    /// The engine with two configurations, and what it plans for each.
    pub(crate) fn of_engines(
        programs: Programs<'_>,
        configs: Sides<&EngineConfig>,
        llama_devices: &[usize],
    ) -> anyhow::Result<(Self, Sides<Planned>)> {
        let program = |name, config: &EngineConfig| {
            let (config, llama_devices) = (config.clone(), llama_devices.to_vec());
            Program::new(
                name,
                programs.own,
                &Order { side: Side::Engine, config, llama_devices, slow_down_percent: 0.0 },
            )
        };
        let sides =
            Sides { bare: program("one engine", configs.bare)?, engine: program("the engine", configs.engine)? };
        let plans = Sides { bare: sides.bare.plan()?, engine: sides.engine.plan()? };
        let at_once = plans.bare.fits_twice && plans.engine.fits_twice && serves_two(configs.engine);
        Ok((Self { sides, at_once, plan: plans.engine }, plans))
    }

    pub(crate) fn plan(&self) -> Planned {
        self.plan
    }

    /// A load and a run of the floor alone.
    pub(crate) fn bare(&self, workload: Workload, seed: u32) -> anyhow::Result<Sample> {
        let (mut bare, _) = Process::start(&self.sides.bare)?;
        bare.load()?;
        bare.run(workload.warm_up(), !seed)?;
        let sample = bare.run(workload, seed)?;
        bare.end()?;
        Ok(sample)
    }

    /// Loads both sides and runs every workload. Who goes first alternates with `round` and from run to run, so that a machine
    /// that gets faster or slower favours neither.
    pub(crate) fn round(&self, workloads: &[Workload], runs: Runs, round: u32) -> anyhow::Result<Round> {
        let watch = OthersWatch::start_with_children();
        let mut done = if self.at_once {
            self.by_turns(workloads, runs, round)?
        } else {
            self.one_after_the_other(workloads, runs, round)?
        };
        done.others_cores = watch.and_then(|watch| watch.cores());
        Ok(done)
    }

    fn by_turns(&self, workloads: &[Workload], runs: Runs, round: u32) -> anyhow::Result<Round> {
        // Both plan before either takes memory.
        let (mut bare, _) = Process::start(&self.sides.bare)?;
        let (mut engine, _) = Process::start(&self.sides.engine)?;
        let load_s = in_turn(round, || bare.load(), || engine.load())?;
        let mut all = Vec::new();
        for (index, &workload) in workloads.iter().enumerate() {
            let began = Instant::now();
            bare.run(workload.warm_up(), !seed(round, index, 0))?;
            engine.run(workload.warm_up(), !seed(round, index, 0))?;
            let mut sides = Vec::new();
            while runs.goes_on(sides.len(), began) {
                let seed = seed(round, index, sides.len());
                let first = round + sides.len() as u32;
                sides.push(in_turn(first, || bare.run(workload, seed), || engine.run(workload, seed))?);
            }
            all.push(sides);
        }
        bare.end()?;
        engine.end()?;
        Ok(Round { load_s, runs: all, others_cores: None })
    }

    fn one_after_the_other(&self, workloads: &[Workload], runs: Runs, round: u32) -> anyhow::Result<Round> {
        let turn = |program: &Program| -> anyhow::Result<(f64, Vec<Vec<Sample>>)> {
            let (mut side, _) = Process::start(program)?;
            let load_s = side.load()?;
            let mut all = Vec::new();
            for (index, &workload) in workloads.iter().enumerate() {
                let began = Instant::now();
                side.run(workload.warm_up(), !seed(round, index, 0))?;
                let mut samples = Vec::new();
                while runs.goes_on(samples.len(), began) {
                    samples.push(side.run(workload, seed(round, index, samples.len()))?);
                }
                all.push(samples);
            }
            side.end()?;
            Ok((load_s, all))
        };
        let Sides { bare, engine } = in_turn(round, || turn(&self.sides.bare), || turn(&self.sides.engine))?;
        let pairs = bare.1.into_iter().zip(engine.1);
        let runs = pairs
            .map(|(bare, engine)| bare.into_iter().zip(engine).map(|(bare, engine)| Sides { bare, engine }).collect());
        Ok(Round { load_s: Sides { bare: bare.0, engine: engine.0 }, runs: runs.collect(), others_cores: None })
    }
}

impl Runs {
    fn goes_on(self, n_done: usize, began: Instant) -> bool {
        n_done == 0 || (n_done < self.most as usize && began.elapsed() < self.patience)
    }
}

/// A worker serves one connection.
fn serves_two(config: &EngineConfig) -> bool {
    config.rpc_servers.is_empty()
}

/// The bare loop goes first when `turn` is even.
fn in_turn<T>(
    turn: u32,
    bare: impl FnOnce() -> anyhow::Result<T>,
    engine: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<Sides<T>> {
    if turn.is_multiple_of(2) {
        let bare = bare()?;
        Ok(Sides { bare, engine: engine()? })
    } else {
        let engine = engine()?;
        Ok(Sides { bare: bare()?, engine })
    }
}

/// Prompts of its own for every run, the same on both sides.
fn seed(round: u32, workload: usize, run: usize) -> u32 {
    (round << 16) | ((run as u32 & 0xff) << 8) | (workload as u32 & 0xff)
}
