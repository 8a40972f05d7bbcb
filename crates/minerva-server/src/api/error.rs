//! What goes wrong, twice: a text for the client, in OpenAI's shape with a stable `code`, and one for the log.
//!
//! The client's text never has a host path, and the log's never has anything that a request carried.

use hyper::StatusCode;
use minerva_engine::{GenerationError, RequestError};
use serde::Serialize;

/// An answer that is an error.
#[derive(Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// OpenAI's class of errors.
    pub(crate) kind: &'static str,
    /// Stable; programs match on it.
    pub(crate) code: &'static str,
    /// The client's text.
    pub(crate) message: String,
    /// What only some errors have; boxed, since every parser here returns a `Result` with this type.
    pub(crate) more: Box<More>,
}

/// What only some errors have.
#[derive(Debug, Default)]
pub(crate) struct More {
    /// The request field at fault, such as `messages[0].role`.
    pub(crate) param: Option<String>,
    /// Prompt tokens and context, for `context_length_exceeded`.
    pub(crate) tokens: Option<(usize, usize)>,
    pub(crate) retry_after_s: Option<u32>,
    /// `Allow`, for 405.
    pub(crate) allow: Option<&'static str>,
    /// The log's text, where it says more than `code`.
    pub(crate) log: Option<String>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, kind: &'static str, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code, message: message.into(), more: Box::default() }
    }

    /// An error of the request, with any status.
    pub(crate) fn request(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", code, message)
    }

    /// 400 for the request as a whole.
    pub(crate) fn invalid(code: &'static str, message: impl Into<String>) -> Self {
        Self::request(StatusCode::BAD_REQUEST, code, message)
    }

    /// 400 for one field.
    pub(crate) fn field(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        Self::invalid(code, message).with(|more| more.param = Some(param.into()))
    }

    /// A field that has to be there.
    pub(crate) fn missing(param: &str) -> Self {
        Self::field(param, "missing_required_parameter", format!("`{param}` is required"))
    }

    /// 404 for a model that is not this server's.
    pub(crate) fn unknown_model(name: &str, ours: Option<&str>) -> Self {
        let name: String = name.chars().take(100).collect();
        let ours = ours.map_or_else(String::new, |ours| format!("; this server has `{ours}`"));
        let message = format!("the model `{name}` does not exist{ours}");
        let error = Self::request(StatusCode::NOT_FOUND, "model_not_found", message);
        error.with(|more| more.param = Some("model".to_owned()))
    }

    pub(crate) fn with(mut self, set: impl FnOnce(&mut More)) -> Self {
        set(&mut self.more);
        self
    }

    /// A field of the wrong JSON type.
    pub(crate) fn wrong_type(param: &str, wanted: &str, given: &serde_json::Value) -> Self {
        use serde_json::Value as Json;
        let given = match given {
            Json::Null => "null",
            Json::Bool(_) => "a boolean",
            Json::Number(_) => "another number",
            Json::String(_) => "a string",
            Json::Array(_) => "an array",
            Json::Object(_) => "an object",
        };
        Self::field(param, "invalid_type", format!("`{param}` must be {wanted}, got {given}"))
    }

    /// A field whose value is outside its range.
    pub(crate) fn wrong_value(param: &str, wanted: &str) -> Self {
        Self::field(param, "invalid_value", format!("`{param}` must be {wanted}"))
    }

    /// A field that asks for something that would silently not happen.
    pub(crate) fn unsupported(param: &str, what: &str) -> Self {
        Self::field(param, "unsupported_parameter", format!("`{param}`{what} is not supported by this server"))
    }

    pub(crate) fn unavailable(code: &'static str, message: impl Into<String>, retry_after_s: u32) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", code, message);
        error.with(|more| more.retry_after_s = Some(retry_after_s))
    }

    pub(crate) fn shutting_down() -> Self {
        Self::unavailable("shutting_down", "the server is shutting down", 5)
    }

    /// 500; `log` is for our eyes.
    pub(crate) fn internal(log: impl Into<String>) -> Self {
        let message = "the server could not finish this request; its log has the reason under this request's id";
        let error = Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "internal_error", message);
        error.with(|more| more.log = Some(log.into()))
    }

    /// A request that the engine refused; `prompt` is the field that holds the prompt, `constraint` the one with the schema
    /// or grammar.
    pub(crate) fn refused(refusal: &RequestError, prompt: &str, constraint: Option<&'static str>) -> Self {
        let text = refusal.to_string();
        match refusal {
            RequestError::InvalidParam(invalid) => Self::field(invalid.param, "invalid_value", text),
            RequestError::Constraint(_) => {
                Self::field(constraint.unwrap_or("response_format"), "invalid_constraint", text)
            }
            RequestError::ContextLength { n_prompt_tokens, n_ctx } => {
                let error = Self::field(prompt, "context_length_exceeded", text);
                error.with(|more| more.tokens = Some((*n_prompt_tokens, *n_ctx)))
            }
            RequestError::EmptyPrompt | RequestError::Tokenize { .. } | RequestError::UnknownToken { .. } => {
                Self::field(prompt, "invalid_value", text)
            }
            RequestError::QueueFull { retry_after_s, .. } => {
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "queue_full", text);
                error.with(|more| more.retry_after_s = Some((*retry_after_s).max(1)))
            }
            RequestError::ChatTemplate { .. } => Self::field(prompt, "chat_template_error", text),
            RequestError::NoChatTemplate => Self::field(prompt, "no_chat_template", text),
            RequestError::ShuttingDown => Self::shutting_down(),
            _ => Self::internal(text),
        }
    }

    /// An accepted request that the engine could not finish.
    pub(crate) fn failed(failure: &GenerationError) -> Self {
        match failure {
            GenerationError::Shutdown => Self::unavailable("shutting_down", "the server shut down before the end", 5),
            expired @ GenerationError::DeadlineExpired { .. } => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", "deadline_expired", expired.to_string())
            }
            other => Self::internal(other.to_string()),
        }
    }

    /// `{"error":{…}}`.
    pub(crate) fn body(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Body<'a> {
            error: Inner<'a>,
        }
        #[derive(Serialize)]
        struct Inner<'a> {
            message: &'a str,
            r#type: &'static str,
            param: Option<&'a str>,
            code: &'static str,
            #[serde(skip_serializing_if = "Option::is_none")]
            n_prompt_tokens: Option<usize>,
            #[serde(skip_serializing_if = "Option::is_none")]
            n_ctx: Option<usize>,
        }
        let error = Inner {
            message: &self.message,
            r#type: self.kind,
            param: self.more.param.as_deref(),
            code: self.code,
            n_prompt_tokens: self.more.tokens.map(|(prompt, _)| prompt),
            n_ctx: self.more.tokens.map(|(_, context)| context),
        };
        serde_json::to_vec(&Body { error }).unwrap_or_default()
    }
}
