//! Hints, applied to what finished sequences left in their seats and in host memory.

use super::Seats;
use crate::scheduler::hints::{Left, hand_ages_around};
use crate::scheduler::job::Terms;

impl Seats {
    /// Before somebody on these terms is seated: what clients want to keep gets their youngest ages.
    pub(in crate::scheduler) fn respect_hints(&mut self, terms: &Terms, now_us: u64) {
        for seat in self.all.iter_mut().filter(|seat| seat.terms.is_of_same(terms)) {
            seat.terms.keep.refresh(&terms.keep);
        }
        let free = self.all.iter_mut().filter(|seat| seat.owner.is_none() && seat.n_cells > 0);
        let mut left: Vec<Left> = free
            .map(|seat| {
                let Terms { client, namespace, keep, .. } = seat.terms;
                Left { client, namespace, keep, stamp: &mut seat.stamp }
            })
            .collect();
        hand_ages_around(&mut left, now_us);
        self.parked.respect_hints(terms, now_us);
    }
}
