//! `cargo xtask package`: a bundle that runs on any Linux machine of the same kind of processor, with its CPU modules and
//! the sources of the CUDA module.
//!
//! docs/packaging.md has what lies where and why. The build has a target folder of its own (`target/package`), because it
//! compiles llama.cpp with other options; the first one takes minutes. The bundle is unpacked again, started with an empty
//! environment and asked a question before the task ends. Start with [`run`]; [`contents`] decides what goes in.

mod archive;
mod licences;
mod verify;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, bail};
use serde_json::Value as Json;

use crate::{setup, workspace};
use archive::Entry;

/// What to leave out.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Do not start the bundle after it was made
    #[arg(long)]
    no_verify: bool,
}

/// The programs of a bundle.
const PROGRAMS: [&str; 3] = ["minerva", "minerva-server", "bench_gpu"];

/// What a build left behind.
struct Built {
    target: String,
    /// The programs, in the order of [`PROGRAMS`].
    programs: Vec<PathBuf>,
    /// llama-cpp-sys-2's output folder.
    llama: PathBuf,
    /// llama.cpp's sources.
    source: PathBuf,
}

/// Builds, packs and verifies.
///
/// # Errors
/// When a build fails, when a file of the bundle names a folder of this machine, or when the bundle does not run.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if !cfg!(target_os = "linux") {
        bail!("bundles are for Linux; docs/packaging.md has the static builds for Windows and macOS");
    }
    let options = if args.no_verify { setup::Args::without_model() } else { setup::Args::default() };
    let ready = setup::prepare(&options)?;
    let built = build()?;
    let name = format!("minerva-{}-{}", env!("CARGO_PKG_VERSION"), built.target);
    let entries = contents(&built, &ready.compiler.cxx)?;
    check_paths(&entries, &built)?;

    let path = workspace::root().join("dist").join(format!("{name}.tar.zst"));
    fs::create_dir_all(path.parent().context("a file has a folder")?)?;
    let bytes = archive::pack(&name, &entries)?;
    fs::write(&path, &bytes).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{} ({:.1} MB, {} files)", path.display(), bytes.len() as f64 / 1e6, entries.len());
    if let Some(model) = &ready.model {
        verify::run(&bytes, &name, model)?;
    }
    Ok(())
}

fn build() -> anyhow::Result<Built> {
    let version = workspace::capture(workspace::cargo().arg("-vV"))?;
    let target =
        version.lines().find_map(|line| line.strip_prefix("host: ")).context("cargo names its host")?.to_owned();
    let target_dir = workspace::own_target().join("package");
    for folder in ["", "deps", "examples"] {
        remove_dangling_links(&target_dir.join(&target).join("dist").join(folder))?;
    }
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--profile", "dist", "--target", &target]);
    cargo.args(["-p", "minerva-server", "-p", "minerva-benches", "--bins"]);
    cargo.args(["--features", "dynamic-backends", "--message-format", "json-render-diagnostics"]);
    cargo.env("CARGO_TARGET_DIR", &target_dir).env("MINERVA_BUNDLE", "1");
    // In place of the workspace's `target-cpu=native`. What computes is in llama.cpp's modules, which choose for themselves.
    let flags = [
        format!("--remap-path-prefix={}=minerva", workspace::root().display()),
        format!("--remap-path-prefix={}=cargo", cargo_home()?.display()),
        "-C".to_owned(),
        "link-arg=-Wl,-rpath,$ORIGIN/../lib".to_owned(),
    ];
    cargo.env_remove("RUSTFLAGS").env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    let output = cargo.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the build failed ({})", output.status);
    }
    let messages: Vec<Json> =
        String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let program = |name: &str| {
        let of_name = messages.iter().filter(|message| message["target"]["name"] == name);
        of_name.filter_map(|message| message["executable"].as_str()).map(PathBuf::from).next()
    };
    let programs = PROGRAMS.iter().map(|name| program(name).with_context(|| format!("cargo did not build {name}")));
    let is_llama = |message: &&Json| {
        message["reason"] == "build-script-executed"
            && message["package_id"].as_str().is_some_and(|id| id.contains("llama-cpp-sys-2"))
    };
    let llama = messages.iter().find(is_llama).and_then(|message| message["out_dir"].as_str());
    let llama = PathBuf::from(llama.context("cargo did not build llama-cpp-sys-2")?);
    let cache = fs::read_to_string(llama.join("build/CMakeCache.txt")).context("cmake's cache")?;
    let source = cache.lines().find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="));
    let source = PathBuf::from(source.context("a cmake cache names its source")?);
    Ok(Built { target, programs: programs.collect::<anyhow::Result<_>>()?, llama, source })
}

/// llama-cpp-sys-2 copies links such as `libllama.so` without what they point to. When its build runs again it takes them for
/// missing and fails on making them anew.
fn remove_dangling_links(folder: &Path) -> anyhow::Result<()> {
    let Ok(list) = fs::read_dir(folder) else { return Ok(()) };
    for entry in list {
        let path = entry?.path();
        if path.is_symlink() && !path.exists() {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

fn cargo_home() -> anyhow::Result<PathBuf> {
    let home = || Some(std::env::home_dir()?.join(".cargo"));
    std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home).context("no home directory: set `CARGO_HOME`")
}

/// Every file of the bundle by its path in it.
fn contents(built: &Built, compiler: &Path) -> anyhow::Result<BTreeMap<String, Entry>> {
    let mut entries = BTreeMap::new();
    for (name, path) in PROGRAMS.iter().zip(&built.programs) {
        entries.insert(format!("bin/{name}"), Entry::program(path)?);
    }
    for (soname, path) in core_libraries(&built.llama)? {
        entries.insert(format!("lib/{soname}"), Entry::program(&path)?);
    }
    // Not on every machine, and the modules cannot do without.
    let openmp = workspace::capture(workspace::command(compiler).arg("-print-file-name=libgomp.so.1"))?;
    entries.insert("lib/libgomp.so.1".to_owned(), Entry::program(Path::new(openmp.trim()))?);
    let modules = files(&built.llama.join("backends"), &|path| path.extension().is_some_and(|ext| ext == "so"))?;
    if !modules.keys().any(|name| name.starts_with("libggml-cpu-")) || !modules.contains_key("libggml-rpc.so") {
        bail!("llama.cpp's build has no CPU modules or no RPC module: {:?}", modules.keys());
    }
    for (name, path) in &modules {
        entries.insert(format!("lib/minerva/{name}"), Entry::program(path)?);
    }
    cuda_sources(&built.source, &mut entries)?;
    let root = workspace::root();
    for name in ["LICENSE-APACHE", "LICENSE-MIT"] {
        entries.insert(name.to_owned(), Entry::file(&root.join(name))?);
    }
    licences::add(built, &mut entries)?;
    let readme = fs::read_to_string(root.join("packaging/README.md"))?;
    let readme = readme.replace("VERSION", env!("CARGO_PKG_VERSION")).replace("TARGET", &built.target);
    let readme = readme.replace("GLIBC", &newest_glibc(&entries).context("the programs need some glibc")?);
    entries.insert("README.md".to_owned(), Entry::text(readme));
    Ok(entries)
}

/// llama.cpp's libraries by the name that programs ask for, such as `libllama.so.0`: cmake makes `libllama.so` and
/// `libllama.so.0.1.2` beside it, two of the three being links.
fn core_libraries(llama: &Path) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let mut libraries = BTreeMap::new();
    for folder in ["lib", "lib64", "build/bin", "build/common"] {
        let has_soname = |path: &Path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.split_once(".so.").is_some_and(|(_, version)| version.bytes().all(|digit| digit.is_ascii_digit()))
        };
        let found = files(&llama.join(folder), &has_soname)?;
        libraries.extend(
            found.into_iter().filter(|(name, _)| !name.starts_with("libggml-cpu") && !name.starts_with("libggml-rpc")),
        );
    }
    for name in ["libggml.so", "libggml-base.so", "libllama.so"] {
        if !libraries.keys().any(|library| library.starts_with(name)) {
            bail!("llama.cpp's build has no {name} in {}", llama.display());
        }
    }
    Ok(libraries)
}

/// What builds the CUDA module on the machine that has the GPU: ggml without the other backends, and our script.
fn cuda_sources(source: &Path, entries: &mut BTreeMap<String, Entry>) -> anyhow::Result<()> {
    let folder = workspace::root().join("packaging/cuda");
    entries.insert("backends/cuda/build.sh".to_owned(), Entry::program(&folder.join("build.sh"))?);
    entries.insert("backends/cuda/CMakeLists.txt".to_owned(), Entry::file(&folder.join("CMakeLists.txt"))?);
    let ggml = source.join("ggml");
    for part in
        ["", "cmake", "include", "src", "src/ggml-cuda", "src/ggml-cuda/template-instances", "src/ggml-cuda/vendors"]
    {
        let prefix = if part.is_empty() { String::new() } else { format!("{part}/") };
        for (name, path) in files(&ggml.join(part), &|_| true)? {
            entries.insert(format!("backends/cuda/ggml/{prefix}{name}"), Entry::file(&path)?);
        }
    }
    // ggml's core reads a few headers of the CPU backend.
    for (name, path) in files(&ggml.join("src/ggml-cpu"), &|path| path.extension().is_some_and(|ext| ext == "h"))? {
        entries.insert(format!("backends/cuda/ggml/src/ggml-cpu/{name}"), Entry::file(&path)?);
    }
    match missing_includes(entries).first() {
        Some(missing) => bail!("the CUDA module's sources are not complete: {missing}"),
        None => Ok(()),
    }
}

/// Made by cmake, and for another vendor's GPUs.
const NOT_INCLUDED: [&str; 2] = ["ggml-version.h", "ggml-musa/mudnn.cuh"];

/// `FILE includes HEADER` for each header in quotes that is not there: whoever builds the module has only what is in the bundle.
fn missing_includes(entries: &BTreeMap<String, Entry>) -> Vec<String> {
    let root = "backends/cuda/ggml";
    let mut missing = Vec::new();
    for (name, entry) in entries.iter().filter(|(name, _)| name.starts_with(root)) {
        let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
        let text = String::from_utf8_lossy(&entry.bytes);
        let included = |line: &str| {
            let rest = line.trim_start().strip_prefix('#')?.trim_start().strip_prefix("include")?.trim_start();
            Some(rest.strip_prefix('"')?.split_once('"')?.0.to_owned())
        };
        for header in text.lines().filter_map(included).filter(|header| !NOT_INCLUDED.contains(&header.as_str())) {
            let folders = [folder.to_owned(), format!("{root}/include"), format!("{root}/src")];
            if !folders.iter().any(|folder| entries.contains_key(&joined(folder, &header))) {
                missing.push(format!("{name} includes {header}"));
            }
        }
    }
    missing
}

/// `a/b` and `../c` as `a/c`.
fn joined(folder: &str, path: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').collect();
    for part in path.split('/') {
        match part {
            "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// The files of one folder, links to files included, by name.
fn files(folder: &Path, is_wanted: &dyn Fn(&Path) -> bool) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    let Ok(list) = fs::read_dir(folder) else { return Ok(files) };
    for entry in list {
        let path = entry?.path();
        if path.is_file() && is_wanted(&path) {
            files.insert(path.file_name().unwrap_or_default().to_string_lossy().into_owned(), path);
        }
    }
    Ok(files)
}

/// Fails on any program or library that names a folder of this machine: it would look there, or tell who built it.
fn check_paths(entries: &BTreeMap<String, Entry>, built: &Built) -> anyhow::Result<()> {
    let folders =
        [workspace::root().to_path_buf(), cargo_home()?, built.llama.clone(), std::env::temp_dir().join("rustc")];
    for (name, entry) in entries.iter().filter(|(name, _)| name.starts_with("bin/") || name.starts_with("lib/")) {
        for folder in &folders {
            if let Some(text) = text_around(&entry.bytes, folder.as_os_str().as_encoded_bytes()) {
                bail!("{name} names a folder of this machine: {text}");
            }
        }
    }
    for name in PROGRAMS {
        let program = entries.get(&format!("bin/{name}")).context("a program")?;
        if text_around(&program.bytes, b"$ORIGIN/../lib").is_none() {
            bail!("bin/{name} does not look for its libraries beside itself");
        }
    }
    Ok(())
}

/// The printable text around the first `needle` in `bytes`.
fn text_around(bytes: &[u8], needle: &[u8]) -> Option<String> {
    let at = find(bytes, needle)?;
    let is_text = |byte: &u8| (0x20..0x7f).contains(byte);
    let start = bytes[..at].iter().rposition(|byte| !is_text(byte)).map_or(0, |before| before + 1);
    let text: Vec<u8> = bytes[start..].iter().copied().take_while(is_text).take(200).collect();
    Some(String::from_utf8_lossy(&text).into_owned())
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    while let Some(at) = bytes.get(from..)?.iter().position(|&byte| byte == first) {
        if bytes[from + at..].starts_with(needle) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

/// The newest `GLIBC_2.34` that a program or library asks for, as `2.34`.
fn newest_glibc(entries: &BTreeMap<String, Entry>) -> Option<String> {
    let mut newest: Option<(u32, u32)> = None;
    for (_, entry) in entries.iter().filter(|(name, _)| name.starts_with("bin/") || name.starts_with("lib/")) {
        let mut rest = &entry.bytes[..];
        while let Some(at) = find(rest, b"GLIBC_") {
            rest = &rest[at + b"GLIBC_".len()..];
            let version: String =
                rest.iter().map(|&byte| char::from(byte)).take_while(|c| c.is_ascii_digit() || *c == '.').collect();
            let parts = version
                .split_once('.')
                .and_then(|(major, minor)| Some((major.parse().ok()?, minor.split('.').next()?.parse().ok()?)));
            newest = newest.max(parts);
        }
    }
    newest.map(|(major, minor)| format!("{major}.{minor}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built() -> Built {
        Built { target: "t".into(), programs: Vec::new(), llama: "/build/llama/out".into(), source: "/s".into() }
    }

    fn bundle(library: &[u8]) -> BTreeMap<String, Entry> {
        let program = b"\0$ORIGIN/../lib\0GLIBC_2.17\0GLIBC_2.34\0GLIBC_2.9\0GLIBC_PRIVATE\0".to_vec();
        let mut entries =
            BTreeMap::from([("lib/libx.so.0".to_owned(), Entry { bytes: library.to_vec(), mode: 0o755 })]);
        for name in PROGRAMS {
            entries.insert(format!("bin/{name}"), Entry { bytes: program.clone(), mode: 0o755 });
        }
        entries
    }

    #[test]
    fn a_library_that_names_a_folder_of_the_build_machine_is_found_with_the_text_around_it() {
        assert!(check_paths(&bundle(b"clean"), &built()).is_ok());
        let error = check_paths(&bundle(b"\x01\x02at /build/llama/out/x.cpp:7\0more"), &built()).unwrap_err();
        assert_eq!(error.to_string(), "lib/libx.so.0 names a folder of this machine: at /build/llama/out/x.cpp:7");
        let mut without = bundle(b"");
        without.insert("bin/minerva".to_owned(), Entry { bytes: b"$ORIGIN/lib".to_vec(), mode: 0o755 });
        assert!(check_paths(&without, &built()).unwrap_err().to_string().contains("beside itself"));
    }

    /// With stand-ins for nvcc, nvidia-smi and cmake: what is built for, and where the module goes.
    #[cfg(target_os = "linux")]
    #[test]
    fn the_cuda_script_builds_for_the_gpus_it_finds_and_puts_the_module_where_minerva_looks() {
        use std::os::unix::fs::PermissionsExt as _;

        let bundle = std::env::temp_dir().join(format!("minerva-cuda-script-{}", std::process::id()));
        let program = |path: &str, text: &str| {
            let path = bundle.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        let script = fs::read_to_string(workspace::root().join("packaging/cuda/build.sh")).unwrap();
        program("backends/cuda/build.sh", &script);
        program("bin/minerva", "#!/bin/sh\necho minerva \"$@\"\n");
        program("tools/nvcc", "#!/bin/sh\n");
        program("tools/nvidia-smi", "#!/bin/sh\nprintf '9.0\\n8.0\\n9.0\\n'\n");
        program("tools/ninja", "#!/bin/sh\n");
        program(
            "tools/cmake",
            "#!/bin/sh\necho cmake \"$@\"\n[ \"$1\" = --build ] && mkdir -p \"$2/bin\" && echo module >\"$2/bin/libggml-cuda.so\"\nexit 0\n",
        );
        let run = |vars: &[(&str, &str)]| {
            let path = format!("{}:/usr/bin:/bin", bundle.join("tools").display());
            let mut sh = std::process::Command::new(bundle.join("backends/cuda/build.sh"));
            let output = sh.env_clear().env("PATH", path).envs(vars.iter().copied()).output().unwrap();
            let text = [output.stdout, output.stderr].concat();
            (output.status.success(), String::from_utf8_lossy(&text).into_owned())
        };
        let (ok, text) = run(&[]);
        assert!(!ok && text.contains("belongs into the folder backends/cuda of a bundle"), "{text}");
        fs::create_dir_all(bundle.join("lib/minerva")).unwrap();
        let (ok, text) = run(&[("JOBS", "3")]);
        assert!(ok && text.contains("-G Ninja") && text.contains("-DCMAKE_CUDA_ARCHITECTURES=80;90"), "{text}");
        assert!(text.contains("--target ggml-cuda --parallel 3") && text.ends_with("minerva --gpu=debug\n"), "{text}");
        assert_eq!(fs::read_to_string(bundle.join("lib/minerva/libggml-cuda.so")).unwrap(), "module\n");
        let (ok, text) = run(&[("CUDA_ARCHITECTURES", "75")]);
        assert!(ok && text.contains("-DCMAKE_CUDA_ARCHITECTURES=75"), "{text}");
        program("tools/nvidia-smi", "#!/bin/sh\nexit 9\n");
        let (ok, text) = run(&[]);
        assert!(!ok && text.contains("name what to build for with CUDA_ARCHITECTURES"), "{text}");
        fs::remove_dir_all(bundle).unwrap();
    }

    #[test]
    fn a_header_that_is_not_in_the_bundle_is_missing() {
        let file = |path: &str, text: &str| (format!("backends/cuda/ggml/{path}"), Entry::text(text.to_owned()));
        let mut entries = BTreeMap::from([
            file("include/ggml.h", "#include <stdio.h>\n"),
            file("src/ggml.c", "#include \"ggml.h\"\n#include \"ggml-version.h\"\n"),
            file("src/ggml-cuda/x.cu", "# include \"../ggml-impl.h\"\n#include \"ggml-cpu/impl.h\" // for y\n"),
            file("src/ggml-impl.h", ""),
        ]);
        assert_eq!(missing_includes(&entries), ["backends/cuda/ggml/src/ggml-cuda/x.cu includes ggml-cpu/impl.h"]);
        entries.extend([file("src/ggml-cpu/impl.h", "")]);
        assert!(missing_includes(&entries).is_empty());
    }

    #[test]
    fn glibc_versions_are_numbers_not_texts() {
        assert_eq!(newest_glibc(&bundle(b"")).as_deref(), Some("2.34"));
        assert_eq!(newest_glibc(&bundle(b"GLIBC_2.38")).as_deref(), Some("2.38"));
    }
}
