//! An HTTP load tool for OpenAI-compatible servers: the workloads of benches/README.md, against ours and a peer.
//!
//! Contenders take turns within one run (ours, peer, engine, ours, …), since only ratios of neighbouring rounds mean
//! anything on a machine that others use too. Everything runs on one thread and little of it, because the servers need
//! the cores. Start with [`workload`](workload::Workload) for what is asked and `answer` for what is made of it; `drive` runs
//! a round; `direct` is the engine without a server.

mod answer;
mod args;
mod canary;
mod client;
mod contender;
mod direct;
mod drive;
mod footprint;
mod gate;
mod http;
mod picture;
mod process;
mod prompts;
mod replay;
mod report;
mod schema;
mod sse;
mod workload;

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use serde_json::json;

pub use args::{Args, PeerFa};
pub use gate::Gate;
pub use workload::Workload;

use answer::{Figures, Sample};
use contender::Contender;
use http::HttpClient;
use process::ServerProcess;
use report::Report;
use workload::{Load, Round};

/// Runs everything that `args` ask for; `say` gets a line whenever something is done, and the report last.
/// `false` when a gate does not hold.
///
/// # Errors
/// When a server cannot be started or asked, or a report cannot be written. Failed requests are figures, not errors.
pub fn run(args: &Args, say: fn(&str)) -> anyhow::Result<bool> {
    if args.engine_worker {
        direct::serve_orders(args.engine_config()?)?;
        return Ok(true);
    }
    check(args)?;
    runtime()?.block_on(async {
        // Dropping the comparison stops what it has started.
        tokio::select! {
            result = compare(args, say) => result,
            () = stop_signal() => bail!("stopped by a signal"),
        }
    })
}

/// Ends when somebody asks this process to.
async fn stop_signal() {
    #[cfg(unix)]
    if let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        return;
    }
    let _ = tokio::signal::ctrl_c().await;
}

/// One thread: the load must not compete with the servers.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Refuses what could only fail after minutes of measuring.
fn check(args: &Args) -> anyhow::Result<()> {
    let has_peer = args.peer.is_some() || args.peer_server.is_some();
    for gate in &args.gates() {
        match gate.other() {
            Some("peer") if !has_peer => bail!("gate {gate}: this run has no peer"),
            Some("engine") if !args.engine_beside => bail!("gate {gate}: add --engine-beside"),
            _ => {}
        }
        if !args.workload.contains(&gate.workload) {
            bail!("gate {gate}: the workload is not in this run");
        }
    }
    Ok(())
}

async fn compare(args: &Args, say: fn(&str)) -> anyhow::Result<bool> {
    let seed = args.seed.unwrap_or_else(clock_seed);
    let mut contenders = contenders(args, args.workload[0], first_fa(args)).await?;
    let mut report = Report::default();
    report.heading.push(format!(
        "seed {seed}, {} rounds, scale {}, contenders by turns, started anew for each round where this run starts them; before \
         each round requests of 8 tokens that are not counted",
        args.rounds, args.scale,
    ));
    report.heading.push(
        "POST /v1/chat/completions, streamed, greedy, `ignore_eos`, a connection per request; prompts are words at random, \
         another set for each request and round"
            .to_owned(),
    );
    report.heading.extend(contenders.iter().map(|contender| format!("{}: {}", contender.name, contender.line)));
    report.heading.iter().for_each(|line| say(line));
    report.about = json!({
        "seed": seed,
        "rounds": args.rounds,
        "scale": args.scale,
        "contenders": contenders.iter().map(|c| json!({ "name": c.name, "line": c.line, "about": c.about })).collect::<Vec<_>>(),
    });

    let mut is_first = true;
    for &workload in &args.workload {
        let fa = if args.peer_fa == Some(PeerFa::Best) {
            contenders.clear();
            is_first = false;
            Some(better_fa(args, Round { seed: seed.wrapping_add(1), ..round(args, workload, seed, 0) }, say).await?)
        } else {
            first_fa(args)
        };
        for number in 0..args.rounds {
            // A process keeps its luck with memory pages, several percent of its speed, for as long as it lives. And some workloads
            // need keys.
            if !std::mem::take(&mut is_first) {
                contenders.clear();
                contenders = self::contenders(args, workload, fa).await?;
            }
            let sizes = contenders.iter().find_map(Contender::sizes);
            // A server that is its own peer must not find its own prompts in its cache.
            let is_same = args.peer.is_some() && args.peer == args.url;
            for (turn, contender) in contenders.iter_mut().enumerate() {
                let seed = if is_same { seed.wrapping_add(turn as u64) } else { seed };
                let mut round = round(args, workload, seed, number);
                if let Some((cells, sequences)) = sizes {
                    round.load = Load { cells, sequences, ..round.load };
                }
                let (figures, sample) = run_round(args, contender, round).await?;
                say(&progress(workload, number, contender.name, &figures));
                let series = report.series_mut(workload, contender.name);
                series.figures.push(figures);
                series.samples.push(sample);
            }
        }
    }

    let checked: Vec<_> = args.gates().iter().map(|gate| gate.check(&report)).collect();
    report.gates = checked.iter().map(|(_, line)| line.clone()).collect();
    let markdown = report.markdown();
    say(&format!("\n{}", markdown.trim_end()));
    let write = |path: &std::path::Path, text: &str| {
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    if let Some(path) = &args.markdown {
        write(path, &markdown)?;
    }
    if let Some(path) = &args.chart {
        write(path, &picture::draw(&report.series))?;
    }
    if let Some(path) = &args.json {
        write(path, &serde_json::to_string(&report.json())?)?;
    }
    Ok(checked.iter().all(|(holds, _)| *holds))
}

/// A round before the servers have said how many cells and sequences they have.
fn round(args: &Args, workload: Workload, seed: u64, number: u64) -> Round {
    let load = Load { cells: args.cells.unwrap_or(8192), sequences: args.slots.unwrap_or(8), factor: args.load };
    Round { workload, scale: args.scale, seed, number, load }
}

async fn run_round(args: &Args, contender: &mut Contender, round: Round) -> anyhow::Result<(Figures, Sample)> {
    if let Some(cores) = args.calm {
        crate::machine::wait_until_calm(cores).await;
    }
    let sample = contender.run(round, Duration::from_secs_f64(args.timeout)).await?;
    Ok((Figures::of(&sample, &round.shape()), sample))
}

/// The peer's flash attention where nothing has to be tried; `None` is its own choice.
fn first_fa(args: &Args) -> Option<&'static str> {
    match args.peer_fa {
        Some(PeerFa::On) => Some("on"),
        Some(PeerFa::Off) => Some("off"),
        Some(PeerFa::Best) | None => None,
    }
}

/// The setting with which the peer generates more tokens a second in one round of its own.
async fn better_fa(args: &Args, round: Round, say: fn(&str)) -> anyhow::Result<&'static str> {
    let mut best: Option<(f64, &'static str)> = None;
    for fa in ["on", "off"] {
        let mut peer = contender(args, "peer", round.workload, Some(fa)).await?.context("there is no peer")?;
        let (figures, _) = run_round(args, &mut peer, round).await?;
        let throughput = figures.throughput.unwrap_or(0.0);
        say(&format!("{}: the peer with flash attention {fa}: {throughput:.1} tok/s", round.workload.name()));
        if best.is_none_or(|(most, _)| throughput > most) {
            best = Some((throughput, fa));
        }
    }
    Ok(best.map_or("on", |(_, fa)| fa))
}

/// Starts or finds everybody, in the order of their turns.
async fn contenders(args: &Args, workload: Workload, peer_fa: Option<&str>) -> anyhow::Result<Vec<Contender>> {
    let mut contenders = Vec::new();
    for name in ["ours", "peer"] {
        contenders.extend(contender(args, name, workload, peer_fa).await?);
    }
    if args.engine_beside {
        contenders.push(Contender::engine(&args.engine_config()?)?);
    }
    Ok(contenders)
}

/// Our server or the peer; `None` when there is no peer in this run.
async fn contender(
    args: &Args,
    name: &'static str,
    workload: Workload,
    peer_fa: Option<&str>,
) -> anyhow::Result<Option<Contender>> {
    let is_peer = name == "peer";
    let (url, program, extra, model, pid, keys) = if is_peer {
        (&args.peer, args.peer_server.clone(), &args.peer_arg, &args.peer_model, args.peer_pid, &args.peer_api_key)
    } else {
        (&args.url, Some(args.server_path()?), &args.server_arg, &args.model_name, args.pid, &args.api_key)
    };
    let (mut process, mut api_keys) = (None, keys.clone());
    let url = match (url, program) {
        (Some(url), _) => url.clone(),
        (None, Some(program)) => {
            let mut flags = args.server_flags(extra)?;
            if workload.needs_keys() {
                if api_keys.is_empty() {
                    api_keys = ["key-of-a", "key-of-b"].map(str::to_owned).to_vec();
                }
                flags.extend(["--api-key".into(), api_keys.join(",").into()]);
            }
            flags.extend(peer_fa.filter(|_| is_peer).into_iter().flat_map(|fa| ["-fa".into(), fa.into()]));
            let started = ServerProcess::start(name, &program, &flags)?;
            process.insert(started).url.clone()
        }
        (None, None) => return Ok(None),
    };
    if workload.needs_keys() && api_keys.len() < 2 {
        bail!("{name}: {} needs a server with two keys: name both", workload.name());
    }
    let http = HttpClient { url: url.parse()?, api_keys };
    if let Some(process) = &mut process {
        process.wait_until_ready(&http).await?;
    }
    let pid = pid.or(process.as_ref().map(ServerProcess::pid));
    Ok(Some(Contender::server(name, http, model.clone(), pid, process).await?))
}

/// A line per round, so that a long run shows that it lives.
fn progress(workload: Workload, number: u64, name: &str, figures: &Figures) -> String {
    let shown = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.1}"));
    let others = figures.others_cores.map_or_else(String::new, |cores| format!(", others took {cores:.2} cores"));
    format!(
        "{} round {}, {name}: {} tok/s, TTFT p50 {} ms, gap p99 {} ms, {} errors{others}",
        workload.name(),
        number + 1,
        shown(figures.throughput),
        shown(figures.ttft_p50_ms),
        shown(figures.gap_p99_ms),
        figures.errors,
    )
}

/// Another seed for each run: a server that lives on must not find the prompts of the last run in its cache.
fn clock_seed() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |since| since.as_millis() as u64)
}
