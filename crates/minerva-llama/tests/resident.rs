//! Cells that hold nothing take no memory, in a program of its own: memory is counted for the whole process.
#![cfg(target_os = "linux")]

use std::ops::ControlFlow;
use std::sync::Arc;

use minerva_llama::{Batch, Context, ContextParams, Model, ModelParams};

/// What SmolLM2-135M keeps of a token in f16: 30 layers, keys and values of 3 heads of 64.
const CELL_BYTES: u64 = 30 * 2 * 3 * 64 * 2;

fn load() -> Arc<Model> {
    let path =
        std::env::var_os("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model");
    Model::load(path.as_ref(), &ModelParams::default(), &mut |_| ControlFlow::Continue(())).expect("the model loads")
}

/// Memory of this process that no file stands behind.
fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("since Linux 4.5");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

fn fill(context: &mut Context, seq: u32, n_tokens: u32) -> Vec<f32> {
    let mut batch = Batch::new(context);
    let mut logits = Vec::new();
    for chunk in (0..n_tokens).collect::<Vec<_>>().chunks(256) {
        batch.clear();
        for &pos in chunk {
            batch.push(5 + (pos % 100).cast_signed(), pos, seq, pos + 1 == n_tokens).expect("within limits");
        }
        context.decode(&mut batch).expect("decodes");
    }
    if let Some(row) = context.logits(batch.len() - 1) {
        logits.extend_from_slice(row);
    }
    logits
}

#[test]
fn cells_take_memory_when_they_are_used_and_a_copy_takes_what_its_source_does() {
    let model = load();
    let n_cells = 32_768;
    let params = ContextParams {
        n_ctx: n_cells,
        n_seq_max: 16,
        n_batch: 256,
        n_ubatch: 256,
        n_threads: 2,
        ..ContextParams::default()
    };
    let before = anonymous_bytes();
    let mut context = Context::new(&model, &params).expect("a context");
    let all = u64::from(n_cells) * CELL_BYTES;
    let empty = anonymous_bytes().saturating_sub(before);
    assert!(empty < all / 10, "{empty} bytes for an empty cache of {all}");

    let logits = fill(&mut context, 0, 500);
    let filled = anonymous_bytes().saturating_sub(before);
    for seq in 1..16 {
        assert!(context.copy_seq(0, seq, 499).expect("copies"));
    }
    let mut batch = Batch::new(&context);
    batch.push(5 + 99, 499, 15, true).expect("within limits");
    context.decode(&mut batch).expect("decodes"); // copies between streams wait for a step
    let copied = anonymous_bytes().saturating_sub(before);
    let used = 15 * 500 * CELL_BYTES;
    assert!(copied - filled > used * 9 / 10, "{filled} bytes became {copied}, and 15 copies are {used}");
    assert!(copied - filled < used * 13 / 10, "{filled} bytes became {copied}, and 15 copies are {used}");

    let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(token, _)| token);
    assert_eq!(best(context.logits(0).expect("asked for")), best(&logits), "a copy continues like its source");
}
