//! The engine against a bare `llama_decode` loop: `cargo xtask bench-engine` (docs/benchmarks.md has results).
#![expect(clippy::print_stdout, reason = "the report is the output")]
use std::path::PathBuf;

use clap::Parser;
use minerva_benches::engine::{self, Settings, Workload};

/// Measures what the engine costs beside llama.cpp.
#[derive(Debug, Parser)]
struct Args {
    /// The GGUF file.
    #[arg(long, env = "MINERVA_TEST_MODEL")]
    model: PathBuf,
    /// Numbers of sequences to measure.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    sequences: Vec<u32>,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 93)]
    prompt_tokens: u32,
    /// Tokens to generate per sequence.
    #[arg(long, default_value_t = 64)]
    generate_tokens: u32,
    /// Runs of each side, alternating; medians count.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Compute threads; the default is what the engine would take.
    #[arg(long)]
    threads: Option<u32>,
    /// Turn flash attention off.
    #[arg(long)]
    no_flash_attention: bool,
    /// One pool of cells for all sequences.
    #[arg(long)]
    kv_unified: bool,
    /// Turn repacked weights off.
    #[arg(long)]
    no_extra_buffers: bool,
    /// Write all samples to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Fail when a decode ratio is below this: `1:0.97`, sequences and ratio.
    #[arg(long, value_parser = parse_gate)]
    gate: Vec<(u32, f64)>,
}

fn parse_gate(text: &str) -> Result<(u32, f64), String> {
    let (n_seq, ratio) = text.split_once(':').ok_or("expected SEQUENCES:RATIO")?;
    Ok((n_seq.parse().map_err(|e| format!("{e}"))?, ratio.parse().map_err(|e| format!("{e}"))?))
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let settings = Settings {
        n_threads: args.threads.unwrap_or_else(minerva_benches::engine::default_threads),
        flash_attention_off: args.no_flash_attention,
        kv_unified: args.kv_unified,
        extra_buffers: !args.no_extra_buffers,
        rounds: args.rounds,
    };
    let build = minerva_engine::Engine::build_info();
    println!("model {}, {} threads, {build:?}", args.model.display(), settings.n_threads);
    println!("{} prompt tokens, {} generated, medians of {}", args.prompt_tokens, args.generate_tokens, args.rounds);
    let mut reports = Vec::new();
    for &n_seq in &args.sequences {
        let workload = Workload { n_seq, prompt_tokens: args.prompt_tokens, generate_tokens: args.generate_tokens };
        let report = engine::run(&args.model, workload, settings)?;
        println!("{report}");
        reports.push(report);
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&reports)?)?;
    }
    for (n_seq, least) in &args.gate {
        let report = reports.iter().find(|report| report.workload.n_seq == *n_seq);
        let ratio =
            report.map(engine::Report::ratio).ok_or_else(|| anyhow::anyhow!("{n_seq} sequences: not measured"))?;
        anyhow::ensure!(ratio >= *least, "{n_seq} sequences: ratio {ratio:.3}, the gate is {least}");
    }
    Ok(())
}
