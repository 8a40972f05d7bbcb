//! The binaries: exit codes, `minerva config`, and what the log never says.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::client::{get, post};
use crate::process::Process;

#[test]
fn a_configuration_that_cannot_be_used_is_exit_code_2() {
    for (args, text) in [
        (vec!["--simulate", "0", "--host", "0.0.0.0"], "no API key is set"),
        (vec!["--port", "70000"], "`--port` is `70000`"),
        (vec!["--nonsense"], "unexpected argument"),
        (vec![], "no model"),
        (vec!["--config", "/nowhere/config.json"], "/nowhere/config.json"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_minerva-server")).args(&args).env_clear().output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?} {stderr}");
        assert!(stderr.contains(text), "{args:?} {stderr}");
    }
    let output = Command::new(env!("CARGO_BIN_EXE_minerva"))
        .args(["config"])
        .env_clear()
        .env("MINERVA_PORT", "9")
        .output()
        .unwrap();
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success()
            && table.lines().any(|line| {
                let words: Vec<_> = line.split_whitespace().collect();
                words == ["server.port", "9", "MINERVA_PORT"]
            }),
        "{table}"
    );
}

#[test]
fn a_model_that_cannot_be_loaded_is_exit_code_1() {
    let mut server = Command::new(env!("CARGO_BIN_EXE_minerva-server"));
    let output = server.args(["--port", "0", "-m", "/nowhere/at/all.gguf"]).env_clear().output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("[ERROR] cannot load the model"), "{stderr}");
}

#[test]
fn gpu_debug_prints_the_whole_diagnosis_and_a_gpu_that_is_not_there_is_an_error() {
    let run = |args: &[&str]| Command::new(env!("CARGO_BIN_EXE_minerva")).args(args).env_clear().output().unwrap();
    let output = run(&["--gpu=debug"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    for part in ["Selection", "selected", "Build", "llama.cpp", "CPU features"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    if cfg!(not(feature = "cuda")) {
        let output = run(&["--gpu=cuda", "--port", "0", "-m", "/nowhere/at/all.gguf"]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && text.contains("--features cuda"), "{text}");
    }
}

#[test]
fn a_worker_on_an_open_address_needs_consent_and_so_does_a_server_that_uses_one_elsewhere() {
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_minerva")).args(args).env_clear().output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, text) = run(&["rpc-worker", "--host", "0.0.0.0", "--port", "0"]);
    assert!(code == Some(1) && text.contains("has no authentication"), "{code:?} {text}");
    let (code, text) = run(&["--rpc", "192.0.2.1:50052", "-m", "a.gguf"]);
    assert!(code == Some(2) && text.contains("--rpc-insecure"), "{code:?} {text}");
    let (code, text) = run(&["rpc-worker", "--device", "CUDA99"]);
    assert!(code == Some(1) && text.contains("there is no device `CUDA99`"), "{code:?} {text}");
    let (code, text) = run(&["--rpc", "127.0.0.1:1", "--port", "0", "-m", &model()]);
    assert!(code == Some(1) && text.contains("cannot connect to the RPC server 127.0.0.1:1"), "{code:?} {text}");
}

fn model() -> String {
    std::env::var("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model")
}

/// With the real model, because the simulator has no layers: some on the worker, the rest here.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_a_worker_puts_layers_there_and_outlives_it() {
    let mut worker = Command::new(env!("CARGO_BIN_EXE_minerva"))
        .args(["rpc-worker", "--port", "0", "--threads", "1"])
        .env_clear()
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(worker.stderr.take().unwrap()).lines();
    let address = lines
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix("[INFO] lending devices on ").map(ToOwned::to_owned))
        .expect("the worker says where it listens");
    while std::net::TcpStream::connect(&address).is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await; // it says so just before it does
    }
    let (model, rpc) = (model(), format!("{address}=400mb"));
    let args = ["-m", &model, "--rpc", &rpc, "-ngl", "12", "--ctx", "512", "-np", "1", "-t", "1"];
    let mut process = Process::start(&args, &[]).await;
    let status = get(process.address, "/v1/status").await.json();
    let placement = &status["model"]["placement"];
    assert_eq!((&placement["device"], &placement["n_gpu_layers"]), (&json!("Rpc"), &json!(12)), "{status}");
    assert!(placement["reason"].as_str().unwrap().contains(&address), "{status}");
    let memory = placement["memory"].as_array().unwrap();
    assert!(memory.iter().all(|device| device["weights_bytes"].as_u64() > Some(10 << 20)), "{status}");
    let body = r#"{"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}"#;
    let answer = post(process.address, "/v1/completions", body).await.json();
    assert!(answer["choices"][0]["text"].as_str().unwrap().contains("Paris"), "{answer}");

    worker.kill().unwrap();
    worker.wait().unwrap();
    assert_eq!(get(process.address, "/health/ready").await.status, 200);
    for _ in 0..3 {
        let answer = post(process.address, "/v1/completions", body).await;
        assert_eq!(answer.status, 500, "{}", answer.text());
    }
    let ready = get(process.address, "/health/ready").await;
    assert_eq!((ready.status, ready.json()), (503, json!({"status": "failing"})), "every step fails");
    assert_eq!(get(process.address, "/health/live").await.status, 200);
    process.signal("-TERM");
    assert_eq!(process.wait(Duration::from_secs(10)).code(), Some(0));
    let log: Vec<String> = process.log.iter().collect();
    assert!(log.iter().any(|line| line.contains("the RPC server is lost")), "{log:#?}");
}

#[test]
fn the_reference_does_not_depend_on_the_machine() {
    let reference = |port: &str| {
        let mut minerva = Command::new(env!("CARGO_BIN_EXE_minerva"));
        let output = minerva.args(["config", "--markdown"]).env("MINERVA_PORT", port).output().unwrap();
        assert!(output.status.success());
        output.stdout
    };
    assert_eq!(reference("9"), reference("not a port"));
    assert!(reference("9").starts_with(b"# Configuration\n"));
}

/// Prompts are other people's business: not even at the chattiest level, and not in errors.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_request_is_logged_at_any_level() {
    let mut process =
        Process::start(&["--simulate", "0"], &[("RUST_LOG", "trace"), ("MINERVA_API_KEY", "sk-canary")]).await;
    let canary = "canary-7f3a";
    let key = "authorization: Bearer sk-canary\r\n";
    for (path, body) in [
        ("/v1/completions", json!({"prompt": canary, "max_tokens": 3, "stop": canary}).to_string()),
        ("/v1/completions", json!({"prompt": canary, "max_tokens": 3, "stream": true, "user": canary}).to_string()),
        ("/v1/completions", json!({"prompt": {"a": canary}}).to_string()),
        ("/v1/completions", format!("{{\"prompt\": \"{canary}\" {canary}")),
        ("/v1/completions", json!({"prompt": "x", "model": canary}).to_string()),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": canary}], "max_tokens": 2}).to_string(),
        ),
        ("/v1/chat/completions", json!({"messages": [{"role": canary, "content": "x"}]}).to_string()),
        ("/v1/completions", json!({"prompt": canary.repeat(1000)}).to_string()),
    ] {
        crate::client::post_with(process.address, path, key, body.as_bytes()).await;
    }
    assert_eq!(post(process.address, "/v1/completions", "{}").await.status, 401);
    process.signal("-TERM");
    assert_eq!(process.wait(Duration::from_secs(5)).code(), Some(0));
    let log: Vec<String> = process.log.iter().collect();
    assert!(log.iter().any(|line| line.contains("request refused")), "{log:#?}");
    let leaks: Vec<_> = log.iter().filter(|line| line.contains("canary")).collect();
    assert!(leaks.is_empty(), "{leaks:#?}");
}
