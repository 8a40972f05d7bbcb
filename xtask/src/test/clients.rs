//! The official Python client against our server: `tests/clients/` under pytest, with a release server on a free port.
//!
//! The tests find the server's address in `MINERVA_URL`. The server gets the default model and no other option than its
//! port, and must end with exit code 0 when it is told to stop.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::tally::{self, Tally};
use crate::setup::{Interpreter, Ready};
use crate::workspace;

const WHEELS: [&str; 2] = ["openai>=1.50", "pytest>=8"];
const READY_LIMIT: Duration = Duration::from_mins(2);
const STOP_LIMIT: Duration = Duration::from_mins(1);

pub(super) fn run(ready: &Ready) -> anyhow::Result<Tally> {
    let tests = workspace::root().join("tests/clients");
    if !tests.is_dir() {
        return Ok(Tally::skip("there is no tests/clients"));
    }
    let model = ready.model.as_deref().context("the clients need the default model")?;
    let python = python()?;
    workspace::check(workspace::cargo().args(["build", "--release", "-p", "minerva-server"]))?;

    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut command = workspace::command(workspace::release_dir().join("minerva-server"));
    command.arg("--model").arg(model).args(["--host", "127.0.0.1", "--port", &port.to_string(), "--tune=off"]);
    let mut server = Server(command.spawn().context("cannot start the server")?);
    server.wait_until_ready(port)?;

    let mut pytest = python.module("pytest");
    pytest.args(["-q", "-p", "no:cacheprovider"]).arg(&tests);
    pytest.env("MINERVA_URL", format!("http://127.0.0.1:{port}")).env("PYTHONDONTWRITEBYTECODE", "1");
    let tally = tally::count(&mut pytest, tally::pytest_line)?;
    if tally.passed + tally.failed == 0 {
        bail!("tests/clients ran no test");
    }
    server.stop()?;
    Ok(tally)
}

/// The Python with the clients, made once in `target/tools/clients`.
fn python() -> anyhow::Result<Interpreter> {
    let python = Interpreter::into_dir(&workspace::tools().join("clients"))?;
    let imports = python.command().args(["-c", "import openai, pytest"]).output()?;
    if !imports.status.success() {
        println!("installing {}", WHEELS.join(", "));
        python.install(&WHEELS)?;
    }
    Ok(python)
}

/// A running server, which does not outlive this step.
struct Server(Child);

impl Server {
    /// Waits for `/health/ready` to answer 200.
    fn wait_until_ready(&mut self, port: u16) -> anyhow::Result<()> {
        let start = Instant::now();
        while start.elapsed() < READY_LIMIT {
            if let Some(status) = self.0.try_wait()? {
                bail!("the server ended before it was ready ({status})");
            }
            if is_ready(port) {
                println!("the server was ready after {:.1} s", start.elapsed().as_secs_f32());
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!("the server was not ready after {} s", READY_LIMIT.as_secs())
    }

    /// Asks the server to stop, as an init system does, and expects exit code 0.
    fn stop(mut self) -> anyhow::Result<()> {
        if cfg!(unix) {
            workspace::check(workspace::command("kill").args(["-TERM", &self.0.id().to_string()]))?;
        } else {
            self.0.kill()?;
        }
        match workspace::wait_for(&mut self.0, STOP_LIMIT)? {
            Some(status) if status.success() || !cfg!(unix) => Ok(()),
            Some(status) => bail!("the server stopped with {status}, expected exit code 0"),
            None => bail!("the server still ran {} s after SIGTERM", STOP_LIMIT.as_secs()),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill(); // after an error; a server that has ended is left alone
        let _ = self.0.wait();
    }
}

/// One readiness request; any trouble means "not yet".
fn is_ready(port: u16) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /health/ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        let mut head = [0; 12];
        stream.read_exact(&mut head)?;
        Ok(head.ends_with(b" 200"))
    };
    ask().unwrap_or(false)
}
