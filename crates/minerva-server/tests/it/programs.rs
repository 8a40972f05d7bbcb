//! The binaries: exit codes, `minerva config`, and what the log never says.

use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::client::post;
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
