//! A server that this run starts and stops.

use std::ffi::OsString;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context as _, bail};

use super::http::HttpClient;

/// How long a server may take to load its model.
const LOAD_LIMIT: Duration = Duration::from_mins(3);

/// How long a server may take to end after it was asked to.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// A child process; it is stopped when this is dropped.
#[derive(Debug)]
pub(super) struct ServerProcess {
    child: Child,
    pub(super) url: String,
    /// The command line, for the report.
    pub(super) line: String,
    log: PathBuf,
}

impl ServerProcess {
    /// Starts `program` on a free port of the loopback; its output goes to a file among the temporary ones.
    pub(super) fn start(name: &str, program: &Path, args: &[OsString]) -> anyhow::Result<Self> {
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let log = env::temp_dir().join(format!("bench-serve-{}-{name}.log", std::process::id()));
        let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(program);
        command.args(args).args(["--host", "127.0.0.1", "--port", &port.to_string()]);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        let words = args.iter().map(|arg| arg.to_string_lossy());
        let line = std::iter::once(program.to_string_lossy()).chain(words).collect::<Vec<_>>().join(" ");
        Ok(Self { child, url: format!("http://127.0.0.1:{port}"), line, log })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `/health` says that requests are answered.
    pub(super) async fn wait_until_ready(&mut self, http: &HttpClient) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            if matches!(http.get("/health").await, Ok((status, _)) if status.is_success()) {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("`{}` ended ({status}):\n{}", self.line, self.last_words());
            }
            if began.elapsed() > LOAD_LIMIT {
                bail!("`{}` is not ready after {} s:\n{}", self.line, LOAD_LIMIT.as_secs(), self.last_words());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The end of its log.
    fn last_words(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        #[cfg(unix)]
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let began = Instant::now();
            while began.elapsed() < STOP_LIMIT && matches!(self.child.try_wait(), Ok(None)) {
                thread::sleep(Duration::from_millis(50));
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.log);
    }
}
