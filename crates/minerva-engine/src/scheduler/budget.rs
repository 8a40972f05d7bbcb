//! How many prompt tokens a step may take while others decode.

use crate::backend::BackendLimits;

/// Time for prompts in a step, as a multiple of the time that its decoding takes: the gap between two tokens of a stream is
/// then at most three times what it is alone.
const STRETCH: f64 = 2.0;

/// Nor is it worth cutting a prompt so fine that a step takes less than this.
const MIN_STEP_US: f64 = 25_000.0;

/// Weight of the newest measurement.
const LEARN: f64 = 0.2;

/// Prompt tokens per step that are always allowed, so that a prompt gets on however slow the machine is.
const MIN_PREFILL_TOKENS: usize = 16;

/// Prompt tokens per step while nothing is known yet.
const FIRST_PREFILL_TOKENS: usize = 128;

/// What steps cost, learned from past ones, and the prompt tokens that fit into the next.
#[derive(Debug)]
pub struct Budget {
    n_batch: usize,
    n_ubatch: usize,
    /// Time of a step that only decodes, by the logarithm of its number of sequences; 0 where unknown.
    decode_us: [f64; 16],
    prefill_token_us: f64,
}

impl Budget {
    pub(super) fn new(limits: BackendLimits) -> Self {
        Self {
            n_batch: limits.n_batch as usize,
            n_ubatch: limits.n_ubatch as usize,
            decode_us: [0.0; 16],
            prefill_token_us: 0.0,
        }
    }

    /// Prompt tokens for a step that decodes `n_decode` sequences while `n_prompts` prompts are not done.
    ///
    /// Prompt tokens hold up those who decode, decoding holds up those who wait for their first token: whoever is more
    /// decides. A burst of prompts is taken one `n_ubatch` at a time; a prompt beside many streams gets what they can spare.
    pub fn prefill_tokens(&self, n_decode: usize, n_prompts: usize) -> usize {
        if n_decode == 0 {
            return self.n_batch;
        }
        if n_prompts > n_decode {
            return self.n_ubatch;
        }
        if self.prefill_token_us <= 0.0 {
            return self.n_ubatch.min(FIRST_PREFILL_TOKENS);
        }
        let decode_us = self.decode_step_us(n_decode);
        let prefill_us = (decode_us * STRETCH).max(MIN_STEP_US - decode_us);
        let tokens = prefill_us / self.prefill_token_us;
        (tokens as usize).clamp(MIN_PREFILL_TOKENS, self.n_ubatch.max(MIN_PREFILL_TOKENS))
    }

    /// Learns from a step that was computed.
    pub fn learn(&mut self, n_decode: usize, n_prefill: usize, step_us: u64) {
        let step_us = step_us as f64;
        if n_prefill == 0 {
            blend(&mut self.decode_us[bucket(n_decode)], step_us);
        } else if n_prefill >= MIN_PREFILL_TOKENS {
            let decode_us = if n_decode == 0 { 0.0 } else { self.decode_step_us(n_decode) };
            blend(&mut self.prefill_token_us, (step_us - decode_us).max(0.0) / n_prefill as f64);
        }
    }

    /// The time of a step that decodes `n_decode` sequences: of the nearest number that was measured, fewer before more.
    fn decode_step_us(&self, n_decode: usize) -> f64 {
        let at = bucket(n_decode);
        let known = |us: &&f64| **us > 0.0;
        self.decode_us[..=at]
            .iter()
            .rev()
            .find(known)
            .or_else(|| self.decode_us[at..].iter().find(known))
            .map_or(0.0, |&us| us)
    }
}

fn bucket(n_decode: usize) -> usize {
    (n_decode.max(1).ilog2() as usize).min(15)
}

fn blend(value: &mut f64, sample: f64) {
    *value = if *value <= 0.0 { sample } else { LEARN.mul_add(sample - *value, *value) };
}
