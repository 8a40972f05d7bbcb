//! How fast a place is, roughly: workloads are cut so that they take about as long on a slow place as on a fast one.

use std::path::Path;

use super::args::Args;
use super::place::{Place, Sizes};
use crate::engine::{Programs, Workload};

/// The first, short look. Its prompts differ from those of every round.
const FIRST: Workload = Workload { n_seq: 1, prompt_tokens: 64, generate_tokens: 8 };
const FIRST_SEED: u32 = 0xffff;

/// Times of one sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Calibration {
    step_s: f64,
    prompt_token_s: f64,
    /// How long a run should take: two that are compared follow one another as closely.
    seconds: f64,
}

impl Calibration {
    /// A turn of the bare loop. It also brings the file into the system's cache.
    pub(super) fn of(model: &Path, place: &Place, args: &Args, programs: Programs<'_>) -> anyhow::Result<Self> {
        let sizes = Sizes { n_seq: 1, context_tokens: FIRST.context_tokens() };
        let beside = place.beside(&place.config(model, sizes, None, args.threads), 0.0, programs)?;
        let sample = beside.bare(FIRST, FIRST_SEED)?;
        Ok(Self {
            step_s: sample.decode_s / sample.decode_tokens as f64,
            prompt_token_s: sample.prefill_s() / f64::from(FIRST.prompt_tokens),
            seconds: if args.quick { 0.2 } else { 0.4 },
        })
    }

    /// Steps that take about the right time, a power of two, so that most runs do the same work.
    pub(super) fn steps(&self, least: u32, most: u32) -> u32 {
        power_of_two(self.seconds / self.step_s, least, most)
    }

    /// Prompt tokens that do.
    pub(super) fn prompt_tokens(&self, least: u32, most: u32) -> u32 {
        power_of_two(self.seconds / self.prompt_token_s, least, most)
    }
}

fn power_of_two(n: f64, least: u32, most: u32) -> u32 {
    let n = n.clamp(f64::from(least), f64::from(most)) as u32;
    1 << n.max(1).ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_a_power_of_two_within_its_bounds() {
        let calibration = Calibration { step_s: 0.009, prompt_token_s: 0.001, seconds: 1.0 };
        assert_eq!((calibration.steps(16, 256), calibration.prompt_tokens(32, 512)), (64, 512));
        let slow = Calibration { step_s: 0.25, ..calibration };
        assert_eq!((slow.steps(16, 256), slow.steps(2, 256)), (16, 4));
        let instant = Calibration { step_s: 0.0, ..calibration };
        assert_eq!(instant.steps(16, 256), 256);
    }
}
