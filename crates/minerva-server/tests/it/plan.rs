//! `minerva plan`: it takes a server's command line, and plans what that server loads.
//!
//! Needs the default model: `cargo xtask setup` fetches it.

use std::process::Command;

use serde_json::{Value, json};

use crate::client::get;
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
