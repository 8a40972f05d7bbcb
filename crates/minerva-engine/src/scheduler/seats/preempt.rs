//! Who has to give a seat away, and what goes to host memory and comes back.
//!
//! A seat is taken from a request of a worse priority, or from a client who would still have at least as many sequences as the one
//! who comes: so it never goes back and forth. What it held is copied out, or computed again where that is quicker; the request
//! goes back to its old place in the queue and goes on with the very tokens it had.

use std::cmp::Ordering;

use super::{Seat, Seats};
use crate::backend::SeqId;
use crate::scheduler::CacheOp;
use crate::scheduler::job::{ClientId, Job};
use crate::scheduler::parked::Found;
use crate::scheduler::queue::{Resume, Waiting};

/// Fewer tokens of a prefix that was warmed are computed as quickly as they are fetched.
const LEAST_WARM_TOKENS: usize = 16;

impl Seats {
    /// The seats to take so that `next` has room; `None` when there are not enough that may be taken. `best` is the best priority of all.
    pub(in crate::scheduler) fn victims(&self, next: &Waiting, now_us: u64, best: i32) -> Option<Vec<SeqId>> {
        let (job, rank) = (&next.job, next.rank(now_us, best));
        let mut victims = Vec::new();
        while !self.has_room_without(job, &victims) {
            let candidates = self.busy().filter(|(seq, seat)| {
                let may_be_taken = !victims.contains(seq) && !self.is_needed(*seq, seat);
                may_be_taken
                    && match seat.rank(best).cmp(&rank) {
                        // Age keeps a seat and takes none.
                        Ordering::Greater => seat.terms.priority > job.terms.priority,
                        Ordering::Equal => self.is_ahead(seat, job, &victims),
                        Ordering::Less => false,
                    }
            });
            let worst = candidates.max_by_key(|(_, seat)| {
                (seat.rank(best), self.n_running_without(seat.terms.client, &victims), seat.stamp)
            });
            victims.push(worst?.0);
        }
        Some(victims)
    }

    /// Others wait for what it computes, or it for others.
    pub(super) fn is_needed(&self, seq: SeqId, seat: &Seat) -> bool {
        seat.is_waiting() || !seat.forks.is_empty() || self.is_source(seq)
    }

    /// Without this seat its client still has at least as many as the one of `job` then has.
    fn is_ahead(&self, seat: &Seat, job: &Job, victims: &[SeqId]) -> bool {
        let (his, ours) = (seat.terms.client, job.terms.client);
        let left = self.n_running_without(his, victims).saturating_sub(1);
        his != ours && left >= self.n_running(ours) + job.n as usize
    }

    fn n_running_without(&self, client: ClientId, victims: &[SeqId]) -> usize {
        self.busy().filter(|(seq, seat)| seat.terms.client == client && !victims.contains(seq)).count()
    }

    /// Takes the seat away. Returns the request as it waits from now on.
    pub(in crate::scheduler) fn preempt(&mut self, seq: SeqId, ops: &mut Vec<CacheOp>) -> Option<(Job, Resume)> {
        let seat = &self.all[seq as usize];
        let id = seat.owner?;
        let parked = self.parked.park(&seat.tokens[..seat.n_cells], seat.terms.namespace, true);
        ops.extend(parked.map(|at| CacheOp::Park { seq, at, n_tokens: seat.n_cells() }));
        if let Some(at) = parked {
            self.parked.note(at, &seat.terms);
        }
        let max_tokens = seat.reserved.saturating_sub(seat.tokens.len()) as u32;
        let job = Job {
            id,
            prompt: seat.tokens.clone(),
            n: 1,
            max_tokens,
            reuse: seat.reuse,
            guess: seat.guess,
            terms: seat.terms,
        };
        let resume = Resume { choice: seat.choice, parked, turn: seat.turn, n_answered: seat.n_answered() };
        self.release(seq);
        Some((job, resume))
    }

    /// Host memory that has more of a prompt than `n_elsewhere`: for a request that ran before its own, for others if it is worth it.
    pub(super) fn better_parked(&self, waiting: &Waiting, n_elsewhere: usize) -> Option<Found> {
        let job = &waiting.job;
        let n_room = self.most_unparked(job);
        let wanted = |found: &Found| {
            let is_own = waiting.resume.is_some_and(|resume| resume.parked == Some(found.id));
            let least = match (is_own, found.is_warm) {
                (true, _) => 1,
                (_, true) => LEAST_WARM_TOKENS,
                _ => self.parked.least_tokens(),
            };
            (is_own || job.reuse) && found.n_shared >= n_elsewhere + least && found.n_tokens <= n_room
        };
        self.parked.best(&job.prompt, job.terms.namespace, wanted)
    }

    /// Fills a seat that was just taken from host memory.
    pub(super) fn unpark(&mut self, seq: SeqId, found: Found, ops: &mut Vec<CacheOp>) {
        let Found { id, n_shared, n_tokens, rewind, .. } = found;
        ops.push(CacheOp::Unpark { at: id, seq, n_tokens: n_tokens as u32 });
        if let Some(at) = rewind {
            ops.push(CacheOp::Rewind { at, seq, n_tokens: n_shared as u32 });
            self.parked.used(at);
        } else if n_shared < n_tokens {
            ops.push(CacheOp::Keep { seq, n_tokens: n_shared as u32 });
        }
        let n_least = self.limits.least_of_copy(n_tokens);
        let seat = self.at(seq);
        (seat.n_cells, seat.n_least) = (n_shared, n_least);
        self.parked.used(id);
    }

    /// Copies out what a finished sequence holds and nobody else does, before its place is needed.
    pub(in crate::scheduler) fn park_finished(&mut self, seq: SeqId, ops: &mut Vec<CacheOp>) {
        let seat = &self.all[seq as usize];
        let (tokens, namespace) = (&seat.tokens[..seat.n_cells], seat.terms.namespace);
        if seat.owner.is_some() || tokens.len() < self.parked.least_tokens() {
            return;
        }
        if !self.parked.is_quick(tokens.len()) && self.decoding().next().is_some() {
            return;
        }
        let others = (0..self.limits.n_seq_max).filter(|&other| other != seq);
        let n_beside = others.map(|other| self.reach(other, tokens, namespace).n_tokens).max().unwrap_or(0);
        let n_held = n_beside.max(self.parked.n_held(tokens, namespace));
        if n_held + self.parked.least_tokens() > tokens.len() {
            return;
        }
        let parked = self.parked.park(tokens, namespace, false);
        ops.extend(parked.map(|at| CacheOp::Park { seq, at, n_tokens: seat.n_cells() }));
        if let Some(at) = parked {
            self.parked.note(at, &seat.terms);
        }
    }
}
