//! How many prompt tokens a step may take while others decode.

use crate::backend::BackendLimits;

/// A step that also decodes should not take longer than this many times a step that only decodes.
const STRETCH: f64 = 2.0;

/// Nor is it worth cutting a prompt so fine that a step takes less than this.
const MIN_STEP_US: f64 = 25_000.0;

/// Weight of the newest measurement.
const LEARN: f64 = 0.2;

/// Prompt tokens per step that are always allowed, so that a prompt gets on however slow the machine is.
const MIN_PREFILL_TOKENS: usize = 16;

/// What steps cost, learned from past ones, and the prompt tokens that fit into the next.
#[derive(Debug)]
pub struct Budget {
    n_batch: usize,
    n_ubatch: usize,
    decode_step_us: f64,
    prefill_token_us: f64,
}

impl Budget {
    pub(super) fn new(limits: BackendLimits) -> Self {
        Self {
            n_batch: limits.n_batch as usize,
            n_ubatch: limits.n_ubatch as usize,
            decode_step_us: 0.0,
            prefill_token_us: 0.0,
        }
    }

    /// Prompt tokens for a step that decodes `n_decode` sequences.
    pub fn prefill_tokens(&self, n_decode: usize) -> usize {
        if n_decode == 0 {
            return self.n_batch;
        }
        if self.prefill_token_us <= 0.0 {
            return self.n_ubatch.min(128); // nothing is known yet
        }
        let step_us = (self.decode_step_us * STRETCH).max(MIN_STEP_US);
        let tokens = (step_us - self.decode_step_us).max(0.0) / self.prefill_token_us;
        (tokens as usize).clamp(MIN_PREFILL_TOKENS, self.n_ubatch.max(MIN_PREFILL_TOKENS))
    }

    /// Learns from a step that was computed.
    pub fn learn(&mut self, n_decode: usize, n_prefill: usize, step_us: u64) {
        let step_us = step_us as f64;
        if n_prefill == 0 {
            blend(&mut self.decode_step_us, step_us);
        } else if n_prefill >= MIN_PREFILL_TOKENS {
            let decode_us = if n_decode == 0 { 0.0 } else { self.decode_step_us };
            blend(&mut self.prefill_token_us, (step_us - decode_us).max(0.0) / n_prefill as f64);
        }
    }
}

fn blend(value: &mut f64, sample: f64) {
    *value = if *value <= 0.0 { sample } else { LEARN.mul_add(sample - *value, *value) };
}
