//! Loads that cannot have the memory that was planned: a worker whose allocations really fail stands in for a GPU.
//!
//! Needs the default model: `cargo xtask setup` fetches it.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::client::get;
use crate::process::Process;

/// `minerva rpc-worker` with so many bytes to allocate.
struct Worker {
    child: Child,
    address: String,
}

impl Worker {
    fn start(memory_limit: Option<u64>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_minerva"));
        command.args(["rpc-worker", "--port", "0", "--threads", "1"]).env_clear().stderr(Stdio::piped());
        if let Some(bytes) = memory_limit {
            command.args(["--memory-limit", &bytes.to_string()]);
        }
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let address =
            lines.find_map(|line| line.strip_prefix("[INFO] lending devices on ").map(str::to_owned)).unwrap();
        std::thread::spawn(move || lines.for_each(drop));
        while std::net::TcpStream::connect(&address).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { child, address }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

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

#[tokio::test]
async fn without_a_fallback_the_table_is_printed_and_the_exit_code_is_2() {
    let worker = Worker::start(Some(rungs()[0] / 2));
    let output = Command::new(env!("CARGO_BIN_EXE_minerva-server"))
        .args([
            "-m",
            &model(),
            "--port",
            "0",
            "--rpc",
            &worker.address,
            "--no-fallback",
            "--parallel",
            "2",
            "--ctx",
            "8192",
        ])
        .env_clear()
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("Out of memory: GPU memory exceeded: ") && text.contains("used of its room"), "{text}");
}
