//! Loads that cannot have the memory that was planned: a worker whose allocations really fail stands in for a GPU.
//!
//! Needs the default model: `cargo xtask setup` fetches it.

use std::ops::ControlFlow;
use std::process::Command;

use minerva_engine::{Engine, EngineConfig, RpcServer};
use serde_json::Value;

use crate::client::get;
use crate::process::Process;
use crate::rpc_worker::{Shrinking, Worker};

fn model() -> String {
    std::env::var("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model")
}

/// What the planner thinks of an unlimited worker: bytes of each rung, the best first, the CPU last with none.
fn rungs() -> Vec<u64> {
    let output = Command::new(env!("CARGO_BIN_EXE_minerva"))
        .args(["plan", &model(), "--device", "rpc:16GiB,ram:16GiB", "--json", "--np", "2", "--ctx", "8192"])
        .env_clear()
        .output()
        .unwrap();
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    let bytes =
        |rung: &Value| rung["devices"].as_array().unwrap().iter().map(|d| d["total_bytes"].as_u64().unwrap()).sum();
    plan["rungs"].as_array().unwrap().iter().map(bytes).collect()
}

/// The worker's own needs beside what is asked of it: it receives a tensor as a whole.
const WORKER_BYTES: u64 = 40 << 20;

#[tokio::test]
async fn a_load_that_cannot_allocate_comes_up_one_rung_lower_and_says_so() {
    let rungs = rungs();
    assert!(rungs.len() >= 4, "{rungs:?}");
    let mut layers_before = u64::MAX;
    for (n_failing, pair) in rungs.windows(2).enumerate() {
        // Room for the lower of the two, not for the higher.
        assert!(pair[0] - pair[1] > WORKER_BYTES, "{rungs:?}");
        let worker = Worker::start(Some(pair[0] - (8 << 20)));
        let args = ["-m", &model(), "--rpc", &worker.address, "--parallel", "2", "--ctx", "8192", "--threads", "1"];
        let server = Process::start(&args, &[("MINERVA_CACHE_DIR", "/nonexistent")]).await;
        let status = get(server.address, "/v1/status").await.json();
        let placement = &status["model"]["placement"];
        let steps = placement["steps_down"].as_array().unwrap();
        assert_eq!(steps.len(), n_failing + 1, "{pair:?} {placement}");
        assert!(steps.iter().all(|step| step.as_str().unwrap().starts_with("Out of memory: GPU memory exceeded: ")));
        let layers = placement["n_gpu_layers"].as_u64().unwrap();
        assert!(layers <= layers_before);
        layers_before = layers;
        let log: Vec<String> = server.log.try_iter().collect();
        let warned = log.iter().filter(|line| line.starts_with("[WARN] GPU OOM, falling back to ")).count();
        assert_eq!(warned, n_failing + 1, "{log:#?}");
        let is_last = n_failing + 2 == rungs.len();
        assert_eq!(log.iter().any(|line| line == "[WARN] GPU OOM, falling back to CPU"), is_last, "{log:#?}");
        let metrics = String::from_utf8(get(server.address, "/metrics").await.body).unwrap();
        assert!(metrics.contains(&format!("minerva_load_steps_down {}", n_failing + 1)), "{metrics}");
    }
    assert_eq!(layers_before, 0);
}

/// Starts without a fallback on a device with too little room: the table, and exit code 2.
fn is_refused_with_the_table(address: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_minerva-server"))
        .args(["-m", &model(), "--port", "0", "--rpc", address, "--no-fallback", "--parallel", "2"])
        .args(["--ctx", "8192", "--threads", "1"])
        .env_clear()
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("Out of memory: GPU memory exceeded: ") && text.contains("used of its room"), "{text}");
}

#[test]
fn without_a_fallback_the_table_is_printed_and_the_exit_code_is_2() {
    is_refused_with_the_table(&Worker::start(Some(rungs()[0] / 2)).address);
}

/// With Metal there is a GPU, and the server would serve.
#[cfg(not(feature = "metal"))]
#[test]
fn without_a_fallback_a_machine_without_a_gpu_is_no_place_for_auto() {
    let output = Command::new(env!("CARGO_BIN_EXE_minerva-server"))
        .args(["-m", &model(), "--port", "0", "--gpu=auto", "--no-fallback", "--ctx", "512"])
        .env_clear()
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("what fits:") && !text.contains("falling back to CPU"), "{text}");
    let plan = Command::new(env!("CARGO_BIN_EXE_minerva"))
        .args(["plan", "-m", &model(), "--gpu=auto", "--no-fallback", "--ctx", "512"])
        .env_clear()
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    assert_eq!(plan.status.code(), Some(2), "{}", String::from_utf8_lossy(&plan.stderr));
}

/// The server on a device that shrinks to `free_bytes` at a question: layers and steps down, after a look at its log.
async fn load_on(device: &Shrinking) -> (u64, usize) {
    let args = ["-m", &model(), "--rpc", &device.address, "--parallel", "2", "--ctx", "8192", "--threads", "1"];
    let server = Process::start(&args, &[("MINERVA_CACHE_DIR", "/nonexistent")]).await;
    let placement = get(server.address, "/v1/status").await.json()["model"]["placement"].clone();
    let steps = placement["steps_down"].as_array().unwrap();
    assert!(steps.iter().all(|step| step.as_str().unwrap().starts_with("Out of memory: GPU memory exceeded: ")));
    let log: Vec<String> = server.log.try_iter().collect();
    let warned = log.iter().filter(|line| line.starts_with("[WARN] GPU OOM, falling back to ")).count();
    assert_eq!(warned, steps.len(), "{log:#?}");
    let metrics = String::from_utf8(get(server.address, "/metrics").await.body).unwrap();
    assert!(metrics.contains(&format!("minerva_load_steps_down {}", steps.len())), "{metrics}");
    (placement["n_gpu_layers"].as_u64().unwrap(), steps.len())
}

#[tokio::test]
async fn a_device_that_shrinks_between_plan_and_load_costs_one_rung() {
    let rungs = rungs();
    let less = rungs[0] - (8 << 20); // room for the second rung, not for the first
    let worker = Worker::start(None);
    let steady = Shrinking::between(&worker, usize::MAX, less);
    let (all_layers, n_steps) = load_on(&steady).await;
    assert_eq!(n_steps, 0);

    // At whichever question it shrinks: first the plan is already a smaller one, then the load finds out, then it is too late.
    let mut outcomes = Vec::new();
    for first in 1..=steady.n_asked() {
        let worker = Worker::start(None);
        outcomes.push(load_on(&Shrinking::between(&worker, first, less)).await);
    }
    let found_out = outcomes.iter().filter(|(_, n_steps)| *n_steps == 1).count();
    assert!(found_out > 0 && outcomes.iter().all(|(_, n_steps)| *n_steps <= 1), "{outcomes:?}");
    let begins = outcomes.iter().position(|(_, n_steps)| *n_steps == 1).unwrap();
    assert!(outcomes[..begins].iter().all(|(layers, _)| *layers < all_layers), "planned with less: {outcomes:?}");
    let (during, after) = outcomes[begins..].split_at(found_out);
    assert!(during.iter().all(|&(layers, n_steps)| layers < all_layers && n_steps == 1), "{outcomes:?}");
    assert!(after.iter().all(|&(layers, _)| layers == all_layers), "loaded before it shrank: {outcomes:?}");

    // Without a fallback the table is shown instead.
    let worker = Worker::start(None);
    let device = Shrinking::between(&worker, begins + 1, less);
    is_refused_with_the_table(&device.address);
}

/// Resident bytes, open files and threads of this process.
fn held() -> [u64; 3] {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let number = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let n_files = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    [number("VmRSS:") << 10, n_files, number("Threads:")]
}

#[test]
#[cfg(target_os = "linux")]
fn engines_that_step_down_to_the_cpu_again_and_again_leave_nothing_behind() {
    let this = std::env::current_exe().unwrap();
    let inside = ["--exact", "ladder::inside_step_down_again_and_again", "--ignored", "--nocapture"];
    let output = Command::new(this).args(inside).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
    println!("{printed}");
}

/// `FAILING_LOADS` says how many.
#[test]
#[ignore = "run by engines_that_step_down_to_the_cpu_again_and_again_leave_nothing_behind"]
fn inside_step_down_again_and_again() {
    let n: usize = std::env::var("FAILING_LOADS").map_or(12, |text| text.parse().unwrap());
    let worker = Worker::start(Some(WORKER_BYTES));
    let config = EngineConfig {
        rpc_servers: vec![RpcServer::new(&worker.address)],
        n_seq_max: Some(2),
        context_length_tokens: Some(4096),
        n_threads: Some(1),
        ..EngineConfig::new(model())
    };
    let load = || {
        let engine = Engine::load(config.clone(), |_| ControlFlow::Continue(())).unwrap();
        let placement = &engine.info().placement;
        assert!(placement.n_gpu_layers == 0 && placement.steps_down.len() >= 3, "{placement:?}");
    };
    (0..6).for_each(|_| load());
    let before = held();
    (0..n).for_each(|_| load());
    let after = held();
    println!("{n} loads that stepped down to the CPU: {before:?} -> {after:?} (resident bytes, files, threads)");
    assert_eq!(before[1..], after[1..]);
    assert!(after[0] < before[0] + (16 << 20), "{before:?} -> {after:?}");
}
