//! Schedules as text, and random schedules against a model of the cache.
//!
//! [`Replay`] does what the worker does, with a clock that is only counted and a cache that holds nothing but tokens. It
//! checks the scheduler's promises after every step, so each golden trace is a test of the invariants as well.
#![expect(clippy::needless_raw_string_hashes, reason = "expect-test writes them")]

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use expect_test::expect;
use proptest::prelude::*;

use super::budget::Budget;
use super::{CacheOp, Job, RequestId, Scheduler, Step};
use crate::backend::{BackendLimits, SeqId};
use crate::request::TokenId;

/// What one request of a schedule asks for, and when it comes and goes.
#[derive(Debug, Clone)]
struct Script {
    id: RequestId,
    at_tick: usize,
    prompt: Vec<TokenId>,
    n: u32,
    /// Tokens after which each choice ends.
    n_generate: u32,
    /// Tokens that it could have generated, beyond those.
    n_spare: u32,
    reuse: bool,
    cancelled_at: Option<usize>,
}

/// A request for the golden traces; its name is one letter.
fn request(name: &str) -> Script {
    let id = RequestId::from(name.as_bytes()[0]);
    Script { id, at_tick: 0, prompt: Vec::new(), n: 1, n_generate: 1, n_spare: 0, reuse: true, cancelled_at: None }
}

impl Script {
    /// Appends tokens that no other request has.
    fn prompt(self, n_tokens: i32) -> Self {
        let text = self.id;
        self.text(text, 0..n_tokens)
    }

    /// Appends tokens of a text that other requests may have too.
    fn shares(self, text: &str, tokens: Range<i32>) -> Self {
        self.text(RequestId::from(text.as_bytes()[0]), tokens)
    }

    fn text(mut self, text: RequestId, tokens: Range<i32>) -> Self {
        self.prompt.extend(tokens.map(|i| text as TokenId * 1000 + i));
        self
    }

    /// Appends the whole text of an earlier request, its answer included.
    fn continues(mut self, earlier: &Script) -> Self {
        self.prompt.extend((0..earlier.prompt.len() + earlier.n_generate as usize).map(|i| earlier.token(0, i)));
        self
    }

    fn generate(self, n_generate: u32) -> Self {
        Self { n_generate, ..self }
    }

    fn choices(self, n: u32) -> Self {
        Self { n, ..self }
    }

    fn at_tick(self, at_tick: usize) -> Self {
        Self { at_tick, ..self }
    }

    fn cancelled_at(self, tick: usize) -> Self {
        Self { cancelled_at: Some(tick), ..self }
    }

    fn without_reuse(self) -> Self {
        Self { reuse: false, ..self }
    }

    fn max_tokens(&self) -> u32 {
        self.n_generate + self.n_spare
    }

    fn n_cells(&self) -> usize {
        self.prompt.len() + self.max_tokens() as usize
    }

    /// The token at a place of a choice's history: the prompt, then what that choice generates.
    fn token(&self, choice: u32, place: usize) -> TokenId {
        let generated = |i: usize| self.id as TokenId * 1000 + 500 + 100 * choice as TokenId + i as TokenId;
        self.prompt.get(place).copied().unwrap_or_else(|| generated(place - self.prompt.len()))
    }

    fn job(&self) -> Job {
        let Self { id, n, reuse, .. } = *self;
        Job { id, prompt: self.prompt.clone(), n, max_tokens: self.max_tokens(), reuse }
    }
}

/// A request that waits or runs.
#[derive(Debug)]
struct Live {
    script: Script,
    seqs: Vec<SeqId>,
    /// Tokens generated so far, per choice.
    n_generated: Vec<u32>,
}

impl Live {
    fn choice(&self, seq: SeqId) -> u32 {
        self.seqs.iter().position(|&own| own == seq).expect("the sequence is one of the request's") as u32
    }

    fn runs(&self, choice: u32) -> bool {
        self.n_generated[choice as usize] < self.script.n_generate
    }
}

/// How a step fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    CacheUnchanged,
    HalfWritten,
}

/// The worker's part in a schedule.
struct Replay {
    limits: BackendLimits,
    scheduler: Scheduler,
    cache: Vec<Vec<TokenId>>,
    owners: Vec<Option<RequestId>>,
    live: BTreeMap<RequestId, Live>,
    /// Waiting requests as they came, to see that nobody overtakes.
    queue: VecDeque<RequestId>,
    step: Step,
    cannot_cut: bool,
    cannot_copy: bool,
    us_per_row: u64,
    tick: usize,
    line: String,
    trace: String,
}

fn limits(n_seq_max: u32, n_batch: u32) -> BackendLimits {
    let n_cells_per_seq = 64;
    let n_cells = n_cells_per_seq * n_seq_max;
    BackendLimits { n_seq_max, n_cells_per_seq, n_cells, unified: false, n_batch, n_ubatch: n_batch, n_vocab: 1 << 20 }
}

fn pool(n_seq_max: u32, n_cells: u32) -> BackendLimits {
    BackendLimits { n_cells_per_seq: n_cells, n_cells, unified: true, ..limits(n_seq_max, 16) }
}

/// Runs the requests to their ends and returns a line per step.
fn simulate<const N: usize>(limits: BackendLimits, scripts: &[Script; N]) -> String {
    let mut replay = Replay::new(limits);
    replay.run(scripts, &BTreeMap::new());
    replay.trace
}

impl Replay {
    fn new(limits: BackendLimits) -> Self {
        Self {
            limits,
            scheduler: Scheduler::new(limits),
            cache: vec![Vec::new(); limits.n_seq_max as usize],
            owners: vec![None; limits.n_seq_max as usize],
            live: BTreeMap::new(),
            queue: VecDeque::new(),
            step: Step::default(),
            cannot_cut: false,
            cannot_copy: false,
            us_per_row: 100,
            tick: 0,
            line: String::new(),
            trace: String::new(),
        }
    }

    fn run(&mut self, scripts: &[Script], faults: &BTreeMap<usize, Fault>) {
        let last = scripts.iter().map(|script| script.at_tick).max().unwrap_or(0);
        let work: usize = scripts.iter().map(|script| script.n as usize * script.n_cells() + 1).sum();
        // A request that was cut off from its prefix or copy computes its prompt once more, hence twice.
        let deadline = last + 2 * work;
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
        self.scheduler.enqueue(script.job());
        self.queue.push_back(script.id);
        let n_generated = vec![0; script.n as usize];
        self.live.insert(script.id, Live { script, seqs: Vec::new(), n_generated });
    }

    fn cancel(&mut self, id: RequestId) {
        if !self.live.contains_key(&id) {
            return; // it was done already
        }
        self.note(&format!("{} is cancelled", letter(id)));
        if self.scheduler.remove_waiting(id) {
            self.queue.retain(|&waiting| waiting != id);
            self.live.remove(&id);
        } else {
            self.end(id);
        }
    }

    /// Gives back what a running request still has.
    fn end(&mut self, id: RequestId) {
        let Some(live) = self.live.remove(&id) else { return };
        for (choice, &seq) in live.seqs.iter().enumerate() {
            if live.runs(choice as u32) {
                self.release(seq);
            }
        }
    }

    fn release(&mut self, seq: SeqId) {
        self.scheduler.release(seq);
        self.owners[seq as usize] = None;
    }

    fn turn(&mut self, fault: Option<Fault>) {
        self.admit();
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
                self.sample(&step);
            }
            Some(fault) => self.step_failed(&step, fault),
        }
        self.step = step;
    }

    fn admit(&mut self) {
        while let Some(admission) = self.scheduler.admit() {
            let id = admission.id;
            assert_eq!(self.queue.pop_front(), Some(id), "{} overtook", letter(id));
            for &seq in &admission.seqs {
                assert_eq!(self.owners[seq as usize].replace(id), None, "sequence {seq} has an owner");
            }
            let live = self.live.get_mut(&id).expect("it waited");
            assert_eq!(admission.seqs.len(), live.script.n as usize);
            let (prompt, n_cached) = (live.script.prompt.clone(), admission.n_cached as usize);
            live.seqs.clone_from(&admission.seqs);
            let first = admission.seqs[0];
            assert!(n_cached < prompt.len(), "the last token has to be computed");
            assert_eq!(
                self.cache[first as usize].get(..n_cached),
                prompt.get(..n_cached),
                "the prefix is somebody else's"
            );
            if n_cached > 0 {
                self.note(&format!("{} reuses {n_cached}", letter(id)));
            }
            for CacheOp::Keep { seq, n_tokens } in admission.ops {
                if !admission.seqs.contains(&seq) {
                    self.note(&format!("evicts {}", self.cache[seq as usize].len()));
                }
                if !self.truncate(seq, n_tokens) && n_tokens > 0 {
                    self.scheduler.forget_prefix(seq);
                }
            }
        }
    }

    fn truncate(&mut self, seq: SeqId, n_tokens: u32) -> bool {
        let tokens = &mut self.cache[seq as usize];
        let cut = !self.cannot_cut || n_tokens == 0 || n_tokens as usize == tokens.len();
        tokens.truncate(if cut { n_tokens as usize } else { 0 });
        cut
    }

    fn sample(&mut self, step: &Step) {
        for output in &step.outputs {
            for fork in self.scheduler.forks(output.seq) {
                let source = self.cache[output.seq as usize].clone();
                assert_eq!(source.len() as u32, step.rows[output.row].pos + 1);
                if self.cannot_copy {
                    self.cache[fork as usize].clear();
                    self.scheduler.fork_failed(fork);
                } else {
                    self.note(&format!("{} copies {}", self.name(fork), self.name(output.seq)));
                    self.cache[fork as usize] = source;
                    self.sampled(fork);
                }
            }
            self.sampled(output.seq);
        }
    }

    fn sampled(&mut self, seq: SeqId) {
        let Some(id) = self.owners[seq as usize] else { return };
        let live = self.live.get_mut(&id).expect("an owner is live");
        let choice = live.choice(seq);
        let at = live.n_generated[choice as usize] as usize;
        live.n_generated[choice as usize] += 1;
        if live.runs(choice) {
            let token = live.script.token(choice, live.script.prompt.len() + at);
            return self.scheduler.sampled(seq, token);
        }
        let all_done = (0..live.script.n).all(|choice| !live.runs(choice));
        self.release(seq);
        if all_done {
            self.live.remove(&id);
        }
    }

    fn step_failed(&mut self, step: &Step, fault: Fault) {
        if fault == Fault::HalfWritten {
            for row in &step.rows {
                self.scheduler.discard(row.seq);
                self.cache[row.seq as usize].clear();
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
        for row in &step.rows[..n_decode] {
            self.note(&format!("{} decode", self.name(row.seq)));
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
            assert_eq!(row.token, live.script.token(live.choice(row.seq), *length), "a token of somebody else");
            *length += 1;
            assert_eq!(row.output, *length >= live.script.prompt.len(), "scores are asked for where a token follows");
        }
        let asked: Vec<_> = step.outputs.iter().map(|output| (output.row, output.seq)).collect();
        let rows = step.rows.iter().enumerate();
        assert_eq!(asked, rows.filter(|(_, row)| row.output).map(|(i, row)| (i, row.seq)).collect::<Vec<_>>());
        let n_decode = step.rows.len() - step.n_prefill;
        let ready = self
            .live
            .values()
            .flat_map(|live| live.seqs.iter().zip(&live.n_generated).zip(0..).map(move |t| (live, t)));
        let n_ready = ready.filter(|(live, ((_, n), choice))| **n > 0 && live.runs(*choice)).count();
        assert_eq!(n_decode, n_ready.min(self.limits.n_batch as usize), "a sequence that could decode did not");
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
        assert!(used + cached <= u64::from(self.limits.n_cells), "more cells than there are");
        assert!(promised <= self.limits.n_cells as usize, "more cells are promised than there are");
        let mut running: Vec<_> = self.scheduler.running().collect();
        running.sort_unstable();
        let owned = (0..self.limits.n_seq_max).filter(|&seq| self.owners[seq as usize].is_some());
        assert!(running.iter().copied().eq(owned));
    }
}

fn letter(id: RequestId) -> String {
    u8::try_from(id).map_or_else(|_| id.to_string(), |byte| char::from(byte).to_string())
}

#[test]
fn long_prompt_prefills_in_chunks_while_another_sequence_decodes() {
    let trace =
        simulate(limits(2, 4), &[request("a").prompt(2).generate(4), request("b").at_tick(1).prompt(6).generate(2)]);
    expect![[r#"
        tick 0 | a prefill 0..2
        tick 1 | a decode | b prefill 0..3
        tick 2 | a decode | b prefill 3..6
        tick 3 | a decode | b decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn decoding_sequences_come_first_and_in_the_order_of_their_numbers() {
    let trace = simulate(
        limits(3, 8),
        &[
            request("a").prompt(3).generate(3),
            request("b").prompt(3).generate(5),
            request("c").prompt(3).generate(4),
            request("d").prompt(5).generate(2), // gets the seat of a, and decodes in its place
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..3 | b prefill 0..3 | c prefill 0..2
        tick 1 | a decode | b decode | c prefill 2..3
        tick 2 | a decode | b decode | c decode
        tick 3 | b decode | c decode | d prefill 0..5
        tick 4 | d decode | b decode | c decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn two_prompts_are_computed_one_after_the_other_in_one_step_where_they_fit() {
    let trace = simulate(limits(2, 8), &[request("a").prompt(5).generate(2), request("b").prompt(6).generate(2)]);
    expect![[r#"
        tick 0 | a prefill 0..5 | b prefill 0..3
        tick 1 | a decode | b prefill 3..6
        tick 2 | b decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn nobody_overtakes_a_request_that_waits_for_more_room() {
    let trace = simulate(
        limits(2, 16),
        &[
            request("a").prompt(2).generate(3),
            request("b").prompt(2).generate(2).choices(2), // needs both seats
            request("c").prompt(2).generate(2),            // one seat is free all along
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..2
        tick 1 | a decode
        tick 2 | a decode
        tick 3 | b.0 prefill 0..2 | b.1 copies b.0
        tick 4 | b.1 decode | b.0 decode
        tick 5 | c prefill 0..2
        tick 6 | c decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_cancelled_request_at_the_head_of_the_queue_lets_the_next_one_in() {
    let trace = simulate(
        limits(2, 16),
        &[
            request("a").prompt(2).generate(6),
            request("b").prompt(2).generate(2).choices(2).cancelled_at(2),
            request("c").prompt(2).generate(2),
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..2
        tick 1 | a decode
        tick 2 | b is cancelled | a decode | c prefill 0..2
        tick 3 | a decode | c decode
        tick 4 | a decode
        tick 5 | a decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn the_next_turn_of_a_conversation_computes_only_what_is_new() {
    let a = request("a").prompt(6).generate(3);
    let b = request("b").at_tick(5).continues(&a).prompt(4).generate(2);
    let c = request("c").at_tick(10).continues(&b).prompt(1).generate(1);
    // The last token of an answer was never computed, so each turn has one more to compute than is new.
    let trace = simulate(limits(2, 16), &[a, b, c]);
    expect![[r#"
        tick 0 | a prefill 0..6
        tick 1 | a decode
        tick 2 | a decode
        tick 5 | b reuses 8 | b prefill 8..13
        tick 6 | b decode
        tick 10 | c reuses 14 | c prefill 14..16
    "#]]
    .assert_eq(&trace);
}

#[test]
fn the_longest_common_prefix_is_reused_and_one_token_is_always_computed() {
    let trace = simulate(
        limits(2, 16),
        &[
            request("a").shares("s", 0..4).prompt(2),
            request("b").shares("s", 0..6).prompt(2),
            request("c").at_tick(3).shares("s", 0..8), // 6 with b, 4 with a
            request("d").at_tick(6).shares("s", 0..8), // the whole prompt is there: all but its last token
            request("e").at_tick(9).shares("s", 1..8), // the same tokens, but not from the start
            request("f").at_tick(12).shares("s", 1..8).without_reuse(),
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..6 | b prefill 0..8
        tick 3 | c reuses 6 | c prefill 6..8
        tick 6 | d reuses 7 | d prefill 7..8
        tick 9 | e prefill 0..7
        tick 12 | f prefill 0..7
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_prefix_of_a_sequence_that_still_runs_is_not_touched() {
    let trace = simulate(
        limits(2, 16),
        &[request("a").shares("s", 0..6).generate(4), request("b").at_tick(1).shares("s", 0..6).generate(2)],
    );
    expect![[r#"
        tick 0 | a prefill 0..6
        tick 1 | a decode | b prefill 0..6
        tick 2 | a decode | b decode
        tick 3 | a decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn the_prompt_of_several_choices_is_computed_once() {
    let trace = simulate(limits(3, 4), &[request("a").prompt(6).generate(3).choices(3)]);
    expect![[r#"
        tick 0 | a.0 prefill 0..4
        tick 1 | a.0 prefill 4..6 | a.1 copies a.0 | a.2 copies a.0
        tick 2 | a.0 decode | a.1 decode | a.2 decode
        tick 3 | a.0 decode | a.1 decode | a.2 decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn the_prompt_of_several_choices_is_computed_once_even_if_the_first_ends_at_its_first_token() {
    let trace = simulate(limits(3, 8), &[request("a").prompt(6).generate(1).choices(3)]);
    expect![[r#"
        tick 0 | a.0 prefill 0..6 | a.1 copies a.0 | a.2 copies a.0
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_cancelled_request_gives_back_the_seats_that_wait_for_its_prompt() {
    let trace = simulate(
        limits(3, 4),
        &[
            request("a").prompt(10).generate(3).choices(2).cancelled_at(2),
            request("b").prompt(3).generate(2).choices(3),
        ],
    );
    expect![[r#"
        tick 0 | a.0 prefill 0..4
        tick 1 | a.0 prefill 4..8
        tick 2 | a is cancelled | b.0 prefill 0..3 | b.1 copies b.0 | b.2 copies b.0
        tick 3 | b.1 decode | b.2 decode | b.0 decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn a_seat_whose_source_is_released_early_computes_the_prompt_for_the_rest() {
    let mut scheduler = Scheduler::new(limits(3, 4));
    scheduler.enqueue(request("a").prompt(6).choices(3).job());
    let seqs = scheduler.admit().expect("there is room").seqs;
    let mut step = Step::default();
    scheduler.step(&mut step);
    scheduler.computed(&step, 1000);
    scheduler.release(seqs[0]);
    for n_rows in [4, 2] {
        scheduler.step(&mut step);
        assert!(step.rows.iter().all(|row| row.seq == seqs[1]), "{step:?}");
        assert_eq!(step.rows.len(), n_rows);
        scheduler.computed(&step, 1000);
    }
    assert_eq!(scheduler.forks(seqs[1]), [seqs[2]]);
    scheduler.release(seqs[2]);
    scheduler.release(seqs[1]);
    assert!(scheduler.is_idle());
}

#[test]
fn one_pool_of_cells_admits_only_what_it_can_promise() {
    // 20 cells: a may need 10, b 8, c 6; c has to wait for a, which ends before it used all it could.
    let trace = simulate(
        pool(3, 20),
        &[
            Script { n_spare: 2, ..request("a").prompt(6).generate(2) },
            request("b").prompt(4).generate(4),
            request("c").prompt(4).generate(2),
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..6 | b prefill 0..4
        tick 1 | a decode | b decode
        tick 2 | evicts 7 | b decode | c prefill 0..4
        tick 3 | b decode | c decode
    "#]]
    .assert_eq(&trace);
}

#[test]
fn one_pool_of_cells_evicts_the_oldest_finished_sequence_first_and_no_more_than_it_must() {
    let trace = simulate(
        pool(4, 24),
        &[
            request("a").prompt(6),
            request("b").at_tick(2).prompt(7),
            request("c").at_tick(4).prompt(5),             // a, b and c leave 18 cells
            request("d").at_tick(6).prompt(8).generate(2), // 10 more: a has to go, b may stay
            request("e").at_tick(9).shares("b", 0..7).prompt(1), // b is still there
        ],
    );
    expect![[r#"
        tick 0 | a prefill 0..6
        tick 2 | b prefill 0..7
        tick 4 | c prefill 0..5
        tick 6 | evicts 6 | d prefill 0..8
        tick 7 | d decode
        tick 9 | e reuses 7 | e prefill 7..8
    "#]]
    .assert_eq(&trace);
}

#[test]
fn prompts_get_smaller_shares_of_a_step_when_steps_are_slow() {
    let mut budget = Budget::new(BackendLimits { n_batch: 2048, n_ubatch: 512, ..limits(8, 2048) });
    let mut trace = Vec::new();
    let mut note = |what: &str, budget: &Budget| trace.push(format!("{what}: {}\n", budget.prefill_tokens(4, 1)));
    note("nothing known", &budget);
    for (what, decode_us, token_us) in [
        ("a GPU", 10_000, 20),
        ("a fast CPU", 10_000, 700),
        ("a slow CPU", 80_000, 2_000),
        ("a board", 400_000, 90_000),
    ] {
        for _ in 0..50 {
            budget.learn(4, 0, decode_us);
            budget.learn(4, 64, decode_us + 64 * token_us);
        }
        note(what, &budget);
    }
    let mut crowded = Budget::new(BackendLimits { n_batch: 2048, n_ubatch: 512, ..limits(8, 2048) });
    crowded.learn(1, 0, 10_000);
    crowded.learn(1, 64, 10_000 + 64 * 700);
    trace.push(format!("a fast CPU, one stream and nine prompts: {}\n", crowded.prefill_tokens(1, 9)));
    assert_eq!(budget.prefill_tokens(0, 1), 2048, "nobody decodes, nobody waits");
    expect![[r#"
        nothing known: 128
        a GPU: 512
        a fast CPU: 28
        a slow CPU: 79
        a board: 16
        a fast CPU, one stream and nine prompts: 512
    "#]]
    .assert_eq(&trace.concat());
}

#[test]
fn a_few_prompt_tokens_and_steps_of_no_time_do_not_unsettle_the_budget() {
    let mut budget = Budget::new(limits(8, 2048));
    for _ in 0..100 {
        budget.learn(0, 1, 500_000); // the step's fixed cost, not the token's
        budget.learn(4, 0, 0);
        budget.learn(4, 64, 0);
        assert!((16..=2048).contains(&budget.prefill_tokens(3, 1)));
    }
}

prop_compose! {
    /// Requests behind two shared texts, some with several choices, some cancelled, some with more room than they use.
    fn script(n_seq_max: u32)(
        at_tick in 0_usize..40,
        text in 0_u64..2,
        n_shared in 0_i32..24,
        n_own in 0_i32..20,
        n in 1..=n_seq_max.min(3),
        n_generate in 1_u32..12,
        n_spare in 0_u32..6,
        reuse in prop::bool::weighted(0.8),
        cancelled_after in prop::option::weighted(0.3, 0_usize..12),
    ) -> Script {
        let cancelled_at = cancelled_after.map(|ticks| at_tick + ticks);
        let script = Script { id: 0, at_tick, prompt: Vec::new(), n, n_generate, n_spare, reuse, cancelled_at };
        // Own parts have tokens in common too, and at least one, so that no prompt is empty.
        script.text(text, 0..n_shared).text(2, n_own..n_own + 1 + n_own)
    }
}

prop_compose! {
    fn schedule()(n_seq_max in 1_u32..=5)(
        n_seq_max in Just(n_seq_max),
        scripts in prop::collection::vec(script(n_seq_max), 1..24),
    ) -> (u32, Vec<Script>) {
        let numbered = scripts.into_iter().zip(1000..).map(|(script, id)| Script { id, ..script });
        (n_seq_max, numbered.collect())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_schedule_keeps_the_books_and_ends(
        (n_seq_max, scripts) in schedule(),
        unified in any::<bool>(),
        // The largest request has 3 choices of 24 + 20 + 12 + 6 cells.
        n_pool in 186_u32..400,
        n_batch in prop::sample::select(vec![1_u32, 3, 8, 32, 128]),
        faults in prop::collection::btree_map(0_usize..120, prop::sample::select(vec![Fault::CacheUnchanged, Fault::HalfWritten]), 0..4),
        cannot_cut in prop::bool::weighted(0.3),
        cannot_copy in prop::bool::weighted(0.2),
        us_per_row in prop::sample::select(vec![0_u64, 100, 50_000]),
    ) {
        let base = if unified { pool(n_seq_max, n_pool) } else { limits(n_seq_max, n_batch) };
        let mut replay = Replay::new(BackendLimits { n_batch, n_ubatch: n_batch, ..base });
        replay.cannot_cut = cannot_cut;
        replay.cannot_copy = cannot_copy;
        replay.us_per_row = us_per_row;
        replay.run(&scripts, &faults);
    }
}
