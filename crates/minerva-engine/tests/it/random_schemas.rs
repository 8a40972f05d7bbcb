//! Random JSON schemas and random seeds: what comes out is valid, and what cannot be enforced is refused.

use minerva_engine::{Constraint, EventStream, TokenId};
use minerva_engine::{Engine, FinishReason, Request, RequestError, SamplingParams, SimConfig};
use serde_json::{Map, Value as Json, json};

use crate::support::{Random, read};

const N_SCHEMAS: u64 = 2_000;

const UNSUPPORTED: &[&str] = &["not", "uniqueItems", "contains", "if", "propertyNames", "dependentRequired"];

/// Schemas of one seed, nested up to a depth.
struct Generator {
    random: Random,
}

/// Whether a keyword of [`UNSUPPORTED`] is anywhere in it; no property or value has these names.
fn is_unsupported(json: &Json) -> bool {
    match json {
        Json::Object(map) => map.iter().any(|(name, part)| UNSUPPORTED.contains(&&**name) || is_unsupported(part)),
        Json::Array(items) => items.iter().any(is_unsupported),
        _ => false,
    }
}

impl Generator {
    fn pick<'a, T: ?Sized>(&mut self, items: &[&'a T]) -> &'a T {
        items[self.random.below(items.len() as u64) as usize]
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.random.below(one_in) == 0
    }

    fn int(&mut self, from: i64, to: i64) -> i64 {
        from + self.random.below((to - from + 1) as u64) as i64
    }

    fn root(&mut self) -> Json {
        let mut schema = match self.random.below(8) {
            0 => self.schema(3),
            1 => self.array(3),
            _ => self.object(3),
        };
        let uses_refs = schema.to_string().contains("#/$defs/");
        if let Some(root) = schema.as_object_mut().filter(|_| uses_refs) {
            let mut tree = self.object(0);
            tree["properties"] =
                json!({"next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}, "n": {"type": "integer"}});
            tree["additionalProperties"] = json!(false);
            tree["required"] = json!(["next"]);
            root.insert("$defs".into(), json!({"tree": tree, "leaf": self.leaf()}));
        }
        schema
    }

    fn schema(&mut self, depth: u32) -> Json {
        if depth == 0 {
            return self.leaf();
        }
        let mut schema = match self.random.below(12) {
            0..=3 => self.leaf(),
            4..=5 => self.object(depth - 1),
            6..=7 => self.array(depth - 1),
            8 => json!({"anyOf": self.schemas(depth - 1)}),
            9 => json!({"oneOf": self.schemas(depth - 1)}),
            10 => json!({"allOf": [self.schema(depth - 1)], "description": "both"}),
            _ => json!({"$ref": self.pick(&["#/$defs/tree", "#/$defs/leaf"])}),
        };
        if self.chance(60) {
            let (name, value) = match self.random.below(6) {
                0 => ("not", json!({"type": "null"})),
                1 => ("uniqueItems", json!(true)),
                2 => ("contains", json!({"type": "null"})),
                3 => ("if", json!({"type": "null"})),
                4 => ("propertyNames", json!({"maxLength": 3})),
                _ => ("dependentRequired", json!({"a": ["b"]})),
            };
            schema[name] = value;
        }
        schema
    }

    fn schemas(&mut self, depth: u32) -> Vec<Json> {
        (0..=self.random.below(3)).map(|_| self.schema(depth)).collect()
    }

    fn leaf(&mut self) -> Json {
        match self.random.below(9) {
            0 => json!({"type": "boolean"}),
            1 => json!({"type": "null"}),
            2 => self.number("integer"),
            3 => self.number("number"),
            4 | 5 => self.string(),
            6 => json!({"const": self.value(2)}),
            7 => {
                let values: Vec<Json> = (0..=self.random.below(4)).map(|_| self.value(1)).collect();
                json!({"enum": values})
            }
            _ => json!({"type": ["string", "null", "integer"], "maxLength": 4, "maximum": 12, "minimum": -3}),
        }
    }

    fn number(&mut self, kind: &str) -> Json {
        let mut schema = json!({"type": kind});
        let low = self.int(-120, 100);
        let scale = if kind == "number" && self.chance(2) { 0.25 } else { 1.0 };
        let bound = |value: i64| if scale < 1.0 { json!(value as f64 * scale) } else { json!(value) };
        if self.chance(2) {
            let name = self.pick(&["minimum", "exclusiveMinimum"]);
            schema[name] = bound(low);
        }
        if self.chance(2) {
            let name = self.pick(&["maximum", "exclusiveMaximum"]);
            schema[name] = bound(low + self.int(2, 300));
        }
        if self.chance(6) {
            schema["multipleOf"] = if kind == "number" && self.chance(2) { json!(0.25) } else { json!(self.int(1, 7)) };
        }
        schema
    }

    fn string(&mut self) -> Json {
        match self.random.below(6) {
            0 => json!({"type": "string"}),
            1 => {
                let n = self.int(0, 4);
                json!({"type": "string", "minLength": n, "maxLength": n + self.int(0, 5)})
            }
            2 => json!({"type": "string", "pattern": self.pick(&[
                "^[a-z]{2,5}$", "^\\d{3}-\\d{4}$", "^(red|green|blue)$", "[0-9]+", "^x", "^\\w+\\s\\w+$", "^[^ab]*$",
                "^\\S{1,3}\\.$", "é|ü", "^a.c$", "^[\\u0041-\\u0044]+$", "",
            ])}),
            3 => json!({"type": "string", "format": self.pick(&[
                "date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "uri", "duration",
            ])}),
            4 => json!({"type": "string", "maxLength": self.int(0, 6)}),
            _ => json!({"type": "string", "enum": ["a", "\"quoted\"", "back\\slash", "new\nline", "é🦀", ""]}),
        }
    }

    fn value(&mut self, depth: u32) -> Json {
        match self.random.below(if depth == 0 { 6 } else { 8 }) {
            0 => Json::Null,
            1 => json!(true),
            2 => json!(self.int(-1_000, 1_000)),
            3 => json!(self.int(-1_000, 1_000) as f64 / 8.0),
            4 => json!(self.pick(&["", "x", "two words", "\u{1}\t\"", "漢字"])),
            5 => json!(self.int(0, 1 << 40)),
            6 => json!([self.value(depth - 1), self.value(depth - 1)]),
            _ => json!({"k": self.value(depth - 1), "ü": self.value(depth - 1)}),
        }
    }

    fn array(&mut self, depth: u32) -> Json {
        let mut schema = json!({"type": "array"});
        if !self.chance(5) {
            schema["items"] = self.schema(depth);
        }
        if self.chance(3) {
            schema["prefixItems"] = json!(self.schemas(depth));
        }
        if self.chance(6) && schema.get("prefixItems").is_some() {
            schema["items"] = json!(false);
        }
        let least = self.int(0, 2);
        if self.chance(3) {
            schema["minItems"] = json!(least);
        }
        if !self.chance(4) {
            schema["maxItems"] = json!(least + self.int(0, 3));
        }
        schema
    }

    fn object(&mut self, depth: u32) -> Json {
        let names = ["name", "a b", "ü", "q\"uote", "id", "x_1", "tags"];
        let mut properties = Map::new();
        let mut required = Vec::new();
        for _ in 0..self.random.below(5) {
            let name = self.pick(&names);
            properties.insert(name.to_owned(), self.schema(depth));
            if self.chance(2) && !required.contains(&name) {
                required.push(name);
            }
        }
        if self.chance(10) {
            required.push("extra");
        }
        let mut schema = json!({"type": "object", "properties": properties});
        if !required.is_empty() {
            schema["required"] = json!(required);
        }
        match self.random.below(8) {
            0..=3 => schema["additionalProperties"] = json!(false),
            4 => schema["additionalProperties"] = self.leaf(),
            _ => {}
        }
        if self.chance(12) {
            schema["patternProperties"] = json!({"^p_": self.leaf()});
        }
        if self.chance(12) {
            schema["minProperties"] = json!(self.int(0, 3));
        }
        if self.chance(12) {
            schema["maxProperties"] = json!(self.int(1, 4));
        }
        schema
    }
}

/// Anything goes, but what ends a value is likely enough that values end.
fn wild(schema: Json, seed: u64) -> Request {
    let bias = |(byte, bias): &(u8, f32)| (TokenId::from(*byte), *bias);
    let sampling = SamplingParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: Some(seed),
        logit_bias: [(b'"', 4.0), (b'}', 5.0), (b']', 5.0), (b',', 1.0)].iter().map(bias).collect(),
        ..SamplingParams::default()
    };
    let constraint = Some(Constraint::JsonSchema(schema));
    Request { constraint, sampling, ..Request::text(format!("seed {seed}")) }.max_tokens(600)
}

/// Whether the answer ended by itself and is valid; an error if it is not.
fn outcome(schema: &Json, events: EventStream) -> Result<bool, String> {
    let answer = read(events);
    answer.end.as_ref().map_err(|error| format!("{error} after {:?}", answer.choices))?;
    if answer.choices[0].reason() == FinishReason::Length {
        return Ok(false);
    }
    let text = answer.text();
    let value: Json = match serde_json::from_str(text) {
        // JSON has no bound for numbers, and doubles have.
        Err(error) if error.to_string().starts_with("number out of range") => return Ok(false),
        parsed => parsed.map_err(|error| format!("{error}\n{text}"))?,
    };
    let validator = jsonschema::options().should_validate_formats(true).build(schema);
    let validator = validator.map_err(|error| error.to_string())?;
    validator.validate(&value).map_err(|error| format!("{error} at {}\n{text}", error.instance_path()))?;
    Ok(true)
}

#[test]
fn finished_outputs_of_random_schemas_are_valid_and_unsupported_schemas_are_refused() {
    let config = SimConfig { n_seq_max: 16, spread: 3.0, ..SimConfig::default() };
    let engine = Engine::simulate(config);
    let (mut n_valid, mut n_cut, mut n_refused) = (0, 0, 0);
    let mut running: Vec<(u64, Json, EventStream)> = Vec::new();
    let mut wrong = Vec::new();
    let mut finish = |running: &mut Vec<(u64, Json, EventStream)>| {
        for (seed, schema, events) in running.drain(..) {
            match outcome(&schema, events) {
                Ok(true) => n_valid += 1,
                Ok(false) => n_cut += 1,
                Err(problem) => wrong.push(format!("seed {seed}: {problem}\n{schema}")),
            }
        }
    };
    for seed in 0..N_SCHEMAS {
        let mut generator = Generator { random: Random::new(seed) };
        let schema = generator.root();
        match engine.generate_blocking(wild(schema.clone(), seed)) {
            Ok(events) => {
                assert!(!is_unsupported(&schema), "seed {seed}: {schema}");
                running.push((seed, schema, events));
            }
            Err(RequestError::Constraint(error)) => {
                n_refused += 1;
                if std::env::var_os("SHOW").is_some() {
                    println!("{seed}: {error}");
                }
                assert!(error.location.is_some(), "seed {seed}: {error}\n{schema}");
            }
            Err(other) => panic!("seed {seed}: {other}\n{schema}"),
        }
        if running.len() == 16 {
            finish(&mut running);
        }
    }
    finish(&mut running);
    assert!(wrong.is_empty(), "{} are wrong:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
    println!("{n_valid} valid, {n_cut} cut by max_tokens, {n_refused} refused");
    assert!(n_valid > 1_000, "{n_valid} valid, {n_cut} cut, {n_refused} refused");
}
