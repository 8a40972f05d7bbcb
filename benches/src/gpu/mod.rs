//! The guide's benchmarks: what a GPU brings, what a load takes, and how layers, batch and context change the speed, with the
//! floor (a bare `llama_decode` loop) beside each figure.
//!
//! Needs no cargo and no source tree: the program `bench_gpu` runs wherever a bundle does. Only ratios within one run mean
//! anything, so that is what a `baseline` holds. Start with [`run`]; `place` is where a model runs, `speed` and `sweeps`
//! measure, `memory` does so in a process of its own, `report` writes.

mod args;
mod baseline;
mod calibrate;
mod experts;
mod measured;
mod memory;
mod place;
mod report;
mod speed;
mod sweeps;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

pub use args::Args;
pub use report::Report;

use args::Part;
use baseline::Baseline;
use place::Place;
use sweeps::Sweeper;

use crate::engine::{Programs, be_a_side};

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Measured; with `--gate`, nothing is worse than the baseline.
    Good,
    /// A ratio is worse than the baseline's by more than its tolerance, or something leaks.
    Worse,
    /// There is no GPU although one was required.
    NoGpu,
}

/// Runs everything that `args` ask for; `say` gets a line whenever something is done, and the report last.
///
/// # Errors
/// When a model does not load, a step fails, or a file cannot be read or written.
pub fn run(args: &Args, say: fn(&str)) -> anyhow::Result<Outcome> {
    if let Some(order) = &args.side_worker {
        be_a_side(order)?;
        return Ok(Outcome::Good);
    }
    if let Some(order) = &args.memory_worker {
        memory::work(order)?;
        return Ok(Outcome::Good);
    }
    if let (true, Err(reason)) = (args.require_gpu, Place::gpu()) {
        say(&format!("no GPU: {reason}"));
        return Ok(Outcome::NoGpu);
    }
    let program = std::env::current_exe().context("this program's own file")?;
    let (mut report, baseline) = prepare(args, say)?;
    measure(&mut report, args, &program, baseline.as_ref(), say)?;

    let measured = report.measured();
    let mut outcome = Outcome::Good;
    if let Some(baseline) = &baseline {
        let (holds, lines) = baseline.compare(&report.model, &measured);
        report.comparison = lines;
        if !holds {
            outcome = Outcome::Worse;
        }
    }
    let leaks = report.leaks();
    if !leaks.is_empty() {
        report.comparison.extend(leaks.iter().map(|line| format!("FAILS: {line}")));
        outcome = Outcome::Worse;
    }
    say(&format!("\n{}", report.markdown().trim_end()));
    report.write(&args.out)?;
    if args.write_baseline {
        let path = baseline_path(args, report.device());
        let mut baseline = baseline.unwrap_or_default();
        baseline.update(&report.device().name, &report.model, &measured)?;
        baseline.write(&path)?;
        say(&format!("\nwrote {}", path.display()));
    }
    Ok(if args.gate { outcome } else { Outcome::Good })
}

/// Measures without judging, for tests: `program` is the file of `bench_gpu`.
///
/// # Errors
/// As [`run`].
pub fn report(args: &Args, program: &Path, say: fn(&str)) -> anyhow::Result<Report> {
    let (mut report, _) = prepare(args, say)?;
    measure(&mut report, args, program, None, say)?;
    Ok(report)
}

/// The places, and the baseline of the one that the run is named after.
fn prepare(args: &Args, say: fn(&str)) -> anyhow::Result<(Report, Option<Baseline>)> {
    let model = args.model_path(say)?;
    let mut places = vec![Place::cpu()];
    let mut not_measured = Vec::new();
    match (&args.rpc, Place::gpu()) {
        (Some(address), _) => {
            places.push(Place::rpc_worker(address));
            not_measured.push("any GPU: the device of this run is a worker process on a CPU".to_owned());
        }
        (None, Ok(gpu)) => places.push(gpu),
        (None, Err(reason)) => not_measured.push(format!(
            "everything that needs a GPU ({reason}): GPU against CPU, layers on the device, the device's memory"
        )),
    }
    let mut report = Report::new(args::model_name(&model), places, args);
    report.not_measured = not_measured;
    let path = baseline_path(args, report.device());
    // Its ratios are those to the bare loop.
    let baseline = if args.against.is_some() { None } else { Baseline::read(&path)? };
    if args.gate && baseline.is_none() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        bail!("nothing to compare with: there is no {name}; make it with --write-baseline");
    }
    for place in &report.places {
        say(&format!("{}: {}", place.kind.title(), place.name));
    }
    report.not_measured.iter().for_each(|what| say(&format!("not measured: {what}")));
    Ok((report, baseline))
}

fn measure(
    report: &mut Report,
    args: &Args,
    program: &Path,
    baseline: Option<&Baseline>,
    say: fn(&str),
) -> anyhow::Result<()> {
    let model = args.model_path(say)?;
    let places = report.places.clone();
    let programs = Programs { own: program, against: args.against.as_deref() };
    if args.has(Part::Speed) {
        let judge_by = baseline.filter(|_| args.gate).map(|baseline| (baseline, report.model.as_str()));
        report.speed = Some(speed::measure(&model, &places, args, programs, judge_by, say)?);
    }
    let sweeper = Sweeper { model: &model, args, programs, say };
    if let (true, [cpu, device]) = (args.has(Part::Layers), places.as_slice()) {
        report.sweeps.push(sweeper.layers(cpu, device)?);
    }
    if let (true, [_, device]) = (args.has(Part::Experts) && experts::has_experts(&model)?, places.as_slice()) {
        report.experts = Some(experts::measure(&model, device, args, programs, say)?);
    }
    for place in &places {
        if args.has(Part::Batch) {
            report.sweeps.push(sweeper.batch(place)?);
        }
        if args.has(Part::Context) {
            report.sweeps.push(sweeper.context(place)?);
        }
        // A worker's memory is not this process's.
        if args.has(Part::Memory) && place.kind != place::Kind::RpcWorker {
            report.memory.push(memory::measure(&model, place, args, program)?);
        }
    }
    Ok(())
}

/// Relative to the folder that the program was started in: `cargo xtask` starts it in the repository's root.
fn baseline_path(args: &Args, device: &Place) -> PathBuf {
    args.baseline.clone().unwrap_or_else(|| Path::new("benches/baselines").join(place::slug(&device.name) + ".json"))
}
