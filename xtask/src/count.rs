//! `cargo xtask count`: instructions that a token takes in the sampler, and a turn in the scheduler, against the numbers of the last time.
//!
//! Callgrind counts them, so they depend on the compiler and the code, and on neither the machine's speed nor its mood.

mod valgrind;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use valgrind::valgrind;

use crate::workspace;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What is counted is built without llama.cpp, for this instruction set: valgrind knows no AVX-512.
const TARGET_CPU: &str = "x86-64-v3";

/// A setting fails with this share of its instructions more than the baseline; with another compiler than the baseline's, with that one.
const TOLERANCE: f64 = 0.03;
const TOLERANCE_OTHER_COMPILER: f64 = 0.25;

/// A program that does something N times, `PROGRAM SETTING N`, and without arguments prints its settings.
struct Counted {
    name: &'static str,
    unit: &'static str,
    baseline: &'static str,
    /// The shorter and the longer run; the difference is what counts.
    n: [u64; 2],
}

const COUNTED: [Counted; 2] = [
    Counted { name: "sampler", unit: "a token", baseline: "benches/baselines/sampler-instructions.json", n: [4, 24] },
    Counted {
        name: "scheduler",
        unit: "a turn",
        baseline: "benches/baselines/scheduler-instructions.json",
        n: [2, 22],
    },
];

/// Count anew, or write down.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only `sampler` or `scheduler`
    #[arg(value_parser = ["sampler", "scheduler"])]
    only: Option<String>,
    /// Write the numbers down as what later runs are compared with
    #[arg(long)]
    write_baseline: bool,
}

#[derive(Serialize, Deserialize)]
struct Baseline {
    rustc: String,
    target_cpu: String,
    /// By setting: per token of a row of 128,256 logits, or per turn.
    instructions: BTreeMap<String, u64>,
}

/// What a run can say.
pub(crate) enum Outcome {
    /// So many settings within their tolerance.
    Counted(u64),
    /// This machine cannot count.
    Skipped(String),
}

/// Counts, prints, and compares or writes.
///
/// # Errors
/// When a program cannot be built or run, or a setting takes more instructions than its baseline allows.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    match compare(args.only.as_deref(), args.write_baseline)? {
        Outcome::Counted(_) => Ok(()),
        Outcome::Skipped(reason) => bail!("{reason}"),
    }
}

/// [`run`] for `cargo xtask test`.
///
/// # Errors
/// As [`run`]; a machine that cannot count is none.
pub(crate) fn compare(only: Option<&str>, write_baseline: bool) -> anyhow::Result<Outcome> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Ok(Outcome::Skipped(format!("instructions are counted on {TARGET} only")));
    }
    if !std::arch::is_x86_feature_detected!("avx2") {
        return Ok(Outcome::Skipped(format!("this processor is no {TARGET_CPU}")));
    }
    let Some(valgrind) = valgrind() else {
        return Ok(Outcome::Skipped("valgrind is missing, and `apt-get download valgrind` does not bring it".into()));
    };
    let programs = build()?;
    let (mut n_settings, mut over) = (0, Vec::new());
    for counted in COUNTED.iter().filter(|counted| only.is_none_or(|only| only == counted.name)) {
        let program = programs.join(format!("{}_count", counted.name));
        let names = workspace::capture(&mut workspace::command(&program))?;
        let mut instructions = BTreeMap::new();
        for name in names.lines() {
            let [few, many] = counted.n.map(|n| valgrind.count(&program, name, n));
            instructions.insert(name.to_owned(), (many? - few?) / (counted.n[1] - counted.n[0]));
        }
        let rustc = workspace::capture(Command::new("rustc").arg("--version"))?.trim().to_owned();
        let now = Baseline { rustc, target_cpu: TARGET_CPU.to_owned(), instructions };
        let path = workspace::root().join(counted.baseline);
        if write_baseline {
            std::fs::write(&path, serde_json::to_string_pretty(&now)? + "\n")?;
        }
        let text = std::fs::read_to_string(&path).context(counted.baseline)?;
        n_settings += now.instructions.len() as u64;
        over.extend(report(counted, &now, &serde_json::from_str(&text).context(counted.baseline)?)?);
    }
    if over.is_empty() {
        return Ok(Outcome::Counted(n_settings));
    }
    bail!("more than the baseline allows: {} (`cargo xtask count --write-baseline` if that is meant)", over.join(", "))
}

/// Prints a line per setting; returns those that take too many.
fn report(counted: &Counted, now: &Baseline, baseline: &Baseline) -> anyhow::Result<Vec<String>> {
    let tolerance = if now.rustc == baseline.rustc { TOLERANCE } else { TOLERANCE_OTHER_COMPILER };
    let mut over = Vec::new();
    println!("{:<24} {:>12} {:>12}", format!("{} instructions", counted.name), counted.unit, "baseline");
    for (name, &n) in &now.instructions {
        let before =
            *baseline.instructions.get(name).with_context(|| format!("{} has no `{name}`", counted.baseline))?;
        println!("{name:<24} {n:>12} {before:>12} {:>+6.1} %", 100.0 * (n as f64 / before as f64 - 1.0));
        if n as f64 > before as f64 * (1.0 + tolerance) {
            over.push(format!("{} {name}", counted.name));
        }
    }
    Ok(over)
}

/// Builds both beside everything else, with flags of their own. Returns where they lie.
fn build() -> anyhow::Result<PathBuf> {
    let target = workspace::own_target().join("count");
    workspace::check(
        workspace::cargo()
            .args(["build", "--quiet", "--release", "--package", "minerva-counts", "--target", TARGET, "--target-dir"])
            .arg(&target)
            .env("RUSTFLAGS", format!("-C target-cpu={TARGET_CPU}")),
    )?;
    Ok(target.join(TARGET).join("release"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(rustc: &str, n: u64) -> Baseline {
        let instructions = [("defaults".to_owned(), n)].into();
        Baseline { rustc: rustc.to_owned(), target_cpu: TARGET_CPU.to_owned(), instructions }
    }

    #[test]
    fn more_instructions_than_the_baseline_allows_are_named() {
        let baseline = counts("rustc 1", 1000);
        let over = |now: &Baseline| report(&COUNTED[0], now, &baseline).expect("a setting of the baseline");
        assert!(over(&counts("rustc 1", 1030)).is_empty());
        assert_eq!(over(&counts("rustc 1", 1031)), ["sampler defaults"]);
        assert!(over(&counts("rustc 2", 1200)).is_empty());
        assert_eq!(over(&counts("rustc 2", 1300)), ["sampler defaults"]);
        let unknown = Baseline { instructions: [("other".to_owned(), 1)].into(), ..counts("rustc 1", 1) };
        assert!(report(&COUNTED[0], &unknown, &baseline).is_err());
    }
}
