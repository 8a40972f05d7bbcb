//! Any bytes as a body: an answer or a 4xx, never a 5xx and never a panic.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Map, Value as Json};

use crate::client::post_with;
use crate::server::{TestServer, start};

/// JSON of any shape, with our fields' names likely.
fn any_json() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        (-3_i64..5).prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        "\\PC{0,12}".prop_map(Json::from),
        prop::sample::select(vec!["user", "system", "tool", "text", "default", "none", "auto"]).prop_map(Json::from),
    ];
    leaf.prop_recursive(4, 24, 6, |inner| {
        let field = prop_oneof![prop::sample::select(FIELDS).prop_map(ToOwned::to_owned), "\\PC{0,8}"];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Json::from),
            prop::collection::vec((field, inner), 0..6).prop_map(|fields| Json::Object(fields.into_iter().collect())),
        ]
    })
}

const FIELDS: &[&str] = &[
    "model",
    "messages",
    "prompt",
    "role",
    "content",
    "type",
    "text",
    "stream",
    "stream_options",
    "include_usage",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "n_predict",
    "stop",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "repeat_last_n",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "ignore_eos",
    "min_tokens",
    "stop_token_ids",
    "prompt_cache_key",
    "cache_control",
    "ttl",
    "queue_updates",
    "cache_prompt",
    "tools",
    "response_format",
    "json_schema",
    "grammar",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "modalities",
    "best_of",
    "echo",
    "suffix",
    "user",
];

/// A request that is right but for a few fields.
fn almost_right() -> impl Strategy<Value = Json> {
    let fields = prop::collection::vec((prop::sample::select(FIELDS), any_json()), 0..4);
    fields.prop_map(|fields| {
        let right =
            serde_json::json!({"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "max_tokens": 2});
        let mut map: Map<String, Json> = right.as_object().unwrap().clone();
        map.extend(
            fields.into_iter().filter(|(name, _)| *name != "max_tokens").map(|(name, json)| (name.to_owned(), json)),
        );
        Json::Object(map)
    })
}

/// Runs `cases` bodies from `strategy` against both endpoints of one server.
fn check(cases: u32, strategy: impl Strategy<Value = Vec<u8>>) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server: TestServer = runtime.block_on(start());
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let result = runner.run(&strategy, |body| {
        for path in ["/v1/chat/completions", "/v1/completions"] {
            let reply = runtime.block_on(post_with(server.address, path, "", &body));
            prop_assert!(
                reply.status == 200 || (400..500).contains(&reply.status),
                "{} {}",
                reply.status,
                reply.text()
            );
            if reply.status != 200 {
                reply.error();
            }
        }
        Ok(())
    });
    result.unwrap();
    runtime.block_on(server.assert_serves());
}

#[test]
fn any_bytes_are_answered_with_200_or_4xx() {
    check(200, prop::collection::vec(any::<u8>(), 0..200));
}

#[test]
fn any_json_is_answered_with_200_or_4xx() {
    check(200, any_json().prop_map(|json| json.to_string().into_bytes()));
}

#[test]
fn requests_with_a_few_wrong_fields_are_answered_with_200_or_4xx() {
    check(400, almost_right().prop_map(|json| json.to_string().into_bytes()));
}
