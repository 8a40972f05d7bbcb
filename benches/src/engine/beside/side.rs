//! Being a side: what runs in a process of its own.

use std::io::{Write as _, stdin, stdout};
use std::time::Instant;

use anyhow::{Context as _, bail};
use minerva_engine::Engine;
use minerva_gpu::estimate::DeviceLoad;

use super::protocol::{Answer, Order, Planned, Side, Task, parse};
use crate::engine::bare::Bare;
use crate::engine::pair::Pair;
use crate::engine::through_engine;

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
