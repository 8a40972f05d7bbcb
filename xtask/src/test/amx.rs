//! The AMX cure, seen in assembly, so that a machine without AMX can check it too.
//!
//! `fixtures/amx` goes through cmake as llama.cpp does, with the CMAKE_PROJECT_INCLUDE that `.cargo/config.toml` sets. A
//! compiler that drops the stores of the tile configuration never touches the argument registers.

use std::path::Path;
use std::{env, fs};

use anyhow::{Context as _, bail};

use super::tally::Tally;
use crate::setup::{Kind, Ready};
use crate::workspace;

pub(super) fn run(ready: &Ready) -> anyhow::Result<Tally> {
    if !cfg!(all(target_arch = "x86_64", unix)) {
        return Ok(Tally::skip("AMX belongs to x86-64"));
    }
    match ready.compiler.kind {
        Kind::Gcc(major) if major >= 11 => {}
        Kind::Clang(major) if major >= 12 => {}
        kind => return Ok(Tally::skip(format!("{kind:?} cannot compile for AMX"))),
    }
    let include = env::var_os("CMAKE_PROJECT_INCLUDE")
        .context("CMAKE_PROJECT_INCLUDE is not set: start this as `cargo xtask`, and see .cargo/config.toml")?;
    let bare = keeps_stores(&assembly(ready, None)?);
    let built = keeps_stores(&assembly(ready, Some(Path::new(&include)))?);
    println!("stores of the tile configuration: {} by the compiler alone, {} in our build", kept(bare), kept(built));
    if !built {
        bail!("{} drops the tile configuration: the first prompt would crash on a CPU with AMX", ready.compiler);
    }
    Ok(Tally::passed(1))
}

/// The fixture's assembly, with or without our additions to the build.
fn assembly(ready: &Ready, include: Option<&Path>) -> anyhow::Result<String> {
    let dir = workspace::own_target().join(if include.is_some() { "amx-check/cured" } else { "amx-check/bare" });
    let _ = fs::remove_dir_all(&dir); // a configured folder would keep its old compiler and flags
    let fixture = workspace::root().join("xtask/fixtures/amx");
    let mut configure = workspace::command(&ready.cmake);
    configure.arg("-S").arg(fixture).arg("-B").arg(&dir);
    configure.env("CXX", &ready.compiler.cxx).env_remove("CMAKE_PROJECT_INCLUDE");
    if let Some(ninja) = &ready.ninja {
        configure.arg("-GNinja").arg(format!("-DCMAKE_MAKE_PROGRAM={}", ninja.display()));
    }
    if let Some(include) = include {
        configure.arg(format!("-DCMAKE_PROJECT_INCLUDE={}", include.display()));
    }
    workspace::capture(&mut configure)?;
    workspace::capture(workspace::command(&ready.cmake).arg("--build").arg(&dir))?;
    let object = dir.join("CMakeFiles/amx.dir/tile_config.cpp.o");
    fs::read_to_string(&object).with_context(|| format!("no assembly in {}", object.display()))
}

/// Whether the function reads both its arguments, which it only stores into the configuration.
fn keeps_stores(assembly: &str) -> bool {
    let body = assembly.split_once("configure_tiles:").map_or("", |(_, body)| body);
    let body = body.split_once("ldtilecfg").map_or("", |(before, _)| before);
    let reads = |registers: [&str; 3]| registers.iter().any(|register| body.contains(register));
    reads(["%edi", "%di", "%rdi"]) && reads(["%esi", "%sil", "%rsi"])
}

fn kept(kept: bool) -> &'static str {
    if kept { "kept" } else { "dropped" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assembly_without_the_arguments_has_lost_the_stores() {
        let gcc_12 =
            "configure_tiles:\n\tvpxor\t%xmm0, %xmm0, %xmm0\n\tmovb\t$1, -64(%rsp)\n\tldtilecfg\t-64(%rsp)\n\tret\n";
        assert!(!keeps_stores(gcc_12));
        let cured = "configure_tiles:\n\tmovw\t%di, -48(%rsp)\n\tmovb\t%sil, -16(%rsp)\n\tldtilecfg\t-64(%rsp)\n";
        assert!(keeps_stores(cured));
        let too_late = "configure_tiles:\n\tldtilecfg\t-64(%rsp)\n\tmovw\t%di, -48(%rsp)\n\tmovb\t%sil, -16(%rsp)\n";
        assert!(!keeps_stores(too_late));
        assert!(!keeps_stores("other:\n\tret\n"));
    }
}
