//! How many prompt tokens a step may take while others decode.

use super::cost::{Costs, MIN_PREFILL_TOKENS, Work};
use crate::backend::BackendLimits;

/// Time for prompts in a step, as a multiple of the time that its decoding takes: the gap between two tokens of a stream is to stay
/// below three times what it is alone, and what prediction misses has to fit as well.
const STRETCH: f64 = 1.5;

/// Nor is it worth cutting a prompt so fine that a step takes less than this.
const MIN_STEP_US: f64 = 25_000.0;

/// A step in which nobody decodes takes about this at most, or one `n_ubatch`: a request that comes in its midst waits for its end.
const MAX_PROMPT_STEP_US: f64 = 250_000.0;

/// Prompt tokens per step while nothing is known yet.
const FIRST_PREFILL_TOKENS: usize = 128;

/// What decides about the prompt tokens of a step.
#[derive(Debug, Clone, Copy, Default)]
pub struct Demand {
    /// Sequences that get one token.
    pub n_decode: usize,
    /// Cells of all of these.
    pub n_decode_cells: u64,
    /// Prompts that are not computed yet.
    pub n_prompts: usize,
    /// The place at which the first of them goes on.
    pub prefill_pos: u32,
    /// The longest that the step may take, if somebody who decodes said so.
    pub max_itl_us: Option<u64>,
}

/// What steps cost, and the prompt tokens that fit into the next.
#[derive(Debug)]
pub struct Budget {
    n_batch: usize,
    n_ubatch: usize,
    costs: Costs,
}

impl Budget {
    pub(super) fn new(limits: BackendLimits) -> Self {
        Self { n_batch: limits.n_batch as usize, n_ubatch: limits.n_ubatch as usize, costs: Costs::default() }
    }

    /// Prompt tokens for the next step.
    ///
    /// Prompt tokens hold up those who decode, decoding holds up those who wait for their first token: whoever is more
    /// decides, unless somebody set a limit. A burst of prompts is taken one `n_ubatch` at a time; a prompt beside many
    /// streams gets what they can spare.
    pub fn prefill_tokens(&self, demand: Demand) -> usize {
        let token_us = self.costs.prefill_token_us(f64::from(demand.prefill_pos));
        let within = |us: f64, token_us: f64| (us.max(0.0) / token_us) as usize;
        if demand.n_decode == 0 {
            let affordable = token_us.map_or(self.n_ubatch, |token_us| within(MAX_PROMPT_STEP_US, token_us));
            // Whole pieces of what the device computes at once.
            return (affordable / self.n_ubatch.max(1) * self.n_ubatch)
                .clamp(self.n_ubatch.min(self.n_batch), self.n_batch);
        }
        if demand.max_itl_us.is_none() && demand.n_prompts > demand.n_decode {
            return self.n_ubatch;
        }
        let Some(token_us) = token_us else { return self.n_ubatch.min(FIRST_PREFILL_TOKENS) };
        // With prompts in every step nobody ever learns what decoding takes. Taken for too quick, it leaves prompts too little time, so
        // there are prompts in every step: one without them ends this.
        if self.costs.decode_is_unknown(demand.n_decode) {
            return 0;
        }
        let decode_us = self.costs.decode_us(demand.n_decode, demand.n_decode_cells);
        let prefill_us = match demand.max_itl_us {
            Some(max_itl_us) => max_itl_us as f64 - decode_us,
            None => (decode_us * STRETCH).max(MIN_STEP_US - decode_us),
        };
        // A prompt gets on however slow the machine is.
        within(prefill_us, token_us).clamp(MIN_PREFILL_TOKENS, self.n_ubatch.max(MIN_PREFILL_TOKENS))
    }

    /// What steps cost.
    pub(super) fn costs(&self) -> &Costs {
        &self.costs
    }

    pub(super) fn costs_mut(&mut self) -> &mut Costs {
        &mut self.costs
    }

    /// Learns from a step that was computed.
    pub fn learn(&mut self, work: Work, step_us: u64) {
        self.costs.learn(work, step_us);
    }

    /// What a prompt takes.
    pub(super) fn prompt_cost(&self) -> PromptCost {
        let at = |pos| self.costs.prefill_token_us(pos).unwrap_or(0.0);
        PromptCost { first_us: at(0.0), slope_us: (at(SLOPE_TOKENS) - at(0.0)) / SLOPE_TOKENS }
    }
}

/// Places between which the slope of a prompt's cost is taken, in tokens.
const SLOPE_TOKENS: f64 = 1024.0;

/// What a prompt takes to compute: its first token, and what each further place adds to a token, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct PromptCost {
    first_us: f64,
    slope_us: f64,
}

impl PromptCost {
    /// The time for a prompt of so many tokens, in microseconds; `None` while nothing is known.
    pub(super) fn of(self, n_tokens: usize) -> Option<f64> {
        let n_tokens = n_tokens as f64;
        (self.first_us > 0.0).then(|| n_tokens * (self.first_us + self.slope_us * n_tokens / 2.0))
    }

    /// What bytes that save computing so many tokens are worth, after so many uses of others since their own last one: time saved per
    /// byte and age. Only comparisons mean anything.
    pub(super) fn worth(self, n_tokens: usize, n_bytes: u64, age: u64) -> f64 {
        let saved = self.of(n_tokens).unwrap_or(n_tokens as f64);
        saved / (n_bytes.max(1) as f64 * age.max(1) as f64)
    }
}
