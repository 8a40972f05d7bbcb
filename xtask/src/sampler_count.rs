//! `cargo xtask sampler-count`: instructions that the sampler takes for a token, against the numbers of the last time.
//!
//! Callgrind counts them, so they depend on the compiler and the code, and on neither the machine's speed nor its mood. The sampler is
//! built alone, for the instruction set of `TARGET_CPU`: valgrind knows no AVX-512.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::workspace;

const PACKAGE: &str = "minerva-sampler-count";
const BASELINE: &str = "benches/baselines/sampler-instructions.json";
const TARGET: &str = "x86_64-unknown-linux-gnu";
const TARGET_CPU: &str = "x86-64-v3";

/// Draws of the shorter and of the longer run; the difference is what counts.
const N_DRAWS: [u64; 2] = [4, 24];

/// A setting fails with this share of its instructions more than the baseline; with another compiler than the baseline's, with that one.
const TOLERANCE: f64 = 0.03;
const TOLERANCE_OTHER_COMPILER: f64 = 0.25;

/// Count anew, or write down.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write the numbers down as what later runs are compared with
    #[arg(long)]
    write_baseline: bool,
}

#[derive(Serialize, Deserialize)]
struct Baseline {
    rustc: String,
    target_cpu: String,
    /// Per token of a row of 128,256 logits.
    instructions: BTreeMap<String, u64>,
}

/// What a run can say.
pub(crate) enum Outcome {
    /// So many settings within their tolerance.
    Counted(u64),
    /// This machine cannot count.
    Skipped(String),
}

/// Counts, prints, and compares or writes.
///
/// # Errors
/// When the sampler cannot be built or run, or a setting takes more instructions than its baseline allows.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    match compare(args.write_baseline)? {
        Outcome::Counted(_) => Ok(()),
        Outcome::Skipped(reason) => bail!("{reason}"),
    }
}

/// [`run`] for `cargo xtask test`.
///
/// # Errors
/// As [`run`]; a machine that cannot count is none.
pub(crate) fn compare(write_baseline: bool) -> anyhow::Result<Outcome> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Ok(Outcome::Skipped(format!("instructions are counted on {TARGET} only")));
    }
    if !std::arch::is_x86_feature_detected!("avx2") {
        return Ok(Outcome::Skipped(format!("this processor is no {TARGET_CPU}")));
    }
    let Some(valgrind) = valgrind() else {
        return Ok(Outcome::Skipped("valgrind is missing, and `apt-get download valgrind` does not bring it".into()));
    };
    let program = build()?;
    let names = workspace::capture(&mut workspace::command(&program))?;
    let mut instructions = BTreeMap::new();
    for name in names.lines() {
        let [few, many] = N_DRAWS.map(|n| valgrind.count(&program, name, n));
        instructions.insert(name.to_owned(), (many? - few?) / (N_DRAWS[1] - N_DRAWS[0]));
    }
    let rustc = workspace::capture(Command::new("rustc").arg("--version"))?.trim().to_owned();
    let counted = Baseline { rustc, target_cpu: TARGET_CPU.to_owned(), instructions };
    let path = workspace::root().join(BASELINE);
    if write_baseline {
        std::fs::write(&path, serde_json::to_string_pretty(&counted)? + "\n")?;
    }
    let baseline: Baseline = serde_json::from_str(&std::fs::read_to_string(&path).context(BASELINE)?)?;
    report(&counted, &baseline)
}

fn report(counted: &Baseline, baseline: &Baseline) -> anyhow::Result<Outcome> {
    let tolerance = if counted.rustc == baseline.rustc { TOLERANCE } else { TOLERANCE_OTHER_COMPILER };
    let mut over = Vec::new();
    println!("{:<14} {:>12} {:>12}", "instructions", "a token", "baseline");
    for (name, &n) in &counted.instructions {
        let before = *baseline.instructions.get(name).with_context(|| format!("{BASELINE} has no `{name}`"))?;
        println!("{name:<14} {n:>12} {before:>12} {:>+6.1} %", 100.0 * (n as f64 / before as f64 - 1.0));
        if n as f64 > before as f64 * (1.0 + tolerance) {
            over.push(name.as_str());
        }
    }
    if over.is_empty() {
        return Ok(Outcome::Counted(counted.instructions.len() as u64));
    }
    bail!(
        "more than {:.0} % over the baseline: {} (`cargo xtask sampler-count --write-baseline` if that is meant)",
        100.0 * tolerance,
        over.join(", ")
    )
}

/// Builds the sampler beside everything else, with flags of its own.
fn build() -> anyhow::Result<PathBuf> {
    let target = workspace::own_target().join("count");
    workspace::check(
        workspace::cargo()
            .args(["build", "--quiet", "--release", "--package", PACKAGE, "--target", TARGET, "--target-dir"])
            .arg(&target)
            .env("RUSTFLAGS", format!("-C target-cpu={TARGET_CPU}")),
    )?;
    Ok(target.join(TARGET).join("release").join("sampler_count"))
}

struct Valgrind {
    program: PathBuf,
    /// Where its tools lie, if not where it was built for.
    lib: Option<PathBuf>,
}

/// The system's valgrind, or the distribution's package unpacked under target/, which needs no root.
fn valgrind() -> Option<Valgrind> {
    if let Some(program) = workspace::which("valgrind") {
        return Some(Valgrind { program, lib: None });
    }
    let folder = workspace::tools().join("valgrind");
    if !folder.join("usr").exists() {
        std::fs::create_dir_all(&folder).ok()?;
        workspace::check(workspace::command("apt-get").args(["download", "valgrind"]).current_dir(&folder)).ok()?;
        let is_package = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
        let package = std::fs::read_dir(&folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).find(is_package)?;
        workspace::check(workspace::command("dpkg-deb").arg("--extract").arg(package).arg(&folder)).ok()?;
    }
    let usr = folder.join("usr");
    let lib = ["libexec/valgrind", "lib/x86_64-linux-gnu/valgrind", "lib/valgrind"].map(|lib| usr.join(lib));
    let lib = lib.into_iter().find(|lib| lib.exists())?;
    // `bin/valgrind` is a script with fixed paths; `valgrind.bin` behind it is the program.
    let program = ["bin/valgrind.bin", "bin/valgrind"].map(|program| usr.join(program));
    Some(Valgrind { program: program.into_iter().find(|program| program.exists())?, lib: Some(lib) })
}

impl Valgrind {
    /// The instructions of `program` for `n` draws with a setting.
    fn count(&self, program: &PathBuf, setting: &str, n: u64) -> anyhow::Result<u64> {
        let mut command = workspace::command(&self.program);
        command
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(program)
            .args([setting, &n.to_string()]);
        if let Some(lib) = &self.lib {
            command.env("VALGRIND_LIB", lib);
        }
        let output = command.output().with_context(|| format!("cannot run {}", self.program.display()))?;
        let text = String::from_utf8_lossy(&output.stderr);
        let collected = collected(&text).filter(|_| output.status.success());
        collected.with_context(|| format!("callgrind counted nothing for `{setting}`: {text}"))
    }
}

/// The number in callgrind's line `==PID== Collected : N`.
fn collected(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(rustc: &str, n: u64) -> Baseline {
        let instructions = [("defaults".to_owned(), n)].into();
        Baseline { rustc: rustc.to_owned(), target_cpu: TARGET_CPU.to_owned(), instructions }
    }

    #[test]
    fn callgrinds_total_is_found() {
        assert_eq!(collected("==7== Events    : Ir\n==7== Collected : 83190\n==7==\n"), Some(83_190));
        assert_eq!(collected("==7== valgrind: failed"), None);
    }

    #[test]
    fn more_instructions_than_the_baseline_allows_fail() {
        let baseline = counts("rustc 1", 1000);
        assert!(report(&counts("rustc 1", 1030), &baseline).is_ok());
        let error = report(&counts("rustc 1", 1031), &baseline).err().expect("too many").to_string();
        assert!(error.contains("more than 3 % over the baseline: defaults"), "{error}");
        assert!(report(&counts("rustc 2", 1200), &baseline).is_ok());
        assert!(report(&counts("rustc 2", 1300), &baseline).is_err());
    }
}
