//! The worker's part in a schedule, and what is checked after every step.

use std::collections::BTreeMap;

use super::Script;
use crate::backend::{BackendLimits, SeqId};
use crate::drafter::{Draft, Drafted, Wish};
use crate::request::TokenId;
use crate::scheduler::{
    CacheOp, Checkpoint, Copy, Keep, Miss, ParkId, Policy, RequestId, Reservation, Scheduler, Step, Terms, Yielded,
};

/// A request that waits or runs.
#[derive(Debug)]
struct Live {
    script: Script,
    /// Where each choice runs.
    seqs: Vec<Option<SeqId>>,
    /// Tokens generated so far, per choice.
    n_generated: Vec<u32>,
    /// Choices that came back and have not got a token since.
    resumed: Vec<bool>,
}

impl Live {
    fn choice(&self, seq: SeqId) -> u32 {
        self.seqs.iter().position(|&own| own == Some(seq)).expect("the sequence is one of the request's") as u32
    }

    fn runs(&self, choice: u32) -> bool {
        self.n_generated[choice as usize] < self.script.n_generate
    }
}

/// How a step fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    CacheUnchanged,
    HalfWritten,
}

/// The worker's part in a schedule.
pub(super) struct Replay {
    limits: BackendLimits,
    pub(super) scheduler: Scheduler,
    cache: Vec<Vec<TokenId>>,
    /// How short each sequence can be cut, after it came back from host memory.
    least: Vec<usize>,
    owners: Vec<Option<RequestId>>,
    live: BTreeMap<RequestId, Live>,
    /// Waiting requests as they came, to see that nobody overtakes.
    queue: Vec<RequestId>,
    parked: BTreeMap<ParkId, Vec<TokenId>>,
    /// What checkpoints hold, or what the cells have to hold beside them.
    checkpoints: BTreeMap<ParkId, Vec<TokenId>>,
    step: Step,
    pub(super) cannot_cut: bool,
    pub(super) cannot_copy: bool,
    pub(super) cannot_park: bool,
    pub(super) us_per_row: u64,
    pub(super) us_per_tick: u64,
    /// A draft model is right so often.
    pub(super) draft_quality: Option<f64>,
    /// And what one of its tokens takes.
    pub(super) us_per_draft: u64,
    /// It fails in this tick.
    pub(super) draft_fails_at: Option<usize>,
    pub(super) n_drafted: usize,
    /// Why each prompt was computed when it was admitted last.
    pub(super) misses: BTreeMap<RequestId, Option<Miss>>,
    pub(super) most_parked_bytes: u64,
    /// Sequences that gave way to longer answers.
    pub(super) n_yielded: usize,
    tick: usize,
    line: String,
    pub(super) trace: String,
}

impl Replay {
    pub(super) fn new(limits: BackendLimits) -> Self {
        Self::with_policy(
            limits,
            Policy { host_cache_bytes: 200, guess: true, max_checkpoints: 4, ..Policy::default() },
        )
    }

    pub(super) fn with_policy(limits: BackendLimits, policy: Policy) -> Self {
        Self {
            limits,
            scheduler: Scheduler::new(limits, policy),
            cache: vec![Vec::new(); limits.n_seq_max as usize],
            least: vec![0; limits.n_seq_max as usize],
            owners: vec![None; limits.n_seq_max as usize],
            live: BTreeMap::new(),
            queue: Vec::new(),
            parked: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            step: Step::default(),
            cannot_cut: false,
            cannot_copy: false,
            cannot_park: false,
            us_per_row: 100,
            us_per_tick: 1000,
            draft_quality: None,
            us_per_draft: 50,
            draft_fails_at: None,
            n_drafted: 0,
            misses: BTreeMap::new(),
            most_parked_bytes: 200,
            n_yielded: 0,
            tick: 0,
            line: String::new(),
            trace: String::new(),
        }
    }

    pub(super) fn run(&mut self, scripts: &[Script], faults: &BTreeMap<usize, Fault>) {
        let last = scripts.iter().map(|script| script.at_tick).max().unwrap_or(0);
        let work: usize = scripts.iter().map(|script| script.n as usize * script.n_cells() + 1).sum();
        // A request that was cut off from its prefix or copy computes its prompt once more, and so does one that gave its seat away.
        let deadline = last + 4 * work;
        while self.tick <= last || !self.scheduler.is_idle() {
            assert!(self.tick <= deadline, "somebody starves: {:?} at tick {}", self.live, self.tick);
            let tick = self.tick;
            scripts.iter().filter(|script| script.at_tick == tick).for_each(|script| self.submit(script.clone()));
            scripts.iter().filter(|script| script.cancelled_at == Some(tick)).for_each(|script| self.cancel(script.id));
            self.turn(faults.get(&tick).copied());
            self.check_books();
            if !self.line.is_empty() {
                self.trace += &["tick ", &tick.to_string(), &std::mem::take(&mut self.line), "\n"].concat();
            }
            self.tick += 1;
        }
        assert!(self.live.is_empty(), "{:?} never ended", self.live);
        assert_eq!(self.scheduler.queued(), (0, 0));
        assert_eq!(self.scheduler.cells().0, 0, "cells are in use and nobody runs");
    }

    fn note(&mut self, what: &str) {
        self.line += " | ";
        self.line += what;
    }

    fn name(&self, seq: SeqId) -> String {
        let id = self.owners[seq as usize].expect("the sequence has an owner");
        let live = &self.live[&id];
        let name = letter(id);
        if live.script.n == 1 { name } else { format!("{name}.{}", live.choice(seq)) }
    }

    fn submit(&mut self, script: Script) {
        self.scheduler.enqueue(script.job(), self.now_us());
        self.queue.push(script.id);
        let (n_generated, resumed) = (vec![0; script.n as usize], vec![false; script.n as usize]);
        self.live.insert(script.id, Live { script, seqs: Vec::new(), n_generated, resumed });
    }

    fn cancel(&mut self, id: RequestId) {
        if !self.live.contains_key(&id) {
            return; // it was done already
        }
        self.note(&format!("{} is cancelled", letter(id)));
        self.end(id);
    }

    fn now_us(&self) -> u64 {
        self.tick as u64 * self.us_per_tick
    }

    /// Gives back what a running request still has.
    fn end(&mut self, id: RequestId) {
        let Some(live) = self.live.remove(&id) else { return };
        assert_eq!(self.scheduler.remove_waiting(id), self.queue.contains(&id));
        self.queue.retain(|&waiting| waiting != id);
        for (choice, &seq) in live.seqs.iter().enumerate() {
            if live.runs(choice as u32)
                && let Some(seq) = seq
            {
                self.release(seq);
            }
        }
        self.drop_parked();
    }

    fn release(&mut self, seq: SeqId) {
        if let Some(n_tokens) = self.scheduler.settle(seq)
            && !self.truncate(seq, n_tokens)
        {
            self.scheduler.discard(seq);
        }
        self.scheduler.release(seq);
        self.owners[seq as usize] = None;
    }

    fn turn(&mut self, fault: Option<Fault>) {
        self.copy_prefixes();
        self.admit();
        self.make_room();
        self.draft();
        let mut step = std::mem::take(&mut self.step);
        self.scheduler.step(&mut step);
        self.check_step(&step);
        self.note_rows(&step);
        match fault.filter(|_| !step.rows.is_empty()) {
            None => {
                for row in &step.rows {
                    self.cache[row.seq as usize].push(row.token);
                }
                let step_us = 1000 + self.us_per_row * step.rows.len() as u64;
                self.scheduler.computed(&step, step_us);
                self.take_checkpoints();
                self.sample(&step);
            }
            Some(fault) => self.step_failed(&step, fault),
        }
        self.step = step;
    }

    /// The draft model's part: right as often as it should be, and sometimes too far behind.
    fn draft(&mut self) {
        let Some(quality) = self.draft_quality else { return };
        let mut wishes = Vec::new();
        self.scheduler.wishes(&mut wishes);
        if wishes.is_empty() {
            return;
        }
        if self.draft_fails_at.is_some_and(|tick| tick <= self.tick) {
            return self.scheduler.no_drafts();
        }
        let mut drafted = Drafted::default();
        for Wish { seq, n_most, n_feed } in wishes {
            assert!(n_most >= 1 && n_feed >= 1, "a wish for nothing");
            let id = self.owners[seq as usize].expect("a wish is for somebody who runs");
            let live = &self.live[&id];
            let choice = live.choice(seq);
            let n_known = live.script.prompt.len() + live.n_generated[choice as usize] as usize;
            let history: Vec<_> = (0..n_known).map(|place| live.script.token(choice, place)).collect();
            assert_eq!(self.scheduler.history(seq), history, "somebody else's history");
            let tokens = (n_known..n_known + n_most as usize).map(|place| {
                let chance = (place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
                let is_right = (chance as f64) < quality * f64::from(1 << 24);
                if is_right { live.script.token(choice, place) } else { 7 }
            });
            let is_complete = !n_known.is_multiple_of(7);
            let draft = Draft { seq, tokens: tokens.collect(), n_held: n_known as u32, is_complete };
            self.n_drafted += if is_complete { draft.tokens.len() } else { 0 };
            drafted.n_rounds = drafted.n_rounds.max(n_most);
            drafted.n_round_guesses += n_most;
            drafted.rounds_us = u64::from(drafted.n_rounds) * self.us_per_draft;
            drafted.drafts.push(draft);
        }
        self.scheduler.drafted(&drafted);
    }

    fn admit(&mut self) {
        loop {
            let first = self.scheduler.outlook(self.now_us()).into_iter().next();
            let Some(admission) = self.scheduler.admit(self.now_us()) else { return };
            let id = admission.id;
            if admission.resumes.is_none() {
                assert_eq!(first.map(|place| (place.id, place.position)), Some((id, 1)), "it was told another place");
            }
            self.misses.insert(id, admission.miss);
            self.pause(admission.preempted);
            for &seq in &admission.seqs {
                assert_eq!(self.owners[seq as usize].replace(id), None, "sequence {seq} has an owner");
            }
            let first = admission.seqs[0];
            let n_cached = admission.n_cached as usize;
            let choice = admission.resumes.unwrap_or(0);
            if admission.resumes.is_some() {
                let live = self.live.get_mut(&id).expect("it waited");
                assert_eq!((admission.seqs.len(), live.seqs[choice as usize]), (1, None));
                live.seqs[choice as usize] = Some(first);
                live.resumed[choice as usize] = true;
            } else {
                self.nobody_was_overtaken_by(id);
                let live = self.live.get_mut(&id).expect("it waited");
                assert_eq!(admission.seqs.len(), live.script.n as usize);
                live.seqs = admission.seqs.iter().copied().map(Some).collect();
            }
            let lost = self.change_cache(admission.ops, &admission.seqs);
            let live = &self.live[&id];
            let history: Vec<_> = (0..n_cached).map(|place| live.script.token(choice, place)).collect();
            assert!(
                n_cached < live.script.prompt.len() + live.n_generated[choice as usize] as usize,
                "the last token has to be computed"
            );
            assert!(lost || self.cache[first as usize] == history, "the prefix is somebody else's");
            match (admission.resumes, n_cached) {
                (Some(_), _) => self.note(&format!("{} resumes with {n_cached}", self.name(first))),
                (None, 0) => {}
                (None, _) => self.note(&format!("{} reuses {n_cached}", letter(id))),
            }
            self.drop_parked();
            self.copy_prefixes();
        }
    }

    fn pause(&mut self, seqs: Vec<SeqId>) {
        for seq in seqs {
            self.note(&format!("{} yields", self.name(seq)));
            let owner = self.owners[seq as usize].take().expect("it ran");
            let live = self.live.get_mut(&owner).expect("an owner is live");
            let choice = live.choice(seq) as usize;
            live.seqs[choice] = None;
        }
    }

    fn make_room(&mut self) {
        let Some(Yielded { seqs, ops }) = self.scheduler.make_room() else { return };
        self.n_yielded += seqs.len();
        self.pause(seqs);
        self.change_cache(ops, &[]);
        self.drop_parked();
        assert_eq!(self.scheduler.make_room(), None, "there is room now");
    }

    /// First come, first served, among requests on the same terms.
    fn nobody_was_overtaken_by(&mut self, id: RequestId) {
        let terms = |id: &RequestId| Terms { keep: Keep::default(), ..self.live[id].script.terms };
        let first = self.queue.iter().copied().find(|waiting| terms(waiting) == terms(&id));
        assert_eq!(first, Some(id), "{} overtook", letter(id));
        self.queue.retain(|&waiting| waiting != id);
    }

    /// What the worker does for an admission; whether something that should be in a sequence is not.
    fn change_cache(&mut self, ops: Vec<CacheOp>, seqs: &[SeqId]) -> bool {
        let (mut is_moved, mut lost, mut lost_parks) = (true, false, Vec::new());
        for op in ops {
            match op {
                CacheOp::Keep { seq, n_tokens } => {
                    let n = self.cache[seq as usize].len();
                    if !seqs.contains(&seq) && n > 0 {
                        self.note(&format!("evicts {n}"));
                    }
                    if !self.truncate(seq, n_tokens) && n_tokens > 0 {
                        self.scheduler.forget_prefix(seq);
                        lost = true;
                    }
                }
                CacheOp::Move { src, dst, n_tokens } => self.move_to(src, dst, n_tokens, &mut is_moved),
                CacheOp::Park { seq, at, n_tokens } => {
                    if !is_moved {
                        self.scheduler.park_lost(at);
                        lost_parks.push(at);
                        continue;
                    }
                    let tokens = self.cache[seq as usize].clone();
                    assert_eq!(tokens.len(), n_tokens as usize, "all of it");
                    if self.cannot_park {
                        self.scheduler.park_failed(at);
                    } else {
                        self.note(&format!("parks {n_tokens}"));
                        assert!(self.parked.insert(at, tokens).is_none(), "{at} is parked already");
                    }
                }
                CacheOp::Unpark { at, seq, n_tokens } => {
                    assert!(self.cache[seq as usize].is_empty(), "it comes over something else");
                    if let Some(tokens) = self.parked.get(&at).or(self.complete_checkpoint(at)) {
                        assert_eq!(tokens.len(), n_tokens as usize, "all of it");
                        self.cache[seq as usize] = tokens.clone();
                        let n_window = self.limits.n_copied_window_tokens;
                        let has_lost = n_window > 0 && n_tokens > n_window;
                        self.least[seq as usize] = if has_lost { n_tokens as usize } else { 0 };
                    } else {
                        assert!(self.cannot_park || lost_parks.contains(&at), "{at} is not parked");
                        self.scheduler.forget_prefix(seq);
                        lost = true;
                    }
                }
                // It may go back in what could not be brought in.
                CacheOp::Rewind { seq, .. } if lost => {
                    self.empty(seq);
                    self.scheduler.forget_prefix(seq);
                }
                CacheOp::Rewind { at, seq, n_tokens } => {
                    self.rewind(at, seq, n_tokens);
                }
            }
        }
        lost
    }

    pub(super) fn checkpoint_lengths(&self) -> Vec<usize> {
        let mut lengths: Vec<usize> = self.checkpoints.values().map(Vec::len).collect();
        lengths.sort_unstable();
        lengths
    }

    fn complete_checkpoint(&self, at: ParkId) -> Option<&Vec<TokenId>> {
        self.checkpoints.get(&at).filter(|_| !self.limits.checkpoints_need_cells)
    }

    fn rewind(&mut self, at: ParkId, seq: SeqId, n_tokens: u32) {
        assert!(self.limits.checkpoints_need_cells, "this memory has no cells beside its checkpoints");
        let held = &mut self.cache[seq as usize];
        held.truncate(n_tokens as usize);
        assert_eq!(self.checkpoints.get(&at), Some(&*held), "a checkpoint of another text");
        self.note(&format!("goes back to {n_tokens}"));
    }

    fn take_checkpoints(&mut self) {
        for Checkpoint { seq, at, n_tokens } in self.scheduler.checkpoints() {
            assert!(!self.limits.keeps_beginnings, "this memory can be cut");
            let tokens = self.cache[seq as usize].clone();
            assert_eq!(tokens.len(), n_tokens as usize, "as long as it is now");
            if self.cannot_park {
                self.scheduler.checkpoint_failed(at);
            } else {
                self.note(&format!("{} keeps {n_tokens}", self.name(seq)));
                assert!(self.checkpoints.insert(at, tokens).is_none(), "{at} is taken already");
            }
        }
        self.drop_parked();
    }

    fn checkpoint_bytes(&self, n_tokens: usize) -> u64 {
        let BackendLimits { state_bytes, cell_bytes, window_cell_bytes, n_window_tokens, .. } = self.limits;
        let cells = if self.limits.checkpoints_need_cells { 0 } else { cell_bytes * n_tokens as u64 };
        state_bytes + cells + window_cell_bytes * (n_tokens as u64).min(u64::from(n_window_tokens))
    }

    fn drop_parked(&mut self) {
        for at in self.scheduler.dropped() {
            let was_there = self.parked.remove(&at).is_some() || self.checkpoints.remove(&at).is_some();
            assert!(was_there || self.cannot_park || self.cannot_copy, "{at} was never parked");
        }
    }

    fn copy_prefixes(&mut self) {
        let mut is_there = true;
        for Copy { src, dst, n_tokens, rewind } in self.scheduler.copies() {
            let source = &self.cache[src as usize];
            let n = rewind.map_or(n_tokens, |rewind| rewind.n_held) as usize;
            is_there &=
                !self.cannot_copy && (n == source.len() || (!self.cannot_cut && self.is_cuttable(source.len())));
            if !is_there {
                self.scheduler.copy_failed(dst);
                continue;
            }
            assert!(n <= source.len(), "a copy of what is not computed");
            assert!(self.cache[dst as usize].is_empty(), "a copy over something else");
            self.cache[dst as usize] = source[..n].to_vec();
            self.copy_least(src, dst);
            if let Some(rewind) = rewind {
                self.rewind(rewind.at, dst, n_tokens);
            }
            self.note(&format!("{} shares {n_tokens}", self.name(dst)));
        }
    }

    fn move_to(&mut self, src: SeqId, dst: SeqId, n_tokens: u32, is_there: &mut bool) {
        *is_there &= !self.cannot_copy;
        if !*is_there {
            self.empty(dst);
            return self.scheduler.move_failed(dst);
        }
        assert_eq!(self.cache[src as usize].len(), n_tokens as usize, "all of it");
        self.cache[dst as usize] = self.cache[src as usize].clone();
        self.copy_least(src, dst);
        self.note(&format!("moves {n_tokens}"));
    }

    /// Whether a sequence of this length can be cut anywhere.
    fn is_cuttable(&self, n_held: usize) -> bool {
        self.limits.keeps_beginnings || n_held <= self.limits.n_window_tokens as usize
    }

    fn empty(&mut self, seq: SeqId) {
        self.cache[seq as usize].clear();
        self.least[seq as usize] = 0;
    }

    fn copy_least(&mut self, src: SeqId, dst: SeqId) {
        let (held, least) = (self.cache[dst as usize].len(), self.least[src as usize]);
        assert!(held >= least, "sequence {src} came back with what is after {least} only");
        self.least[dst as usize] = least;
    }

    fn truncate(&mut self, seq: SeqId, n_tokens: u32) -> bool {
        if n_tokens == 0 {
            self.empty(seq);
            return true;
        }
        assert!(n_tokens as usize >= self.least[seq as usize], "sequence {seq} is cut in what never came back");
        let is_cuttable = !self.cannot_cut && self.is_cuttable(self.cache[seq as usize].len());
        let tokens = &mut self.cache[seq as usize];
        let cut = is_cuttable || n_tokens as usize == tokens.len();
        tokens.truncate(n_tokens as usize);
        if !cut {
            self.empty(seq);
        }
        cut
    }

    fn sample(&mut self, step: &Step) {
        let mut outputs = step.outputs.iter().peekable();
        while let Some(output) = outputs.next() {
            for fork in self.scheduler.forks(output.seq) {
                let source = self.cache[output.seq as usize].clone();
                assert_eq!(source.len() as u32, step.rows[output.row].pos + 1);
                if self.cannot_copy {
                    self.empty(fork);
                    self.scheduler.fork_failed(fork);
                } else {
                    self.note(&format!("{} copies {}", self.name(fork), self.name(output.seq)));
                    self.cache[fork as usize] = source;
                    self.copy_least(output.seq, fork);
                    self.sampled(fork);
                }
            }
            let was_guessed = self.sampled(output.seq);
            while !was_guessed && outputs.next_if(|next| next.seq == output.seq).is_some() {}
            if outputs.peek().is_none_or(|next| next.seq != output.seq) {
                self.settle(output.seq);
            }
        }
    }

    fn settle(&mut self, seq: SeqId) {
        if let Some(n_tokens) = self.scheduler.settle(seq)
            && !self.truncate(seq, n_tokens)
        {
            self.note(&format!("{} is lost", self.name(seq)));
            let id = self.owners[seq as usize].expect("it runs");
            let live = self.live.get_mut(&id).expect("an owner is live");
            let choice = live.choice(seq) as usize;
            live.resumed[choice] = true;
            self.scheduler.cut_failed(seq);
        }
    }

    fn sampled(&mut self, seq: SeqId) -> bool {
        let was_guessed = self.sampled_one(seq);
        while !was_guessed && self.is_forced(seq) {
            self.sampled_one(seq);
        }
        was_guessed
    }

    /// Whether the next token follows without any scores.
    fn is_forced(&self, seq: SeqId) -> bool {
        let live = self.owners[seq as usize].and_then(|id| self.live.get(&id));
        live.is_some_and(|live| live.script.is_forced(live.n_generated[live.choice(seq) as usize]))
    }

    fn sampled_one(&mut self, seq: SeqId) -> bool {
        let Some(id) = self.owners[seq as usize] else { return false };
        let live = self.live.get_mut(&id).expect("an owner is live");
        let choice = live.choice(seq);
        let at = live.n_generated[choice as usize] as usize;
        live.n_generated[choice as usize] += 1;
        live.resumed[choice as usize] = false;
        if live.runs(choice) {
            let token = live.script.token(choice, live.script.prompt.len() + at);
            return self.scheduler.sampled(seq, token);
        }
        live.seqs[choice as usize] = None;
        let all_done = (0..live.script.n).all(|choice| !live.runs(choice));
        self.release(seq);
        if all_done {
            self.live.remove(&id);
        }
        false
    }

    fn step_failed(&mut self, step: &Step, fault: Fault) {
        if fault == Fault::HalfWritten {
            for row in &step.rows {
                self.scheduler.discard(row.seq);
                self.empty(row.seq);
            }
        }
        for row in &step.rows {
            if let Some(id) = self.owners[row.seq as usize] {
                self.note(&format!("{} fails", letter(id)));
                self.end(id);
            }
        }
    }

    fn note_rows(&mut self, step: &Step) {
        let n_decode = step.rows.len() - step.n_prefill;
        for rows in step.rows[..n_decode].chunk_by(|a, b| a.seq == b.seq) {
            let guesses = if rows.len() > 1 { format!(" and {}", rows.len() - 1) } else { String::new() };
            self.note(&format!("{} decode{guesses}", self.name(rows[0].seq)));
        }
        for chunk in step.rows[n_decode..].chunk_by(|a, b| a.seq == b.seq) {
            let (from, to) = (chunk[0].pos, chunk[0].pos + chunk.len() as u32);
            self.note(&format!("{} prefill {from}..{to}", self.name(chunk[0].seq)));
        }
    }

    /// Every row extends what its sequence holds by the next token of its owner, and nobody who can decode is left out.
    fn check_step(&self, step: &Step) {
        assert!(step.rows.len() <= self.limits.n_batch as usize, "a step of {} rows", step.rows.len());
        assert!(!step.rows.is_empty() || self.owners.iter().all(Option::is_none), "a step without anything to do");
        let mut lengths: Vec<usize> = self.cache.iter().map(Vec::len).collect();
        for row in &step.rows {
            let id = self.owners[row.seq as usize].expect("a row belongs to somebody");
            let live = &self.live[&id];
            let length = &mut lengths[row.seq as usize];
            assert_eq!(row.pos as usize, *length, "sequence {} has a gap", row.seq);
            let choice = live.choice(row.seq);
            let n_known = live.script.prompt.len() + live.n_generated[choice as usize] as usize;
            let is_guess = *length >= n_known;
            assert!(is_guess || row.token == live.script.token(choice, *length), "a token of somebody else");
            *length += 1;
            assert_eq!(row.output, *length >= n_known, "scores are asked for where a token follows");
            assert!(*length < live.script.n_cells(), "a guess has no room");
        }
        let asked: Vec<_> = step.outputs.iter().map(|output| (output.row, output.seq)).collect();
        let rows = step.rows.iter().enumerate();
        assert_eq!(asked, rows.filter(|(_, row)| row.output).map(|(i, row)| (i, row.seq)).collect::<Vec<_>>());
        let decode = &step.rows[..step.rows.len() - step.n_prefill];
        let n_decode = decode.chunk_by(|a, b| a.seq == b.seq).count();
        let ready = self
            .live
            .values()
            .flat_map(|live| live.seqs.iter().zip(&live.n_generated).zip(0..).map(move |t| (live, t)));
        let decodes = |live: &Live, choice: u32| live.runs(choice) && !live.resumed[choice as usize];
        let n_ready =
            ready.filter(|(live, ((seq, n), choice))| **n > 0 && seq.is_some() && decodes(live, *choice)).count();
        let n_held: usize = self.cache.iter().map(Vec::len).sum();
        let n_free = if self.limits.unified { self.limits.n_cells as usize - n_held } else { usize::MAX };
        let n_most = n_ready.min(self.limits.n_batch as usize);
        assert!(n_decode == n_most || step.rows.len() == n_free, "a sequence that could decode did not");
        assert!(n_decode <= n_most && step.rows.len() <= n_free, "more than there is room for");
    }

    /// The scheduler believes what the cache holds, and what it promised can be kept.
    fn check_books(&self) {
        let (mut used, mut cached, mut promised) = (0, 0, 0);
        for (seq, (tokens, owner)) in self.cache.iter().zip(&self.owners).enumerate() {
            assert!(tokens.len() <= self.limits.n_cells_per_seq as usize);
            let Some(id) = owner else {
                cached += tokens.len() as u64;
                continue;
            };
            used += tokens.len() as u64;
            let live = &self.live[id];
            promised += live.script.n_cells();
            let choice = live.choice(seq as SeqId);
            let history = (0..tokens.len()).map(|place| live.script.token(choice, place));
            assert!(tokens.iter().copied().eq(history), "sequence {seq} holds tokens of somebody else");
        }
        assert_eq!(self.scheduler.cells(), (used, cached));
        let whole = |tokens: &Vec<TokenId>| {
            let BackendLimits { state_bytes, cell_bytes, window_cell_bytes, n_window_tokens, .. } = self.limits;
            let n = tokens.len() as u64;
            state_bytes + cell_bytes * n + window_cell_bytes * n.min(u64::from(n_window_tokens))
        };
        let checkpoints = self.checkpoints.values().map(|tokens| self.checkpoint_bytes(tokens.len()));
        let parked: u64 = self.parked.values().map(whole).chain(checkpoints).sum();
        assert_eq!(self.scheduler.parked_bytes(), parked);
        assert!(parked <= self.most_parked_bytes, "more host memory than is allowed");
        assert!(used + cached <= u64::from(self.limits.n_cells), "more cells than there are");
        let is_promised = self.scheduler.policy.reservation == Reservation::Full;
        assert!(!is_promised || promised <= self.limits.n_cells as usize, "more cells are promised than there are");
        let mut running: Vec<_> = self.scheduler.running().collect();
        running.sort_unstable();
        let owned = (0..self.limits.n_seq_max).filter(|&seq| self.owners[seq as usize].is_some());
        assert!(running.iter().copied().eq(owned));
    }
}

fn letter(id: RequestId) -> String {
    u8::try_from(id).map_or_else(|_| id.to_string(), |byte| char::from(byte).to_string())
}
