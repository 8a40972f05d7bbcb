//! Heads for multi-token prediction, on a model whose answers and whose head's guesses are known.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use minerva_gpu::synthetic::{ChainHead, following_in_chain, write_chain};
use minerva_llama::{
    Batch, BatchError, Context, ContextKind, ContextParams, DecodeError, LoadError, Model, ModelParams,
};

const N_LAYERS: u32 = 3;

fn load(dir: &Path, head: ChainHead, with_head: bool) -> Arc<Model> {
    let path = dir.join(format!("{head:?}.gguf"));
    write_chain(&path, N_LAYERS, head).expect("written");
    let params = ModelParams { with_head, ..ModelParams::default() };
    Model::load(&path, &params, &mut |_| ControlFlow::Continue(())).expect("loads")
}

fn context(model: &Arc<Model>, kind: ContextKind) -> Result<Context, LoadError> {
    Context::new(model, &ContextParams { kind, n_ctx: 512, n_seq_max: 2, n_ubatch: 8, ..ContextParams::default() })
}

fn chain(first: u32, n: usize) -> Vec<i32> {
    let chain = std::iter::successors(Some(first), |&token| Some(following_in_chain(token)));
    chain.take(n).map(u32::cast_signed).collect()
}

fn likeliest(logits: &[f32]) -> i32 {
    let best = (0..).zip(logits).max_by(|(_, a), (_, b)| a.total_cmp(b));
    best.map_or(-1, |(token, _)| token)
}

/// The hidden state after each of these tokens, as rows.
fn hidden_after(context: &mut Context, sequences: &[(u32, &[i32])]) -> Vec<Vec<f32>> {
    let n_hidden = context.model().n_hidden();
    let mut batch = Batch::new(context);
    for &(seq, tokens) in sequences {
        for (pos, &token) in (0..).zip(tokens) {
            batch.push(token, pos, seq, pos + 1 == tokens.len() as u32).expect("room");
        }
    }
    context.decode(&mut batch).expect("computes");
    context.hidden().chunks(n_hidden).map(<[f32]>::to_vec).collect()
}

#[test]
fn a_head_says_what_follows_from_the_hidden_state_and_the_next_token() {
    let dir = tempfile::tempdir().expect("a directory");
    for kind in [ChainHead::Token, ChainHead::Hidden] {
        let model = load(dir.path(), kind, true);
        let mut main = context(&model, ContextKind::ModelWithHidden).expect("a context");
        let mut head = context(&model, ContextKind::Head).expect("a head's context");
        // Longer than a physical batch, so that llama.cpp cuts it up and mixes the sequences.
        let texts = [chain(20, 21), chain(77, 13)];
        let hidden = hidden_after(&mut main, &[(0, &texts[0]), (1, &texts[1])]);
        assert_eq!(hidden.len(), 34, "one for each token, not only for outputs");
        assert_eq!(likeliest(main.logits(20).expect("an output")), chain(20, 22)[21]);

        let mut batch = Batch::new(&head);
        let (mut rows, mut wanted) = (Vec::new(), Vec::new());
        let mut states = hidden.iter();
        for (seq, text) in (0..).zip(&texts) {
            let whole = chain(text[0].cast_unsigned(), text.len() + 2);
            for (pos, state) in (1..).zip(states.by_ref().take(text.len())) {
                rows.push(batch.push_after(state, whole[pos], pos as u32, seq, true).expect("room"));
                wanted.push(whole[pos + 1]);
            }
        }
        head.decode(&mut batch).expect("computes");
        let said: Vec<i32> = rows.iter().map(|&row| likeliest(head.logits(row).expect("an output"))).collect();
        assert_eq!(said, wanted, "{kind:?}");
        assert_eq!(head.hidden().len(), 34 * model.n_hidden());
    }
}

#[test]
fn a_head_is_cut_copied_and_cleared_as_its_model_is() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = load(dir.path(), ChainHead::Token, true);
    let mut head = context(&model, ContextKind::Head).expect("a head's context");
    let state = vec![0.5; model.n_hidden()];
    let step = |head: &mut Context, seq: u32, from: u32, tokens: &[i32]| {
        let mut batch = Batch::new(head);
        for (pos, &token) in (from..).zip(tokens) {
            batch.push_after(&state, token, pos, seq, true).expect("room");
        }
        head.decode(&mut batch)
    };
    step(&mut head, 0, 7, &chain(9, 10)).expect("a head may begin in the middle of a text");
    assert!(head.truncate_seq(0, 12).expect("a sequence"));
    step(&mut head, 0, 12, &chain(9, 2)).expect("goes on behind the cut");
    assert!(head.copy_seq(0, 1, 9).expect("sequences"));
    step(&mut head, 1, 9, &chain(9, 2)).expect("goes on behind the copy");
    step(&mut head, 1, 5, &chain(9, 2)).expect_err("a hole in the text");
    head.clear_seq(1).expect("a sequence");
    step(&mut head, 1, 0, &chain(9, 2)).expect("begins anew");
}

#[test]
fn batches_with_and_without_hidden_states_do_not_reach_the_wrong_context() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = load(dir.path(), ChainHead::Token, true);
    let n_hidden = model.n_hidden();
    let mut main = context(&model, ContextKind::Model).expect("a context");
    let mut head = context(&model, ContextKind::Head).expect("a head's context");
    assert!(main.hidden().is_empty() && head.hidden().is_empty());

    let mut of_head = Batch::new(&head);
    assert_eq!(of_head.push(5, 0, 0, true), Err(BatchError::Hidden { given: 0, n_hidden }));
    let mut of_main = Batch::new(&main);
    let given = n_hidden - 1;
    assert_eq!(of_head.push_after(&vec![0.0; given], 5, 0, 0, true), Err(BatchError::Hidden { given, n_hidden }));
    assert_eq!(
        of_main.push_after(&vec![0.0; n_hidden], 5, 0, 0, true),
        Err(BatchError::Hidden { given: n_hidden, n_hidden: 0 })
    );
    of_head.push_after(&vec![0.0; n_hidden], 5, 0, 0, true).expect("room");
    of_main.push(5, 0, 0, true).expect("room");
    for (context, batch) in [(&mut main, &mut of_head), (&mut head, &mut of_main)] {
        assert!(matches!(context.decode(batch), Err(DecodeError::InvalidBatch { .. })));
    }
    main.decode(&mut of_main).expect("computes");
    assert!(main.hidden().is_empty(), "nobody asked for them");
}

#[test]
fn a_model_that_was_loaded_without_its_head_says_the_same() {
    let dir = tempfile::tempdir().expect("a directory");
    let text = chain(100, 9);
    for with_head in [false, true] {
        let model = load(dir.path(), ChainHead::Token, with_head);
        assert_eq!(context(&model, ContextKind::Head).is_ok(), with_head);
        let mut main = context(&model, ContextKind::Model).expect("a context");
        hidden_after(&mut main, &[(0, &text)]);
        assert_eq!(likeliest(main.logits(8).expect("an output")), chain(100, 10)[9]);
    }
}
