//! Turns of the scheduler over a backend that does nothing: what its bench times and what `cargo xtask count` counts.

use super::backend::BackendLimits;
use super::request::TokenId;
use super::scheduler::{Job, Policy, Scheduler, Step, Terms};

/// Tokens of a system prompt, and of what follows it.
const SHARED_TOKENS: TokenId = 1000;
const OWN_TOKENS: TokenId = 24;

fn scheduler(n_seq_max: u32, n_cells_per_seq: u32) -> Scheduler {
    let limits = BackendLimits {
        n_seq_max,
        n_cells_per_seq,
        n_cells: n_seq_max * n_cells_per_seq,
        unified: false,
        stream_bytes: 0,
        cell_bytes: 0,
        state_bytes: 0,
        keeps_beginnings: true,
        checkpoints_need_cells: false,
        n_window_tokens: 0,
        n_copied_window_tokens: 0,
        window_cell_bytes: 0,
        n_batch: 2048,
        n_ubatch: 512,
        n_vocab: 32_000,
    };
    Scheduler::new(limits, Policy::default())
}

/// A request with the system prompt and its own text.
pub fn job(id: u64) -> Job {
    long_job(id, SHARED_TOKENS)
}

/// The same with a system prompt of another length.
fn long_job(id: u64, n_shared: TokenId) -> Job {
    let own = (0..OWN_TOKENS).map(|i| n_shared + 1000 + id as TokenId * 100 + i);
    Job {
        id,
        prompt: (0..n_shared).chain(own).collect(),
        n: 1,
        max_tokens: 500,
        reuse: true,
        guess: false,
        terms: Terms { client: id % 4, ..Terms::default() },
    }
}

/// One turn as the worker takes it, over a backend that does nothing. Returns the rows of the step.
pub fn turn(scheduler: &mut Scheduler, step: &mut Step) -> usize {
    scheduler.copies();
    while scheduler.admit(0).is_some() {
        scheduler.copies();
    }
    scheduler.make_room();
    scheduler.step(step);
    scheduler.computed(step, 10_000);
    for output in &step.outputs {
        scheduler.sampled(output.seq, 7);
    }
    step.rows.len()
}

/// `n` requests that decode.
pub fn decoding(n: u32) -> (Scheduler, Step) {
    burst(n, SHARED_TOKENS)
}

/// `n` requests that came at once with a system prompt of `n_shared` tokens, and decode.
pub fn burst(n: u32, n_shared: TokenId) -> (Scheduler, Step) {
    let (mut scheduler, mut step) = (scheduler(n, n_shared as u32 + 1048), Step::default());
    for id in 0..u64::from(n) {
        scheduler.enqueue(long_job(id, n_shared), 0);
    }
    while turn(&mut scheduler, &mut step) != n as usize {}
    (scheduler, step)
}

/// `n` sequences that are done and hold their prompts.
pub fn finished(n: u32) -> (Scheduler, Step) {
    let (mut scheduler, step) = decoding(n);
    let seqs: Vec<_> = scheduler.running().collect();
    for seq in seqs {
        scheduler.release(seq);
    }
    (scheduler, step)
}
