//! Prefixes that several sequences share: computed once, by whoever came first, and copied by the others.

use super::{Seat, Seats};
use crate::backend::SeqId;
use crate::request::TokenId;
use crate::scheduler::{Copy, Job, Rewind, common};

/// Where a seat gets the beginning of its prompt from, and how many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Source {
    seq: SeqId,
    n_tokens: usize,
}

impl Source {
    pub(super) fn seq(self) -> SeqId {
        self.seq
    }

    pub(super) fn n_tokens(self) -> usize {
        self.n_tokens
    }
}

impl Seat {
    /// Tokens of `prompt` that the seat holds or will hold whatever happens to be sampled, compared one by one. One less than the prompt at most:
    /// the last token has to be computed for its scores.
    /// None across namespaces.
    pub(super) fn will_share(&self, prompt: &[TokenId], namespace: u64) -> usize {
        if self.terms.namespace != namespace {
            return 0;
        }
        let n_sure = if self.owner.is_some() { self.n_prompt.max(self.n_cells) } else { self.n_cells };
        common(&self.tokens[..n_sure.min(self.tokens.len())], prompt).min(prompt.len() - 1)
    }

    /// Whether somebody admitted at `stamp` may wait for it: nobody waits for somebody who may wait for him.
    fn is_before(&self, stamp: u64) -> bool {
        self.owner.is_none() || self.stamp < stamp
    }
}

impl Seats {
    /// The fewest tokens that are worth a copy. Without a pool llama.cpp copies the whole stream, whose length bounds what that
    /// takes: 8,192 cells of a 7B model are 4 GiB, a third of a second on a CPU that computes 64 tokens in several.
    pub(super) fn least_shared(&self) -> usize {
        (self.limits.n_cells_per_seq as usize / 128).clamp(4, 64)
    }

    /// The most tokens of `prompt` that any seat has, or will have.
    pub(in crate::scheduler) fn n_seated(&self, prompt: &[TokenId], namespace: u64) -> usize {
        self.all.iter().map(|seat| seat.will_share(prompt, namespace)).max().unwrap_or(0)
    }

    /// The seat that shares most of `prompt`, if that is at least `least` tokens: a free one, or one that was admitted before
    /// `stamp`.
    fn best_source(
        &self,
        prompt: &[TokenId],
        namespace: u64,
        except: Option<SeqId>,
        stamp: u64,
        least: usize,
    ) -> Option<Source> {
        (0..self.limits.n_seq_max)
            .map(|seq| (seq, &self.all[seq as usize]))
            .filter(|(seq, seat)| Some(*seq) != except && seat.is_before(stamp))
            .map(|(seq, seat)| (self.reach(seq, prompt, namespace).n_tokens, std::cmp::Reverse(seat.stamp), seq))
            .max()
            .filter(|(n_tokens, ..)| *n_tokens >= least)
            .map(|(n_tokens, _, seq)| Source { seq, n_tokens })
    }

    /// Where the prompt of `job` would better come from than from `kept`, which keeps `n_kept` tokens of it.
    pub(super) fn better_source(&self, job: &Job, kept: Option<SeqId>, n_kept: usize) -> Option<Source> {
        let n_free = self.all.iter().filter(|seat| seat.owner.is_none()).count();
        self.best_source(&job.prompt, job.terms.namespace, kept, u64::MAX, n_kept + self.least_shared()).filter(
            |source| {
                let held = &self.all[source.seq as usize];
                // A free one must not be taken for another choice, and nobody waits for less than he has.
                let stays = held.owner.is_some() || n_free > job.n as usize;
                self.can_copy() && stays && held.n_cells >= n_kept
            },
        )
    }

    pub(super) fn is_source(&self, seq: SeqId) -> bool {
        self.busy().any(|(_, seat)| seat.source.is_some_and(|source| source.seq == seq))
    }

    /// Copies whose source is computed, in order of admission. Whoever lost his source gets another one, or computes his prompt.
    pub(in crate::scheduler) fn copies(&mut self) -> Vec<Copy> {
        let waiting: Vec<SeqId> = self.busy().filter(|(_, seat)| seat.source.is_some()).map(|(seq, _)| seq).collect();
        waiting.into_iter().filter_map(|seq| self.copy_for(seq)).collect()
    }

    fn copy_for(&mut self, seq: SeqId) -> Option<Copy> {
        let seat = &self.all[seq as usize];
        let (prompt, namespace) = (&seat.tokens[..seat.n_prompt], seat.terms.namespace);
        // Its seat may belong to somebody else by now.
        let is_as_it_was = |source: &Source| {
            let held = &self.all[source.seq as usize];
            held.is_before(seat.stamp) && self.reach(source.seq, prompt, namespace).n_tokens == source.n_tokens
        };
        let another = || self.best_source(prompt, namespace, Some(seq), seat.stamp, self.least_shared());
        let source = seat.source.filter(is_as_it_was).or_else(another).filter(|_| self.can_copy());
        let is_computed = |source: &Source| self.all[source.seq as usize].n_cells >= source.n_tokens;
        let ready = source.filter(is_computed);
        let rewind = ready.and_then(|source| self.reach(source.seq, prompt, namespace).rewind);
        let n_held = ready.map_or(0, |source| self.all[source.seq as usize].n_cells());
        let has_room = rewind.is_none() || n_held as usize <= self.n_free_cells();
        let n_least = ready.map_or(0, |source| self.all[source.seq as usize].n_least);
        let seat = self.at(seq);
        seat.source = if ready.is_some() { None } else { source };
        // All of the source is copied before it goes back: where that has no room the prompt is computed.
        let Source { seq: src, n_tokens } = ready.filter(|_| has_room)?;
        (seat.n_cells, seat.n_least) = (n_tokens, n_least);
        if let Some(at) = rewind {
            self.parked.used(at);
        }
        Some(Copy { src, dst: seq, n_tokens: n_tokens as u32, rewind: rewind.map(|at| Rewind { at, n_held }) })
    }

    /// This kind of memory cannot be copied, or not cut there now: for a while nobody waits for a copy.
    pub(in crate::scheduler) fn copy_failed(&mut self, seq: SeqId) {
        self.copying.fail(self.n_steps);
        self.forget_prefix(seq);
    }
}
