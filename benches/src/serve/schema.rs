//! The JSON schema of `json-schema`: nested objects, enumerations, arrays, numbers; and what an answer must be.

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

const KINDS: [&str; 4] = ["city", "river", "mountain", "forest"];
const COUNTRIES: [&str; 5] = ["Austria", "Brazil", "Chile", "Denmark", "Egypt"];

/// Every length is bounded, so that an answer ends.
pub(super) fn schema() -> Value {
    let object = |properties: Value| {
        let required: Vec<&String> = properties.as_object().map(|map| map.keys().collect()).unwrap_or_default();
        json!({ "type": "object", "required": required, "properties": properties, "additionalProperties": false })
    };
    object(json!({
        "title": { "type": "string", "maxLength": 40 },
        "kind": { "enum": KINDS },
        "size": object(json!({
            "width": { "type": "integer", "minimum": 0, "maximum": 1000 },
            "height": { "type": "integer", "minimum": 0, "maximum": 1000 },
        })),
        "tags": { "type": "array", "items": { "type": "string", "maxLength": 12 }, "minItems": 3, "maxItems": 3 },
        "ratings": {
            "type": "array",
            "items": { "type": "integer", "minimum": 1, "maximum": 5 },
            "minItems": 4,
            "maxItems": 4,
        },
        "is_open": { "type": "boolean" },
        "owner": object(json!({
            "name": { "type": "string", "maxLength": 24 },
            "address": object(json!({
                "street": { "type": "string", "maxLength": 24 },
                "country": { "enum": COUNTRIES },
            })),
        })),
    }))
}

/// OpenAI's field of the request.
pub(super) fn response_format() -> Value {
    json!({ "type": "json_schema", "json_schema": { "name": "place", "strict": true, "schema": schema() } })
}

/// Whether a complete answer follows the schema.
pub(super) fn check(text: &str) -> anyhow::Result<()> {
    let value: Value = serde_json::from_str(text).with_context(|| format!("no JSON: {text}"))?;
    follows(&value, &schema()).with_context(|| format!("not as the schema says: {text}"))
}

/// The words of JSON schema that [`schema`] uses.
fn follows(value: &Value, schema: &Value) -> anyhow::Result<()> {
    let limit = |key: &str| schema.get(key).and_then(Value::as_u64);
    let within = |what: &str, size: u64, least: Option<u64>, most: Option<u64>| {
        ensure!(least.is_none_or(|least| size >= least) && most.is_none_or(|most| size <= most), "{what} {size}");
        Ok(())
    };
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array) {
        ensure!(allowed.contains(value), "{value} is none of {allowed:?}");
        return Ok(());
    }
    match (schema.get("type").and_then(Value::as_str), value) {
        (Some("boolean"), Value::Bool(_)) => Ok(()),
        (Some("string"), Value::String(text)) => {
            within("length", text.chars().count() as u64, None, limit("maxLength"))
        }
        (Some("integer"), Value::Number(_)) => {
            let number = value.as_u64().with_context(|| format!("{value} is no count"))?;
            within("number", number, limit("minimum"), limit("maximum"))
        }
        (Some("array"), Value::Array(items)) => {
            within("items", items.len() as u64, limit("minItems"), limit("maxItems"))?;
            items.iter().try_for_each(|item| follows(item, &schema["items"]))
        }
        (Some("object"), Value::Object(map)) => {
            let properties = schema["properties"].as_object().context("a schema without properties")?;
            ensure!(map.len() == properties.len(), "{} properties instead of {}", map.len(), properties.len());
            properties.iter().try_for_each(|(name, schema)| {
                let value = map.get(name).with_context(|| format!("no `{name}`"))?;
                follows(value, schema).with_context(|| format!("`{name}`"))
            })
        }
        (kind, _) => bail!("{value} is no {kind:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Value {
        json!({
            "title": "A bridge", "kind": "river", "size": { "width": 7, "height": 0 }, "tags": ["a", "b", "c"],
            "ratings": [1, 5, 3, 3], "is_open": true,
            "owner": { "name": "Ann", "address": { "street": "Main", "country": "Chile" } },
        })
    }

    #[test]
    fn an_answer_that_follows_the_schema_passes_and_each_break_of_it_is_named() {
        check(&place().to_string()).unwrap();
        for (pointer, value) in [
            ("/title", json!("x".repeat(41))),
            ("/kind", json!("ocean")),
            ("/size/width", json!(1.5)),
            ("/size/height", json!(1001)),
            ("/tags", json!(["a"])),
            ("/ratings/2", json!(0)),
            ("/is_open", json!("yes")),
            ("/owner/address", json!({ "street": "Main", "country": "Chile", "more": 1 })),
            ("/owner/address/country", json!(null)),
        ] {
            let mut broken = place();
            *broken.pointer_mut(pointer).unwrap() = value;
            assert!(check(&broken.to_string()).is_err(), "{pointer}");
        }
        assert!(check("{\"title\":").is_err());
    }
}
