//! Where things lie, and how a task starts another program.
//!
//! `cargo xtask` itself runs under `.cargo/config.toml`, so the variables of the previous `target/setup.toml` are already
//! in our environment, and a nested cargo would prefer them to a new `setup.toml`. [`user_var`] and [`command`] tell
//! the two apart: what set-up wrote is never taken for what the user asked for.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::Duration;
use std::{env, fs, thread};

use anyhow::{Context as _, bail};

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// `target/` of the repository, whatever `CARGO_TARGET_DIR` says: `.cargo/config.toml` names `target/setup.toml`.
pub(crate) fn own_target() -> PathBuf {
    root().join("target")
}

/// The venv with the tools that the system lacks.
pub(crate) fn tools() -> PathBuf {
    own_target().join("tools")
}

/// Where cargo puts release binaries.
pub(crate) fn release_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(own_target, |dir| root().join(dir)).join("release")
}

/// What outlives a clone: the model and the compiler cache.
pub(crate) fn cache_dir() -> anyhow::Result<PathBuf> {
    let var = |name| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let dir = var("MINERVA_CACHE_DIR")
        .or_else(|| Some(var("XDG_CACHE_HOME")?.join("minerva")))
        .or_else(|| Some(var("LOCALAPPDATA").filter(|_| cfg!(windows))?.join("minerva")))
        .or_else(|| Some(env::home_dir()?.join(".cache/minerva")))
        .context("no home directory: set `MINERVA_CACHE_DIR`")?;
    std::path::absolute(dir).context("the cache directory")
}

/// The variables of `target/setup.toml` as they were when this task started.
fn inherited() -> &'static BTreeMap<String, String> {
    static VARS: OnceLock<BTreeMap<String, String>> = OnceLock::new();
    VARS.get_or_init(|| parse_env(&fs::read_to_string(setup_toml()).unwrap_or_default()))
}

/// Remembers the variables of the old `setup.toml`, before a task writes a new one.
pub(crate) fn remember_environment() {
    inherited();
}

/// The file that `cargo xtask setup` writes and `.cargo/config.toml` includes.
pub(crate) fn setup_toml() -> PathBuf {
    own_target().join("setup.toml")
}

/// Reads the `KEY = "value"` lines of a `setup.toml`; a TOML basic string is a JSON string here.
fn parse_env(text: &str) -> BTreeMap<String, String> {
    let pair = |line: &str| {
        let (key, value) = line.split_once('=')?;
        Some((key.trim().to_owned(), serde_json::from_str(value.trim()).ok()?))
    };
    text.lines().filter_map(pair).collect()
}

/// A variable that the user set, as opposed to one that an earlier set-up wrote.
pub(crate) fn user_var(key: &str) -> Option<OsString> {
    let value = env::var_os(key).filter(|value| !value.is_empty())?;
    let ours = inherited().get(key).is_some_and(|old| value == OsStr::new(old));
    (!ours).then_some(value)
}

/// A command in the repository's root without the variables of the old `setup.toml`.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    for key in inherited().keys().filter(|key| user_var(key).is_none()) {
        command.env_remove(key);
    }
    command
}

/// The cargo that runs this task, ready for a subcommand.
pub(crate) fn cargo() -> Command {
    command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs to the end with our own output, and fails when the program fails.
pub(crate) fn check(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", line(command)))?;
    if !status.success() {
        bail!("{} failed ({status})", line(command));
    }
    Ok(())
}

/// Standard output of a program that must succeed; its error output goes into the error.
pub(crate) fn capture(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {}", line(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed ({})\n{}", line(command), output.status, stderr.trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits for `child` at most `limit`; `None` when it is still running then.
pub(crate) fn wait_for(child: &mut std::process::Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    const STEP: Duration = Duration::from_millis(50);
    let mut waited = Duration::ZERO;
    loop {
        match child.try_wait()? {
            None if waited < limit => thread::sleep(STEP),
            status => return Ok(status),
        }
        waited += STEP;
    }
}

/// The program and its arguments, as one would type them.
fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    format!("`{}`", words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" "))
}

/// The first file called `name` on `PATH`.
pub(crate) fn which(name: &str) -> Option<PathBuf> {
    let name = format!("{name}{}", env::consts::EXE_SUFFIX);
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(&name)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn env_lines_are_read_and_everything_else_is_passed_over() {
        let text = "# a comment = \"x\n[env]\nCMAKE = \"/a b/cmake\"\nP = \"C:\\\\x\"\nbroken = /x\n";
        let vars = parse_env(text);
        assert_eq!(vars.len(), 2, "{vars:?}");
        assert_eq!(vars["CMAKE"], "/a b/cmake");
        assert_eq!(vars["P"], "C:\\x");
    }
}
