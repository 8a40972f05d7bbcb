//! The engine without a server, in a child process of this binary: rounds come in on its standard input, a line of JSON
//! each, and samples go out on its standard output.

use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use minerva_engine::{Engine, EngineConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::answer::Sample;
use super::client::Client;
use super::drive;
use super::workload::Round;

/// One line to the child.
#[derive(Serialize, Deserialize)]
struct Order {
    round: Round,
    timeout_s: f64,
}

/// One line from the child.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Report {
    Ready(Value),
    Sample(Box<Sample>),
    Failed(String),
}

/// The child's side: loads the engine, says so, and answers orders until its input ends.
pub(super) fn serve_orders(config: EngineConfig) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let mut tell = |report: &Report| -> anyhow::Result<()> {
        serde_json::to_writer(&mut out, report)?;
        out.write_all(b"\n")?;
        Ok(out.flush()?)
    };
    let engine = match Engine::load(config, |_| ControlFlow::Continue(())) {
        Ok(engine) => engine,
        Err(error) => return tell(&Report::Failed(format!("{:#}", anyhow!(error)))),
    };
    tell(&Report::Ready(serde_json::to_value((engine.info(), Engine::build_info()))?))?;
    let client = Client::Engine(engine);
    let runtime = super::runtime()?;
    for line in std::io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?)?;
        let timeout = Duration::from_secs_f64(order.timeout_s);
        tell(&match runtime.block_on(drive::run(&client, order.round, timeout)) {
            Ok(sample) => Report::Sample(Box::new(sample)),
            Err(error) => Report::Failed(format!("{error:#}")),
        })?;
    }
    Ok(())
}

/// The parent's side; dropping it ends the child.
pub(super) struct EngineProcess {
    child: Child,
    orders: ChildStdin,
    reports: BufReader<ChildStdout>,
    /// What the engine says about its model and build.
    pub(super) about: Value,
}

impl EngineProcess {
    /// Starts the child and waits until the model is loaded.
    pub(super) fn start(config: &EngineConfig) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--engine-worker").arg("--engine-config").arg(serde_json::to_string(config)?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start the engine's process")?;
        let orders = child.stdin.take().context("no pipe to the engine")?;
        let reports = BufReader::new(child.stdout.take().context("no pipe from the engine")?);
        let mut process = Self { child, orders, reports, about: Value::Null };
        match process.report()? {
            Report::Ready(about) => process.about = about,
            Report::Failed(error) => bail!("the engine cannot load: {error}"),
            Report::Sample(_) => bail!("the engine answers before it is asked"),
        }
        Ok(process)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Blocks until the child has run the round; nothing else runs meanwhile.
    pub(super) fn run(&mut self, round: Round, timeout: Duration) -> anyhow::Result<Sample> {
        serde_json::to_writer(&mut self.orders, &Order { round, timeout_s: timeout.as_secs_f64() })?;
        self.orders.write_all(b"\n")?;
        self.orders.flush()?;
        match self.report()? {
            Report::Sample(sample) => Ok(*sample),
            Report::Failed(error) => bail!("the engine failed: {error}"),
            Report::Ready(_) => bail!("the engine started twice"),
        }
    }

    fn report(&mut self) -> anyhow::Result<Report> {
        let mut line = String::new();
        if self.reports.read_line(&mut line)? == 0 {
            bail!("the engine's process ended ({})", self.child.wait()?);
        }
        serde_json::from_str(&line).context("the engine's process says something odd")
    }
}

impl Drop for EngineProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
