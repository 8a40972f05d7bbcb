//! The parameters that chat and plain completions share.

use minerva_engine::{ModelInfo, Request, TokenId};
use serde_json::Value as Json;

use super::error::ApiError;
use super::fields::Fields;
use crate::state::App;

/// More than any client sends; OpenAI takes 4.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1_024;
/// OpenAI's limit.
pub(crate) const MAX_TOP_LOGPROBS: u32 = 20;

/// How the answer is to be sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub(crate) stream: bool,
    /// `stream_options.include_usage`.
    pub(crate) include_usage: bool,
    /// `queue_updates`: comments in the stream while the request waits.
    pub(crate) queue_updates: bool,
    /// The field that the constraint came in, for when the engine refuses it.
    pub(crate) constraint_field: Option<&'static str>,
}

/// Checks `model`: the model's name, `default`, or nothing.
pub(crate) fn check_model(fields: &mut Fields, app: &App, info: &ModelInfo) -> Result<(), ApiError> {
    let Some(name) = fields.string("model")? else { return Ok(()) };
    if name == info.name || name == "default" || app.settings.accept_any_model {
        return Ok(());
    }
    Err(ApiError::unknown_model(&name, Some(&info.name)))
}

/// `stream`, `stream_options` and `queue_updates`.
pub(crate) fn delivery(fields: &mut Fields) -> Result<Delivery, ApiError> {
    let stream = fields.bool("stream")?.unwrap_or(false);
    let include_usage = match fields.take("stream_options") {
        None => false,
        Some(json) => Fields::nested(json, "stream_options")?.bool("include_usage")?.unwrap_or(false),
    };
    let queue_updates = fields.bool("queue_updates")?.unwrap_or(false);
    if queue_updates && !stream {
        return Err(ApiError::field("queue_updates", "invalid_value", "`queue_updates` needs `stream` to be true"));
    }
    Ok(Delivery { stream, include_usage, queue_updates, constraint_field: None })
}

/// A request for `info`'s model with everything but the prompt and `logprobs` filled in.
pub(crate) fn request(fields: &mut Fields, info: &ModelInfo) -> Result<Request, ApiError> {
    let max_tokens = fields.count("max_tokens", 1, u32::MAX)?;
    let max_completion_tokens = fields.count("max_completion_tokens", 1, u32::MAX)?;
    // llama-server's name, with -1 for "as many as fit".
    let n_predict = fields.integer("n_predict", -1, u32::MAX.into())?;
    let n_predict = n_predict.and_then(|n| u32::try_from(n).ok());
    if n_predict == Some(0) {
        return Err(ApiError::wrong_value("n_predict", "-1 or at least 1"));
    }
    Ok(Request {
        n: fields.count("n", 1, info.n_seq_max.max(1))?.unwrap_or(1),
        max_tokens: max_completion_tokens.or(max_tokens).or(n_predict),
        stop: stop(fields)?,
        stop_token_ids: stop_token_ids(fields)?,
        min_tokens: fields.count("min_tokens", 0, u32::MAX)?.unwrap_or(0),
        ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
        sampling: super::sampling::params(fields)?,
        cache_prompt: fields.bool("cache_prompt")?.unwrap_or(true),
        cache_key: fields.string("prompt_cache_key")?,
        keep_ms: super::cache_hints::keep_ms(fields)?,
        speculate: fields.bool("speculate")?.unwrap_or(true),
        priority: fields.integer("priority", i32::MIN.into(), i32::MAX.into())?.map_or(0, |priority| priority as i32),
        deadline_ms: fields.count("deadline_ms", 1, u32::MAX)?.map(u64::from),
        max_itl_ms: fields.count("max_itl_ms", 1, u32::MAX)?.map(u64::from),
        ..Request::default()
    })
}

/// One text or several.
fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Json::String(text)) => vec![text],
        Some(Json::Array(items)) => {
            let text = |item| match item {
                Json::String(text) => Ok(text),
                other => Err(ApiError::wrong_type("stop", "a string or an array of strings", &other)),
            };
            items.into_iter().map(text).collect::<Result<_, _>>()?
        }
        Some(other) => return Err(ApiError::wrong_type("stop", "a string or an array of strings", &other)),
    };
    if stops.len() > MAX_STOPS || stops.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
        let wanted = format!("at most {MAX_STOPS} strings of 1 to {MAX_STOP_BYTES} bytes");
        return Err(ApiError::wrong_value("stop", &wanted));
    }
    Ok(stops)
}

/// Tokens that end the answer; the engine checks that there are such.
fn stop_token_ids(fields: &mut Fields) -> Result<Vec<TokenId>, ApiError> {
    const NAME: &str = "stop_token_ids";
    let items = match fields.take(NAME) {
        None => return Ok(Vec::new()),
        Some(Json::Array(items)) => items,
        Some(other) => return Err(ApiError::wrong_type(NAME, "an array of token ids", &other)),
    };
    let token = |item: Json| {
        let id = item.as_i64().ok_or_else(|| ApiError::wrong_type(NAME, "an array of token ids", &item))?;
        TokenId::try_from(id).map_err(|_| ApiError::wrong_value(NAME, "an array of token ids"))
    };
    items.into_iter().map(token).collect()
}

/// The constraint of the answer, under any of its names.
pub(crate) fn constraint(fields: &mut Fields, request: &mut Request, delivery: &mut Delivery) -> Result<(), ApiError> {
    if let Some((constraint, field)) = super::constraint::take(fields)? {
        request.constraint = Some(constraint);
        delivery.constraint_field = Some(field);
    }
    Ok(())
}

/// Deals with the fields that are left: those that would silently not happen are refused, others ignored or, with
/// `--strict`, refused too.
pub(crate) fn finish(mut fields: Fields, app: &App) -> Result<(), ApiError> {
    super::unsupported::check(&mut fields)?;
    let unknown: Vec<String> = fields.into_unknown().map(|name| name.chars().take(64).collect()).take(32).collect();
    match unknown.first() {
        Some(name) if app.settings.strict => {
            Err(ApiError::field(name.clone(), "unknown_parameter", format!("`{name}` is not known to this server")))
        }
        Some(_) => {
            tracing::debug!(fields = ?unknown, "ignored unknown request fields");
            Ok(())
        }
        None => Ok(()),
    }
}
