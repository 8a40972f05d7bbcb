//! Whose each copy in host memory is, and whether it is to be kept: so that hints hold there too.

use super::{ParkId, Parked};
use crate::request::TokenId;
use crate::scheduler::common;
use crate::scheduler::hints::{Left, hand_ages_around};
use crate::scheduler::job::Terms;

impl Parked {
    /// A copy was made of what a request on these terms left.
    pub(in crate::scheduler) fn note(&mut self, id: ParkId, terms: &Terms) {
        self.left_by.insert(id, *terms);
    }

    /// Before something has to give way: what clients want to keep gets their youngest ages. A request on these terms comes.
    pub(in crate::scheduler) fn respect_hints(&mut self, terms: &Terms, now_us: u64) {
        for known in self.left_by.values_mut().filter(|known| known.is_of_same(terms)) {
            known.keep.refresh(&terms.keep);
        }
        let left_by = &self.left_by;
        let mut left: Vec<Left> = self
            .entries
            .iter_mut()
            .filter(|entry| !entry.is_owned)
            .filter_map(|entry| {
                let Terms { client, namespace, keep, .. } = *left_by.get(&entry.id)?;
                Some(Left { client, namespace, keep, stamp: &mut entry.stamp })
            })
            .collect();
        hand_ages_around(&mut left, now_us);
    }

    /// How much of `prompt` each copy begins with, and how much it holds. One that needs the cells of its tokens holds nothing.
    pub(in crate::scheduler) fn each_common(
        &self,
        prompt: &[TokenId],
        namespace: u64,
    ) -> impl Iterator<Item = (usize, usize)> {
        let same = self.entries.iter().filter(move |entry| entry.is_for(namespace) && !self.is_part(entry));
        same.map(|entry| (common(&entry.tokens, prompt), entry.tokens.len()))
    }
}
