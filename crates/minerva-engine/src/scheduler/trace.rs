//! A schedule as a file: every call of the scheduler and what it answered, a line of JSON each, so that it can be run again without a
//! model and compared ([`replay`]).
//!
//! Tokens are replaced by numbers that tell nothing but which of them are equal: a trace can be sent to somebody else.

mod print;
mod replay;
mod traced;

use serde::{Deserialize, Serialize};

use super::{
    Admission, CacheOp, Checkpoint, Copy, DiskOp, Fetched, FileId, Job, OnDisk, ParkId, Policy, RequestId, Scheduler,
    Step, Warmed, Wrote, Yielded,
};
use crate::backend::{BackendLimits, SeqId};
use crate::drafter::Drafted;
use crate::request::TokenId;

pub use self::replay::{ReplayError, Replayed, replay};
pub(crate) use self::traced::Traced;

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
    DiskRead { at: ParkId, outcome: Fetched, took_us: u64, is_wanted: bool },
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
            Self::DiskRead { at, outcome, took_us, is_wanted } => {
                *is_wanted = scheduler.disk_read(*at, *outcome, *took_us);
            }
            Self::DiskWrote { file, outcome } => scheduler.disk_wrote(*file, *outcome),
            Self::DiskOff => scheduler.disk_off(),
        }
        now
    }
}
