//! POST /v1/chat/completions: reads a conversation.

use minerva_engine::{ChatMessage, ModelInfo, Prompt, Request};
use serde_json::Value as Json;

use super::cache_hints;
use super::error::ApiError;
use super::fields::Fields;
use super::params::{self, Delivery, MAX_TOP_LOGPROBS};
use crate::state::App;

/// Turns the body into an engine request.
pub(crate) fn parse(mut fields: Fields, app: &App, info: &ModelInfo) -> Result<(Request, Delivery), ApiError> {
    params::check_model(&mut fields, app, info)?;
    let mut delivery = params::delivery(&mut fields)?;
    let mut request = params::request(&mut fields, info)?;
    params::constraint(&mut fields, &mut request, &mut delivery)?;
    request.prompt = Prompt::Chat(messages(&mut fields, &mut request.keep_ms)?);
    let wants_logprobs = fields.bool("logprobs")?.unwrap_or(false);
    let top_logprobs = fields.count("top_logprobs", 0, MAX_TOP_LOGPROBS)?;
    if top_logprobs.is_some_and(|top| top > 0) && !wants_logprobs {
        let message = "`top_logprobs` needs `logprobs` to be true";
        return Err(ApiError::field("top_logprobs", "invalid_value", message));
    }
    request.logprobs = wants_logprobs.then(|| top_logprobs.unwrap_or(0));
    params::finish(fields, app)?;
    Ok((request, delivery))
}

/// The conversation; `keep_ms` becomes the longest that any of it is to be kept.
pub(crate) fn messages(fields: &mut Fields, keep_ms: &mut Option<u64>) -> Result<Vec<ChatMessage>, ApiError> {
    match fields.take("messages") {
        None => Err(ApiError::missing("messages")),
        Some(Json::Array(items)) if items.is_empty() => {
            Err(ApiError::wrong_value("messages", "an array with at least one message"))
        }
        Some(Json::Array(items)) => items.into_iter().enumerate().map(|(i, item)| message(item, i, keep_ms)).collect(),
        Some(other) => Err(ApiError::wrong_type("messages", "an array of messages", &other)),
    }
}

fn message(json: Json, index: usize, keep_ms: &mut Option<u64>) -> Result<ChatMessage, ApiError> {
    let path = format!("messages[{index}]");
    let mut fields = Fields::nested(json, &path)?;
    let role_path = fields.path("role");
    let role = fields.string("role")?.ok_or_else(|| ApiError::missing(&role_path))?;
    let role = match role.as_str() {
        "developer" | "system" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" | "function" => return Err(ApiError::unsupported(&role_path, " `tool`")),
        _ => return Err(ApiError::wrong_value(&role_path, "one of system, developer, user, assistant")),
    };
    for name in ["tool_calls", "function_call", "audio"] {
        if fields.take(name).is_some_and(|json| json != Json::Array(Vec::new())) {
            return Err(ApiError::unsupported(&fields.path(name), ""));
        }
    }
    *keep_ms = (*keep_ms).max(cache_hints::keep_ms(&mut fields)?);
    let content_path = fields.path("content");
    let content = match fields.take("content") {
        Some(Json::String(text)) => text,
        Some(Json::Array(parts)) => text_parts(parts, &content_path, keep_ms)?,
        Some(other) => return Err(ApiError::wrong_type(&content_path, "a string or an array of parts", &other)),
        None if role == "assistant" => String::new(),
        None => return Err(ApiError::missing(&content_path)),
    };
    Ok(ChatMessage::new(role, content))
}

/// The texts of the parts, a line break between two, as llama-server and vLLM join them.
fn text_parts(parts: Vec<Json>, path: &str, keep_ms: &mut Option<u64>) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.into_iter().enumerate() {
        let mut fields = Fields::nested(part, &format!("{path}[{i}]"))?;
        let type_path = fields.path("type");
        match fields.string("type")?.as_deref() {
            Some("text") => {}
            Some(_) => return Err(ApiError::unsupported(&type_path, " other than `text`")),
            None => return Err(ApiError::missing(&type_path)),
        }
        *keep_ms = (*keep_ms).max(cache_hints::keep_ms(&mut fields)?);
        let text_path = fields.path("text");
        let text = fields.string("text")?.ok_or_else(|| ApiError::missing(&text_path))?;
        texts.push(text);
    }
    Ok(texts.join("\n"))
}
