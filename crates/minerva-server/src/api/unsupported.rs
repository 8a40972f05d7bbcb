//! Fields that other servers know and this one does not have yet: accepted where they ask for nothing, refused elsewhere.
//!
//! Ignoring `tools` or `audio` would return 200 with something else than was asked for, which is worse than 400.

use serde_json::Value as Json;

use super::error::ApiError;
use super::fields::Fields;

/// A value that asks for nothing.
#[derive(Clone, Copy)]
enum Neutral {
    False,
    Zero,
    One,
    /// An empty array, object or string.
    Empty,
    OneOf(&'static [&'static str]),
    /// Any value: it changes nothing here.
    Anything,
    /// Only true: it is what happens anyway.
    True,
}

impl Neutral {
    fn holds(self, json: &Json) -> bool {
        match self {
            Self::False => json == &Json::Bool(false),
            Self::True => json == &Json::Bool(true),
            Self::Zero => json.as_f64() == Some(0.0),
            Self::One => json.as_f64() == Some(1.0),
            Self::Empty => match json {
                Json::Array(items) => items.is_empty(),
                Json::Object(map) => map.is_empty(),
                Json::String(text) => text.is_empty(),
                _ => false,
            },
            Self::OneOf(words) => json.as_str().is_some_and(|text| words.contains(&text)),
            Self::Anything => true,
        }
    }
}

const FIELDS: &[(&str, Neutral)] = &[
    // OpenAI
    ("audio", Neutral::Empty),
    ("best_of", Neutral::One), // with the same value as `n` it is taken before it gets here
    ("echo", Neutral::False),
    ("function_call", Neutral::OneOf(&["none", "auto"])),
    ("functions", Neutral::Empty),
    ("metadata", Neutral::Anything),
    ("parallel_tool_calls", Neutral::Anything),
    ("prediction", Neutral::Empty),
    ("reasoning_effort", Neutral::OneOf(&["none"])),
    ("safety_identifier", Neutral::Anything),
    ("service_tier", Neutral::OneOf(&["auto", "default"])),
    ("store", Neutral::False),
    ("suffix", Neutral::Empty),
    ("tool_choice", Neutral::OneOf(&["none", "auto"])),
    ("tools", Neutral::Empty),
    ("user", Neutral::Anything),
    ("verbosity", Neutral::OneOf(&["medium"])),
    ("web_search_options", Neutral::Empty),
    // llama-server and vLLM
    ("add_generation_prompt", Neutral::True),
    ("chat_template", Neutral::Empty),
    ("chat_template_kwargs", Neutral::Empty),
    ("continue_final_message", Neutral::False),
    ("image_data", Neutral::Empty),
    ("lora", Neutral::Empty),
    ("n_keep", Neutral::Zero),
    ("n_probs", Neutral::Zero),
    ("post_sampling_probs", Neutral::False),
    ("prompt_logprobs", Neutral::Zero),
    ("return_tokens", Neutral::False),
];

/// Takes every field of the table; the first that asks for something is an error.
pub(crate) fn check(fields: &mut Fields) -> Result<(), ApiError> {
    for (name, neutral) in FIELDS {
        match fields.get(name) {
            Some(json) if !neutral.holds(json) => return Err(ApiError::unsupported(name, "")),
            _ => fields.remove(name),
        }
    }
    if let Some(modalities) = fields.take("modalities")
        && modalities != serde_json::json!(["text"])
    {
        return Err(ApiError::unsupported("modalities", " other than `[\"text\"]`"));
    }
    Ok(())
}
