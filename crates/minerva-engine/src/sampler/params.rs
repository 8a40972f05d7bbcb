//! What a request may ask of the sampler, and the check that every request passes before it is admitted.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::request::TokenId;

/// The largest penalty window; `repeat_last_n = -1` means this many tokens, so the whole context of any model we know.
pub const MAX_REPEAT_LAST_N: i32 = 1 << 20;

/// A logit bias at or below this bans the token outright, as OpenAI's documentation promises for -100.
pub const BAN_BIAS: f32 = -100.0;

/// How the next token is chosen from the logits. The defaults are llama-server's.
///
/// The stages run in this order: `logit_bias`, penalties, `top_k`, `typical_p`, `top_p`, `min_p`, `temperature`, the draw.
/// A temperature of 0 is greedy: the best token after bias and penalties, whatever the filters say.
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

    /// Whether the penalties can change any logit; without them no window is kept.
    pub(super) fn has_penalties(&self) -> bool {
        let penalties = (self.repeat_penalty, self.frequency_penalty, self.presence_penalty);
        penalties != (1.0, 0.0, 0.0) && self.repeat_last_n != 0
    }
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
    }

    #[test]
    fn nan_infinite_and_huge_numbers_are_rejected_in_every_field() {
        type Set = fn(&mut SamplingParams, f32);
        let fields: [(&str, Set); 8] = [
            ("temperature", |p, x| p.temperature = x),
            ("top_p", |p, x| p.top_p = x),
            ("min_p", |p, x| p.min_p = x),
            ("typical_p", |p, x| p.typical_p = x),
            ("repeat_penalty", |p, x| p.repeat_penalty = x),
            ("frequency_penalty", |p, x| p.frequency_penalty = x),
            ("presence_penalty", |p, x| p.presence_penalty = x),
            ("logit_bias", |p, x| p.logit_bias = vec![(1, x)]),
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
