//! What an answer has to follow, under every name that clients know: OpenAI's `response_format`, llama-server's
//! `json_schema` and `grammar`, vLLM's `guided_…` and `structured_outputs`. A request can have one.

use minerva_engine::Constraint;
use serde_json::Value as Json;

use super::error::ApiError;
use super::fields::Fields;

/// A constraint, and the field it came in.
type Found = Option<(Constraint, &'static str)>;

/// Takes the constraint of a request, and the name of its field for complaints.
pub(crate) fn take(fields: &mut Fields) -> Result<Found, ApiError> {
    let mut found = response_format(fields)?;
    add(&mut found, schema(fields.take("json_schema"), "json_schema")?)?;
    add(&mut found, text(fields, "grammar")?.map(|text| (grammar(text), "grammar")))?;
    add(&mut found, schema(fields.take("guided_json"), "guided_json")?)?;
    add(&mut found, text(fields, "guided_regex")?.map(|text| (Constraint::Regex(text), "guided_regex")))?;
    add(&mut found, choice(fields, "guided_choice", "guided_choice")?)?;
    add(&mut found, text(fields, "guided_grammar")?.map(|text| (grammar(text), "guided_grammar")))?;
    add(&mut found, structured_outputs(fields)?)?;
    for name in ["guided_whitespace_pattern", "grammar_lazy", "grammar_triggers"] {
        if fields.take(name).is_some_and(|json| json != Json::Bool(false) && json != Json::Array(Vec::new())) {
            return Err(ApiError::unsupported(name, ""));
        }
    }
    Ok(found)
}

/// Two constraints would have to hold together, and no client means that.
fn add(found: &mut Found, more: Found) -> Result<(), ApiError> {
    match (&found, &more) {
        (Some((_, first)), Some((_, second))) => {
            let message = format!("`{second}` cannot be used together with `{first}`");
            Err(ApiError::field(*second, "invalid_value", message))
        }
        (None, Some(_)) => {
            *found = more;
            Ok(())
        }
        _ => Ok(()),
    }
}

fn response_format(fields: &mut Fields) -> Result<Found, ApiError> {
    const SCHEMA: &str = "response_format.json_schema.schema";
    let Some(format) = fields.take("response_format") else { return Ok(None) };
    let mut format = Fields::nested(format, "response_format")?;
    let kind = format.string("type")?.ok_or_else(|| ApiError::missing("response_format.type"))?;
    match kind.as_str() {
        "text" => Ok(None),
        // llama-server takes the schema here too.
        "json_object" => match format.take("schema") {
            None => Ok(Some((Constraint::JsonObject, "response_format"))),
            Some(given) => schema(Some(given), "response_format.schema"),
        },
        "json_schema" => {
            let given = match format.take("json_schema") {
                None => format.take("schema"),
                Some(json) => {
                    let mut named = Fields::nested(json, "response_format.json_schema")?;
                    named.string("name")?;
                    named.bool("strict")?; // every schema is followed to the letter
                    named.take("schema")
                }
            };
            schema(Some(given.ok_or_else(|| ApiError::missing(SCHEMA))?), SCHEMA)
        }
        _ => Err(ApiError::wrong_value("response_format.type", "one of text, json_object, json_schema")),
    }
}

/// vLLM's newer form: an object with one of the constraints.
fn structured_outputs(fields: &mut Fields) -> Result<Found, ApiError> {
    let Some(json) = fields.take("structured_outputs") else { return Ok(None) };
    let mut inside = Fields::nested(json, "structured_outputs")?;
    let mut found = schema(inside.take("json"), "structured_outputs.json")?;
    if inside.bool("json_object")? == Some(true) {
        add(&mut found, Some((Constraint::JsonObject, "structured_outputs.json_object")))?;
    }
    let regex = text(&mut inside, "regex")?.map(|text| (Constraint::Regex(text), "structured_outputs.regex"));
    add(&mut found, regex)?;
    add(&mut found, choice(&mut inside, "choice", "structured_outputs.choice")?)?;
    let grammar = text(&mut inside, "grammar")?.map(|text| (grammar(text), "structured_outputs.grammar"));
    add(&mut found, grammar)?;
    for (name, path) in [
        ("structural_tag", "structured_outputs.structural_tag"),
        ("whitespace_pattern", "structured_outputs.whitespace_pattern"),
    ] {
        if inside.take(name).is_some() {
            return Err(ApiError::unsupported(path, ""));
        }
    }
    Ok(found)
}

/// A schema as JSON, or as the text of one.
fn schema(given: Option<Json>, field: &'static str) -> Result<Found, ApiError> {
    let schema = match given {
        None => return Ok(None),
        Some(json @ (Json::Object(_) | Json::Bool(_))) => json,
        Some(Json::String(text)) => match serde_json::from_str(&text) {
            Ok(json @ (Json::Object(_) | Json::Bool(_))) => json,
            _ => return Err(ApiError::wrong_value(field, "a JSON schema")),
        },
        Some(other) => return Err(ApiError::wrong_type(field, "a JSON schema", &other)),
    };
    Ok(Some((Constraint::JsonSchema(schema), field)))
}

/// A text that asks for something: clients send empty ones for "no grammar".
fn text(fields: &mut Fields, name: &str) -> Result<Option<String>, ApiError> {
    Ok(fields.string(name)?.filter(|text| !text.is_empty()))
}

fn choice(fields: &mut Fields, name: &str, field: &'static str) -> Result<Found, ApiError> {
    let items = match fields.take(name) {
        None => return Ok(None),
        Some(Json::Array(items)) => items,
        Some(other) => return Err(ApiError::wrong_type(field, "an array of strings", &other)),
    };
    if items.is_empty() {
        return Ok(None);
    }
    let text = |item| match item {
        Json::String(text) => Ok(text),
        other => Err(ApiError::wrong_type(field, "an array of strings", &other)),
    };
    let texts = items.into_iter().map(text).collect::<Result<_, _>>()?;
    Ok(Some((Constraint::Choice(texts), field)))
}

/// GBNF, which every rule of shows by its `::=`; else Lark.
fn grammar(text: String) -> Constraint {
    let is_lark = text.trim_start().starts_with("%llguidance") || !text.contains("::=");
    if is_lark { Constraint::Lark(text) } else { Constraint::Gbnf(text) }
}
