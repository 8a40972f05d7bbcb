//! Which place a sequence gets.
//!
//! Where each sequence has a stream of cells, llama.cpp computes at once only sequences whose numbers follow one another
//! (`split_equal`), so each gap between busy ones is one more pass a step: six of 32 were 12 % slower with gaps
//! (docs/benchmarks.md). So the busy ones stay side by side, and what a finished sequence left in the wanted place moves to that
//! of the one unused for longest.

use super::Seats;
use crate::backend::SeqId;
use crate::scheduler::CacheOp;

/// A copy of more than this may take longer than it saves: it is a twentieth of a second on a CPU.
const MOST_MOVED_BYTES: u64 = 256 << 20;

impl Seats {
    /// A free place other than `but`, beside busy ones where there are any. What it holds is reused or overwritten; what is younger
    /// than something else was moved.
    pub(super) fn vacate(&mut self, but: Option<SeqId>, ops: &mut Vec<CacheOp>) -> Option<SeqId> {
        let oldest = self.free(but).min_by_key(|&seq| self.all[seq as usize].stamp)?;
        if self.limits.unified {
            self.park_finished(oldest, ops);
            return Some(oldest);
        }
        let wanted = self.free(but).min_by_key(|&seq| {
            let seat = &self.all[seq as usize];
            (std::cmp::Reverse(self.n_busy_beside(seq)), seat.stamp)
        })?;
        let n_cells = self.all[wanted as usize].n_cells;
        if n_cells == 0 {
            return Some(wanted);
        }
        self.park_finished(oldest, ops); // whose place it is in all that follows
        if wanted == oldest || !self.can_move || self.limits.stream_bytes > MOST_MOVED_BYTES {
            return Some(oldest);
        }
        ops.push(CacheOp::Move { src: wanted, dst: oldest, n_tokens: n_cells as u32 });
        ops.push(CacheOp::Keep { seq: wanted, n_tokens: 0 });
        self.note_lost(oldest, 0);
        let seat = self.at(wanted);
        let (tokens, terms, stamp) = (std::mem::take(&mut seat.tokens), seat.terms, seat.stamp);
        let n_least = seat.n_least;
        seat.clear();
        let seat = self.at(oldest);
        (seat.tokens, seat.terms, seat.stamp) = (tokens, terms, stamp);
        (seat.n_cells, seat.n_least) = (n_cells, n_least);
        Some(wanted)
    }

    pub(in crate::scheduler) fn move_failed(&mut self, seq: SeqId) {
        self.can_move = false;
        let seat = self.at(seq);
        if seat.owner.is_none() {
            seat.clear(); // otherwise the same request has taken the place, which is to be emptied
        }
    }

    fn free(&self, but: Option<SeqId>) -> impl Iterator<Item = SeqId> {
        (0..self.limits.n_seq_max).filter(move |&seq| self.all[seq as usize].owner.is_none() && Some(seq) != but)
    }

    fn n_busy_beside(&self, seq: SeqId) -> usize {
        let is_busy = |seq: SeqId| self.all.get(seq as usize).is_some_and(|seat| seat.owner.is_some());
        usize::from(seq.checked_sub(1).is_some_and(is_busy)) + usize::from(is_busy(seq + 1))
    }
}
