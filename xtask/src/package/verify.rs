//! Unpacks a bundle, starts it with an empty environment and asks it a question.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::archive;
use crate::workspace;

/// The default model knows the answer when it is told what it is.
const QUESTION: &str = r#"{"temperature":0,"max_tokens":16,"messages":[
    {"role":"system","content":"You are a helpful assistant."},
    {"role":"user","content":"What is the capital of France?"}]}"#;

const START_LIMIT: Duration = Duration::from_mins(1);

pub(super) fn run(bytes: &[u8], name: &str, model: &Path) -> anyhow::Result<()> {
    // Outside the repository, so that nothing is found by accident.
    let folder = std::env::temp_dir().join(format!("minerva-package-{}", std::process::id()));
    archive::unpack(bytes, &folder)?;
    let bundle = folder.join(name);
    let result = check_libraries(&bundle).and_then(|()| ask(&bundle, model));
    fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    let module = result?;
    println!("verified: it starts with an empty environment, loads {module} and answers");
    Ok(())
}

/// What programs and modules may take from the system; the rest is in the bundle.
const OF_THE_SYSTEM: [&str; 8] =
    ["linux-vdso", "libc", "libm", "libstdc++", "libgcc_s", "libdl", "libpthread", "librt"];

/// Asks the dynamic linker where it finds each library, without starting anything.
fn check_libraries(bundle: &Path) -> anyhow::Result<()> {
    let modules: Vec<_> = fs::read_dir(bundle.join("lib/minerva"))?
        .map(|entry| Ok(entry?.path().to_string_lossy().into_owned()))
        .collect::<std::io::Result<_>>()?;
    let mut linker = Command::new(bundle.join("bin/minerva"));
    linker.env_clear().env("LD_TRACE_LOADED_OBJECTS", "1").env("LD_PRELOAD", modules.join(" "));
    let list = workspace::capture(&mut linker)?;
    if let Some(line) = foreign_library(&list, &bundle.to_string_lossy()) {
        bail!("the bundle needs a library of the system that not every system has: {line}");
    }
    if !list.contains("libllama.so") {
        bail!("the dynamic linker does not list the libraries of bin/minerva:\n{list}");
    }
    Ok(())
}

/// The first line of the dynamic linker's list that is neither in the bundle nor on every system.
fn foreign_library<'a>(list: &'a str, bundle: &str) -> Option<&'a str> {
    let is_foreign = |line: &&str| {
        let file = line.split_whitespace().next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
        let stem = file.split('.').next().unwrap_or_default();
        !line.contains(bundle) && !OF_THE_SYSTEM.contains(&stem) && !stem.starts_with("ld-linux")
    };
    list.lines().map(str::trim).find(is_foreign)
}

/// The CPU module that was loaded.
fn ask(bundle: &Path, model: &Path) -> anyhow::Result<String> {
    let mut command = Command::new(bundle.join("bin/minerva"));
    command.args(["--port", "0", "--ctx", "1024", "--parallel", "1", "--model"]).arg(model);
    command.env_clear().current_dir("/").stdin(Stdio::null()).stderr(Stdio::piped());
    let mut server = Server(command.spawn().context("cannot start the bundle")?);
    let (send, log) = mpsc::channel();
    let lines = BufReader::new(server.0.stderr.take().context("piped")?).lines();
    thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| send.send(line)));

    let deadline = Instant::now() + START_LIMIT;
    let (mut address, mut module, mut seen) = (None, None, Vec::new());
    loop {
        let Ok(line) = log.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
            bail!("the bundle does not start; its log:\n{}", seen.join("\n"));
        };
        address = address.or_else(|| line.strip_prefix("[INFO] listening on http://").map(ToOwned::to_owned));
        module = module.or_else(|| line.strip_prefix("[INFO] CPU module: ").map(ToOwned::to_owned));
        let is_ready = line.starts_with("[INFO] ready");
        seen.push(line);
        if is_ready {
            break;
        }
    }
    let address = address.context("the log names the address")?;
    let answer = post(&address, QUESTION)?;
    if !answer.starts_with("HTTP/1.1 200") || !answer.contains("Paris") {
        bail!("the bundle answers wrongly: {answer}");
    }
    workspace::check(Command::new("kill").arg(server.0.id().to_string()))?;
    match workspace::wait_for(&mut server.0, START_LIMIT)? {
        Some(status) if status.success() => module.context("the log names the CPU module"),
        status => bail!("the bundle did not end as it was told to ({status:?})"),
    }
}

fn post(address: &str, body: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(START_LIMIT))?;
    let n_bytes = body.len();
    write!(
        stream,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
        Content-Length: {n_bytes}\r\nConnection: close\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A running server, which does not outlive this task.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_only_some_systems_have_is_named() {
        let list = "\tlinux-vdso.so.1 (0x7f)\n\t/b/lib/minerva/libggml-rpc.so (0x7f)\n\tlibstdc++.so.6 => /lib/libstdc++.so.6 (0x7f)\n\
                    \tlibllama.so.0 => /b/bin/../lib/libllama.so.0 (0x7f)\n\t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        assert_eq!(foreign_library(list, "/b"), None);
        let with_ssl = format!("{list}\tlibssl.so.3 => /lib/libssl.so.3 (0x7f)\n");
        assert_eq!(foreign_library(&with_ssl, "/b"), Some("libssl.so.3 => /lib/libssl.so.3 (0x7f)"));
        assert_eq!(foreign_library("libllama.so.0 => not found", "/b"), Some("libllama.so.0 => not found"));
    }
}
