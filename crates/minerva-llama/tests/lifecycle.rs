//! Drop order, use after an error, two contexts on one model, and the limits that llama.cpp itself does not check.
//! Needs the default model: `cargo xtask setup` fetches it.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use minerva_llama::{
    Batch, BatchError, ChatPrompt, ChatTemplate, Context, ContextParams, LoadError, Model, ModelParams, Simulation,
};

fn model_path() -> PathBuf {
    std::env::var_os("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model").into()
}

fn load() -> Arc<Model> {
    Model::load(&model_path(), &ModelParams::default(), &mut |_| ControlFlow::Continue(())).expect("the model loads")
}

fn small(n_seq_max: u32) -> ContextParams {
    ContextParams { n_ctx: 256 * n_seq_max, n_seq_max, n_threads: 2, n_threads_batch: 2, ..ContextParams::default() }
}

fn argmax(logits: &[f32]) -> i32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(token, _)| i32::try_from(token).expect("a token id"))
}

fn greedy(context: &mut Context, prompt: &[i32], seq: u32, n: usize) -> Vec<i32> {
    let mut batch = Batch::new(context);
    let mut tokens = prompt.to_vec();
    let mut done = 0;
    let mut answer = Vec::new();
    while answer.len() < n {
        batch.clear();
        for (pos, &token) in tokens.iter().enumerate().skip(done) {
            batch.push(token, pos as u32, seq, pos + 1 == tokens.len()).expect("within limits");
        }
        let last = batch.len() - 1;
        context.decode(&mut batch).expect("decodes");
        done = tokens.len();
        let token = argmax(context.logits(last).expect("asked for"));
        answer.push(token);
        tokens.push(token);
    }
    answer
}

#[test]
fn a_context_outlives_the_handle_of_its_model_and_two_contexts_agree() {
    let model = load();
    let prompt = model.tokenize("The capital of France is", true, false).expect("tokenizes");
    let mut first = Context::new(&model, &small(1)).expect("a context");
    let mut second = Context::new(&model, &small(2)).expect("a second context");
    drop(model);
    let a = greedy(&mut first, &prompt, 0, 6);
    drop(first);
    let b = greedy(&mut second, &prompt, 1, 6);
    assert_eq!(a, b);
    let mut text = Vec::new();
    for &token in &a {
        second.model().token_bytes(token, false, &mut text);
    }
    assert!(String::from_utf8_lossy(&text).contains("Paris"), "{}", String::from_utf8_lossy(&text));
}

#[test]
fn bad_tokens_sequences_and_positions_never_reach_llama_cpp() {
    let model = load();
    let mut context = Context::new(&model, &small(2)).expect("a context");
    let mut batch = Batch::new(&context);
    let n_vocab = model.n_vocab();
    assert_eq!(batch.push(-1, 0, 0, true), Err(BatchError::Token { token: -1, n_vocab }));
    assert_eq!(batch.push(i32::MAX, 0, 0, true), Err(BatchError::Token { token: i32::MAX, n_vocab }));
    assert_eq!(batch.push(1, 0, 2, true), Err(BatchError::Sequence { seq: 2, n_seq_max: 2 }));
    assert!(matches!(batch.push(1, 1 << 20, 0, true), Err(BatchError::Position { .. })));
    assert!(context.clear_seq(7).is_err());
    assert!(context.copy_seq(0, 0, 1).is_err());
    assert!(context.logits(0).is_none(), "nothing was decoded");
    // A gap in the positions is llama.cpp's to find; the context works on afterwards.
    batch.push(1, 5, 0, true).expect("within limits");
    batch.push(1, 9, 0, true).expect("within limits");
    let error = context.decode(&mut batch).expect_err("positions have a gap");
    assert!(error.cache_unchanged(), "{error}");
    assert_eq!(greedy(&mut context, &[1, 2, 3], 0, 2).len(), 2);
}

#[test]
fn a_copied_sequence_continues_like_its_source() {
    let model = load();
    let prompt = model.tokenize("One, two, three, four,", true, false).expect("tokenizes");
    for kv_unified in [false, true] {
        let mut context = Context::new(&model, &ContextParams { kv_unified, ..small(2) }).expect("a context");
        let a = greedy(&mut context, &prompt, 0, 4);
        assert!(context.copy_seq(0, 1, prompt.len() as u32 - 1).expect("copies"));
        let mut batch = Batch::new(&context);
        let at = prompt.len() as u32 - 1;
        batch.push(prompt[at as usize], at, 1, true).expect("within limits");
        context.decode(&mut batch).expect("decodes");
        assert_eq!(argmax(context.logits(0).expect("asked for")), a[0], "unified {kv_unified}");
    }
}

#[test]
fn a_sequence_that_was_saved_continues_elsewhere_as_it_would_have() {
    let model = load();
    let prompt = model.tokenize("One, two, three, four,", true, false).expect("tokenizes");
    for kv_unified in [false, true] {
        let mut context = Context::new(&model, &ContextParams { kv_unified, ..small(2) }).expect("a context");
        let a = greedy(&mut context, &prompt, 0, 4);
        assert!(context.truncate_seq(0, prompt.len() as u32 - 1).expect("cuts"));
        let state = context.save_seq(0).expect("saves");
        context.clear_seq(0).expect("always");
        greedy(&mut context, &prompt[..3], 1, 2); // what is in the way is gone afterwards
        assert!(context.restore_seq(1, &state).expect("restores"));
        let mut batch = Batch::new(&context);
        let at = prompt.len() as u32 - 1;
        batch.push(prompt[at as usize], at, 1, true).expect("within limits");
        context.decode(&mut batch).expect("decodes");
        assert_eq!(argmax(context.logits(0).expect("asked for")), a[0], "unified {kv_unified}");
    }
}

#[test]
fn a_copy_holds_what_its_source_held_when_it_was_made() {
    let model = load();
    let tokens = |text: &str| model.tokenize(text, true, false).expect("tokenizes");
    let (counted, other) = (tokens("One, two, three, four,"), tokens("The capital of France is the city of"));
    for kv_unified in [false, true] {
        let mut context = Context::new(&model, &ContextParams { kv_unified, ..small(4) }).expect("a context");
        let answer = greedy(&mut context, &counted, 0, 1);
        greedy(&mut context, &other, 1, 1);
        let at = counted.len() as u32 - 1;
        assert!(context.truncate_seq(0, at).expect("cuts"));
        let another = context.save_seq(1).expect("saves");
        // Nothing is computed between a copy and what follows it.
        assert!(context.copy_seq(0, 2, at).expect("copies"));
        let copied = context.save_seq(2).expect("saves");
        assert!(context.copy_seq(0, 2, at).expect("copies"));
        assert!(context.restore_seq(0, &another).expect("restores"));
        assert!(context.restore_seq(3, &copied).expect("restores"));
        for seq in [2, 3] {
            let mut batch = Batch::new(&context);
            batch.push(counted[at as usize], at, seq, true).expect("within limits");
            context.decode(&mut batch).expect("decodes");
            assert_eq!(argmax(context.logits(0).expect("asked for")), answer[0], "{seq}, unified {kv_unified}");
        }
    }
}

#[test]
fn a_batch_has_room_for_a_token_of_every_sequence() {
    let model = load();
    assert!(Context::new(&model, &ContextParams { n_batch: 3, n_ubatch: 3, ..small(4) }).is_err());
    let mut context = Context::new(&model, &ContextParams { n_batch: 4, n_ubatch: 1, ..small(4) }).expect("a context");
    assert_eq!(greedy(&mut context, &[1, 2, 3], 3, 2).len(), 2);
}

#[test]
fn a_damaged_state_is_refused_and_the_context_lives() {
    let model = load();
    let mut context = Context::new(&model, &small(2)).expect("a context");
    greedy(&mut context, &[1, 2, 3, 4, 5], 0, 2);
    let state = context.save_seq(0).expect("saves");
    assert!(context.save_seq(2).is_err() && context.restore_seq(2, &state).is_err(), "there are two sequences");
    for n in [0, 1, 8, state.len() / 2, state.len() - 1] {
        assert!(!context.restore_seq(1, &state[..n]).unwrap_or(false), "{n} of {} bytes", state.len());
        context.clear_seq(1).expect("always");
    }
    assert_eq!(greedy(&mut context, &[1, 2, 3], 1, 2).len(), 2);
}

#[test]
fn loads_report_progress_and_can_be_cancelled() {
    let mut fractions = Vec::new();
    let result = Model::load(&model_path(), &ModelParams::default(), &mut |fraction| {
        fractions.push(fraction);
        if fractions.len() > 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(result, Err(LoadError::Cancelled)));
    assert!(fractions.is_sorted());
}

#[test]
fn files_that_are_no_model_are_errors_with_a_reason() {
    let missing = Model::load("no-such.gguf".as_ref(), &ModelParams::default(), &mut |_| ControlFlow::Continue(()));
    assert!(matches!(missing, Err(LoadError::File { .. })));
    let error = Model::load("Cargo.toml".as_ref(), &ModelParams::default(), &mut |_| ControlFlow::Continue(()))
        .expect_err("not a model");
    assert!(!error.to_string().contains("no reason"), "{error}");
    let error = Simulation::load("Cargo.toml".as_ref(), &ModelParams::default()).expect_err("not a model");
    assert!(!error.to_string().is_empty());
}

#[test]
fn a_simulated_load_names_the_bytes_that_the_context_really_takes() {
    let params = small(4);
    let simulation = Simulation::load(&model_path(), &ModelParams::default()).expect("simulates");
    let devices = simulation.memory_bytes(&params).expect("measures");
    let host = devices.last().expect("the host is always there");
    let model = load();
    let sizes = (simulation.n_layers(), simulation.context_train_tokens());
    assert_eq!(sizes, (model.n_layers(), model.context_train_tokens()));
    let context = Context::new(&model, &params).expect("a context");
    let real = context.memory_bytes().expect("known");
    let real = real.iter().find(|d| d.device == "Host").expect("the host");
    assert_eq!(host.kv_bytes, real.kv_bytes);
    assert_eq!(host.weights_bytes, real.weights_bytes);
    assert!(host.compute_bytes.abs_diff(real.compute_bytes) <= 1 << 20, "{host:?} {real:?}");
}

#[test]
fn a_long_run_of_one_letter_is_tokenized_and_does_not_overflow_the_stack() {
    let model = load();
    for text in ["A".repeat(400_000), " ".repeat(400_000), "é".repeat(100_000), "1.".repeat(100_000)] {
        let tokens = model.tokenize(&text, false, false).expect("tokenizes");
        let mut bytes = Vec::new();
        for &token in &tokens {
            model.token_bytes(token, false, &mut bytes);
        }
        assert_eq!(bytes.len(), text.len());
    }
}

#[test]
fn the_models_chat_template_renders_with_control_tokens() {
    let model = load();
    let template = ChatTemplate::new(&model, None).expect("parses").expect("the model has one");
    let request = r#"{"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi"}]}"#;
    let syntax = template.render(request).expect("renders");
    let prompt: ChatPrompt = serde_json::from_str(&syntax).expect("its JSON");
    assert_eq!(
        prompt.prompt,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    let message = ChatTemplate::parse(&syntax, "Hello!", false).expect("parses");
    assert!(message.contains("Hello!"), "{message}");
    assert!(template.render("{").is_err());
    assert!(ChatTemplate::new(&model, Some("{% if %}")).is_err());
}

#[test]
fn a_vocabulary_without_texts_is_an_error_and_not_an_abort() {
    let path = std::env::temp_dir().join(format!("minerva-no-texts-{}.gguf", std::process::id()));
    let file = minerva_gpu::synthetic::shape("qwen2-1.5b-q4_0").expect("a known shape");
    file.write_header_only(&path).expect("written");
    // Weights of zeros that take no room.
    std::fs::OpenOptions::new().write(true).open(&path).and_then(|f| f.set_len(file.file_bytes())).expect("longer");
    let params = ModelParams { use_extra_buffers: false, use_mmap: true, ..ModelParams::default() };
    let loaded = Model::load(&path, &params, &mut |_| ControlFlow::Continue(()));
    std::fs::remove_file(&path).expect("removed");
    let model = loaded.expect("it loads");
    assert!(!model.has_texts() && model.has_token(5));
    assert!(model.tokenize("some text", true, true).is_err());
    assert!(!model.is_control(5) && !model.is_end_of_generation(5));
    let mut bytes = Vec::new();
    model.token_bytes(5, true, &mut bytes);
    assert!(bytes.is_empty());
}

/// Two layers that look 512 tokens back, with random weights.
fn windowed() -> (tempfile::TempDir, Arc<Model>) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("windowed.gguf");
    let shape = minerva_gpu::synthetic::shape_with_layers("gemma3-1b-all-windowed", 2).expect("a shape");
    shape.write_random(&path, 1, &mut |_| {}).expect("room for it");
    let model = Model::load(&path, &ModelParams::default(), &mut |_| ControlFlow::Continue(())).expect("it loads");
    (folder, model)
}

fn fill(context: &mut Context, seq: u32, n_tokens: u32) {
    let mut batch = Batch::new(context);
    for chunk in (0..n_tokens).collect::<Vec<_>>().chunks(64) {
        batch.clear();
        for &pos in chunk {
            batch.push(5 + (pos % 100).cast_signed(), pos, seq, false).expect("within limits");
        }
        context.decode(&mut batch).expect("decodes");
    }
}

#[test]
fn a_window_that_has_moved_on_is_not_cut_or_copied_behind_its_back() {
    let (_folder, model) = windowed();
    assert_eq!(model.n_window_tokens(), 512);
    let params =
        |full_windows| ContextParams { n_ctx: 4096, n_seq_max: 2, n_batch: 64, n_ubatch: 64, full_windows, ..small(2) };
    let mut context = Context::new(&model, &params(false)).expect("a context");
    assert!(!context.keeps_beginnings());
    fill(&mut context, 0, 1500);
    assert_eq!(context.copy_seq(0, 1, 600), Ok(false), "most of the window before 600 is overwritten");
    assert_eq!(context.copy_seq(0, 1, 1500), Ok(true), "all of it");
    assert_eq!(context.truncate_seq(0, 1490), Ok(true), "the window before 1490 is there");
    assert_eq!(context.truncate_seq(0, 600), Ok(false));
    context.clear_seq(0).expect("always");
    fill(&mut context, 0, 300);
    assert_eq!(context.truncate_seq(0, 100), Ok(true), "nothing has left the window yet");

    let mut context = Context::new(&model, &params(true)).expect("a context");
    assert!(context.keeps_beginnings());
    fill(&mut context, 0, 1500);
    assert_eq!(context.copy_seq(0, 1, 600), Ok(true));
    let state = context.save_seq(0).expect("it is saved");
    assert_eq!(context.truncate_seq(0, 600), Ok(true));
    // A copy has no more than the last window.
    for (n_tokens, is_there) in [(1500, true), (1499, true), (1498, false), (600, false)] {
        assert_eq!(context.restore_seq(0, &state), Ok(true));
        assert_eq!(context.truncate_seq(0, n_tokens), Ok(is_there), "{n_tokens} of 1500 tokens");
    }
    assert_eq!(context.restore_seq(0, &state), Ok(true));
    assert_eq!(context.copy_seq(0, 1, 600), Ok(false));
    assert_eq!(context.copy_seq(0, 1, 1500), Ok(true));
}
