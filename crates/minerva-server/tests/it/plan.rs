//! `minerva plan`: it takes a server's command line, and plans what that server loads.
//!
//! Needs the default model: `cargo xtask setup` fetches it.

use std::process::Command;
use std::time::{Duration, Instant};

use minerva_gpu::gguf::Header;
use minerva_gpu::synthetic;
use serde_json::{Value, json};

use crate::client::{get, post};
use crate::process::Process;

fn model() -> String {
    std::env::var("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model")
}

fn plan(args: &[&str]) -> Value {
    let mut minerva = Command::new(env!("CARGO_BIN_EXE_minerva"));
    let output = minerva.args(["plan", "--json"]).args(args).env_clear().output().unwrap();
    assert!(output.status.success(), "{args:?} {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_line_of_the_server_gives_the_plan_that_the_server_loads() {
    let model = model();
    #[rustfmt::skip] // as it is typed
    let line = [
        "-m", &model, "-a", "small", "--gpu=cpu", "--gpu-memory-limit", "2gb", "-ngl", "all", "-np", "3", "-c", "6144",
        "--ctx", "2048", "-t", "1", "-tb", "1", "-b", "512", "-ub=128", "-kvu", "--no-mmap", "--no-repack", "-fa", "on",
        "-ctk", "q8_0", "-ctv", "q8_0", "--host", "127.0.0.1", "--max-queued-requests", "9", "--grace", "1",
    ];
    let plan = plan(&[&["--port", "0"], &line[..]].concat());
    let rung = &plan["rungs"][0];
    assert_eq!((&plan["devices"], &rung["n_gpu_layers"]), (&json!([]), &json!(0)), "{plan:#}");
    for (key, value) in [
        ("n_sequences", json!(3)),
        ("n_cells", json!(6144)),
        ("context_tokens", json!(2048)),
        ("batch_tokens", json!(512)),
        ("ubatch_tokens", json!(128)),
        ("cache_type_k", json!("q8_0")),
        ("kv_unified", json!(true)),
    ] {
        assert_eq!(rung[key], value, "{key} of {rung:#}");
    }
    assert_eq!((&plan["host"]["limit_bytes"], &plan["host"]["maps_weights"]), (&json!(2_u64 << 30), &json!(false)));

    let server = Process::start(&line, &[]).await;
    let status = get(server.address, "/v1/status").await.json();
    let memory = &status["model"]["placement"]["memory"];
    assert_eq!(memory[0]["planned_bytes"], rung["host"]["total_bytes"], "{memory} {rung}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draft_model_is_planned_loaded_shown_and_counted() {
    let model = model();
    #[rustfmt::skip] // as it is typed
    let line = [
        "-m", &model, "-md", &model, "--gpu=cpu", "-np", "2", "--ctx", "1024", "-cd", "512", "--draft-p-min", "0", "-t", "1",
        "--tune=off", "--speculation", "draft",
    ];
    let plan = plan(&[&["--port", "0"], &line[..]].concat());
    let draft = &plan["rungs"][0]["draft"];
    assert_eq!((&draft["n_cells"], &draft["n_gpu_layers"], &draft["device"]), (&json!(512), &json!(0), &json!(null)));
    assert_eq!(plan["rungs"][1]["draft"], json!(null), "{plan:#}");
    assert_eq!(plan["rungs"][1]["gave_up"], json!(["the draft model"]), "{plan:#}");

    let server = Process::start(&line, &[]).await;
    let status = get(server.address, "/v1/status").await.json();
    let memory = &status["model"]["draft"]["memory"][0];
    assert_eq!(memory["planned_bytes"], draft["host"]["total_bytes"], "{status:#}");
    let body =
        json!({"prompt": "The history of the lighthouse", "max_tokens": 40, "temperature": 0, "ignore_eos": true});
    let answer = post(server.address, "/v1/completions", &body.to_string()).await.json();
    let (n, right) = (answer["timings"]["draft_n"].as_u64(), answer["timings"]["draft_n_accepted"].as_u64());
    assert!(n >= Some(1) && right <= n, "{answer}");
    let counted = format!("minerva_draft_tokens_total {}\n", n.unwrap_or(0));
    let began = Instant::now();
    while !get(server.address, "/metrics").await.text().contains(&counted) {
        // A step is counted when all that it said is on its way.
        assert!(began.elapsed() < Duration::from_secs(10), "never {counted}");
    }
    let mut without = body;
    without["speculate"] = json!(false);
    let off = post(server.address, "/v1/completions", &without.to_string()).await.json();
    assert_eq!(off["choices"], answer["choices"]);
    assert_eq!(off["timings"]["draft_n"], json!(null), "{off}");
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_are_planned_loaded_and_shown() {
    let model = model();
    let dir = tempfile::tempdir().unwrap();
    let adapter = dir.path().join("style.gguf");
    let header = Header::open(model.as_ref()).unwrap();
    synthetic::adapter(&header, 16, |_| true).write_random(&adapter, 1, &mut |_| {}).unwrap();
    let scaled = format!("{}:0.5", adapter.display());
    let line = ["-m", &model, "--gpu=cpu", "-np", "2", "--ctx", "1024", "-t", "1", "--tune=off", "--no-mmap"];
    let host_bytes = |plan: &Value| plan["rungs"][0]["host"]["total_bytes"].as_u64().unwrap();
    let bare = host_bytes(&plan(&line));
    let line = [&line[..], &["--lora", &scaled]].concat();
    let planned = host_bytes(&plan(&line));
    let adapter_bytes = adapter.metadata().unwrap().len();
    assert!(planned > bare + adapter_bytes / 2, "{planned} {bare} {adapter_bytes}");

    let server = Process::start(&line, &[]).await;
    let status = get(server.address, "/v1/status").await.json();
    assert_eq!(status["model"]["adapters"], json!([{"name": "style", "scale": 0.5}]));
    let memory = &status["model"]["placement"]["memory"][0];
    assert_eq!(memory["planned_bytes"], json!(planned), "{status:#}");
    let taken =
        ["weights_bytes", "kv_bytes", "compute_bytes"].map(|key| memory[key].as_u64().unwrap()).iter().sum::<u64>();
    assert!(taken.abs_diff(planned) <= 1 << 20, "{taken} {planned}");
    let body = json!({"prompt": "The lighthouse", "max_tokens": 4, "temperature": 0});
    let answer = post(server.address, "/v1/completions", &body.to_string()).await.json();
    assert_eq!(answer["usage"]["completion_tokens"], json!(4), "{answer}");
}

#[test]
fn a_file_that_is_no_adapter_of_the_model_is_refused_before_anything_is_loaded() {
    for (file, says) in [(model(), "`general.type` is"), ("nothing.gguf".to_owned(), "nothing.gguf")] {
        let mut minerva = Command::new(env!("CARGO_BIN_EXE_minerva"));
        let args = ["plan", "-m", &model(), "--lora", &file, "--gpu=cpu"];
        let output = minerva.args(args).env_clear().output().unwrap();
        let problem = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{problem}");
        assert!(problem.contains("`lora`") && problem.contains(says), "{problem}");
    }
}

#[test]
fn a_draft_model_that_does_not_fit_the_model_is_refused_before_anything_is_loaded() {
    let mut minerva = Command::new(env!("CARGO_BIN_EXE_minerva"));
    let args = ["plan", "-m", &model(), "-md", "nothing.gguf", "--gpu=cpu"];
    let output = minerva.args(args).env_clear().output().unwrap();
    let problem = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{problem}");
    assert!(problem.contains("`model-draft` cannot be read"), "{problem}");
}

#[test]
fn a_plan_leaves_room_for_a_projector_on_a_device_or_on_the_host() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("mmproj.gguf");
    minerva_gpu::synthetic::projector("mmproj-vit-b").unwrap().write_header_only(&file).unwrap();
    let file = file.to_str().unwrap();
    let (model, machine) = (model(), "cuda:8GiB,ram:16GiB");
    let line = [model.as_str(), "--device", machine, "-np", "1", "--mmproj", file];
    let beside = plan(&line);
    let projector = &beside["rungs"][0]["projector"];
    assert_eq!((&projector["device"], &projector["is_bound"]), (&json!(0), &json!(false)), "{beside:#}");
    assert!(projector["device_bytes"]["weights_bytes"].as_u64() > Some(100 << 20), "{beside:#}");
    assert_eq!(beside["rungs"][1]["projector"]["device"], json!(null), "{beside:#}");
    let on_host = plan(&[&line[..], &["--no-mmproj-offload"]].concat());
    let projector = &on_host["rungs"][0]["projector"];
    assert_eq!((&projector["device"], &on_host["rungs"][0]["gave_up"]), (&json!(null), &json!([])), "{on_host:#}");
    assert!(projector["host"]["weights_bytes"].as_u64() > Some(100 << 20), "{on_host:#}");
}

#[test]
fn a_file_that_is_no_projector_is_refused() {
    let model = model();
    let mut minerva = Command::new(env!("CARGO_BIN_EXE_minerva"));
    let output = minerva.args(["plan", &model, "--mmproj", &model, "--gpu=cpu"]).env_clear().output().unwrap();
    let problem = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{problem}");
    assert!(problem.contains("`mmproj` is no projector"), "{problem}");
}

#[test]
fn a_machine_that_does_not_exist_takes_the_place_of_this_one_and_keeps_the_limit() {
    let (model, machine) = (model(), "cuda:8GiB,ram:16GiB");
    for args in [
        ["--gpu=cpu", "--device", machine, "--gpu-memory-limit", "2gb", "--no-mmap", &model],
        [&model, "--no-mmap", "--gpu-memory-limit", "2gb", "--device", machine, "--gpu=cpu"],
    ] {
        let plan = plan(&args);
        assert_eq!(plan["devices"][0]["limit_bytes"], json!(2_u64 << 30), "{plan:#}");
        assert_eq!(plan["host"]["maps_weights"], json!(false), "{plan:#}");
        assert_eq!(plan["rungs"][0]["n_gpu_layers"], json!(31), "{plan:#}");
    }
    let on_cpu = plan(&[&model, "--device", "cpu"]);
    assert_eq!(on_cpu["devices"], json!([]), "the alias of --gpu: {on_cpu:#}");
}
