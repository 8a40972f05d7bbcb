//! Cells of one pool: how many are set aside for each sequence, and what gives way when answers are longer than was expected.
//!
//! Without a pool each seat has its own cells, and there is nothing to decide.
//!
//! # Invariants
//! - What a step computes has its cells: [`Seats::n_free_cells`] bounds its rows.
//! - A sequence alone in the pool has room for all that it may come to need, so somebody always gets on.

use super::{Seat, Seats};
use crate::backend::SeqId;
use crate::scheduler::job::{Job, Reservation};
use crate::scheduler::outlook::Answers;
use crate::scheduler::queue::Resume;
use crate::scheduler::{CacheOp, Yielded};

/// How many cells are set aside.
#[derive(Debug, Default)]
pub(in crate::scheduler) struct Claims {
    reservation: Reservation,
    pub(in crate::scheduler) answers: Answers,
}

impl Claims {
    pub(super) fn new(reservation: Reservation) -> Self {
        Self { reservation, answers: Answers::default() }
    }

    /// For `n_tokens` of which `n_answered` are an answer, that may become `most`.
    fn of(&self, n_tokens: usize, n_answered: usize, most: usize) -> usize {
        match self.reservation {
            Reservation::Full => most,
            Reservation::Expected => n_tokens.saturating_add(self.answers.to_come(n_answered)).min(most),
        }
    }
}

impl Seats {
    /// Cells that one choice of `job` may come to need: its prompt and all it may generate.
    pub(super) fn need(job: &Job) -> usize {
        job.prompt.len() + job.max_tokens as usize
    }

    fn claim(&self, seat: &Seat) -> usize {
        self.claims.of(seat.tokens.len(), seat.n_answered(), seat.reserved)
    }

    /// Whether there are seats, and with one pool of cells also cells, for all choices, once some sequences are gone. Cells of
    /// finished sequences count as free: seating evicts them where needed.
    pub(super) fn has_room_without(&self, job: &Job, gone: &[SeqId]) -> bool {
        let stays = |(seq, _): &(SeqId, &Seat)| !gone.contains(seq);
        let n_free = self.all.len() - self.busy().filter(stays).count();
        if n_free < job.n as usize {
            return false;
        }
        let claimed: usize = self.busy().filter(stays).map(|(_, seat)| self.claim(seat)).sum();
        let own = self.claims.of(job.prompt.len(), 0, Self::need(job)) * job.n as usize;
        !self.limits.unified || claimed + own <= self.limits.n_cells as usize
    }

    /// The most tokens that may come back from host memory for a request, which may be more than it shares: with one pool they have to
    /// find their place in what is set aside for it.
    pub(super) fn most_unparked(&self, job: &Job) -> usize {
        if self.limits.unified { self.claims.of(job.prompt.len(), 0, Self::need(job)) } else { usize::MAX }
    }

    /// Known tokens that are not computed.
    pub(in crate::scheduler) fn n_to_compute(&self) -> usize {
        self.busy().map(|(_, seat)| seat.tokens.len() - seat.n_cells).sum()
    }

    /// Cells that a step may fill.
    pub(in crate::scheduler) fn n_free_cells(&self) -> usize {
        if !self.limits.unified {
            return usize::MAX;
        }
        let held: usize = self.all.iter().map(|seat| seat.n_cells).sum();
        (self.limits.n_cells as usize).saturating_sub(held)
    }

    /// After somebody was seated: finished sequences give their cells up until all claims can be met.
    pub(super) fn evict_for_claims(&mut self, ops: &mut Vec<CacheOp>) {
        let claimed = self.busy().map(|(_, seat)| self.claim(seat)).sum();
        self.evict_beside(claimed, ops);
    }

    fn evict_beside(&mut self, n_busy: usize, ops: &mut Vec<CacheOp>) {
        if !self.limits.unified {
            return;
        }
        loop {
            let cached: usize = self.all.iter().filter(|s| s.owner.is_none()).map(|s| s.n_cells).sum();
            if n_busy + cached <= self.limits.n_cells as usize {
                return;
            }
            let oldest = (0..self.limits.n_seq_max)
                .filter(|&seq| self.all[seq as usize].owner.is_none() && self.all[seq as usize].n_cells > 0)
                .min_by_key(|&seq| (self.is_source(seq), self.all[seq as usize].stamp));
            let Some(seq) = oldest else { return };
            self.park_finished(seq, ops);
            self.note_lost(seq, 0);
            self.at(seq).clear();
            ops.push(CacheOp::Keep { seq, n_tokens: 0 });
        }
    }

    /// Before a step: all tokens that are known have to have cells. First finished sequences give theirs up, then running ones yield,
    /// of the worst priority, of the client with most of them, the last to come first. `best_waiting` is the best
    /// priority that waits. Returns who goes on later.
    pub(in crate::scheduler) fn make_room(
        &mut self,
        best_waiting: Option<i32>,
        yielded: &mut Yielded,
    ) -> Vec<(Job, Resume)> {
        let mut waiting = Vec::new();
        if !self.limits.unified {
            return waiting;
        }
        loop {
            let n_certain: usize = self.busy().map(|(_, seat)| seat.tokens.len()).sum();
            self.evict_beside(n_certain, &mut yielded.ops);
            if n_certain <= self.limits.n_cells as usize {
                return waiting;
            }
            let candidates = self.busy().filter(|(seq, seat)| !self.is_needed(*seq, seat));
            let best = self.best_priority(best_waiting);
            let worst =
                candidates.max_by_key(|(_, seat)| (seat.rank(best), self.n_running(seat.terms.client), seat.stamp));
            // Others wait for all of them: some rows of the next step have to wait, and then there is somebody.
            let Some(seq) = worst.map(|(seq, _)| seq) else { return waiting };
            waiting.extend(self.preempt(seq, &mut yielded.ops));
            yielded.seqs.push(seq);
        }
    }
}
