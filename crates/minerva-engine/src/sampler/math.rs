//! The loops that see every logit of a row: maximum, sum of weights, mean and spread of one block.
//!
//! All are plain Rust that the compiler turns into vector code, and all use IEEE additions and multiplications only, in a
//! fixed order and never fused, so every CPU gets the same bits.

/// Tokens per block; a multiple of [`LANES`]. Small enough that the blocks above a threshold hold little else.
pub(super) const BLOCK: usize = 64;

/// Independent accumulators per loop: one AVX-512 register, two of AVX2, four of NEON.
const LANES: usize = 16;

/// The largest logit of a block, NaN aside: `-inf` if nothing is larger.
pub(super) fn block_max(block: &[f32; BLOCK]) -> f32 {
    fold(lane_maxima(block), |a, b| if a > b { a } else { b })
}

/// Not inlined, as its siblings below: seen together with the fold, the compiler works on pairs of lanes instead of whole registers,
/// with four times as many instructions.
#[inline(never)]
fn lane_maxima(block: &[f32; BLOCK]) -> [f32; LANES] {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in block.as_chunks::<LANES>().0 {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane }; // false for NaN, unlike `f32::max` one instruction
        }
    }
    lanes
}

/// The largest of `values`, NaN aside.
pub(super) fn slice_max(values: &[f32]) -> f32 {
    let (blocks, tail) = values.as_chunks::<BLOCK>();
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let of_tail = tail.iter().copied().fold(f32::NEG_INFINITY, larger);
    blocks.iter().map(block_max).fold(of_tail, larger)
}

/// Sums over some logits, as distances below the largest.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Moments {
    n: f64,
    sum: f64,
    sum_of_squares: f64,
}

impl Moments {
    pub(super) fn add(&mut self, other: Self) {
        self.n += other.n;
        self.sum += other.sum;
        self.sum_of_squares += other.sum_of_squares;
    }

    /// Of a list of finite logits.
    pub(super) fn of(logits: impl Iterator<Item = f32>, top: f32) -> Self {
        logits.fold(Self::default(), |mut moments, logit| {
            let below = f64::from(top) - f64::from(logit);
            moments.add(Self { n: 1.0, sum: below, sum_of_squares: below * below });
            moments
        })
    }

    /// The standard deviation, of all logits and not of a sample.
    pub(super) fn deviation(self) -> f32 {
        let mean = self.sum / self.n;
        (self.sum_of_squares / self.n - mean * mean).max(0.0).sqrt() as f32
    }
}

/// The moments of a block's logits, `-inf` and NaN aside. Within the block the sums are `f32`.
pub(super) fn block_moments(block: &[f32; BLOCK], top: f32) -> Moments {
    let (mut n, mut sum, mut squares) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    for chunk in block.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            let is_possible = chunk[i] > f32::NEG_INFINITY;
            let below = if is_possible { top - chunk[i] } else { 0.0 };
            n[i] += if is_possible { 1.0 } else { 0.0 };
            sum[i] += below;
            squares[i] += below * below;
        }
    }
    let total = |lanes| f64::from(fold(lanes, |a, b| a + b));
    Moments { n: total(n), sum: total(sum), sum_of_squares: total(squares) }
}

/// The sum of [`weight`] over a block.
pub(super) fn block_weight(block: &[f32; BLOCK], top: f32, scale: f32) -> f32 {
    fold(lane_weights(block, top, scale), |a, b| a + b)
}

#[inline(never)]
fn lane_weights(block: &[f32; BLOCK], top: f32, scale: f32) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    for chunk in block.as_chunks::<LANES>().0 {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += weight(x, top, scale);
        }
    }
    lanes
}

/// Combines the lanes pairwise, the upper half onto the lower.
fn fold(mut lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] = combine(lanes[i], lanes[i + width]);
        }
    }
    lanes[0]
}

/// `exp((logit - top) * scale)` for `logit <= top` and `scale > 0`; 0 for NaN, `-inf`, and where an `f32` would be
/// subnormal. At most 2 units in the last place off.
///
/// `2^n * exp(r)` with `n` whole and `|r| <= ln(2) / 2`. Source of the polynomial and of the split of ln 2: `expf` in the
/// Cephes library.
pub(super) fn weight(logit: f32, top: f32, scale: f32) -> f32 {
    /// Adding and subtracting this rounds to a whole number, which then stands in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    /// Just above the logarithm of the smallest normal `f32`.
    const LOWEST: f32 = -87.3;

    let x = (logit - top) * scale;
    let is_normal = x > LOWEST;
    let x = if is_normal { x } else { LOWEST };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut y = 1.987_569_1e-4;
    y = y * r + 1.398_199_9e-3;
    y = y * r + 8.333_452e-3;
    y = y * r + 4.166_579_6e-2;
    y = y * r + 1.666_666_5e-1;
    y = y * r + 0.5;
    let exp_r = y * r * r + r + 1.0;
    let exponent = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    if is_normal { exp_r * f32::from_bits(exponent) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_the_exponential_to_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for i in 0..2_000_000 {
            let x = -87.2 * (i as f32) / 2_000_000.0;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(weight(x, 0.0, 1.0)) / exact - 1.0).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "relative error {worst:e}");
    }

    #[test]
    fn the_best_token_weighs_one_and_what_cannot_be_drawn_weighs_nothing() {
        assert_eq!(weight(3.5, 3.5, f32::MAX).to_bits(), 1.0_f32.to_bits());
        for x in [f32::NAN, f32::NEG_INFINITY, -f32::MAX, -1e4] {
            assert_eq!(weight(x, 10.0, 1.0).to_bits(), 0.0_f32.to_bits(), "{x}");
            assert_eq!(weight(x, f32::MAX, f32::MAX).to_bits(), 0.0_f32.to_bits(), "{x}");
        }
    }

    #[test]
    fn a_block_of_nothing_has_maximum_minus_infinity_and_nan_is_skipped() {
        let mut block = [f32::NAN; BLOCK];
        assert_eq!(block_max(&block).to_bits(), f32::NEG_INFINITY.to_bits());
        block[17] = -2.0;
        block[63] = -1.0;
        assert_eq!(block_max(&block).to_bits(), (-1.0_f32).to_bits());
        let expected = 1.0 + weight(-2.0, -1.0, 1.0);
        assert_eq!(block_weight(&block, -1.0, 1.0).to_bits(), expected.to_bits());
    }
}
