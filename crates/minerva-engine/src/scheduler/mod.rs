//! Who runs in the next step: plain state in, a plan out. No clock, no channel and no model in here, so that every
//! schedule can be replayed and compared as text.
//!
//! A turn has two parts because the first one can fail in the backend: [`Scheduler::admit`] seats waiting requests and
//! says what to do with the cache, [`Scheduler::step`] says which tokens to compute. Decoding sequences come first; prompts
//! fill what is left of the step ([`Budget`]).
//!
//! # Invariants
//! - A sequence belongs to one request from admission until [`Scheduler::release`], and then keeps its tokens for reuse.
//! - The cells that running sequences may still need never exceed the cells there are: "no room" cannot happen to an
//!   admitted request.
//! - A prefix that several prompts share is computed once: who comes later waits for it and gets a copy.
//! - A step never holds more rows than the backend takes, and a sequence's rows are in order and without gaps.

mod budget;
mod common;
mod cost;
mod decision;
mod disk;
mod draft;
mod hints;
mod job;
mod lost;
mod outlook;
mod parked;
mod queue;
mod rest;
mod seats;
#[cfg(test)]
mod tests;
mod trace;
mod warm;

pub use budget::{Budget, Demand};
pub(crate) use common::common;
pub use cost::Work;
pub use decision::{Admission, CacheOp, Checkpoint, Copy, Output, Rewind, Step, Yielded};
use disk::Disk;
pub use disk::{DiskOp, Fetched, FileId, OnDisk, Wrote};
pub use hints::Keep;
pub use job::{ClientId, DraftLimits, Job, Policy, RequestId, Reservation, Terms};
pub use outlook::Place;
pub use parked::ParkId;
use queue::Queue;
use seats::{Asked, Seats};
pub use seats::{Guesses, Miss};
pub(crate) use trace::Traced;
pub use trace::{ReplayError, Replayed, replay};
pub use warm::Warmed;

use crate::backend::{BackendLimits, Row, SeqId};
use crate::drafter::{Drafted, Wish};
use crate::request::TokenId;

/// All that decides about the next step.
#[derive(Debug)]
pub struct Scheduler {
    limits: BackendLimits,
    policy: Policy,
    queue: Queue,
    seats: Seats,
    disk: Disk,
    budget: Budget,
    /// The order in which prompts get their share of a step; here for its room.
    prompts: Vec<SeqId>,
    /// Prompts that have no part in the step.
    passed_over: Vec<SeqId>,
    /// The sequences that decode; here for its room.
    decoding: Vec<SeqId>,
    /// What the draft model took for the step to come, in microseconds.
    draft_us: u64,
    /// Checkpoints that nobody has asked for yet.
    taken: Vec<Checkpoint>,
    /// When somebody was to be admitted last.
    now_us: u64,
}

impl Scheduler {
    /// An empty schedule over a backend of these sizes.
    pub fn new(limits: BackendLimits, policy: Policy) -> Self {
        Self {
            limits,
            policy,
            queue: Queue::default(),
            seats: Seats::new(limits, policy),
            disk: Disk::new(policy.disk_cache_bytes),
            budget: Budget::new(limits),
            prompts: Vec::new(),
            passed_over: Vec::new(),
            decoding: Vec::new(),
            draft_us: 0,
            taken: Vec::new(),
            now_us: 0,
        }
    }

    /// Puts a request into the queue. `now_us` is a clock that only goes forward.
    pub fn enqueue(&mut self, job: Job, now_us: u64) {
        self.seats.stop_for(&job);
        self.queue.push(job, now_us);
    }

    /// Removes what waits of a request. `true` when it had not begun.
    pub fn remove_waiting(&mut self, id: RequestId) -> bool {
        let (was_new, parked) = self.queue.remove(id);
        self.let_go(id);
        for at in parked {
            self.seats.parked.forget(at);
        }
        was_new
    }

    /// Requests that have not begun and whose deadline is over: they are out of the queue.
    pub fn expired(&mut self, now_us: u64) -> Vec<RequestId> {
        let late = self.queue.expired(now_us);
        for &id in &late {
            self.let_go(id);
        }
        late
    }

    /// Requests that have not begun, and their prompt tokens.
    pub fn queued(&self) -> (usize, usize) {
        self.queue.n_new()
    }

    /// Whether nothing runs and nothing waits.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.seats.any_busy()
    }

    /// Cells held by running sequences, and cells left by finished ones.
    pub fn cells(&self) -> (u64, u64) {
        self.seats.cells()
    }

    /// Bytes that the copies in host memory should take.
    pub fn parked_bytes(&self) -> u64 {
        self.seats.parked.bytes()
    }

    /// Seats the request that is next, if there is room for it or others have to yield. Call until it returns `None`.
    pub fn admit(&mut self, now_us: u64) -> Option<Admission> {
        self.now_us = now_us;
        self.use_disk(now_us);
        let (seats, disk) = (&self.seats, &self.disk);
        let next = self.queue.next(now_us, |client| seats.n_running(client), |id| !disk.holds(id, now_us))?;
        // Nobody overtakes a large request that waits for more room.
        let best = self.seats.best_priority(self.queue.best_priority());
        let victims = self.seats.victims(self.queue.at(next), now_us, best)?;
        let mut ops = Vec::new();
        for &seq in &victims {
            if let Some((job, resume)) = self.seats.preempt(seq, &mut ops) {
                self.queue.push_back(job, resume, now_us);
            }
        }
        let waiting = self.queue.admit(next, now_us);
        self.seats.respect_hints(&waiting.job.terms, now_us);
        let admission = self.seats.seat(&waiting, &mut ops);
        if waiting.resume.is_none()
            && self.seats.takes_checkpoints()
            && let Some(&first) = admission.seqs.first()
        {
            let queued = self.queue.n_shared_each(&waiting.job);
            self.seats.plan_stops(first, admission.n_cached as usize, &queued);
        }
        self.let_go(waiting.job.id);
        for op in &ops {
            if let CacheOp::Unpark { at, .. } = *op {
                self.touch_file(at);
            }
        }
        Some(Admission { preempted: victims, ops, ..admission })
    }

    /// Copies in host memory that nobody needs any more; their room is counted as free already.
    pub fn dropped(&mut self) -> Vec<ParkId> {
        self.seats.parked.take_dropped()
    }

    /// There is nothing to copy to host memory: what the sequence should hold was lost.
    pub fn park_lost(&mut self, at: ParkId) {
        self.seats.parked.forget(at);
    }

    /// The backend could not copy a sequence to host memory, and will not be able to copy others.
    pub fn park_failed(&mut self, at: ParkId) {
        self.seats.parked.failed(at);
    }

    /// The backend could not keep a sequence's prefix: its whole prompt is computed.
    pub fn forget_prefix(&mut self, seq: SeqId) {
        self.seats.forget_prefix(seq);
    }

    /// Prefixes of admitted prompts that another sequence has computed for them. Call before admitting and after each admission: a
    /// source that is done may lose its seat to the next, and one that was done already needs no wait.
    pub fn copies(&mut self) -> Vec<Copy> {
        self.seats.copies()
    }

    /// The backend could not move what a sequence held to `seq`: it is lost, and nothing is moved any more.
    pub fn move_failed(&mut self, seq: SeqId) {
        self.seats.move_failed(seq);
    }

    /// The backend could not copy: the sequence computes its prompt itself.
    pub fn copy_failed(&mut self, seq: SeqId) {
        self.seats.copy_failed(seq);
    }

    /// Fills `wishes` with what a draft model should guess for the next step. Call it before [`step`](Self::step), and
    /// [`drafted`](Self::drafted) with the answer if there are any.
    pub fn wishes(&mut self, wishes: &mut Vec<Wish>) {
        wishes.clear();
        let Some(limits) = self.policy.draft else { return };
        self.choose_decoding();
        if !self.can_guess() {
            return;
        }
        let (costs, n_decode) = (self.budget.costs(), self.decoding.len());
        let n_free = self.limits.n_batch as usize - n_decode;
        wishes.extend(self.decoding.iter().filter_map(|&seq| {
            let most = (n_free + 1).saturating_sub(self.seats.seat_of(seq).pending().len());
            self.seats.wish(seq, Asked { costs, n_decode, most }, limits, self.policy.guess)
        }));
    }

    /// All tokens of a sequence: those that the cache holds and those that are still to be computed.
    pub fn history(&self, seq: SeqId) -> &[TokenId] {
        self.seats.seat_of(seq).history()
    }

    /// What the draft model answered to the wishes.
    pub fn drafted(&mut self, drafted: &Drafted) {
        let costs = self.budget.costs_mut();
        costs.learn_draft(drafted.n_rounds, drafted.n_round_guesses, drafted.rounds_us);
        costs.learn_feed(drafted.n_fed, drafted.fed_us);
        self.draft_us = drafted.rounds_us;
        for draft in &drafted.drafts {
            self.seats.drafted(draft);
        }
    }

    /// The draft model failed: nothing is asked of it any more.
    pub fn no_drafts(&mut self) {
        self.policy.draft = None;
    }

    /// The sequences of the next step that decode.
    fn choose_decoding(&mut self) {
        let n_batch = self.limits.n_batch as usize;
        // The longest admitted, if there are more than a batch holds.
        self.decoding.clear();
        self.decoding.extend(self.seats.decoding().take(n_batch).map(|(seq, _)| seq));
        // By number: where each sequence has a stream of cells, llama.cpp computes at once only sequences whose numbers follow
        // one another in the batch (`split_equal`). Seven and then the first took 84 ms, the eight in order 71.
        self.decoding.sort_unstable();
    }

    /// With one pool of cells: who yields so that the next step has room, because answers are longer than was expected. Call it after
    /// the last admission, and do what it wants before [`step`](Self::step).
    pub fn make_room(&mut self) -> Option<Yielded> {
        let mut yielded = Yielded::default();
        for (job, resume) in self.seats.make_room(self.queue.best_priority(), &mut yielded) {
            self.queue.push_back(job, resume, self.now_us);
        }
        (!yielded.ops.is_empty() || !yielded.seqs.is_empty()).then_some(yielded)
    }

    /// Fills `step` with the next tokens to compute; it stays empty when nothing runs.
    pub fn step(&mut self, step: &mut Step) {
        step.clear();
        self.choose_decoding();
        let n_batch = self.limits.n_batch as usize;
        let mut n_free = n_batch - self.decoding.len();
        let mut n_cells = self.seats.n_free_cells();
        // Guesses get what is left when all that is known has its cells.
        let mut n_spare = n_cells.saturating_sub(self.seats.n_to_compute());
        for i in 0..self.decoding.len() {
            let Some(n_beside) = n_cells.checked_sub(1) else { break };
            let n_more = self.decode_rows(self.decoding[i], n_free.min(n_beside), &mut n_spare, step);
            n_free -= n_more;
            n_cells = n_beside - n_more;
        }
        let n_decode = step.rows.len();
        self.seats.prefilling(&mut self.prompts);
        let mut left = self.budget.prefill_tokens(self.demand(step)).min(n_batch - n_decode).min(n_cells);
        self.passed_over.clear();
        for &seq in &self.prompts {
            if left == 0 {
                self.passed_over.push(seq);
                continue;
            }
            let seat = self.seats.seat_of(seq);
            let rest = seat.rest_of_prompt();
            let n = rest.len().min(left).min(self.seats.most_of_prompt(seq));
            for (i, &token) in rest[..n].iter().enumerate() {
                let output = i + 1 == rest.len();
                if output {
                    step.outputs.push(Output { row: step.rows.len(), seq });
                }
                step.rows.push(Row { seq, token, pos: seat.n_cells() + i as u32, output });
            }
            left -= n;
        }
        step.n_prefill = step.rows.len() - n_decode;
    }

    /// The rows of one sequence that decodes: what is pending, and guesses, `n_spare` at most. Returns how many of `n_free` it takes beyond
    /// one.
    fn decode_rows(&mut self, seq: SeqId, n_free: usize, n_spare: &mut usize, step: &mut Step) -> usize {
        let seat = self.seats.seat_of(seq);
        let (first, pos) = (step.rows.len(), seat.n_cells());
        let rest = seat.pending();
        let n = rest.len().min(if self.is_one_pass() { n_free + 1 } else { 1 });
        let is_whole = n == rest.len();
        step.rows.extend(rest[..n].iter().zip(pos..).map(|(&token, pos)| Row { seq, token, pos, output: false }));
        if is_whole {
            let most = if self.can_guess() { (n_free + 1 - n).min(*n_spare) } else { 0 };
            let asked = Asked { costs: self.budget.costs(), n_decode: self.decoding.len(), most };
            let guess = self.seats.guess(seq, asked, self.policy.guess);
            *n_spare = n_spare.saturating_sub(guess.len());
            let after = (pos + n as u32)..;
            step.rows.extend(guess.iter().zip(after).map(|(&token, pos)| Row { seq, token, pos, output: true }));
            let last = first + n - 1;
            step.rows[last].output = true;
            step.outputs.extend((last..step.rows.len()).map(|row| Output { row, seq }));
        }
        step.rows.len() - first - 1
    }

    /// Whether rows of guesses can be computed along, and taken back.
    fn can_guess(&self) -> bool {
        self.limits.keeps_beginnings && self.is_one_pass()
    }

    /// Where each sequence has a stream of cells, llama.cpp computes at once only as many rows of each as the shortest has: one longer
    /// sequence is another pass, which costs the others more than it saves.
    fn is_one_pass(&self) -> bool {
        self.limits.unified || self.decoding.len() == 1
    }

    /// What the rows that decode, and the prompts beside them, ask of a step.
    fn demand(&self, step: &Step) -> Demand {
        let streams = self.decoding.iter().map(|&seq| self.seats.seat_of(seq).terms());
        Demand {
            n_decode: step.rows.len(),
            n_decode_cells: step.rows.iter().map(|row| u64::from(row.pos)).sum(),
            n_prompts: self.seats.n_unfinished_prompts(),
            prefill_pos: self.prompts.first().map_or(0, |&seq| self.seats.seat_of(seq).n_cells()),
            max_itl_us: streams.filter_map(|terms| terms.max_itl_us.or(self.policy.max_itl_us)).min(),
        }
    }

    /// The step was computed and took `step_us` microseconds: its rows are in the cache.
    pub fn computed(&mut self, step: &Step, step_us: u64) {
        for row in &step.rows {
            self.seats.computed(row);
        }
        self.seats.count_step();
        for &seq in &self.passed_over {
            self.seats.passed_over(seq, step_us);
        }
        let (decode, prefill) = step.rows.split_at(step.rows.len() - step.n_prefill);
        let cells = |rows: &[Row]| rows.iter().map(|row| u64::from(row.pos)).sum::<u64>();
        let n_decode = self.decoding.len();
        let n_cells = cells(decode) * n_decode as u64 / decode.len().max(1) as u64;
        let plain_us = self.budget.costs().decode_us(n_decode, n_cells);
        let spent_us = step_us + std::mem::take(&mut self.draft_us);
        // Beside prompts the time says nothing about guesses.
        let is_telling = prefill.is_empty() && plain_us > 0.0 && spent_us > 0;
        self.seats.time_ratio = is_telling.then(|| plain_us / spent_us as f64);
        self.budget.learn(
            Work {
                n_decode: decode.len(),
                n_decode_cells: cells(decode),
                n_prefill: prefill.len(),
                prefill_pos: cells(prefill) as f64 / prefill.len().max(1) as f64,
            },
            step_us,
        );
        self.seats.parked.learn(self.budget.prompt_cost());
        self.taken.extend(self.seats.take_checkpoints());
    }

    /// Checkpoints to take now that a step is computed, before anything else happens to the sequences.
    pub fn checkpoints(&mut self) -> Vec<Checkpoint> {
        std::mem::take(&mut self.taken)
    }

    /// The backend could not take a checkpoint, and will not be able to take others.
    pub fn checkpoint_failed(&mut self, at: ParkId) {
        self.seats.checkpoint_failed(at);
    }

    /// The prompt of a request with several choices is computed in `seq`: the sequences that need a copy of it.
    pub fn forks(&mut self, seq: SeqId) -> Vec<SeqId> {
        self.seats.forks(seq)
    }

    /// A copy failed: the sequence computes the prompt itself.
    pub fn fork_failed(&mut self, seq: SeqId) {
        self.seats.forget_prefix(seq);
    }

    /// `token` was sampled for `seq`, or has to follow. The next step computes it, unless it was guessed: then this returns `true`, and the
    /// next output of the sequence in the same step has the scores after it. All further outputs of the sequence are void.
    pub fn sampled(&mut self, seq: SeqId, token: TokenId) -> bool {
        self.seats.sampled(seq, token)
    }

    /// Nothing more is sampled of `seq` in this step. When wrong guesses are in the cache: how many of its cells stay, the others have
    /// to go. Call before [`release`](Self::release) as well.
    pub fn settle(&mut self, seq: SeqId) -> Option<u32> {
        self.seats.settle(seq).map(|n_cells| n_cells as u32)
    }

    /// The cells of wrong guesses could not be freed, so the sequence holds nothing now: it computes its whole text again, and nothing is
    /// guessed any more.
    pub fn cut_failed(&mut self, seq: SeqId) {
        self.policy.guess = false;
        self.policy.draft = None;
        self.seats.compute_again(seq);
    }

    /// Guessed tokens that were computed, and how many of these were right, since this was asked last.
    pub fn guesses(&mut self) -> Guesses {
        self.seats.take_guesses()
    }

    /// The sequence is done: its seat is free and its tokens stay for reuse.
    pub fn release(&mut self, seq: SeqId) {
        let seat = self.seats.seat_of(seq);
        if seat.n_prompt_left() == 0 && seat.is_answered() {
            self.seats.claims.answers.learn(seat.n_answered());
        }
        self.seats.release(seq);
    }

    /// What the sequence holds in the cache cannot be trusted: forget it. The caller clears it in the backend.
    pub fn discard(&mut self, seq: SeqId) {
        self.seats.discard(seq);
    }

    /// The running sequences.
    pub fn running(&self) -> impl Iterator<Item = SeqId> {
        self.seats.busy().map(|(seq, _)| seq)
    }
}
