//! `cargo xtask serve`: from a fresh clone to a server that answers, in one command.

use std::ffi::OsString;
use std::process::Command;

use crate::{setup, workspace};

/// Everything after `serve` goes to the server as it is.
#[derive(clap::Args)]
#[command(trailing_var_arg = true)]
pub(crate) struct Args {
    /// Arguments of `minerva-server`; with `--model FILE` among them the default model is not fetched
    #[arg(allow_hyphen_values = true, value_name = "SERVER ARGS")]
    args: Vec<OsString>,
}

/// Sets up, builds and becomes the server.
///
/// # Errors
/// When a step before the server fails; the server's own exit code is passed on.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let own_model = names_model(&args.args);
    let options = if own_model { setup::Args::without_model() } else { setup::Args::default() };
    let ready = setup::prepare(&options)?;
    workspace::check(workspace::cargo().args(["build", "--release", "-p", "minerva-server"]))?;

    let server = workspace::release_dir().join("minerva-server");
    let mut command = workspace::command(server);
    // Paths among the arguments are the caller's, not the repository's.
    command.current_dir(std::env::current_dir()?);
    if let Some(model) = &ready.model {
        command.arg("--model").arg(model);
    }
    become_program(command.args(&args.args))
}

/// Whether the user brings a model: `-m FILE`, `-mFILE`, `--model FILE` or `--model=FILE`.
fn names_model(args: &[OsString]) -> bool {
    let mut texts = args.iter().map(|arg| arg.to_string_lossy());
    texts.any(|arg| {
        let short = arg.starts_with("-m") && !arg.starts_with("--");
        short || arg == "--model" || arg.starts_with("--model=")
    })
}

/// Replaces this process, so that signals reach the server itself.
#[cfg(unix)]
fn become_program(command: &mut Command) -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt as _;
    let error = command.exec();
    Err(anyhow::Error::new(error).context("cannot start the server"))
}

/// Runs the server and ends as it does.
#[cfg(not(unix))]
fn become_program(command: &mut Command) -> anyhow::Result<()> {
    use anyhow::Context as _;
    let status = command.status().context("cannot start the server")?;
    std::process::exit(status.code().unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_seen_in_each_way_to_name_one() {
        let named = |args: &[&str]| names_model(&args.iter().map(OsString::from).collect::<Vec<_>>());
        assert!(named(&["--port", "9000", "--model", "x.gguf"]));
        assert!(named(&["--model=x.gguf"]));
        assert!(named(&["-m", "x.gguf"]));
        assert!(!named(&["--model-name", "x"]));
        assert!(!named(&["--gpu=auto"]));
    }
}
