//! Chooses the C++ compiler that builds llama.cpp.
//!
//! The default `c++` is taken unless it is wrong for this CPU and another one is right: on a CPU with AMX a compiler must
//! define `__AMX_INT8__`, or ggml leaves a factor of four in prefill behind (clang 14 spells it `__AMXINT8__`). GCC's own
//! AMX fault is mended in `build/`.

use std::path::PathBuf;
use std::process::Stdio;
use std::{env, fmt, fs};

use anyhow::bail;

use super::packages::{self, Package};
use super::say;
use crate::workspace;

/// A C++ compiler that compiles the standard library's headers.
#[derive(Clone, Debug)]
pub(crate) struct Compiler {
    /// The C++ compiler, as a path or a name on `PATH`.
    pub(crate) cxx: PathBuf,
    /// The C compiler that belongs to it; `None` for the defaults, which builds find without help.
    pub(crate) cc: Option<PathBuf>,
    /// Which compiler it is.
    pub(crate) kind: Kind,
    /// Whether it uses all of this CPU that matters to ggml.
    pub(crate) fits: bool,
}

/// Who made a compiler, and its major version.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// GCC.
    Gcc(u32),
    /// Clang, also Apple's.
    Clang(u32),
    /// Something else, such as MSVC.
    Other,
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.cxx.display();
        match self.kind {
            Kind::Gcc(major) => write!(f, "{path} (gcc {major})"),
            Kind::Clang(major) => write!(f, "{path} (clang {major})"),
            Kind::Other => write!(f, "{path}"),
        }
    }
}

/// The compiler to build with.
///
/// # Errors
/// When there is none: with the line that installs one.
pub(super) fn choose(system: bool) -> anyhow::Result<Compiler> {
    if cfg!(target_env = "msvc") {
        // Rust for MSVC does not link without Visual Studio's tools, and the build scripts find them themselves.
        return Ok(Compiler { cxx: "cl".into(), cc: None, kind: Kind::Other, fits: true });
    }
    let mut found = find();
    if found.is_none() && system {
        packages::install(&[Package::CxxCompiler])?;
        found = find();
    }
    let Some(compiler) = found else {
        bail!("no C++ compiler that works; install one with\n{}", packages::advice(Package::CxxCompiler));
    };
    if !compiler.fits {
        say(
            "warning",
            "this CPU has AMX and no compiler here uses it: install clang 19 or gcc 12 for 2 to 4 times the speed",
        );
    }
    Ok(compiler)
}

/// The user's choice if there is one, else the first compiler that fits, else the first that works.
fn find() -> Option<Compiler> {
    if let Some(cxx) = workspace::user_var("CXX") {
        return try_compiler(cxx.into(), None);
    }
    let mut second_best = None;
    for (cxx, cc) in candidates() {
        let Some(path) = workspace::which(&cxx) else {
            continue;
        };
        // The defaults need no variables; of another pair both halves are named.
        let cc = if cxx == "c++" { None } else { workspace::which(&cc) };
        if cxx != "c++" && cc.is_none() {
            continue;
        }
        match try_compiler(path, cc) {
            Some(compiler) if compiler.fits => return Some(compiler),
            other => second_best = second_best.or(other),
        }
    }
    second_best
}

/// Pairs of C++ and C compilers, best first.
fn candidates() -> impl Iterator<Item = (String, String)> {
    let plain = [("c++", "cc"), ("g++", "gcc"), ("clang++", "clang")];
    let plain = plain.into_iter().map(|(cxx, cc)| (cxx.to_owned(), cc.to_owned()));
    let clangs = (15..=30).rev().map(|n| (format!("clang++-{n}"), format!("clang-{n}")));
    let gccs = (9..=20).rev().map(|n| (format!("g++-{n}"), format!("gcc-{n}")));
    plain.chain(gccs).chain(clangs)
}

/// Reads the macros that `cxx` defines for this CPU after a header of the standard library.
fn try_compiler(cxx: PathBuf, cc: Option<PathBuf>) -> Option<Compiler> {
    let dir = env::temp_dir().join(format!("minerva-cxx-{}", std::process::id()));
    fs::create_dir_all(&dir).ok()?;
    let source = dir.join("probe.cpp");
    fs::write(&source, "#include <vector>\n").ok()?;
    let mut command = workspace::command(&cxx);
    command.args(["-std=c++17", "-dM", "-E"]).arg(&source).stdin(Stdio::null());
    if cfg!(target_arch = "x86_64") {
        command.arg("-march=native");
    }
    let macros = workspace::capture(&mut command);
    let _ = fs::remove_dir_all(&dir);
    let macros = macros.ok()?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let fits = !has_amx(&cpuinfo) || defines(&macros, "__AMX_INT8__").is_some();
    Some(Compiler { cxx, cc, kind: kind(&macros), fits })
}

/// The value of a macro in the output of `-dM -E`.
fn defines<'a>(macros: &'a str, name: &str) -> Option<&'a str> {
    macros.lines().find_map(|line| line.strip_prefix("#define ")?.strip_prefix(name)?.strip_prefix(' '))
}

/// Clang defines `__GNUC__` too, so it is asked first.
fn kind(macros: &str) -> Kind {
    let number = |name| defines(macros, name)?.trim().parse().ok();
    match (number("__clang_major__"), number("__GNUC__")) {
        (Some(major), _) => Kind::Clang(major),
        (None, Some(major)) => Kind::Gcc(major),
        (None, None) => Kind::Other,
    }
}

/// Whether Linux lists AMX's 8-bit products among this CPU's features.
fn has_amx(cpuinfo: &str) -> bool {
    let mut flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    flags.next().is_some_and(|line| line.split_whitespace().any(|flag| flag == "amx_int8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clang_is_not_taken_for_the_gcc_that_it_imitates() {
        assert_eq!(kind("#define __GNUC__ 4\n#define __clang_major__ 19\n"), Kind::Clang(19));
        assert_eq!(kind("#define __GNUC__ 12\n#define __GNUC_MINOR__ 2\n"), Kind::Gcc(12));
        assert_eq!(kind(""), Kind::Other);
    }

    #[test]
    fn clang_14_spells_the_amx_macro_differently() {
        assert_eq!(defines("#define __AMXINT8__ 1\n#define __AMX_TILE__ 1\n", "__AMX_INT8__"), None);
        assert_eq!(defines("#define __AMX_INT8__ 1\n", "__AMX_INT8__"), Some("1"));
    }

    #[test]
    fn amx_is_read_from_the_flags_of_the_first_cpu() {
        assert!(has_amx("model name\t: Xeon\nflags\t\t: fpu avx512f amx_tile amx_int8\n"));
        assert!(!has_amx("flags\t\t: fpu amx_int8_other\n"));
        assert!(!has_amx(""));
    }
}
