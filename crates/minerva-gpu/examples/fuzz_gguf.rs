//! Fuzzes the GGUF header reader without nightly: mutates a corpus and keeps each input that ends in a new way.
//!
//! `cargo run --release -p minerva-gpu --example fuzz_gguf -- --seconds 1800`, with `--seed N` to repeat a run, `--corpus DIR`
//! for other inputs, and `--write-corpus DIR` to write the corpus anew and stop. Exits with 1 and the input's path after a
//! panic or an input that takes a second. Coverage-guided, with nightly: `fuzz/fuzz_targets/gguf_header.rs`.
#![allow(clippy::print_stdout)] // a command-line tool

use std::collections::HashSet;
use std::fs;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use minerva_gpu::gguf::{FileBuilder, GgmlType, Value};
use minerva_gpu::synthetic;

#[path = "../../../fuzz/gguf_header_entry.rs"]
mod entry;

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/gguf_header");
const ARTIFACTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/artifacts/gguf_header");
/// Inputs do not grow past this.
const MAX_INPUT_BYTES: usize = 16 << 10;
/// An input that takes longer is a finding.
const SLOW: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("{error}");
            ExitCode::from(2)
        }
    }
}

fn run() -> io::Result<bool> {
    let (mut seconds, mut seed, mut corpus) = (60, 1, PathBuf::from(CORPUS));
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| io::Error::other(format!("{name} needs a value")))?;
        let number = || value.parse().map_err(|_| io::Error::other(format!("{name} needs a number, not {value}")));
        match name.as_str() {
            "--seconds" => seconds = number()?,
            "--seed" => seed = number()?,
            "--corpus" => corpus = value.into(),
            "--write-corpus" => return write_corpus(Path::new(&value)).map(|()| true),
            _ => return Err(io::Error::other(format!("{name} is not an option"))),
        }
    }

    let mut pool = Vec::new();
    let mut paths: Vec<_> = fs::read_dir(&corpus)?.collect::<Result<_, _>>()?;
    paths.sort_by_key(fs::DirEntry::path); // the order must not depend on the directory for a seed to mean something
    for entry in paths {
        pool.push(fs::read(entry.path())?);
    }
    let n_corpus = pool.len();
    let mut random = Random(seed);
    let mut outcomes = HashSet::new();
    let (mut executions, mut slowest) = (0_u64, Duration::ZERO);
    let start = Instant::now();
    let mut next_report = Duration::from_secs(10);
    while start.elapsed().as_secs() < seconds {
        // The corpus as it is, then mutations of what the pool holds.
        let input =
            if executions < n_corpus as u64 { pool[executions as usize].clone() } else { mutate(&pool, &mut random) };
        let began = Instant::now();
        let result = panic::catch_unwind(AssertUnwindSafe(|| entry::gguf_header(&input)));
        slowest = slowest.max(began.elapsed());
        executions += 1;
        match result {
            Ok(ends) if began.elapsed() < SLOW => {
                // Both ends and the length's magnitude: enough to keep files that got further than others.
                if outcomes.insert((ends, input.len().checked_ilog2())) {
                    pool.push(input);
                }
            }
            _ => return save_finding(&input).map(|()| false),
        }
        if start.elapsed() > next_report {
            println!(
                "{} s: {executions} executions, {} outcomes, {} inputs in the pool, slowest {slowest:?}",
                next_report.as_secs(),
                outcomes.len(),
                pool.len()
            );
            next_report += Duration::from_secs(10);
        }
    }
    println!(
        "{executions} executions in {seconds} s, {} outcomes, slowest {slowest:?}: no findings (seed {seed})",
        outcomes.len()
    );
    Ok(true)
}

fn save_finding(input: &[u8]) -> io::Result<()> {
    let path = Path::new(ARTIFACTS).join(format!("finding-{}", std::process::id()));
    fs::create_dir_all(ARTIFACTS)?;
    fs::write(&path, input)?;
    println!("finding: {} bytes in {}", input.len(), path.display());
    Ok(())
}

/// SplitMix64: enough for choosing mutations.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let word = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ (word >> 31)
    }

    /// Below `n`, which is at least 1.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

const INTERESTING: [u64; 18] =
    [0, 1, 2, 3, 4, 8, 9, 12, 13, 31, 255, 513, 1 << 16, 1 << 31, u32::MAX as u64, 1 << 32, 1 << 63, u64::MAX];

/// One to eight changes to an input of the pool.
fn mutate(pool: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = pool[random.below(pool.len())].clone();
    for _ in 0..=random.below(8) {
        if input.is_empty() {
            return input;
        }
        let at = random.below(input.len());
        match random.below(9) {
            0 => input[at] ^= 1 << random.below(8),
            1 => input[at] = random.next() as u8,
            2 => input[at] = input[at].wrapping_add(1),
            3 => overwrite(&mut input, at, &INTERESTING[random.below(INTERESTING.len())].to_le_bytes()),
            4 => {
                let value = INTERESTING[random.below(INTERESTING.len())] as u32;
                overwrite(&mut input, at, &value.to_le_bytes());
            }
            5 => input.truncate(at),
            6 => {
                let end = (at + 1 + random.below(64)).min(input.len());
                input.drain(at..end);
            }
            7 => {
                let other = &pool[random.below(pool.len())];
                if !other.is_empty() {
                    let from = random.below(other.len());
                    let to = (from + 1 + random.below(128)).min(other.len());
                    input.splice(at..at, other[from..to].iter().copied());
                }
            }
            _ => {
                let end = (at + 1 + random.below(64)).min(input.len());
                let piece = input[at..end].to_vec();
                let to = random.below(input.len());
                overwrite(&mut input, to, &piece);
            }
        }
    }
    input.truncate(MAX_INPUT_BYTES);
    input
}

fn overwrite(input: &mut [u8], at: usize, bytes: &[u8]) {
    let n = bytes.len().min(input.len() - at);
    input[at..at + n].copy_from_slice(&bytes[..n]);
}

/// Small files of every kind, for both drivers to start from.
fn adapter(file: &mut FileBuilder) {
    file.set("general.architecture", "llama")
        .set("general.type", "adapter")
        .set("adapter.type", "lora")
        .set("adapter.lora.alpha", 16_f32)
        .add_tensor("blk.0.attn_q.weight.lora_a", GgmlType::F32, &[64, 8])
        .add_tensor("blk.0.attn_q.weight.lora_b", GgmlType::F32, &[8, 64])
        .add_tensor("blk.1.ffn_up_exps.weight.lora_a", GgmlType::F32, &[64, 8, 8])
        .add_tensor("blk.1.ffn_up_exps.weight.lora_b", GgmlType::F32, &[8, 32, 8])
        .add_tensor("token_embd.weight.lora_a", GgmlType::F32, &[8, 4])
        .add_tensor("token_embd.weight.lora_b", GgmlType::F32, &[8, 64]);
}

/// A few layers of each kind of model, which a plan is made for.
fn small_models() -> impl Iterator<Item = (&'static str, FileBuilder)> {
    synthetic::NAMES.into_iter().chain(synthetic::NAMES_WITH_HEAD).filter_map(|name| {
        // Hybrids attend in one layer of several.
        let n_layers = if name.starts_with("jamba") || name.starts_with("granite") { 6 } else { 2 };
        Some((name, synthetic::shape_with_layers(name, n_layers)?))
    })
}

/// Projectors of each shape of graph, with a layer or two.
fn small_projectors() -> impl Iterator<Item = (&'static str, FileBuilder)> {
    const NAMES: [&str; 8] = [
        "mmproj-llava-1.5",
        "mmproj-gemma3",
        "mmproj-internvl3",
        "mmproj-mistral-small-3.1",
        "mmproj-qwen2.5vl",
        "mmproj-qwen3vl",
        "mmproj-minicpm-v",
        "mmproj-ultravox",
    ];
    NAMES.into_iter().filter_map(|name| Some((name, synthetic::projector_with_layers(name, 2)?)))
}

fn write_corpus(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let write = |name: &str, build: &dyn Fn(&mut FileBuilder)| {
        let mut file = FileBuilder::new();
        build(&mut file);
        fs::write(directory.join(name), file.header_bytes())
    };
    let attention = |file: &mut FileBuilder| {
        file.set("general.architecture", "llama")
            .set("llama.block_count", 2_u32)
            .set("llama.context_length", 128_u32)
            .set("llama.embedding_length", 64_u32)
            .set("llama.attention.head_count", 4_u32)
            .set("llama.attention.head_count_kv", vec![2_i32, 0])
            .add_tensor("token_embd.weight", GgmlType::F16, &[64, 4])
            .add_tensor("blk.0.attn_q.weight", GgmlType::Q4_0, &[64, 64]);
    };
    write("empty", &|_| {})?;
    write("attention", &attention)?;
    write("experts", &|file| {
        attention(file);
        file.set("llama.expert_count", 8_u32)
            .set("llama.expert_used_count", 2_u32)
            .set("llama.expert_group_count", 4_u32)
            .set("llama.expert_group_used_count", 2_u32)
            .set("llama.pooling_type", 1_u32)
            .set("llama.rope.scaling.type", "yarn")
            .add_tensor("blk.0.ffn_up_exps.weight", GgmlType::Q4_K, &[256, 2, 8]);
    })?;
    for model in ["llama", "gpt2", "bert", "t5", "rwkv", "plamo2"] {
        write(&format!("vocabulary-{model}"), &|file| {
            file.set("general.architecture", "llama")
                .set("tokenizer.ggml.model", model)
                .set("tokenizer.ggml.pre", "llama-bpe")
                .set("tokenizer.ggml.tokens", vec!["<unk>", "<s>", "</s>", "a", "", "<0x0A>"])
                .set("tokenizer.ggml.scores", vec![0_f32; 6])
                .set("tokenizer.ggml.token_type", vec![2_i32, 3, 3, 1, 5, 1])
                .set("tokenizer.ggml.merges", vec!["a b", "ab c"])
                .set("tokenizer.ggml.bos_token_id", 1_u32)
                .set("tokenizer.ggml.eos_token_id", 2_u32)
                .set("tokenizer.ggml.seperator_token_id", 2_u32)
                .set("tokenizer.ggml.add_bos_token", true)
                .set("tokenizer.ggml.suppress_tokens", vec![3_i32])
                .set("tokenizer.ggml.precompiled_charsmap", vec![4_u8, 0, 0, 0, 1, 2, 3, 4, 5]);
        })?;
    }
    for (name, shape) in small_models().chain(small_projectors()) {
        write(name, &|file| *file = shape.clone())?;
    }
    write("every-value-type", &|file| {
        let scalars: [Value; 12] = [
            1_u8.into(),
            (-1_i8).into(),
            2_u16.into(),
            (-2_i16).into(),
            3_u32.into(),
            (-3_i32).into(),
            4_u64.into(),
            (-4_i64).into(),
            0.5_f32.into(),
            0.25_f64.into(),
            true.into(),
            "text".into(),
        ];
        for (index, value) in scalars.into_iter().enumerate() {
            file.set(&format!("scalar.{index}"), value);
        }
        let arrays: [Value; 12] = [
            vec![1_u8, 2].into(),
            vec![-1_i8].into(),
            vec![2_u16].into(),
            vec![-2_i16].into(),
            vec![3_u32].into(),
            vec![-3_i32].into(),
            vec![4_u64].into(),
            vec![-4_i64].into(),
            vec![0.5_f32].into(),
            vec![0.25_f64].into(),
            vec![true, false].into(),
            vec!["a", "", "long enough to have some bytes"].into(),
        ];
        for (index, value) in arrays.into_iter().enumerate() {
            file.set(&format!("array.{index}"), value);
        }
    })?;
    write("every-tensor-type", &|file| {
        file.set("general.architecture", "clip").alignment(64);
        for ggml_type in GgmlType::all() {
            file.add_tensor(ggml_type.name(), ggml_type, &[ggml_type.block_elements() * 2, 3, 1, 1]);
        }
    })?;
    write("adapter", &adapter)?;
    write("shard", &|file| {
        file.set("split.no", 1_u16).set("split.count", 3_u16).set("split.tensors.count", 7_i32);
        file.add_tensor("blk.1.ffn_up.weight", GgmlType::BF16, &[64, 64]);
    })
}
