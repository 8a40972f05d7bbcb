//! What a request may ask of the sampler, and the check that every request passes before it is admitted.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::stage::SamplerStage;
use crate::request::TokenId;

/// The largest window of the penalties and of DRY; -1 means this many tokens, so the whole context of any model we know.
pub const MAX_REPEAT_LAST_N: i32 = 1 << 20;

/// The most stages of a custom order; a stage may come twice.
const MAX_SAMPLERS: usize = 32;

/// The most texts that end a repetition for DRY.
const MAX_DRY_BREAKERS: usize = 16;

/// The longest of them, in bytes. Source: `llama_sampler_init_dry` at the pinned commit, which cuts longer ones.
const MAX_DRY_BREAKER_BYTES: usize = 40;

/// A logit bias at or below this bans the token outright, as OpenAI's documentation promises for -100.
pub const BAN_BIAS: f32 = -100.0;

/// How the next token is chosen from the logits. The defaults are llama-server's.
///
/// `logit_bias` comes first, then the stages of [`samplers`](Self::samplers) in their order, then the draw. A temperature of 0 takes
/// the best token of those that are left when its stage comes. `mirostat` replaces all stages but `temperature`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// Divides the logits before the draw: 0 is greedy, 1 leaves the model's distribution as it is.
    pub temperature: f32,
    /// Keep the `top_k` best tokens; 0 and -1 keep all.
    pub top_k: i32,
    /// Keep the smallest set of best tokens that holds this much probability; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this probable relative to the best one; 0 keeps all.
    pub min_p: f32,
    /// Keep the tokens whose surprise is closest to the entropy, up to this much probability; 1 keeps all.
    pub typical_p: f32,
    /// Divides the positive and multiplies the other logits of tokens in the window; 1 is off.
    pub repeat_penalty: f32,
    /// Length of the window of the three penalties, in tokens: 0 is off, -1 is the whole context.
    pub repeat_last_n: i32,
    /// Subtracted from a token's logit once per occurrence in the window.
    pub frequency_penalty: f32,
    /// Subtracted from a token's logit once if the window has it at all.
    pub presence_penalty: f32,
    /// Keep the tokens whose logit is at most this many standard deviations of all logits below the best; 0 and less keep all.
    pub top_n_sigma: f32,
    /// The fewest tokens that `top_p`, `typical_p`, `min_p` and XTC may leave; 0 and 1 are the same.
    pub min_keep: u32,
    /// How often XTC removes the likeliest tokens; 0 is never.
    pub xtc_probability: f32,
    /// XTC removes the tokens at least this probable, except for the least probable of them; above 0.5 it is off.
    pub xtc_threshold: f32,
    /// The temperature moves by so much up or down with the entropy of the tokens that are left; 0 is off.
    pub dynatemp_range: f32,
    /// The power of the entropy's share of its maximum with which the temperature moves.
    pub dynatemp_exponent: f32,
    /// Factor of DRY's penalty; 0 is off.
    pub dry_multiplier: f32,
    /// Base of DRY's penalty, to the power of how much longer a repetition is than `dry_allowed_length`.
    pub dry_base: f32,
    /// The longest repetition that DRY lets pass, in tokens.
    pub dry_allowed_length: i32,
    /// Tokens in which DRY looks for repetitions: 0 is off, -1 is the whole context.
    pub dry_penalty_last_n: i32,
    /// Texts that end a repetition for DRY.
    pub dry_sequence_breakers: Vec<String>,
    /// 1 and 2 are the versions of Mirostat, which replaces all stages but `temperature`; 0 is off.
    pub mirostat: u8,
    /// The surprise per token that Mirostat aims for, in bits.
    pub mirostat_tau: f32,
    /// How fast Mirostat corrects itself.
    pub mirostat_eta: f32,
    /// The probability near which adaptive-p draws; below 0 it draws as usual. Needs `adaptive_p` in `samplers`.
    pub adaptive_target: f32,
    /// How slowly adaptive-p forgets what it has drawn.
    pub adaptive_decay: f32,
    /// The stages and their order. What is not in it does not happen, the temperature included.
    pub samplers: Vec<SamplerStage>,
    /// Added to the logits of single tokens; several entries for one token add up. -100 and below, `-inf` too, is a ban.
    /// Written as `null` where it is `-inf`, since JSON has no infinity.
    #[serde(with = "bias_or_null")]
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Seed of the draws; `None` leaves the choice to the engine.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    /// Source: `common_params_sampling` in llama.cpp's `common/common.h` at the pinned commit.
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            top_n_sigma: -1.0,
            min_keep: 0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            dynatemp_range: 0.0,
            dynatemp_exponent: 1.0,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_penalty_last_n: 64,
            dry_sequence_breakers: ["\n", ":", "\"", "*"].map(str::to_owned).into(),
            mirostat: 0,
            mirostat_tau: 5.0,
            mirostat_eta: 0.1,
            adaptive_target: -1.0,
            adaptive_decay: 0.9,
            samplers: SamplerStage::DEFAULT_ORDER.into(),
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

impl SamplingParams {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks every value against its range, for a vocabulary of `n_vocab` tokens.
    ///
    /// # Errors
    /// The first parameter that is NaN, infinite, out of range, or names a token that does not exist.
    pub fn validate(&self, n_vocab: usize) -> Result<(), InvalidParam> {
        within("temperature", self.temperature, 0.0..=100.0)?;
        within("top_k", self.top_k, -1..=i32::MAX)?;
        within("top_p", self.top_p, 0.0..=1.0)?;
        within("min_p", self.min_p, 0.0..=1.0)?;
        within("typical_p", self.typical_p, 0.0..=1.0)?;
        within("repeat_penalty", self.repeat_penalty, 0.01..=100.0)?;
        within("repeat_last_n", self.repeat_last_n, -1..=MAX_REPEAT_LAST_N)?;
        within("frequency_penalty", self.frequency_penalty, -100.0..=100.0)?;
        within("presence_penalty", self.presence_penalty, -100.0..=100.0)?;
        within("top_n_sigma", self.top_n_sigma, -1.0..=1000.0)?;
        within("min_keep", self.min_keep, 0..=i32::MAX as u32)?;
        within("xtc_probability", self.xtc_probability, 0.0..=1.0)?;
        within("xtc_threshold", self.xtc_threshold, 0.0..=1.0)?;
        within("dynatemp_range", self.dynatemp_range, 0.0..=100.0)?;
        within("dynatemp_exponent", self.dynatemp_exponent, 0.0..=100.0)?;
        within("dry_multiplier", self.dry_multiplier, 0.0..=1000.0)?;
        within("dry_base", self.dry_base, 1.0..=1000.0)?;
        within("dry_allowed_length", self.dry_allowed_length, 0..=i32::MAX)?;
        within("dry_penalty_last_n", self.dry_penalty_last_n, -1..=MAX_REPEAT_LAST_N)?;
        within("mirostat", self.mirostat, 0..=2)?;
        within("mirostat_tau", self.mirostat_tau, 0.0..=100.0)?;
        within("mirostat_eta", self.mirostat_eta, 0.0..=10.0)?;
        within("adaptive_target", self.adaptive_target, -1.0..=1.0)?;
        within("adaptive_decay", self.adaptive_decay, 0.0..=0.99)?;
        self.validate_lists()?;
        if self.logit_bias.len() > n_vocab {
            let given = format!("{} entries", self.logit_bias.len());
            return Err(InvalidParam::new("logit_bias", given, format!("at most {n_vocab} entries")));
        }
        for &(token, bias) in &self.logit_bias {
            if usize::try_from(token).is_ok_and(|token| token < n_vocab) {
                within("logit_bias", bias, f32::NEG_INFINITY..=100.0)?;
            } else {
                let allowed = format!("keyed by token ids below {n_vocab}");
                return Err(InvalidParam::new("logit_bias", token, allowed));
            }
        }
        Ok(())
    }

    fn validate_lists(&self) -> Result<(), InvalidParam> {
        if self.samplers.len() > MAX_SAMPLERS {
            let given = format!("{} stages", self.samplers.len());
            return Err(InvalidParam::new("samplers", given, format!("at most {MAX_SAMPLERS} stages")));
        }
        let breakers = &self.dry_sequence_breakers;
        if breakers.len() > MAX_DRY_BREAKERS {
            let (given, allowed) = (format!("{} texts", breakers.len()), format!("at most {MAX_DRY_BREAKERS} texts"));
            return Err(InvalidParam::new("dry_sequence_breakers", given, allowed));
        }
        if let Some(text) = breakers.iter().find(|text| !(1..=MAX_DRY_BREAKER_BYTES).contains(&text.len())) {
            let given = format!("one of {} bytes", text.len());
            let allowed = format!("texts of 1 to {MAX_DRY_BREAKER_BYTES} bytes");
            return Err(InvalidParam::new("dry_sequence_breakers", given, allowed));
        }
        Ok(())
    }

    /// Whether the stage is in the order, and the order counts.
    fn has(&self, stage: SamplerStage) -> bool {
        self.mirostat == 0 && self.samplers.contains(&stage)
    }

    /// Whether DRY can change any logit; without it no window is kept and no breakers are needed.
    pub(crate) fn has_dry(&self) -> bool {
        self.has(SamplerStage::Dry) && self.dry_multiplier != 0.0 && self.dry_penalty_last_n != 0
    }

    /// Whether the penalties can change any logit; without them no window is kept.
    pub(super) fn has_penalties(&self) -> bool {
        let penalties = (self.repeat_penalty, self.frequency_penalty, self.presence_penalty);
        self.has(SamplerStage::Penalties) && penalties != (1.0, 0.0, 0.0) && self.repeat_last_n != 0
    }
}

/// The length of a window that a request gives as `last_n`.
pub(super) fn window_tokens(last_n: i32) -> usize {
    usize::try_from(last_n).unwrap_or(MAX_REPEAT_LAST_N as usize)
}

/// A request parameter outside its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{param}` must be {allowed}, got {given}")]
pub struct InvalidParam {
    /// Name of the parameter, as in the request.
    pub param: &'static str,
    /// The value that the request has.
    pub given: String,
    /// What is allowed, to be read after "must be".
    pub allowed: String,
}

impl InvalidParam {
    pub(crate) fn new(param: &'static str, given: impl Display, allowed: impl Into<String>) -> Self {
        Self { param, given: given.to_string(), allowed: allowed.into() }
    }
}

/// NaN compares with nothing, so it is in no range.
fn within<T: PartialOrd + Display>(
    param: &'static str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), InvalidParam> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(InvalidParam::new(param, value, format!("between {} and {}", range.start(), range.end())))
}

/// JSON has no infinity, so a bias of `-inf` travels as `null`, in every format.
mod bias_or_null {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::TokenId;

    pub(super) fn serialize<S: Serializer>(bias: &[(TokenId, f32)], serializer: S) -> Result<S::Ok, S::Error> {
        let finite = |&(token, bias): &(TokenId, f32)| (token, Some(bias).filter(|bias| *bias != f32::NEG_INFINITY));
        bias.iter().map(finite).collect::<Vec<_>>().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(TokenId, f32)>, D::Error> {
        let bias = Vec::<(TokenId, Option<f32>)>::deserialize(deserializer)?;
        Ok(bias.into_iter().map(|(token, bias)| (token, bias.unwrap_or(f32::NEG_INFINITY))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(params: &SamplingParams) -> String {
        params.validate(10).expect_err("must be rejected").to_string()
    }

    #[test]
    fn defaults_and_the_edges_of_every_range_are_valid() {
        let edges = SamplingParams {
            top_k: -1,
            top_p: 0.0,
            min_p: 1.0,
            typical_p: 0.0,
            repeat_last_n: -1,
            logit_bias: vec![(0, f32::NEG_INFINITY), (9, 100.0)],
            ..SamplingParams::greedy()
        };
        assert_eq!(SamplingParams::default().validate(1), Ok(()));
        assert_eq!(edges.validate(10), Ok(()));
    }

    #[test]
    fn the_message_names_the_parameter_the_range_and_the_given_value() {
        let params = SamplingParams { top_p: 1.5, ..SamplingParams::default() };
        assert_eq!(message(&params), "`top_p` must be between 0 and 1, got 1.5");
        let params = SamplingParams { logit_bias: vec![(10, 0.0)], ..SamplingParams::default() };
        assert_eq!(message(&params), "`logit_bias` must be keyed by token ids below 10, got 10");
        let params = SamplingParams { logit_bias: vec![(-1, 0.0)], ..SamplingParams::default() };
        assert_eq!(message(&params), "`logit_bias` must be keyed by token ids below 10, got -1");
        let params = SamplingParams { logit_bias: vec![(1, 0.0); 11], ..SamplingParams::default() };
        assert_eq!(message(&params), "`logit_bias` must be at most 10 entries, got 11 entries");
        let params = SamplingParams { samplers: vec![SamplerStage::TopK; 33], ..SamplingParams::default() };
        assert_eq!(message(&params), "`samplers` must be at most 32 stages, got 33 stages");
        let breakers =
            |texts: Vec<String>| SamplingParams { dry_sequence_breakers: texts, ..SamplingParams::default() };
        let params = breakers(vec![":".to_owned(); 17]);
        assert_eq!(message(&params), "`dry_sequence_breakers` must be at most 16 texts, got 17 texts");
        for n_bytes in [0, 41] {
            let expected =
                format!("`dry_sequence_breakers` must be texts of 1 to 40 bytes, got one of {n_bytes} bytes");
            assert_eq!(message(&breakers(vec![":".to_owned(), "a".repeat(n_bytes)])), expected);
        }
    }

    #[test]
    fn nan_infinite_and_huge_numbers_are_rejected_in_every_field() {
        type Set = fn(&mut SamplingParams, f32);
        let fields: [(&str, Set); 19] = [
            ("temperature", |p, x| p.temperature = x),
            ("top_p", |p, x| p.top_p = x),
            ("min_p", |p, x| p.min_p = x),
            ("typical_p", |p, x| p.typical_p = x),
            ("repeat_penalty", |p, x| p.repeat_penalty = x),
            ("frequency_penalty", |p, x| p.frequency_penalty = x),
            ("presence_penalty", |p, x| p.presence_penalty = x),
            ("logit_bias", |p, x| p.logit_bias = vec![(1, x)]),
            ("top_n_sigma", |p, x| p.top_n_sigma = x),
            ("xtc_probability", |p, x| p.xtc_probability = x),
            ("xtc_threshold", |p, x| p.xtc_threshold = x),
            ("dynatemp_range", |p, x| p.dynatemp_range = x),
            ("dynatemp_exponent", |p, x| p.dynatemp_exponent = x),
            ("dry_multiplier", |p, x| p.dry_multiplier = x),
            ("dry_base", |p, x| p.dry_base = x),
            ("mirostat_tau", |p, x| p.mirostat_tau = x),
            ("mirostat_eta", |p, x| p.mirostat_eta = x),
            ("adaptive_target", |p, x| p.adaptive_target = x),
            ("adaptive_decay", |p, x| p.adaptive_decay = x),
        ];
        for (name, set) in fields {
            for value in [f32::NAN, f32::INFINITY, f32::MAX] {
                let mut params = SamplingParams::default();
                set(&mut params, value);
                let error = params.validate(10).expect_err(name);
                assert_eq!((error.param, error.given), (name, value.to_string()));
            }
        }
        for (name, params) in [
            ("temperature", SamplingParams { temperature: -0.1, ..SamplingParams::default() }),
            ("repeat_penalty", SamplingParams { repeat_penalty: 0.0, ..SamplingParams::default() }),
            ("top_k", SamplingParams { top_k: i32::MIN, ..SamplingParams::default() }),
            ("repeat_last_n", SamplingParams { repeat_last_n: i32::MAX, ..SamplingParams::default() }),
            ("dry_penalty_last_n", SamplingParams { dry_penalty_last_n: -2, ..SamplingParams::default() }),
            ("dry_allowed_length", SamplingParams { dry_allowed_length: -1, ..SamplingParams::default() }),
            ("dry_base", SamplingParams { dry_base: 0.9, ..SamplingParams::default() }),
            ("min_keep", SamplingParams { min_keep: u32::MAX, ..SamplingParams::default() }),
            ("mirostat", SamplingParams { mirostat: 3, ..SamplingParams::default() }),
            ("adaptive_decay", SamplingParams { adaptive_decay: 1.0, ..SamplingParams::default() }),
        ] {
            assert_eq!(params.validate(10).expect_err(name).param, name);
        }
    }

    #[test]
    fn parameters_survive_json_and_missing_fields_take_the_defaults() {
        let params = SamplingParams {
            seed: Some(u64::MAX),
            logit_bias: vec![(3, -1.5), (4, f32::NEG_INFINITY)],
            ..SamplingParams::greedy()
        };
        let json = serde_json::to_string(&params).expect("writes");
        assert_eq!(serde_json::from_str::<SamplingParams>(&json).expect("reads"), params);
        assert_eq!(serde_json::from_str::<SamplingParams>("{}").expect("reads"), SamplingParams::default());
    }
}
