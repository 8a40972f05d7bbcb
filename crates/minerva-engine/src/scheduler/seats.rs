//! The sequences of the cache: who sits where, what each one holds, and how many cells are promised.

mod places;
mod sharing;

use sharing::Source;

use super::{Admission, CacheOp, Job, RequestId};
use crate::backend::{BackendLimits, Row, SeqId};
use crate::request::TokenId;

/// One sequence. `tokens[..n_cells]` is what the cache holds; while it runs, one more token may wait to be computed.
#[derive(Debug, Default)]
pub(super) struct Seat {
    owner: Option<RequestId>,
    tokens: Vec<TokenId>,
    n_cells: usize,
    n_prompt: usize,
    /// Cells that the running request may come to need.
    reserved: usize,
    /// Seats of the same request that wait for this one's prompt.
    forks: Vec<SeqId>,
    waits_for_fork: bool,
    /// Another seat that computes the beginning of this one's prompt.
    source: Option<Source>,
    /// Order of admission, and of release for seats that are free.
    stamp: u64,
}

impl Seat {
    pub(super) fn n_cells(&self) -> u32 {
        self.n_cells as u32
    }

    pub(super) fn last_token(&self) -> TokenId {
        self.tokens[self.n_cells]
    }

    pub(super) fn rest_of_prompt(&self) -> &[TokenId] {
        &self.tokens[self.n_cells..self.n_prompt]
    }

    fn is_waiting(&self) -> bool {
        self.waits_for_fork || self.source.is_some()
    }

    fn is_prefilling(&self) -> bool {
        self.owner.is_some() && !self.is_waiting() && self.n_cells < self.n_prompt
    }

    fn is_decoding(&self) -> bool {
        self.owner.is_some() && !self.is_waiting() && self.n_cells >= self.n_prompt && self.tokens.len() > self.n_cells
    }

    fn clear(&mut self) {
        self.tokens.clear();
        self.n_cells = 0;
    }
}

/// All sequences.
#[derive(Debug)]
pub(super) struct Seats {
    all: Vec<Seat>,
    /// Busy seats in order of admission, so that a step is fair.
    order: Vec<SeqId>,
    limits: BackendLimits,
    stamp: u64,
    /// No copy has failed yet.
    can_copy: bool,
    /// No move has failed yet.
    can_move: bool,
}

impl Seats {
    pub(super) fn new(limits: BackendLimits) -> Self {
        let all = (0..limits.n_seq_max).map(|_| Seat::default()).collect();
        Self { all, order: Vec::new(), limits, stamp: 0, can_copy: limits.keeps_beginnings, can_move: true }
    }

    fn at(&mut self, seq: SeqId) -> &mut Seat {
        &mut self.all[seq as usize]
    }

    pub(super) fn any_busy(&self) -> bool {
        !self.order.is_empty()
    }

    pub(super) fn busy(&self) -> impl Iterator<Item = (SeqId, &Seat)> {
        self.order.iter().map(|&seq| (seq, &self.all[seq as usize]))
    }

    pub(super) fn decoding(&self) -> impl Iterator<Item = (SeqId, &Seat)> {
        self.busy().filter(|(_, seat)| seat.is_decoding())
    }

    pub(super) fn prefilling(&self) -> impl Iterator<Item = (SeqId, &Seat)> {
        self.busy().filter(|(_, seat)| seat.is_prefilling())
    }

    /// Prompts that are not computed yet, those that wait for a beginning included.
    pub(super) fn n_unfinished_prompts(&self) -> usize {
        self.busy().filter(|(_, seat)| !seat.waits_for_fork && seat.n_cells < seat.n_prompt).count()
    }

    /// Cells held by running sequences, and cells left by finished ones.
    pub(super) fn cells(&self) -> (u64, u64) {
        self.all.iter().fold((0, 0), |(used, cached), seat| match seat.owner {
            Some(_) => (used + seat.n_cells as u64, cached),
            None => (used, cached + seat.n_cells as u64),
        })
    }

    /// Cells that one choice of `job` may come to need: its prompt and all it may generate.
    fn need(job: &Job) -> usize {
        job.prompt.len() + job.max_tokens as usize
    }

    /// Whether there are seats, and with one pool of cells also cells, for all choices. Cells of finished sequences
    /// count as free: seating evicts them where needed.
    pub(super) fn has_room(&self, job: &Job) -> bool {
        let n_free = self.all.iter().filter(|seat| seat.owner.is_none()).count();
        if n_free < job.n as usize {
            return false;
        }
        let promised: usize = self.busy().map(|(_, seat)| seat.reserved).sum();
        !self.limits.unified || promised + Self::need(job) * job.n as usize <= self.limits.n_cells as usize
    }

    /// Gives `job` its seats: for the first choice the free one that shares most of the prompt, or any beside another one that shares
    /// more; then any.
    pub(super) fn seat(&mut self, job: &Job) -> Admission {
        let mut ops = Vec::new();
        let kept = self.best_free(job);
        let n_kept = kept.map_or(0, |seq| self.all[seq as usize].will_share(&job.prompt));
        let source = if job.reuse { self.better_source(job, kept, n_kept) } else { None };
        let first = match (kept, source) {
            (Some(seq), None) => Some(seq),
            (kept, source) => self.vacate(source.map(Source::seq), &mut ops).or(kept),
        };
        let first = first.unwrap_or(0); // `has_room` said that there is one
        let reuses = job.reuse && source.is_none();
        let n_cached = if reuses { self.all[first as usize].will_share(&job.prompt) } else { 0 };
        let mut seqs = vec![first];
        self.occupy(first, job, n_cached, &mut ops);
        self.at(first).source = source;
        for _ in 1..job.n {
            let Some(seq) = self.vacate(source.map(Source::seq), &mut ops) else { break };
            self.occupy(seq, job, 0, &mut ops);
            self.at(seq).waits_for_fork = true;
            self.at(first).forks.push(seq);
            seqs.push(seq);
        }
        self.evict_for_room(&mut ops);
        Admission { id: job.id, seqs, n_cached: n_cached as u32, ops }
    }

    fn occupy(&mut self, seq: SeqId, job: &Job, n_keep: usize, ops: &mut Vec<CacheOp>) {
        self.stamp += 1;
        let stamp = self.stamp;
        let seat = self.at(seq);
        if seat.n_cells != n_keep {
            ops.push(CacheOp::Keep { seq, n_tokens: n_keep as u32 });
        }
        seat.owner = Some(job.id);
        seat.tokens.clear();
        seat.tokens.extend_from_slice(&job.prompt);
        seat.tokens.reserve(job.max_tokens.min(4096) as usize);
        seat.n_cells = n_keep;
        seat.n_prompt = job.prompt.len();
        seat.reserved = Self::need(job);
        seat.forks.clear();
        seat.waits_for_fork = false;
        seat.source = None;
        seat.stamp = stamp;
        self.order.push(seq);
    }

    /// With one pool of cells, finished sequences give theirs up until all promises can be kept.
    fn evict_for_room(&mut self, ops: &mut Vec<CacheOp>) {
        if !self.limits.unified {
            return;
        }
        loop {
            let promised: usize = self.busy().map(|(_, seat)| seat.reserved).sum();
            let cached: usize = self.all.iter().filter(|s| s.owner.is_none()).map(|s| s.n_cells).sum();
            if promised + cached <= self.limits.n_cells as usize {
                return;
            }
            let oldest = (0..self.limits.n_seq_max)
                .filter(|&seq| self.all[seq as usize].owner.is_none() && self.all[seq as usize].n_cells > 0)
                .min_by_key(|&seq| (self.is_source(seq), self.all[seq as usize].stamp));
            let Some(seq) = oldest else { return };
            self.at(seq).clear();
            ops.push(CacheOp::Keep { seq, n_tokens: 0 });
        }
    }

    /// The free seat that shares the longest prefix with the prompt, if that keeps at least half of what it holds: a few
    /// tokens in common are not worth the end of a long conversation.
    fn best_free(&self, job: &Job) -> Option<SeqId> {
        let shares = |seat: &Seat| if job.reuse { seat.will_share(&job.prompt) } else { 0 };
        let best = (0..self.limits.n_seq_max)
            .map(|seq| (seq, &self.all[seq as usize]))
            .filter(|(_, seat)| seat.owner.is_none() && seat.n_cells > 0)
            .filter(|(_, seat)| shares(seat) > 0 && shares(seat) * 2 >= seat.n_cells)
            .max_by_key(|(_, seat)| (shares(seat), std::cmp::Reverse(seat.stamp)));
        best.map(|(seq, _)| seq)
    }

    pub(super) fn forget_prefix(&mut self, seq: SeqId) {
        let seat = self.at(seq);
        seat.n_cells = 0;
        seat.waits_for_fork = false;
        seat.source = None;
    }

    pub(super) fn computed(&mut self, row: &Row) {
        let seat = self.at(row.seq);
        debug_assert_eq!(seat.n_cells as u32, row.pos, "rows of a sequence are in order");
        seat.n_cells += 1;
    }

    pub(super) fn forks(&mut self, seq: SeqId) -> Vec<SeqId> {
        let n_prompt = self.at(seq).n_prompt;
        let forks = std::mem::take(&mut self.at(seq).forks);
        for &fork in &forks {
            let seat = self.at(fork);
            seat.n_cells = n_prompt;
            seat.waits_for_fork = false;
        }
        forks
    }

    pub(super) fn sampled(&mut self, seq: SeqId, token: TokenId) {
        self.at(seq).tokens.push(token);
    }

    pub(super) fn release(&mut self, seq: SeqId) {
        self.stamp += 1;
        let stamp = self.stamp;
        let seat = self.at(seq);
        seat.owner = None;
        seat.tokens.truncate(seat.n_cells); // a last token that was sampled but never computed is not in the cache
        seat.reserved = 0;
        seat.waits_for_fork = false;
        seat.source = None;
        seat.stamp = stamp;
        // Whoever waited for this prompt has to compute it: the first of them, the rest wait on.
        let mut forks = std::mem::take(&mut seat.forks).into_iter();
        if let Some(heir) = forks.next() {
            let rest = forks.collect();
            let heir = self.at(heir);
            heir.waits_for_fork = false;
            heir.forks = rest;
        }
        self.order.retain(|&busy| busy != seq);
        for seat in &mut self.all {
            seat.forks.retain(|&fork| fork != seq);
        }
    }

    pub(super) fn discard(&mut self, seq: SeqId) {
        self.at(seq).clear();
    }
}

/// How many tokens both begin with.
fn common(one: &[TokenId], other: &[TokenId]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}
