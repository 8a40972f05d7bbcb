//! What `bench_gpu` is asked for.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use minerva_gpu::synthetic;

/// The seed of synthetic weights: the same file on every machine.
const SEED: u64 = 7;

/// GPU against CPU, memory against plan, and the guide's three sweeps; beside each figure the same through a bare
/// `llama_decode` loop.
#[derive(Debug, Clone, Parser)]
#[command(name = "bench_gpu", version)]
pub struct Args {
    /// The GGUF file
    #[arg(long, value_name = "FILE", env = "MINERVA_TEST_MODEL")]
    pub(super) model: Option<PathBuf>,
    /// A model of this shape with random weights instead, written to the cache folder once: `llama2-7b-q4_0` and others
    #[arg(long, value_name = "NAME")]
    pub(super) synthetic: Option<String>,
    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["speed", "memory", "layers", "experts", "batch", "context"])]
    pub(super) parts: Vec<Part>,
    /// Fewer rounds, points and cycles
    #[arg(long)]
    pub(super) quick: bool,
    /// Rounds of the speed part, both sides in each [default: 11, with --quick 3, for a baseline 25], and of the experts part [2, 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(super) rounds: Option<u32>,
    /// Compute threads [default: as the engine]
    #[arg(long, value_name = "N")]
    pub(super) threads: Option<u32>,
    /// A folder for JSON, Markdown and the chart, all named after the device
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub(super) out: PathBuf,

    /// Exit with 1 when a ratio is worse than the baseline's by more than its tolerance
    #[arg(long)]
    pub(super) gate: bool,
    /// The baseline to compare with [default: benches/baselines/DEVICE.json]
    #[arg(long, value_name = "FILE")]
    pub(super) baseline: Option<PathBuf>,
    /// Another build of this program, such as a bundle's: its engine takes the bare loop's place
    #[arg(long, value_name = "FILE", conflicts_with_all = ["gate", "write_baseline"])]
    pub(super) against: Option<PathBuf>,
    /// Write what was measured, and tolerances from its spread, to the baseline
    #[arg(long, conflicts_with = "gate")]
    pub(super) write_baseline: bool,
    /// Exit with 2 when there is no GPU
    #[arg(long)]
    pub(super) require_gpu: bool,

    /// Treat an RPC worker as the GPU, to try the columns on a machine without one
    #[arg(long, value_name = "HOST:PORT", hide = true)]
    pub(super) rpc: Option<String>,
    /// Make every step of the engine take so much longer, to prove that --gate notices
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0, hide = true)]
    pub(super) slow_down: f64,
    /// Lose so much memory with every load and unload of the memory part, to prove that its bound notices
    #[arg(long, value_name = "BYTES", default_value_t = 0, hide = true)]
    pub(super) leak: usize,
    /// Be one of the two sides that are compared
    #[arg(long, value_name = "JSON", hide = true)]
    pub(super) side_worker: Option<String>,
    /// Be the process whose memory is measured
    #[arg(long, value_name = "JSON", hide = true)]
    pub(super) memory_worker: Option<String>,
}

/// A part of the measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Part {
    /// Prefill, decode and load, GPU against CPU.
    Speed,
    /// Peak against plan, and growth.
    Memory,
    /// Layers on the GPU.
    Layers,
    /// A mixture of experts that does not fit: its experts or whole layers on the host.
    Experts,
    /// Sequences at once.
    Batch,
    /// Tokens of context.
    Context,
}

impl Part {
    /// The word on the command line and in reports.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Speed => "speed",
            Self::Memory => "memory",
            Self::Layers => "layers",
            Self::Experts => "experts",
            Self::Batch => "batch",
            Self::Context => "context",
        }
    }
}

impl Args {
    /// The model's file; a synthetic one is written if it is not there yet.
    pub(super) fn model_path(&self, say: fn(&str)) -> anyhow::Result<PathBuf> {
        match (&self.synthetic, &self.model) {
            (Some(name), _) => synthetic_model(name, say),
            (None, Some(path)) => Ok(path.clone()),
            (None, None) => {
                bail!("give a GGUF file with --model, a shape with --synthetic, or run `cargo xtask bench-gpu`")
            }
        }
    }

    /// What the engine is compared with, for titles.
    pub(super) fn floor(&self) -> &'static str {
        if self.against.is_some() { "other build" } else { "floor" }
    }

    pub(super) fn has(&self, part: Part) -> bool {
        self.parts.contains(&part)
    }

    /// Rounds of the speed part.
    pub(super) fn n_rounds(&self) -> u32 {
        self.rounds.unwrap_or(match (self.write_baseline, self.quick) {
            (true, _) => 25, // many runs will be judged by it
            (false, true) => 3,
            (false, false) => 11,
        })
    }
}

fn synthetic_model(name: &str, say: fn(&str)) -> anyhow::Result<PathBuf> {
    let file = synthetic::shape(name)
        .with_context(|| format!("no shape `{name}`; there are: {}", synthetic::NAMES.join(", ")))?;
    let folder = cache_dir().context("no home folder: set `MINERVA_CACHE_DIR`")?.join("synthetic");
    let path = folder.join(format!("{name}.gguf"));
    if fs::metadata(&path).is_ok_and(|found| found.len() == file.file_bytes()) {
        return Ok(path);
    }
    say(&format!("writing {name}.gguf: {}", minerva_gpu::format_bytes(file.file_bytes())));
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    // Under a name of its own until it is whole: the size is right from the start.
    let unfinished = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = file.write_random(&unfinished, SEED, &mut |_| {}).and_then(|_| fs::rename(&unfinished, &path));
    if let Err(problem) = written {
        let _ = fs::remove_file(&unfinished); // it may be gone already
        return Err(problem).with_context(|| format!("cannot write {}", path.display()));
    }
    Ok(path)
}

/// Where `cargo xtask setup` keeps models too.
fn cache_dir() -> Option<PathBuf> {
    let named = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    named("MINERVA_CACHE_DIR")
        .or_else(|| named("XDG_CACHE_HOME").map(|dir| dir.join("minerva")))
        .or_else(|| named("LOCALAPPDATA").map(|dir| dir.join("minerva")))
        .or_else(|| Some(env::home_dir()?.join(".cache").join("minerva")))
}

/// The model's name in reports: never a folder of this machine.
pub(super) fn model_name(path: &Path) -> String {
    path.file_stem().map_or_else(|| "model".to_owned(), |stem| stem.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn everything_is_measured_unless_parts_are_named() {
        Args::command().debug_assert();
        let args = Args::parse_from(["bench_gpu", "--model", "a/b.c.gguf"]);
        let all = [Part::Speed, Part::Memory, Part::Layers, Part::Experts, Part::Batch, Part::Context];
        assert!(all.iter().all(|part| args.has(*part)) && args.n_rounds() == 11);
        assert_eq!(model_name(&args.model_path(|_| ()).unwrap()), "b.c");
        let args = Args::parse_from(["bench_gpu", "--parts", "speed,batch", "--quick"]);
        assert!(args.has(Part::Batch) && !args.has(Part::Memory) && args.n_rounds() == 3);
    }

    #[test]
    fn a_shape_that_does_not_exist_is_refused_with_the_list() {
        let args = Args::parse_from(["bench_gpu", "--synthetic", "llama9"]);
        let problem = args.model_path(|_| ()).unwrap_err().to_string();
        assert!(problem.contains("`llama9`") && problem.contains("llama2-7b-q4_0"), "{problem}");
        assert!(Args::try_parse_from(["bench_gpu", "--gate", "--write-baseline"]).is_err());
    }
}
