//! The engine thread and the tiers below the cache: what it copies out, what it hands to the disk's thread, and what comes back.

use std::time::{Duration, Instant};

use super::{Command, Worker};
use crate::backend::SeqId;
use crate::disk::{Answer, DiskTier, Job, Opened};
use crate::event::GenerationError;
use crate::scheduler::{CacheOp, DiskOp, Fetched, ParkId, RequestId, Warmed};

/// How long the end of the engine may take because of what is worth keeping.
const MOST_FLUSH: Duration = Duration::from_secs(5);

impl Worker {
    /// Uses an open folder from now on.
    pub(crate) fn use_disk(
        &mut self,
        opened: Opened,
        answers: std::sync::mpsc::Sender<Command>,
    ) -> std::io::Result<()> {
        let Opened { store, found, namespaces, counters } = opened;
        let answer = move |answer| answers.send(Command::Disk(answer)).is_ok();
        self.disk = Some(DiskTier::start(store, counters, answer)?);
        self.scheduler.disk_found(found, namespaces);
        Ok(())
    }

    /// Copies a sequence to host memory.
    pub(super) fn park(&mut self, seq: SeqId, at: ParkId) -> bool {
        let Some(state) = self.backend.save(seq) else {
            self.scheduler.park_failed(at);
            return false;
        };
        self.scheduler.park_saved(at, state.len() as u64);
        self.parking.keep(at, state);
        true
    }

    /// Lets go of what is not needed in host memory, and hands the disk's thread what is to do.
    pub(super) fn use_tiers(&mut self) {
        self.drop_parked();
        for op in self.scheduler.disk_ops() {
            let job = match op {
                DiskOp::Read { file, at } => Some(Job::Read { file, at }),
                DiskOp::Remove { file } => Some(Job::Remove { file }),
                DiskOp::Write { at, file } => self.scheduler.parked(at).and_then(|(tokens, namespace)| {
                    let (tokens, state) = (tokens.to_vec(), self.parking.share(at)?);
                    Some(Job::Write { file, namespace, tokens, state })
                }),
            };
            match (job, &self.disk) {
                (Some(job), Some(disk)) => disk.send(job),
                _ => debug_assert!(false, "{op:?} cannot be done"),
            }
        }
    }

    pub(super) fn disk_answered(&mut self, answer: Answer) {
        match answer {
            Answer::Wrote { file, outcome } => self.scheduler.disk_wrote(file, outcome),
            Answer::Read { at, state, took_us } => {
                let outcome = match &state {
                    Ok(_) => Fetched::Done,
                    Err(unread) if unread.is_gone => Fetched::Gone,
                    Err(_) => Fetched::NotNow,
                };
                let is_wanted = self.scheduler.disk_read(at, outcome, took_us);
                if let Ok(state) = state
                    && is_wanted
                {
                    self.parking.keep(at, state);
                }
            }
            Answer::Off => {
                self.scheduler.disk_off();
                self.disk = None;
            }
        }
        self.drop_parked();
    }

    /// Keeps the prompt of a request that was computed for that.
    pub(super) fn keep_warm(&mut self, id: RequestId, seq: SeqId, is_pinned: bool) -> bool {
        let is_kept = match self.scheduler.keep_warm(seq, is_pinned) {
            Warmed::Kept => true,
            Warmed::Save(at) => self.park(seq, at) && self.scheduler.parked(at).is_some(),
            Warmed::NoRoom => false,
        };
        self.drop_parked();
        if !is_kept && !is_pinned {
            tracing::warn!("a prompt was warmed and host memory has no room for it beside what is pinned");
            return true;
        }
        if !is_kept {
            let message = "the prefix was computed, but host memory has no room for it".to_owned();
            self.fail(id, GenerationError::Backend { message });
        }
        is_kept
    }

    /// Before the end: writes what finished sequences and host memory hold, as far as there is time and room.
    pub(super) fn flush(&mut self) {
        if self.disk.is_none() {
            return;
        }
        let ids: Vec<RequestId> = self.generations.keys().copied().collect();
        for id in ids {
            self.fail(id, GenerationError::Shutdown);
        }
        let began = Instant::now();
        loop {
            let nobody = self.scheduler.admit(self.clock_us(Instant::now()));
            debug_assert!(nobody.is_none(), "{nobody:?} is admitted at the end");
            self.use_tiers();
            if self.disk.is_none() || began.elapsed() >= MOST_FLUSH {
                return;
            }
            if !self.scheduler.is_writing() {
                match self.scheduler.park_last() {
                    Some(CacheOp::Park { seq, at, .. }) if self.park(seq, at) => continue,
                    _ => return,
                }
            }
            // A command that comes too late is dropped, and its stream ends.
            match self.mailbox.recv_timeout(MOST_FLUSH.saturating_sub(began.elapsed())) {
                Ok(Command::Disk(answer)) => self.disk_answered(answer),
                Ok(_) => {}
                Err(_) => {
                    tracing::info!("not all of the cache is on disk: there was no time for more");
                    return;
                }
            }
        }
    }
}
