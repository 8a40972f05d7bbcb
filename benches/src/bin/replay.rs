//! A recorded schedule, run again without a model: `cargo xtask replay FILE` (docs/troubleshooting.md says how to record one).
#![expect(clippy::print_stdout, reason = "the report is the output")]
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Parser;
use minerva_engine::scheduler::replay;

/// Runs a recorded schedule again and compares every decision.
#[derive(Debug, Parser)]
struct Args {
    /// What `minerva-server --trace-file` wrote.
    file: PathBuf,
    /// Print a line per admission and step.
    #[arg(long)]
    text: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let file = File::open(&args.file).with_context(|| format!("cannot open {}", args.file.display()))?;
    let replayed = replay(BufReader::new(file), args.text)?;
    print!("{}", replayed.text);
    let per_step_us = replayed.time.as_secs_f64() * 1e6 / replayed.n_steps.max(1) as f64;
    println!(
        "{} requests, {} steps, {} rows, {} calls: every decision is the same; {per_step_us:.1} us a step, {:.0} us the longest",
        replayed.n_requests,
        replayed.n_steps,
        replayed.n_rows,
        replayed.n_calls,
        replayed.longest_turn.as_secs_f64() * 1e6,
    );
    Ok(())
}
