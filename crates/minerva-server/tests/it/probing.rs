//! The server with a driver library that hangs, crashes or lies: it starts all the same, in time, and says why.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::client::{get, post};
use crate::process::Process;

/// The fake driver of minerva-gpu's tests, where the system's loader finds it; removed with this.
struct FakeDriver(PathBuf);

impl FakeDriver {
    fn build(name: &str, vars: &[(&str, &str)]) -> Self {
        let driver = Self(std::env::temp_dir().join(format!("minerva-driver-{}-{name}", std::process::id())));
        let _ = std::fs::remove_dir_all(&driver.0);
        std::fs::create_dir_all(&driver.0).unwrap();
        let status = Command::new(std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned()))
            .args([
                "--edition=2024",
                "--crate-type=cdylib",
                "--crate-name=nvml",
                "-Cpanic=abort",
                "-Aunexpected_cfgs",
                "-o",
            ])
            .arg(driver.0.join("libnvidia-ml.so.1"))
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../minerva-gpu/tests/fake/nvml.rs"))
            .envs(vars.iter().copied())
            .status()
            .unwrap();
        assert!(status.success());
        driver
    }

    /// This library before every other one.
    fn search_path(&self) -> String {
        let others = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
        format!("{}:{others}", self.0.display())
    }
}

impl Drop for FakeDriver {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn model() -> String {
    std::env::var("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model")
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_hangs_or_crashes_costs_a_line_and_not_the_server() {
    for (name, vars, words) in [
        ("hang", ("FAKE_HANG", "init"), "the NVIDIA driver library did not answer for 3.0 s"),
        ("hang-later", ("FAKE_HANG", "name"), "the NVIDIA driver library did not answer for 3.0 s"),
        ("crash", ("FAKE_CRASH", "init"), "the NVIDIA driver library crashed (aborted"),
    ] {
        let driver = FakeDriver::build(name, &[vars]);
        let (path, model) = (driver.search_path(), model());
        let started = Instant::now();
        let args = ["-m", &model, "--ctx", "256", "-np", "1", "-t", "1"];
        let process = Process::start(&args, &[("LD_LIBRARY_PATH", &path)]).await;
        assert!(started.elapsed() < Duration::from_secs(10), "{name}: ready after {:?}", started.elapsed());
        let said = |line: &String| line.starts_with("[WARN]") && line.contains(words);
        assert!(process.first_lines.iter().any(said), "{name}: {:?}", process.first_lines);
        let body = r#"{"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}"#;
        let answer = post(process.address, "/v1/completions", body).await.json();
        assert!(answer["choices"][0]["text"].as_str().unwrap().contains("Paris"), "{answer}");
        let status = get(process.address, "/v1/status").await.json();
        assert_eq!(status["probe"]["problems"][0]["subject"], "driver", "{status}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_signal_while_a_driver_hangs_ends_the_server_at_once() {
    let driver = FakeDriver::build("signal", &[("FAKE_HANG", "init")]);
    let mut server = Command::new(env!("CARGO_BIN_EXE_minerva-server"));
    server.args(["--port", "0", "-m", &model()]).env_clear().env("LD_LIBRARY_PATH", driver.search_path());
    let mut server = server.stderr(std::process::Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert!(server.try_wait().unwrap().is_none(), "the driver does not hang");
    let sent = Instant::now();
    assert!(Command::new("kill").arg(server.id().to_string()).status().unwrap().success());
    let status = server.wait().unwrap();
    // By itself and not by the signal, which the first process of a container would not feel.
    assert_eq!(status.code(), Some(0));
    assert!(sent.elapsed() < Duration::from_secs(1), "{:?}", sent.elapsed());
}

#[cfg(target_os = "linux")]
#[test]
fn the_doctor_says_what_a_driver_that_fails_or_lies_does_and_what_to_do() {
    for (name, vars, words) in [
        ("refuses", ("FAKE_INIT", "9"), "sudo modprobe nvidia"),
        ("fails", ("FAKE_ERROR", "count"), "the NVIDIA driver cannot count its GPUs"),
        ("memory", ("FAKE_ERROR", "memory"), "its memory cannot be read"),
        ("free", ("FAKE_LIE", "free"), "the driver says that 81.0 GiB of 80.0 GiB are free"),
        ("count", ("FAKE_LIE", "count"), "counts 4000000000 GPUs, which cannot be"),
        ("old", ("FAKE_DRIVER", "460.91.03"), "the NVIDIA driver is 460.91.03, 470 or newer is needed"),
    ] {
        let driver = FakeDriver::build(name, &[vars]);
        let mut doctor = Command::new(env!("CARGO_BIN_EXE_minerva"));
        doctor.arg("doctor").env_clear().env("LD_LIBRARY_PATH", driver.search_path());
        let output = doctor.env("CUDA_VISIBLE_DEVICES", "GPU-h100").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{name}: {text}");
        let advice = text.split("What to do").nth(1).unwrap_or_default();
        assert!(advice.contains(words), "{name}: {text}");
        assert!(text.contains("`--gpu=auto` runs on cpu"), "{name}: {text}");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_program_whose_backends_crash_starts_anew_with_the_gpus_hidden() {
    let library = std::env::temp_dir().join(format!("minerva-preload-{}.so", std::process::id()));
    let status = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/crash_with_gpus.c"))
        .arg("-ldl")
        .status()
        .unwrap();
    assert!(status.success());
    let libraries = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let vars = [("LD_PRELOAD", library.to_str().unwrap()), ("LD_LIBRARY_PATH", libraries.as_str())];
    let model = model();
    let process = Process::start(&["-m", &model, "--ctx", "256", "-np", "1", "-t", "1"], &vars).await;
    let log = process.first_lines.join("\n");
    assert!(
        log.contains("[WARN] this program's set of backends crashed (segmentation fault) while it was loaded"),
        "{log}"
    );
    assert!(log.contains("[WARN] starting anew with the GPUs hidden"), "{log}");
    let status = get(process.address, "/v1/status").await.json();
    assert_eq!(status["probe"]["problems"][0]["subject"], "backends", "{status}");

    let mut minerva = Command::new(env!("CARGO_BIN_EXE_minerva"));
    let output = minerva.args(["--gpu=cuda", "--port", "0", "-m", &model]).env_clear().envs(vars).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1), "{text}");
    assert!(text.contains("the CUDA backend cannot be used: this program's set of backends crashed"), "{text}");
    std::fs::remove_file(&library).unwrap();
}

#[test]
fn a_finding_is_kept_between_starts_and_the_doctor_finds_out_anew() {
    let home = std::env::temp_dir().join(format!("minerva-probe-home-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&home);
    let run = |args: &[&str]| {
        let mut minerva = Command::new(env!("CARGO_BIN_EXE_minerva"));
        minerva.args(args).env_clear().env("LD_LIBRARY_PATH", std::env::var("LD_LIBRARY_PATH").unwrap_or_default());
        let output = minerva.env("HOME", &home).env("XDG_CACHE_HOME", &home).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(!run(&["--gpu=debug"]).contains("as found earlier"));
    assert!(home.join("minerva/probe.json").is_file());
    assert!(run(&["--gpu=debug"]).contains("as found earlier"));
    assert!(!run(&["doctor"]).contains("as found earlier"));
    assert!(run(&["--gpu=debug", "--no-probe"]).contains("switched off"));
    std::fs::remove_dir_all(&home).unwrap();
}
