//! Writes `target/setup.toml`: the variables that builds need on this machine, and no others.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
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
    let text = render(&vars);
    let old = fs::read_to_string(&path).unwrap_or_default();
    if old == text {
        return Ok(());
    }
    let partial = path.with_extension(format!("toml.{}", std::process::id()));
    fs::write(&partial, &text).with_context(|| format!("cannot write {}", partial.display()))?;
    fs::rename(&partial, &path).with_context(|| format!("cannot write {}", path.display()))?;

    let compiler_line = |text: &str| text.lines().find(|l| l.starts_with("CXX =")).map(str::to_owned);
    if !old.is_empty() && compiler_line(&old) != compiler_line(&text) {
        // cmake keeps the compiler it was configured with, and cargo does not watch it.
        say("compiler", "changed: llama.cpp will be built again");
        workspace::check(workspace::cargo().args(["clean", "--quiet", "-p", "llama-cpp-sys-2"]))?;
        workspace::check(workspace::cargo().args(["clean", "--quiet", "--release", "-p", "llama-cpp-sys-2"]))?;
    }
    Ok(())
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
