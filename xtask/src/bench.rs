//! `cargo xtask bench-engine`, `bench-serve`, `bench-gpu` and `replay`: set up, build in release, measure. The programs are in benches/.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Context as _;

use crate::{setup, workspace};

/// Everything after the task goes to the benchmark as it is; `--help` prints its options.
#[derive(clap::Args)]
#[command(trailing_var_arg = true, disable_help_flag = true)]
pub(crate) struct Args {
    /// Arguments of the benchmark
    #[arg(allow_hyphen_values = true, value_name = "BENCHMARK ARGS")]
    args: Vec<OsString>,
}

/// The engine against a bare `llama_decode` loop.
///
/// # Errors
/// When set-up or build fails. The program's own exit code is this task's: not 0 when it could not measure, or a `--gate`
/// does not hold.
pub(crate) fn engine(args: &Args) -> anyhow::Result<ExitCode> {
    run("bench_engine", args)
}

/// Our server, and any OpenAI-compatible peer, under load.
///
/// # Errors
/// As [`engine`].
pub(crate) fn serve(args: &Args) -> anyhow::Result<ExitCode> {
    run("bench_serve", args)
}

/// GPU against CPU, memory, and the guide's three tables.
///
/// # Errors
/// When set-up or build fails. The program's own exit code is this task's: 1 for a regression, 2 for a missing GPU.
pub(crate) fn gpu(args: &Args) -> anyhow::Result<ExitCode> {
    run("bench_gpu", args)
}

/// A recorded schedule, run again.
///
/// # Errors
/// When set-up or build fails. The program's own exit code is this task's: 1 when a decision differs.
pub(crate) fn replay(args: &Args) -> anyhow::Result<ExitCode> {
    run("replay", args)
}

fn run(program: &str, args: &Args) -> anyhow::Result<ExitCode> {
    let ready = setup::prepare(&setup::Args::default())?;
    // The load tool starts the server that stands beside it.
    workspace::check(workspace::cargo().args(["build", "--release", "-p", "minerva-server", "-p", "minerva-benches"]))?;
    // Not `cargo run`: built alone, the package would have other features of shared dependencies, and be built again.
    let mut command = workspace::command(workspace::release_dir().join(program));
    // In a new clone cargo started this process before set-up wrote the variable.
    if let Some(model) = &ready.model {
        command.env("MINERVA_TEST_MODEL", model);
    }
    let status = command.args(&args.args).status().with_context(|| format!("cannot run {program}"))?;
    // A program that was ended by a signal has no code.
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
