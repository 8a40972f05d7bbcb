//! A draft model over llama.cpp: the default model guesses for itself, and so does a small one without sense.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use minerva_engine::{
    DraftConfig, DraftingConfig, Engine, EngineConfig, LoadError, Prompt, Request, SamplingParams, Speculation,
};
use minerva_gpu::gguf::{Array, FileBuilder, GgmlType, Header, StringArray, Value};
use tempfile::TempDir;

use crate::real_model::config;
use crate::support::{ask, read, submit};

const MIB: u64 = 1 << 20;

fn load(draft: DraftConfig) -> Result<Engine, LoadError> {
    // All of its guesses are taken, however little it is sure of them.
    let drafting = DraftingConfig { min_probability: 0.0, ..DraftingConfig::default() };
    let config = EngineConfig { speculation: Speculation::Draft, draft: Some(draft), drafting, ..config() };
    Engine::load(config, |_| ControlFlow::Continue(()))
}

/// Texts that do not repeat themselves soon.
fn requests(n_tokens: u32) -> impl Iterator<Item = Request> {
    let beginnings =
        ["The history of the lighthouse", "Once upon a time there was a dragon who", "To bake bread, first"];
    beginnings
        .into_iter()
        .map(move |text| Request { ignore_eos: true, ..Request::text(text).greedy().max_tokens(n_tokens) })
}

#[test]
fn a_model_that_guesses_for_itself_is_right_and_changes_nothing() {
    let engine = load(DraftConfig::new(config().model_path)).expect("it loads twice");
    for request in requests(64) {
        let with = ask(&engine, request.clone());
        let without = ask(&engine, Request { speculate: false, ..request });
        assert_eq!(with.choices, without.choices);
        assert_eq!(without.summary().guessed_tokens, 0);
    }
    let stats = engine.stats();
    assert!(stats.drafted_tokens_total >= 4, "{stats:?}");
    assert!(stats.right_drafts_total * 10 >= stats.drafted_tokens_total * 9, "{stats:?}");
    assert_eq!((stats.failed_drafts_total, stats.failed_total), (0, 0));
    // Several at once, and sampled: with a stream of cells each, nobody is guessed for.
    let sampled = |seed| {
        let sampling = SamplingParams { seed: Some(seed), ..SamplingParams::default() };
        Request { sampling, ..Request::text("The sea").max_tokens(24) }
    };
    let together: Vec<_> = (1..4).map(|seed| submit(&engine, sampled(seed))).collect();
    for events in together {
        read(events).summary();
    }
}

#[test]
fn its_memory_is_planned_and_shown() {
    let main = config();
    let draft = DraftConfig { n_cells: Some(512), ..DraftConfig::new(&main.model_path) };
    let with = EngineConfig { draft: Some(draft.clone()), ..main };
    let machine = Engine::machine(&with).expect("this machine");
    let plan = Engine::plan(&with, &machine).expect("it fits");
    let planned = plan.best().draft.as_ref().expect("the draft model fits too");
    assert_eq!((planned.settings.context_tokens, planned.device), (512, None));
    let engine = load(draft).expect("it loads");
    let about = engine.info().draft.as_ref().expect("it has a draft model");
    assert_eq!((about.n_cells, about.memory.len()), (512, 1));
    let host = &about.memory[0];
    let real = host.weights_bytes + host.kv_bytes + host.compute_bytes;
    assert_eq!(host.planned_bytes, planned.estimate.host.total_bytes());
    assert!(host.planned_bytes.abs_diff(real) <= 2 * MIB, "{host:?}"); // mapped weights are counted with the gaps between them
    assert!(engine.info().placement.steps_down.is_empty());
}

#[test]
fn without_speculation_by_a_draft_model_none_is_loaded() {
    for speculation in [Speculation::Off, Speculation::Ngram] {
        let draft = Some(DraftConfig::new("nothing.gguf"));
        let machine = Engine::machine(&config()).expect("this machine");
        let plan = Engine::plan(&EngineConfig { speculation, draft, ..config() }, &machine).expect("it is not read");
        assert_eq!(plan.best().draft, None);
    }
}

/// A model of one layer with random weights and the default model's vocabulary, changed by `change`.
fn tiny(dir: &TempDir, change: impl Fn(&mut FileBuilder, &Header)) -> PathBuf {
    let header = Header::open(&config().model_path).expect("the model's header");
    let mut file = FileBuilder::new();
    for (key, value) in header.metadata.iter().filter(|(key, _)| *key != "general.alignment") {
        file.set(key, value.clone());
    }
    file.set("llama.block_count", 1_u32);
    change(&mut file, &header);
    for tensor in
        header.tensors.iter().filter(|tensor| !tensor.name.starts_with("blk.") || tensor.name.starts_with("blk.0."))
    {
        let small = tensor.dims.len() < 2;
        file.add_tensor(&tensor.name, if small { GgmlType::F32 } else { GgmlType::Q8_0 }, &tensor.dims);
    }
    let path = dir.path().join("tiny.gguf");
    file.write_random(&path, 7, &mut |_| {}).expect("written");
    path
}

fn refusal(path: &Path) -> String {
    load(DraftConfig::new(path)).expect_err("it is refused").to_string()
}

#[test]
fn a_small_model_without_sense_changes_nothing_and_is_soon_asked_no_more() {
    let dir = tempfile::tempdir().expect("a directory");
    let engine = load(DraftConfig::new(tiny(&dir, |_, _| {}))).expect("it loads");
    for request in requests(96) {
        let with = ask(&engine, request.clone());
        assert_eq!(with.choices, ask(&engine, Request { speculate: false, ..request }).choices);
    }
    let stats = engine.stats();
    assert!(stats.drafted_tokens_total > 0, "{stats:?}");
    assert!(stats.drafted_tokens_total < stats.generated_tokens_total / 4, "{stats:?}");
    let info = engine.info();
    assert!(info.draft.as_ref().is_some_and(|draft| draft.n_params < info.n_params));
}

#[test]
fn another_vocabulary_is_refused_with_the_difference() {
    let dir = tempfile::tempdir().expect("a directory");
    let tokens = |header: &Header| header.metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap().clone();
    let set = |file: &mut FileBuilder, texts: StringArray| {
        file.set("tokenizer.ggml.tokens", Value::Array(Array::String(texts)));
    };
    let other_text = tiny(&dir, |file, header| {
        let mut texts = StringArray::default();
        tokens(header).iter().enumerate().for_each(|(i, text)| texts.push(if i == 300 { b"<else>" } else { text }));
        set(file, texts);
    });
    let problem = refusal(&other_text);
    assert!(
        problem.starts_with("`model-draft` has another vocabulary than the model: its token 300 is \"<else>\""),
        "{problem}"
    );
    let other_start = tiny(&dir, |file, _| {
        file.set("tokenizer.ggml.add_bos_token", true);
    });
    assert!(refusal(&other_start).contains("at the beginning of a text, the main model nothing"));
    let missing = refusal(&dir.path().join("nothing.gguf"));
    assert!(missing.starts_with("`model-draft` cannot be read"), "{missing}");
    let recurrent = dir.path().join("mamba.gguf");
    let file = minerva_gpu::synthetic::shape_with_layers("mamba2-2.7b-q8_0", 1).expect("a shape");
    file.write_header_only(&recurrent).expect("written");
    assert!(refusal(&recurrent).contains("its tokenizer is"), "another vocabulary comes first");
}

#[test]
fn a_draft_model_that_cannot_be_loaded_is_named_and_one_without_room_is_done_without() {
    let dir = tempfile::tempdir().expect("a directory");
    let wrong_width = tiny(&dir, |file, _| {
        file.set("llama.embedding_length", 640_u32);
    });
    let problem = refusal(&wrong_width);
    assert!(problem.starts_with("`model-draft` cannot be"), "{problem}");
    let engine =
        load(DraftConfig { n_cells: Some(1 << 28), ..DraftConfig::new(config().model_path) }).expect("it loads");
    let info = engine.info();
    assert_eq!(info.draft, None, "it takes terabytes");
    assert!(info.placement.gave_up.iter().any(|text| text.contains("draft model")), "{:?}", info.placement.gave_up);
    assert_eq!(ask(&engine, Request::text("The sea").greedy().max_tokens(8)).summary().guessed_tokens, 0);
}

#[test]
fn a_prompt_that_the_draft_model_has_no_cells_for_is_computed_without_it() {
    let draft = DraftConfig { n_cells: Some(256), ..DraftConfig::new(config().model_path) };
    let engine = load(draft).expect("it loads");
    let prompt = Prompt::Tokens((1000..1300).collect());
    let answer = ask(&engine, Request { prompt, ignore_eos: true, ..Request::default() }.greedy().max_tokens(8));
    assert_eq!((answer.summary().guessed_tokens, engine.stats().failed_drafts_total), (0, 0));
}
