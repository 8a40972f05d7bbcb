//! Compiles shim/ against the llama.cpp that llama-cpp-sys-2 built, and finds out whether that build's AMX code is sound.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=shim");
    // Set by `cargo xtask package`: the program looks for modules beside itself only.
    println!("cargo::rerun-if-env-changed=MINERVA_BUNDLE");
    println!("cargo::rustc-check-cfg=cfg(minerva_bundle)");
    if env::var_os("MINERVA_BUNDLE").is_some() {
        println!("cargo::rustc-cfg=minerva_bundle");
    }

    let root = PathBuf::from(env::var_os("DEP_LLAMA_ROOT").expect("llama-cpp-sys-2 sets DEP_LLAMA_ROOT"));
    let cache_path = root.join("build/CMakeCache.txt");
    let cache = fs::read_to_string(&cache_path).unwrap_or_else(|e| panic!("{}: {e}", cache_path.display()));
    let source = PathBuf::from(cache_value(&cache, "CMAKE_HOME_DIRECTORY").expect("a cmake cache names its source"));

    let mut shim = cc::Build::new();
    shim.cpp(true).std("c++17").include("shim").warnings(false);
    for folder in ["include", "ggml/include", "ggml/src", "common", "src", "vendor"] {
        shim.include(source.join(folder));
    }
    shim.files([
        "shim/adapter.cpp",
        "shim/core.cpp",
        "shim/memory.cpp",
        "shim/chat.cpp",
        "shim/hidden.cpp",
        "shim/resident.cpp",
        "shim/rpc.cpp",
        "shim/speed.cpp",
        "shim/state.cpp",
        "shim/trial.cpp",
    ])
    .compile("minerva_shim");

    let compiler = cache_value(&cache, "CMAKE_CXX_COMPILER").unwrap_or_default();
    println!("cargo::rustc-env=MINERVA_CXX={}", compiler_version(&compiler));
    println!("cargo::rustc-env=MINERVA_AMX={}", amx_state(&cache, &compiler));
}

fn cache_value(cache: &str, key: &str) -> Option<String> {
    cache.lines().find_map(|line| {
        let (name, value) = line.split_once('=')?;
        (name.split(':').next() == Some(key)).then(|| value.to_owned())
    })
}

fn compiler_version(compiler: &str) -> String {
    let output = Command::new(compiler).arg("--version").output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().filter(|line| !line.is_empty()).unwrap_or("unknown").to_owned()
}

/// `sound`, `cured` or `faulty`: what this compiler makes of llama.cpp's AMX code.
///
/// Some releases of gcc declare that `_tile_loadconfig` reads 8 bytes of its 64-byte operand (GCC bug 114098), so the
/// stores of the other 56 are dropped and the first prompt faults. Workspace builds cure it with a forced include
/// (build/llama-project.cmake); an app that merely depends on this crate may not have that, and must then do without.
fn amx_state(cache: &str, compiler: &str) -> &'static str {
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return "sound";
    }
    let cured = cache_value(cache, "CMAKE_PROJECT_INCLUDE")
        .is_some_and(|file| Path::new(&file).with_file_name("gcc-amx-tile-config.h").is_file());
    let probe = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("amx.cpp");
    fs::write(&probe, "#include <immintrin.h>\n").expect("OUT_DIR is writable");
    let output = Command::new(compiler).args(["-mamx-tile", "-E", "-P"]).arg(&probe).output();
    let headers = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    // The faulty header passes `*((const void **)__config)`, 8 bytes, to `ldtilecfg`; the mended one uses a builtin.
    let faulty = headers.lines().any(|line| line.contains("ldtilecfg") && line.contains("(const void **)"));
    match (faulty, cured) {
        (false, _) => "sound",
        (true, true) => "cured",
        (true, false) => "faulty",
    }
}
