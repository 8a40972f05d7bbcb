//! A small model that writes ahead of the main one: its likeliest token, as long as it is sure of it.
//!
//! It has cells of its own, one pool for all sequences, and remembers which tokens they hold. What it lacks of a sequence is
//! computed when a guess is wanted, what the main model did not accept is cut. Its cells are a cache: whoever needs room takes that
//! of the sequence that nobody asked about for longest.
//!
//! # Invariants
//! - What is held of a sequence are the first tokens of the history that it was given last.
//! - The cells in use never exceed those there are.

use std::time::Instant;

use super::{Draft, DraftError, DraftSettings, Drafted, Drafter, Wish, sure_token};
use crate::backend::{Backend, BackendLimits, Row, SeqId};
use crate::request::TokenId;
use crate::scheduler::common;

/// Up to so many tokens that are new since the last guess are computed in its first round; more is catching up.
const MOST_IN_ROUND: usize = 16;

/// A draft model over a backend of its own.
pub struct ModelDrafter {
    backend: Box<dyn Backend>,
    limits: BackendLimits,
    /// What each sequence's cells hold, and when it was asked about last.
    held: Vec<Held>,
    clock: u64,
    settings: DraftSettings,
    rows: Vec<Row>,
}

#[derive(Debug, Default)]
struct Held {
    tokens: Vec<TokenId>,
    asked: u64,
}

/// A guess in the making.
struct Going<'a> {
    /// Its place among the wishes.
    at: usize,
    seq: SeqId,
    /// Tokens of the sequence that are not computed yet.
    rest: &'a [TokenId],
    n_most: usize,
    guess: Vec<TokenId>,
    /// The row whose scores say what follows.
    row: usize,
}

impl ModelDrafter {
    /// A drafter for as many sequences as the backend has.
    pub fn new(backend: Box<dyn Backend>, settings: DraftSettings) -> Self {
        let limits = backend.limits();
        let held = (0..limits.n_seq_max).map(|_| Held::default()).collect();
        Self { backend, limits, held, clock: 0, settings, rows: Vec::new() }
    }

    fn n_held(&self) -> usize {
        self.held.iter().map(|held| held.tokens.len()).sum()
    }

    fn cut(&mut self, seq: SeqId, n_tokens: usize) {
        let Some(held) = self.held.get_mut(seq as usize) else { return };
        if n_tokens < held.tokens.len() {
            let is_cut = self.backend.truncate(seq, n_tokens as u32);
            held.tokens.truncate(if is_cut { n_tokens } else { 0 });
        }
    }

    /// Makes room for `n_more` cells; those of the wishes stay. `false` when there is none.
    fn make_room(&mut self, n_more: usize, wishes: &[(Wish, &[TokenId])]) -> bool {
        while self.n_held() + n_more > self.limits.n_cells as usize {
            let is_wished = |seq: usize| wishes.iter().any(|(wish, _)| wish.seq as usize == seq);
            let others = self.held.iter().enumerate().filter(|(seq, held)| !held.tokens.is_empty() && !is_wished(*seq));
            let Some((seq, _)) = others.min_by_key(|(_, held)| held.asked) else { return false };
            self.cut(seq as SeqId, 0);
        }
        true
    }

    /// Computes the rows that were collected.
    fn compute(&mut self) -> Result<(), DraftError> {
        self.backend.decode(&self.rows)?;
        for row in &self.rows {
            self.held[row.seq as usize].tokens.push(row.token);
        }
        Ok(())
    }

    fn push(&mut self, seq: SeqId, tokens: &[TokenId], output: bool) {
        let pos = self.held[seq as usize].tokens.len() as u32;
        for (i, (&token, pos)) in tokens.iter().zip(pos..).enumerate() {
            self.rows.push(Row { seq, token, pos, output: output && i + 1 == tokens.len() });
        }
    }

    /// Cuts what does not belong to the history any more, and says what is missing of it. `None` when there is no room beside what
    /// was `promised` to others.
    fn begin<'a>(
        &mut self,
        (wish, history): (Wish, &'a [TokenId]),
        wishes: &[(Wish, &[TokenId])],
        promised: &mut usize,
    ) -> Option<(&'a [TokenId], usize)> {
        let held = self.held.get_mut(wish.seq as usize)?;
        self.clock += 1;
        held.asked = self.clock;
        let last = history.len().checked_sub(1)?;
        // The last token is computed in any case, for its scores.
        let n_same = common(&held.tokens, &history[..last]);
        self.cut(wish.seq, n_same);
        let n_held = self.held[wish.seq as usize].tokens.len();
        // The last token of a guess is not computed.
        let room = (self.limits.n_cells_per_seq as usize).saturating_sub(last);
        let n_most = (wish.n_most as usize).min(room);
        if n_most == 0 {
            return None;
        }
        let needed = *promised + history.len() - n_held + n_most - 1;
        if !self.make_room(needed, wishes) {
            return None;
        }
        *promised = needed;
        Some((&history[n_held..], n_most))
    }

    /// Computes what a sequence is behind by, up to what its wish allows.
    fn catch_up<'a>(
        &mut self,
        behind: &mut [Option<(&'a [TokenId], usize)>],
        wishes: &[(Wish, &'a [TokenId])],
        drafted: &mut Drafted,
    ) -> Result<(), DraftError> {
        self.rows.clear();
        for (behind, (wish, _)) in behind.iter_mut().zip(wishes) {
            let Some((rest, _)) = behind else { continue };
            if rest.len() <= MOST_IN_ROUND {
                continue;
            }
            let room = (self.limits.n_batch as usize).saturating_sub(self.rows.len());
            let n = (rest.len() - 1).min(wish.n_feed as usize).min(room);
            self.push(wish.seq, &rest[..n], false);
            *rest = &rest[n..];
        }
        if !self.rows.is_empty() {
            let start = Instant::now();
            self.compute()?;
            drafted.n_fed = self.rows.len() as u32;
            drafted.fed_us = start.elapsed().as_micros() as u64;
        }
        Ok(())
    }

    /// One more token of each guess. Those that go on are left.
    fn round(&mut self, going: &mut Vec<Going<'_>>, done: &mut [Draft]) -> Result<(), DraftError> {
        self.rows.clear();
        for going in &mut *going {
            match going.guess.last() {
                None => self.push(going.seq, going.rest, true),
                Some(&token) => self.push(going.seq, &[token], true),
            }
            going.row = self.rows.len() - 1;
        }
        self.compute()?;
        let mut lost = false;
        going.retain_mut(|going| {
            let Some(logits) = self.backend.logits(going.row) else {
                lost = true;
                return false;
            };
            let mut goes_on = false;
            if let Some(token) = sure_token(logits, &self.settings) {
                going.guess.push(token);
                goes_on = going.guess.len() < going.n_most && !self.settings.ends.contains(&token);
            }
            if !goes_on {
                done[going.at].tokens = std::mem::take(&mut going.guess);
                done[going.at].is_complete = true;
            }
            goes_on
        });
        if lost { Err(DraftError::NoScores) } else { Ok(()) }
    }
}

impl Drafter for ModelDrafter {
    fn draft(&mut self, wishes: &[(Wish, &[TokenId])]) -> Result<Drafted, DraftError> {
        let mut drafted = Drafted::default();
        let mut promised = 0;
        let mut behind: Vec<_> = wishes.iter().map(|&wish| self.begin(wish, wishes, &mut promised)).collect();
        self.catch_up(&mut behind, wishes, &mut drafted)?;
        let mut done: Vec<Draft> = wishes.iter().map(|(wish, _)| Draft { seq: wish.seq, ..Draft::default() }).collect();
        let mut going = Vec::new();
        let mut n_rows = 0;
        for ((at, (wish, _)), behind) in wishes.iter().enumerate().zip(behind) {
            let Some((rest, n_most)) = behind else { continue };
            if rest.len() <= MOST_IN_ROUND && n_rows + rest.len() <= self.limits.n_batch as usize {
                n_rows += rest.len();
                going.push(Going { at, seq: wish.seq, rest, n_most, guess: Vec::new(), row: 0 });
            }
        }
        let start = Instant::now();
        while !going.is_empty() {
            drafted.n_rounds += 1;
            drafted.n_round_guesses += going.len() as u32;
            self.round(&mut going, &mut done)?;
        }
        drafted.rounds_us = start.elapsed().as_micros() as u64;
        for draft in &mut done {
            draft.n_held = self.held.get(draft.seq as usize).map_or(0, |held| held.tokens.len() as u32);
            if draft.tokens.len() < self.settings.min_tokens as usize {
                draft.tokens.clear();
            }
        }
        drafted.drafts = done;
        Ok(drafted)
    }

    fn truncate(&mut self, seq: SeqId, n_tokens: u32) {
        self.cut(seq, n_tokens as usize);
    }

    fn n_cells(&self) -> u64 {
        self.n_held() as u64
    }
}
