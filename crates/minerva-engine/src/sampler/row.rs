//! One row of logits, read in blocks: the only part of the sampler that sees the whole vocabulary.
//!
//! A pass over the row notes the maximum of each block. From then on a filter that needs "all tokens from this logit up"
//! visits only the blocks whose maximum reaches it, which for real models are a few dozen.

use super::candidates::Candidate;
use super::math::{BLOCK, Moments, block_max, block_moments, block_weight, slice_max, weight};
use crate::request::TokenId;

/// A token whose logit is not the model's own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Patch {
    pub(super) token: usize,
    pub(super) logit: f32,
}

/// The model's logits with `patches`, sorted by token, laid over them. NaN counts as `-inf` throughout.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    logits: &'a [f32],
    patches: &'a [Patch],
}

impl<'a> Row<'a> {
    pub(super) fn new(logits: &'a [f32], patches: &'a [Patch]) -> Self {
        Self { logits, patches }
    }

    /// Writes the maximum of each block to `maxima` and returns the largest.
    pub(super) fn find_maxima(self, maxima: &mut Vec<f32>) -> f32 {
        maxima.clear();
        // Straight over the logits, then once more over the few blocks that are not as they stand there.
        let (full, tail) = self.logits.as_chunks::<BLOCK>();
        maxima.extend(full.iter().map(block_max));
        if !tail.is_empty() {
            maxima.push(block_max(&self.patched_block(full.len(), &[])));
        }
        self.refresh_maxima(self.patches, maxima)
    }

    /// Writes the maxima anew of the blocks that have a token of `touched`, sorted by token, and returns the largest of all.
    pub(super) fn refresh_maxima(self, mut touched: &[Patch], maxima: &mut [f32]) -> f32 {
        while let Some(first) = touched.first() {
            let i = first.token / BLOCK;
            let n_here = touched.iter().take_while(|patch| patch.token / BLOCK == i).count();
            touched = &touched[n_here..];
            let start = self.patches.partition_point(|patch| patch.token / BLOCK < i);
            let here = self.patches[start..].iter().take_while(|patch| patch.token / BLOCK == i).count();
            maxima[i] = block_max(&self.patched_block(i, &self.patches[start..start + here]));
        }
        slice_max(maxima)
    }

    /// Number, mean and spread of the logits that are not `-inf`. The distances are from `top`, the largest.
    pub(super) fn moments(self, top: f32) -> Moments {
        let mut moments = Moments::default();
        self.for_each_block(|_| true, |_, block| moments.add(block_moments(block, top)));
        moments
    }

    /// The first token whose logit is `top`, the largest of `maxima`.
    pub(super) fn first_at(self, top: f32, maxima: &[f32]) -> Option<TokenId> {
        let best_block = maxima.iter().position(|max| *max >= top)?;
        let mut found = None;
        self.for_each_block(
            |i| i == best_block,
            |start, block| found = block.iter().position(|x| *x >= top).map(|i| (start + i) as TokenId),
        );
        found
    }

    /// Collects the tokens with a logit of at least `bound`, by ascending id; those at `-inf` never.
    pub(super) fn gather(self, bound: f32, maxima: &[f32], candidates: &mut Vec<Candidate>) {
        candidates.clear();
        let bound = bound.max(f32::MIN);
        self.for_each_block(
            |i| maxima[i] >= bound,
            |start, block| {
                for (i, &logit) in block.iter().enumerate() {
                    if logit >= bound {
                        candidates.push(Candidate { token: (start + i) as TokenId, logit });
                    }
                }
            },
        );
    }

    /// The sum of `exp((logit - top) * scale)` over the row; each block's share goes to `shares`.
    ///
    /// Within a block the sum is an `f32`, across blocks an `f64`, so that 256k small terms do not drown in the big ones.
    pub(super) fn weigh(self, top: f32, scale: f32, shares: &mut Vec<f32>) -> f64 {
        shares.clear();
        let mut total = 0.0;
        self.for_each_block(
            |_| true,
            |_, block| {
                let share = block_weight(block, top, scale);
                shares.push(share);
                total += f64::from(share);
            },
        );
        total
    }

    /// The token at which the running sum of weights passes `target`, a number from 0 up to what [`weigh`](Self::weigh)
    /// returned for the same `top` and `scale`.
    pub(super) fn at_weight(self, target: f64, top: f32, scale: f32, shares: &[f32]) -> Option<TokenId> {
        let mut passed = 0.0;
        let mut last = None; // the last block with any weight, for a target that rounding puts at the very end
        for (i, share) in shares.iter().enumerate().filter(|(_, share)| **share > 0.0) {
            last = Some((i, passed));
            passed += f64::from(*share);
            if passed > target {
                break;
            }
        }
        let (drawn_block, mut passed) = last?;
        let mut drawn = None;
        self.for_each_block(
            |i| i == drawn_block,
            |start, block| {
                for (i, &logit) in block.iter().enumerate() {
                    let weight = weight(logit, top, scale);
                    if weight > 0.0 && passed <= target {
                        drawn = Some((start + i) as TokenId);
                        passed += f64::from(weight);
                    }
                }
            },
        );
        drawn
    }

    /// Calls `visit` with the first token and the patched logits of each block that is `wanted`, in order. The last block
    /// is filled up with `-inf`. Only blocks with a patch in them, and the last, are copied.
    fn for_each_block(self, wanted: impl Fn(usize) -> bool, mut visit: impl FnMut(usize, &[f32; BLOCK])) {
        let full = self.logits.as_chunks::<BLOCK>().0;
        let mut patches = self.patches;
        for i in 0..self.logits.len().div_ceil(BLOCK) {
            let start = i * BLOCK;
            let n_here = patches.iter().take_while(|patch| patch.token < start + BLOCK).count();
            let (here, later) = patches.split_at(n_here);
            patches = later;
            if !wanted(i) {
                continue;
            }
            match full.get(i) {
                Some(block) if here.is_empty() => visit(start, block),
                _ => visit(start, &self.patched_block(i, here)),
            }
        }
    }

    /// Block `i` with its patches, `here`, and filled up with `-inf`.
    fn patched_block(self, i: usize, here: &[Patch]) -> [f32; BLOCK] {
        let start = i * BLOCK;
        let source = &self.logits[start..self.logits.len().min(start + BLOCK)];
        let mut copy = [f32::NEG_INFINITY; BLOCK];
        copy[..source.len()].copy_from_slice(source);
        for patch in here {
            copy[patch.token - start] = patch.logit;
        }
        copy
    }
}
