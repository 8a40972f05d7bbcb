//! Both sides in processes of their own, loaded next to each other and run by turns, so that little time lies between two runs
//! that are compared.
//!
//! A machine whose neighbours use its memory decodes 5 % faster or slower a moment later and 14 % a few seconds later, which is
//! what a load in between takes. In one process the sides would share OpenMP, whose threads spin less when there are more of
//! them than cores. Where the plan does not fit twice, each side is loaded when the other is gone.

use std::io::{BufRead as _, BufReader, Write as _, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use std::{io, thread};

use anyhow::{Context as _, bail};
use minerva_engine::{Engine, EngineConfig};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::bare::Bare;
use super::pair::{Pair, Sides};
use super::{Sample, Workload, through_engine};
use crate::machine::OthersWatch;

/// Threads that just computed spin for a few milliseconds before they sleep.
const SETTLE: Duration = Duration::from_millis(10);

/// How long a side may take for each answer. A large model on a slow CPU takes minutes; what takes longer hangs.
const ANSWER_TIME: Duration = Duration::from_mins(20);

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

/// How a side's process is started.
#[derive(Debug, Clone)]
struct Program {
    /// In errors.
    name: &'static str,
    file: PathBuf,
    args: Vec<String>,
    answer_time: Duration,
}

/// What the engine plans.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Planned {
    pub(crate) n_gpu_layers: u32,
    /// The largest context of one sequence that fits with all else as planned.
    pub(crate) largest_context_tokens: u32,
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
        let program = |name, side, slow_down_percent, file: &Path| -> anyhow::Result<_> {
            let (config, llama_devices) = (config.clone(), llama_devices.to_vec());
            let order = serde_json::to_string(&Order { side, config, llama_devices, slow_down_percent })?;
            let args = vec!["--side-worker".to_owned(), order];
            Ok(Program { name, file: file.to_owned(), args, answer_time: ANSWER_TIME })
        };
        let engine = program("the engine", Side::Engine, slow_down_percent, programs.own)?;
        let bare = match programs.against {
            Some(against) => program("the other build's engine", Side::Engine, 0.0, against)?,
            None => program("the bare loop", Side::Bare, 0.0, programs.own)?,
        };
        // Not planned in this process, which would stay on the device.
        let (process, plan) = Process::start(&bare)?;
        process.end()?;
        // A worker serves one connection.
        let at_once = plan.fits_twice && config.rpc_servers.is_empty();
        Ok(Self { sides: Sides { bare, engine }, at_once, plan })
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
    name: &'static str,
    child: Child,
    tasks: Option<ChildStdin>,
    /// What it says, from a thread that ends with it: a pipe cannot be read with a time limit.
    answers: Receiver<io::Result<String>>,
    answer_time: Duration,
}

impl Process {
    fn start(program: &Program) -> anyhow::Result<(Self, Planned)> {
        let mut process = Self::spawn(program)?;
        match process.answer("its plan")? {
            Answer::Planned(plan) => Ok((process, plan)),
            other => bail!("{} began with {other:?}", process.name),
        }
    }

    fn spawn(program: &Program) -> anyhow::Result<Self> {
        let &Program { name, ref file, ref args, answer_time } = program;
        let mut command = Command::new(file);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {}", file.display()))?;
        let tasks = child.stdin.take();
        let lines = BufReader::new(child.stdout.take().context("no pipe")?).lines();
        let (said, answers) = mpsc::channel();
        thread::spawn(move || lines.into_iter().try_for_each(|line| said.send(line)));
        Ok(Self { name, child, tasks, answers, answer_time })
    }

    fn load(&mut self) -> anyhow::Result<f64> {
        match self.ask(&Task::Load)? {
            Answer::Loaded { seconds } => Ok(seconds),
            other => bail!("{} was to load and said {other:?}", self.name),
        }
    }

    fn run(&mut self, workload: Workload, seed: u32) -> anyhow::Result<Sample> {
        thread::sleep(SETTLE);
        match self.ask(&Task::Run { workload, seed })? {
            Answer::Ran(sample) => Ok(sample),
            other => bail!("{} was to run and said {other:?}", self.name),
        }
    }

    fn ask(&mut self, task: &Task) -> anyhow::Result<Answer> {
        let tasks = self.tasks.as_mut().with_context(|| format!("{} has ended", self.name))?;
        writeln!(tasks, "{}", serde_json::to_string(task)?).with_context(|| format!("{} is gone", self.name))?;
        self.answer(&format!("{task:?}"))
    }

    fn answer(&mut self, asked_for: &str) -> anyhow::Result<Answer> {
        let line = match self.answers.recv_timeout(self.answer_time) {
            Ok(line) => line?,
            Err(RecvTimeoutError::Timeout) => return self.give_up(asked_for),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.wait()?;
                bail!("{}'s process ended ({status})", self.name)
            }
        };
        let answer: Result<Answer, String> = parse(&line)?;
        answer.map_err(|error| anyhow::anyhow!(error))
    }

    /// Waits until its memory is free again.
    fn end(mut self) -> anyhow::Result<()> {
        drop(self.tasks.take());
        let status = self.wait()?;
        anyhow::ensure!(status.success(), "{}'s process ended badly ({status})", self.name);
        Ok(())
    }

    fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        let began = Instant::now();
        while began.elapsed() < self.answer_time {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.give_up("its end")
    }

    fn give_up<T>(&mut self, asked_for: &str) -> anyhow::Result<T> {
        self.child.kill()?;
        bail!("{} was asked for {asked_for}, did not answer for {:?} and was killed", self.name, self.answer_time)
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
        Planned {
            n_gpu_layers: self.plan().best().placement.n_gpu_layers(),
            largest_context_tokens: self.plan().largest_context_tokens,
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

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    /// A program that takes no task and says nothing, and ends well after a minute.
    fn sleeper() -> anyhow::Result<Process> {
        let (args, answer_time) = (vec!["60".to_owned()], Duration::from_millis(50));
        Process::spawn(&Program { name: "the engine", file: "sleep".into(), args, answer_time })
    }

    #[test]
    fn a_side_that_never_answers_is_killed_and_the_error_says_which_what_and_how_long() {
        let mut process = sleeper().unwrap();
        let problem = process.ask(&Task::Load).unwrap_err().to_string();
        assert_eq!(problem, "the engine was asked for Load, did not answer for 50ms and was killed");
        assert!(!process.child.wait().unwrap().success());
    }

    #[test]
    fn so_is_one_that_does_not_end() {
        let problem = sleeper().unwrap().end().unwrap_err().to_string();
        assert_eq!(problem, "the engine was asked for its end, did not answer for 50ms and was killed");
    }

    #[test]
    fn one_that_ends_unasked_is_an_error_at_once() {
        let program =
            Program { name: "the engine", file: "false".into(), args: Vec::new(), answer_time: Duration::from_mins(1) };
        let problem = Process::start(&program).err().unwrap().to_string();
        assert_eq!(problem, "the engine's process ended (exit status: 1)");
    }
}
