//! What is refused: the documented status, code and field, and a server that goes on.

use minerva_engine::SimConfig;
use serde_json::{Value as Json, json};

use crate::client::{self, head, post_with, read_reply, send};
use crate::server::{sim, start, start_loading, start_with};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn a_wrong_field_is_a_400_that_names_it() {
    let server = start().await;
    let user = json!([{"role": "user", "content": "hi"}]);
    let chat = |fields: Json| {
        let mut request = json!({"messages": user});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        (CHAT, request)
    };
    let text = |fields: Json| {
        let mut request = json!({"prompt": "hi"});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        (TEXT, request)
    };
    let messages = |messages: Json| (CHAT, json!({"messages": messages}));
    for ((path, request), code, param) in [
        // missing
        ((CHAT, json!({})), "missing_required_parameter", "messages"),
        ((TEXT, json!({})), "missing_required_parameter", "prompt"),
        (messages(json!([{"content": "hi"}])), "missing_required_parameter", "messages[0].role"),
        (messages(json!([{"role": "user"}])), "missing_required_parameter", "messages[0].content"),
        (
            messages(json!([{"role": "user", "content": [{}]}])),
            "missing_required_parameter",
            "messages[0].content[0].type",
        ),
        // of the wrong type
        (messages(json!("hi")), "invalid_type", "messages"),
        (messages(json!(["hi"])), "invalid_type", "messages[0]"),
        (messages(json!([{"role": 1, "content": "hi"}])), "invalid_type", "messages[0].role"),
        (messages(json!([{"role": "user", "content": 1}])), "invalid_type", "messages[0].content"),
        (chat(json!({"max_tokens": "5"})), "invalid_type", "max_tokens"),
        (chat(json!({"max_tokens": 5.5})), "invalid_type", "max_tokens"),
        (chat(json!({"stream": "true"})), "invalid_type", "stream"),
        (chat(json!({"stop": 1})), "invalid_type", "stop"),
        (chat(json!({"stop": [1]})), "invalid_type", "stop"),
        (chat(json!({"logprobs": 2})), "invalid_type", "logprobs"),
        (chat(json!({"model": 5})), "invalid_type", "model"),
        (chat(json!({"stream_options": 5})), "invalid_type", "stream_options"),
        (text(json!({"prompt": 5})), "invalid_type", "prompt"),
        (text(json!({"prompt": ["a", {}]})), "invalid_type", "prompt[1]"),
        (text(json!({"logprobs": true})), "invalid_type", "logprobs"),
        // out of range
        (messages(json!([])), "invalid_value", "messages"),
        (messages(json!([{"role": "king", "content": "hi"}])), "invalid_value", "messages[0].role"),
        (chat(json!({"max_tokens": 0})), "invalid_value", "max_tokens"),
        (chat(json!({"max_tokens": -1})), "invalid_value", "max_tokens"),
        (chat(json!({"max_completion_tokens": 99_999_999_999_u64})), "invalid_value", "max_completion_tokens"),
        (chat(json!({"n": 0})), "invalid_value", "n"),
        (chat(json!({"n": 5})), "invalid_value", "n"),
        (chat(json!({"top_logprobs": 3})), "invalid_value", "top_logprobs"),
        (chat(json!({"logprobs": true, "top_logprobs": 21})), "invalid_value", "top_logprobs"),
        (chat(json!({"stop": ""})), "invalid_value", "stop"),
        (chat(json!({"stop": vec!["a"; 17]})), "invalid_value", "stop"),
        (chat(json!({"stop": "a".repeat(2000)})), "invalid_value", "stop"),
        (text(json!({"prompt": []})), "invalid_value", "prompt"),
        (text(json!({"prompt": ""})), "invalid_value", "prompt"),
        (text(json!({"prompt": [104, -1]})), "invalid_value", "prompt"),
        (text(json!({"prompt": [104, 1_000_000]})), "invalid_value", "prompt"),
        (text(json!({"prompt": ["a", ""]})), "invalid_value", "prompt[1]"),
        (text(json!({"prompt": vec!["a"; 300]})), "invalid_value", "prompt"),
        // asked for, and would silently not happen
        (messages(json!([{"role": "tool", "content": "hi"}])), "unsupported_parameter", "messages[0].role"),
        (
            messages(json!([{"role": "assistant", "tool_calls": [{}]}])),
            "unsupported_parameter",
            "messages[0].tool_calls",
        ),
        (
            messages(json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}])),
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
        (chat(json!({"tools": [{"type": "function"}]})), "unsupported_parameter", "tools"),
        (chat(json!({"tool_choice": "required"})), "unsupported_parameter", "tool_choice"),
        (chat(json!({"functions": [{}]})), "unsupported_parameter", "functions"),
        (chat(json!({"modalities": ["text", "audio"]})), "unsupported_parameter", "modalities"),
        (text(json!({"echo": true})), "unsupported_parameter", "echo"),
        (text(json!({"suffix": "x"})), "unsupported_parameter", "suffix"),
        (text(json!({"best_of": 3})), "unsupported_parameter", "best_of"),
    ] {
        let reply = server.post(path, &request).await;
        assert_eq!(reply.error(), (400, code.to_owned(), Some(param.to_owned())), "{request} {}", reply.text());
    }
    server.assert_serves().await;
}

#[tokio::test]
async fn a_wrong_field_about_ends_hints_or_the_queue_is_a_400_that_names_it() {
    let server = start().await;
    let user = json!([{"role": "user", "content": "hi"}]);
    let with = |mut request: Json, fields: Json| {
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        request
    };
    let chat = |fields: Json| (CHAT, with(json!({"messages": user}), fields));
    let text = |fields: Json| (TEXT, with(json!({"prompt": "hi"}), fields));
    let messages = |messages: Json| (CHAT, json!({"messages": messages}));
    for ((path, request), code, param) in [
        (chat(json!({"stop_token_ids": 5})), "invalid_type", "stop_token_ids"),
        (chat(json!({"stop_token_ids": ["5"]})), "invalid_type", "stop_token_ids"),
        (chat(json!({"stop_token_ids": [1.5]})), "invalid_type", "stop_token_ids"),
        (chat(json!({"stop_token_ids": [-1]})), "invalid_value", "stop_token_ids"),
        (chat(json!({"stop_token_ids": [259]})), "invalid_value", "stop_token_ids"),
        (chat(json!({"stop_token_ids": [1_u64 << 40]})), "invalid_value", "stop_token_ids"),
        (chat(json!({"stop_token_ids": vec![1; 257]})), "invalid_value", "stop_token_ids"),
        (chat(json!({"prompt_cache_key": 5})), "invalid_type", "prompt_cache_key"),
        (chat(json!({"prompt_cache_key": "k".repeat(513)})), "invalid_value", "prompt_cache_key"),
        (chat(json!({"cache_control": "ephemeral"})), "invalid_type", "cache_control"),
        (chat(json!({"cache_control": {}})), "missing_required_parameter", "cache_control.type"),
        (text(json!({"cache_control": {"type": "forever"}})), "invalid_value", "cache_control.type"),
        (chat(json!({"cache_control": {"type": "ephemeral", "ttl": "1d"}})), "invalid_value", "cache_control.ttl"),
        (chat(json!({"cache_control": {"type": "ephemeral", "ttl": 5}})), "invalid_type", "cache_control.ttl"),
        (
            messages(json!([{"role": "user", "content": "hi", "cache_control": {"type": 1}}])),
            "invalid_type",
            "messages[0].cache_control.type",
        ),
        (
            messages(
                json!([{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "x"}}]}]),
            ),
            "invalid_value",
            "messages[0].content[0].cache_control.type",
        ),
        (chat(json!({"queue_updates": true})), "invalid_value", "queue_updates"),
        (chat(json!({"queue_updates": 1, "stream": true})), "invalid_type", "queue_updates"),
        (chat(json!({"min_tokens": -1})), "invalid_value", "min_tokens"),
        (chat(json!({"min_tokens": "5"})), "invalid_type", "min_tokens"),
        (chat(json!({"min_tokens": 6, "max_tokens": 5})), "invalid_value", "min_tokens"),
    ] {
        let reply = server.post(path, &request).await;
        assert_eq!(reply.error(), (400, code.to_owned(), Some(param.to_owned())), "{request} {}", reply.text());
    }
    server.assert_serves().await;
}

#[tokio::test]
async fn a_wrong_field_of_the_sampler_is_a_400_that_names_it() {
    let server = start().await;
    for (fields, code, param) in [
        (json!({"temperature": "hot"}), "invalid_type", "temperature"),
        (json!({"temperature": [1]}), "invalid_type", "temperature"),
        (json!({"logit_bias": [1]}), "invalid_type", "logit_bias"),
        (json!({"logit_bias": {"1": "x"}}), "invalid_type", "logit_bias"),
        (json!({"logit_bias": {"1": true}}), "invalid_type", "logit_bias"),
        (json!({"logit_bias": [[1, 2, 3]]}), "invalid_type", "logit_bias"),
        (json!({"logit_bias": [["1", 2]]}), "invalid_value", "logit_bias"),
        (json!({"logit_bias": [[-1, 2]]}), "invalid_value", "logit_bias"),
        (json!({"seed": 1.5}), "invalid_type", "seed"),
        (json!({"temperature": -0.1}), "invalid_value", "temperature"),
        (json!({"temperature": 1e308}), "invalid_value", "temperature"),
        (json!({"top_p": 1.1}), "invalid_value", "top_p"),
        (json!({"top_k": -2}), "invalid_value", "top_k"),
        (json!({"min_p": -1e-3}), "invalid_value", "min_p"),
        (json!({"presence_penalty": 101}), "invalid_value", "presence_penalty"),
        (json!({"repeat_penalty": 0}), "invalid_value", "repeat_penalty"),
        (json!({"repetition_penalty": 0}), "invalid_value", "repeat_penalty"),
        (json!({"mirostat": 3}), "invalid_value", "mirostat"),
        (json!({"mirostat_tau": -1}), "invalid_value", "mirostat_tau"),
        (json!({"min_keep": -1}), "invalid_value", "min_keep"),
        (json!({"top_n_sigma": 1e6}), "invalid_value", "top_n_sigma"),
        (json!({"xtc_probability": 1.5}), "invalid_value", "xtc_probability"),
        (json!({"dynatemp_range": -1}), "invalid_value", "dynatemp_range"),
        (json!({"adaptive_target": 2}), "invalid_value", "adaptive_target"),
        (json!({"dry_penalty_last_n": 2_000_000_000}), "invalid_value", "dry_penalty_last_n"),
        (json!({"dry_allowed_length": 1.5}), "invalid_type", "dry_allowed_length"),
        (json!({"dry_sequence_breakers": "x"}), "invalid_type", "dry_sequence_breakers"),
        (json!({"dry_sequence_breakers": [1]}), "invalid_type", "dry_sequence_breakers"),
        (json!({"dry_sequence_breakers": [""]}), "invalid_value", "dry_sequence_breakers"),
        (json!({"dry_sequence_breakers": vec!["x"; 17]}), "invalid_value", "dry_sequence_breakers"),
        (json!({"samplers": 5}), "invalid_type", "samplers"),
        (json!({"samplers": [5]}), "invalid_type", "samplers"),
        (json!({"samplers": ["top_k", "infill"]}), "invalid_value", "samplers"),
        (json!({"samplers": "kq"}), "invalid_value", "samplers"),
        (json!({"samplers": vec!["top_k"; 33]}), "invalid_value", "samplers"),
        (json!({"seed": 1e30}), "invalid_type", "seed"),
        (json!({"logit_bias": {"x": 1}}), "invalid_value", "logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "invalid_value", "logit_bias"),
        (json!({"logit_bias": {"99999": 1}}), "invalid_value", "logit_bias"),
    ] {
        let mut request = json!({"prompt": "hi"});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let reply = server.post(TEXT, &request).await;
        assert_eq!(reply.error(), (400, code.to_owned(), Some(param.to_owned())), "{request} {}", reply.text());
    }
    server.assert_serves().await;
}

#[tokio::test]
async fn a_body_that_is_no_json_object_is_a_400() {
    let server = start().await;
    let deep = ["[".repeat(100_000), "]".repeat(100_000)].concat();
    let deep_message = format!(r#"{{"messages":{}1{}}}"#, "[".repeat(127), "]".repeat(127));
    for body in [
        b"".as_slice(),
        b"{",
        b"null",
        b"[]",
        b"\"hi\"",
        b"{\"prompt\": \"hi\"} trailing",
        b"{\"prompt\": NaN}",
        b"{\"prompt\": \"hi\", \"temperature\": Infinity}",
        b"{\"prompt\": \"hi\", \"temperature\": 1e400}",
        b"{\"prompt\": \"\xff\xfe\"}",
        b"{\"prompt\": \"\\ud800\"}",
        b"{\"prompt\": \"a\nb\"}",
        b"\x00\x01\x02",
        deep.as_bytes(),
        deep_message.as_bytes(),
    ] {
        let reply = post_with(server.address, TEXT, "", body).await;
        let start: String = String::from_utf8_lossy(body).chars().take(40).collect();
        assert_eq!(reply.error(), (400, "invalid_json".to_owned(), None), "{start} {}", reply.text());
    }
    server.assert_serves().await;
}

#[tokio::test]
async fn a_prompt_that_is_too_long_says_by_how_much() {
    let server = start().await;
    let reply = server.complete(&json!({"prompt": "x".repeat(5_000)})).await;
    assert_eq!(reply.error(), (400, "context_length_exceeded".to_owned(), Some("prompt".to_owned())));
    assert_eq!(reply.json()["error"]["n_prompt_tokens"], json!(5_000));
    assert_eq!(reply.json()["error"]["n_ctx"], json!(1_024));
    let reply =
        server.chat(&json!({"messages": [{"role": "user", "content": "A".repeat(100_000)}], "stream": true})).await;
    assert_eq!(
        reply.error(),
        (400, "context_length_exceeded".to_owned(), Some("messages".to_owned())),
        "before the stream"
    );
}

#[tokio::test]
async fn only_the_models_name_and_default_are_models() {
    let server = start().await;
    let status = async |model: &str| {
        let reply = server.complete(&json!({"prompt": "hi", "max_tokens": 1, "model": model})).await;
        (reply.status, reply)
    };
    assert_eq!(status("sim").await.0, 200);
    assert_eq!(status("default").await.0, 200);
    for model in ["gpt-4", "", "../sim", "SIM"] {
        assert_eq!(status(model).await.1.error(), (404, "model_not_found".to_owned(), Some("model".to_owned())));
    }
    let any = start_with(sim(), |config| config.server.accept_any_model = true).await;
    let reply = any.complete(&json!({"prompt": "hi", "max_tokens": 1, "model": "gpt-4"})).await;
    assert_eq!((reply.status, &reply.json()["model"]), (200, &json!("sim")));
}

#[tokio::test]
async fn unknown_fields_are_refused_only_when_strict() {
    let request = json!({"prompt": "hi", "max_tokens": 1, "temprature": 1});
    assert_eq!(start().await.complete(&request).await.status, 200);
    let strict = start_with(sim(), |config| config.server.strict = true).await;
    let expected = (400, "unknown_parameter".to_owned(), Some("temprature".to_owned()));
    assert_eq!(strict.complete(&request).await.error(), expected);
    strict.assert_serves().await;
}

#[tokio::test]
async fn unknown_paths_and_methods_have_their_codes() {
    let server = start().await;
    for path in ["/", "/v1", "/v1/chat", "/v1/models/", "/metrics/x", "/v1/embeddings"] {
        assert_eq!(server.get(path).await.error(), (404, "unknown_url".to_owned(), None), "{path}");
    }
    for (method, path, allow) in [
        ("GET", CHAT, "POST, OPTIONS"),
        ("DELETE", TEXT, "POST, OPTIONS"),
        ("POST", "/v1/models", "GET, HEAD, OPTIONS"),
        ("PUT", "/health", "GET, HEAD, OPTIONS"),
    ] {
        let mut stream = send(server.address, head(method, path, "content-length: 0\r\n").as_bytes()).await;
        let reply = read_reply(&mut stream).await.unwrap();
        assert_eq!(reply.error(), (405, "method_not_allowed".to_owned(), None));
        assert_eq!(reply.header("allow"), Some(allow));
    }
    let mut stream = send(server.address, head("OPTIONS", CHAT, "").as_bytes()).await;
    let reply = read_reply(&mut stream).await.unwrap();
    assert_eq!((reply.status, reply.header("allow")), (204, Some("POST, OPTIONS")));
    let mut stream = send(server.address, head("HEAD", "/health", "").as_bytes()).await;
    assert_eq!(client::read_head(&mut stream).await.unwrap().0, 200);
}

#[tokio::test]
async fn while_the_model_loads_requests_are_told_to_come_back() {
    let server = start_loading(|_| {}).await;
    let reply = server.complete(&json!({"prompt": "hi"})).await;
    assert_eq!(reply.error(), (503, "model_loading".to_owned(), None));
    assert!(reply.header("retry-after").is_some());
}

#[tokio::test]
async fn past_the_queue_limit_requests_are_refused_at_once() {
    let slow = SimConfig { n_seq_max: 1, step_us: 20_000, max_queued_requests: 2, ..sim() };
    let server = start_with(slow, |_| {}).await;
    let request = json!({"prompt": "hi", "max_tokens": 500, "stream": true}).to_string();
    let mut open = Vec::new();
    let mut refused = 0;
    for _ in 0..8 {
        let mut stream = send(server.address, &client::post_bytes(TEXT, "", request.as_bytes())).await;
        let started = std::time::Instant::now();
        let (status, headers) = client::read_head(&mut stream).await.unwrap();
        if status == 429 {
            refused += 1;
            assert!(headers.iter().any(|(name, value)| name == "retry-after" && value.parse::<u32>().unwrap() >= 1));
            assert!(started.elapsed().as_millis() < 500);
        }
        open.push(stream);
    }
    assert!((5..=6).contains(&refused), "one runs and two wait, {refused} of 8 were refused");
    let metrics = server.get("/metrics").await.text();
    assert!(
        metrics.contains(&format!("minerva_requests_rejected_total{{reason=\"queue_full\"}} {refused}")),
        "{metrics}"
    );
    drop(open);
    server.idle().await;
}
