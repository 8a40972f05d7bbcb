//! A simulated head for multi-token prediction. It panics when it gets the hidden state of another place.

use std::time::Duration;

use super::{N_VOCAB, SimConfig, SimDraft, SimSeq};
use crate::backend::{Backend, BackendLimits, HeadBackend, Row, SeqId, StepError};
use crate::request::TokenId;
use minerva_llama::SavedState;

/// How far a hidden state knows what the simulator will write.
const AHEAD: usize = 20;

/// Numbers of a hidden state: a number that depends on every token, in two halves, and what will be written.
const N_HIDDEN: usize = 2 + AHEAD;

/// The hidden state after what a sequence holds.
pub(super) fn hidden_after(seq: &SimSeq, config: &SimConfig, hidden: &mut Vec<f32>) {
    push_hash(seq.hash(), hidden);
    let mut later = seq.clone();
    for _ in 0..AHEAD {
        let token = later.next(config.answer_tokens, config.period_tokens);
        hidden.push(token as f32);
        later.tokens.push(token);
    }
}

fn push_hash(hash: u64, hidden: &mut Vec<f32>) {
    hidden.extend([hash >> 32, hash].map(|half| f32::from_bits(half as u32)));
}

/// `None` for the zeros that stand for a state that nobody knows.
fn hash_of(state: &[f32]) -> Option<u64> {
    let [high, low] = [state[0], state[1]].map(|half| u64::from(half.to_bits()));
    let hash = high << 32 | low;
    (hash != 0).then_some(hash)
}

/// What one sequence of the head holds: for each token from `begin` on the number that depends on all tokens up to it, if it is known.
#[derive(Debug, Clone, Default)]
struct HeadSeq {
    begin: usize,
    after: Vec<Option<u64>>,
}

pub(super) struct SimHead {
    limits: BackendLimits,
    draft: SimDraft,
    seqs: Vec<HeadSeq>,
    rows: Vec<Option<Vec<f32>>>,
    hidden: Vec<f32>,
    n_steps: u64,
}

impl SimHead {
    pub(super) fn new(limits: BackendLimits, draft: &SimDraft) -> Self {
        let limits = BackendLimits { n_cells: draft.n_cells.unwrap_or(limits.n_cells), ..limits };
        let seqs = (0..limits.n_seq_max).map(|_| HeadSeq::default()).collect();
        Self { limits, draft: draft.clone(), seqs, rows: Vec::new(), hidden: Vec::new(), n_steps: 0 }
    }

    fn row(&mut self, row: Row, state: &[f32]) {
        let seq = &mut self.seqs[row.seq as usize];
        let pos = row.pos as usize;
        if seq.after.is_empty() {
            seq.begin = pos;
        }
        assert_eq!(seq.begin + seq.after.len(), pos, "sequence {} of the head has a gap", row.seq);
        let before = hash_of(state);
        if let (Some(Some(known)), Some(given)) = (seq.after.last(), before) {
            assert_eq!(*known, given, "the hidden state of another place, before token {pos} of sequence {}", row.seq);
        }
        let after = before.map(|hash| SimSeq::hash_with(hash, row.token));
        seq.after.push(after);
        let ahead = &state[2..];
        // It goes on from its own guesses only as long as they are the simulator's.
        let is_on_the_way = ahead[0] as TokenId == row.token;
        push_hash(after.unwrap_or(0), &mut self.hidden);
        self.hidden
            .extend(ahead[1..].iter().copied().chain([0.0]).map(|token| if is_on_the_way { token } else { 0.0 }));
        self.rows.push(row.output.then(|| {
            let hash = after.unwrap_or(0);
            let chance = (hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32 / (1 << 24) as f32;
            let mut logits = vec![0.0; N_VOCAB];
            let said = if is_on_the_way && chance < self.draft.quality { ahead[1] as usize } else { 0 };
            logits[said] = 20.0;
            logits
        }));
    }
}

impl Backend for SimHead {
    fn limits(&self) -> BackendLimits {
        self.limits
    }

    fn decode(&mut self, _rows: &[Row]) -> Result<(), StepError> {
        panic!("a head without hidden states");
    }

    fn logits(&self, i: usize) -> Option<&[f32]> {
        self.rows.get(i)?.as_deref()
    }

    fn hidden(&mut self) -> &[f32] {
        &self.hidden
    }

    fn truncate(&mut self, seq: SeqId, n_tokens: u32) -> bool {
        let held = &mut self.seqs[seq as usize];
        held.after.truncate((n_tokens as usize).saturating_sub(held.begin));
        true
    }

    fn copy(&mut self, src: SeqId, dst: SeqId, n_tokens: u32) -> bool {
        self.seqs[dst as usize] = self.seqs[src as usize].clone();
        self.truncate(dst, n_tokens)
    }

    fn save(&mut self, _seq: SeqId) -> Option<SavedState> {
        None
    }

    fn restore(&mut self, _seq: SeqId, _state: &[u8]) -> bool {
        false
    }
}

impl HeadBackend for SimHead {
    fn decode_after(&mut self, rows: &[Row], hidden: &[f32]) -> Result<(), StepError> {
        if self.draft.step_us > 0 {
            std::thread::sleep(Duration::from_micros(self.draft.step_us));
        }
        assert!(rows.len() <= self.limits.n_batch as usize, "a step of {} rows", rows.len());
        assert_eq!(hidden.len(), rows.len() * N_HIDDEN, "hidden states of {} rows", rows.len());
        let held: usize = self.seqs.iter().map(|seq| seq.after.len()).sum();
        if held + rows.len() > self.limits.n_cells as usize {
            return Err(StepError::new(true, "no room"));
        }
        self.n_steps += 1;
        self.rows.clear();
        self.hidden.clear();
        for (row, state) in rows.iter().zip(hidden.chunks(N_HIDDEN)) {
            self.row(*row, state);
        }
        if self.draft.fails_at_step == Some(self.n_steps) {
            return Err(StepError::new(false, "a simulated fault"));
        }
        Ok(())
    }
}
