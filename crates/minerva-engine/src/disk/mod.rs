//! The disk tier of the prefix cache: states of sequences in files, on a thread of their own.
//!
//! What is written, read and removed is the scheduler's decision ([`crate::scheduler`], `disk.rs`); the engine thread hands it over as
//! [`Job`]s and gets [`Answer`]s in its mailbox, and never waits for a disk. Start with [`DiskTier::start`]; `folder.rs` has the
//! files, `format.rs` what is in one, `key.rs` which files an engine may read.

mod folder;
mod format;
mod key;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use minerva_llama::SavedState;
use serde::{Deserialize, Serialize};

pub(crate) use self::folder::{Folder, FolderError};
pub(crate) use self::format::{Damage, StateKey, file_bytes};
pub(crate) use self::key::of_model;
use crate::request::TokenId;
use crate::scheduler::{FileId, OnDisk, ParkId, Wrote};
use crate::status::DiskCacheStats;

/// Files in a folder; a search through all their tokens stays below a step.
pub(crate) const MOST_FILES: usize = 4096;

/// Where states of sequences are kept on disk, and how much of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCache {
    /// The folder; made when it is not there. `None`: `kv` in Minerva's cache folder.
    pub dir: Option<PathBuf>,
    /// The most bytes of all files.
    pub limit_bytes: u64,
    /// With [`CacheIsolation::Key`](crate::CacheIsolation): the clients whose prompts may be kept, by their number in requests, and
    /// what they are known by on disk in later runs as well. Others are kept in memory only.
    pub clients: Vec<(u64, ClientSecret)>,
}

/// What a client is known by in later runs: a digest of something that only this client has. It is never written to disk.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientSecret([u8; 32]);

impl ClientSecret {
    /// The secret of whoever has this API key.
    pub fn of_api_key(key: &[u8]) -> Self {
        Self(blake3::derive_key("minerva 2026 disk cache, client by API key", key))
    }

    /// Of all who are nobody in particular.
    fn of_nobody() -> Self {
        Self(blake3::derive_key("minerva 2026 disk cache, client by API key", b""))
    }
}

/// It stays out of logs.
impl std::fmt::Debug for ClientSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientSecret")
    }
}

/// Files by number; the folder, or one with faults.
pub(crate) trait Store: Send {
    /// Writes a file. `false` when there is no room for it.
    ///
    /// # Errors
    /// Nothing can be written.
    fn write(&mut self, file: FileId, namespace: u64, tokens: &[TokenId], state: &[u8]) -> io::Result<bool>;

    /// Reads a state back.
    ///
    /// # Errors
    /// What is wrong with the file, and whether it is gone.
    fn read(&mut self, file: FileId) -> Result<SavedState, Unread>;

    fn remove(&mut self, file: FileId);

    /// Bytes of all files, and how many there are.
    fn size(&self) -> (u64, usize);
}

/// A file that was not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unread {
    pub(crate) damage: Damage,
    /// Nobody will read it: it was removed.
    pub(crate) is_gone: bool,
}

/// What the thread has to do.
#[derive(Debug)]
pub(crate) enum Job {
    Write { file: FileId, namespace: u64, tokens: Vec<TokenId>, state: Arc<SavedState> },
    Read { file: FileId, at: ParkId },
    Remove { file: FileId },
}

/// What became of it.
#[derive(Debug)]
pub(crate) enum Answer {
    Wrote {
        file: FileId,
        outcome: Wrote,
    },
    Read {
        at: ParkId,
        state: Result<SavedState, Unread>,
        took_us: u64,
    },
    /// The disk cannot be written any more; nothing else will be answered.
    Off,
}

/// What the thread counts.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    limit_bytes: AtomicU64,
    n_bytes: AtomicU64,
    n_files: AtomicU64,
    written: AtomicU64,
    read: AtomicU64,
    not_ours: AtomicU64,
    version: AtomicU64,
    too_large: AtomicU64,
    length: AtomicU64,
    checksum: AtomicU64,
    unreadable: AtomicU64,
    removed: AtomicU64,
    switched_off: AtomicU64,
}

impl Counters {
    pub(crate) fn stats(&self) -> DiskCacheStats {
        DiskCacheStats {
            bytes: self.n_bytes.load(Relaxed),
            limit_bytes: self.limit_bytes.load(Relaxed),
            files: self.n_files.load(Relaxed),
            written_total: self.written.load(Relaxed),
            hits_total: self.read.load(Relaxed),
            not_ours_total: self.not_ours.load(Relaxed),
            version_total: self.version.load(Relaxed),
            too_large_total: self.too_large.load(Relaxed),
            length_total: self.length.load(Relaxed),
            checksum_total: self.checksum.load(Relaxed),
            unreadable_total: self.unreadable.load(Relaxed),
            removed_total: self.removed.load(Relaxed),
            switched_off: self.switched_off.load(Relaxed) > 0,
        }
    }

    fn count_damage(&self, damage: Damage) {
        let counter = match damage {
            Damage::NotOurs => &self.not_ours,
            Damage::Version => &self.version,
            Damage::TooLarge => &self.too_large,
            Damage::Length => &self.length,
            Damage::Checksum => &self.checksum,
            Damage::Unreadable(_) | Damage::NoMemory => &self.unreadable,
        };
        counter.fetch_add(1, Relaxed);
    }

    fn publish(&self, store: &dyn Store) {
        let (n_bytes, n_files) = store.size();
        self.n_bytes.store(n_bytes, Relaxed);
        self.n_files.store(n_files as u64, Relaxed);
    }
}

/// An open folder and what is in it.
pub(crate) struct Opened {
    pub(crate) store: Box<dyn Store>,
    pub(crate) found: Vec<OnDisk>,
    pub(crate) namespaces: Vec<u64>,
    pub(crate) counters: Arc<Counters>,
}

impl DiskCache {
    /// Opens the folder for an engine whose states have this key. `None`, and one line in the log, when that is not possible: then
    /// the engine does without.
    pub(crate) fn open(&self, key: Option<StateKey>) -> Option<Opened> {
        let dir = self.dir.clone().or_else(|| Some(crate::cache::cache_dir()?.join("kv")));
        let (Some(dir), Some(key)) = (dir, key) else {
            tracing::warn!("there is no disk cache: no folder for it is known, or the model file cannot be read");
            return None;
        };
        let began = Instant::now();
        let mut clients: Vec<_> = self.clients.iter().map(|(number, secret)| (*number, secret.0)).collect();
        clients.push((0, ClientSecret::of_nobody().0));
        match Folder::open(&dir, self.limit_bytes, key, &clients) {
            Ok((folder, (found, dropped))) => {
                let counters = Arc::new(Counters::default());
                counters.limit_bytes.store(self.limit_bytes, Relaxed);
                for damage in dropped {
                    counters.count_damage(damage);
                }
                counters.publish(&folder);
                let (n_bytes, n_files) = folder.size();
                let (prompts, ms) = (found.len(), began.elapsed().as_millis() as u64);
                tracing::info!(prompts, files = n_files, bytes = n_bytes, ms, "disk cache {}", dir.display());
                let namespaces = clients.iter().map(|(namespace, _)| *namespace).collect();
                Some(Opened { store: Box::new(folder), found, namespaces, counters })
            }
            Err(problem) => {
                warn_of(&dir, &problem);
                None
            }
        }
    }
}

fn warn_of(dir: &Path, problem: &FolderError) {
    let dir = dir.display();
    match problem {
        FolderError::Locked => tracing::warn!(
            "there is no disk cache: another server uses {dir}; give this one a folder of its own with `--cache-dir`"
        ),
        problem => tracing::warn!("there is no disk cache: {dir} cannot be used: {problem}"),
    }
}

/// How long the end of an engine waits for jobs that nobody waits for: removals, and what a disk that hangs has not done.
const LAST_JOBS: Duration = Duration::from_secs(1);

/// The thread, from the engine thread's side. Dropping it ends the thread once it has done all its jobs, which nobody waits for when they
/// take more than [`LAST_JOBS`]: a disk may hang for good.
#[derive(Debug)]
pub(crate) struct DiskTier {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// Says nothing, and is closed when the thread ends.
    end: Receiver<()>,
}

impl DiskTier {
    /// Starts the thread; `answer` hands its answers to the engine thread and says whether there still is one.
    pub(crate) fn start(
        store: Box<dyn Store>,
        counters: Arc<Counters>,
        answer: impl Fn(Answer) -> bool + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, inbox) = mpsc::channel();
        let (alive, end) = mpsc::channel();
        let thread = thread::Builder::new().name("minerva-disk".into()).spawn(move || {
            let mut off = OffAtPanic { answer: &answer, is_over: false };
            run(store, &counters, &inbox, &answer);
            off.is_over = true;
            drop(alive);
        })?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), end })
    }

    /// Hands over a job. Where the thread has ended it is lost, and an answer has said so.
    pub(crate) fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job);
        }
    }
}

/// Tells the engine thread that nothing more comes, should the disk's thread die: whoever waits for a file goes on without it.
struct OffAtPanic<'a, F: Fn(Answer) -> bool> {
    answer: &'a F,
    is_over: bool,
}

impl<F: Fn(Answer) -> bool> Drop for OffAtPanic<'_, F> {
    fn drop(&mut self) {
        if !self.is_over {
            (self.answer)(Answer::Off);
        }
    }
}

impl Drop for DiskTier {
    fn drop(&mut self) {
        self.jobs = None;
        let has_ended = self.end.recv_timeout(LAST_JOBS) == Err(RecvTimeoutError::Disconnected);
        match self.thread.take() {
            Some(thread) if has_ended => drop(thread.join()),
            _ => tracing::warn!("the disk of the cache does not answer: what it was to do is left undone"),
        }
    }
}

fn run(mut store: Box<dyn Store>, counters: &Counters, inbox: &Receiver<Job>, answer: &dyn Fn(Answer) -> bool) {
    while let Ok(job) = inbox.recv() {
        let said = match job {
            Job::Write { file, namespace, tokens, state } => {
                let wrote = store.write(file, namespace, &tokens, &state);
                drop(state); // the engine may count it as free when it hears
                match wrote {
                    Ok(is_there) => {
                        counters.written.fetch_add(u64::from(is_there), Relaxed);
                        Some(Answer::Wrote { file, outcome: if is_there { Wrote::Done } else { Wrote::NoRoom } })
                    }
                    Err(problem) => {
                        tracing::warn!("the disk cache is switched off: it cannot be written: {problem}");
                        counters.switched_off.store(1, Relaxed);
                        counters.publish(&*store);
                        answer(Answer::Off);
                        return;
                    }
                }
            }
            Job::Read { file, at } => {
                let began = Instant::now();
                let state = store.read(file);
                match &state {
                    Ok(_) => drop(counters.read.fetch_add(1, Relaxed)),
                    Err(unread) if unread.is_gone => counters.count_damage(unread.damage),
                    Err(_) => {}
                }
                Some(Answer::Read { at, state, took_us: began.elapsed().as_micros() as u64 })
            }
            Job::Remove { file } => {
                store.remove(file);
                counters.removed.fetch_add(1, Relaxed);
                None
            }
        };
        counters.publish(&*store);
        if said.is_some_and(|said| !answer(said)) {
            return;
        }
    }
}
