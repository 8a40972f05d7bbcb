//! The tokens that one draw can still choose, from the whole row to a short list.
//!
//! A [`Field`] begins as the model's row with a few patched logits. As long as nothing narrows it, it stays a row that is read block by
//! block; a filter turns it into a list of candidates. Filters that only need "all tokens from this logit up" note a floor, so
//! that two in a row cost one pass. A filter that has to rank tokens and comes before any that narrows the row lists all of it.

use super::candidates::{Candidates, min_p_bound};
use super::math::Moments;
use super::row::{Patch, Row};
use super::{SampleError, Scratch, checked_top};
use crate::request::TokenId;

/// One draw.
pub(super) struct Field<'a> {
    /// The model's logits, without patches.
    row: Row<'a>,
    scratch: &'a mut Scratch,
    /// The largest logit while the field is a row.
    top: f32,
    /// Tokens below it are out, while the field is a row.
    floor: f32,
    is_row: bool,
}

impl<'a> Field<'a> {
    /// All tokens of the row, with the model's own logits.
    pub(super) fn new(row: Row<'a>, scratch: &'a mut Scratch) -> Self {
        let top = row.find_maxima(&mut scratch.maxima);
        Self::unpatched(row, scratch, top)
    }

    /// The field of the last [`new`](Self::new), which had the same row, as it was then. Only blocks with patches are read again.
    pub(super) fn again(row: Row<'a>, scratch: &'a mut Scratch) -> Self {
        let top = row.refresh_maxima(&scratch.patches, &mut scratch.maxima);
        Self::unpatched(row, scratch, top)
    }

    fn unpatched(row: Row<'a>, scratch: &'a mut Scratch, top: f32) -> Self {
        scratch.patches.clear();
        scratch.candidates.scale = 1.0;
        Self { row, scratch, top, floor: f32::NEG_INFINITY, is_row: true }
    }

    pub(super) fn n_vocab(&self) -> usize {
        self.row.len()
    }

    /// The logarithm of the sum of `exp(logit)` over the row.
    pub(super) fn log_total(&mut self) -> f32 {
        let Scratch { patches, blocks, .. } = &mut *self.scratch;
        (f64::from(self.top) + self.row.patched(patches).weigh(self.top, 1.0, blocks).ln()) as f32
    }

    /// Changes the logits of some tokens, which ascend. Each is told its logit.
    pub(super) fn adjust<T>(&mut self, tokens: impl Iterator<Item = (TokenId, T)>, change: impl Fn(f32, T) -> f32) {
        let is_scaled = (self.scratch.candidates.scale - 1.0).abs() > 0.0;
        if self.is_row && self.floor == f32::NEG_INFINITY && !is_scaled {
            self.patch(tokens, change);
        } else {
            self.adjust_candidates(tokens, change);
        }
    }

    fn patch<T>(&mut self, tokens: impl Iterator<Item = (TokenId, T)>, change: impl Fn(f32, T) -> f32) {
        let patches = &mut self.scratch.patches;
        let n_before = patches.len();
        let mut changed = false;
        for (token, with) in tokens {
            changed = true;
            let token = token as usize; // never negative: checked on the way in
            match patches[..n_before].binary_search_by_key(&token, |patch| patch.token) {
                Ok(i) => patches[i].logit = change(patches[i].logit, with),
                Err(_) => patches.push(Patch { token, logit: change(self.row.unpatched(token), with) }),
            }
        }
        if changed {
            patches.sort_by_key(|patch| patch.token); // two runs: a merge
            self.refresh();
        }
    }

    fn adjust_candidates<T>(&mut self, tokens: impl Iterator<Item = (TokenId, T)>, change: impl Fn(f32, T) -> f32) {
        let candidates = self.settle();
        candidates.apply_scale();
        let mut i = 0;
        for (token, with) in tokens {
            i += candidates.list[i..].partition_point(|candidate| candidate.token < token);
            if let Some(candidate) = candidates.list.get_mut(i).filter(|candidate| candidate.token == token) {
                candidate.logit = change(candidate.logit, with);
            }
        }
        candidates.list.retain(|candidate| candidate.logit > f32::NEG_INFINITY);
    }

    /// Takes tokens out of the row; ids outside of it are ignored.
    pub(super) fn ban(&mut self, tokens: &[TokenId]) {
        if tokens.is_empty() {
            return;
        }
        let in_row = |token: &TokenId| usize::try_from(*token).ok().filter(|token| *token < self.row.len());
        let patches = &mut self.scratch.patches;
        patches.extend(tokens.iter().filter_map(in_row).map(|token| Patch { token, logit: f32::NEG_INFINITY }));
        // Stable, so that the ban ends up behind the patch it overrules.
        patches.sort_by_key(|patch| patch.token);
        patches.dedup_by(|later, kept| {
            let is_same = later.token == kept.token;
            if is_same {
                kept.logit = later.logit;
            }
            is_same
        });
        self.refresh();
    }

    fn refresh(&mut self) {
        let Scratch { patches, maxima, .. } = &mut *self.scratch;
        self.top = self.row.patched(patches).refresh_maxima(patches, maxima);
    }

    /// Whether the row has a token to choose.
    pub(super) fn check(&self) -> Result<(), SampleError> {
        checked_top(self.top)
    }

    /// Turns the row into a list, if it is none yet.
    pub(super) fn settle(&mut self) -> &mut Candidates {
        let Scratch { patches, maxima, candidates, .. } = &mut *self.scratch;
        if self.is_row {
            self.row.patched(patches).gather(self.floor, maxima, &mut candidates.list);
            self.is_row = false;
        }
        candidates
    }

    /// Keeps the `k` best tokens.
    ///
    /// Where `k` groups of blocks have a maximum from some logit up, so have `k` tokens, and no token below it can be among the best `k`.
    /// With four groups for each of the `k` tokens the bound lets only a few more pass (1.15 `k` of independent logits), and there are few
    /// numbers to select from.
    pub(super) fn keep_top_k(&mut self, k: usize) {
        const GROUPS_PER_TOKEN: usize = 4;
        let Scratch { maxima, blocks, .. } = &mut *self.scratch;
        if self.is_row && k < maxima.len() {
            let n_blocks = (maxima.len() / k.saturating_mul(GROUPS_PER_TOKEN)).max(1);
            let larger = |a: f32, &b: &f32| if b > a { b } else { a };
            blocks.clear();
            blocks.extend(maxima.chunks(n_blocks).map(|group| group.iter().fold(f32::NEG_INFINITY, larger)));
            let bound = *blocks.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1;
            self.floor = self.floor.max(bound);
        }
        self.settle().keep_top_k(k);
    }

    /// Keeps the smallest set of best tokens that holds the share `p` of the probability, and at least `min_keep`. `then_min_p` is
    /// the parameter of the `min_p` that comes right after, 0 if none does.
    pub(super) fn keep_top_p(&mut self, p: f32, min_keep: usize, then_min_p: f32) {
        if !self.is_row || self.floor > f32::NEG_INFINITY {
            let candidates = self.settle();
            let total = candidates.weight(candidates.top());
            return candidates.keep_top_p(p, total, min_keep);
        }
        let Scratch { patches, maxima, blocks, candidates } = &mut *self.scratch;
        let row = self.row.patched(patches);
        let total = row.weigh(self.top, candidates.scale, blocks);
        gather_share(row, self.top, f64::from(p) * total, min_keep, then_min_p, maxima, candidates);
        candidates.keep_top_p(p, total, min_keep);
        self.is_row = false;
    }

    /// Keeps tokens at least `p` times as probable as the best, and at least `min_keep`.
    pub(super) fn keep_min_p(&mut self, p: f32, min_keep: usize) {
        if self.is_row {
            let bound = min_p_bound(self.top, p, self.scratch.candidates.scale);
            self.keep_above(bound, min_keep);
        } else {
            self.scratch.candidates.keep_min_p(p, min_keep);
        }
    }

    /// Keeps tokens whose logit is at most `n` standard deviations below the best.
    pub(super) fn keep_top_n_sigma(&mut self, n: f32) {
        let deviation = if self.is_row && self.floor == f32::NEG_INFINITY {
            self.row.patched(&self.scratch.patches).moments(self.top).deviation()
        } else {
            let candidates = self.settle();
            let top = candidates.top();
            let deviation = Moments::of(candidates.list.iter().map(|candidate| candidate.logit), top).deviation();
            self.top = top;
            deviation
        };
        self.keep_above(self.top - n * deviation, 0);
    }

    fn keep_above(&mut self, bound: f32, min_keep: usize) {
        if !self.is_row {
            return self.scratch.candidates.keep_above(bound, min_keep);
        }
        let floor = self.floor;
        self.floor = floor.max(bound);
        if min_keep > 1 && self.settle().list.len() < min_keep {
            (self.is_row, self.floor) = (true, floor);
            self.keep_top_k(min_keep);
        }
    }

    /// Divides the logits; 0 leaves only the best token.
    pub(super) fn heat(&mut self, temperature: f32) {
        let candidates = &mut self.scratch.candidates;
        if temperature > 0.0 {
            candidates.scale = (candidates.scale / temperature).min(f32::MAX);
        } else {
            self.settle().keep_top_k(1);
        }
    }

    /// The best token, the first of several.
    pub(super) fn best(&self) -> Option<TokenId> {
        let Scratch { patches, maxima, candidates, .. } = &*self.scratch;
        if self.is_row {
            return self.row.patched(patches).first_at(self.top, maxima);
        }
        candidates.first_best().map(|best| best.token)
    }

    /// Draws a token with `uniform`, a number from `[0, 1)`. A row that nothing narrowed is never listed.
    pub(super) fn draw(&mut self, uniform: f64) -> Option<TokenId> {
        if self.is_row && self.floor == f32::NEG_INFINITY {
            let Scratch { patches, blocks, candidates, .. } = &mut *self.scratch;
            let row = self.row.patched(patches);
            let total = row.weigh(self.top, candidates.scale, blocks);
            return row.at_weight(uniform * total, self.top, candidates.scale, blocks);
        }
        let candidates = self.settle();
        candidates.draw(uniform).map(|i| candidates.list[i].token)
    }

    /// Keeps the tokens whose surprise, in bits, is at most `most`; the best one always stays. For a field that nothing narrowed.
    pub(super) fn keep_unsurprising(&mut self, most: f64) {
        let Scratch { patches, blocks, candidates, .. } = &mut *self.scratch;
        let total = self.row.patched(patches).weigh(self.top, candidates.scale, blocks);
        let nats_below = most * std::f64::consts::LN_2 - total.ln();
        let bound = f64::from(self.top) - nats_below / f64::from(candidates.scale);
        self.floor = (bound as f32).min(self.top);
    }

    /// The `n` largest logits, largest first, as distances from the best in nats of the draw. For a field that nothing narrowed, which
    /// stays as it is.
    pub(super) fn best_logits(&mut self, n: usize) -> Vec<f32> {
        self.keep_top_k(n);
        self.is_row = true;
        self.floor = f32::NEG_INFINITY;
        let candidates = &self.scratch.candidates;
        let mut logits: Vec<f32> =
            candidates.list.iter().map(|best| (best.logit - self.top) * candidates.scale).collect();
        logits.sort_by(|a, b| b.total_cmp(a));
        logits
    }
}

/// Gathers the best tokens of the row, at least until they weigh `target` and are `min_keep`, or to the bound of the `min_p` that follows.
///
/// Cutting there changes nothing: `min_p` would drop what lies below its bound, and what `top_p` keeps above the bound does
/// not depend on it.
fn gather_share(
    row: Row<'_>,
    top: f32,
    target: f64,
    min_keep: usize,
    then_min_p: f32,
    maxima: &[f32],
    candidates: &mut Candidates,
) {
    /// Above the rounding error of the two sums that are compared; a needless second turn only costs time.
    const MARGIN: f64 = 1.0 + 1e-5;
    /// Nats below the best token at which [`math::weight`](super::math::weight) has reached 0.
    const WEIGHTLESS: f32 = 88.0;

    let scale = candidates.scale;
    let weightless = if min_keep > 1 { f32::NEG_INFINITY } else { top - WEIGHTLESS / scale };
    let floor = min_p_bound(top, then_min_p, scale).max(weightless);
    let mut depth = 3.0;
    loop {
        let bound = if depth < WEIGHTLESS { (top - depth / scale).max(floor) } else { floor };
        row.gather(bound, maxima, &mut candidates.list);
        let is_enough = candidates.list.len() >= min_keep && candidates.weight(top) >= target * MARGIN;
        if bound <= floor || is_enough {
            return;
        }
        depth *= 2.0;
    }
}
