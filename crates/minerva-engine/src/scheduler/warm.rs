//! Copies to host memory that no admission asks for: prefixes that are to be there for everybody, and all that is worth keeping when
//! the engine ends.

use serde::{Deserialize, Serialize};

use super::parked::ParkId;
use super::seats::Seats;
use super::{CacheOp, Scheduler};
use crate::backend::SeqId;

/// Where a prefix is that was computed to be there for everybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Warmed {
    /// It came from host memory, and stays there.
    Kept,
    /// It is to be copied to host memory, under this name.
    Save(ParkId),
    /// There is no room for it.
    NoRoom,
}

impl Scheduler {
    /// What a finished sequence holds is to be in host memory for everybody; pinned, it never gives way.
    pub fn keep_warm(&mut self, seq: SeqId, is_pinned: bool) -> Warmed {
        self.seats.keep_warm(seq, is_pinned)
    }

    /// At the end: the next copy to make of what a finished sequence holds and nothing else does. Each is tried once.
    pub fn park_last(&mut self) -> Option<CacheOp> {
        let mut ops = Vec::new();
        for seq in 0..self.limits.n_seq_max {
            self.seats.park_finished(seq, &mut ops);
            self.seats.discard(seq);
            if !ops.is_empty() {
                break;
            }
        }
        ops.pop()
    }
}

impl Seats {
    fn keep_warm(&mut self, seq: SeqId, is_pinned: bool) -> Warmed {
        let seat = self.seat_of(seq);
        let (tokens, namespace) = (seat.held().to_vec(), seat.terms().namespace);
        if tokens.is_empty() {
            return Warmed::NoRoom;
        }
        let (at, warmed) = match self.parked.same(&tokens, namespace) {
            Some(at) => (at, Warmed::Kept),
            None => match self.parked.put_warm(&tokens, namespace) {
                Some(at) => (at, Warmed::Save(at)),
                None => return Warmed::NoRoom,
            },
        };
        self.parked.warm(at, is_pinned);
        warmed
    }
}
