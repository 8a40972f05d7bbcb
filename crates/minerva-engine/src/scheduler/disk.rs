//! The tier below host memory: which prompts lie in files, which of them are fetched for whom, what is written and what is removed.
//!
//! Everything in host memory is written as soon as the disk has time, most worth first, so that what gives way there is on disk
//! already and a server that ends loses little. A prompt of which more lies in a file than anywhere else waits for it, for as long as
//! reading is to take and never as long as computing would; others pass it meanwhile. Nothing here touches a file: the worker passes
//! [`DiskOp`]s on to a thread of their own and comes back with what became of them.
//!
//! # Invariants
//! - Files, those being written included, never take more than the limit: what has to go is removed before the next is written.
//! - One file is written at a time. What is written or read keeps its place in host memory until that is over.
//! - Who waits for a file waits until a fixed time: a disk that hangs holds up nobody for good.

use serde::{Deserialize, Serialize};

use super::budget::PromptCost;
use super::common;
use super::parked::{ParkId, Parked};
use super::rest::Rest;
use super::seats::Seats;
use super::{RequestId, Scheduler};
use crate::backend::BackendLimits;
use crate::disk::{MOST_FILES, file_bytes};
use crate::request::TokenId;

/// A file's name between the scheduler and the worker.
pub type FileId = u64;

/// Files that are read for requests at once.
const MOST_READS: usize = 4;

/// Those and others that were read and whose requests wait for a seat: they keep their room in host memory, of which half is for them.
const MOST_CLAIMED: usize = 64;

/// Nothing is read for so long after a file could not be, and never for longer than that.
const FIRST_REST_US: u64 = 5_000_000;
const LONGEST_REST_US: u64 = 320_000_000;

/// What disks are taken to read until one was measured, in bytes per microsecond: half of what SATA can do.
const READ_BYTES_PER_US: f64 = 250.0;

/// What a new measurement of it counts.
const LEARN: f64 = 0.3;

/// Requests wait for a file so many times as long as reading should take, and this.
const PATIENCE: f64 = 4.0;
const PATIENCE_US: f64 = 250_000.0;

/// And never longer.
const MOST_PATIENCE_US: f64 = 10_000_000.0;

/// What the disk's thread has to do, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskOp {
    /// A copy in host memory becomes a file. Answered by [`Scheduler::disk_wrote`].
    Write {
        /// The copy.
        at: ParkId,
        /// The file.
        file: FileId,
    },
    /// A file becomes a copy in host memory. Answered by [`Scheduler::disk_read`].
    Read {
        /// The file.
        file: FileId,
        /// The copy.
        at: ParkId,
    },
    /// A file is removed.
    Remove {
        /// The file.
        file: FileId,
    },
}

/// A file that was there when the engine began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnDisk {
    /// Its name.
    pub file: FileId,
    /// What it holds.
    pub tokens: Vec<TokenId>,
    /// For whom.
    pub namespace: u64,
    /// Its size.
    pub n_bytes: u64,
}

/// What became of a file that was to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fetched {
    /// It is in host memory.
    Done,
    /// It is damaged, and was removed.
    Gone,
    /// It cannot be read now.
    NotNow,
}

/// What became of a file that was to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wrote {
    /// It is there.
    Done,
    /// There was no room for it.
    NoRoom,
}

#[derive(Debug)]
struct File {
    id: FileId,
    tokens: Vec<TokenId>,
    namespace: u64,
    n_bytes: u64,
    stamp: u64,
    is_whole: bool,
    is_read: bool,
}

/// Somebody waits for a file.
#[derive(Debug)]
struct Hold {
    request: RequestId,
    at: ParkId,
    /// Not any longer than this.
    until_us: u64,
    is_ready: bool,
}

/// All files.
#[derive(Debug)]
pub(super) struct Disk {
    files: Vec<File>,
    n_bytes: u64,
    limit_bytes: u64,
    clock: u64,
    last_id: FileId,
    /// Namespaces that have a name which lasts.
    namespaces: Vec<u64>,
    holds: Vec<Hold>,
    reads: Vec<(FileId, ParkId)>,
    writing: Option<(FileId, ParkId)>,
    ops: Vec<DiskOp>,
    read_bytes_per_us: f64,
    /// Something could not be read since this was looked at.
    has_failed: bool,
    /// After such a failure, in microseconds.
    reading: Rest,
    works: bool,
}

impl Disk {
    pub(super) fn new(limit_bytes: u64) -> Self {
        Self {
            files: Vec::new(),
            n_bytes: 0,
            limit_bytes,
            clock: 0,
            last_id: 0,
            namespaces: Vec::new(),
            holds: Vec::new(),
            reads: Vec::new(),
            writing: None,
            ops: Vec::new(),
            read_bytes_per_us: READ_BYTES_PER_US,
            has_failed: false,
            reading: Rest::new(FIRST_REST_US, LONGEST_REST_US),
            works: false,
        }
    }

    /// Whether a request still waits for a file.
    pub(super) fn holds(&self, request: RequestId, now_us: u64) -> bool {
        self.holds.iter().any(|hold| hold.request == request && !hold.is_ready && hold.until_us > now_us)
    }

    /// Until when it does at most.
    pub(super) fn held_until_us(&self, request: RequestId) -> Option<u64> {
        self.holds.iter().find(|hold| hold.request == request && !hold.is_ready).map(|hold| hold.until_us)
    }

    /// The file that has most of a prompt.
    fn best(&self, prompt: &[TokenId], namespace: u64, limits: &BackendLimits) -> Option<(usize, usize)> {
        let of_it = |file: &File| common(&file.tokens, prompt).min(prompt.len() - 1);
        let files = self.files.iter().enumerate().filter(|(_, file)| file.is_whole && file.namespace == namespace);
        files
            .map(|(i, file)| (of_it(file), i))
            .filter(|&(n_shared, i)| {
                let n_held = self.files[i].tokens.len();
                n_shared == n_held || (limits.keeps_beginnings && n_shared >= limits.least_of_copy(n_held))
            })
            .max_by_key(|&(n_shared, i)| (n_shared, std::cmp::Reverse(self.files[i].n_bytes), self.files[i].id))
            .map(|(n_shared, i)| (i, n_shared))
    }

    fn read_us(&self, n_bytes: u64) -> f64 {
        n_bytes as f64 / self.read_bytes_per_us
    }

    fn writing_bytes(&self) -> u64 {
        let Some((id, _)) = self.writing else { return 0 };
        self.files.iter().find(|file| file.id == id).map_or(0, |file| file.n_bytes)
    }

    fn worth(&self, file: &File, cost: PromptCost) -> f64 {
        cost.worth(file.tokens.len(), file.n_bytes, self.clock - file.stamp + 1)
    }

    fn remove(&mut self, at: usize) -> FileId {
        let file = self.files.swap_remove(at);
        self.n_bytes -= file.n_bytes;
        file.id
    }

    /// Removes what is worth less than `worth` until `n_bytes` fit; `None`, and nothing removed, when that is not enough.
    fn make_room(&mut self, n_bytes: u64, worth: f64, cost: PromptCost) -> Option<Vec<FileId>> {
        let fits = |n_held: u64, n_files: usize| n_held + n_bytes <= self.limit_bytes && n_files < MOST_FILES;
        let (mut n_held, mut n_files) = (self.n_bytes, self.files.len());
        let mut gone = Vec::new();
        if !fits(n_held, n_files) {
            let less = self.files.iter().filter(|file| file.is_whole && !file.is_read);
            let mut less: Vec<_> = less.map(|file| (self.worth(file, cost), file.stamp, file)).collect();
            less.retain(|(own, ..)| *own < worth);
            less.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            for (_, _, file) in less {
                if fits(n_held, n_files) {
                    break;
                }
                (n_held, n_files) = (n_held - file.n_bytes, n_files - 1);
                gone.push(file.id);
            }
        }
        if !fits(n_held, n_files) {
            return None;
        }
        for &id in &gone {
            self.remove_file(id);
        }
        Some(gone)
    }

    /// A file is removed, by its name.
    fn remove_file(&mut self, id: FileId) {
        if let Some(at) = self.files.iter().position(|file| file.id == id) {
            self.remove(at);
            self.ops.push(DiskOp::Remove { file: id });
        }
    }

    fn touch(&mut self, id: FileId) {
        self.clock += 1;
        let clock = self.clock;
        if let Some(file) = self.files.iter_mut().find(|file| file.id == id) {
            file.stamp = clock;
        }
    }

    /// Copies in host memory that are read for requests, or were and wait for them: these stay.
    fn claimed(&self) -> Vec<ParkId> {
        let held = self.holds.iter().map(|hold| hold.at);
        let mut claimed: Vec<ParkId> = self.reads.iter().map(|(_, at)| *at).chain(held).collect();
        claimed.sort_unstable();
        claimed.dedup();
        claimed
    }

    /// Whether files are read now, and not after a failure that may pass. Reads that fail together are one failure.
    fn may_read(&mut self, now_us: u64) -> bool {
        if std::mem::take(&mut self.has_failed) {
            self.reading.fail(now_us);
        }
        self.reading.is_over(now_us)
    }

    /// Nobody waits for `at` but whoever is in the list still.
    fn is_wanted(&self, at: ParkId) -> bool {
        self.holds.iter().any(|hold| hold.at == at)
    }
}

impl Seats {
    /// The most tokens of a prompt that any seat or host memory has.
    fn n_at_hand(&self, prompt: &[TokenId], namespace: u64) -> usize {
        self.n_seated(prompt, namespace).max(self.parked.n_held(prompt, namespace))
    }
}

impl Scheduler {
    /// There is a disk: the files in it, the one unused for longest first, and the namespaces that may be written there.
    pub fn disk_found(&mut self, files: Vec<OnDisk>, namespaces: Vec<u64>) {
        let disk = &mut self.disk;
        disk.works = disk.limit_bytes > 0;
        disk.namespaces = namespaces;
        for OnDisk { file, tokens, namespace, n_bytes } in files {
            disk.clock += 1;
            disk.last_id = disk.last_id.max(file);
            disk.n_bytes = disk.n_bytes.saturating_add(n_bytes);
            let stamp = disk.clock;
            disk.files.push(File { id: file, tokens, namespace, n_bytes, stamp, is_whole: true, is_read: false });
        }
    }

    /// What the disk's thread has to do, in order.
    pub fn disk_ops(&mut self) -> Vec<DiskOp> {
        std::mem::take(&mut self.disk.ops)
    }

    /// The bytes of the files, and how many files there are.
    pub fn on_disk(&self) -> (u64, usize) {
        (self.disk.n_bytes, self.disk.files.len())
    }

    /// The tokens and the namespace of a copy in host memory.
    pub fn parked(&self, at: ParkId) -> Option<(&[TokenId], u64)> {
        self.seats.parked.entry(at)
    }

    /// A copy in host memory takes so many bytes.
    pub fn park_saved(&mut self, at: ParkId, n_bytes: u64) {
        self.seats.parked.saved(at, n_bytes);
    }

    /// Whether a file is being written.
    pub fn is_writing(&self) -> bool {
        self.disk.writing.is_some()
    }

    /// When nothing can be done but to wait for files: until when at most.
    pub fn waits_until_us(&self, now_us: u64) -> Option<u64> {
        if self.seats.any_busy() || !self.disk.ops.is_empty() {
            return None;
        }
        let held = |id| self.disk.held_until_us(id).filter(|&until| until > now_us);
        let held = self.queue.ids().map(held).collect::<Option<Vec<_>>>()?;
        held.into_iter().chain(self.queue.next_deadline_us(now_us)).min()
    }

    /// Before requests are admitted: fetches files for those that wait, and writes what is in host memory only.
    pub(super) fn use_disk(&mut self, now_us: u64) {
        if self.disk.works {
            if self.disk.may_read(now_us) {
                self.fetch(now_us);
            }
            self.write_next();
        }
    }

    fn fetch(&mut self, now_us: u64) {
        let limits = &self.limits;
        let (disk, seats) = (&mut self.disk, &mut self.seats);
        for (job, looked) in self.queue.unlooked() {
            let claimed = disk.claimed();
            if disk.reads.len() >= MOST_READS || claimed.len() >= MOST_CLAIMED {
                return; // they are looked for later, should they still wait
            }
            let (prompt, namespace) = (&job.prompt, job.terms.namespace);
            let Some((i, n_shared)) = disk.best(prompt, namespace, limits) else {
                *looked = true;
                continue;
            };
            let claimed_bytes: u64 = claimed.iter().map(|&at| seats.parked.entry_bytes(at)).sum();
            let is_half = claimed_bytes + state_bytes(&disk.files[i]) > seats.parked.limit_bytes() / 2;
            if is_half && !claimed.is_empty() {
                return;
            }
            *looked = true;
            let n_new = n_shared.saturating_sub(seats.n_at_hand(prompt, namespace));
            if n_new < seats.parked.least_tokens() {
                continue;
            }
            // Jobs are done in order: first what is being written, at about the same speed.
            let read_us = disk.read_us(disk.files[i].n_bytes + disk.writing_bytes());
            let compute_us = seats.parked.cost().of(n_new);
            if compute_us.is_some_and(|compute_us| read_us > compute_us) {
                continue;
            }
            let patience_us = (read_us * PATIENCE + PATIENCE_US).min(MOST_PATIENCE_US);
            // Who waited in vain has waited no longer than computing takes.
            let patience_us = patience_us.min(compute_us.map_or(MOST_PATIENCE_US, |us| us.max(read_us * 2.0)));
            let file = &mut disk.files[i];
            let on_its_way = disk.reads.iter().find(|(id, _)| *id == file.id).map(|(_, at)| *at);
            let at = on_its_way.or_else(|| {
                let at = seats.parked.expect(&file.tokens, namespace, state_bytes(file), file.id)?;
                file.is_read = true;
                disk.reads.push((file.id, at));
                disk.ops.push(DiskOp::Read { file: file.id, at });
                Some(at)
            });
            if let Some(at) = at {
                let until_us = now_us.saturating_add(patience_us as u64);
                disk.holds.push(Hold { request: job.id, at, until_us, is_ready: false });
            }
        }
    }

    /// A request does not wait any more: it is seated, or gone.
    pub(super) fn let_go(&mut self, request: RequestId) {
        let Some(i) = self.disk.holds.iter().position(|hold| hold.request == request) else { return };
        let at = self.disk.holds.swap_remove(i).at;
        let is_on_its_way = self.disk.reads.iter().any(|(_, own)| *own == at);
        if !is_on_its_way && !self.disk.is_wanted(at) {
            self.seats.parked.disown(at);
        }
    }

    /// A file was read in so many microseconds, or could not be. `false` when nobody has a place for it any more.
    pub fn disk_read(&mut self, at: ParkId, outcome: Fetched, took_us: u64) -> bool {
        let Some(i) = self.disk.reads.iter().position(|(_, own)| *own == at) else { return false };
        let (id, _) = self.disk.reads.swap_remove(i);
        for hold in self.disk.holds.iter_mut().filter(|hold| hold.at == at) {
            hold.is_ready = true;
        }
        let Some(place) = self.disk.files.iter().position(|file| file.id == id) else { return false };
        self.disk.files[place].is_read = false;
        if outcome != Fetched::Done {
            self.disk.holds.retain(|hold| hold.at != at);
            self.seats.parked.forget(at);
        }
        match outcome {
            Fetched::Done => self.disk.reading.forget(),
            Fetched::Gone => {
                self.disk.remove(place);
                self.seats.parked.file_gone(id);
                return true;
            }
            Fetched::NotNow => {
                self.disk.has_failed = true;
                return true;
            }
        }
        let measured = self.disk.files[place].n_bytes as f64 / took_us.max(1) as f64;
        self.disk.read_bytes_per_us += LEARN * (measured - self.disk.read_bytes_per_us);
        self.disk.touch(id);
        self.seats.parked.arrived(at);
        if !self.disk.is_wanted(at) {
            self.seats.parked.disown(at);
        }
        true
    }

    fn write_next(&mut self) {
        while self.disk.writing.is_none() {
            let Some(candidate) = self.seats.parked.to_write(&self.disk.namespaces) else { return };
            self.write(candidate.at, candidate.worth);
        }
    }

    /// Writes an entry, or finds that it is there, or that it is not worth what would have to go.
    fn write(&mut self, at: ParkId, worth: f64) {
        let (parked, disk) = (&mut self.seats.parked, &mut self.disk);
        let cost = parked.cost();
        let n_state_bytes = parked.entry_bytes(at);
        let Some((tokens, namespace)) = parked.entry(at) else { return };
        let n_bytes = file_bytes(tokens.len(), n_state_bytes);
        let same = disk.files.iter().find(|file| {
            let has_it = self.limits.copies_keep_beginnings() && Parked::covers(&file.tokens, tokens);
            file.is_whole && file.namespace == namespace && (has_it || file.tokens == tokens)
        });
        if let Some(file) = same.map(|file| file.id) {
            return parked.wrote(at, Some(file));
        }
        let pays = cost.of(tokens.len()).is_none_or(|us| disk.read_us(n_bytes) < us);
        let Some(gone) = (pays && n_bytes <= disk.limit_bytes).then(|| disk.make_room(n_bytes, worth, cost)).flatten()
        else {
            return parked.wrote(at, None);
        };
        disk.clock += 1;
        disk.last_id += 1;
        let (id, stamp, tokens) = (disk.last_id, disk.clock, tokens.to_vec());
        disk.files.push(File { id, tokens, namespace, n_bytes, stamp, is_whole: false, is_read: false });
        disk.n_bytes += n_bytes;
        disk.writing = Some((id, at));
        disk.ops.push(DiskOp::Write { at, file: id });
        parked.writes(at);
        for file in gone {
            parked.file_gone(file);
        }
    }

    /// What became of a file that was to be written.
    pub fn disk_wrote(&mut self, file: FileId, outcome: Wrote) {
        let Some((id, at)) = self.disk.writing.filter(|(id, _)| *id == file) else { return };
        self.disk.writing = None;
        let Some(place) = self.disk.files.iter().position(|file| file.id == id) else { return };
        if outcome == Wrote::NoRoom {
            self.disk.remove(place);
            return self.seats.parked.wrote(at, None);
        }
        self.disk.files[place].is_whole = true;
        self.seats.parked.wrote(at, Some(id));
        if !self.limits.copies_keep_beginnings() {
            return;
        }
        // What it begins with is there twice now.
        let File { tokens, namespace, .. } = &self.disk.files[place];
        let is_covered = |file: &&File| {
            let is_free = file.id != id && file.is_whole && !file.is_read;
            is_free && file.namespace == *namespace && Parked::covers(tokens, &file.tokens)
        };
        let covered: Vec<FileId> = self.disk.files.iter().filter(is_covered).map(|file| file.id).collect();
        for file in covered {
            self.disk.remove_file(file);
            self.seats.parked.file_gone(file);
        }
    }

    /// The disk cannot be used any more: nobody waits for it, and nothing is written.
    pub fn disk_off(&mut self) {
        let limit_bytes = self.disk.limit_bytes;
        let off = std::mem::replace(&mut self.disk, Disk::new(limit_bytes));
        for (_, at) in off.reads {
            self.seats.parked.forget(at);
        }
        for hold in off.holds {
            self.seats.parked.disown(hold.at);
        }
        if let Some((_, at)) = off.writing {
            self.seats.parked.wrote(at, None);
        }
        for file in off.files {
            self.seats.parked.file_gone(file.id);
        }
    }

    /// A copy in host memory was used, so its file was too.
    pub(super) fn touch_file(&mut self, at: ParkId) {
        if let Some(file) = self.seats.parked.file_of(at) {
            self.disk.touch(file);
        }
    }
}

fn state_bytes(file: &File) -> u64 {
    file.n_bytes.saturating_sub(file_bytes(file.tokens.len(), 0))
}
