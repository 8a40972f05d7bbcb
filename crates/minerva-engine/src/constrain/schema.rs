//! Looks through a JSON schema before it is compiled: what is unsupported, and where.
//!
//! llguidance refuses what it cannot enforce, but does not say where that stands, and a few things it lets through that it
//! enforces in another way than validators do. [`check`] finds both, and drops what changes nothing.

use serde_json::{Map, Value as Json, json};

use super::ConstraintError;

/// The deepest nesting of schemas. Compilers recurse on it.
const MAX_DEPTH: usize = 64;

/// The most schemas within a schema.
const MAX_SCHEMAS: usize = 10_000;

/// The most values of all `enum`s together.
const MAX_ENUM_VALUES: usize = 10_000;

/// The largest count that a keyword such as `maxItems` may have.
const MAX_COUNT: u64 = 10_000;

/// Whole numbers beyond this are not exact in a double, and that is what they are compiled to.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0; // 2^53

/// How many parts of a schema are compiled by themselves to find the one at fault.
const MAX_TRIES: usize = 48;

/// Asks for nothing, in every draft.
const ANNOTATIONS: &[&str] = &[
    "$anchor",
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "contentEncoding",
    "contentMediaType",
    "default",
    "definitions",
    "description",
    "examples",
    "id",
    "readOnly",
    "title",
    "writeOnly",
];

/// The same, but llguidance does not know that.
const DROPPED: &[&str] = &["deprecated", "x-guidance"];

/// Keywords of some draft that are not enforced.
const UNSUPPORTED: &[&str] = &[
    "$dynamicAnchor",
    "$dynamicRef",
    "$recursiveAnchor",
    "$recursiveRef",
    "$vocabulary",
    "contains",
    "contentSchema",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "else",
    "if",
    "maxContains",
    "minContains",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
    "uniqueItems",
];

/// `format`s with a grammar, and a pattern that takes away what llguidance's grammar allows but the format does not.
const FORMATS: &[(&str, &str)] = &[
    ("date", ""),
    ("date-time", "^.{17}[0-5]"), // a leap second is one at the end of a day in UTC only
    ("duration", ""),
    ("email", "^[^@]{1,64}@.{1,63}$"), // RFC 5321, 4.5.3.1
    ("hostname", "^.{1,253}$"),        // RFC 1035, 2.3.4
    ("ipv4", ""),
    ("ipv6", ""),
    ("time", "^.{6}[0-5]"),
    ("uri", ""),
    ("uuid", ""),
];

/// Checks `schema` and gives it back without what changes nothing.
///
/// # Errors
/// [`ConstraintError`] with the JSON pointer of the first keyword that is unsupported, wrong or over a limit.
pub(super) fn check(schema: &Json) -> Result<Json, ConstraintError> {
    let mut checker = Checker { root: schema, n_schemas: 0, n_enum_values: 0 };
    checker.schema(schema, "", 0)
}

/// Compiles parts of `schema` by themselves with `compile`, which returns what is wrong with them, and returns the deepest
/// part that fails, with its JSON pointer.
pub(super) fn locate(
    schema: &Json,
    compile: impl Fn(Json) -> Option<ConstraintError>,
) -> Option<(String, ConstraintError)> {
    // A part loses what lies around it, except for definitions: other references would fail for that reason.
    if !refers_to_definitions_only(schema) {
        return None;
    }
    let definitions: Vec<(&str, &Json)> =
        ["$defs", "definitions"].into_iter().filter_map(|name| Some((name, schema.get(name)?))).collect();
    let (mut found, mut parent, mut n_tries) = (None, schema, 0);
    let mut at = String::new();
    'deeper: loop {
        for (name, part) in parts(parent) {
            let Json::Object(map) = part else { continue };
            n_tries += 1;
            if n_tries > MAX_TRIES {
                return found;
            }
            let mut alone = map.clone();
            for (name, definition) in &definitions {
                alone.insert((*name).to_owned(), (*definition).clone());
            }
            if let Some(error) = compile(Json::Object(alone)) {
                at = format!("{at}{name}");
                found = Some((at.clone(), error));
                parent = part;
                continue 'deeper;
            }
        }
        return found;
    }
}

fn refers_to_definitions_only(json: &Json) -> bool {
    match json {
        Json::Object(map) => map.iter().all(|(name, value)| match value.as_str().filter(|_| name == "$ref") {
            Some(reference) => reference.starts_with("#/$defs/") || reference.starts_with("#/definitions/"),
            None => refers_to_definitions_only(value),
        }),
        Json::Array(items) => items.iter().all(refers_to_definitions_only),
        _ => true,
    }
}

/// The schemas right inside a schema, with the end of their pointer.
fn parts(schema: &Json) -> Vec<(String, &Json)> {
    let mut parts = Vec::new();
    for (name, value) in schema.as_object().into_iter().flatten() {
        match (Inside::of(name), value) {
            (Inside::Map, Json::Object(map)) => {
                parts.extend(map.iter().map(|(key, part)| (format!("/{name}/{}", escape(key)), part)));
            }
            (Inside::One | Inside::OneOrList, part @ Json::Object(_)) => parts.push((format!("/{name}"), part)),
            (Inside::List | Inside::OneOrList, Json::Array(items)) => {
                parts.extend(items.iter().enumerate().map(|(i, part)| (format!("/{name}/{i}"), part)));
            }
            _ => {}
        }
    }
    parts
}

/// What a keyword has inside.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Inside {
    Nothing,
    One,
    List,
    OneOrList,
    Map,
}

impl Inside {
    fn of(keyword: &str) -> Self {
        match keyword {
            "properties" | "patternProperties" | "$defs" | "definitions" => Self::Map,
            "additionalProperties" | "additionalItems" => Self::One,
            "items" => Self::OneOrList,
            "prefixItems" | "allOf" | "anyOf" | "oneOf" => Self::List,
            _ => Self::Nothing,
        }
    }
}

/// A name as a part of a JSON pointer.
fn escape(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

struct Checker<'a> {
    root: &'a Json,
    n_schemas: usize,
    n_enum_values: usize,
}

impl Checker<'_> {
    fn schema(&mut self, schema: &Json, at: &str, depth: usize) -> Result<Json, ConstraintError> {
        let fail = |problem: String| Err(ConstraintError::at(at, problem));
        self.n_schemas += 1;
        if self.n_schemas > MAX_SCHEMAS {
            return fail(format!("the schema has more than {MAX_SCHEMAS} schemas inside"));
        }
        if depth > MAX_DEPTH {
            return fail(format!("schemas are nested more than {MAX_DEPTH} deep"));
        }
        let map = match schema {
            Json::Bool(_) => return Ok(schema.clone()),
            Json::Object(map) => map,
            _ => return fail("a schema is an object or a boolean".into()),
        };
        let mut checked = Map::new();
        for (name, value) in map {
            let here = format!("{at}/{}", escape(name));
            if DROPPED.contains(&name.as_str()) || (name == "uniqueItems" && value == &Json::Bool(false)) {
                continue;
            }
            if UNSUPPORTED.contains(&name.as_str()) {
                return Err(ConstraintError::at(here, format!("`{name}` is not supported")));
            }
            let value = match Inside::of(name) {
                Inside::Nothing => {
                    self.keyword(map, name, value, &here)?;
                    value.clone()
                }
                inside => self.inside(inside, value, &here, depth)?,
            };
            checked.insert(name.clone(), value);
        }
        if map.contains_key("multipleOf") {
            // Beyond this neither a multiple nor its check is exact.
            for (name, exclusive, bound) in
                [("minimum", "exclusiveMinimum", -MAX_EXACT), ("maximum", "exclusiveMaximum", MAX_EXACT)]
            {
                if !map.contains_key(name) && !map.get(exclusive).is_some_and(Json::is_number) {
                    checked.insert(name.into(), json!(bound));
                }
            }
        }
        if let Some(pattern) = narrower(map) {
            match checked.entry("allOf").or_insert_with(|| Json::Array(Vec::new())) {
                Json::Array(all) => all.push(json!({"type": "string", "pattern": pattern})),
                _ => return fail("`allOf` has to be an array of schemas".into()),
            }
        }
        Ok(Json::Object(checked))
    }

    fn inside(&mut self, inside: Inside, value: &Json, at: &str, depth: usize) -> Result<Json, ConstraintError> {
        match (inside, value) {
            (Inside::Map, Json::Object(map)) => {
                let part = |(key, part): (&String, &Json)| {
                    Ok((key.clone(), self.schema(part, &format!("{at}/{}", escape(key)), depth + 1)?))
                };
                map.iter().map(part).collect::<Result<Map<_, _>, _>>().map(Json::Object)
            }
            (Inside::List | Inside::OneOrList, Json::Array(items)) => {
                let part = |(i, part)| self.schema(part, &format!("{at}/{i}"), depth + 1);
                items.iter().enumerate().map(part).collect::<Result<Vec<_>, _>>().map(Json::Array)
            }
            (Inside::One | Inside::OneOrList, part) => self.schema(part, at, depth + 1),
            (Inside::Map, _) => Err(ConstraintError::at(at, "it has to be an object of schemas")),
            (Inside::List, _) => Err(ConstraintError::at(at, "it has to be an array of schemas")),
            (Inside::Nothing, _) => Ok(value.clone()),
        }
    }

    /// A keyword without schemas inside.
    fn keyword(
        &mut self,
        schema: &Map<String, Json>,
        name: &str,
        value: &Json,
        at: &str,
    ) -> Result<(), ConstraintError> {
        let wanted = |what: &str| Err(ConstraintError::at(at, format!("`{name}` has to be {what}")));
        match name {
            "type" => {
                let known = |json: &Json| {
                    let types = ["null", "boolean", "integer", "number", "string", "array", "object"];
                    json.as_str().is_some_and(|name| types.contains(&name))
                };
                if !(known(value) || value.as_array().is_some_and(|types| !types.is_empty() && types.iter().all(known)))
                {
                    return wanted("the name of a JSON type, or an array of names");
                }
            }
            "const" => exact(value, at)?,
            "enum" => {
                let Some(values) = value.as_array().filter(|values| !values.is_empty()) else {
                    return wanted("an array with at least one value");
                };
                self.n_enum_values += values.len();
                if self.n_enum_values > MAX_ENUM_VALUES {
                    return wanted(&format!("smaller: the limit is {MAX_ENUM_VALUES} values in all"));
                }
                values.iter().enumerate().try_for_each(|(i, value)| exact(value, &format!("{at}/{i}")))?;
            }
            "minimum" | "maximum" | "multipleOf" => {
                if !value.is_number() {
                    return wanted("a number");
                }
                exact(value, at)?;
            }
            "exclusiveMinimum" | "exclusiveMaximum" => {
                if !(value.is_number() || value.is_boolean()) {
                    return wanted("a number");
                }
                exact(value, at)?;
            }
            "minLength" | "maxLength" | "minItems" | "maxItems" | "minProperties" | "maxProperties" => {
                match value.as_u64() {
                    None => return wanted("a whole number from 0"),
                    Some(count) if count > MAX_COUNT => {
                        return wanted(&format!("at most {MAX_COUNT}, got {count}"));
                    }
                    // A name that comes twice counts once, and a grammar does not remember names.
                    Some(count) if name == "minProperties" && count > n_required(schema) + 1 => {
                        return wanted("at most one more than the number of `required` properties");
                    }
                    Some(_) => {}
                }
            }
            "required" if !value.as_array().is_some_and(|names| names.iter().all(Json::is_string)) => {
                return wanted("an array of names");
            }
            "pattern" => match value.as_str() {
                None => return wanted("a string"),
                Some(pattern) => super::compile::check_groups(pattern, at)?,
            },
            "format" if may_be_string(schema) => match value.as_str() {
                None => return wanted("a string"),
                Some(format) if !FORMATS.iter().any(|(known, _)| *known == format) => {
                    let known: Vec<&str> = FORMATS.iter().map(|(known, _)| *known).collect();
                    return wanted(&format!("one of {}", known.join(", ")));
                }
                Some(_) => {}
            },
            "$ref" => {
                let Some(reference) = value.as_str() else { return wanted("a string") };
                let Some(pointer) = reference.strip_prefix('#') else {
                    return wanted("a reference into this schema, such as `#/$defs/name`");
                };
                if pointer.starts_with('/') && !pointer.contains('%') && self.root.pointer(pointer).is_none() {
                    return Err(ConstraintError::at(at, "there is nothing at the place that it names"));
                }
            }
            name if name.starts_with("x-") || ANNOTATIONS.contains(&name) => {}
            _ => {} // unknown to every draft, so an annotation
        }
        Ok(())
    }
}

/// What a schema's `format` has to be narrowed by.
fn narrower(schema: &Map<String, Json>) -> Option<&'static str> {
    let format = schema.get("format").filter(|_| may_be_string(schema))?.as_str()?;
    FORMATS.iter().find(|(known, narrower)| *known == format && !narrower.is_empty()).map(|(_, narrower)| *narrower)
}

fn n_required(schema: &Map<String, Json>) -> u64 {
    let names = schema.get("required").and_then(Json::as_array).into_iter().flatten();
    names.collect::<std::collections::HashSet<_>>().len() as u64
}

fn may_be_string(schema: &Map<String, Json>) -> bool {
    match schema.get("type") {
        Some(Json::String(name)) => name == "string",
        Some(Json::Array(names)) => names.iter().any(|name| name == "string"),
        _ => true,
    }
}

/// Numbers are compiled as doubles, and one that is not exact would become another.
fn exact(value: &Json, at: &str) -> Result<(), ConstraintError> {
    match value {
        Json::Number(number) => {
            let is_inexact = |value: i128| value.unsigned_abs() > MAX_EXACT as u128;
            if number.as_i128().is_some_and(is_inexact) {
                return Err(ConstraintError::at(at, format!("{number} is beyond 2^53, the limit for whole numbers")));
            }
            Ok(())
        }
        Json::Array(items) => items.iter().enumerate().try_for_each(|(i, item)| exact(item, &format!("{at}/{i}"))),
        Json::Object(map) => map.iter().try_for_each(|(key, item)| exact(item, &format!("{at}/{}", escape(key)))),
        _ => Ok(()),
    }
}
