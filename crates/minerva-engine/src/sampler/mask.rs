//! Which tokens a grammar allows next: one bit each.

use crate::request::TokenId;

/// A set of tokens. Whatever is not in it cannot be chosen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenMask {
    /// Bit `i` of block `b` is token `64 b + i`.
    blocks: Vec<u64>,
}

const BLOCK: usize = u64::BITS as usize;

impl TokenMask {
    /// From words of 32 bits, lowest token first.
    pub fn from_words(words: &[u32]) -> Self {
        let block = |pair: &[u32]| u64::from(pair[0]) | pair.get(1).map_or(0, |&high| u64::from(high) << 32);
        Self { blocks: words.chunks(2).map(block).collect() }
    }

    /// Writes the logits of allowed tokens to `masked`, and `-inf` for the others.
    pub(super) fn write(&self, logits: &[f32], masked: &mut Vec<f32>) {
        masked.clear();
        for (i, block) in logits.chunks(BLOCK).enumerate() {
            match self.block(i) {
                u64::MAX => masked.extend_from_slice(block),
                0 => masked.resize(masked.len() + block.len(), f32::NEG_INFINITY),
                allowed => {
                    let logit = |(j, &logit)| if allowed >> j & 1 == 1 { logit } else { f32::NEG_INFINITY };
                    masked.extend(block.iter().enumerate().map(logit));
                }
            }
        }
    }

    /// The allowed tokens of block `i`; none behind the end.
    fn block(&self, i: usize) -> u64 {
        self.blocks.get(i).copied().unwrap_or(0)
    }

    /// Whether it holds no token but some of `tokens`.
    pub fn is_within(&self, tokens: &[TokenId]) -> bool {
        let n_most = tokens.len();
        let mut n_allowed = 0;
        for block in &self.blocks {
            n_allowed += block.count_ones() as usize;
            if n_allowed > n_most {
                return false; // after a few blocks, but for a mask that allows next to nothing
            }
        }
        let mut distinct = tokens.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        distinct.into_iter().filter(|&token| self.allows(token)).count() == n_allowed
    }

    /// Whether `token` is in the set.
    pub fn allows(&self, token: TokenId) -> bool {
        usize::try_from(token).is_ok_and(|token| self.block(token / BLOCK) >> (token % BLOCK) & 1 == 1)
    }
}

impl FromIterator<TokenId> for TokenMask {
    fn from_iter<T: IntoIterator<Item = TokenId>>(tokens: T) -> Self {
        let mut mask = Self::default();
        for token in tokens.into_iter().filter_map(|token| usize::try_from(token).ok()) {
            let n_blocks = mask.blocks.len().max(token / BLOCK + 1);
            mask.blocks.resize(n_blocks, 0);
            mask.blocks[token / BLOCK] |= 1 << (token % BLOCK);
        }
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_32_bits_become_blocks_of_64() {
        let mask = TokenMask::from_words(&[1, 1 << 31, 0b110]);
        let allowed: Vec<TokenId> = (-3..200).filter(|&token| mask.allows(token)).collect();
        assert_eq!(allowed, [0, 63, 65, 66]);
        assert_eq!(mask, [66, 0, 65, 63].into_iter().collect());
    }

    #[test]
    fn a_mask_is_within_tokens_that_cover_it() {
        let mask: TokenMask = [3, 200].into_iter().collect();
        assert!(mask.is_within(&[200, 7, 3, 3]));
        assert!(!mask.is_within(&[3, 7, 3]) && !mask.is_within(&[3]) && !mask.is_within(&[]));
        assert!(TokenMask::default().is_within(&[]));
    }
}
