//! Why a prompt is computed and not reused.

use serde::{Deserialize, Serialize};

use super::Seats;
use crate::backend::SeqId;
use crate::scheduler::common;
use crate::scheduler::queue::Waiting;

/// Why the prompt of a request is computed, wholly or beyond what was reused.
///
/// What clients in other namespaces hold is never a reason: then a counter would tell one client what another one sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Miss {
    /// Nothing began like it, or with too few tokens to matter.
    First,
    /// All of an earlier text was reused; the prompt goes on where that ended, as the next turn of a conversation does.
    Extended,
    /// An earlier text began alike and goes on in another way.
    Diverged,
    /// More of it was in the cache once, and had to go for something else.
    Evicted,
    /// More of it is in the cache, in a longer text that was not given up for it.
    Spared,
    /// More of it is in the cache, where this kind of memory cannot be cut or copied.
    MemoryCannotBeCut,
    /// The request ran before, gave its seat away, and its cells were not kept.
    Preempted,
    /// The request did not want anything reused.
    Disabled,
}

impl Miss {
    /// Every reason.
    pub const ALL: [Self; 8] = [
        Self::First,
        Self::Extended,
        Self::Diverged,
        Self::Evicted,
        Self::Spared,
        Self::MemoryCannotBeCut,
        Self::Preempted,
        Self::Disabled,
    ];

    /// Its name in metrics and traces.
    pub fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Extended => "extended",
            Self::Diverged => "diverged",
            Self::Evicted => "evicted",
            Self::Spared => "spared",
            Self::MemoryCannotBeCut => "memory_cannot_be_cut",
            Self::Preempted => "preempted",
            Self::Disabled => "disabled",
        }
    }
}

impl Seats {
    /// Why more than `n_reused` tokens and the last one of a prompt are computed. Call before its seats are taken.
    pub(super) fn why_computed(&self, waiting: &Waiting, n_reused: usize) -> Option<Miss> {
        let (prompt, namespace) = (&waiting.job.prompt, waiting.job.terms.namespace);
        if n_reused + 1 >= prompt.len() {
            return None;
        }
        if waiting.resume.is_some() {
            return Some(Miss::Preempted);
        }
        if !waiting.job.reuse {
            return Some(Miss::Disabled);
        }
        let least = self.least_shared();
        let seats = self.all.iter().filter(|seat| seat.terms.namespace == namespace).map(|seat| {
            let n_sure = if seat.owner.is_some() { seat.n_prompt.max(seat.n_cells) } else { seat.n_cells };
            let held = &seat.tokens[..n_sure.min(seat.tokens.len())];
            (common(held, prompt), held.len(), seat.n_least)
        });
        let copies = self.parked.each_common(prompt, namespace);
        let copies = copies.map(|(n_common, n_held)| (n_common, n_held, self.limits.least_of_copy(n_held)));
        let (mut n_best, mut n_cut, mut is_whole) = (0, 0, false);
        for (n_common, n_held, n_least) in seats.chain(copies) {
            n_best = n_best.max(n_common);
            n_cut = n_cut.max(if n_common < n_least { 0 } else { n_common });
            is_whole |= n_common == n_held && n_common == n_reused;
        }
        let n_lost = self.lost.longest(prompt, namespace);
        Some(if n_lost >= least && n_lost > n_reused.max(n_best) {
            Miss::Evicted
        } else if n_best >= n_reused + least {
            let can_be_had = self.can_copy() && self.limits.keeps_beginnings && n_cut >= n_reused + least;
            if can_be_had { Miss::Spared } else { Miss::MemoryCannotBeCut }
        } else if n_reused < least {
            Miss::First
        } else if is_whole {
            Miss::Extended
        } else {
            Miss::Diverged
        })
    }

    /// A sequence keeps no more than so many of its tokens.
    pub(super) fn note_lost(&mut self, seq: SeqId, n_kept: usize) {
        let seat = &self.all[seq as usize];
        if n_kept < seat.n_cells {
            self.lost.note(&seat.tokens[..seat.n_cells], seat.terms.namespace);
        }
    }
}
