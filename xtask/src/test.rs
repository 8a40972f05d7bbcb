//! `cargo xtask test`: everything that CI runs, in order, ending with a line that counts the tests.
//!
//! A step is a function from [`Ready`] to a [`Tally`]. Checks such as fmt and clippy pass or fail and count no tests. All
//! cargo steps use the release profile, so llama.cpp is built once.

mod amx;
mod clients;
mod examples;
pub(crate) mod limit;
mod tally;

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::setup::{self, Ready};
use crate::{count, layers, workspace};
use tally::Tally;

/// Which steps to run, and when to stop.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only this step, may be given several times
    #[arg(long, value_name = "STEP")]
    only: Vec<String>,
    /// Go on after a step has failed
    #[arg(long)]
    keep_going: bool,
    /// Print the names of the steps and stop
    #[arg(long)]
    list: bool,
}

/// One step: its name for `--only`, what it proves, and how.
struct Step {
    name: &'static str,
    proves: &'static str,
    run: fn(&Ready) -> anyhow::Result<Tally>,
}

/// In the order of a run: what fails fastest comes first.
const STEPS: &[Step] = &[
    Step { name: "fmt", proves: "the code is formatted", run: fmt },
    Step { name: "layers", proves: "dependencies point down", run: layers },
    Step { name: "amx", proves: "the AMX cure for gcc reaches the compiler and works", run: amx::run },
    Step { name: "clippy", proves: "no warning", run: clippy },
    Step { name: "generated", proves: "generated files are up to date", run: generated },
    Step { name: "tests", proves: "unit and integration tests, on the real model too", run: tests },
    Step { name: "doctests", proves: "examples in the documentation", run: doctests },
    Step { name: "doc", proves: "the documentation builds without a warning", run: doc },
    Step { name: "counts", proves: "sampler and scheduler take no more instructions than they did", run: counts },
    Step { name: "examples", proves: "every program under examples/ runs", run: examples::run },
    Step { name: "clients", proves: "the official openai client against the server", run: clients::run },
];

/// Files that a command of ours generates: (file, binary of minerva-server, its arguments). The step `generated` runs
/// each command and compares.
const GENERATED: &[(&str, &str, &[&str])] = &[("docs/configuration.md", "minerva", &["config", "--markdown"])];

/// How a step went.
struct Report {
    name: &'static str,
    failed: bool,
    took: Duration,
    tally: Tally,
}

/// Runs the steps and prints the summary; its last line is `N passed, 0 failed`, with `, N skipped` if any were.
///
/// # Errors
/// When a step failed, or `--only` names none.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.list {
        for step in STEPS {
            println!("{:<10} {}", step.name, step.proves);
        }
        return Ok(());
    }
    if let Some(unknown) = args.only.iter().find(|only| STEPS.iter().all(|step| step.name != **only)) {
        bail!("no step is called `{unknown}`: `cargo xtask test --list` names them");
    }
    let ready = setup::prepare(&setup::Args::default())?;

    let mut reports = Vec::new();
    for step in STEPS.iter().filter(|step| args.only.is_empty() || args.only.iter().any(|o| o == step.name)) {
        let report = run_step(step, &ready);
        let stop = report.failed && !args.keep_going;
        reports.push(report);
        if stop {
            break;
        }
    }
    let (summary, failed) = summarize(&reports);
    println!("\n{summary}");
    if failed {
        std::process::exit(1); // the closing line stays the last one
    }
    Ok(())
}

/// Runs one step and prints how it went.
fn run_step(step: &Step, ready: &Ready) -> Report {
    println!("\n== {}: {}", step.name, step.proves);
    let start = Instant::now();
    let result = (step.run)(ready);
    let took = start.elapsed();
    let (tally, error) = match result {
        Ok(tally) => (tally, None),
        Err(error) => (Tally::default(), Some(error)),
    };
    let failed = error.is_some() || tally.failed > 0;
    if let Some(error) = &error {
        eprintln!("error: {error:#}");
    }
    for reason in &tally.skip_reasons {
        println!("skipped: {reason}");
    }
    println!("== {} {} in {:.1} s", step.name, if failed { "FAILED" } else { "ok" }, took.as_secs_f32());
    Report { name: step.name, failed, took, tally }
}

/// The closing table and whether any step failed. A failed step without failed tests counts as one failure.
fn summarize(reports: &[Report]) -> (String, bool) {
    let mut text = String::from("step            s   passed failed skipped\n");
    let mut total = Tally::default();
    let mut any_failed = false;
    for report in reports {
        any_failed |= report.failed;
        let mut tally = report.tally.clone();
        tally.failed += u64::from(report.failed && tally.failed == 0);
        text += &row(report.name, report.took.as_secs_f32(), &tally);
        total.add(&tally);
    }
    let seconds: f32 = reports.iter().map(|report| report.took.as_secs_f32()).sum();
    (
        text + &row("all", seconds, &total)
            + "
" + &total.to_string(),
        any_failed,
    )
}

/// One line of the closing table.
fn row(name: &str, seconds: f32, tally: &Tally) -> String {
    let Tally { passed, failed, skipped, .. } = tally;
    format!("{name:<10} {seconds:>7.1} {passed:>7} {failed:>6} {skipped:>7}\n")
}

/// Runs a check that has no tests to count.
fn check(command: &mut Command) -> anyhow::Result<Tally> {
    workspace::check(command)?;
    Ok(Tally::default())
}

fn fmt(_: &Ready) -> anyhow::Result<Tally> {
    check(workspace::cargo().args(["fmt", "--all", "--", "--check"]))
}

fn layers(_: &Ready) -> anyhow::Result<Tally> {
    layers::run(&layers::Args {})?;
    Ok(Tally::default())
}

fn clippy(_: &Ready) -> anyhow::Result<Tally> {
    let scope = ["clippy", "--release", "--workspace", "--all-targets"];
    check(workspace::cargo().args(scope).args(["--", "-D", "warnings"]))
}

fn generated(_: &Ready) -> anyhow::Result<Tally> {
    let mut stale = Vec::new();
    for (file, binary, args) in GENERATED {
        let run = ["run", "--quiet", "--release", "-p", "minerva-server", "--bin", binary, "--"];
        let expected = workspace::capture(workspace::cargo().args(run).args(*args))?;
        if std::fs::read_to_string(workspace::root().join(file)).ok().as_ref() != Some(&expected) {
            stale.push(format!("{file} is not what `cargo {} {}` prints", run.join(" "), args.join(" ")));
        }
    }
    if !stale.is_empty() {
        bail!("{}", stale.join("\n"));
    }
    println!("{} files compared", GENERATED.len());
    Ok(Tally::default())
}

fn tests(_: &Ready) -> anyhow::Result<Tally> {
    // The sampler's sources alone are counted; their tests need the rest of the engine.
    tally::cargo_test(&["--all-targets", "--exclude", "minerva-counts"])
}

fn doctests(_: &Ready) -> anyhow::Result<Tally> {
    tally::cargo_test(&["--doc"])
}

fn counts(_: &Ready) -> anyhow::Result<Tally> {
    Ok(match count::compare(None, false)? {
        count::Outcome::Counted(n) => Tally::passed(n),
        count::Outcome::Skipped(reason) => Tally::skip(reason),
    })
}

fn doc(_: &Ready) -> anyhow::Result<Tally> {
    let scope = ["doc", "--release", "--workspace", "--no-deps"];
    check(workspace::cargo().args(scope).env("RUSTDOCFLAGS", "-D warnings"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(name: &'static str, failed: bool, tally: Tally) -> Report {
        Report { name, failed, took: Duration::from_millis(1500), tally }
    }

    #[test]
    fn the_summary_closes_with_the_count() {
        let tally = Tally { passed: 7, skipped: 2, ..Tally::default() };
        let (text, failed) = summarize(&[report("fmt", false, Tally::default()), report("tests", false, tally)]);
        assert!(!failed);
        assert_eq!(text.lines().last(), Some("7 passed, 0 failed, 2 skipped"), "{text}");
    }

    #[test]
    fn a_failed_check_counts_as_a_failure() {
        let (text, failed) = summarize(&[report("fmt", true, Tally::default())]);
        assert!(failed);
        assert_eq!(text.lines().last(), Some("0 passed, 1 failed"), "{text}");
    }

    #[test]
    fn step_names_are_distinct() {
        let names: std::collections::BTreeSet<_> = STEPS.iter().map(|step| step.name).collect();
        assert_eq!(names.len(), STEPS.len());
    }
}
