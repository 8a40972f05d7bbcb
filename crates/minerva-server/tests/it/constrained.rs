//! Constrained answers under every name that clients know for them.

use minerva_engine::SimConfig;
use serde_json::{Value as Json, json};

use crate::server::{sim, start, start_with};

fn schema() -> Json {
    json!({"type": "object", "properties": {"b": {"enum": ["x", "yy"]}, "a": {"type": "boolean"}},
        "required": ["b", "a"], "additionalProperties": false})
}

/// Whether a text is what its constraint wants.
type Check<'a> = &'a dyn Fn(&str) -> bool;

#[tokio::test]
async fn every_name_of_a_constraint_gives_an_answer_that_follows_it() {
    let server = start_with(SimConfig { spread: 3.0, ..sim() }, |_| {}).await;
    let gbnf = "root ::= (\"yes\" | \"no\") \"!\"{2}";
    let is_person = |text: &str| {
        let json: Json = serde_json::from_str(text).unwrap();
        // The schema has `b` before `a`, and so has the answer.
        assert!(text.find("\"b\"") < text.find("\"a\""), "{text}");
        ["x", "yy"].contains(&json["b"].as_str().unwrap())
            && json["a"].is_boolean()
            && json.as_object().unwrap().len() == 2
    };
    let is_json = |text: &str| serde_json::from_str::<Json>(text).unwrap().is_object();
    let is_answer = |text: &str| ["yes!!", "no!!"].contains(&text);
    let checks: [(Json, Check); 17] = [
        (json!({"response_format": {"type": "json_object"}}), &is_json),
        (json!({"response_format": {"type": "json_object", "schema": schema()}}), &is_person),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "strict": true, "schema": schema()}}}),
            &is_person,
        ),
        (json!({"response_format": {"type": "json_schema", "schema": schema()}}), &is_person),
        (json!({"json_schema": schema()}), &is_person),
        (json!({"guided_json": schema()}), &is_person),
        (json!({"guided_json": schema().to_string()}), &is_person),
        (json!({"structured_outputs": {"json": schema()}}), &is_person),
        (json!({"structured_outputs": {"json_object": true}}), &is_json),
        (json!({"grammar": gbnf}), &is_answer),
        (json!({"grammar": "%llguidance {}\nstart: (\"yes\" | \"no\") \"!!\""}), &is_answer),
        (json!({"guided_grammar": "start: (\"yes\" | \"no\") \"!!\""}), &is_answer),
        (json!({"guided_regex": "(yes|no)!{2}"}), &is_answer),
        (json!({"guided_choice": ["yes!!", "no!!"]}), &is_answer),
        (json!({"structured_outputs": {"regex": "(yes|no)!{2}"}}), &is_answer),
        (json!({"structured_outputs": {"choice": ["yes!!", "no!!"]}}), &is_answer),
        (json!({"structured_outputs": {"grammar": gbnf}, "response_format": {"type": "text"}}), &is_answer),
    ];
    for (fields, is_right) in checks {
        let mut request = json!({"temperature": 1, "max_tokens": 600, "seed": 4, "logit_bias": {"34": 8, "125": 9}});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        request["messages"] = json!([{"role": "user", "content": "hi"}]);
        let chat = server.chat(&request).await.json();
        let answer = &chat["choices"][0];
        assert_eq!(answer["finish_reason"], "stop", "{fields} {chat}");
        assert!(is_right(answer["message"]["content"].as_str().unwrap()), "{fields} {chat}");
        request.as_object_mut().unwrap().remove("messages");
        request["prompt"] = json!(["hi", "there"]);
        let text = server.post("/v1/completions", &request).await.json();
        for i in 0..2 {
            assert!(is_right(text["choices"][i]["text"].as_str().unwrap()), "{fields} {text}");
        }
    }
}

#[tokio::test]
async fn a_schema_that_is_not_supported_is_a_400_that_names_the_place() {
    let server = start().await;
    let schema =
        json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}, "b": {"if": true}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "p", "schema": schema}});
    let request = json!({"messages": [{"role": "user", "content": "hi"}], "response_format": format, "stream": true});
    let reply = server.chat(&request).await;
    let param = "response_format.json_schema.schema";
    assert_eq!(reply.error(), (400, "invalid_constraint".to_owned(), Some(param.to_owned())));
    assert!(reply.text().contains("/properties/b/if"), "{}", reply.text());
    server.assert_serves().await;
}

#[tokio::test]
async fn a_wrong_constraint_is_a_400_that_names_its_field() {
    let server = start().await;
    let not = json!({"not": {}});
    for (fields, code, param) in [
        (json!({"response_format": {"type": "xml"}}), "invalid_value", "response_format.type"),
        (json!({"response_format": {}}), "missing_required_parameter", "response_format.type"),
        (json!({"response_format": "json_object"}), "invalid_type", "response_format"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
            "missing_required_parameter",
            "response_format.json_schema.schema",
        ),
        (
            json!({"response_format": {"type": "json_object", "schema": not}}),
            "invalid_constraint",
            "response_format.schema",
        ),
        (json!({"json_schema": 5}), "invalid_type", "json_schema"),
        (json!({"json_schema": {"type": "x"}}), "invalid_constraint", "json_schema"),
        (json!({"grammar": "root ::= x"}), "invalid_constraint", "grammar"),
        (json!({"grammar": 5}), "invalid_type", "grammar"),
        (json!({"guided_json": "{"}), "invalid_value", "guided_json"),
        (json!({"guided_regex": "("}), "invalid_constraint", "guided_regex"),
        (json!({"guided_choice": [1]}), "invalid_type", "guided_choice"),
        (json!({"guided_grammar": "start: x"}), "invalid_constraint", "guided_grammar"),
        (json!({"guided_whitespace_pattern": " "}), "unsupported_parameter", "guided_whitespace_pattern"),
        (json!({"structured_outputs": {"regex": "["}}), "invalid_constraint", "structured_outputs.regex"),
        (
            json!({"structured_outputs": {"structural_tag": {}}}),
            "unsupported_parameter",
            "structured_outputs.structural_tag",
        ),
        (json!({"guided_regex": "a", "guided_choice": ["a"]}), "invalid_value", "guided_choice"),
        (json!({"response_format": {"type": "json_object"}, "grammar": "root ::= \"x\""}), "invalid_value", "grammar"),
    ] {
        let mut request = json!({"prompt": "hi", "messages": [{"role": "user", "content": "hi"}]});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let reply = server.post(path, &request).await;
            assert_eq!(reply.error(), (400, code.to_owned(), Some(param.to_owned())), "{request} {}", reply.text());
        }
    }
    server.assert_serves().await;
}
