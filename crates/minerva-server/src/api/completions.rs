//! POST /v1/completions: reads one prompt or several.

use minerva_engine::{ModelInfo, Prompt, Request, TokenId};
use serde_json::Value as Json;

use super::error::ApiError;
use super::fields::Fields;
use super::params::{self, Delivery, MAX_TOP_LOGPROBS};
use crate::state::App;

/// Choices of one request, over all of its prompts.
const MAX_CHOICES: usize = 256;

/// Turns the body into an engine request and the prompts that it is for; the choices of prompt `p` are `p * n ..`.
pub(crate) fn parse(
    mut fields: Fields,
    app: &App,
    info: &ModelInfo,
) -> Result<(Request, Vec<Prompt>, Delivery), ApiError> {
    params::check_model(&mut fields, app, info)?;
    let mut delivery = params::delivery(&mut fields)?;
    let mut request = params::request(&mut fields, info)?;
    params::constraint(&mut fields, &mut request, &mut delivery)?;
    request.logprobs = fields.count("logprobs", 0, MAX_TOP_LOGPROBS)?;
    if fields.get("best_of").is_some_and(|best_of| best_of.as_u64() == Some(request.n.into())) {
        fields.remove("best_of"); // the best `n` of `n` are all of them
    }
    let prompts = prompts(&mut fields, info)?;
    if prompts.len() * request.n as usize > MAX_CHOICES {
        let wanted =
            format!("few enough prompts: they make {}, and at most {MAX_CHOICES} choices are made", prompts.len());
        return Err(ApiError::wrong_value("prompt", &wanted));
    }
    params::finish(fields, app)?;
    Ok((request, prompts, delivery))
}

fn prompts(fields: &mut Fields, info: &ModelInfo) -> Result<Vec<Prompt>, ApiError> {
    const WANTED: &str = "a string, an array of strings, an array of token ids or an array of such arrays";
    match fields.take("prompt") {
        None => Err(ApiError::missing("prompt")),
        Some(Json::String(text)) => Ok(vec![Prompt::Text(text)]),
        Some(Json::Array(items)) => match items.first() {
            None => Err(ApiError::wrong_value("prompt", "not empty")),
            Some(Json::Number(_)) => Ok(vec![Prompt::Tokens(tokens(items, "prompt", info)?)]),
            Some(_) => {
                let prompt = |(i, item)| match item {
                    Json::String(text) => Ok(Prompt::Text(text)),
                    Json::Array(items) => Ok(Prompt::Tokens(tokens(items, &format!("prompt[{i}]"), info)?)),
                    other => {
                        Err(ApiError::wrong_type(&format!("prompt[{i}]"), "a string or an array of token ids", &other))
                    }
                };
                items.into_iter().enumerate().map(prompt).collect()
            }
        },
        Some(other) => Err(ApiError::wrong_type("prompt", WANTED, &other)),
    }
}

fn tokens(items: Vec<Json>, path: &str, info: &ModelInfo) -> Result<Vec<TokenId>, ApiError> {
    let token = |item: Json| {
        let id = item.as_u64().filter(|id| *id < u64::from(info.n_vocab)).and_then(|id| TokenId::try_from(id).ok());
        id.ok_or_else(|| {
            ApiError::wrong_value(path, &format!("an array of token ids from 0 to {}", info.n_vocab.max(1) - 1))
        })
    };
    items.into_iter().map(token).collect()
}
