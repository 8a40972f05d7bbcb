//! The scheduler of a running engine, whose calls are written down if somebody wants that.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{BufWriter, Write};
use std::path::Path;

use super::super::{
    Admission, CacheOp, Checkpoint, Copy, DiskOp, Fetched, FileId, Guesses, Job, OnDisk, ParkId, Place, Policy,
    RequestId, Scheduler, Step, Warmed, Wrote, Yielded,
};
use super::{Call, runs};
use crate::backend::{BackendLimits, SeqId};
use crate::drafter::{Draft, Drafted, Wish};
use crate::request::TokenId;

/// A file does not grow beyond this: about a day of a busy server.
const MOST_BYTES: u64 = 4 << 30;

/// A scheduler that writes down what it is asked, if somebody wants that.
#[derive(Debug)]
pub(crate) struct Traced {
    scheduler: Scheduler,
    writer: Option<Writer>,
}

#[derive(Debug)]
struct Writer {
    file: BufWriter<File>,
    left_bytes: u64,
    /// Tokens are multiplied and added to, so that equal ones stay equal.
    factor: u32,
    offset: u32,
}

impl Writer {
    fn create(path: &Path) -> std::io::Result<Self> {
        let random = RandomState::new();
        Ok(Self {
            file: BufWriter::new(File::create(path)?),
            left_bytes: MOST_BYTES,
            factor: random.hash_one(0) as u32 | 1, // odd, so that no two tokens become one
            offset: random.hash_one(1) as u32,
        })
    }

    fn hide(&self, token: TokenId) -> TokenId {
        token.cast_unsigned().wrapping_mul(self.factor).wrapping_add(self.offset).cast_signed()
    }

    fn write(&mut self, call: &Call) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(call)?;
        line.push(b'\n');
        self.left_bytes = self
            .left_bytes
            .checked_sub(line.len() as u64)
            .ok_or_else(|| std::io::Error::other(format!("the trace has reached its limit of {MOST_BYTES} bytes")))?;
        self.file.write_all(&line)
    }
}

impl Traced {
    /// A trace that cannot be written is no reason not to serve: it is a line in the log.
    pub(crate) fn new(limits: BackendLimits, policy: Policy, path: Option<&Path>) -> Self {
        let create = |path: &Path| {
            let warn = |error: &std::io::Error| tracing::warn!("cannot write the trace {}: {error}", path.display());
            Writer::create(path).inspect_err(warn).ok()
        };
        let mut traced = Self { scheduler: Scheduler::new(limits, policy), writer: path.and_then(create) };
        traced.note(|_| Call::New { limits, policy });
        traced
    }

    fn note(&mut self, call: impl FnOnce(&Writer) -> Call) {
        let Some(writer) = &mut self.writer else { return };
        let call = call(writer);
        if let Err(error) = writer.write(&call) {
            tracing::warn!("the trace ends here: {error}");
            self.writer = None;
        }
    }

    pub(crate) fn enqueue(&mut self, job: Job, now_us: u64) {
        self.note(|writer| {
            let prompt = job.prompt.iter().map(|&token| writer.hide(token)).collect();
            Call::Enqueue { job: Job { prompt, ..job.clone() }, now_us }
        });
        self.scheduler.enqueue(job, now_us);
    }

    pub(crate) fn remove_waiting(&mut self, id: RequestId) -> bool {
        let was_new = self.scheduler.remove_waiting(id);
        self.note(|_| Call::RemoveWaiting { id, was_new });
        was_new
    }

    pub(crate) fn expired(&mut self, now_us: u64) -> Vec<RequestId> {
        let ids = self.scheduler.expired(now_us);
        if !ids.is_empty() {
            self.note(|_| Call::Expired { now_us, ids: ids.clone() });
        }
        ids
    }

    pub(crate) fn admit(&mut self, now_us: u64) -> Option<Admission> {
        let admission = self.scheduler.admit(now_us);
        self.note(|_| Call::Admit { now_us, admission: admission.clone() });
        admission
    }

    pub(crate) fn forget_prefix(&mut self, seq: SeqId) {
        self.note(|_| Call::ForgetPrefix { seq });
        self.scheduler.forget_prefix(seq);
    }

    pub(crate) fn copies(&mut self) -> Vec<Copy> {
        let copies = self.scheduler.copies();
        self.note(|_| Call::Copies { copies: copies.clone() });
        copies
    }

    pub(crate) fn move_failed(&mut self, seq: SeqId) {
        self.note(|_| Call::MoveFailed { seq });
        self.scheduler.move_failed(seq);
    }

    pub(crate) fn copy_failed(&mut self, seq: SeqId) {
        self.note(|_| Call::CopyFailed { seq });
        self.scheduler.copy_failed(seq);
    }

    pub(crate) fn park_lost(&mut self, at: ParkId) {
        self.note(|_| Call::ParkLost { at });
        self.scheduler.park_lost(at);
    }

    pub(crate) fn park_failed(&mut self, at: ParkId) {
        self.note(|_| Call::ParkFailed { at });
        self.scheduler.park_failed(at);
    }

    pub(crate) fn dropped(&mut self) -> Vec<ParkId> {
        let ids = self.scheduler.dropped();
        if !ids.is_empty() {
            self.note(|_| Call::Dropped { ids: ids.clone() });
        }
        ids
    }

    pub(crate) fn wishes(&mut self, wishes: &mut Vec<Wish>) {
        self.scheduler.wishes(wishes); // changes nothing
    }

    pub(crate) fn history(&self, seq: SeqId) -> &[TokenId] {
        self.scheduler.history(seq)
    }

    pub(crate) fn drafted(&mut self, drafted: &Drafted) {
        self.note(|writer| {
            let drafts = drafted.drafts.iter().map(|draft| {
                let tokens = draft.tokens.iter().map(|&token| writer.hide(token)).collect();
                Draft { tokens, ..draft.clone() }
            });
            Call::Drafted { drafted: Drafted { drafts: drafts.collect(), ..drafted.clone() } }
        });
        self.scheduler.drafted(drafted);
    }

    pub(crate) fn no_drafts(&mut self) {
        self.note(|_| Call::NoDrafts);
        self.scheduler.no_drafts();
    }

    /// Written down where somebody yields: else it changes nothing.
    pub(crate) fn make_room(&mut self) -> Option<Yielded> {
        let yielded = self.scheduler.make_room();
        if yielded.is_some() {
            self.note(|_| Call::MakeRoom { yielded: yielded.clone() });
        }
        yielded
    }

    pub(crate) fn step(&mut self, step: &mut Step) {
        self.scheduler.step(step);
        self.note(|_| Call::Step { rows: runs(step) });
    }

    pub(crate) fn computed(&mut self, step: &Step, step_us: u64) {
        self.note(|_| Call::Computed { step_us });
        self.scheduler.computed(step, step_us);
    }

    pub(crate) fn checkpoints(&mut self) -> Vec<Checkpoint> {
        let taken = self.scheduler.checkpoints();
        if !taken.is_empty() {
            self.note(|_| Call::Checkpoints { taken: taken.clone() });
        }
        taken
    }

    pub(crate) fn checkpoint_failed(&mut self, at: ParkId) {
        self.note(|_| Call::CheckpointFailed { at });
        self.scheduler.checkpoint_failed(at);
    }

    pub(crate) fn forks(&mut self, seq: SeqId) -> Vec<SeqId> {
        let forks = self.scheduler.forks(seq);
        if !forks.is_empty() {
            self.note(|_| Call::Forks { seq, forks: forks.clone() });
        }
        forks
    }

    pub(crate) fn sampled(&mut self, seq: SeqId, token: TokenId) -> bool {
        let was_guessed = self.scheduler.sampled(seq, token);
        self.note(|writer| Call::Sampled { seq, token: writer.hide(token), was_guessed });
        was_guessed
    }

    pub(crate) fn settle(&mut self, seq: SeqId) -> Option<u32> {
        let n_tokens = self.scheduler.settle(seq);
        self.note(|_| Call::Settle { seq, n_tokens });
        n_tokens
    }

    pub(crate) fn cut_failed(&mut self, seq: SeqId) {
        self.note(|_| Call::CutFailed { seq });
        self.scheduler.cut_failed(seq);
    }

    pub(crate) fn release(&mut self, seq: SeqId) {
        self.note(|_| Call::Release { seq });
        self.scheduler.release(seq);
    }

    pub(crate) fn discard(&mut self, seq: SeqId) {
        self.note(|_| Call::Discard { seq });
        self.scheduler.discard(seq);
    }

    pub(crate) fn fork_failed(&mut self, seq: SeqId) {
        self.forget_prefix(seq);
    }

    pub(crate) fn park_saved(&mut self, at: ParkId, n_bytes: u64) {
        self.note(|_| Call::ParkSaved { at, n_bytes });
        self.scheduler.park_saved(at, n_bytes);
    }

    pub(crate) fn park_last(&mut self) -> Option<CacheOp> {
        let op = self.scheduler.park_last();
        self.note(|_| Call::ParkLast { op });
        op
    }

    pub(crate) fn keep_warm(&mut self, seq: SeqId, is_pinned: bool) -> Warmed {
        let warmed = self.scheduler.keep_warm(seq, is_pinned);
        self.note(|_| Call::KeepWarm { seq, is_pinned, warmed });
        warmed
    }

    pub(crate) fn disk_found(&mut self, files: Vec<OnDisk>, namespaces: Vec<u64>) {
        self.note(|writer| {
            let hide = |file: &OnDisk| {
                let tokens = file.tokens.iter().map(|&token| writer.hide(token)).collect();
                OnDisk { tokens, ..*file }
            };
            Call::DiskFound { files: files.iter().map(hide).collect(), namespaces: namespaces.clone() }
        });
        self.scheduler.disk_found(files, namespaces);
    }

    pub(crate) fn disk_ops(&mut self) -> Vec<DiskOp> {
        let ops = self.scheduler.disk_ops();
        if !ops.is_empty() {
            self.note(|_| Call::DiskOps { ops: ops.clone() });
        }
        ops
    }

    pub(crate) fn disk_read(&mut self, at: ParkId, outcome: Fetched, took_us: u64) -> bool {
        let is_wanted = self.scheduler.disk_read(at, outcome, took_us);
        self.note(|_| Call::DiskRead { at, outcome, took_us, is_wanted });
        is_wanted
    }

    pub(crate) fn disk_wrote(&mut self, file: FileId, outcome: Wrote) {
        self.note(|_| Call::DiskWrote { file, outcome });
        self.scheduler.disk_wrote(file, outcome);
    }

    pub(crate) fn disk_off(&mut self) {
        self.note(|_| Call::DiskOff);
        self.scheduler.disk_off();
    }

    pub(crate) fn parked(&self, at: ParkId) -> Option<(&[TokenId], u64)> {
        self.scheduler.parked(at)
    }

    pub(crate) fn is_writing(&self) -> bool {
        self.scheduler.is_writing()
    }

    pub(crate) fn waits_until_us(&self, now_us: u64) -> Option<u64> {
        self.scheduler.waits_until_us(now_us)
    }

    pub(crate) fn guesses(&mut self) -> Guesses {
        self.scheduler.guesses()
    }

    /// Decides nothing, so it is not written down.
    pub(crate) fn outlook(&self, now_us: u64) -> Vec<Place> {
        self.scheduler.outlook(now_us)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    pub(crate) fn queued(&self) -> (usize, usize) {
        self.scheduler.queued()
    }

    pub(crate) fn cells(&self) -> (u64, u64) {
        self.scheduler.cells()
    }
}
