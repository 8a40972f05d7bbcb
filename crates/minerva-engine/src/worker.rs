//! The engine thread: takes commands, runs the scheduler's plan on the backend, samples, sends events.
//!
//! It alone touches the backend. Everything it shares is in [`Shared`], which others read without waiting for a step.

mod tiers;

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use crate::backend::{Backend, Loaded, SeqId, StepError, Tokenizer};
use crate::checkpoints::Checkpoints;
use crate::disk::{Answer, DiskTier};
use crate::drafter::{Drafter, Wish};
use crate::event::GenerationError;
use crate::generation::{Accepted, Advance, Generation};
use crate::parking::Parking;
use crate::queue_watch::QueueWatch;
use crate::request::TokenId;
use crate::sampling_pool::{self, SamplingPool};
use crate::scheduler::{
    Admission, CacheOp, Copy, Job, Keep, ParkId, Place, RequestId, Rewind, Step, Terms, Traced, Yielded,
};
use crate::serving::Serving;
use crate::shared::Shared;

/// What other threads ask of the engine thread.
#[derive(Debug)]
pub(crate) enum Command {
    /// Run a request.
    Submit(RequestId, Box<Accepted>),
    /// Its caller is gone.
    Cancel(RequestId),
    /// Something was written or read.
    Disk(Answer),
    /// Fail what runs and end.
    Shutdown,
}

/// The state of the engine thread.
pub(crate) struct Worker {
    backend: Box<dyn Backend>,
    tokenizer: Arc<dyn Tokenizer>,
    n_vocab: usize,
    scheduler: Traced,
    generations: HashMap<RequestId, Generation>,
    /// Which request runs in each sequence.
    owners: Vec<Option<RequestId>>,
    /// Sequences have a state that steps may lay anew.
    moves_states: bool,
    parking: Parking,
    /// The draft model, until it fails.
    drafter: Option<Box<dyn Drafter>>,
    /// What is wanted of it; here for its room.
    wishes: Vec<Wish>,
    checkpoints: Checkpoints,
    disk: Option<DiskTier>,
    pub(crate) pool: SamplingPool,
    /// Turns the keys of hints into numbers; another one in each engine, so that a trace tells nothing of them.
    keys: RandomState,
    watch: QueueWatch,
    /// When this engine began: the scheduler's clock counts from here.
    start: Instant,
    mailbox: Receiver<Command>,
    shared: Arc<Shared>,
    step: Step,
}

impl Worker {
    pub(crate) fn new(loaded: Loaded, serving: &Serving, mailbox: Receiver<Command>, shared: Arc<Shared>) -> Self {
        let limits = loaded.backend.limits();
        Self {
            backend: loaded.backend,
            tokenizer: loaded.tokenizer,
            n_vocab: limits.n_vocab,
            scheduler: Traced::new(limits, serving.policy, serving.trace_path.as_deref()),
            generations: HashMap::new(),
            owners: vec![None; limits.n_seq_max as usize],
            moves_states: limits.state_bytes > 0,
            parking: Parking::default(),
            drafter: loaded.drafter,
            wishes: Vec::new(),
            checkpoints: Checkpoints::new(limits.checkpoints_need_cells),
            disk: None,
            pool: SamplingPool::default(),
            keys: RandomState::new(),
            watch: QueueWatch::default(),
            start: Instant::now(),
            mailbox,
            shared,
            step: Step::default(),
        }
    }

    /// Runs until shutdown or until every handle is gone.
    pub(crate) fn run(mut self) {
        while self.read_mailbox() {
            self.turn();
        }
        self.flush();
    }

    /// Takes all commands; waits for one when there is nothing to compute. `false` ends the engine.
    fn read_mailbox(&mut self) -> bool {
        if self.scheduler.is_idle() {
            let Ok(command) = self.mailbox.recv() else { return false };
            if !self.obey(command) {
                return false;
            }
        } else if let Some(until_us) = self.scheduler.waits_until_us(self.clock_us(Instant::now())) {
            let wait = Duration::from_micros(until_us.saturating_sub(self.clock_us(Instant::now())));
            let goes_on = match self.mailbox.recv_timeout(wait) {
                Ok(command) => self.obey(command),
                Err(RecvTimeoutError::Timeout) => true,
                Err(RecvTimeoutError::Disconnected) => false,
            };
            if !goes_on {
                return false;
            }
        }
        loop {
            match self.mailbox.try_recv() {
                Ok(command) => {
                    if !self.obey(command) {
                        return false;
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Submit(id, accepted) => {
                let job = self.job(id, &accepted);
                self.scheduler.enqueue(job, self.clock_us(Instant::now()));
                let generation = Generation::new(*accepted, &*self.tokenizer, self.n_vocab, &self.shared);
                if generation.wants_updates() {
                    self.watch.came();
                }
                self.generations.insert(id, generation);
            }
            Command::Cancel(id) => self.cancel(id),
            Command::Disk(answer) => self.disk_answered(answer),
            Command::Shutdown => return false,
        }
        true
    }

    fn job(&self, id: RequestId, accepted: &Accepted) -> Job {
        let request = &accepted.request;
        let deadline = request.deadline_ms.map(|ms| accepted.submitted + Duration::from_millis(ms));
        Job {
            id,
            prompt: accepted.prompt.clone(),
            n: request.n,
            max_tokens: accepted.max_tokens,
            reuse: request.cache_prompt,
            guess: request.speculate,
            terms: Terms {
                client: request.client,
                namespace: accepted.namespace,
                priority: request.priority,
                deadline_us: deadline.map(|deadline| self.clock_us(deadline)),
                max_itl_us: request.max_itl_ms.map(|ms| ms.saturating_mul(1000)),
                keep: Keep::new(
                    request.cache_key.as_ref().map(|key| self.keys.hash_one(key)),
                    request.keep_ms,
                    self.clock_us(accepted.submitted),
                ),
            },
        }
    }

    /// The scheduler's clock.
    fn clock_us(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.start).as_micros() as u64
    }

    fn cancel(&mut self, id: RequestId) {
        let Some(generation) = self.generations.remove(&id) else { return };
        self.free(id, &generation);
        self.shared.count_cancelled();
        self.publish();
    }

    /// Gives back the sequences of a request that ends before all its choices did, or its place in the queue.
    fn free(&mut self, id: RequestId, generation: &Generation) {
        if self.scheduler.remove_waiting(id) {
            self.shared.left_queue(generation.n_prompt());
        }
        for seq in generation.running_seqs() {
            self.release(seq);
        }
        self.drop_parked();
    }

    fn drop_parked(&mut self) {
        let ids = self.scheduler.dropped();
        self.checkpoints.drop_all(&ids);
        self.parking.drop_all(ids);
    }

    fn release(&mut self, seq: SeqId) {
        let wrong = self.scheduler.settle(seq);
        self.scheduler.release(seq);
        self.owners[seq as usize] = None;
        if wrong.is_some_and(|n_tokens| !self.backend.truncate(seq, n_tokens)) {
            self.discard(seq);
        }
    }

    /// The sequence holds nothing any more that could be trusted.
    fn discard(&mut self, seq: SeqId) {
        self.scheduler.discard(seq);
        self.cut_draft(seq, 0);
    }

    /// The draft model keeps no more of a sequence than the main one.
    fn cut_draft(&mut self, seq: SeqId, n_tokens: u32) {
        if let Some(drafter) = &mut self.drafter {
            drafter.truncate(seq, n_tokens);
        }
    }

    /// One turn: admit, compute, sample.
    fn turn(&mut self) {
        let began = Instant::now();
        let now_us = self.clock_us(began);
        self.expire(now_us, began);
        self.copy_prefixes();
        while let Some(admission) = self.scheduler.admit(now_us) {
            self.seat(admission, began);
            self.copy_prefixes();
        }
        self.make_room();
        self.use_tiers();
        self.tell_queue(now_us, began);
        let mut backend_us = self.draft();
        let mut step = std::mem::take(&mut self.step);
        self.scheduler.step(&mut step);
        if !step.rows.is_empty() {
            self.publish();
            backend_us += self.compute(&step);
        }
        self.step = step;
        self.publish();
        self.shared.count_overhead((began.elapsed().as_micros() as u64).saturating_sub(backend_us));
    }

    /// Lets the draft model write ahead where the scheduler wants that. One that fails is not asked again; no request hears of it.
    /// Returns the time that it took, in microseconds.
    fn draft(&mut self) -> u64 {
        let Some(drafter) = &mut self.drafter else { return 0 };
        self.scheduler.wishes(&mut self.wishes);
        if self.wishes.is_empty() {
            return 0;
        }
        let wishes: Vec<_> = self.wishes.iter().map(|&wish| (wish, self.scheduler.history(wish.seq))).collect();
        let began = Instant::now();
        self.shared.step_begins(began);
        let answer = drafter.draft(&wishes);
        self.shared.step_ended();
        let took_us = began.elapsed().as_micros() as u64;
        match answer {
            Ok(mut answer) => {
                for draft in &mut answer.drafts {
                    let is_known = |&token: &TokenId| usize::try_from(token).is_ok_and(|token| token < self.n_vocab);
                    let n_known = draft.tokens.iter().take_while(|token| is_known(token)).count();
                    draft.tokens.truncate(n_known);
                }
                self.scheduler.drafted(&answer);
                self.shared.count_draft(took_us);
            }
            Err(error) => {
                tracing::warn!("nothing is written ahead from now on: {error}");
                self.drafter = None;
                self.scheduler.no_drafts();
                self.shared.count_draft_failed();
            }
        }
        took_us
    }

    /// Runs one step and samples its outputs. Returns the time inside the backend, in microseconds.
    fn compute(&mut self, step: &Step) -> u64 {
        let submitted = Instant::now();
        self.shared.step_begins(submitted);
        let result = self.backend.decode(&step.rows);
        let computed = Instant::now();
        self.shared.step_ended();
        let step_us = computed.duration_since(submitted).as_micros() as u64;
        match result {
            Ok(()) => {
                self.shared.count_step(step.n_prefill as u64, step_us);
                self.scheduler.computed(step, step_us);
                self.take_checkpoints();
                self.sample(step, computed);
            }
            Err(error) => self.step_failed(step, &error),
        }
        step_us
    }

    /// Ends the requests whose deadline was over before they could begin.
    fn expire(&mut self, now_us: u64, now: Instant) {
        for id in self.scheduler.expired(now_us) {
            let Some(generation) = self.generations.get(&id) else { continue };
            self.shared.left_queue(generation.n_prompt());
            let waited_ms = generation.waited(now).as_millis() as u64;
            let deadline_ms = generation.deadline_ms().unwrap_or_default();
            self.fail(id, GenerationError::DeadlineExpired { deadline_ms, waited_ms });
        }
        self.cut_late(now);
    }

    /// Ends the answers whose deadline is over while all that is left of them waits for a sequence that others took.
    fn cut_late(&mut self, now: Instant) {
        let late = self.generations.iter().filter(|(_, generation)| generation.waits_in_vain(now));
        let late: Vec<RequestId> = late.map(|(&id, _)| id).collect();
        for id in late {
            if let Some(generation) = self.generations.get_mut(&id) {
                generation.cut();
            }
            self.scheduler.remove_waiting(id);
            self.drop_parked();
            self.finish(id, now);
        }
    }

    /// Tells those who wait where they are.
    fn tell_queue(&mut self, now_us: u64, now: Instant) {
        if self.scheduler.queued().0 == 0 {
            self.shared.publish_next_start(None);
            return;
        }
        if !self.watch.is_due(now) {
            return;
        }
        let places = self.scheduler.outlook(now_us);
        self.shared.publish_next_start(places.first().and_then(|place| place.estimate_us));
        for Place { id, position, estimate_us } in places {
            if let Some(generation) = self.generations.get_mut(&id) {
                generation.tell(position, estimate_us, now);
            }
        }
    }

    fn seat(&mut self, admission: Admission, now: Instant) {
        let Admission { id, seqs, n_cached, resumes, miss, preempted, ops } = admission;
        self.pause(preempted);
        let first = seqs.first().copied();
        for &seq in &seqs {
            self.owners[seq as usize] = Some(id);
        }
        if let Some(generation) = self.generations.get_mut(&id) {
            if let (Some(choice), Some(seq)) = (resumes, first) {
                generation.resume(choice, seq);
                if let Some(miss) = miss {
                    self.shared.count_miss(miss);
                }
            } else {
                self.shared.left_queue(generation.n_prompt());
                generation.start(seqs, n_cached, miss, now);
            }
        }
        self.change_cache(ops, |worker, seq| {
            worker.scheduler.forget_prefix(seq);
            if let Some(generation) = worker.generations.get_mut(&id).filter(|_| Some(seq) == first) {
                generation.lost_prefix();
            }
        });
        self.drop_parked();
        if resumes.is_none() {
            let n_cached = self.generations.get(&id).map_or(0, Generation::n_cached);
            self.shared.count_cached(u64::from(n_cached));
        }
    }

    /// The requests of these sequences wait again.
    fn pause(&mut self, preempted: Vec<SeqId>) {
        for seq in preempted {
            let owner = self.owners[seq as usize].take();
            if let Some(generation) = owner.and_then(|owner| self.generations.get_mut(&owner)) {
                generation.pause(seq);
            }
            self.shared.count_preempted();
        }
    }

    /// With one pool of cells: some sequences yield when answers are longer than was expected.
    fn make_room(&mut self) {
        let Some(Yielded { seqs, ops }) = self.scheduler.make_room() else { return };
        self.pause(seqs);
        self.change_cache(ops, |worker, seq| worker.scheduler.forget_prefix(seq));
        self.drop_parked();
    }

    /// Does what an admission wants done with the cache; `lost` is called for a sequence that holds nothing now but should.
    fn change_cache(&mut self, ops: Vec<CacheOp>, lost: impl Fn(&mut Self, SeqId)) {
        let mut is_moved = true;
        let mut not_restored = None;
        for op in ops {
            match op {
                CacheOp::Keep { seq, n_tokens } => {
                    self.cut_draft(seq, n_tokens);
                    // False when this kind of memory cannot be cut there. The sequence is empty then.
                    if !self.backend.truncate(seq, n_tokens) && n_tokens > 0 {
                        lost(self, seq);
                    }
                }
                CacheOp::Move { src, dst, n_tokens } => {
                    self.cut_draft(src, 0);
                    // What did not get there cannot go on from there.
                    is_moved = is_moved && self.backend.copy(src, dst, n_tokens);
                    if !is_moved {
                        self.backend.truncate(dst, 0);
                        self.scheduler.move_failed(dst);
                    }
                }
                // It may be what a move lost.
                CacheOp::Park { at, .. } if !is_moved => self.scheduler.park_lost(at),
                CacheOp::Park { seq, at, .. } => drop(self.park(seq, at)),
                CacheOp::Unpark { at, seq, n_tokens } => {
                    if self.parking.get(at).is_some_and(|state| self.backend.restore(seq, state)) {
                        self.shared.count_restored(u64::from(n_tokens));
                        self.shared.count_checkpoints_restored(u64::from(self.checkpoints.has(at)));
                    } else {
                        not_restored = Some(seq);
                        lost(self, seq);
                    }
                }
                // A checkpoint is a part of what is not there.
                CacheOp::Rewind { seq, .. } if not_restored == Some(seq) => {}
                CacheOp::Rewind { at, seq, n_tokens } => {
                    if !self.rewind(at, seq, n_tokens) {
                        lost(self, seq);
                    }
                }
            }
        }
    }

    /// Brings a sequence back to an earlier length. When it cannot be, the sequence is empty.
    fn rewind(&mut self, at: ParkId, seq: SeqId, n_tokens: u32) -> bool {
        let is_there = self.parking.get(at).is_some_and(|state| self.backend.rewind(seq, state, n_tokens));
        if !is_there {
            self.backend.truncate(seq, 0);
        }
        self.shared.count_checkpoints_restored(u64::from(is_there));
        is_there
    }

    /// Copies out what prompts that were just computed up to there will be taken up from.
    fn take_checkpoints(&mut self) {
        let taken = self.scheduler.checkpoints();
        if taken.is_empty() {
            return;
        }
        self.drop_parked(); // those that give way
        for checkpoint in taken {
            if self.scheduler.parked(checkpoint.at).is_none() {
                continue; // one of the same step took its room
            }
            match self.checkpoints.take(&mut *self.backend, checkpoint) {
                Some(state) => {
                    self.scheduler.park_saved(checkpoint.at, state.len() as u64);
                    self.parking.keep(checkpoint.at, state);
                    self.shared.count_checkpoint_taken();
                }
                None => self.scheduler.checkpoint_failed(checkpoint.at),
            }
        }
        self.drop_parked();
    }

    fn copy_prefixes(&mut self) {
        let mut is_there = true;
        let mut emptied: Vec<SeqId> = Vec::new();
        for Copy { src, dst, n_tokens, rewind } in self.scheduler.copies() {
            // One that failed may be the source of the next.
            if emptied.contains(&src) {
                self.backend.truncate(dst, 0);
                self.scheduler.forget_prefix(dst);
                emptied.push(dst);
                continue;
            }
            is_there = is_there && self.backend.copy(src, dst, rewind.map_or(n_tokens, |rewind| rewind.n_held));
            if !is_there {
                self.scheduler.copy_failed(dst);
                let owner = self.owners[dst as usize];
                if let Some(generation) = owner.and_then(|id| self.generations.get_mut(&id)) {
                    generation.lost_prefix();
                }
                continue;
            }
            if let Some(Rewind { at, .. }) = rewind
                && !self.rewind(at, dst, n_tokens)
            {
                self.scheduler.forget_prefix(dst);
                emptied.push(dst);
                continue;
            }
            let owner = self.owners[dst as usize];
            let generation = owner.and_then(|id| self.generations.get_mut(&id));
            if generation.is_some_and(|generation| generation.set_cached(n_tokens)) {
                self.shared.count_cached(u64::from(n_tokens));
            }
        }
    }

    fn sample(&mut self, step: &Step, now: Instant) {
        // The first output of each sequence, and copies of it. What was guessed to follow is in the rows behind.
        let mut rows = Vec::with_capacity(step.outputs.len());
        for outputs in step.outputs.chunk_by(|a, b| a.seq == b.seq) {
            let output = outputs[0];
            // The prompt of a request with several choices was computed once: the others continue from a copy. It is made
            // before anything is sampled, because the first choice may end here and give its sequence back.
            let n_prompt = step.rows[output.row].pos + 1;
            let mut copies = self.scheduler.forks(output.seq);
            copies.retain(|&fork| {
                let is_there = self.backend.copy(output.seq, fork, n_prompt);
                if !is_there {
                    self.scheduler.fork_failed(fork);
                }
                is_there
            });
            rows.push((output.row, output.seq));
            rows.extend(copies.into_iter().map(|fork| (output.row, fork)));
        }
        self.sample_ahead(&rows);
        for (mut row, seq) in rows {
            let n_guessed = step.rows[row + 1..].iter().take_while(|next| next.output && next.seq == seq).count();
            self.count_guesses(seq, n_guessed as u32, 0);
            while self.sample_row(row, seq, now) {
                row += 1;
            }
            self.settle(seq);
        }
        self.shared.count_guesses(self.scheduler.guesses());
    }

    /// The request in a sequence had guesses computed, or some of them were right.
    fn count_guesses(&mut self, seq: SeqId, n_guessed: u32, n_right: u32) {
        let owner = self.owners[seq as usize];
        if let Some(generation) = owner.and_then(|id| self.generations.get_mut(&id)) {
            generation.count_guesses(n_guessed, n_right);
        }
    }

    /// Frees the cells of wrong guesses.
    fn settle(&mut self, seq: SeqId) {
        let Some(n_tokens) = self.scheduler.settle(seq) else { return };
        if !self.backend.truncate(seq, n_tokens) {
            self.scheduler.cut_failed(seq);
            self.drafter = None; // nobody guesses any more, so a head need not follow
        }
    }

    /// Samples the rows of a large step on several threads; what follows from their tokens happens here, in order.
    fn sample_ahead(&mut self, rows: &[(usize, SeqId)]) {
        let n_helpers = self.pool.n_helpers(rows.len(), self.n_vocab);
        if n_helpers == 0 {
            return;
        }
        let row_of: HashMap<SeqId, usize> = rows.iter().map(|&(row, seq)| (seq, row)).collect();
        let waiting = self.generations.values_mut().flat_map(Generation::rows);
        let work = waiting.filter_map(|choice| {
            let logits = self.backend.logits(*row_of.get(&choice.seq)?)?;
            Some((choice, logits))
        });
        sampling_pool::for_each(work.collect(), n_helpers, |(choice, logits)| choice.sample_ahead(logits));
    }

    /// Samples one token. `true` when it was guessed, so that the next row has the scores after it.
    fn sample_row(&mut self, row: usize, seq: SeqId, now: Instant) -> bool {
        let Some(id) = self.owners[seq as usize] else { return false };
        let Some(generation) = self.generations.get_mut(&id) else { return false };
        let Some(logits) = self.backend.logits(row) else {
            self.fail(id, GenerationError::Backend { message: "a step has no scores for its token".into() });
            return false;
        };
        let advance = generation.advance(seq, logits, &*self.tokenizer, now);
        let Some(token) = self.follow_up(id, seq, advance, now) else { return false };
        if self.scheduler.sampled(seq, token) {
            self.count_guesses(seq, 0, 1);
            return true;
        }
        // What a grammar forces needs no scores: it is computed in one step with what comes before it.
        while let Some(generation) = self.generations.get_mut(&id) {
            let Some(advance) = generation.force(seq, &*self.tokenizer, now) else { break };
            let Some(token) = self.follow_up(id, seq, advance, now) else { break };
            self.scheduler.sampled(seq, token);
        }
        false
    }

    /// What becomes of a request after one more token; the token, if the sequence goes on with it.
    fn follow_up(
        &mut self,
        id: RequestId,
        seq: SeqId,
        advance: Result<Advance, GenerationError>,
        now: Instant,
    ) -> Option<TokenId> {
        self.shared.count_generated();
        match advance {
            Ok(Advance::Continues(token)) => return Some(token),
            Ok(Advance::Finished) => {
                let generation = self.generations.get(&id);
                let (done, warms) =
                    (generation.is_some_and(Generation::is_done), generation.and_then(Generation::warms));
                self.release(seq);
                let is_kept = warms.is_none_or(|is_pinned| self.keep_warm(id, seq, is_pinned));
                if done && is_kept {
                    self.finish(id, now);
                }
            }
            Ok(Advance::NobodyListens) => self.cancel(id),
            Err(error) => self.fail(id, error),
        }
        None
    }

    fn finish(&mut self, id: RequestId, now: Instant) {
        let Some(generation) = self.generations.remove(&id) else { return };
        self.publish(); // before the last event: whoever has it finds the counters true
        let summary = generation.finish(now);
        let tokens = summary.completion_tokens;
        let total_ms = summary.prefill_ms + summary.decode_ms;
        let per_second = f64::from(tokens) / (total_ms / 1e3).max(1e-6);
        tracing::debug!("Inference: {tokens} tokens in {total_ms:.0}ms ({per_second:.0} tokens/sec)");
        self.shared.learn_duration((summary.queue_ms + total_ms) / 1e3);
    }

    fn fail(&mut self, id: RequestId, error: GenerationError) {
        let Some(generation) = self.generations.remove(&id) else { return };
        tracing::warn!(request = id, "request failed: {error}");
        self.free(id, &generation);
        self.shared.count_failed();
        self.publish();
        generation.fail(error);
    }

    /// Ends the requests whose step was not computed; the others go on, unless they have a recurrent state. Their cells may be half
    /// written, so their sequences are emptied.
    fn step_failed(&mut self, step: &Step, error: &StepError) {
        tracing::error!(rows = step.rows.len(), "step failed: {error}");
        self.shared.count_failed_step();
        let mut seqs: Vec<SeqId> = step.rows.iter().map(|row| row.seq).collect();
        seqs.dedup();
        // A step lays states anew for others than its own sequences too, and a failed one leaves them where they were.
        if !error.cache_unchanged && self.moves_states {
            seqs = (0..self.owners.len() as SeqId).collect();
        }
        if !error.cache_unchanged || error.begins_anew {
            for &seq in &seqs {
                self.discard(seq);
                self.backend.truncate(seq, 0);
            }
        }
        for seq in seqs {
            if let Some(id) = self.owners[seq as usize] {
                self.fail(id, GenerationError::Backend { message: error.message.clone() });
            }
        }
    }

    fn publish(&self) {
        let (used, cached) = self.scheduler.cells();
        self.shared.publish_draft_cells(self.drafter.as_ref().map_or(0, |drafter| drafter.n_cells()));
        let (queued, _) = self.scheduler.queued();
        self.shared.publish((self.generations.len() - queued) as u64, used, cached);
        self.shared.publish_parked(self.parking.bytes(), self.checkpoints.bytes());
    }
}

impl Drop for Worker {
    /// The engine thread ends, by command or by a panic: nobody may wait for it any longer.
    fn drop(&mut self) {
        self.shared.engine_ended();
        // What was sent too late to be read is dropped with the mailbox, and its stream ends in the same way.
        for (_, generation) in self.generations.drain() {
            self.shared.count_failed();
            generation.fail(GenerationError::Shutdown);
        }
    }
}
