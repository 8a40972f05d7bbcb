//! What clients say about the use of a prompt to come: Anthropic's `cache_control`, on a request, a message or a part of one.

use super::error::ApiError;
use super::fields::Fields;

const NAME: &str = "cache_control";

/// Takes `{"type": "ephemeral", "ttl": "5m" | "1h"}`: for how long to keep what is computed, in milliseconds. The default is 5 minutes.
///
/// It marks the end of a beginning there; here it is about the whole prompt, since what comes before a mark is only known once the
/// template has put it into tokens.
pub(super) fn keep_ms(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(json) = fields.take(NAME) else { return Ok(None) };
    let mut control = Fields::nested(json, &fields.path(NAME))?;
    let type_path = control.path("type");
    match control.string("type")?.as_deref() {
        Some("ephemeral") => {}
        Some(_) => return Err(ApiError::wrong_value(&type_path, "`ephemeral`")),
        None => return Err(ApiError::missing(&type_path)),
    }
    let ttl_path = control.path("ttl");
    match control.string("ttl")?.as_deref() {
        None | Some("5m") => Ok(Some(5 * 60 * 1000)),
        Some("1h") => Ok(Some(60 * 60 * 1000)),
        Some(_) => Err(ApiError::wrong_value(&ttl_path, "`5m` or `1h`")),
    }
}
