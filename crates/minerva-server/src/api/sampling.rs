//! The fields that say how tokens are chosen, by llama-server's names. The engine checks their ranges.

use minerva_engine::{SamplerStage, SamplingParams, TokenId};
use serde_json::Value as Json;

use super::error::ApiError;
use super::fields::{Fields, float};

/// Takes every field of the sampler.
pub(crate) fn params(fields: &mut Fields) -> Result<SamplingParams, ApiError> {
    let mut params = SamplingParams {
        logit_bias: logit_bias(fields)?,
        // -1 is llama-server's "draw one"; other negative seeds are seeds.
        seed: fields
            .integer("seed", i64::MIN.into(), u64::MAX.into())?
            .filter(|seed| *seed != -1)
            .map(|seed| seed as u64),
        ..SamplingParams::default()
    };
    if let Some(min_keep) = fields.count("min_keep", 0, i32::MAX as u32)? {
        params.min_keep = min_keep;
    }
    if let Some(mirostat) = fields.count("mirostat", 0, 2)? {
        params.mirostat = mirostat as u8;
    }
    for (name, value) in [
        ("top_k", &mut params.top_k),
        ("repeat_last_n", &mut params.repeat_last_n),
        ("dry_allowed_length", &mut params.dry_allowed_length),
        ("dry_penalty_last_n", &mut params.dry_penalty_last_n),
    ] {
        if let Some(given) = fields.integer(name, i32::MIN.into(), i32::MAX.into())? {
            *value = given as i32;
        }
    }
    let has_repeat_penalty = fields.get("repeat_penalty").is_some();
    for (name, value) in [
        ("temperature", &mut params.temperature),
        ("top_p", &mut params.top_p),
        ("min_p", &mut params.min_p),
        ("typical_p", &mut params.typical_p),
        ("repeat_penalty", &mut params.repeat_penalty),
        ("frequency_penalty", &mut params.frequency_penalty),
        ("presence_penalty", &mut params.presence_penalty),
        ("top_n_sigma", &mut params.top_n_sigma),
        ("xtc_probability", &mut params.xtc_probability),
        ("xtc_threshold", &mut params.xtc_threshold),
        ("dynatemp_range", &mut params.dynatemp_range),
        ("dynatemp_exponent", &mut params.dynatemp_exponent),
        ("dry_multiplier", &mut params.dry_multiplier),
        ("dry_base", &mut params.dry_base),
        ("mirostat_tau", &mut params.mirostat_tau),
        ("mirostat_eta", &mut params.mirostat_eta),
        ("adaptive_target", &mut params.adaptive_target),
        ("adaptive_decay", &mut params.adaptive_decay),
    ] {
        if let Some(given) = fields.float(name)? {
            *value = given;
        }
    }
    // vLLM's name of `repeat_penalty`.
    if let Some(penalty) = fields.float("repetition_penalty")?.filter(|_| !has_repeat_penalty) {
        params.repeat_penalty = penalty;
    }
    if params.dry_base < 1.0 {
        params.dry_base = SamplingParams::default().dry_base; // as llama-server documents it
    }
    if let Some(breakers) = breakers(fields)? {
        params.dry_sequence_breakers = breakers;
    }
    if let Some(samplers) = samplers(fields)? {
        params.samplers = samplers;
    }
    Ok(params)
}

/// OpenAI's map from token id (as text) to bias, or llama-server's list of pairs; `false` bans.
fn logit_bias(fields: &mut Fields) -> Result<Vec<(TokenId, f32)>, ApiError> {
    const WANTED: &str = "an object from token ids to numbers, or an array of pairs of them";
    let ids = || ApiError::wrong_value("logit_bias", "an object whose keys are token ids");
    let wrong = |json: &Json| ApiError::wrong_type("logit_bias", WANTED, json);
    match fields.take("logit_bias") {
        None => Ok(Vec::new()),
        Some(Json::Object(map)) => map
            .iter()
            .map(|(token, json)| Ok((token.parse().ok().and_then(id).ok_or_else(ids)?, bias(json)?)))
            .collect(),
        Some(Json::Array(items)) => {
            let pair = |item: &Json| match item.as_array().map(Vec::as_slice) {
                Some([token, json]) => Ok((token.as_i64().and_then(id).ok_or_else(ids)?, bias(json)?)),
                _ => Err(wrong(item)),
            };
            items.iter().map(pair).collect()
        }
        Some(other) => Err(wrong(&other)),
    }
}

fn id(token: i64) -> Option<TokenId> {
    TokenId::try_from(token).ok().filter(|id| *id >= 0)
}

fn bias(json: &Json) -> Result<f32, ApiError> {
    if json == &Json::Bool(false) {
        return Ok(f32::NEG_INFINITY);
    }
    let bias = float(json, "logit_bias")?;
    if (-100.0..=100.0).contains(&bias) {
        return Ok(bias);
    }
    Err(ApiError::wrong_value("logit_bias", "an object whose values are between -100 and 100"))
}

fn breakers(fields: &mut Fields) -> Result<Option<Vec<String>>, ApiError> {
    const NAME: &str = "dry_sequence_breakers";
    let items = match fields.take(NAME) {
        None => return Ok(None),
        Some(Json::Array(items)) => items,
        Some(other) => return Err(ApiError::wrong_type(NAME, "an array of strings", &other)),
    };
    let text = |item| match item {
        Json::String(text) => Ok(text),
        other => Err(ApiError::wrong_type(NAME, "an array of strings", &other)),
    };
    items.into_iter().map(text).collect::<Result<_, _>>().map(Some)
}

/// The order of the stages: an array of names or a string of letters. A stage that does not exist is an error, because leaving it out
/// would answer another question. An empty list is llama-server's too: nothing but bias and the draw.
fn samplers(fields: &mut Fields) -> Result<Option<Vec<SamplerStage>>, ApiError> {
    const WANTED: &str = "an array of names of stages or a string of their letters";
    let unknown = |given: &str| {
        let known: Vec<String> = SamplerStage::DEFAULT_ORDER
            .into_iter()
            .chain([SamplerStage::AdaptiveP])
            .map(|stage| format!("{} ({})", stage.name(), stage.code()))
            .collect();
        let given: String = given.chars().take(32).collect();
        ApiError::wrong_value("samplers", &format!("made of {}, not `{given}`", known.join(", ")))
    };
    let stage = |item: &Json| match item {
        Json::String(name) => SamplerStage::from_name(name).ok_or_else(|| unknown(name)),
        other => Err(ApiError::wrong_type("samplers", WANTED, other)),
    };
    let stages: Vec<SamplerStage> = match fields.take("samplers") {
        None => return Ok(None),
        Some(Json::Array(items)) => items.iter().map(stage).collect::<Result<_, _>>()?,
        Some(Json::String(codes)) => {
            let stage = |code: char| SamplerStage::from_code(code).ok_or_else(|| unknown(&code.to_string()));
            codes.chars().map(stage).collect::<Result<_, _>>()?
        }
        Some(other) => return Err(ApiError::wrong_type("samplers", WANTED, &other)),
    };
    Ok(Some(stages))
}
