//! `cargo xtask bench-engine` and `bench-serve`: set up, build in release, measure. The programs are in benches/.

use std::ffi::OsString;

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
/// When set-up or build fails, or the benchmark does: it could not measure, or a `--gate` does not hold.
pub(crate) fn engine(args: &Args) -> anyhow::Result<()> {
    run("bench_engine", args)
}

/// Our server, and any OpenAI-compatible peer, under load.
///
/// # Errors
/// As [`engine`].
pub(crate) fn serve(args: &Args) -> anyhow::Result<()> {
    run("bench_serve", args)
}

fn run(program: &str, args: &Args) -> anyhow::Result<()> {
    let ready = setup::prepare(&setup::Args::default())?;
    // The load tool starts the server that stands beside it.
    workspace::check(workspace::cargo().args(["build", "--release", "-p", "minerva-server", "-p", "minerva-benches"]))?;
    // Not `cargo run`: built alone, the package would have other features of shared dependencies, and be built again.
    let mut command = workspace::command(workspace::release_dir().join(program));
    // In a new clone cargo started this process before set-up wrote the variable.
    if let Some(model) = &ready.model {
        command.env("MINERVA_TEST_MODEL", model);
    }
    workspace::check(command.args(&args.args))
}
