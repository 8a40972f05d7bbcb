//! The real `minerva-server` over the simulator, as a process.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::client;

pub(crate) struct Process {
    pub(crate) child: Child,
    pub(crate) address: SocketAddr,
    /// Its log up to the line that says where it listens.
    pub(crate) first_lines: Vec<String>,
    /// Its log from there on, line by line.
    pub(crate) log: mpsc::Receiver<String>,
}

impl Process {
    /// Starts it on a free port and waits until it is ready.
    pub(crate) async fn start(args: &[&str], vars: &[(&str, &str)]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_minerva-server"))
            .args(["--port", "0"])
            .args(args)
            .env_clear()
            .env("MINERVA_TUNE", "off") // the same settings in every run; a test that is about them says otherwise
            .envs(vars.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (send, log) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        let mut first_lines = Vec::new();
        let address = loop {
            let line = log.recv_timeout(Duration::from_secs(10)).expect("the server did not start");
            if let Some(address) = line.strip_prefix("[INFO] listening on http://") {
                break address.parse().unwrap();
            }
            first_lines.push(line);
        };
        let process = Self { child, address, first_lines, log };
        while client::get(address, "/health/ready").await.status != 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        process
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    pub(crate) fn wait(&mut self, limit: Duration) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < limit, "still running");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
