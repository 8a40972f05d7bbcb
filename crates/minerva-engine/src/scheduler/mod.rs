//! Who runs in the next step: plain state in, a plan out. No clock, no channel and no model in here, so that every
//! schedule can be replayed and compared as text.
//!
//! A turn has two parts because the first one can fail in the backend: [`Scheduler::admit`] seats waiting requests and
//! says what to do with the cache, [`Scheduler::step`] says which tokens to compute. Decoding sequences come first; prompts
//! fill what is left of the step ([`Budget`]).
//!
//! # Invariants
//! - A sequence belongs to one request from admission until [`Scheduler::release`], and then keeps its tokens for reuse.
//! - The cells that running sequences may still need never exceed the cells there are: "no room" cannot happen to an
//!   admitted request.
//! - A prefix that several prompts share is computed once: who comes later waits for it and gets a copy.
//! - A step never holds more rows than the backend takes, and a sequence's rows are in order and without gaps.

mod budget;
mod seats;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

pub use budget::Budget;
use seats::Seats;

use crate::backend::{BackendLimits, Row, SeqId};
use crate::request::TokenId;

/// A request's number, unique within an engine.
pub type RequestId = u64;

/// What the scheduler knows of a request.
#[derive(Debug, Clone)]
pub struct Job {
    /// The request.
    pub id: RequestId,
    /// Its prompt; at least one token.
    pub prompt: Vec<TokenId>,
    /// Continuations, each in a sequence of its own; at most `n_seq_max`.
    pub n: u32,
    /// The most tokens of each continuation; prompt and continuation fit in one sequence.
    pub max_tokens: u32,
    /// Whether cells of other requests may be reused.
    pub reuse: bool,
}

/// A change of the cache that has to happen before the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheOp {
    /// Keep the first tokens of a sequence. When the backend cannot, call [`Scheduler::forget_prefix`].
    Keep {
        /// The sequence.
        seq: SeqId,
        /// Tokens to keep.
        n_tokens: u32,
    },
    /// What a finished sequence holds goes to another place, and what that held is gone. When the backend cannot, call
    /// [`Scheduler::move_failed`].
    Move {
        /// Where it is.
        src: SeqId,
        /// Where it is wanted.
        dst: SeqId,
        /// Tokens that it holds.
        n_tokens: u32,
    },
}

/// A prefix that one sequence gets from another before the next step. When the backend cannot, call
/// [`Scheduler::copy_failed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy {
    /// The sequence that holds it.
    pub src: SeqId,
    /// The sequence that is to hold it, and nothing else.
    pub dst: SeqId,
    /// Tokens of it.
    pub n_tokens: u32,
}

/// A request that got its sequences.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admission {
    /// The request.
    pub id: RequestId,
    /// Its sequences, one per choice.
    pub seqs: Vec<SeqId>,
    /// Prompt tokens whose cells are reused.
    pub n_cached: u32,
    /// What to do with the cache, in order.
    pub ops: Vec<CacheOp>,
}

/// What a row of a step was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output {
    /// The row's index in the step.
    pub row: usize,
    /// The sequence.
    pub seq: SeqId,
}

/// One step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// The tokens to compute, at most `n_batch`.
    pub rows: Vec<Row>,
    /// The rows after which a token is to be sampled, in order.
    pub outputs: Vec<Output>,
    /// Rows that belong to prompts.
    pub n_prefill: usize,
}

impl Step {
    /// Empties the step and keeps its buffers.
    fn clear(&mut self) {
        self.rows.clear();
        self.outputs.clear();
        self.n_prefill = 0;
    }
}

/// All that decides about the next step.
#[derive(Debug)]
pub struct Scheduler {
    limits: BackendLimits,
    waiting: VecDeque<Job>,
    waiting_tokens: usize,
    seats: Seats,
    budget: Budget,
}

impl Scheduler {
    /// An empty schedule over a backend of these sizes.
    pub fn new(limits: BackendLimits) -> Self {
        Self {
            limits,
            waiting: VecDeque::new(),
            waiting_tokens: 0,
            seats: Seats::new(limits),
            budget: Budget::new(limits),
        }
    }

    /// Puts a request at the end of the queue.
    pub fn enqueue(&mut self, job: Job) {
        self.waiting_tokens += job.prompt.len();
        self.waiting.push_back(job);
    }

    /// Removes a waiting request. `false` when it does not wait.
    pub fn remove_waiting(&mut self, id: RequestId) -> bool {
        let Some(place) = self.waiting.iter().position(|job| job.id == id) else { return false };
        if let Some(job) = self.waiting.remove(place) {
            self.waiting_tokens -= job.prompt.len();
        }
        true
    }

    /// Waiting requests, and their prompt tokens.
    pub fn queued(&self) -> (usize, usize) {
        (self.waiting.len(), self.waiting_tokens)
    }

    /// Whether nothing runs and nothing waits.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && !self.seats.any_busy()
    }

    /// Cells held by running sequences, and cells left by finished ones.
    pub fn cells(&self) -> (u64, u64) {
        self.seats.cells()
    }

    /// Seats the first waiting request, if there is room for it. Call until it returns `None`.
    pub fn admit(&mut self) -> Option<Admission> {
        let job = self.waiting.front()?;
        if !self.seats.has_room(job) {
            return None; // first come, first served: nobody overtakes a large request
        }
        let job = self.waiting.pop_front()?;
        self.waiting_tokens -= job.prompt.len();
        Some(self.seats.seat(&job))
    }

    /// The backend could not keep a sequence's prefix: its whole prompt is computed.
    pub fn forget_prefix(&mut self, seq: SeqId) {
        self.seats.forget_prefix(seq);
    }

    /// Prefixes of admitted prompts that another sequence has computed for them. Call before admitting and after each admission: a
    /// source that is done may lose its seat to the next, and one that was done already needs no wait.
    pub fn copies(&mut self) -> Vec<Copy> {
        self.seats.copies()
    }

    /// The backend could not move what a sequence held to `seq`: it is lost, and nothing is moved any more.
    pub fn move_failed(&mut self, seq: SeqId) {
        self.seats.move_failed(seq);
    }

    /// The backend could not copy: the sequence computes its prompt itself.
    pub fn copy_failed(&mut self, seq: SeqId) {
        self.seats.copy_failed(seq);
    }

    /// Fills `step` with the next tokens to compute; it stays empty when nothing runs.
    pub fn step(&mut self, step: &mut Step) {
        step.clear();
        let n_batch = self.limits.n_batch as usize;
        // The longest admitted, if there are more than a batch holds.
        for (seq, seat) in self.seats.decoding().take(n_batch) {
            step.rows.push(Row { seq, token: seat.last_token(), pos: seat.n_cells(), output: true });
        }
        // By number: where each sequence has a stream of cells, llama.cpp computes at once only sequences whose numbers follow
        // one another in the batch (`split_equal`). Seven and then the first took 84 ms, the eight in order 71.
        step.rows.sort_unstable_by_key(|row| row.seq);
        step.outputs.extend(step.rows.iter().enumerate().map(|(row, decoded)| Output { row, seq: decoded.seq }));
        let n_decode = step.rows.len();
        let mut left = self.budget.prefill_tokens(n_decode, self.seats.n_unfinished_prompts()).min(n_batch - n_decode);
        for (seq, seat) in self.seats.prefilling() {
            let rest = seat.rest_of_prompt();
            let n = rest.len().min(left);
            for (i, &token) in rest[..n].iter().enumerate() {
                let output = i + 1 == rest.len();
                if output {
                    step.outputs.push(Output { row: step.rows.len(), seq });
                }
                step.rows.push(Row { seq, token, pos: seat.n_cells() + i as u32, output });
            }
            left -= n;
            if left == 0 {
                break;
            }
        }
        step.n_prefill = step.rows.len() - n_decode;
    }

    /// The step was computed and took `step_us` microseconds: its rows are in the cache.
    pub fn computed(&mut self, step: &Step, step_us: u64) {
        for row in &step.rows {
            self.seats.computed(row);
        }
        self.budget.learn(step.rows.len() - step.n_prefill, step.n_prefill, step_us);
    }

    /// The prompt of a request with several choices is computed in `seq`: the sequences that need a copy of it.
    pub fn forks(&mut self, seq: SeqId) -> Vec<SeqId> {
        self.seats.forks(seq)
    }

    /// A copy failed: the sequence computes the prompt itself.
    pub fn fork_failed(&mut self, seq: SeqId) {
        self.seats.forget_prefix(seq);
    }

    /// `token` was sampled for `seq`; the next step computes it.
    pub fn sampled(&mut self, seq: SeqId, token: TokenId) {
        self.seats.sampled(seq, token);
    }

    /// The sequence is done: its seat is free and its tokens stay for reuse.
    pub fn release(&mut self, seq: SeqId) {
        self.seats.release(seq);
    }

    /// What the sequence holds in the cache cannot be trusted: forget it. The caller clears it in the backend.
    pub fn discard(&mut self, seq: SeqId) {
        self.seats.discard(seq);
    }

    /// The running sequences.
    pub fn running(&self) -> impl Iterator<Item = SeqId> {
        self.seats.busy().map(|(seq, _)| seq)
    }
}
