//! A time limit for each test program, so that a test that hangs fails by name instead of taking the whole run with it.
//!
//! cargo starts test programs through a runner: ours is this task itself, `cargo xtask with-limit SECONDS PROGRAM …`.

use std::ffi::OsString;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::Context as _;

use crate::workspace;

/// The slowest test program takes about a minute on two cores.
const LIMIT: Duration = Duration::from_mins(15);

/// What `timeout` of coreutils returns.
const TIMED_OUT: u8 = 124;

/// A program and how long it may take.
#[derive(clap::Args)]
pub(crate) struct Args {
    seconds: u64,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// Adds to a cargo command that each program it starts is given [`LIMIT`].
pub(super) fn set(cargo: &mut Command) -> anyhow::Result<()> {
    let own = std::env::current_exe().context("where this task lies")?;
    let runner = [own.to_string_lossy().into_owned(), "with-limit".into(), LIMIT.as_secs().to_string()];
    cargo.arg("--config").arg(format!("target.'cfg(all())'.runner={}", serde_json::to_string(&runner)?));
    Ok(())
}

/// Runs the program in place of this task: its output, its exit code.
///
/// # Errors
/// When it cannot be started.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (program, rest) = args.command.split_first().context("no program is named")?;
    let mut child =
        Command::new(program).args(rest).spawn().with_context(|| format!("cannot run {}", program.display()))?;
    let limit = Duration::from_secs(args.seconds);
    let Some(status) = workspace::wait_for(&mut child, limit)? else {
        child.kill()?;
        child.wait()?;
        eprintln!("error: {} was still running after {} s and was stopped", program.display(), limit.as_secs());
        return Ok(ExitCode::from(TIMED_OUT));
    };
    // A program that a signal ended has no code; what it printed says more than any that we could choose.
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}
