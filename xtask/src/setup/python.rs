//! Python as a package manager that needs no root: a venv under `target/`, or pip's `--target` where venv is missing.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use anyhow::{Context as _, bail};

use super::packages::{Package, advice};
use crate::workspace;

/// A Python with a pip that works.
pub(crate) struct Interpreter {
    exe: PathBuf,
    /// Where pip puts packages when it is not a venv's own.
    target: Option<PathBuf>,
}

impl Interpreter {
    /// The Python that installs into `dir`: the venv there, made when missing.
    ///
    /// Debian's Python has no ensurepip without python3-venv; then virtualenv makes the venv, and failing that the
    /// system's pip installs into the folder `site`.
    pub(crate) fn into_dir(dir: &Path) -> anyhow::Result<Self> {
        if let Some(venv) = existing_venv(dir) {
            return Ok(venv);
        }
        let site = dir.join("site");
        if !site.is_dir() {
            let Err(no_venv) = create_venv(dir) else {
                return existing_venv(dir).context("the new venv has no working pip");
            };
            if !has_pip(&system_python()?) {
                let line = advice(Package::PythonVenv);
                return Err(no_venv.context(format!("Python has neither venv nor pip; install them with\n{line}")));
            }
            fs::create_dir_all(&site).with_context(|| format!("cannot make {}", site.display()))?;
        }
        Ok(Self { exe: system_python()?, target: Some(site) })
    }

    /// Python, seeing the packages installed so far.
    pub(crate) fn command(&self) -> Command {
        let mut command = workspace::command(&self.exe);
        command.env("PIP_DISABLE_PIP_VERSION_CHECK", "1").env("PIP_ROOT_USER_ACTION", "ignore");
        if let Some(target) = &self.target {
            command.env("PYTHONPATH", target);
        }
        command
    }

    /// `python -m MODULE`.
    pub(crate) fn module(&self, module: &str) -> Command {
        let mut command = self.command();
        command.args(["-m", module]);
        command
    }

    /// Installs requirements such as `cmake>=3.26,<5`; an older or broken installation of them is replaced.
    pub(crate) fn install<S: AsRef<OsStr>>(&self, requirements: &[S]) -> anyhow::Result<()> {
        let mut pip = self.module("pip");
        pip.args(["install", "--quiet", "--upgrade", "--force-reinstall", "--only-binary=:all:"]);
        if let Some(target) = &self.target {
            pip.arg("--target").arg(target);
        }
        workspace::check(pip.args(requirements)).context("pip cannot install what is missing")
    }
}

/// Makes a venv in `dir` with the system's Python, by venv or virtualenv.
fn create_venv(dir: &Path) -> anyhow::Result<()> {
    let system = system_python()?;
    let is_new = !dir.exists();
    let mut failure = None;
    for module in ["venv", "virtualenv"] {
        let made = workspace::capture(workspace::command(&system).args(["-m", module]).arg(dir));
        match made {
            Ok(_) => return Ok(()),
            Err(error) => failure = failure.or(Some(error)), // venv's own words are the useful ones
        }
        if is_new {
            let _ = fs::remove_dir_all(dir); // a half-made venv has a Python without pip
        }
    }
    failure.map_or(Ok(()), Err)
}

/// The venv in `dir`, if it is whole.
fn existing_venv(dir: &Path) -> Option<Interpreter> {
    let exe = ["bin/python", "Scripts/python.exe"].map(|p| dir.join(p));
    let exe = exe.into_iter().find(|exe| exe.is_file() && has_pip(exe))?;
    Some(Interpreter { exe, target: None })
}

/// Whether `python -m pip` runs.
fn has_pip(python: &Path) -> bool {
    let mut pip = workspace::command(python);
    pip.args(["-m", "pip", "--version"]).stdin(Stdio::null()).stdout(Stdio::null());
    pip.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// The system's Python 3, new enough for the wheels that we need.
fn system_python() -> anyhow::Result<PathBuf> {
    for name in ["python3", "python"] {
        let Some(exe) = workspace::which(name) else {
            continue;
        };
        let version = workspace::capture(workspace::command(&exe).arg("--version"));
        if version.is_ok_and(|version| super::tools::version(&version) >= Some((3, 8))) {
            return Ok(exe);
        }
    }
    bail!("Python 3.8 or newer is needed to install what is missing; install it with\n{}", advice(Package::Python))
}

/// Folders below `dir` in which an installed wheel may lie: `(site-packages, programs)`.
pub(super) fn places(dir: &Path) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let pythons = fs::read_dir(dir.join("lib")).into_iter().flatten().flatten();
    let mut sites: Vec<_> = pythons.map(|python| python.path().join("site-packages")).collect();
    sites.extend([dir.join("Lib/site-packages"), dir.join("site")]);
    sites.retain(|site| site.is_dir());
    let mut bins = vec![dir.join("bin"), dir.join("Scripts"), dir.join("site/bin"), dir.join("site/Scripts")];
    bins.retain(|bin| bin.is_dir());
    (sites, bins)
}

/// A program's file name here.
pub(super) fn exe(name: &str) -> String {
    format!("{name}{}", env::consts::EXE_SUFFIX)
}
