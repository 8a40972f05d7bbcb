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
    pub(super) fn new(logits: &'a [f32]) -> Self {
        Self { logits, patches: &[] }
    }

    /// The row with these patches instead of its own.
    pub(super) fn patched<'b>(self, patches: &'b [Patch]) -> Row<'b>
    where
        'a: 'b,
    {
        Row { patches, ..self }
    }

    pub(super) fn len(self) -> usize {
        self.logits.len()
    }

    /// The model's own logit of a token.
    pub(super) fn unpatched(self, token: usize) -> f32 {
        self.logits[token]
    }

    /// Writes the maximum of each block to `maxima` and returns the largest.
    pub(super) fn find_maxima(self, maxima: &mut Vec<f32>) -> f32 {
        maxima.resize(self.logits.len().div_ceil(BLOCK), 0.0);
        let mut slots = maxima.iter_mut();
        self.for_each_block(|block| {
            if let Some(slot) = slots.next() {
                *slot = block_max(block);
            }
        });
        slice_max(maxima)
    }

    /// Writes the maxima anew of the blocks that have a token of `touched`, sorted by token, and returns the largest of all.
    pub(super) fn refresh_maxima(self, mut touched: &[Patch], maxima: &mut [f32]) -> f32 {
        let mut copy = [0.0; BLOCK];
        while let Some(first) = touched.first() {
            let i = first.token / BLOCK;
            let n_here = touched.iter().take_while(|patch| patch.token / BLOCK == i).count();
            touched = &touched[n_here..];
            maxima[i] = block_max(self.block(i, self.patches_in(i), &mut copy));
        }
        slice_max(maxima)
    }

    /// Number, mean and spread of the logits that are not `-inf`. The distances are from `top`, the largest.
    pub(super) fn moments(self, top: f32) -> Moments {
        let mut moments = Moments::default();
        self.for_each_block(|block| moments.add(block_moments(block, top)));
        moments
    }

    /// The first token whose logit is `top`, the largest of `maxima`.
    pub(super) fn first_at(self, top: f32, maxima: &[f32]) -> Option<TokenId> {
        let i = maxima.iter().position(|max| *max >= top)?;
        let mut copy = [0.0; BLOCK];
        let at = self.block(i, self.patches_in(i), &mut copy).iter().position(|x| *x >= top)?;
        Some((i * BLOCK + at) as TokenId)
    }

    /// Collects the tokens with a logit of at least `bound`, by ascending id; those at `-inf` never.
    pub(super) fn gather(self, bound: f32, maxima: &[f32], candidates: &mut Vec<Candidate>) {
        candidates.clear();
        let bound = bound.max(f32::MIN);
        let mut copy = [0.0; BLOCK];
        for (i, _) in maxima.iter().enumerate().filter(|(_, max)| **max >= bound) {
            for (at, &logit) in self.block(i, self.patches_in(i), &mut copy).iter().enumerate() {
                if logit >= bound {
                    candidates.push(Candidate { token: (i * BLOCK + at) as TokenId, logit });
                }
            }
        }
    }

    /// The sum of `exp((logit - top) * scale)` over the row; each block's share goes to `shares`.
    ///
    /// Within a block the sum is an `f32`, across blocks an `f64`, so that 256k small terms do not drown in the big ones.
    pub(super) fn weigh(self, top: f32, scale: f32, shares: &mut Vec<f32>) -> f64 {
        shares.clear();
        let mut total = 0.0;
        self.for_each_block(|block| {
            let share = block_weight(block, top, scale);
            shares.push(share);
            total += f64::from(share);
        });
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
        let (i, mut passed) = last?;
        let mut copy = [0.0; BLOCK];
        let mut drawn = None;
        for (at, &logit) in self.block(i, self.patches_in(i), &mut copy).iter().enumerate() {
            let weight = weight(logit, top, scale);
            if weight > 0.0 && passed <= target {
                drawn = Some((i * BLOCK + at) as TokenId);
                passed += f64::from(weight);
            }
        }
        drawn
    }

    /// Calls `visit` with the patched logits of each block, in order.
    fn for_each_block(self, mut visit: impl FnMut(&[f32; BLOCK])) {
        let (full, tail) = self.logits.as_chunks::<BLOCK>();
        let mut copy = [0.0; BLOCK];
        let mut n_seen = 0;
        // From patch to patch, straight over what lies between.
        let mut patches = self.patches;
        while let Some(first) = patches.first() {
            let i = first.token / BLOCK;
            full[n_seen..i].iter().for_each(&mut visit);
            let (here, later) = patches.split_at(patches.partition_point(|patch| patch.token / BLOCK == i));
            visit(self.block(i, here, &mut copy));
            (patches, n_seen) = (later, i + 1);
        }
        full[n_seen.min(full.len())..].iter().for_each(&mut visit);
        if !tail.is_empty() && n_seen <= full.len() {
            visit(self.block(full.len(), &[], &mut copy));
        }
    }

    /// The patches of block `i`.
    fn patches_in(self, i: usize) -> &'a [Patch] {
        let start = self.patches.partition_point(|patch| patch.token / BLOCK < i);
        let rest = &self.patches[start..];
        &rest[..rest.partition_point(|patch| patch.token / BLOCK == i)]
    }

    /// Block `i` with its patches, `here`; the last block is filled up with `-inf`. Only blocks that are not as they stand in the row
    /// are written to `copy`.
    fn block<'b>(self, i: usize, here: &[Patch], copy: &'b mut [f32; BLOCK]) -> &'b [f32; BLOCK]
    where
        'a: 'b,
    {
        match self.logits.as_chunks().0.get(i) {
            Some(block) if here.is_empty() => block,
            _ => {
                let start = i * BLOCK;
                let source = &self.logits[start..self.logits.len().min(start + BLOCK)];
                *copy = [f32::NEG_INFINITY; BLOCK];
                copy[..source.len()].copy_from_slice(source);
                for patch in here {
                    copy[patch.token - start] = patch.logit;
                }
                copy
            }
        }
    }
}
