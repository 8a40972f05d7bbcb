//! A schedule as a file: every call of the scheduler and what it answered, a line of JSON each, so that it can be run again without a
//! model and compared ([`replay`]).
//!
//! Tokens are replaced by numbers that tell nothing but which of them are equal: a trace can be sent to somebody else.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{
    Admission, CacheOp, Checkpoint, Copy, DiskOp, FileId, Guesses, Job, OnDisk, ParkId, Place, Policy, RequestId,
    Scheduler, Step, Warmed, Wrote, Yielded,
};
use crate::backend::{BackendLimits, SeqId};
use crate::drafter::{Draft, Drafted, Wish};
use crate::request::TokenId;

/// A file does not grow beyond this: about a day of a busy server.
const MOST_BYTES: u64 = 4 << 30;

/// No trace has more.
const MOST_SEQUENCES: u32 = 1 << 16;

/// One call, with what it was given and, where that decides what happens next, what it answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Call {
    New { limits: BackendLimits, policy: Policy },
    Enqueue { job: Job, now_us: u64 },
    RemoveWaiting { id: RequestId, was_new: bool },
    Expired { now_us: u64, ids: Vec<RequestId> },
    Admit { now_us: u64, admission: Option<Admission> },
    ForgetPrefix { seq: SeqId },
    Copies { copies: Vec<Copy> },
    MoveFailed { seq: SeqId },
    CopyFailed { seq: SeqId },
    ParkLost { at: ParkId },
    ParkFailed { at: ParkId },
    Dropped { ids: Vec<ParkId> },
    Drafted { drafted: Drafted },
    NoDrafts,
    MakeRoom { yielded: Option<Yielded> },
    Step { rows: Vec<Run> },
    Computed { step_us: u64 },
    Checkpoints { taken: Vec<Checkpoint> },
    CheckpointFailed { at: ParkId },
    Forks { seq: SeqId, forks: Vec<SeqId> },
    Sampled { seq: SeqId, token: TokenId, was_guessed: bool },
    Settle { seq: SeqId, n_tokens: Option<u32> },
    CutFailed { seq: SeqId },
    Release { seq: SeqId },
    Discard { seq: SeqId },
    ParkSaved { at: ParkId, n_bytes: u64 },
    ParkLast { op: Option<CacheOp> },
    KeepWarm { seq: SeqId, is_pinned: bool, warmed: Warmed },
    DiskFound { files: Vec<OnDisk>, namespaces: Vec<u64> },
    DiskOps { ops: Vec<DiskOp> },
    DiskRead { at: ParkId, was_read: bool, took_us: u64, is_wanted: bool },
    DiskWrote { file: FileId, outcome: Wrote },
    DiskOff,
}

/// Rows of one sequence in a step: from which place, how many, and how many of the last ones ask for scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    seq: SeqId,
    from: u32,
    n: u32,
    n_outputs: u32,
}

fn runs(step: &Step) -> Vec<Run> {
    let runs = step.rows.chunk_by(|a, b| a.seq == b.seq);
    runs.map(|rows| Run {
        seq: rows[0].seq,
        from: rows[0].pos,
        n: rows.len() as u32,
        n_outputs: rows.iter().filter(|row| row.output).count() as u32,
    })
    .collect()
}

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

    pub(crate) fn disk_read(&mut self, at: ParkId, was_read: bool, took_us: u64) -> bool {
        let is_wanted = self.scheduler.disk_read(at, was_read, took_us);
        self.note(|_| Call::DiskRead { at, was_read, took_us, is_wanted });
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

/// What a trace came to when it was run again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Calls of the scheduler.
    pub n_calls: u64,
    /// Requests.
    pub n_requests: u64,
    /// Steps.
    pub n_steps: u64,
    /// Rows of all steps.
    pub n_rows: u64,
    /// Time inside the scheduler, this time.
    pub time: Duration,
    /// The longest that one turn took, from one step to the next.
    pub longest_turn: Duration,
    /// One line per admission and step, if they were asked for.
    pub text: String,
}

/// Why a trace could not be run again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The file cannot be read.
    #[error("cannot read the trace")]
    Read(#[from] std::io::Error),
    /// A line is no call of the scheduler.
    #[error("line {line} is no call of the scheduler")]
    Line {
        /// Its number, from 1.
        line: u64,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The first line has to say how large everything is, and the others have to agree with it.
    #[error(
        "line {line} is out of order: a trace begins with `new`, once, requests fit it, and `computed` follows `step`"
    )]
    Order {
        /// Its number, from 1.
        line: u64,
    },
    /// A number is outside what the trace's first line allows.
    #[error("line {line} names sequence {seq}, and there are {n_seq_max}")]
    Sequence {
        /// Its number, from 1.
        line: u64,
        /// The sequence.
        seq: SeqId,
        /// How many there are.
        n_seq_max: u32,
    },
    /// The scheduler answered something else.
    #[error("line {line}: the trace has {then}, now it is {now}")]
    Differs {
        /// Its number, from 1.
        line: u64,
        /// What the trace has.
        then: String,
        /// What the scheduler says now.
        now: String,
    },
}

/// Runs a trace again and compares every answer; `with_text` collects a line per admission and step.
///
/// # Errors
/// [`ReplayError`], at the first line that is damaged or that the scheduler answers differently now.
pub fn replay(trace: impl BufRead, with_text: bool) -> Result<Replayed, ReplayError> {
    let mut replayed = Replayed::default();
    let mut running: Option<(Scheduler, u32)> = None;
    let (mut step, mut turn) = (Step::default(), Duration::ZERO);
    for (line, text) in (1_u64..).zip(trace.lines()) {
        let then: Call = serde_json::from_str(&text?).map_err(|source| ReplayError::Line { line, source })?;
        if let Call::New { limits, policy } = then {
            if running.is_some() || !(1..=MOST_SEQUENCES).contains(&limits.n_seq_max) {
                return Err(ReplayError::Order { line });
            }
            running = Some((Scheduler::new(limits, policy), limits.n_seq_max));
            continue;
        }
        let Some((scheduler, n_seq_max)) = &mut running else { return Err(ReplayError::Order { line }) };
        if let Some(seq) = then.seq().filter(|seq| seq >= n_seq_max) {
            return Err(ReplayError::Sequence { line, seq, n_seq_max: *n_seq_max });
        }
        let is_no_job =
            matches!(&then, Call::Enqueue { job, .. } if job.prompt.is_empty() || !(1..=*n_seq_max).contains(&job.n));
        if is_no_job || (matches!(then, Call::Computed { .. }) && step.rows.is_empty()) {
            return Err(ReplayError::Order { line });
        }
        let began = Instant::now();
        let now = then.again(scheduler, &mut step);
        let took = began.elapsed();
        if now != then {
            return Err(ReplayError::Differs { line, then: format!("{then:?}"), now: format!("{now:?}") });
        }
        replayed.n_calls += 1;
        replayed.time += took;
        turn += took;
        match &now {
            Call::Enqueue { .. } => replayed.n_requests += 1,
            Call::Step { rows } => {
                replayed.n_steps += 1;
                replayed.n_rows += rows.iter().map(|run| u64::from(run.n)).sum::<u64>();
                replayed.longest_turn = replayed.longest_turn.max(turn);
                turn = Duration::ZERO;
            }
            _ => {}
        }
        if with_text {
            now.print(&mut replayed.text);
        }
    }
    Ok(replayed)
}

impl Call {
    /// The sequence that is named, if one is.
    fn seq(&self) -> Option<SeqId> {
        match *self {
            Self::ForgetPrefix { seq }
            | Self::MoveFailed { seq }
            | Self::CopyFailed { seq }
            | Self::Forks { seq, .. }
            | Self::Sampled { seq, .. }
            | Self::Settle { seq, .. }
            | Self::CutFailed { seq }
            | Self::Release { seq }
            | Self::KeepWarm { seq, .. }
            | Self::Discard { seq } => Some(seq),
            _ => None,
        }
    }

    /// The same call, with what the scheduler answers now.
    fn again(&self, scheduler: &mut Scheduler, step: &mut Step) -> Self {
        let mut now = self.clone();
        match &mut now {
            Self::New { .. } => {}
            Self::Enqueue { job, now_us } => scheduler.enqueue(job.clone(), *now_us),
            Self::RemoveWaiting { id, was_new } => *was_new = scheduler.remove_waiting(*id),
            Self::Expired { now_us, ids } => *ids = scheduler.expired(*now_us),
            Self::Admit { now_us, admission } => *admission = scheduler.admit(*now_us),
            Self::ForgetPrefix { seq } => scheduler.forget_prefix(*seq),
            Self::Copies { copies } => *copies = scheduler.copies(),
            Self::MoveFailed { seq } => scheduler.move_failed(*seq),
            Self::CopyFailed { seq } => scheduler.copy_failed(*seq),
            Self::ParkLost { at } => scheduler.park_lost(*at),
            Self::ParkFailed { at } => scheduler.park_failed(*at),
            Self::Dropped { ids } => *ids = scheduler.dropped(),
            Self::Drafted { drafted } => scheduler.drafted(drafted),
            Self::NoDrafts => scheduler.no_drafts(),
            Self::MakeRoom { yielded } => *yielded = scheduler.make_room(),
            Self::Step { rows } => {
                scheduler.step(step);
                *rows = runs(step);
            }
            Self::Computed { step_us } => scheduler.computed(step, *step_us),
            Self::Checkpoints { taken } => *taken = scheduler.checkpoints(),
            Self::CheckpointFailed { at } => scheduler.checkpoint_failed(*at),
            Self::Forks { seq, forks } => *forks = scheduler.forks(*seq),
            Self::Sampled { seq, token, was_guessed } => *was_guessed = scheduler.sampled(*seq, *token),
            Self::Settle { seq, n_tokens } => *n_tokens = scheduler.settle(*seq),
            Self::CutFailed { seq } => scheduler.cut_failed(*seq),
            Self::Release { seq } => scheduler.release(*seq),
            Self::Discard { seq } => scheduler.discard(*seq),
            Self::ParkSaved { at, n_bytes } => scheduler.park_saved(*at, *n_bytes),
            Self::ParkLast { op } => *op = scheduler.park_last(),
            Self::KeepWarm { seq, is_pinned, warmed } => *warmed = scheduler.keep_warm(*seq, *is_pinned),
            Self::DiskFound { files, namespaces } => scheduler.disk_found(files.clone(), namespaces.clone()),
            Self::DiskOps { ops } => *ops = scheduler.disk_ops(),
            Self::DiskRead { at, was_read, took_us, is_wanted } => {
                *is_wanted = scheduler.disk_read(*at, *was_read, *took_us);
            }
            Self::DiskWrote { file, outcome } => scheduler.disk_wrote(*file, *outcome),
            Self::DiskOff => scheduler.disk_off(),
        }
        now
    }

    fn print(&self, text: &mut String) {
        use std::fmt::Write as _;
        let _ = match self {
            Self::Admit { admission: Some(admission), .. } => {
                let Admission { id, seqs, n_cached, resumes, preempted, miss, .. } = admission;
                let why = miss.map_or_else(String::new, |miss| format!(" ({})", miss.name()));
                let verb = if resumes.is_some() { "resumes" } else { "starts" };
                write!(text, "request {id} {verb} in {seqs:?}").and_then(|()| match (n_cached, preempted.is_empty()) {
                    (0, true) => writeln!(text, "{why}"),
                    (_, true) => writeln!(text, " with {n_cached} tokens{why}"),
                    _ => writeln!(text, " with {n_cached} tokens{why}, taken from {preempted:?}"),
                })
            }
            Self::MakeRoom { yielded: Some(Yielded { seqs, .. }) } if !seqs.is_empty() => {
                writeln!(text, "sequences {seqs:?} yield: answers are longer than was expected")
            }
            Self::Step { rows } => {
                let runs = rows.iter().map(|run| match (run.n, run.n_outputs) {
                    (1, 1) => format!("{}@{}", run.seq, run.from),
                    (n, outputs) => format!("{}@{}+{n}/{outputs}", run.seq, run.from),
                });
                writeln!(text, "  {}", runs.collect::<Vec<_>>().join(" "))
            }
            _ => Ok(()),
        };
    }
}
