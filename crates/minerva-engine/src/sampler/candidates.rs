//! The filters, over the tokens that can still be drawn.
//!
//! Candidates stay in ascending order of their ids from start to end, so the draw does not depend on how a selection moves
//! things about. A filter that needs an order ranks a working copy, finds where the kept set ends, and drops the rest.
//! Nothing is ever sorted: a selection looks at each candidate a constant number of times on average.

use super::math::weight;
use crate::request::TokenId;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub(super) token: TokenId,
    /// Finite.
    pub(super) logit: f32,
}

/// A candidate's place in the order of one filter.
#[derive(Debug, Clone, Copy)]
struct Ranked {
    place: u64,
    /// Probability, up to a factor that all candidates share.
    weight: f32,
}

/// Orders by `rank`, the lower the better, and then by id. One integer, because a selection compares a lot and at random.
fn place(rank: f32, token: TokenId) -> u64 {
    let bits = (rank + 0.0).to_bits(); // + 0.0 turns -0.0 into 0.0: they are equal
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(ascending) << 32 | u64::from(token as u32)
}

/// The candidates of one draw and the room to rank them; both buffers are used again for the next.
#[derive(Debug, Clone, Default)]
pub(super) struct Candidates {
    pub(super) list: Vec<Candidate>,
    ranked: Vec<Ranked>,
}

impl Candidates {
    /// Keeps the `k` best.
    pub(super) fn keep_top_k(&mut self, k: usize) {
        if k >= self.list.len() {
            return;
        }
        self.rank_by_logit(f32::INFINITY);
        let last = self.ranked.select_nth_unstable_by_key(k - 1, |ranked| ranked.place).1.place;
        self.keep_through(last, |candidate| -candidate.logit);
    }

    /// Keeps the smallest set of best candidates that holds the share `p` of `total`, the [`weight`](Self::weight) of all
    /// tokens that were there before, candidates or not. The best one always stays.
    pub(super) fn keep_top_p(&mut self, p: f32, total: f64) {
        self.rank_by_logit(self.top());
        if let Some(last) = self.last_within(f64::from(p) * total) {
            self.keep_through(last, |candidate| -candidate.logit);
        }
    }

    /// Keeps those at least `p` times as probable as the best.
    pub(super) fn keep_min_p(&mut self, p: f32) {
        let bound = min_p_bound(self.top(), p);
        self.list.retain(|candidate| candidate.logit >= bound);
    }

    /// Keeps the candidates whose surprise is closest to the expected surprise, until they hold more than the share `p`.
    ///
    /// The surprise of a token is `top + ln(total) - logit` nats, so the distance to the mean surprise (the entropy) is the
    /// distance of its logit to the mean logit.
    pub(super) fn keep_typical(&mut self, p: f32) {
        let top = self.top();
        let (mut total, mut weighted) = (0.0, 0.0);
        for candidate in &self.list {
            let weight = f64::from(weight(candidate.logit, top, 1.0));
            total += weight;
            weighted += if weight > 0.0 { weight * f64::from(candidate.logit - top) } else { 0.0 };
        }
        let mean = (f64::from(top) + weighted / total) as f32;
        let distance = |candidate: &Candidate| (candidate.logit - mean).abs();
        self.ranked.clear();
        self.ranked.extend(self.list.iter().map(|candidate| Ranked {
            place: place(distance(candidate), candidate.token),
            weight: weight(candidate.logit, top, 1.0),
        }));
        if let Some(last) = self.last_within((f64::from(p) * total).next_up()) {
            self.keep_through(last, distance);
        }
    }

    /// Draws from the candidates, each as likely as `exp(logit * scale)` says; `uniform` is a draw from `[0, 1)`.
    pub(super) fn draw(&self, scale: f32, uniform: f64) -> Option<TokenId> {
        let top = self.top();
        let weights = || self.list.iter().map(|candidate| f64::from(weight(candidate.logit, top, scale)));
        let target = uniform * weights().sum::<f64>();
        let mut passed = 0.0;
        for (candidate, weight) in self.list.iter().zip(weights()) {
            passed += weight;
            if passed > target {
                return Some(candidate.token);
            }
        }
        None // the same additions as in the sum, and `uniform < 1`: only without candidates
    }

    /// The largest logit.
    pub(super) fn top(&self) -> f32 {
        self.list.iter().fold(f32::NEG_INFINITY, |top, candidate| top.max(candidate.logit))
    }

    /// Sum of `exp(logit - top)`.
    pub(super) fn weight(&self, top: f32) -> f64 {
        self.list.iter().map(|candidate| f64::from(weight(candidate.logit, top, 1.0))).sum()
    }

    fn rank_by_logit(&mut self, top: f32) {
        self.ranked.clear();
        self.ranked.extend(self.list.iter().map(|&Candidate { token, logit }| Ranked {
            place: place(-logit, token),
            weight: weight(logit, top, 1.0),
        }));
    }

    /// The place of the last of the ranked candidates that the smallest best-first set weighing `target` needs; the last of all if
    /// together they weigh less.
    ///
    /// A binary search for the end of that set, where each step moves the better half of the open range to its front:
    /// linear time, because the range halves.
    fn last_within(&mut self, target: f64) -> Option<u64> {
        let (mut passed, mut start, mut end) = (0.0, 0, self.ranked.len());
        while end - start > 1 {
            let middle = usize::midpoint(start, end);
            self.ranked[start..end].select_nth_unstable_by_key(middle - start, |ranked| ranked.place);
            let better_half: f64 = self.ranked[start..middle].iter().map(|ranked| f64::from(ranked.weight)).sum();
            if passed + better_half >= target {
                end = middle;
            } else {
                passed += better_half;
                start = middle;
            }
        }
        self.ranked.get(start).map(|last| last.place)
    }

    fn keep_through(&mut self, last: u64, rank: impl Fn(&Candidate) -> f32) {
        self.list.retain(|candidate| place(rank(candidate), candidate.token) <= last);
    }
}

/// The lowest logit that is at least `p` times as probable as `top`.
pub(super) fn min_p_bound(top: f32, p: f32) -> f32 {
    top + f64::from(p).ln() as f32 // as an `f64`, so that platforms whose logarithms differ in the last bit agree
}
