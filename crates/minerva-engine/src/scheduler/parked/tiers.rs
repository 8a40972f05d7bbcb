//! Host memory as one of two tiers: what gives way, what is on disk as well, what is on its way from there, and what stays.
//!
//! What is on disk too gives way first, because it is not lost; then what is worth least ([`PromptCost::worth`]). What somebody goes
//! on from, what is being written or read, and what is pinned stays.

use super::{Entry, ParkId, Parked};
use crate::request::TokenId;
use crate::scheduler::common;
use crate::scheduler::disk::FileId;

/// What an entry is besides cells in host memory.
#[derive(Debug, Clone, Copy, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a reason of its own")]
pub(super) struct Tier {
    /// The file that holds the same.
    file: Option<FileId>,
    /// The worker has its bytes and said how many they are.
    is_saved: bool,
    /// Its bytes are being written.
    is_writing: bool,
    /// Its bytes are being read.
    is_arriving: bool,
    /// There was no room for it on disk since it was used last.
    pub(super) is_refused: bool,
    /// It was computed on purpose and is for everybody.
    pub(super) is_warm: bool,
    /// It never gives way.
    is_pinned: bool,
}

impl Entry {
    /// Whether requests of this namespace may have it.
    pub(super) fn is_for(&self, namespace: u64) -> bool {
        (self.namespace == namespace || self.tier.is_warm) && !self.tier.is_arriving
    }

    pub(super) fn may_go(&self) -> bool {
        let Tier { is_writing, is_arriving, is_pinned, .. } = self.tier;
        !(self.is_owned || is_writing || is_arriving || is_pinned)
    }
}

/// What is to be written next.
#[derive(Debug, Clone, Copy)]
pub(in crate::scheduler) struct Candidate {
    pub(in crate::scheduler) at: ParkId,
    pub(in crate::scheduler) worth: f64,
}

impl Parked {
    /// Makes room in host memory; `false` when too much of it has to stay, and then nothing gives way.
    pub(super) fn make_room(&mut self, n_bytes: u64) -> bool {
        let stays: u64 = self.entries.iter().filter(|entry| !entry.may_go()).map(|entry| entry.n_bytes).sum();
        if stays.saturating_add(n_bytes) > self.limit_bytes {
            return false;
        }
        while self.n_bytes + n_bytes > self.limit_bytes {
            let Some(least) = self.least() else { return false };
            self.forget(least);
        }
        true
    }

    fn least(&self) -> Option<ParkId> {
        let free = self.entries.iter().filter(|entry| entry.may_go());
        let order = |a: &&Entry, b: &&Entry| {
            // What is for everybody here is in its file for its own namespace only.
            let is_lost = |entry: &Entry| entry.tier.file.is_none() || entry.tier.is_warm;
            let lost = is_lost(a).cmp(&is_lost(b));
            lost.then(self.worth(a).total_cmp(&self.worth(b))).then(a.stamp.cmp(&b.stamp))
        };
        free.min_by(order).map(|entry| entry.id)
    }

    fn worth(&self, entry: &Entry) -> f64 {
        self.cost.worth(entry.tokens.len(), entry.n_bytes, self.clock - entry.stamp + 1)
    }

    fn at_mut(&mut self, at: ParkId) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.id == at)
    }

    /// The tokens and the namespace of an entry.
    pub(in crate::scheduler) fn entry(&self, at: ParkId) -> Option<(&[TokenId], u64)> {
        let entry = self.entries.iter().find(|entry| entry.id == at)?;
        Some((&entry.tokens, entry.namespace))
    }

    /// The bytes of an entry.
    pub(in crate::scheduler) fn entry_bytes(&self, at: ParkId) -> u64 {
        self.entries.iter().find(|entry| entry.id == at).map_or(0, |entry| entry.n_bytes)
    }

    /// The worker has its bytes, which are so many. Where that is more than was expected, others give way, or it does itself.
    pub(in crate::scheduler) fn saved(&mut self, at: ParkId, n_bytes: u64) {
        let Some(entry) = self.at_mut(at) else { return };
        let before = std::mem::replace(&mut entry.n_bytes, n_bytes);
        entry.tier.is_saved = true;
        self.n_bytes = self.n_bytes - before + n_bytes;
        if self.n_bytes > self.limit_bytes && !self.make_room(0) {
            self.forget(at);
        }
    }

    /// What is worth most of what is not on disk, may be written there, and has not been refused since it was last used.
    pub(in crate::scheduler) fn to_write(&self, namespaces: &[u64]) -> Option<Candidate> {
        let is_due = |entry: &&Entry| {
            let Tier { file, is_saved, is_arriving, is_refused, .. } = entry.tier;
            let is_free = !entry.is_owned && is_saved && !is_arriving && !is_refused;
            // What is of use only beside its cells would be of none after them.
            is_free && !self.is_part(entry) && file.is_none() && namespaces.contains(&entry.namespace)
        };
        let due = self.entries.iter().filter(is_due);
        let candidates = due.map(|entry| Candidate { at: entry.id, worth: self.worth(entry) });
        candidates.max_by(|a, b| a.worth.total_cmp(&b.worth).then(a.at.cmp(&b.at)))
    }

    pub(in crate::scheduler) fn writes(&mut self, at: ParkId) {
        if let Some(entry) = self.at_mut(at) {
            entry.tier.is_writing = true;
        }
    }

    /// Its writing is over; the file that has it now, or none.
    pub(in crate::scheduler) fn wrote(&mut self, at: ParkId, file: Option<FileId>) {
        if let Some(entry) = self.at_mut(at) {
            entry.tier.is_writing = false;
            entry.tier.is_refused = file.is_none();
            entry.tier.file = file;
        }
    }

    /// The file is gone.
    pub(in crate::scheduler) fn file_gone(&mut self, file: FileId) {
        for entry in self.entries.iter_mut().filter(|entry| entry.tier.file == Some(file)) {
            entry.tier.file = None;
        }
    }

    /// The file that holds what this does.
    pub(in crate::scheduler) fn file_of(&self, at: ParkId) -> Option<FileId> {
        self.entries.iter().find(|entry| entry.id == at)?.tier.file
    }

    /// Room for what is going to be read from a file.
    pub(in crate::scheduler) fn expect(
        &mut self,
        tokens: &[TokenId],
        namespace: u64,
        n_bytes: u64,
        file: FileId,
    ) -> Option<ParkId> {
        if !self.works || !self.make_room(n_bytes) {
            return None;
        }
        self.clock += 1;
        let (id, tokens) = (self.clock, tokens.to_vec());
        let tier = Tier { file: Some(file), is_arriving: true, ..Tier::default() };
        let (is_owned, is_checkpoint, stamp) = (true, false, id);
        self.entries.push(Entry { id, tokens, namespace, n_bytes, is_owned, is_checkpoint, stamp, tier });
        self.n_bytes += n_bytes;
        Some(id)
    }

    /// It was read.
    pub(in crate::scheduler) fn arrived(&mut self, at: ParkId) {
        if let Some(entry) = self.at_mut(at) {
            entry.tier.is_arriving = false;
            entry.tier.is_saved = true;
        }
    }

    /// Nobody waits for it any more.
    pub(in crate::scheduler) fn disown(&mut self, at: ParkId) {
        if let Some(entry) = self.at_mut(at) {
            entry.is_owned = false;
        }
    }

    /// The entry that has exactly these tokens.
    pub(in crate::scheduler) fn same(&self, tokens: &[TokenId], namespace: u64) -> Option<ParkId> {
        let same = |entry: &&Entry| entry.is_for(namespace) && !self.is_part(entry) && entry.tokens == tokens;
        self.entries.iter().find(same).map(|entry| entry.id)
    }

    /// Room for what is to be there for everybody, whatever it costs to copy.
    pub(in crate::scheduler) fn put_warm(&mut self, tokens: &[TokenId], namespace: u64) -> Option<ParkId> {
        self.put(tokens, namespace, false)
    }

    /// It is for everybody, and may be there for good.
    pub(in crate::scheduler) fn warm(&mut self, at: ParkId, is_pinned: bool) {
        if let Some(entry) = self.at_mut(at) {
            entry.tier.is_warm = true;
            entry.tier.is_pinned |= is_pinned;
        }
    }

    /// Whether an entry has more than a beginning of `tokens`: then that is worth nothing beside it.
    pub(in crate::scheduler) fn covers(one: &[TokenId], tokens: &[TokenId]) -> bool {
        common(one, tokens) == tokens.len()
    }

    /// Time to compute a prompt.
    pub(in crate::scheduler) fn cost(&self) -> crate::scheduler::budget::PromptCost {
        self.cost
    }
}
