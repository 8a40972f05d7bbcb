//! Project tasks, run as `cargo xtask TASK`: one file per task, each with its own `Args` and `run`.
//!
//! `setup` prepares a bare machine, `serve` talks to a real model, `test` runs what CI runs, `package` makes what others run. Start with [`setup`]: the
//! others begin with it. [`workspace`] has the paths and the child processes that all of them share.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a task talks to the terminal")]

mod bench;
mod count;
mod layers;
mod package;
mod serve;
mod setup;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(bin_name = "cargo xtask", about = "Minerva's project tasks")]
enum Task {
    /// Find or install what a build needs, and fetch the default model
    Setup(setup::Args),
    /// Set up, build in release and serve the default model on 127.0.0.1:8080
    Serve(serve::Args),
    /// Set up, then run everything that CI runs
    Test(test::Args),
    /// Fail on any dependency between our crates that points upward
    Layers(layers::Args),
    /// Build the bundle for other Linux machines: dist/minerva-VERSION-TARGET.tar.zst
    Package(package::Args),
    /// Measure the engine against a bare `llama_decode` loop
    BenchEngine(bench::Args),
    /// Measure our server, and any OpenAI-compatible peer, under load
    BenchServe(bench::Args),
    /// Measure GPU against CPU, memory, and the guide's three tables
    BenchGpu(bench::Args),
    /// Run a recorded schedule again (`--trace-file` of the server) and compare every decision
    Replay(bench::Args),
    /// Count instructions of the sampler and the scheduler, and compare them with the last time's
    Count(count::Args),
    /// Run a program, and stop it when it takes too long (what `test` does with each test program)
    #[command(hide = true)]
    WithLimit(test::limit::Args),
}

fn main() -> ExitCode {
    let result = match Task::parse() {
        Task::Setup(args) => setup::run(&args),
        Task::Serve(args) => serve::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Layers(args) => layers::run(&args),
        Task::Package(args) => package::run(&args),
        Task::Count(args) => count::run(&args),
        Task::BenchEngine(args) => return exit_code(bench::engine(&args)),
        Task::BenchServe(args) => return exit_code(bench::serve(&args)),
        Task::BenchGpu(args) => return exit_code(bench::gpu(&args)),
        Task::Replay(args) => return exit_code(bench::replay(&args)),
        Task::WithLimit(args) => return exit_code(test::limit::run(&args)),
    };
    exit_code(result.map(|()| ExitCode::SUCCESS))
}

fn exit_code(result: anyhow::Result<ExitCode>) -> ExitCode {
    // Not `anyhow`'s own report: it adds a backtrace, and what went wrong here is seldom in our code.
    result.unwrap_or_else(|error| report(&error))
}

/// Prints what failed and why, outermost first.
fn report(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("because: {cause}");
    }
    ExitCode::FAILURE
}
