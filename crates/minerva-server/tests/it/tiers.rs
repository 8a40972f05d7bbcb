//! The disk cache and warmed prompts, with the real binary over the simulator.

use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::client;
use crate::process::Process;

fn prompt(salt: usize) -> String {
    (0..400).map(|i| char::from(b'a' + ((i * 7 + i / 26 * salt + salt) % 26) as u8)).collect()
}

async fn cached(process: &Process, prompt: &str) -> u64 {
    let body = json!({"prompt": prompt, "max_tokens": 2});
    let reply = client::post(process.address, "/v1/completions", &body.to_string()).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

#[tokio::test]
async fn a_prompt_is_there_after_the_server_was_restarted() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("kv").display().to_string();
    let args = ["--simulate", "1", "--cache-disk-size", "16mb", "--cache-dir", folder.as_str()];
    let mut first = Process::start(&args, &[]).await;
    assert_eq!(cached(&first, &prompt(1)).await, 0);
    first.signal("-TERM");
    assert!(first.wait(Duration::from_secs(20)).success());
    let second = Process::start(&args, &[]).await;
    assert_eq!(cached(&second, &prompt(1)).await, 399);
    let status = client::get(second.address, "/v1/status").await.json();
    let disk = &status["engine"]["disk_cache"];
    assert_eq!((&disk["limit_bytes"], &disk["hits_total"]), (&json!(16 << 20), &json!(1)), "{status:#}");
    let metrics = client::get(second.address, "/metrics").await.text();
    assert!(metrics.contains("minerva_disk_cache_hits_total 1\n"), "{metrics}");
    assert!(metrics.contains("minerva_disk_cache_drops_total{reason=\"checksum\"} 0\n"), "{metrics}");
}

#[tokio::test]
async fn warmed_prompts_are_there_for_every_key_before_the_first_request() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("warm.jsonl");
    std::fs::write(&file, format!("{}\n{}\n", prompt(1), json!({"prompt": prompt(2), "pin": false}))).unwrap();
    let file = file.display().to_string();
    let process = Process::start(&["--simulate", "1", "--warm", file.as_str()], &[]).await;
    for salt in [1, 2] {
        assert_eq!(cached(&process, &format!("{} and more", prompt(salt))).await, 400, "{salt}");
    }
    assert_eq!(cached(&process, &prompt(3)).await, 0);
}

#[test]
fn a_bad_line_and_too_many_pinned_prompts_end_the_start_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("warm.txt");
    let start = |text: &str, more: &[&str]| {
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_minerva-server"));
        command.args(["--port", "0", "--simulate", "1", "--warm"]).arg(&file).args(more).env_clear();
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, text) = start("one\n{\"prompt\": 3}\n", &[]);
    assert!(code == Some(2) && text.contains("warm.txt") && text.contains("line 2"), "{code:?} {text}");
    let (code, text) = start(&format!("one\n\n{}\n", "a".repeat(2_000)), &[]);
    assert!(code == Some(1) && text.contains("line 3") && text.contains("1024 tokens"), "{code:?} {text}");
    let (code, text) = start(&prompt(1), &["--cache-size", "0"]);
    assert!(code == Some(1) && text.contains("1600 bytes") && text.contains("the limit is 0 bytes"), "{code:?} {text}");
}
