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
#[derive(Debug, Clone)]
pub(super) struct Candidates {
    /// By ascending id.
    pub(super) list: Vec<Candidate>,
    /// The inverse of the temperature so far: a candidate is as likely as `exp(logit * scale)` says.
    pub(super) scale: f32,
    ranked: Vec<Ranked>,
}

impl Default for Candidates {
    fn default() -> Self {
        Self { list: Vec::new(), scale: 1.0, ranked: Vec::new() }
    }
}

impl Candidates {
    /// Keeps the `k` best.
    pub(super) fn keep_top_k(&mut self, k: usize) {
        if k >= self.list.len() {
            return;
        }
        self.rank_by_logit(f32::INFINITY);
        self.keep_first(k, |candidate| -candidate.logit);
    }

    /// Keeps the smallest set of best candidates that holds the share `p` of `total`, the [`weight`](Self::weight) of all
    /// tokens that were there before, candidates or not; at least `min_keep`. The best one always stays.
    pub(super) fn keep_top_p(&mut self, p: f32, total: f64, min_keep: usize) {
        self.rank_by_logit(self.top());
        let n = self.n_within(f64::from(p) * total).max(min_keep);
        self.keep_first(n, |candidate| -candidate.logit);
    }

    /// Keeps those at least `p` times as probable as the best; at least `min_keep`.
    pub(super) fn keep_min_p(&mut self, p: f32, min_keep: usize) {
        self.keep_above(min_p_bound(self.top(), p, self.scale), min_keep);
    }

    /// Keeps those with at least this logit, and at least the `min_keep` best.
    pub(super) fn keep_above(&mut self, bound: f32, min_keep: usize) {
        let n = self.list.iter().filter(|candidate| candidate.logit >= bound).count();
        if n < min_keep {
            return self.keep_top_k(min_keep);
        }
        self.list.retain(|candidate| candidate.logit >= bound);
    }

    /// Keeps the candidates whose surprise is closest to the expected surprise, until they hold more than the share `p`; at least
    /// `min_keep`.
    ///
    /// The surprise of a token is `(top - logit) * scale + ln(total)` nats, so the distance to the mean surprise (the entropy) is in
    /// proportion to the distance of its logit to the mean logit.
    pub(super) fn keep_typical(&mut self, p: f32, min_keep: usize) {
        let (top, scale) = (self.top(), self.scale);
        let (total, below_top) = self.mean_below_top();
        let mean = (f64::from(top) - below_top) as f32;
        let distance = |candidate: &Candidate| (candidate.logit - mean).abs();
        self.ranked.clear();
        self.ranked.extend(self.list.iter().map(|candidate| Ranked {
            place: place(distance(candidate), candidate.token),
            weight: weight(candidate.logit, top, scale),
        }));
        let n = self.n_within((f64::from(p) * total).next_up()).max(min_keep);
        self.keep_first(n, distance);
    }

    /// Removes the candidates at least as probable as `threshold`, except for the least probable of them. Does nothing if fewer than
    /// `min_keep` would be left.
    pub(super) fn remove_top_choices(&mut self, threshold: f32, min_keep: usize) {
        let (top, scale) = (self.top(), self.scale);
        let bound = f64::from(threshold) * self.weight(top);
        let n_probable =
            self.list.iter().filter(|candidate| f64::from(weight(candidate.logit, top, scale)) >= bound).count();
        let n_removed = n_probable.saturating_sub(1);
        if n_removed == 0 || self.list.len() - n_removed < min_keep {
            return;
        }
        self.rank_by_logit(top);
        let first_kept = self.ranked.select_nth_unstable_by_key(n_removed, |ranked| ranked.place).1.place;
        self.list.retain(|candidate| place(-candidate.logit, candidate.token) >= first_kept);
    }

    /// The entropy of the candidates, as a share of what it is when all are equally likely; `None` for fewer than two.
    pub(super) fn relative_entropy(&self) -> Option<f64> {
        if self.list.len() < 2 {
            return None;
        }
        let (total, below_top) = self.mean_below_top();
        let entropy = total.ln() + below_top * f64::from(self.scale);
        Some(entropy / (self.list.len() as f64).ln())
    }

    /// Draws from the candidates; `uniform` is a draw from `[0, 1)`. Returns the place in the list.
    pub(super) fn draw(&self, uniform: f64) -> Option<usize> {
        let top = self.top();
        let weights = || self.list.iter().map(|candidate| f64::from(weight(candidate.logit, top, self.scale)));
        let target = uniform * weights().sum::<f64>();
        let mut passed = 0.0;
        for (i, weight) in weights().enumerate() {
            passed += weight;
            if passed > target {
                return Some(i);
            }
        }
        None // the same additions as in the sum, and `uniform < 1`: only without candidates
    }

    /// The probability of the candidate at `i` of the list.
    pub(super) fn probability(&self, i: usize) -> f64 {
        let top = self.top();
        f64::from(weight(self.list[i].logit, top, self.scale)) / self.weight(top)
    }

    /// Replaces each candidate's logit by what `change` makes of its probability, which
    /// [`replaced_probability`](Self::replaced_probability) remembers. The scale is 1 afterwards.
    pub(super) fn replace_by_probability(&mut self, change: impl Fn(f32) -> f32) {
        let (top, scale) = (self.top(), self.scale);
        let total = self.weight(top);
        self.ranked.clear();
        for candidate in &mut self.list {
            let probability = (f64::from(weight(candidate.logit, top, scale)) / total) as f32;
            self.ranked.push(Ranked { place: 0, weight: probability });
            candidate.logit = change(probability);
        }
        self.scale = 1.0;
    }

    /// What the candidate at `i` of the list had.
    pub(super) fn replaced_probability(&self, i: usize) -> f32 {
        self.ranked[i].weight
    }

    /// Multiplies the scale into the logits.
    pub(super) fn apply_scale(&mut self) {
        for candidate in &mut self.list {
            candidate.logit = (candidate.logit * self.scale).clamp(-f32::MAX, f32::MAX);
        }
        self.scale = 1.0;
    }

    /// The first of those with the largest logit.
    pub(super) fn first_best(&self) -> Option<Candidate> {
        let top = self.top();
        self.list.iter().find(|candidate| candidate.logit >= top).copied()
    }

    /// The largest logit.
    pub(super) fn top(&self) -> f32 {
        self.list.iter().fold(f32::NEG_INFINITY, |top, candidate| top.max(candidate.logit))
    }

    /// Sum of `exp((logit - top) * scale)`.
    pub(super) fn weight(&self, top: f32) -> f64 {
        self.list.iter().map(|candidate| f64::from(weight(candidate.logit, top, self.scale))).sum()
    }

    /// The [`weight`](Self::weight) of all, and how far their mean logit lies below the largest.
    fn mean_below_top(&self) -> (f64, f64) {
        let top = self.top();
        let (mut total, mut weighted) = (0.0, 0.0);
        for candidate in &self.list {
            let weight = f64::from(weight(candidate.logit, top, self.scale));
            total += weight;
            weighted += if weight > 0.0 { weight * f64::from(top - candidate.logit) } else { 0.0 };
        }
        (total, weighted / total)
    }

    fn rank_by_logit(&mut self, top: f32) {
        let scale = self.scale;
        self.ranked.clear();
        self.ranked.extend(self.list.iter().map(|&Candidate { token, logit }| Ranked {
            place: place(-logit, token),
            weight: weight(logit, top, scale),
        }));
    }

    /// How many of the ranked candidates the smallest best-first set weighing `target` has; all if together they weigh less, and at
    /// least one.
    ///
    /// A binary search for the end of that set, where each step moves the better half of the open range to its front:
    /// linear time, because the range halves.
    fn n_within(&mut self, target: f64) -> usize {
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
        start + 1
    }

    /// Keeps the `n` best-ranked candidates, which `rank` ranked.
    fn keep_first(&mut self, n: usize, rank: impl Fn(&Candidate) -> f32) {
        if n == 0 || n >= self.list.len() {
            return;
        }
        let last = self.ranked.select_nth_unstable_by_key(n - 1, |ranked| ranked.place).1.place;
        self.list.retain(|candidate| place(rank(candidate), candidate.token) <= last);
    }
}

/// The lowest logit that is at least `p` times as probable as `top`.
pub(super) fn min_p_bound(top: f32, p: f32, scale: f32) -> f32 {
    top + (f64::from(p).ln() / f64::from(scale)) as f32 // as an `f64`, so that platforms whose logarithms differ in the last bit agree
}
