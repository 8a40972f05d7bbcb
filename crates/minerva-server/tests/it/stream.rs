//! Streams of server-sent events.

use std::time::{Duration, Instant};

use expect_test::expect_file;
use minerva_engine::SimConfig;
use serde_json::{Value as Json, json};

use crate::chat::hello;
use crate::client::{self, Reply};
use crate::server::{TestServer, eventually, ms, sim, start, start_with, within};

/// A transcript without what differs from run to run.
fn stable(text: &str) -> String {
    let stable = |event: &str| match event.strip_prefix("data: {") {
        Some(rest) => {
            let mut json: Json = serde_json::from_str(&format!("{{{rest}")).unwrap();
            let mut line = event.to_owned();
            for key in ["id", "created", "system_fingerprint"] {
                line = line.replace(&json[key].to_string(), &format!("<{key}>"));
            }
            for (_, ms) in json["timings"].as_object_mut().into_iter().flatten() {
                // With what ends it: one time may begin with the digits of another.
                for end in [',', '}'] {
                    line = line.replace(&format!("_ms\":{ms}{end}"), &format!("_ms\":<ms>{end}"));
                }
            }
            line
        }
        None => event.to_owned(),
    };
    text.split("\n\n").map(stable).collect::<Vec<_>>().join("\n\n")
}

fn with(mut request: Json, fields: &Json) -> Json {
    request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    request
}

async fn stream(server: &TestServer, path: &str, request: Json, fields: Json) -> Reply {
    server.post(path, &with(with(request, &json!({"stream": true})), &fields)).await
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn a_chat_stream_reads_as_its_transcript() {
    let server = start().await;
    let reply = stream(&server, CHAT, hello(), json!({})).await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("text/event-stream")));
    expect_file!["golden/chat.sse"].assert_eq(&stable(&reply.text()));
    let reply = stream(&server, CHAT, hello(), json!({"stream_options": {"include_usage": true}, "n": 2})).await;
    let text = stable(&reply.text());
    assert!(text.ends_with("data: [DONE]\n\n") && text.contains(r#""choices":[],"usage":{"prompt_tokens":"#), "{text}");
    assert_eq!(text.matches("\"usage\":null").count(), reply.events().len() - 2);
}

#[tokio::test]
async fn a_chat_stream_with_usage_and_logprobs_reads_as_its_transcript() {
    let server = start().await;
    let fields =
        json!({"stream_options": {"include_usage": true}, "logprobs": true, "top_logprobs": 1, "max_tokens": 2});
    let reply = stream(&server, CHAT, hello(), fields).await;
    expect_file!["golden/chat_usage_logprobs.sse"].assert_eq(&stable(&reply.text()));
}

#[tokio::test]
async fn a_completion_stream_reads_as_its_transcript() {
    let server = start().await;
    let request = json!({"prompt": "hello", "max_tokens": 3, "temperature": 0, "logprobs": 1});
    let reply = stream(&server, TEXT, request, json!({})).await;
    expect_file!["golden/completion.sse"].assert_eq(&stable(&reply.text()));
}

#[tokio::test]
async fn a_stream_says_what_the_whole_answer_says() {
    let server = start().await;
    for (path, request) in [
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": "tell me"}], "max_tokens": 40, "seed": 5, "temperature": 1.0}),
        ),
        (TEXT, json!({"prompt": ["one", "two"], "n": 2, "max_tokens": 40, "seed": 5, "temperature": 1.0})),
    ] {
        let whole = server.post(path, &request).await.json();
        let events = stream(&server, path, request, json!({})).await.events();
        for choice in whole["choices"].as_array().unwrap() {
            let ours = |event: &&Json| event["choices"][0]["index"] == choice["index"];
            let piece = |event: &Json| {
                let part = &event["choices"][0];
                part["text"].as_str().or(part["delta"]["content"].as_str()).unwrap_or_default().to_owned()
            };
            let joined: String = events.iter().filter(ours).map(piece).collect();
            let text = choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap();
            assert_eq!(joined, text);
            let ends: Vec<_> = events
                .iter()
                .filter(ours)
                .map(|event| &event["choices"][0]["finish_reason"])
                .filter(|end| !end.is_null())
                .collect();
            assert_eq!(ends, [&choice["finish_reason"]]);
        }
        assert_eq!(events.last().unwrap(), "[DONE]");
    }
}

#[tokio::test]
async fn headers_come_at_once_and_comments_while_there_is_nothing_to_say() {
    let slow = SimConfig { step_us: 400_000, ..sim() };
    let server = start_with(slow, |config| config.server.ping_seconds = ms(50)).await;
    let body = with(hello(), &json!({"stream": true, "max_tokens": 1})).to_string();
    let started = Instant::now();
    let mut stream = client::send(server.address, &client::post_bytes(CHAT, "", body.as_bytes())).await;
    let (status, _) = client::read_head(&mut stream).await.unwrap();
    assert!(status == 200 && started.elapsed() < Duration::from_millis(300), "{:?}", started.elapsed());
    let mut pings = 0;
    while let Some(chunk) = within(10, client::read_chunk(&mut stream)).await {
        if chunk.is_empty() {
            break;
        }
        pings += usize::from(chunk == b": ping\n\n");
    }
    assert!(pings >= 3, "{pings}");
}

#[tokio::test]
async fn comments_tell_who_waits_where_it_is_and_when_it_begins() {
    let slow = SimConfig { n_seq_max: 1, step_us: 5_000, ..sim() };
    let server = start_with(slow, |_| {}).await;
    let body = json!({"prompt": "hello", "max_tokens": 100, "stream": true}).to_string();
    let _busy = client::send(server.address, &client::post_bytes(TEXT, "", body.as_bytes())).await;
    eventually("it decodes", || server.engine.stats().steps_total >= 3).await;
    let request = json!({"prompt": ["one", "two"], "max_tokens": 5, "temperature": 0});
    let reply = within(10, stream(&server, TEXT, request.clone(), json!({"queue_updates": true}))).await;
    let text = reply.text();
    let comments: Vec<&str> = text.split("\n\n").filter(|event| event.starts_with(':')).collect();
    let place =
        |prompt: usize| comments.iter().find(|text| text.starts_with(&format!(": queue prompt={prompt} position=")));
    assert!(place(0).unwrap().starts_with(": queue prompt=0 position=1"), "{comments:?}");
    assert!(place(1).unwrap().starts_with(": queue prompt=1 position=2"), "{comments:?}");
    let (_, estimate) = place(1).unwrap().split_once(" estimate_ms=").expect("steps were computed before");
    assert!((1..60_000).contains(&estimate.parse::<u64>().unwrap()), "{estimate}");
    for started in [": started prompt=0", ": started prompt=1"] {
        assert_eq!(comments.iter().filter(|text| **text == started).count(), 1, "{comments:?}");
    }
    // Without the comments it is the stream that everybody gets.
    let plain = stream(&server, TEXT, request, json!({})).await;
    assert!(!plain.text().contains(": queue") && !plain.text().contains(": started"));
    let texts = |reply: &Reply| -> Vec<Json> {
        let mut choices: Vec<Json> = reply.events().iter().map(|event| event["choices"][0].clone()).collect();
        choices.sort_by_key(|choice| choice["index"].as_u64());
        choices
    };
    assert_eq!(texts(&reply), texts(&plain));
}

#[tokio::test]
async fn a_stream_that_fails_ends_with_an_error_and_not_with_done() {
    let failing = SimConfig { fail_every_steps: Some(3), ..sim() };
    let server = start_with(failing, |_| {}).await;
    let reply = stream(&server, TEXT, json!({"prompt": "hello", "max_tokens": 50}), json!({})).await;
    let events = reply.events();
    let error = &events.last().unwrap()["error"];
    assert_eq!((reply.status, &error["code"], &error["type"]), (200, &json!("internal_error"), &json!("server_error")));
    assert!(!reply.text().contains("[DONE]"));
    let whole = server.complete(&json!({"prompt": "hello", "max_tokens": 50})).await;
    assert_eq!(whole.error().0, 500);
}

#[tokio::test]
async fn tokens_that_wait_for_a_slow_reader_share_a_write() {
    // All tokens are there before the body is first polled again, so a write takes as many as it may.
    let server = start_with(sim(), |config| config.performance.token_buffer = 7).await;
    let request = json!({"prompt": "hello", "max_tokens": 200, "stream": true, "temperature": 0});
    let body = request.to_string();
    let mut stream = client::send(server.address, &client::post_bytes(TEXT, "", body.as_bytes())).await;
    client::read_head(&mut stream).await.unwrap();
    let mut most = 0;
    while let Some(chunk) = client::read_chunk(&mut stream).await.filter(|chunk| !chunk.is_empty()) {
        most = most.max(String::from_utf8(chunk).unwrap().matches("data: ").count());
    }
    assert!((1..=9).contains(&most), "{most} events in one write");
}
