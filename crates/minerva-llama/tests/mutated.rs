//! Damaged headers of a real model, and of a small one with a head for multi-token prediction: what our reader accepts must not kill llama.cpp.
//!
//! 1,000 of them by default (`MUTATIONS` for more), in a child process that says what it is about to load. Needs the default
//! model: `cargo xtask setup` fetches it.
#![allow(clippy::print_stdout, reason = "the child's protocol, and the parent's summary")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use minerva_gpu::estimate::{HeadShape, ModelShape};
use minerva_gpu::gguf::Header;
use minerva_gpu::synthetic::{ChainHead, write_chain};
use minerva_llama::{ContextKind, ContextParams, LoadError, ModelParams, Simulation};

/// Numbers that programs tend to forget.
const INTERESTING: [u64; 12] =
    [0, 1, 2, 7, 255, 256, 65_535, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 32, i64::MAX as u64, u64::MAX];

/// SplitMix64, by Sebastiano Vigna.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap_or(0)
    }
}

fn real_model() -> PathBuf {
    std::env::var_os("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model").into()
}

/// The header's bytes and the length of the whole file.
fn header_bytes(path: &Path) -> (Vec<u8>, u64) {
    let header = Header::open(path).expect("a sound header");
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(header.data_offset).read_to_end(&mut bytes)).expect("readable");
    (bytes, header.file_bytes)
}

/// Where numbers are: the keys before the vocabulary, the tensors behind it; now and then anywhere.
fn mutate(bytes: &mut [u8], random: &mut Random) {
    let n = bytes.len();
    for _ in 0..=random.below(3) {
        let at = match random.below(10) {
            0..=3 => random.below(2_500.min(n)),
            4..=7 => n - 1 - random.below(24_000.min(n)),
            _ => random.below(n),
        };
        match random.below(4) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            kind => {
                let value = INTERESTING[random.below(INTERESTING.len())].to_le_bytes();
                let width = if kind == 2 { 4 } else { 8 };
                for (to, from) in bytes[at..].iter_mut().zip(&value[..width]) {
                    *to = *from;
                }
            }
        }
    }
}

fn write(path: &Path, bytes: &[u8], file_bytes: u64) {
    let mut file = File::create(path).expect("a file");
    file.write_all(bytes).and_then(|()| file.set_len(file_bytes)).expect("written"); // the weights are a hole
}

fn simulate(path: &Path, with_head: bool) -> Result<(), LoadError> {
    let model = Simulation::load(path, &ModelParams { with_head, ..ModelParams::default() })?;
    let kinds = if with_head { &[ContextKind::ModelWithHidden, ContextKind::Head][..] } else { &[ContextKind::Model] };
    for &kind in kinds {
        model.memory_bytes(&ContextParams { kind, n_ctx: 512, n_ubatch: 64, ..ContextParams::default() })?;
    }
    Ok(())
}

#[test]
#[ignore = "the body of the child process"]
fn child() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok()).expect("a number");
    let dir = tempfile::tempdir().expect("a directory");
    let with_head = std::env::var_os("MUTATED_HEAD").is_some();
    let original = if with_head {
        let path = dir.path().join("sound.gguf");
        write_chain(&path, 2, ChainHead::Hidden).expect("written");
        path
    } else {
        real_model()
    };
    let (sound, file_bytes) = header_bytes(&original);
    let path = dir.path().join("mutated.gguf");
    for seed in number("MUTATED_FROM")..number("MUTATED_TO") {
        let mut bytes = sound.clone();
        mutate(&mut bytes, &mut Random(seed));
        write(&path, &bytes, file_bytes);
        let Ok(header) = Header::open(&path) else { continue };
        if with_head && !ModelShape::of(&header).is_ok_and(|shape| HeadShape::of(&shape).is_some()) {
            continue;
        }
        println!("loading {seed}");
        let loaded = simulate(&path, with_head);
        println!("{} {seed}", if loaded.is_ok() { "loaded" } else { "refused" });
    }
    println!("end");
}

#[test]
fn no_damaged_header_that_the_reader_accepts_kills_llama_cpp() {
    no_child_dies(false);
}

#[test]
fn no_damaged_header_with_a_head_kills_llama_cpp() {
    no_child_dies(true);
}

fn no_child_dies(with_head: bool) {
    let n: u64 = std::env::var("MUTATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(1_000);
    let mut from = 0;
    let (mut loaded, mut refused, mut deaths) = (0, 0, Vec::new());
    while from < n {
        let mut child = Command::new(std::env::current_exe().expect("this test binary"))
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .envs(with_head.then_some(("MUTATED_HEAD", "1")))
            .envs([("MUTATED_FROM", from.to_string()), ("MUTATED_TO", n.to_string())])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a child process");
        let (mut current, mut is_done) = (None, false);
        for line in BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok) {
            match line.split_once(' ') {
                Some(("loading", seed)) => current = seed.parse::<u64>().ok(),
                Some(("loaded", _)) => loaded += 1,
                Some(("refused", _)) => refused += 1,
                _ => is_done |= line == "end",
            }
        }
        let status = child.wait().expect("a child");
        if is_done {
            break;
        }
        let seed = current.expect("the child said what it was about to load");
        deaths.push(format!("seed {seed}: {status}"));
        from = seed + 1;
    }
    println!(
        "{n} mutations: the reader accepted {}, llama.cpp loaded {loaded} and refused {refused}",
        loaded + refused
    );
    assert!(deaths.is_empty(), "{deaths:#?}");
    assert!(loaded > n / 50, "hardly any mutation reached llama.cpp: {loaded}");
}
