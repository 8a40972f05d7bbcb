//! The generator behind every random draw: SplitMix64.
//!
//! Its whole state is one `u64`, it gives the same numbers on every platform, and draw `n` of a seed is a pure function of
//! the seed and `n`, so a request resumes in another process from a single number.
//! Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), and Vigna's `splitmix64.c`.

use serde::{Deserialize, Serialize};

/// Weyl step of SplitMix64: 2^64 divided by the golden ratio, made odd.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    /// The seed is mixed first, so that neighbouring seeds start far apart on the one orbit that all seeds share.
    pub(super) fn new(seed: u64) -> Self {
        Self { state: mix(seed) }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STEP);
        mix(self.state)
    }

    /// A uniform draw from `[0, 1)`: the top 53 bits, so every value is exact in an `f64`.
    pub(super) fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_numbers_are_those_of_the_published_splitmix64() {
        let mut rng = SplitMix64 { state: 1_234_567 };
        let numbers: Vec<u64> = (0..5).map(|_| rng.next()).collect();
        // Source: the test vector for seed 1234567 in Rosetta Code, "Pseudo-random numbers/Splitmix64".
        assert_eq!(
            numbers,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423,
                4_593_380_528_125_082_431,
                16_408_922_859_458_223_821
            ]
        );
    }

    #[test]
    fn uniform_draws_lie_in_the_unit_interval_and_average_one_half() {
        let mut rng = SplitMix64::new(7);
        let draws: Vec<f64> = (0..100_000).map(|_| rng.uniform()).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        assert!((mean - 0.5).abs() < 0.005, "mean {mean}");
    }
}
