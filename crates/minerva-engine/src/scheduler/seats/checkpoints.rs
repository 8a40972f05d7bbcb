//! Where a prompt stops for a checkpoint, in memory that cannot be cut.
//!
//! A prompt stops shortly before its end, because the next turn of a conversation begins like it, and its template writes the last
//! tokens in another way; where it separates from another text, because a third may separate there too; and now and then on its way.

use super::{Seat, Seats};
use crate::backend::SeqId;
use crate::request::TokenId;
use crate::scheduler::parked::Reach;
use crate::scheduler::{CacheOp, Checkpoint, Job, ParkId};

/// Tokens before a prompt's end that the next turn of a conversation may not have: what opens an answer, and the end of an empty
/// chain of thought after it (`<think>`, blank, `</think>`, blank).
const TAIL_TOKENS: usize = 8;

/// A prompt stops at each multiple of this.
const EVERY_TOKENS: usize = 8192;

/// So many of the places stop it where it separates from other texts.
const MOST_SEPARATIONS: usize = 4;

/// Where a seat's prompt stops.
#[derive(Debug, Default)]
pub(super) struct Points {
    /// Lengths, ascending.
    at: Vec<usize>,
    /// Up to here somebody who comes later need not compute.
    n_known: usize,
}

impl Points {
    fn add(&mut self, n_tokens: usize) {
        if let Err(place) = self.at.binary_search(&n_tokens) {
            self.at.insert(place, n_tokens);
        }
    }

    pub(super) fn clear(&mut self) {
        self.at.clear();
        self.n_known = 0;
    }
}

impl Seats {
    /// How many tokens of `prompt` can be had from a seat, now or once it has computed them.
    pub(super) fn reach(&self, seq: SeqId, prompt: &[TokenId], namespace: u64) -> Reach {
        let seat = &self.all[seq as usize];
        let n_tokens = seat.will_share(prompt, namespace);
        // It stops there for those who wait.
        if seat.owner.is_some() && n_tokens > seat.n_cells {
            return Reach { n_tokens, rewind: None };
        }
        if n_tokens < seat.n_least {
            return Reach::default();
        }
        self.parked.reach(seat.n_cells, n_tokens, prompt, namespace)
    }

    /// What makes a free seat hold the first `n_keep` tokens of a prompt, which it has.
    pub(super) fn keep_op(&mut self, seq: SeqId, n_keep: usize, prompt: &[TokenId], namespace: u64) -> CacheOp {
        let n_tokens = n_keep as u32;
        let rewind = if n_keep == 0 { None } else { self.reach(seq, prompt, namespace).rewind };
        match rewind {
            Some(at) => {
                self.parked.used(at);
                CacheOp::Rewind { at, seq, n_tokens }
            }
            None => CacheOp::Keep { seq, n_tokens },
        }
    }

    /// Decides where the prompt of a seat stops that was just taken. `queued`: how many tokens prompts share with it that wait for a seat.
    pub(in crate::scheduler) fn plan_stops(&mut self, seq: SeqId, n_cached: usize, queued: &[usize]) {
        self.at(seq).points.clear();
        let seat = &self.all[seq as usize];
        if !seat.reuse || !self.takes_checkpoints() {
            return;
        }
        let (prompt, namespace) = (&seat.tokens[..seat.n_prompt], seat.terms.namespace);
        let n_start = seat.source.map_or(n_cached, super::Source::n_tokens);
        let others = (0..self.limits.n_seq_max).filter(|&other| other != seq);
        let beside = others.map(|other| self.all[other as usize].will_share(prompt, namespace));
        let shared = beside.chain(queued.iter().copied()).chain(self.parked.n_shared_each(prompt, namespace));
        let mut stops = most_shared(shared.filter(|&n_tokens| n_tokens >= n_start + self.least_shared()).collect());
        stops.extend((1..=prompt.len() / EVERY_TOKENS).map(|i| i * EVERY_TOKENS));
        stops.extend(prompt.len().checked_sub(TAIL_TOKENS));
        let source = seat.source.map(|source| (source.seq(), source.n_tokens()));
        self.at(seq).points.n_known = n_start;
        for n_tokens in stops {
            self.stop_at(seq, n_tokens);
        }
        // Whoever has computed what both share is where they separate.
        if let Some((source, n_tokens)) = source {
            self.stop_at(source, n_tokens);
        }
    }

    /// A prompt joined the queue: those that are being computed stop where it separates from them.
    pub(in crate::scheduler) fn stop_for(&mut self, job: &Job) {
        if !job.reuse || !self.takes_checkpoints() {
            return;
        }
        for seq in self.order.clone() {
            let n_tokens = self.all[seq as usize].will_share(&job.prompt, job.terms.namespace);
            self.stop_at(seq, n_tokens);
        }
    }

    fn stop_at(&mut self, seq: SeqId, n_tokens: usize) {
        let least = self.least_shared();
        let seat = self.at(seq);
        if seat.owner.is_some()
            && (seat.points.n_known.max(seat.n_cells) + least..seat.n_prompt).contains(&n_tokens)
            && seat.reuse
        {
            seat.points.add(n_tokens);
        }
    }

    pub(in crate::scheduler) fn takes_checkpoints(&self) -> bool {
        !self.limits.keeps_beginnings && self.max_checkpoints > 0
    }

    /// The most tokens that a prompt may compute in the next step: it stops where others wait for it, and for checkpoints.
    pub(in crate::scheduler) fn most_of_prompt(&self, seq: SeqId) -> usize {
        if self.limits.keeps_beginnings {
            return usize::MAX;
        }
        let seat = &self.all[seq as usize];
        let waiting = self.busy().filter_map(|(_, other)| other.source).filter(|source| source.seq() == seq);
        let for_others = waiting.map(super::Source::n_tokens);
        let own = seat.points.at.iter().copied().filter(|&n_tokens| self.may_take(seat, n_tokens));
        let next = for_others.chain(own).filter(|&n_tokens| n_tokens > seat.n_cells).min();
        next.map_or(usize::MAX, |n_tokens| n_tokens - seat.n_cells)
    }

    fn may_take(&self, seat: &Seat, n_tokens: usize) -> bool {
        let is_heard = self.decoding().next().is_some();
        let n_gained = n_tokens.saturating_sub(seat.points.n_known);
        self.max_checkpoints > 0 && self.parked.is_worth_a_checkpoint(n_tokens, n_gained, is_heard)
    }

    /// Checkpoints to take now that a step is computed.
    pub(in crate::scheduler) fn take_checkpoints(&mut self) -> Vec<Checkpoint> {
        let mut taken = Vec::new();
        for i in 0..self.order.len() {
            let seq = self.order[i];
            let seat = &self.all[seq as usize];
            let n_cells = seat.n_cells;
            let n_passed = seat.points.at.partition_point(|&n_tokens| n_tokens <= n_cells);
            if n_passed == 0 {
                continue;
            }
            if seat.points.at[n_passed - 1] == n_cells && self.may_take(seat, n_cells) {
                let (tokens, terms) = (&seat.tokens[..n_cells], seat.terms);
                let at = self.parked.add_checkpoint(tokens, terms.namespace, self.max_checkpoints);
                if let Some(at) = at {
                    self.parked.note(at, &terms);
                    taken.push(Checkpoint { seq, at, n_tokens: n_cells as u32 });
                }
                self.at(seq).points.n_known = n_cells;
            }
            self.at(seq).points.at.drain(..n_passed);
        }
        taken
    }

    /// The backend cannot copy out what a checkpoint needs: none is taken any more.
    pub(in crate::scheduler) fn checkpoint_failed(&mut self, at: ParkId) {
        self.max_checkpoints = 0;
        self.parked.forget(at);
    }
}

/// The places where most texts separate, the longer the better.
fn most_shared(mut places: Vec<usize>) -> Vec<usize> {
    places.sort_unstable();
    let mut counted: Vec<(usize, usize)> = places.chunk_by(|a, b| a == b).map(|same| (same.len(), same[0])).collect();
    counted.sort_unstable_by(|a, b| b.cmp(a));
    counted.into_iter().take(MOST_SEPARATIONS).map(|(_, n_tokens)| n_tokens).collect()
}
