//! Checkpoints of memory that cannot be cut: what a sequence's state was at an earlier length.
//!
//! Where a state is all that a sequence holds, a checkpoint is complete. Where there are cells as well these are not copied: the
//! checkpoint brings a sequence that holds the same tokens, and more, back to its length.

use super::{Entry, ParkId, Parked};
use crate::request::TokenId;
use crate::scheduler::common;

/// How far the beginning of a text can be used, and the checkpoint that this takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::scheduler) struct Reach {
    /// Tokens.
    pub(in crate::scheduler) n_tokens: usize,
    /// What brings the sequence back to that length, when a mere cut does not.
    pub(in crate::scheduler) rewind: Option<ParkId>,
}

impl Parked {
    /// How many of the `n_common` tokens that a sequence of `n_held` shares with `prompt` can be had from it.
    pub(in crate::scheduler) fn reach(
        &self,
        n_held: usize,
        n_common: usize,
        prompt: &[TokenId],
        namespace: u64,
    ) -> Reach {
        let is_cut = n_common == n_held || n_held <= self.limits.n_window_tokens as usize;
        if self.limits.keeps_beginnings || is_cut || n_common == 0 {
            return Reach { n_tokens: n_common, rewind: None };
        }
        let usable = self.entries.iter().filter(|entry| {
            let n = entry.tokens.len();
            self.is_part(entry) && entry.is_for(namespace) && n <= n_common && entry.tokens == prompt[..n]
        });
        let longest = usable.max_by_key(|entry| (entry.tokens.len(), entry.id));
        longest.map_or(Reach::default(), |entry| Reach { n_tokens: entry.tokens.len(), rewind: Some(entry.id) })
    }

    /// The same for a copy in host memory.
    pub(super) fn reach_of_copy(&self, entry: &Entry, n_common: usize, prompt: &[TokenId], namespace: u64) -> Reach {
        let n_held = entry.tokens.len();
        if n_common < self.limits.least_of_copy(n_held) {
            return Reach::default();
        }
        self.reach(n_held, n_common, prompt, namespace)
    }

    /// Whether it is of use only where the cells of its tokens are.
    pub(super) fn is_part(&self, entry: &Entry) -> bool {
        entry.is_checkpoint && self.limits.checkpoints_need_cells
    }

    /// Whether a checkpoint that saves computing `n_gained` of its `n_tokens` tokens is worth its copy, and can be taken. `is_heard`:
    /// somebody listens to a stream meanwhile.
    pub(in crate::scheduler) fn is_worth_a_checkpoint(&self, n_tokens: usize, n_gained: usize, is_heard: bool) -> bool {
        let n_bytes = self.checkpoint_bytes(n_tokens);
        self.works && n_bytes <= self.limit_bytes && self.pays(n_gained, n_bytes) && (!is_heard || is_short(n_bytes))
    }

    /// Room for a checkpoint of `tokens`, unless there is one already. Of more than `most` of one text those go that are closest to
    /// the next.
    pub(in crate::scheduler) fn add_checkpoint(
        &mut self,
        tokens: &[TokenId],
        namespace: u64,
        most: u32,
    ) -> Option<ParkId> {
        let is_same = |entry: &Entry| entry.is_checkpoint && entry.namespace == namespace && entry.tokens == tokens;
        if let Some(same) = self.entries.iter().find(|entry| is_same(entry)).map(|entry| entry.id) {
            self.used(same);
            return None;
        }
        self.thin_out(tokens, namespace, most);
        let n_bytes = self.checkpoint_bytes(tokens.len());
        if !self.make_room(n_bytes) {
            return None;
        }
        Some(self.add(tokens, namespace, n_bytes, false, true))
    }

    fn thin_out(&mut self, tokens: &[TokenId], namespace: u64, most: u32) {
        let is_earlier = |entry: &&Entry| {
            let is_beginning = common(&entry.tokens, tokens) == entry.tokens.len();
            entry.is_checkpoint && entry.namespace == namespace && is_beginning && entry.may_go()
        };
        let mut chain: Vec<(usize, ParkId)> =
            self.entries.iter().filter(is_earlier).map(|entry| (entry.tokens.len(), entry.id)).collect();
        chain.sort_unstable();
        while chain.len() + 1 > most.max(1) as usize {
            let ends = chain[1..].iter().map(|(n, _)| *n).chain([tokens.len()]);
            let gaps = chain.iter().zip(ends).enumerate().map(|(at, ((n, _), end))| (end - n, at));
            let Some((_, at)) = gaps.min() else { return };
            self.forget(chain.remove(at).1);
        }
    }

    fn checkpoint_bytes(&self, n_tokens: usize) -> u64 {
        if self.limits.checkpoints_need_cells {
            self.limits.state_bytes + self.window_bytes(n_tokens)
        } else {
            self.bytes_of(n_tokens)
        }
    }

    /// What layers with a window hold of a sequence, where they hold no more than that.
    pub(super) fn window_bytes(&self, n_tokens: usize) -> u64 {
        self.limits.window_cell_bytes * (n_tokens as u64).min(u64::from(self.limits.n_window_tokens))
    }
}

fn is_short(n_bytes: u64) -> bool {
    n_bytes / super::COPIED_BYTES_PER_US <= super::LONGEST_PAUSE_US
}
