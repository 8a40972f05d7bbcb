//! Backend modules that crash, hang or lie, in a build that has modules: the server starts on what is left and says why.
//!
//! `cargo test --release -p minerva-server --features dynamic-backends modules` (a build of llama.cpp of its own).

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::client::{get, post};
use crate::process::Process;

/// The modules of this build, as the probe finds them.
fn real_modules() -> Vec<PathBuf> {
    let output = Command::new(env!("CARGO_BIN_EXE_minerva-server")).arg("__probe").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = |line: &str| {
        serde_json::from_str::<serde_json::Value>(line).unwrap()["loaded"]["module"].as_str().map(PathBuf::from)
    };
    text.lines().filter_map(line).collect()
}

/// A folder with this build's modules and a broken one, which is removed with it.
struct Folder(PathBuf);

impl Folder {
    fn with(file: &str, mode: &str) -> Self {
        let real = real_modules();
        let of_build = real[0].parent().unwrap();
        let folder = Self(std::env::temp_dir().join(format!("minerva-modules-{}-{file}-{mode}", std::process::id())));
        let _ = std::fs::remove_dir_all(&folder.0);
        std::fs::create_dir_all(&folder.0).unwrap();
        for module in std::fs::read_dir(of_build).unwrap() {
            let module = module.unwrap();
            std::os::unix::fs::symlink(module.path(), folder.0.join(module.file_name())).unwrap();
        }
        let cache = std::fs::read_to_string(of_build.parent().unwrap().join("build/CMakeCache.txt")).unwrap();
        let source = cache.lines().find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL=")).unwrap();
        let name = if file.contains("cuda") { "CUDA0" } else { "CPU" };
        let status = Command::new("c++")
            .args(["-std=c++17", "-shared", "-fPIC", "-o"])
            .arg(folder.0.join(file))
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/broken_module.cpp"))
            .args([format!("-I{source}/ggml/include"), format!("-I{source}/ggml/src")])
            .args([format!("-DMODE=\"{mode}\""), format!("-DNAME=\"{name}\"")])
            .arg(format!("-DREAL=\"{}\"", real[0].display()))
            .status()
            .unwrap();
        assert!(status.success());
        folder
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn model() -> String {
    std::env::var("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model")
}

fn minerva(folder: &Folder, args: &[&str]) -> Output {
    let mut minerva = Command::new(env!("CARGO_BIN_EXE_minerva"));
    minerva.args(args).env("MINERVA_BACKENDS_DIR", folder.path()).env_remove("HOME").output().unwrap()
}

/// Starts the server with this module among its others, waits for an answer, and returns its log up to then.
async fn serve(folder: &Folder) -> (Vec<String>, serde_json::Value) {
    let libraries = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let model = model();
    let args = ["-m", &model, "--ctx", "256", "-np", "1", "-t", "1", "--probe-time", "2"];
    let vars = [("MINERVA_BACKENDS_DIR", folder.path()), ("LD_LIBRARY_PATH", libraries.as_str())];
    let started = Instant::now();
    let process = Process::start(&args, &vars).await;
    assert!(started.elapsed() < Duration::from_secs(10), "ready after {:?}", started.elapsed());
    let body = r#"{"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}"#;
    let answer = post(process.address, "/v1/completions", body).await.json();
    assert!(answer["choices"][0]["text"].as_str().unwrap().contains("Paris"), "{answer}");
    let status = get(process.address, "/v1/status").await.json();
    (process.first_lines.iter().cloned().chain(process.log.try_iter()).collect(), status)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_starts_without_a_module_that_breaks_and_says_why() {
    const CUDA: &str = "libggml-cuda.so";
    const CPU: &str = "libggml-cpu-zzz.so";
    for (file, mode, words) in [
        (CUDA, "load", "the module libggml-cuda.so crashed (segmentation fault) while it was loaded"),
        (CUDA, "init", "the module libggml-cuda.so crashed (aborted) while it was loaded"),
        (CUDA, "hang", "the module libggml-cuda.so did not answer for 2.0 s while it was loaded"),
        (CUDA, "version", "incompatible API version"),
        (CUDA, "product", "the device CUDA0 crashed (illegal instruction) on its first product"),
        (CUDA, "wrong", "the device CUDA0 computed wrong numbers"),
        (CPU, "load", "the module libggml-cpu-zzz.so crashed (segmentation fault) while it was loaded"),
        (CPU, "product", "the module libggml-cpu-zzz.so crashed (illegal instruction) on its first product"),
        (CPU, "wrong", "the module libggml-cpu-zzz.so computed wrong numbers"),
    ] {
        let folder = Folder::with(file, mode);
        let (log, status) = serve(&folder).await;
        let said = log.iter().any(|line| line.starts_with("[WARN]") && line.contains(words));
        assert!(said, "{file} {mode}: {}", log.join("\n"));
        let problem = &status["probe"]["problems"][0]["subject"];
        assert!(problem.to_string().contains(if words.contains("CUDA0") { "CUDA0" } else { file }), "{status}");

        let doctor = minerva(&folder, &["doctor", "--probe-time", "2"]);
        let text = String::from_utf8_lossy(&doctor.stdout);
        assert!(doctor.status.success() && text.contains("What to do") && text.contains("cpu "), "{text}");
        if file == CUDA {
            // Never silently the CPU: who asks for CUDA hears why there is none.
            let output = minerva(&folder, &["--gpu=cuda", "--port", "0", "-m", &model(), "--probe-time", "2"]);
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.code() == Some(1) && text.contains("`--gpu=cuda` was asked for, but"),
                "{mode}: {text}"
            );
            assert!(!text.contains("no CUDA backend"), "{mode}: {text}");
        }
    }
}

#[test]
fn a_folder_without_a_cpu_module_is_an_error_that_says_so() {
    let folder = Folder(std::env::temp_dir().join(format!("minerva-modules-{}-none", std::process::id())));
    std::fs::create_dir_all(Path::new(folder.path())).unwrap();
    let output = minerva(&folder, &["--port", "0", "-m", &model()]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && text.contains("no backend for the CPU was found"), "{text}");
    assert_eq!(minerva(&folder, &["doctor"]).status.code(), Some(1));
}
