//! What the scheduler decides, as data: steps, admissions, and what has to happen in the cache before them.

use serde::{Deserialize, Serialize};

#[cfg(doc)]
use super::Scheduler;
use super::{Miss, ParkId, RequestId};
use crate::backend::{Row, SeqId};

/// A change of the cache that has to happen before the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
    /// What a sequence holds is copied to host memory; it stays where it is. When the backend cannot, call
    /// [`Scheduler::park_failed`].
    Park {
        /// The sequence.
        seq: SeqId,
        /// Its name there, until it is among [`Scheduler::dropped`].
        at: ParkId,
        /// Tokens that it holds.
        n_tokens: u32,
    },
    /// A sequence gets what was copied to host memory, and nothing else. When the backend cannot, call
    /// [`Scheduler::forget_prefix`].
    Unpark {
        /// Its name there.
        at: ParkId,
        /// The sequence.
        seq: SeqId,
        /// Tokens that it holds then.
        n_tokens: u32,
    },
    /// A sequence goes back to an earlier length with a checkpoint. When the backend cannot, call [`Scheduler::forget_prefix`].
    Rewind {
        /// The checkpoint.
        at: ParkId,
        /// The sequence.
        seq: SeqId,
        /// Tokens that it holds then.
        n_tokens: u32,
    },
}

/// What a sequence holds now, or the part of it that does not stay in its cells, goes to host memory for those who begin alike. When the
/// backend cannot, call [`Scheduler::checkpoint_failed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The sequence.
    pub seq: SeqId,
    /// Its name there, until it is among [`Scheduler::dropped`].
    pub at: ParkId,
    /// Tokens that the sequence holds.
    pub n_tokens: u32,
}

/// How a copy of a sequence that cannot be cut gets its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rewind {
    /// The checkpoint.
    pub at: ParkId,
    /// Tokens that the source holds, all of which are copied first.
    pub n_held: u32,
}

/// A prefix that one sequence gets from another before the next step. When the backend cannot, call
/// [`Scheduler::copy_failed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copy {
    /// The sequence that holds it.
    pub src: SeqId,
    /// The sequence that is to hold it, and nothing else.
    pub dst: SeqId,
    /// Tokens of it.
    pub n_tokens: u32,
    /// What it takes when the memory cannot be cut there. When this fails and the copy did not, call [`Scheduler::forget_prefix`].
    #[serde(default)]
    pub rewind: Option<Rewind>,
}

/// Sequences that had to give their cells away so that others get on; their requests wait to go on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Yielded {
    /// The sequences.
    pub seqs: Vec<SeqId>,
    /// What to do in the cache, in order.
    pub ops: Vec<CacheOp>,
}

/// A request that got its sequences.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// The request.
    pub id: RequestId,
    /// Its sequences, one per choice.
    pub seqs: Vec<SeqId>,
    /// Prompt tokens whose cells are reused.
    pub n_cached: u32,
    /// The choice that goes on in the only sequence, when it had to give its seat away before.
    pub resumes: Option<u32>,
    /// Why not all of the prompt but its last token is reused, when it is not.
    #[serde(default)]
    pub miss: Option<Miss>,
    /// Sequences that were taken from others for it; they wait again.
    pub preempted: Vec<SeqId>,
    /// What to do with the cache, in order, once the preempted are out of their sequences.
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
    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.outputs.clear();
        self.n_prefill = 0;
    }
}
