//! A request's JSON object, taken apart field by field, so that every complaint names its field.

use serde_json::{Map, Value as Json};

use super::error::ApiError;

/// Arrays and objects of one body. Two bytes of text become some three hundred in memory.
const MAX_CONTAINERS: usize = 100_000;

/// How many arrays and objects begin in a JSON text; of what is no JSON at most that.
fn n_containers(bytes: &[u8]) -> usize {
    let (mut n, mut is_text, mut is_escaped) = (0, false, false);
    for byte in bytes {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_text => is_escaped = true,
            b'"' => is_text = !is_text,
            b'[' | b'{' if !is_text => n += 1,
            _ => {}
        }
    }
    n
}

/// The fields that nobody has taken yet. `null` counts as absent, as with OpenAI.
#[derive(Debug)]
pub(crate) struct Fields {
    map: Map<String, Json>,
    /// What comes before a field's name in messages, such as `messages[0].`.
    prefix: String,
}

impl Fields {
    /// Parses a body. serde_json bounds the depth to 128.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let n_containers = n_containers(bytes);
        if n_containers > MAX_CONTAINERS {
            let message =
                format!("the request body has {n_containers} arrays and objects, the limit is {MAX_CONTAINERS}");
            return Err(ApiError::invalid("too_many_values", message));
        }
        let json = serde_json::from_slice(bytes).map_err(|problem| {
            // Only the place: the text around it is the client's, and the message may be logged by whoever reads it.
            let message = format!("the request body is not valid JSON: {problem}");
            ApiError::invalid("invalid_json", message)
        })?;
        match json {
            Json::Object(map) => Ok(Self { map, prefix: String::new() }),
            _ => Err(ApiError::invalid("invalid_json", "the request body must be a JSON object")),
        }
    }

    /// The fields of an object inside the request.
    pub(crate) fn nested(json: Json, path: &str) -> Result<Self, ApiError> {
        match json {
            Json::Object(map) => Ok(Self { map, prefix: format!("{path}.") }),
            other => Err(ApiError::wrong_type(path, "an object", &other)),
        }
    }

    /// The full name of a field.
    pub(crate) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    pub(crate) fn take(&mut self, name: &str) -> Option<Json> {
        self.map.remove(name).filter(|json| !json.is_null())
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Json::String(text)) => Ok(Some(text)),
            Some(other) => Err(ApiError::wrong_type(&self.path(name), "a string", &other)),
        }
    }

    pub(crate) fn bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Json::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(ApiError::wrong_type(&self.path(name), "a boolean", &other)),
        }
    }

    /// An integer from `min` to `max`. `1.0` is none, and neither is what does not fit in an `i128`.
    pub(crate) fn integer(&mut self, name: &str, min: i128, max: i128) -> Result<Option<i128>, ApiError> {
        let Some(json) = self.take(name) else { return Ok(None) };
        let path = self.path(name);
        let Json::Number(number) = &json else { return Err(ApiError::wrong_type(&path, "an integer", &json)) };
        let wanted = format!("an integer between {min} and {max}");
        match number.as_i128().filter(|_| !number.is_f64()) {
            Some(value) if (min..=max).contains(&value) => Ok(Some(value)),
            Some(_) => Err(ApiError::wrong_value(&path, &wanted)),
            None => Err(ApiError::wrong_type(&path, &wanted, &json)),
        }
    }

    /// A count that fits the engine's type.
    pub(crate) fn count(&mut self, name: &str, min: u32, max: u32) -> Result<Option<u32>, ApiError> {
        Ok(self.integer(name, min.into(), max.into())?.map(|value| value as u32))
    }

    /// A number that fits an `f32`; the engine checks its range.
    pub(crate) fn float(&mut self, name: &str) -> Result<Option<f32>, ApiError> {
        let Some(json) = self.take(name) else { return Ok(None) };
        float(&json, &self.path(name)).map(Some)
    }

    /// What is left: the fields that nobody knows.
    pub(crate) fn into_unknown(self) -> impl Iterator<Item = String> {
        self.map.into_iter().map(|(name, _)| name)
    }

    /// Whether a field is there and not null.
    pub(crate) fn get(&self, name: &str) -> Option<&Json> {
        self.map.get(name).filter(|json| !json.is_null())
    }

    /// Forgets a field.
    pub(crate) fn remove(&mut self, name: &str) {
        self.map.remove(name);
    }
}

/// A finite `f32`. A JSON number can be larger than one.
pub(crate) fn float(json: &Json, path: &str) -> Result<f32, ApiError> {
    let Json::Number(number) = json else { return Err(ApiError::wrong_type(path, "a number", json)) };
    let value = number.as_f64().unwrap_or(f64::NAN) as f32;
    if value.is_finite() { Ok(value) } else { Err(ApiError::wrong_value(path, "a smaller number")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_become_much_larger_in_memory_is_refused() {
        let many = |n: usize| format!("{{\"x\":[{}]}}", vec!["[]"; n].join(","));
        assert!(Fields::parse(many(MAX_CONTAINERS - 2).as_bytes()).is_ok());
        assert_eq!(Fields::parse(many(MAX_CONTAINERS - 1).as_bytes()).unwrap_err().code, "too_many_values");
        // What stands in a text is none.
        let text = format!("{{\"prompt\": \"a\\\"{}\"}}", "[{".repeat(MAX_CONTAINERS));
        assert!(Fields::parse(text.as_bytes()).is_ok());
        assert_eq!(n_containers(b"[\"\\\\\", {}]"), 2);
    }
}
