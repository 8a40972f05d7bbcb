//! A disk that is slow, or fails.

use std::io;
use std::thread;
use std::time::Duration;

use minerva_llama::SavedState;

use crate::disk::{Damage, DiskCache, Opened, StateKey, Store, Unread};
use crate::request::TokenId;
use crate::scheduler::FileId;

/// A disk tier for the simulator, in a real folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SimDisk {
    /// The folder and its limit.
    pub cache: DiskCache,
    /// This write and all after it fail, counted from 1: the disk is full.
    pub fails_at_write: Option<u64>,
    /// Every so many reads one fails, and its file is gone.
    pub fails_every_reads: Option<u64>,
    /// Every so many reads one cannot be done then.
    pub busy_every_reads: Option<u64>,
    /// How long reading and writing take besides, in microseconds.
    pub slow_us: u64,
}

impl SimDisk {
    /// Opens the folder for a simulated model of this name.
    pub(super) fn open(&self, model_name: &str) -> Option<Opened> {
        let key = StateKey(*blake3::hash(model_name.as_bytes()).as_bytes());
        let opened = self.cache.open(Some(key))?;
        let store = Faulty { store: opened.store, disk: self.clone(), n_writes: 0, n_reads: 0 };
        Some(Opened { store: Box::new(store), ..opened })
    }
}

struct Faulty {
    store: Box<dyn Store>,
    disk: SimDisk,
    n_writes: u64,
    n_reads: u64,
}

impl Store for Faulty {
    fn write(&mut self, file: FileId, namespace: u64, tokens: &[TokenId], state: &[u8]) -> io::Result<bool> {
        thread::sleep(Duration::from_micros(self.disk.slow_us));
        self.n_writes += 1;
        if self.disk.fails_at_write.is_some_and(|first| self.n_writes >= first) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "a simulated fault"));
        }
        self.store.write(file, namespace, tokens, state)
    }

    fn read(&mut self, file: FileId) -> Result<SavedState, Unread> {
        thread::sleep(Duration::from_micros(self.disk.slow_us));
        self.n_reads += 1;
        let is_due = |every: Option<u64>| every.is_some_and(|every| self.n_reads.is_multiple_of(every.max(1)));
        let damage = Damage::Unreadable(io::ErrorKind::Other);
        if is_due(self.disk.fails_every_reads) {
            self.store.remove(file);
            return Err(Unread { damage, is_gone: true });
        }
        if is_due(self.disk.busy_every_reads) {
            return Err(Unread { damage, is_gone: false });
        }
        self.store.read(file)
    }

    fn remove(&mut self, file: FileId) {
        self.store.remove(file);
    }

    fn size(&self) -> (u64, usize) {
        self.store.size()
    }
}
