//! What a request says about the use of its prompt to come, and what follows from it: the order in which what one client left is given
//! up, and nothing else.
//!
//! A hint never costs another client anything. What a client left has ages; hints hand these ages around among the things of that client,
//! so that what is to be kept gets the youngest. Whoever decides what has to go sees the same ages as without hints, each with the same
//! owner: how much a client loses, and when, is not changed by anybody's hints. There is no list of hints that could grow: each is beside
//! the cells that it is about and goes with them.

use serde::{Deserialize, Serialize};

use super::job::{ClientId, Terms};

/// How long a key is a reason to keep what was computed under it, in microseconds, from the last request with it.
const KEY_US: u64 = 10 * 60 * 1_000_000;

/// For how long what a request computes is worth more than what its client left besides.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Keep {
    /// Requests with the same key are expected to begin alike; each refreshes what the others left.
    pub key: Option<u64>,
    /// When that ends, on the clock of [`admit`](super::Scheduler::admit), in microseconds.
    pub key_until_us: u64,
    /// Until when it was asked to be kept, on the same clock.
    pub until_us: u64,
}

impl Keep {
    /// The hints of a request that comes at `now_us`.
    pub fn new(key: Option<u64>, keep_ms: Option<u64>, now_us: u64) -> Self {
        let until_us = |us: u64| now_us.saturating_add(us);
        Self {
            key,
            key_until_us: key.map_or(0, |_| until_us(KEY_US)),
            until_us: keep_ms.map_or(0, |ms| until_us(ms.saturating_mul(1000))),
        }
    }

    /// Higher is given up later.
    fn rank(&self, now_us: u64) -> u8 {
        if self.until_us > now_us { 2 } else { u8::from(self.key.is_some() && self.key_until_us > now_us) }
    }

    /// A request with `other` uses what has this.
    pub(super) fn refresh(&mut self, other: &Self) {
        if self.key.is_some() && self.key == other.key {
            self.key_until_us = self.key_until_us.max(other.key_until_us);
        }
    }
}

impl Terms {
    /// Whether both are of one client and may share cells.
    pub(super) fn is_of_same(&self, other: &Self) -> bool {
        (self.client, self.namespace) == (other.client, other.namespace)
    }

    /// The same terms for a request that goes on in the cells of an earlier one: what was to be kept until a time still is.
    pub(super) fn after(self, earlier: &Self, reuses: bool) -> Self {
        let mut terms = self;
        if reuses && self.is_of_same(earlier) {
            terms.keep.until_us = terms.keep.until_us.max(earlier.keep.until_us);
        }
        terms
    }
}

/// Something that a client left, with its age: a greater stamp is younger.
#[derive(Debug)]
pub(super) struct Left<'a> {
    pub(super) client: ClientId,
    pub(super) namespace: u64,
    pub(super) keep: Keep,
    pub(super) stamp: &'a mut u64,
}

/// Gives the youngest ages of each client to what it wants to keep. The ages that a client has stay the same ones.
pub(super) fn hand_ages_around(left: &mut [Left], now_us: u64) {
    if left.iter().all(|left| left.keep.rank(now_us) == 0) {
        return;
    }
    let group = |left: &Left| (left.client, left.namespace);
    left.sort_by_key(|left| (group(left), left.keep.rank(now_us), *left.stamp));
    for of_client in left.chunk_by_mut(|a, b| group(a) == group(b)) {
        let mut stamps: Vec<u64> = of_client.iter().map(|left| *left.stamp).collect();
        stamps.sort_unstable();
        for (left, stamp) in of_client.iter_mut().zip(stamps) {
            *left.stamp = stamp;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Stamps after handing them around; each thing is a client, its stamp, and how it is to be kept.
    fn stamps(things: &[(ClientId, u64, Keep)], now_us: u64) -> Vec<u64> {
        let mut stamps: Vec<u64> = things.iter().map(|(_, stamp, _)| *stamp).collect();
        let mut left: Vec<Left> = stamps
            .iter_mut()
            .zip(things)
            .map(|(stamp, (client, _, keep))| Left { client: *client, namespace: 0, keep: *keep, stamp })
            .collect();
        hand_ages_around(&mut left, now_us);
        stamps
    }

    #[test]
    fn what_is_to_be_kept_gets_the_youngest_age_of_its_client() {
        let none = Keep::default();
        let keyed = Keep::new(Some(7), None, 0);
        let asked = Keep::new(None, Some(1), 0);
        let things = [(1, 10, asked), (1, 20, keyed), (1, 30, none), (2, 25, none), (2, 5, none)];
        assert_eq!(stamps(&things, 0), [30, 20, 10, 25, 5]);
        assert_eq!(stamps(&things, 1_000), [10, 30, 20, 25, 5], "a millisecond later it need not be kept");
        assert_eq!(stamps(&things, KEY_US), [10, 20, 30, 25, 5]);
    }

    #[test]
    fn a_request_refreshes_what_its_key_left_and_inherits_what_it_goes_on_in() {
        let mut old = Keep::new(Some(7), None, 0);
        old.refresh(&Keep::new(Some(8), None, 100));
        assert_eq!(old, Keep::new(Some(7), None, 0));
        old.refresh(&Keep::new(Some(7), Some(5), 100));
        assert_eq!(old, Keep { key: Some(7), key_until_us: KEY_US + 100, until_us: 0 });
        let earlier = Terms { client: 3, keep: Keep::new(None, Some(60), 0), ..Terms::default() };
        let next = Terms { client: 3, ..Terms::default() };
        assert_eq!(next.after(&earlier, true).keep.until_us, 60_000);
        assert_eq!(next.after(&earlier, false).keep.until_us, 0);
        assert_eq!(Terms::default().after(&earlier, true).keep.until_us, 0, "another client does not");
    }

    proptest! {
        #[test]
        fn hints_change_no_age_of_another_client_and_no_order_among_equals(
            things in prop::collection::vec((0_u64..4, 0_u64..1000, 0_u64..3, 0_u64..40), 0..30),
            now_us in 0_u64..40_000,
        ) {
            let things: Vec<_> = things
                .into_iter()
                .enumerate()
                .map(|(i, (client, stamp, key, ms))| {
                    let keep = Keep::new((key > 0).then_some(key), (ms > 0).then_some(ms), 0);
                    (client, stamp * 100 + i as u64, keep)
                })
                .collect();
            let after = stamps(&things, now_us);
            for client in 0..4 {
                let of = |stamps: &[u64]| -> Vec<u64> {
                    let mut all: Vec<u64> =
                        things.iter().zip(stamps).filter(|(thing, _)| thing.0 == client).map(|(_, s)| *s).collect();
                    all.sort_unstable();
                    all
                };
                let before: Vec<u64> = things.iter().map(|thing| thing.1).collect();
                prop_assert_eq!(of(&before), of(&after), "the ages of a client");
            }
            for (a, stamp_a) in things.iter().zip(&after) {
                for (b, stamp_b) in things.iter().zip(&after).filter(|(b, _)| b.0 == a.0) {
                    let (rank_a, rank_b) = (a.2.rank(now_us), b.2.rank(now_us));
                    if rank_a < rank_b || (rank_a == rank_b && a.1 < b.1) {
                        prop_assert!(stamp_a < stamp_b);
                    }
                }
            }
        }
    }
}
