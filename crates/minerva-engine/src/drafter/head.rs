//! The model's own head for multi-token prediction, which writes ahead from the model's hidden states.
//!
//! The head follows the model: after each step it gets the hidden states of the rows that were computed, and what happens to the
//! model's sequences happens to its own. [`Followed`] is the model's backend with that added, so nobody else has to think of it. A
//! guess begins with the newest token beside the hidden state before it and goes on from the head's own hidden states.
//!
//! What comes back from memory or disk has no hidden states with it: the head begins anew there, with what is computed next. Its
//! guesses are then worse for a while, and never wrong, since the model is asked about each.
//!
//! # Invariants
//! - The head's cells of a sequence belong to a piece of the tokens that the model's cells hold, in the same places.
//! - What waits for a sequence joins on to that piece without a gap.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use minerva_llama::SavedState;

use super::{Draft, DraftError, DraftSettings, Drafted, Drafter, Wish, sure_token};
use crate::backend::{Backend, BackendLimits, HeadBackend, Row, SeqId, StepError};
use crate::request::TokenId;

/// Rows of a sequence that may wait to be computed with its next guess, where so many fit into a batch beside the newest token.
const MOST_WAITING: usize = 16;

/// So many hidden states are kept of a sequence, for cuts behind wrong guesses: the longest guess has 64 tokens.
const MOST_RECENT: usize = 66;

/// The model's backend, and a head that follows it.
pub struct Followed {
    model: Box<dyn Backend>,
    follower: Arc<Mutex<Follower>>,
}

/// Asks the head of a [`Followed`] backend for guesses.
pub struct HeadDrafter {
    follower: Arc<Mutex<Follower>>,
    settings: DraftSettings,
}

/// The backend of a model whose head follows it, and the drafter that asks the head.
pub fn followed(
    model: Box<dyn Backend>,
    head: Box<dyn HeadBackend>,
    settings: DraftSettings,
) -> (Followed, HeadDrafter) {
    let n_seq_max = model.limits().n_seq_max;
    let follower = Follower {
        limits: head.limits(),
        head,
        n_hidden: 0,
        seqs: (0..n_seq_max).map(|_| FollowedSeq::default()).collect(),
        rows: Vec::new(),
        states: Vec::new(),
        failure: None,
    };
    let follower = Arc::new(Mutex::new(follower));
    (Followed { model, follower: Arc::clone(&follower) }, HeadDrafter { follower, settings })
}

/// The head and what it knows of each sequence.
struct Follower {
    head: Box<dyn HeadBackend>,
    limits: BackendLimits,
    /// Width of a hidden state; 0 until the first was seen.
    n_hidden: usize,
    seqs: Vec<FollowedSeq>,
    rows: Vec<Row>,
    states: Vec<f32>,
    /// Why it does not follow any more.
    failure: Option<StepError>,
}

#[derive(Default)]
struct FollowedSeq {
    /// Tokens in the model's cells.
    n_tokens: u32,
    /// The head has cells for the tokens from `begin` to `end`. `end` may be one ahead of the model: the token that it will compute next.
    begin: u32,
    end: u32,
    /// That token.
    ahead: TokenId,
    /// The tokens from `end` on that the model has, and the hidden state before each of them.
    waiting: Vec<TokenId>,
    waiting_states: Vec<f32>,
    /// The hidden states after the last tokens.
    recent: Vec<f32>,
}

impl FollowedSeq {
    /// The hidden state after the last token, if it is known.
    fn last_state(&self, n_hidden: usize) -> Option<&[f32]> {
        self.recent.len().checked_sub(n_hidden).map(|from| &self.recent[from..]).filter(|state| !state.is_empty())
    }

    /// The head holds nothing of it any more; where the model is, is known.
    fn restart(&mut self) {
        (self.begin, self.end) = (self.n_tokens, self.n_tokens);
        self.waiting.clear();
        self.waiting_states.clear();
    }

    /// Nothing is known but how many tokens the model has.
    fn forget(&mut self, n_tokens: u32) {
        self.n_tokens = n_tokens;
        self.restart();
        self.recent.clear();
    }

    /// Keeps what belongs to the first `n_tokens` tokens, but for cells.
    fn shorten(&mut self, n_tokens: u32, n_hidden: usize) {
        let n_gone = self.n_tokens.saturating_sub(n_tokens) as usize;
        self.recent.truncate(self.recent.len().saturating_sub(n_gone * n_hidden));
        let n_waiting = n_tokens.saturating_sub(self.end) as usize;
        self.waiting.truncate(n_waiting);
        self.waiting_states.truncate(n_waiting * n_hidden);
        self.n_tokens = self.n_tokens.min(n_tokens);
        self.end = self.end.min(n_tokens);
        self.begin = self.begin.min(self.end);
    }
}

impl Follower {
    /// The model computed these rows; `hidden` has the state after each.
    fn follow(&mut self, rows: &[Row], hidden: &[f32]) {
        if rows.is_empty() {
            return;
        }
        self.n_hidden = hidden.len() / rows.len();
        if self.n_hidden == 0 {
            self.give_up(StepError::new(true, "no hidden states"));
            return;
        }
        for (row, state) in rows.iter().zip(hidden.chunks_exact(self.n_hidden)) {
            self.take(*row, state);
        }
        self.catch_up();
    }

    fn take(&mut self, row: Row, state: &[f32]) {
        let n_hidden = self.n_hidden;
        let Some(seq) = self.seqs.get_mut(row.seq as usize) else { return };
        if row.pos != seq.n_tokens {
            seq.forget(row.pos);
            self.head.truncate(row.seq, 0);
        }
        if row.pos < seq.end && row.token != seq.ahead {
            seq.end = row.pos;
            self.head.truncate(row.seq, row.pos);
        }
        if row.pos >= seq.end {
            seq.waiting.push(row.token);
            match seq.recent.len().checked_sub(n_hidden) {
                Some(from) => seq.waiting_states.extend_from_slice(&seq.recent[from..]),
                // Of the first token, and of the first that is computed behind what came from memory.
                None => seq.waiting_states.resize(seq.waiting_states.len() + n_hidden, 0.0),
            }
        }
        seq.recent.extend_from_slice(state);
        if seq.recent.len() > 2 * MOST_RECENT * n_hidden {
            seq.recent.drain(..seq.recent.len() - MOST_RECENT * n_hidden);
        }
        seq.n_tokens = row.pos + 1;
    }

    /// Computes what waits too long: a prompt, or an answer for which no guess was wanted.
    fn catch_up(&mut self) {
        let mut longest = self.seqs.iter().map(|seq| seq.waiting.len()).max().unwrap_or(0);
        let most_waiting = MOST_WAITING.min((self.limits.n_batch as usize).saturating_sub(1));
        while longest > most_waiting && self.failure.is_none() {
            // One physical batch at a time: hidden states are large.
            let mut room = self.limits.n_ubatch.min(self.limits.n_batch).max(1) as usize;
            self.clear_rows();
            for seq in 0..self.seqs.len() {
                let n = self.seqs[seq].waiting.len().min(room);
                self.push_waiting(seq as SeqId, n);
                room -= n;
            }
            if let Err(error) = self.compute() {
                self.lost(error);
            }
            longest = self.seqs.iter().map(|seq| seq.waiting.len()).max().unwrap_or(0);
        }
    }

    fn clear_rows(&mut self) {
        self.rows.clear();
        self.states.clear();
    }

    /// The first `n` tokens that wait become rows of the next step.
    fn push_waiting(&mut self, seq: SeqId, n: usize) {
        let followed = &mut self.seqs[seq as usize];
        for (pos, token) in (followed.end..).zip(followed.waiting.drain(..n)) {
            self.rows.push(Row { seq, token, pos, output: false });
        }
        self.states.extend(followed.waiting_states.drain(..n * self.n_hidden));
        followed.waiting_states.shrink_to(MOST_WAITING * self.n_hidden);
        followed.end += n as u32;
    }

    fn compute(&mut self) -> Result<(), StepError> {
        self.head.decode_after(&self.rows, &self.states)
    }

    /// The rows of a step could not be computed: their sequences begin anew, unless nothing can be computed any more.
    fn lost(&mut self, error: StepError) {
        for row in std::mem::take(&mut self.rows) {
            self.head.truncate(row.seq, 0);
            self.seqs[row.seq as usize].restart();
        }
        if !error.cache_unchanged {
            self.give_up(error);
        }
    }

    /// It follows no more: what it kept goes, and nothing is computed or copied for it.
    fn give_up(&mut self, why: StepError) {
        for (seq, followed) in (0..).zip(&mut self.seqs) {
            self.head.truncate(seq, 0);
            *followed = FollowedSeq::default();
        }
        (self.rows, self.states) = (Vec::new(), Vec::new());
        self.failure.get_or_insert(why);
    }

    fn truncate(&mut self, seq: SeqId, n_tokens: u32) {
        if self.failure.is_some() {
            return;
        }
        let n_hidden = self.n_hidden;
        let Some(followed) = self.seqs.get_mut(seq as usize) else { return };
        let end = followed.end;
        followed.shorten(n_tokens, n_hidden);
        if n_tokens < end && !self.head.truncate(seq, followed.end) {
            followed.forget(followed.n_tokens);
        }
    }

    fn copy(&mut self, src: SeqId, dst: SeqId, n_tokens: u32) {
        if self.failure.is_some() {
            return;
        }
        let Some(source) = self.seqs.get(src as usize) else { return };
        let mut copy = FollowedSeq {
            waiting: source.waiting.clone(),
            waiting_states: source.waiting_states.clone(),
            recent: source.recent.clone(),
            ..*source
        };
        copy.shorten(n_tokens, self.n_hidden);
        let has_cells = copy.begin < copy.end;
        if !has_cells || !self.head.copy(src, dst, copy.end) {
            self.head.truncate(dst, 0);
            if has_cells {
                copy.forget(copy.n_tokens);
            }
        }
        if let Some(target) = self.seqs.get_mut(dst as usize) {
            *target = copy;
        }
    }

    fn draft(&mut self, wishes: &[(Wish, &[TokenId])], settings: &DraftSettings) -> Result<Drafted, DraftError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone().into());
        }
        let mut drafted = Drafted {
            drafts: wishes.iter().map(|(wish, _)| Draft { seq: wish.seq, ..Draft::default() }).collect(),
            ..Drafted::default()
        };
        let began = Instant::now();
        self.clear_rows();
        let mut going: Vec<Going> =
            wishes.iter().enumerate().filter_map(|(at, &(wish, history))| self.begin(at, wish, history)).collect();
        let guessed_for: Vec<_> =
            wishes.iter().filter(|(wish, _)| going.iter().any(|going| going.seq == wish.seq)).collect();
        while !going.is_empty() {
            drafted.n_rounds += 1;
            drafted.n_round_guesses += going.len() as u32;
            match self.compute() {
                Ok(()) => self.round(&mut going, &mut drafted.drafts, settings)?,
                // No room for more: what was guessed until now is a guess.
                Err(error) if error.cache_unchanged && drafted.n_rounds > 1 => break,
                Err(error) => {
                    self.lost(error.clone());
                    if !error.cache_unchanged {
                        return Err(error.into());
                    }
                    break;
                }
            }
        }
        // The newest token stays: the model computes it next. Guesses are computed again, from the model's hidden states.
        for &&(Wish { seq, .. }, history) in &guessed_for {
            let followed = &mut self.seqs[seq as usize];
            let is_kept = followed.begin < followed.end && self.head.truncate(seq, history.len() as u32);
            if !is_kept {
                followed.restart();
            }
        }
        drafted.rounds_us = began.elapsed().as_micros() as u64;
        for (draft, (_, history)) in drafted.drafts.iter_mut().zip(wishes) {
            draft.n_held = history.len() as u32;
            if draft.tokens.len() < settings.min_tokens as usize {
                draft.tokens.clear();
            }
        }
        Ok(drafted)
    }

    /// The rows of the first round. `None` where the hidden state before the newest token is not known.
    fn begin(&mut self, at: usize, wish: Wish, history: &[TokenId]) -> Option<Going> {
        let (&token, before) = history.split_last()?;
        let followed = self.seqs.get(wish.seq as usize)?;
        let pos = before.len() as u32;
        let room = self.limits.n_cells_per_seq.saturating_sub(pos);
        let n_rows = self.rows.len() + followed.waiting.len() + 1;
        // It may have computed the newest token already, for a guess that nobody used.
        let is_here = followed.n_tokens == pos && followed.end <= pos + 1;
        if !is_here || n_rows > self.limits.n_batch as usize || wish.n_most.min(room) == 0 {
            return None;
        }
        let state = followed.last_state(self.n_hidden)?.to_vec();
        if followed.end > pos {
            self.seqs[wish.seq as usize].end = pos;
            if !self.head.truncate(wish.seq, pos) {
                self.seqs[wish.seq as usize].forget(pos);
                return None;
            }
        }
        self.push_waiting(wish.seq, self.seqs[wish.seq as usize].waiting.len());
        self.rows.push(Row { seq: wish.seq, token, pos, output: true });
        self.states.extend(state);
        let followed = &mut self.seqs[wish.seq as usize];
        (followed.end, followed.ahead) = (pos + 1, token);
        let row = self.rows.len() - 1;
        Some(Going { at, seq: wish.seq, pos, n_most: wish.n_most.min(room) as usize, row })
    }

    /// One more token of each guess, and the rows of the next round for those that go on.
    fn round(
        &mut self,
        going: &mut Vec<Going>,
        drafts: &mut [Draft],
        settings: &DraftSettings,
    ) -> Result<(), DraftError> {
        let n_hidden = self.n_hidden;
        self.clear_rows();
        let mut next = Vec::with_capacity(going.len());
        for mut going in going.drain(..) {
            let logits = self.head.logits(going.row).ok_or(DraftError::NoScores)?;
            let draft = &mut drafts[going.at];
            draft.is_complete = true;
            let Some(token) = sure_token(logits, settings) else { continue };
            draft.tokens.push(token);
            if draft.tokens.len() >= going.n_most || settings.ends.contains(&token) {
                continue;
            }
            let from = going.row * n_hidden;
            let state = self.head.hidden().get(from..from + n_hidden).ok_or(DraftError::NoScores)?;
            self.states.extend_from_slice(state);
            let pos = going.pos + draft.tokens.len() as u32;
            self.rows.push(Row { seq: going.seq, token, pos, output: true });
            going.row = self.rows.len() - 1;
            next.push(going);
        }
        *going = next;
        Ok(())
    }
}

/// A guess in the making.
struct Going {
    /// Its place among the wishes.
    at: usize,
    seq: SeqId,
    /// Where the newest token of the sequence is.
    pos: u32,
    n_most: usize,
    /// The row whose scores say what follows.
    row: usize,
}

fn lock(follower: &Mutex<Follower>) -> MutexGuard<'_, Follower> {
    follower.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Backend for Followed {
    fn limits(&self) -> BackendLimits {
        self.model.limits()
    }

    fn decode(&mut self, rows: &[Row]) -> Result<(), StepError> {
        self.model.decode(rows)?;
        let mut follower = lock(&self.follower);
        if follower.failure.is_none() {
            follower.follow(rows, self.model.hidden());
        }
        Ok(())
    }

    fn logits(&self, i: usize) -> Option<&[f32]> {
        self.model.logits(i)
    }

    fn truncate(&mut self, seq: SeqId, n_tokens: u32) -> bool {
        let is_cut = self.model.truncate(seq, n_tokens);
        lock(&self.follower).truncate(seq, if is_cut { n_tokens } else { 0 });
        is_cut
    }

    fn copy(&mut self, src: SeqId, dst: SeqId, n_tokens: u32) -> bool {
        let is_there = self.model.copy(src, dst, n_tokens);
        let mut follower = lock(&self.follower);
        if is_there {
            follower.copy(src, dst, n_tokens);
        } else {
            follower.truncate(dst, 0);
        }
        is_there
    }

    fn save(&mut self, seq: SeqId) -> Option<SavedState> {
        self.model.save(seq)
    }

    fn restore(&mut self, seq: SeqId, state: &[u8]) -> bool {
        lock(&self.follower).truncate(seq, 0);
        self.model.restore(seq, state)
    }

    fn save_part(&mut self, seq: SeqId) -> Option<SavedState> {
        self.model.save_part(seq)
    }

    fn rewind(&mut self, seq: SeqId, state: &[u8], n_tokens: u32) -> bool {
        let is_there = self.model.rewind(seq, state, n_tokens);
        lock(&self.follower).truncate(seq, if is_there { n_tokens } else { 0 });
        is_there
    }
}

impl Drop for HeadDrafter {
    /// Nobody asks any more: the head need not follow.
    fn drop(&mut self) {
        let nobody = StepError::new(true, "nobody asks the head");
        lock(&self.follower).give_up(nobody);
    }
}

impl Drafter for HeadDrafter {
    fn draft(&mut self, wishes: &[(Wish, &[TokenId])]) -> Result<Drafted, DraftError> {
        lock(&self.follower).draft(wishes, &self.settings)
    }

    /// Its cells are cut with the model's.
    fn truncate(&mut self, _seq: SeqId, _n_tokens: u32) {}

    fn n_cells(&self) -> u64 {
        lock(&self.follower).seqs.iter().map(|seq| u64::from(seq.end - seq.begin)).sum()
    }
}
