//! Cells that were copied out to host memory: of requests that had to give their seat away, and of finished ones whose seat was
//! needed. Only their tokens and sizes are known here; the bytes are the worker's.

mod checkpoints;
mod keeping;
mod tiers;

use std::collections::BTreeMap;

pub(super) use checkpoints::Reach;
use serde::{Deserialize, Serialize};
use tiers::Tier;

use super::budget::PromptCost;
use super::common;
use super::job::Terms;
use crate::backend::BackendLimits;
use crate::request::TokenId;

/// What was copied out together.
pub type ParkId = u64;

/// Bytes per microsecond, out and in again: a copy of 4 GB/s each way, which DDR4 and PCIe 3 can both do.
const COPIED_BYTES_PER_US: u64 = 2_000;

/// Steps wait for a copy. Beside streams nobody copies for longer than this what nobody may ever ask for again.
const LONGEST_PAUSE_US: u64 = 10_000;

/// Cells in host memory.
#[derive(Debug)]
struct Entry {
    id: ParkId,
    tokens: Vec<TokenId>,
    namespace: u64,
    n_bytes: u64,
    /// Somebody goes on from there.
    is_owned: bool,
    /// What a sequence held at an earlier length, or the part of it that does not stay in its cells.
    is_checkpoint: bool,
    stamp: u64,
    tier: Tier,
}

/// A beginning of a prompt in host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Found {
    pub(super) id: ParkId,
    /// Tokens of the prompt that can be had from there.
    pub(super) n_shared: usize,
    /// Tokens that come along.
    pub(super) n_tokens: usize,
    /// The checkpoint that this takes, where they cannot be had by a cut.
    pub(super) rewind: Option<ParkId>,
    /// It was put here on purpose, to be used however short it is.
    pub(super) is_warm: bool,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Parked {
    entries: Vec<Entry>,
    /// On which terms that ran which left them.
    left_by: BTreeMap<ParkId, Terms>,
    n_bytes: u64,
    limit_bytes: u64,
    limits: BackendLimits,
    clock: u64,
    /// What the worker has not let go of yet.
    dropped: Vec<ParkId>,
    /// Nothing has failed yet.
    works: bool,
    /// Time to compute a prompt.
    cost: PromptCost,
}

impl Parked {
    pub(super) fn new(limits: BackendLimits, limit_bytes: u64) -> Self {
        let works = limit_bytes > 0;
        Self {
            entries: Vec::new(),
            left_by: BTreeMap::new(),
            n_bytes: 0,
            limit_bytes,
            limits,
            clock: 0,
            dropped: Vec::new(),
            works,
            cost: PromptCost::default(),
        }
    }

    pub(super) fn learn(&mut self, cost: PromptCost) {
        self.cost = cost;
    }

    pub(super) fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    pub(super) fn bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Room for cells that hold `tokens`, where copying them is quicker than computing them. What is worth least of what nobody goes
    /// on from gives way.
    pub(super) fn park(&mut self, tokens: &[TokenId], namespace: u64, is_owned: bool) -> Option<ParkId> {
        let n_bytes = self.bytes_of(tokens.len());
        if tokens.is_empty() || !self.pays(tokens.len(), n_bytes) {
            return None;
        }
        self.put(tokens, namespace, is_owned)
    }

    fn put(&mut self, tokens: &[TokenId], namespace: u64, is_owned: bool) -> Option<ParkId> {
        let n_bytes = self.bytes_of(tokens.len());
        if !self.works || !self.make_room(n_bytes) {
            return None;
        }
        Some(self.add(tokens, namespace, n_bytes, is_owned, false))
    }

    fn add(&mut self, tokens: &[TokenId], namespace: u64, n_bytes: u64, is_owned: bool, is_checkpoint: bool) -> ParkId {
        self.clock += 1;
        let (id, tokens) = (self.clock, tokens.to_vec());
        let tier = Tier::default();
        self.entries.push(Entry { id, tokens, namespace, n_bytes, is_owned, is_checkpoint, stamp: id, tier });
        self.n_bytes += n_bytes;
        id
    }

    fn pays(&self, n_tokens: usize, n_bytes: u64) -> bool {
        let copy_us = (n_bytes / COPIED_BYTES_PER_US) as f64;
        self.cost.of(n_tokens).is_none_or(|us| copy_us < us)
    }

    /// Whether so many tokens can be copied out without anybody who is listening to a stream noticing.
    pub(super) fn is_quick(&self, n_tokens: usize) -> bool {
        self.bytes_of(n_tokens) / COPIED_BYTES_PER_US <= LONGEST_PAUSE_US
    }

    fn bytes_of(&self, n_tokens: usize) -> u64 {
        self.limits.state_bytes + self.limits.cell_bytes * n_tokens as u64 + self.window_bytes(n_tokens)
    }

    /// What most of `prompt` can be had from, of all that is `wanted`; of equals that with the fewest tokens to copy. Memory that cannot be
    /// cut has to be used whole, or with a checkpoint.
    pub(super) fn best(&self, prompt: &[TokenId], namespace: u64, wanted: impl Fn(&Found) -> bool) -> Option<Found> {
        let complete = self.entries.iter().filter(|entry| entry.is_for(namespace) && !self.is_part(entry));
        let found = complete.map(|entry| {
            let (n_tokens, n_common) = (entry.tokens.len(), common(&entry.tokens, prompt).min(prompt.len() - 1));
            let Reach { n_tokens: n_shared, rewind } = self.reach_of_copy(entry, n_common, prompt, namespace);
            Found { id: entry.id, n_shared, n_tokens, rewind, is_warm: entry.tier.is_warm }
        });
        found.filter(wanted).max_by_key(|found| (found.n_shared, std::cmp::Reverse(found.n_tokens), found.id))
    }

    /// How many tokens of `prompt` each entry begins with.
    pub(super) fn n_shared_each(&self, prompt: &[TokenId], namespace: u64) -> impl Iterator<Item = usize> {
        let same = self.entries.iter().filter(move |entry| entry.namespace == namespace);
        same.map(|entry| common(&entry.tokens, prompt))
    }

    /// Fewer tokens of a finished sequence, beyond what others hold of them, are not worth host memory, and not worth fetching.
    pub(super) fn least_tokens(&self) -> usize {
        // Of memory that cannot be cut a checkpoint may lie here and nowhere else; what that has to save is asked when it is taken.
        let most = if self.limits.keeps_beginnings { 256 } else { 64 };
        (self.limits.n_cells_per_seq as usize / 8).clamp(16, most)
    }

    /// How many of `tokens` lie here already.
    pub(super) fn n_held(&self, tokens: &[TokenId], namespace: u64) -> usize {
        let same = self.entries.iter().filter(|entry| entry.is_for(namespace) && !self.is_part(entry));
        let held = same.map(|entry| {
            let n_common = common(&entry.tokens, tokens);
            self.reach_of_copy(entry, n_common, tokens, namespace).n_tokens
        });
        held.max().unwrap_or(0)
    }

    pub(super) fn used(&mut self, id: ParkId) {
        self.clock += 1;
        let clock = self.clock;
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.id == id) {
            entry.stamp = clock;
            entry.tier.is_refused = false;
        }
    }

    /// Nobody goes on from there any more.
    pub(super) fn forget(&mut self, id: ParkId) {
        self.left_by.remove(&id);
        let Some(at) = self.entries.iter().position(|entry| entry.id == id) else { return };
        self.n_bytes -= self.entries.swap_remove(at).n_bytes;
        self.dropped.push(id);
    }

    /// It could not be copied out, so neither can others.
    pub(super) fn failed(&mut self, id: ParkId) {
        self.works = false;
        self.forget(id);
    }

    pub(super) fn take_dropped(&mut self) -> Vec<ParkId> {
        std::mem::take(&mut self.dropped)
    }
}
