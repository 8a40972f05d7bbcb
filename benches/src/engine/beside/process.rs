//! A side's process, seen from the one that compares.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use std::{io, thread};

use anyhow::{Context as _, bail};

use super::protocol::{Answer, Order, Planned, Task, parse};
use crate::engine::{Sample, Workload};

/// Threads that just computed spin for a few milliseconds before they sleep.
const SETTLE: Duration = Duration::from_millis(10);

/// How long a side may take for each answer. A large model on a slow CPU takes minutes; what takes longer hangs.
const ANSWER_TIME: Duration = Duration::from_mins(20);

/// How a side's process is started.
#[derive(Debug, Clone)]
pub(super) struct Program {
    /// In errors.
    name: &'static str,
    file: PathBuf,
    args: Vec<String>,
    answer_time: Duration,
}

impl Program {
    pub(super) fn new(name: &'static str, file: &Path, order: &Order) -> anyhow::Result<Self> {
        let args = vec!["--side-worker".to_owned(), serde_json::to_string(order)?];
        Ok(Self { name, file: file.to_owned(), args, answer_time: ANSWER_TIME })
    }

    /// What it plans, in a process that ends.
    pub(super) fn plan(&self) -> anyhow::Result<Planned> {
        let (process, plan) = Process::start(self)?;
        process.end()?;
        Ok(plan)
    }
}

/// A side's process. It ends when this is dropped.
pub(super) struct Process {
    name: &'static str,
    child: Child,
    tasks: Option<ChildStdin>,
    /// What it says, from a thread that ends with it: a pipe cannot be read with a time limit.
    answers: Receiver<io::Result<String>>,
    answer_time: Duration,
}

impl Process {
    pub(super) fn start(program: &Program) -> anyhow::Result<(Self, Planned)> {
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

    pub(super) fn load(&mut self) -> anyhow::Result<f64> {
        match self.ask(&Task::Load)? {
            Answer::Loaded { seconds } => Ok(seconds),
            other => bail!("{} was to load and said {other:?}", self.name),
        }
    }

    pub(super) fn run(&mut self, workload: Workload, seed: u32) -> anyhow::Result<Sample> {
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
    pub(super) fn end(mut self) -> anyhow::Result<()> {
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
