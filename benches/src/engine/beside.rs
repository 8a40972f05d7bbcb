//! Both sides in processes of their own, loaded next to each other and run by turns, so that little time lies between two runs
//! that are compared.
//!
//! A machine whose neighbours use its memory decodes 5 % faster or slower a moment later and 14 % a few seconds later, which is
//! what a load in between takes. In one process the sides would share OpenMP, whose threads spin less when there are more of
//! them than cores. Where the plan does not fit twice, each side is loaded when the other is gone.

use std::io::{BufRead as _, BufReader, Write as _, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use minerva_engine::{Engine, EngineConfig};
use minerva_gpu::estimate::DeviceLoad;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::bare::Bare;
use super::pair::{Pair, Sides};
use super::{Sample, Workload, through_engine};
use crate::machine::OthersWatch;

/// Threads that just computed spin for a few milliseconds before they sleep.
const SETTLE: Duration = Duration::from_millis(10);

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
    programs: Sides<PathBuf>,
    orders: Sides<String>,
    at_once: bool,
    plan: Planned,
}

/// What the engine plans.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Planned {
    pub(crate) n_gpu_layers: u32,
    /// The largest context of one sequence that fits with all else as planned.
    pub(crate) largest_context_tokens: u32,
    /// Layers on a device whose experts are not.
    pub(crate) n_expert_layers_on_host: u32,
    /// On all devices together.
    pub(crate) device_bytes: u64,
    pub(crate) host_cache_bytes: u64,
    /// Predicted for one sequence.
    pub(crate) tokens_per_second: f64,
    /// Whether both sides fit next to each other.
    fits_twice: bool,
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

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Side {
    Bare,
    Engine,
}

/// What a side's process is started with.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    side: Side,
    config: EngineConfig,
    llama_devices: Vec<usize>,
    slow_down_percent: f64,
}

/// What it is told later, a line each.
#[derive(Debug, Serialize, Deserialize)]
enum Task {
    Load,
    Run { workload: Workload, seed: u32 },
}

/// What it says, a line each, or the text of an error.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Planned(Planned),
    Loaded { seconds: f64 },
    Ran(Sample),
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
        let floor = if programs.against.is_some() { Side::Engine } else { Side::Bare };
        let orders = Sides { bare: order(floor, 0.0), engine: order(Side::Engine, slow_down_percent) };
        Ok(Self::of_orders(programs, orders)?.0)
    }

    /// The engine with two configurations, and what it plans for each.
    pub(crate) fn of_engines(
        programs: Programs<'_>,
        configs: Sides<&EngineConfig>,
        llama_devices: &[usize],
    ) -> anyhow::Result<(Self, Sides<Planned>)> {
        let order = |config: &EngineConfig| {
            let (config, llama_devices) = (config.clone(), llama_devices.to_vec());
            Order { side: Side::Engine, config, llama_devices, slow_down_percent: 0.0 }
        };
        let orders = Sides { bare: order(configs.bare), engine: order(configs.engine) };
        let (beside, plan) = Self::of_orders(programs, orders)?;
        let (process, other) = Process::start(&beside.programs.engine, &beside.orders.engine)?;
        process.end()?;
        Ok((Self { at_once: beside.at_once && other.fits_twice, ..beside }, Sides { bare: plan, engine: other }))
    }

    /// Plans for the first side.
    fn of_orders(programs: Programs<'_>, orders: Sides<Order>) -> anyhow::Result<(Self, Planned)> {
        let Sides { bare, engine } = orders;
        // A worker serves one connection.
        let serves_two = engine.config.rpc_servers.is_empty();
        let orders = Sides { bare: serde_json::to_string(&bare)?, engine: serde_json::to_string(&engine)? };
        let programs =
            Sides { bare: programs.against.unwrap_or(programs.own).to_owned(), engine: programs.own.to_owned() };
        // Not planned in this process, which would stay on the device.
        let (process, plan) = Process::start(&programs.bare, &orders.bare)?;
        process.end()?;
        Ok((Self { programs, orders, at_once: plan.fits_twice && serves_two, plan }, plan))
    }

    pub(crate) fn plan(&self) -> Planned {
        self.plan
    }

    /// A load and a run of the floor alone.
    pub(crate) fn bare(&self, workload: Workload, seed: u32) -> anyhow::Result<Sample> {
        let (mut bare, _) = Process::start(&self.programs.bare, &self.orders.bare)?;
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
        let (mut bare, _) = Process::start(&self.programs.bare, &self.orders.bare)?;
        let (mut engine, _) = Process::start(&self.programs.engine, &self.orders.engine)?;
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
        let turn = |program: &Path, order: &str| -> anyhow::Result<(f64, Vec<Vec<Sample>>)> {
            let (mut side, _) = Process::start(program, order)?;
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
        let Sides { bare, engine } = in_turn(
            round,
            || turn(&self.programs.bare, &self.orders.bare),
            || turn(&self.programs.engine, &self.orders.engine),
        )?;
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

/// A side's process. It ends when this is dropped.
struct Process {
    child: Child,
    tasks: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Process {
    fn start(program: &Path, order: &str) -> anyhow::Result<(Self, Planned)> {
        let mut command = Command::new(program);
        command.args(["--side-worker", order]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        let tasks = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("no pipe")?);
        let mut process = Self { child, tasks, answers };
        match process.answer()? {
            Answer::Planned(plan) => Ok((process, plan)),
            other => bail!("a side began with {other:?}"),
        }
    }

    fn load(&mut self) -> anyhow::Result<f64> {
        match self.ask(&Task::Load)? {
            Answer::Loaded { seconds } => Ok(seconds),
            other => bail!("a side was to load and said {other:?}"),
        }
    }

    fn run(&mut self, workload: Workload, seed: u32) -> anyhow::Result<Sample> {
        thread::sleep(SETTLE);
        match self.ask(&Task::Run { workload, seed })? {
            Answer::Ran(sample) => Ok(sample),
            other => bail!("a side was to run and said {other:?}"),
        }
    }

    fn ask(&mut self, task: &Task) -> anyhow::Result<Answer> {
        let tasks = self.tasks.as_mut().context("the side has ended")?;
        writeln!(tasks, "{}", serde_json::to_string(task)?).context("a side's process is gone")?;
        self.answer()
    }

    fn answer(&mut self) -> anyhow::Result<Answer> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("a side's process ended ({})", self.child.wait()?);
        }
        let answer: Result<Answer, String> = parse(&line)?;
        answer.map_err(|error| anyhow::anyhow!(error))
    }

    /// Waits until its memory is free again.
    fn end(mut self) -> anyhow::Result<()> {
        drop(self.tasks.take());
        let status = self.child.wait()?;
        anyhow::ensure!(status.success(), "a side's process ended badly ({status})");
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // After an error it may still compute. Where it has ended, neither does anything.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn parse<T: DeserializeOwned>(line: &str) -> anyhow::Result<T> {
    serde_json::from_str(line).with_context(|| format!("not a line between two sides: {line}"))
}

/// A loaded side.
enum Loaded {
    Bare(Box<Bare>),
    Engine(Engine),
}

/// Be a side: do what the lines on stdin say until there are no more.
///
/// # Errors
/// When a pipe breaks or a line makes no sense. All else is said in answers.
pub(crate) fn work(order: &str) -> anyhow::Result<()> {
    let order: Order = serde_json::from_str(order).context("`--side-worker`")?;
    let side = order.side;
    let pair = match plan(order) {
        Ok(pair) => pair,
        Err(error) => return say(&Err(format!("{error:#}"))),
    };
    say(&Ok(Answer::Planned(pair.planned())))?;
    let mut loaded = None;
    for line in stdin().lines() {
        let answer = obey(&pair, side, parse(&line?)?, &mut loaded);
        say(&answer.map_err(|error| format!("{side:?}: {error:#}")))?;
    }
    Ok(())
}

fn plan(order: Order) -> anyhow::Result<Pair> {
    let mut llama_devices = order.llama_devices;
    if !order.config.rpc_servers.is_empty() {
        // Numbers of this process, not of the one that ordered.
        let servers = order.config.rpc_servers.iter().map(minerva_llama::add_rpc_server);
        llama_devices = servers.collect::<Result<Vec<_>, _>>()?.concat();
    }
    Ok(Pair::new(order.config, &llama_devices)?.slowed_down(order.slow_down_percent))
}

impl Pair {
    fn planned(&self) -> Planned {
        let best = self.plan().best();
        Planned {
            n_gpu_layers: best.placement.n_gpu_layers(),
            largest_context_tokens: self.plan().largest_context_tokens,
            n_expert_layers_on_host: best.placement.expert_layers_on_host().len() as u32,
            device_bytes: best.estimate.devices.iter().map(DeviceLoad::total_bytes).sum(),
            host_cache_bytes: best.estimate.host.cache_bytes,
            tokens_per_second: best.speed.decode_tokens_per_second,
            fits_twice: self.fits_twice(),
        }
    }
}

fn obey(pair: &Pair, side: Side, task: Task, loaded: &mut Option<Loaded>) -> anyhow::Result<Answer> {
    match (task, loaded) {
        (Task::Load, loaded) => {
            let began = Instant::now();
            *loaded = Some(match side {
                Side::Bare => Loaded::Bare(Box::new(pair.load_bare()?)),
                Side::Engine => Loaded::Engine(pair.load_engine()?),
            });
            Ok(Answer::Loaded { seconds: began.elapsed().as_secs_f64() })
        }
        (Task::Run { workload, seed }, Some(Loaded::Bare(bare))) => Ok(Answer::Ran(bare.run(workload, seed)?)),
        (Task::Run { workload, seed }, Some(Loaded::Engine(engine))) => {
            Ok(Answer::Ran(through_engine::run(engine, workload, seed)?))
        }
        (Task::Run { .. }, None) => bail!("nothing is loaded"),
    }
}

fn say(answer: &Result<Answer, String>) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{}", serde_json::to_string(answer)?)?;
    Ok(out.flush()?)
}
