//! RPC workers for tests: child processes of the test binary itself.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use minerva_llama::{RpcServer, RpcWorkerOptions, add_rpc_server, serve_rpc};

/// A worker in a process of its own, killed when the test ends.
pub(crate) struct Worker {
    child: Child,
    pub(crate) address: String,
}

impl Worker {
    pub(crate) fn start() -> Self {
        Self::with_memory_limit(None)
    }

    pub(crate) fn with_memory_limit(limit_bytes: Option<u64>) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this test binary"));
        command.args(["--exact", "rpc_worker::worker_process", "--ignored", "--nocapture"]).env("RPC_WORKER", "1");
        if let Some(limit) = limit_bytes {
            command.env("RPC_WORKER_LIMIT", limit.to_string());
        }
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("a child process");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
        let address = lines.find_map(|line| line.strip_prefix("ready ").map(ToOwned::to_owned));
        std::thread::spawn(move || lines.for_each(drop)); // keeps the pipe empty
        let worker = Self { child, address: address.expect("the worker says where it listens") };
        worker.wait_until_it_listens();
        worker
    }

    /// The address is known just before llama.cpp listens.
    fn wait_until_it_listens(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::net::TcpStream::connect(&self.address).is_err() {
            assert!(Instant::now() < deadline, "the worker does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn add(&self) -> Vec<usize> {
        add_rpc_server(&RpcServer::new(&self.address)).expect("the worker answers")
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    #[allow(dead_code, reason = "one of the test binaries never asks")]
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
#[ignore = "the body of the worker processes"]
fn worker_process() {
    assert!(std::env::var_os("RPC_WORKER").is_some(), "only for the other tests to start");
    let limit = std::env::var("RPC_WORKER_LIMIT").ok().map(|limit| limit.parse().expect("bytes"));
    let options = RpcWorkerOptions { memory_limit_bytes: limit, ..RpcWorkerOptions::new(0, 1) };
    let error = serve_rpc(&options, |address| writeln!(std::io::stderr(), "ready {address}").expect("stderr"));
    panic!("{error:?}");
}
