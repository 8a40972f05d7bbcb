//! Writes `target/setup.toml`: the variables that builds need on this machine, and no others.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::Path;

use anyhow::Context as _;

use super::compiler::Compiler;
use super::tools::{Tools, decided};
use super::{libclang, say};
use crate::workspace;

/// Writes the file when its content changes; a change of compiler also drops what the old one built.
pub(super) fn write(compiler: &Compiler, tools: &Tools, cache: &Path, model: &Path) -> anyhow::Result<()> {
    let path = workspace::setup_toml();
    let vars = variables(compiler, tools, cache, model);
    let text = format!("{}{}\n", render(&vars), inputs()?);
    let old = fs::read_to_string(&path).unwrap_or_default();
    if old == text {
        return Ok(());
    }
    let partial = path.with_extension(format!("toml.{}", std::process::id()));
    fs::write(&partial, &text).with_context(|| format!("cannot write {}", partial.display()))?;
    fs::rename(&partial, &path).with_context(|| format!("cannot write {}", path.display()))?;

    let lines = |text: &str| -> Vec<String> {
        text.lines().filter(|l| l.starts_with("CXX =") || l.starts_with(INPUTS)).map(str::to_owned).collect()
    };
    if !old.is_empty() && lines(&old) != lines(&text) {
        // cmake keeps what it was configured with, and cargo watches neither the compiler nor variables of `[env]`.
        say("llama.cpp", "its compiler or settings changed: it will be built again");
        workspace::check(workspace::cargo().args(["clean", "--quiet", "-p", "llama-cpp-sys-2"]))?;
        workspace::check(workspace::cargo().args(["clean", "--quiet", "--release", "-p", "llama-cpp-sys-2"]))?;
    }
    Ok(())
}

/// Begins the line that names what llama.cpp was configured with.
const INPUTS: &str = "# llama.cpp's settings: ";

/// A fingerprint of everything in the repository that its build reads: `[env]` of `.cargo/config.toml` and `build/`.
fn inputs() -> anyhow::Result<String> {
    let mut files = vec![workspace::root().join(".cargo/config.toml")];
    let build = fs::read_dir(workspace::root().join("build")).context("cannot read build/")?;
    files.extend(build.filter_map(|entry| Some(entry.ok()?.path())));
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?.hash(&mut hasher);
    }
    Ok(format!("{INPUTS}{:016x}", hasher.finish()))
}

/// What builds cannot find out by themselves. A variable that the user sets is left to the user.
fn variables(compiler: &Compiler, tools: &Tools, cache: &Path, model: &Path) -> BTreeMap<&'static str, String> {
    let mut vars = BTreeMap::new();
    let mut set = |key: &'static str, value: String| {
        if !decided(key) {
            vars.insert(key, value);
        }
    };
    let text = |path: &Path| path.to_string_lossy().into_owned();
    if let Some(cc) = &compiler.cc {
        set("CC", text(cc));
        set("CXX", text(&compiler.cxx));
    }
    if !tools.cmake.on_path {
        set("CMAKE", text(&tools.cmake.path));
    }
    // Visual Studio's own generator knows its compiler; Ninja would need a developer prompt.
    if let Some(ninja) = tools.ninja.as_ref().filter(|_| !cfg!(target_env = "msvc")) {
        set("CMAKE_GENERATOR", "Ninja".into());
        if !ninja.on_path {
            set("CMAKE_MAKE_PROGRAM", text(&ninja.path));
        }
    }
    if !tools.libclang.on_path {
        set("LIBCLANG_PATH", text(&tools.libclang.path));
    }
    if !libclang::has_headers(&tools.libclang.path)
        && let Some(dir) = builtin_headers(compiler)
    {
        let quote = if dir.contains(' ') { "'" } else { "" }; // bindgen splits the value as a shell does
        set("BINDGEN_EXTRA_CLANG_ARGS", format!("-isystem {quote}{dir}{quote}"));
    }
    if tools.ccache.is_some() {
        set("CCACHE_DIR", text(&cache.join("ccache")));
        set("CCACHE_BASEDIR", text(workspace::root())); // clones share objects: paths below it count as relative
        set("CCACHE_MAXSIZE", "2G".into());
    }
    // Tests on a real model run in plain `cargo test` too.
    set("MINERVA_TEST_MODEL", text(model));
    vars
}

/// The folder of the compiler's own headers, which stand in for clang's where only libclang itself is installed.
fn builtin_headers(compiler: &Compiler) -> Option<String> {
    let output = workspace::capture(workspace::command(&compiler.cxx).arg("-print-file-name=include"));
    output.ok().map(|dir| dir.trim().to_owned()).filter(|dir| Path::new(dir).is_absolute())
}

/// The file's text; [`workspace`] reads it back.
fn render(vars: &BTreeMap<&str, String>) -> String {
    let mut text =
        "# Written by `cargo xtask setup`, read by .cargo/config.toml. Delete it to start over.\n[env]\n".to_owned();
    for (key, value) in vars {
        let quoted = serde_json::Value::from(value.as_str()); // a JSON string is a TOML string
        writeln!(text, "{key} = {quoted}").expect("a String takes any text");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_for_toml() {
        let vars = BTreeMap::from([("B", "C:\\x \"y\"".to_owned()), ("A", "/a".to_owned())]);
        let text = render(&vars);
        assert!(text.ends_with("[env]\nA = \"/a\"\nB = \"C:\\\\x \\\"y\\\"\"\n"), "{text}");
    }
}
