//! Low-rank adapters of the real model: what they change, how much, and what is refused.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minerva_gpu::gguf::{FileBuilder, Header};
use minerva_gpu::synthetic;
use minerva_llama::{Adapter, Batch, Context, ContextParams, LoadError, Model, ModelParams, Simulation};

fn model_path() -> PathBuf {
    std::env::var_os("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model").into()
}

fn load(adapters: Vec<Adapter>) -> Result<Arc<Model>, LoadError> {
    Model::load(&model_path(), &ModelParams { adapters, ..ModelParams::default() }, &mut |_| ControlFlow::Continue(()))
}

fn logits(model: &Arc<Model>) -> Vec<f32> {
    let params = ContextParams { n_ctx: 256, n_threads: 1, n_threads_batch: 1, ..ContextParams::default() };
    let mut context = Context::new(model, &params).expect("a context");
    let mut batch = Batch::new(&context);
    for (pos, token) in (0..).zip([504, 3575, 282, 4649, 314]) {
        batch.push(token, pos, 0, pos == 4).expect("fits");
    }
    context.decode(&mut batch).expect("decodes");
    context.logits(4).expect("asked for").to_vec()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

struct Fixture {
    dir: tempfile::TempDir,
    base: Header,
}

impl Fixture {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory"), base: Header::open(&model_path()).expect("a header") }
    }

    fn write(&self, name: &str, change: impl FnOnce(&mut FileBuilder)) -> PathBuf {
        self.write_with_rank(name, 8, change)
    }

    fn write_with_rank(&self, name: &str, rank: u64, change: impl FnOnce(&mut FileBuilder)) -> PathBuf {
        let mut file = synthetic::adapter(&self.base, rank, |_| true);
        change(&mut file);
        let path = self.dir.path().join(name);
        file.write_random(&path, 3, &mut |_| {}).expect("written");
        path
    }
}

fn of(path: &Path, scale: f32) -> Adapter {
    Adapter { path: path.to_owned(), scale }
}

#[test]
fn adapters_change_answers_by_their_scale() {
    let files = Fixture::new();
    let once = files.write("once.gguf", |_| {});
    let twice = files.write("twice.gguf", |file| _ = file.set("adapter.lora.alpha", 32.0_f32)); // the other one has 16
    let bare = logits(&load(Vec::new()).expect("loads"));
    let with = |adapters: &[Adapter]| logits(&load(adapters.to_vec()).expect("loads"));
    assert_eq!(with(&[of(&once, 0.0)]), bare, "switched off");
    let full = with(&[of(&once, 1.0)]);
    assert!(distance(&full, &bare) > 0.1, "{}", distance(&full, &bare));
    // Half of twice as much, and two halves, are the same up to rounding.
    for same in [with(&[of(&twice, 0.5)]), with(&[of(&once, 0.5), of(&once, 0.5)])] {
        assert!(distance(&same, &full) < 0.05 * distance(&full, &bare), "{}", distance(&same, &full));
    }
}

#[test]
fn contexts_of_one_model_share_its_adapters() {
    let files = Fixture::new();
    let model = load(vec![of(&files.write("a.gguf", |_| {}), 1.0)]).expect("loads");
    let first = logits(&model);
    let others: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(|| logits(&model))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    assert_eq!(others, [first.clone(), first]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_simulation_counts_adapters_and_holds_none_of_their_memory() {
    let resident_bytes = || {
        let status = std::fs::read_to_string("/proc/self/status").expect("linux");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a line");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
    };
    let files = Fixture::new();
    let path = files.write_with_rank("large.gguf", 256, |_| {});
    let file_bytes = path.metadata().expect("written").len();
    let before = resident_bytes();
    let params = ModelParams { adapters: vec![of(&path, 1.0)], ..ModelParams::default() };
    let simulation = Simulation::load(&model_path(), &params).expect("simulates");
    let with = simulation.memory_bytes(&ContextParams::default()).expect("measures");
    let held = resident_bytes().saturating_sub(before);
    let bare = Simulation::load(&model_path(), &ModelParams::default()).expect("simulates");
    let without = bare.memory_bytes(&ContextParams::default()).expect("measures");
    let more = with[0].weights_bytes - without[0].weights_bytes;
    assert!(more.abs_diff(file_bytes) < 1 << 20, "{more} {file_bytes}");
    assert!(held < file_bytes / 4, "{held} of {file_bytes}"); // other tests of this program run meanwhile
}

#[test]
fn what_is_no_adapter_of_the_model_is_an_error_and_the_next_load_works() {
    let files = Fixture::new();
    let other = files.write("other.gguf", |file| _ = file.set("general.architecture", "gemma2".to_owned()));
    for path in [&other, &model_path(), &files.dir.path().join("missing.gguf")] {
        load(vec![of(path, 1.0)]).map(|_| ()).expect_err("refused");
    }
    load(Vec::new()).expect("loads");
}
