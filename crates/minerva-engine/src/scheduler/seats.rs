//! The sequences of the cache: who sits where, what each one holds, and how many cells are promised.

mod checkpoints;
mod keeping;
mod misses;
mod places;
mod preempt;
mod room;
mod sharing;

use checkpoints::Points;
pub use misses::Miss;
use room::Claims;
use sharing::Source;

use super::cost::Costs;
use super::draft::{LookupTrust, Trust};
use super::job::{ClientId, DraftLimits, Job, Policy, RequestId, Terms};
use super::lost::Lost;
use super::parked::{Parked, Reach};
use super::queue::{Turn, Waiting};
use super::rest::Rest;
use super::{Admission, CacheOp};
use crate::backend::{BackendLimits, Row, SeqId};
use crate::drafter::{Draft, Wish, said_before};
use crate::request::TokenId;

/// Tokens that a draft model may catch up in a step before its speed is known, and in any case.
const FIRST_FEED_TOKENS: u32 = 32;

/// After a copy that failed none is made for so many steps, and never for more than so many.
const FIRST_REST_STEPS: u64 = 64;
const LONGEST_REST_STEPS: u64 = 65_536;

/// One sequence. `tokens[..n_cells]` is what the cache holds; while it runs, one more token may wait to be computed.
#[derive(Debug, Default)]
pub(super) struct Seat {
    owner: Option<RequestId>,
    /// Which of the owner's continuations.
    choice: u32,
    /// Those of the owner, or of the last one.
    terms: Terms,
    reuse: bool,
    /// The owner's place among others, here and should it have to go back to the queue.
    turn: Turn,
    guess: bool,
    /// Guessed tokens of the step that is being computed, and how many of them were right so far.
    guessed: Vec<TokenId>,
    /// How many tokens before them were the same where they were looked up.
    n_same: usize,
    n_right: usize,
    /// Whether the guesses are in the cache, and not only asked for.
    is_guess_computed: bool,
    /// Something else was sampled: what follows now is not what was guessed, whichever token it is.
    is_guess_over: bool,
    /// In what the text has said before.
    trust: LookupTrust,
    /// In the draft model.
    draft_trust: Trust,
    /// What the draft model gave for the next step; `None` when it was not asked, or had not caught up.
    draft: Option<Vec<TokenId>>,
    /// The guesses of this step are the draft model's, and whether it was asked at all.
    is_drafted: bool,
    was_draft_asked: bool,
    /// Tokens that the draft model keeps.
    n_draft_held: usize,
    /// Steps since the owner came here.
    n_steps: u32,
    tokens: Vec<TokenId>,
    n_cells: usize,
    /// It cannot be cut any shorter: it came back from host memory with the last of its windows only.
    n_least: usize,
    n_prompt: usize,
    /// Tokens at the end of the prompt that are its own answer, from before it had to yield.
    n_answered_before: usize,
    /// Cells that the running request may come to need.
    reserved: usize,
    /// Seats of the same request that wait for this one's prompt.
    forks: Vec<SeqId>,
    waits_for_fork: bool,
    /// Another seat that computes the beginning of this one's prompt.
    source: Option<Source>,
    /// Where its prompt stops for checkpoints.
    points: Points,
    /// Order of admission, and of release for seats that are free.
    stamp: u64,
}

impl Seat {
    pub(super) fn n_cells(&self) -> u32 {
        self.n_cells as u32
    }

    /// What is not computed yet: the token that was sampled last, or several that had to follow.
    pub(super) fn pending(&self) -> &[TokenId] {
        &self.tokens[self.n_cells..]
    }

    /// All its tokens.
    pub(super) fn history(&self) -> &[TokenId] {
        &self.tokens
    }

    /// What is computed.
    pub(super) fn held(&self) -> &[TokenId] {
        &self.tokens[..self.n_cells]
    }

    /// More tokens that it may come to have.
    pub(super) fn n_left(&self) -> usize {
        self.reserved.saturating_sub(self.tokens.len())
    }

    /// Tokens of the prompt that are not computed.
    pub(super) fn n_prompt_left(&self) -> usize {
        self.n_prompt.saturating_sub(self.n_cells)
    }

    /// Tokens of its answer.
    pub(super) fn n_answered(&self) -> usize {
        self.n_answered_before + self.tokens.len().saturating_sub(self.n_prompt)
    }

    /// Whether an answer is wanted at all: not where a prompt is only computed to be there.
    pub(super) fn is_answered(&self) -> bool {
        self.reserved > self.n_prompt + 1
    }

    pub(super) fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Lower is earlier; `best` is the best priority that it is compared with.
    fn rank(&self, best: i32) -> i64 {
        self.turn.rank(self.terms.priority, best)
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
        self.lose_cells();
    }

    /// Nothing of it is in the cache.
    fn lose_cells(&mut self) {
        self.n_cells = 0;
        self.n_least = 0;
    }
}

/// All sequences.
#[derive(Debug)]
pub(super) struct Seats {
    all: Vec<Seat>,
    /// Busy seats in order of admission, so that a step is fair.
    order: Vec<SeqId>,
    limits: BackendLimits,
    pub(super) parked: Parked,
    /// What had to go.
    lost: Lost,
    /// With one pool, what is set aside.
    pub(super) claims: Claims,
    stamp: u64,
    /// Guessed tokens, and right ones.
    guesses: (u64, u64),
    /// Of these, the draft model's.
    drafts: (u64, u64),
    /// Trust in the draft model over all sequences: what a new one begins with.
    draft_prior: Trust,
    /// What the last step gave with drafts, as a multiple of what it would have given without; `None` when that says nothing.
    pub(super) time_ratio: Option<f64>,
    /// After copies that failed, in steps.
    copying: Rest,
    /// Steps so far.
    n_steps: u64,
    /// No move has failed yet.
    can_move: bool,
    /// The most checkpoints of one text.
    max_checkpoints: u32,
}

impl Seats {
    pub(super) fn new(limits: BackendLimits, policy: Policy) -> Self {
        Self {
            all: (0..limits.n_seq_max).map(|_| Seat::default()).collect(),
            order: Vec::new(),
            limits,
            parked: Parked::new(limits, policy.host_cache_bytes),
            lost: Lost::default(),
            claims: Claims::new(policy.reservation),
            stamp: 0,
            guesses: (0, 0),
            drafts: (0, 0),
            draft_prior: Trust::default(),
            time_ratio: None,
            copying: Rest::new(FIRST_REST_STEPS, LONGEST_REST_STEPS),
            n_steps: 0,
            can_move: true,
            max_checkpoints: policy.max_checkpoints,
        }
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

    /// Prompts that can be computed now, in the order in which they get their share of a step: by priority, then by how many
    /// sequences the client has, then the shortest rest first. Who has waited moves up, so that long prompts get on too.
    pub(super) fn prefilling(&self, order: &mut Vec<SeqId>) {
        // Prompt tokens that a prompt is ahead of others for each step that it has been here.
        let aging_tokens = i64::from((self.limits.n_ubatch / 16).max(1));
        order.clear();
        order.extend(self.busy().filter(|(_, seat)| seat.is_prefilling()).map(|(seq, _)| seq));
        if order.len() < 2 {
            return;
        }
        let best = self.best_priority(None);
        order.sort_by_cached_key(|&seq| {
            let seat = &self.all[seq as usize];
            let rest = seat.rest_of_prompt().len() as i64 - aging_tokens * i64::from(seat.n_steps);
            (seat.rank(best), self.n_running(seat.terms.client), rest, seat.stamp)
        });
    }

    /// Whether copies are made, and not left alone after a failure.
    fn can_copy(&self) -> bool {
        self.copying.is_over(self.n_steps)
    }

    /// The best priority that runs, or `waiting` where that is better.
    pub(super) fn best_priority(&self, waiting: Option<i32>) -> i32 {
        self.busy().map(|(_, seat)| seat.terms.priority).chain(waiting).min().unwrap_or_default()
    }

    pub(super) fn seat_of(&self, seq: SeqId) -> &Seat {
        &self.all[seq as usize]
    }

    /// Sequences that a client has.
    pub(super) fn n_running(&self, client: ClientId) -> usize {
        self.busy().filter(|(_, seat)| seat.terms.client == client).count()
    }

    /// A prompt had no part in a step that took so long.
    pub(super) fn passed_over(&mut self, seq: SeqId, step_us: u64) {
        self.at(seq).turn.wait(step_us);
    }

    /// One more step is computed.
    pub(super) fn count_step(&mut self) {
        self.n_steps += 1;
        for &seq in &self.order {
            let seat = &mut self.all[seq as usize];
            seat.n_steps = seat.n_steps.saturating_add(1);
        }
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

    /// Gives a request its seats: for the first choice the free one that shares most of the prompt, or any beside another one that
    /// shares more; then any. A prompt of which more lies in host memory gets it from there.
    pub(super) fn seat(&mut self, waiting: &Waiting, ops: &mut Vec<CacheOp>) -> Admission {
        let job = &waiting.job;
        let kept = self.best_free(job);
        let n_kept = kept.map_or(0, |seq| self.reach(seq, &job.prompt, job.terms.namespace).n_tokens);
        let source = if job.reuse { self.better_source(job, kept, n_kept) } else { None };
        let parked = self.better_parked(waiting, n_kept.max(source.map_or(0, Source::n_tokens)));
        let source = source.filter(|_| parked.is_none());
        let n_reused = parked.map_or_else(|| source.map_or(n_kept, Source::n_tokens), |found| found.n_shared);
        let miss = self.why_computed(waiting, n_reused);
        let first = match (kept, source, parked) {
            (Some(seq), None, None) => Some(seq),
            _ => self.vacate(source.map(Source::seq), ops).or(kept),
        };
        let first = first.unwrap_or(0); // `has_room` said that there is one
        let reuses = kept == Some(first) && source.is_none() && parked.is_none();
        let mut n_cached = if reuses { n_kept } else { 0 };
        let mut seqs = vec![first];
        self.occupy(first, waiting, 0, n_cached, ops);
        self.at(first).source = source;
        for choice in 1..job.n {
            let Some(seq) = self.vacate(source.map(Source::seq), ops) else { break };
            self.occupy(seq, waiting, choice, 0, ops);
            self.at(seq).waits_for_fork = true;
            self.at(first).forks.push(seq);
            seqs.push(seq);
        }
        if let Some(resume) = waiting.resume {
            self.at(first).choice = resume.choice;
        }
        self.evict_for_claims(ops);
        if let Some(found) = parked {
            n_cached = found.n_shared;
            self.unpark(first, found, ops);
        }
        if let Some(own) = waiting.resume.and_then(|resume| resume.parked) {
            self.parked.forget(own);
        }
        Admission {
            id: job.id,
            seqs,
            n_cached: n_cached as u32,
            resumes: waiting.resume.map(|resume| resume.choice),
            miss,
            preempted: Vec::new(),
            ops: Vec::new(),
        }
    }

    fn occupy(&mut self, seq: SeqId, waiting: &Waiting, choice: u32, n_keep: usize, ops: &mut Vec<CacheOp>) {
        self.note_lost(seq, n_keep);
        self.stamp += 1;
        let stamp = self.stamp;
        let job = &waiting.job;
        let draft_trust = self.draft_prior.as_prior();
        if self.all[seq as usize].n_cells != n_keep {
            ops.push(self.keep_op(seq, n_keep, &job.prompt, job.terms.namespace));
        }
        let seat = self.at(seq);
        seat.owner = Some(job.id);
        seat.choice = choice;
        seat.terms = job.terms.after(&seat.terms, n_keep > 0);
        seat.reuse = job.reuse;
        seat.turn = waiting.turn;
        seat.n_steps = 0;
        seat.guess = job.guess;
        seat.guessed.clear();
        seat.is_guess_computed = false;
        seat.trust = LookupTrust::default();
        seat.draft_trust = draft_trust;
        seat.draft = None;
        seat.was_draft_asked = false;
        seat.n_draft_held = seat.n_draft_held.min(n_keep);
        seat.tokens.clear();
        seat.tokens.extend_from_slice(&job.prompt);
        seat.tokens.reserve(job.max_tokens.min(4096) as usize);
        if n_keep == 0 {
            seat.n_least = 0;
        }
        seat.n_cells = n_keep;
        seat.n_prompt = job.prompt.len();
        seat.n_answered_before = waiting.resume.map_or(0, |resume| resume.n_answered);
        seat.reserved = Self::need(job);
        seat.forks.clear();
        seat.waits_for_fork = false;
        seat.source = None;
        seat.points.clear();
        seat.stamp = stamp;
        self.order.push(seq);
    }

    /// The free seat that shares the longest prefix with the prompt, if that keeps at least half of what it holds: a few
    /// tokens in common are not worth the end of a long conversation. With a checkpoint it is less where no other seat is free: the
    /// conversation would be lost either way.
    fn best_free(&self, job: &Job) -> Option<SeqId> {
        if !job.reuse {
            return None;
        }
        let free = (0..self.limits.n_seq_max).filter(|&seq| self.all[seq as usize].owner.is_none());
        let is_last = free.clone().count() <= job.n as usize;
        let shared = free.filter(|&seq| self.all[seq as usize].n_cells > 0).map(|seq| {
            let Reach { n_tokens, rewind } = self.reach(seq, &job.prompt, job.terms.namespace);
            (n_tokens, rewind.is_some(), seq)
        });
        let is_enough = |&(n_tokens, is_rewound, seq): &(usize, bool, SeqId)| {
            let is_half = n_tokens * 2 >= self.all[seq as usize].n_cells;
            n_tokens > 0 && (is_half || (is_last && is_rewound))
        };
        let stamp = |seq: SeqId| std::cmp::Reverse(self.all[seq as usize].stamp);
        let best = shared.filter(is_enough).max_by_key(|&(n_tokens, _, seq)| (n_tokens, stamp(seq)));
        best.map(|(.., seq)| seq)
    }

    pub(super) fn forget_prefix(&mut self, seq: SeqId) {
        let seat = self.at(seq);
        seat.lose_cells();
        seat.waits_for_fork = false;
        seat.source = None;
    }

    /// Nothing of a running sequence is in the cache any more; what it has said becomes its prompt.
    pub(super) fn compute_again(&mut self, seq: SeqId) {
        let seat = self.at(seq);
        seat.lose_cells();
        seat.n_prompt = seat.tokens.len();
    }

    /// A row is in the cache. Guesses only count as cells once they were right.
    pub(super) fn computed(&mut self, row: &Row) {
        let seat = self.at(row.seq);
        if seat.n_cells < seat.tokens.len() {
            debug_assert_eq!(seat.n_cells as u32, row.pos, "rows of a sequence are in order");
            seat.n_cells += 1;
        } else {
            seat.is_guess_computed = true;
        }
    }

    /// What is wanted of a draft model for a sequence, where that is worth its time.
    pub(super) fn wish(&self, seq: SeqId, asked: Asked<'_>, limits: DraftLimits, looks_up: bool) -> Option<Wish> {
        let seat = self.seat_of(seq);
        let Asked { costs, n_decode, most } = asked;
        let n_cells = u64::from(seat.n_cells());
        let most = most.min(seat.n_left().saturating_sub(1)).min(limits.max_tokens as usize);
        if !seat.guess || most < limits.min_tokens.max(1) as usize {
            return None;
        }
        // What the text has said before costs nothing to find.
        if looks_up
            && seat.trust.is_worth_a_look(costs, n_decode, n_cells)
            && let Some(said) = said_before(&seat.tokens)
            && seat.trust.worth(said.n_same, costs, n_decode, n_cells) > 0
        {
            return None;
        }
        let feed_us = costs.feed_token_us().unwrap_or(0.0);
        let behind_us = seat.tokens.len().saturating_sub(seat.n_draft_held) as f64 * feed_us;
        let n_most = seat.draft_trust.worth_drafting(costs, n_decode, n_cells, (most, behind_us));
        let step_us = costs.decode_us(n_decode, n_cells);
        // Drafts save no more than about a third of the steps that are left.
        if n_most == 0 || behind_us > seat.n_left() as f64 * step_us / 3.0 {
            return None;
        }
        // Nobody waits for more than one step while the draft model catches up.
        let n_feed = if feed_us > 0.0 { (step_us / feed_us) as u32 } else { FIRST_FEED_TOKENS };
        let n_feed = n_feed.clamp(FIRST_FEED_TOKENS.min(self.limits.n_ubatch), self.limits.n_ubatch.max(1));
        Some(Wish { seq, n_most: n_most as u32, n_feed })
    }

    /// The draft model's answer to a wish.
    pub(super) fn drafted(&mut self, draft: &Draft) {
        let Some(seat) = self.all.get_mut(draft.seq as usize).filter(|seat| seat.owner.is_some()) else { return };
        seat.n_draft_held = draft.n_held as usize;
        seat.draft = draft.is_complete.then(|| draft.tokens.clone());
    }

    /// The tokens that are guessed to follow what is pending, at most `most`: the draft model's if it gave some, or what followed
    /// before if `looks_up`.
    pub(super) fn guess(&mut self, seq: SeqId, asked: Asked<'_>, looks_up: bool) -> &[TokenId] {
        let Asked { costs, n_decode, most } = asked;
        let seat = self.at(seq);
        let n_cells = u64::from(seat.n_cells());
        let draft = seat.draft.take();
        seat.was_draft_asked = draft.is_some();
        seat.is_drafted = false;
        seat.guessed.clear();
        seat.n_right = 0;
        seat.is_guess_computed = false;
        seat.is_guess_over = false;
        // The last token that it may have needs no guess after it: nothing is sampled there.
        let most = most.min(seat.n_left().saturating_sub(1));
        if !seat.guess || most == 0 {
            return &[];
        }
        if let Some(mut draft) = draft.filter(|draft| !draft.is_empty()) {
            draft.truncate(most);
            seat.guessed = draft;
            seat.is_drafted = true;
            seat.trust.pass();
            return &seat.guessed;
        }
        if looks_up
            && seat.trust.is_worth_a_look(costs, n_decode, n_cells)
            && let Some(said) = said_before(&seat.tokens)
        {
            let most = most.min(seat.trust.worth(said.n_same, costs, n_decode, n_cells));
            said.guess(&seat.tokens, most, &mut seat.guessed);
            seat.n_same = said.n_same;
        }
        if seat.guessed.is_empty() {
            seat.trust.pass();
        }
        if !seat.was_draft_asked {
            seat.draft_trust.pass();
        }
        &seat.guessed
    }

    pub(super) fn take_guesses(&mut self) -> Guesses {
        let (n_guessed, n_right) = std::mem::take(&mut self.guesses);
        let (n_drafted, n_right_drafts) = std::mem::take(&mut self.drafts);
        Guesses { n_guessed, n_right, n_drafted, n_right_drafts }
    }

    /// All that was sampled of a sequence in this step is known: the cells of wrong guesses have to go. Returns how many stay.
    pub(super) fn settle(&mut self, seq: SeqId) -> Option<usize> {
        let ratio = self.time_ratio;
        let seat = self.at(seq);
        // An asked draft model took its time even if it had no guess.
        if std::mem::take(&mut seat.was_draft_asked)
            && let Some(ratio) = ratio
        {
            let gain = (1 + seat.n_right) as f64 * ratio;
            seat.draft_trust.measure(gain);
            self.draft_prior.measure(gain);
        }
        let seat = self.at(seq);
        if !seat.is_guess_computed {
            seat.guessed.clear();
            return None;
        }
        let (n_guessed, n_right) = (seat.guessed.len(), seat.n_right);
        let is_drafted = seat.is_drafted;
        if is_drafted {
            seat.draft_trust.learn(n_guessed, n_right);
            self.draft_prior.learn(n_guessed, n_right);
        } else {
            seat.trust.learn(seat.n_same, n_guessed, n_right);
        }
        let add = |total: &mut (u64, u64)| *total = (total.0 + n_guessed as u64, total.1 + n_right as u64);
        add(&mut self.guesses);
        if is_drafted {
            add(&mut self.drafts);
        }
        let seat = self.at(seq);
        seat.guessed.clear();
        seat.is_guess_computed = false;
        (n_right < n_guessed).then_some(seat.n_cells)
    }

    pub(super) fn forks(&mut self, seq: SeqId) -> Vec<SeqId> {
        let (n_prompt, n_least) = (self.at(seq).n_prompt, self.at(seq).n_least);
        let forks = std::mem::take(&mut self.at(seq).forks);
        for &fork in &forks {
            let seat = self.at(fork);
            (seat.n_cells, seat.n_least) = (n_prompt, n_least);
            seat.waits_for_fork = false;
        }
        forks
    }

    /// A token follows. `true` when it was guessed, so that it is computed already and the scores after it are there.
    pub(super) fn sampled(&mut self, seq: SeqId, token: TokenId) -> bool {
        let seat = self.at(seq);
        seat.draft = None; // what it was to follow is not the end any more
        seat.tokens.push(token);
        let is_right = seat.is_guess_computed && !seat.is_guess_over && seat.guessed.get(seat.n_right) == Some(&token);
        if is_right {
            seat.n_right += 1;
            seat.n_cells += 1;
        }
        seat.is_guess_over = !is_right;
        is_right
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

/// Under which circumstances a guess is wanted: what things cost, how many sequences decode beside it, and how many tokens have room.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) costs: &'a Costs,
    pub(super) n_decode: usize,
    pub(super) most: usize,
}

/// Guesses that were computed, and how many of them were right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Guesses {
    /// Guessed tokens.
    pub n_guessed: u64,
    /// Right ones.
    pub n_right: u64,
    /// Those of the draft model among the guessed ones.
    pub n_drafted: u64,
    /// And among the right ones.
    pub n_right_drafts: u64,
}
