//! POST /v1/chat/completions, whole answers.

use expect_test::expect;
use minerva_engine::SimConfig;
use serde_json::{Value as Json, json};

use crate::server::{sim, start, start_with};

/// The answer without what differs from run to run.
pub(crate) fn stable(mut json: Json) -> String {
    for (key, placeholder) in [("id", json!("ID")), ("created", json!(0)), ("system_fingerprint", json!("FINGERPRINT"))]
    {
        if let Some(value) = json.get_mut(key) {
            *value = placeholder;
        }
    }
    if let Some(timings) = json.get_mut("timings") {
        for (_, ms) in timings.as_object_mut().unwrap() {
            assert!(ms.as_f64().unwrap() >= 0.0);
            *ms = json!(0);
        }
    }
    serde_json::to_string_pretty(&json).unwrap() + "\n"
}

pub(crate) fn hello() -> Json {
    json!({"model": "sim", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0})
}

#[tokio::test]
async fn an_answer_has_openais_shape() {
    let reply = start().await.chat(&hello()).await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
    assert!(reply.json()["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(reply.json()["system_fingerprint"].as_str().unwrap().starts_with("minerva-"));
    expect![[r#"
        {
          "id": "ID",
          "object": "chat.completion",
          "created": 0,
          "model": "sim",
          "system_fingerprint": "FINGERPRINT",
          "choices": [
            {
              "index": 0,
              "message": {
                "role": "assistant",
                "content": "rdqk",
                "refusal": null
              },
              "logprobs": null,
              "finish_reason": "length"
            }
          ],
          "usage": {
            "prompt_tokens": 12,
            "completion_tokens": 4,
            "total_tokens": 16,
            "prompt_tokens_details": {
              "cached_tokens": 0
            }
          },
          "timings": {
            "queue_ms": 0,
            "prefill_ms": 0,
            "decode_ms": 0
          }
        }
    "#]]
    .assert_eq(&stable(reply.json()));
}

#[tokio::test]
async fn logprobs_come_with_bytes_and_alternatives() {
    let server = start().await;
    let mut request = hello();
    request["logprobs"] = json!(true);
    request["top_logprobs"] = json!(2);
    request["max_tokens"] = json!(1);
    let json = server.chat(&request).await.json();
    expect![[r#"
        {
          "content": [
            {
              "token": "r",
              "logprob": 0.0,
              "bytes": [
                114
              ],
              "top_logprobs": [
                {
                  "token": "r",
                  "logprob": 0.0,
                  "bytes": [
                    114
                  ]
                },
                {
                  "token": "\u0000",
                  "logprob": -20.0,
                  "bytes": [
                    0
                  ]
                }
              ]
            }
          ],
          "refusal": null
        }
    "#]]
    .assert_eq(&stable(json["choices"][0]["logprobs"].clone()));

    request["top_logprobs"] = Json::Null;
    let json = server.chat(&request).await.json();
    assert_eq!(json["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[tokio::test]
async fn several_choices_share_one_prompt() {
    let server = start().await;
    let mut request = hello();
    request["n"] = json!(3);
    request["temperature"] = json!(1.0);
    let json = server.chat(&request).await.json();
    let choices = json["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
    let one = server.chat(&hello()).await.json();
    assert_eq!(json["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"], "the prompt counts once");
    assert_eq!(json["usage"]["completion_tokens"], json!(12));
}

#[tokio::test]
async fn the_same_seed_gives_the_same_answer_and_another_seed_another() {
    let server = start().await;
    let answer = async |seed: Json| {
        // The simulator is very sure of its next byte: only a hot draw shows the seed.
        let request = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 16, "temperature": 50.0,
            "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": seed, "ignore_eos": true, "cache_prompt": false});
        server.chat(&request).await.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    let first = answer(json!(7)).await;
    assert_eq!(answer(json!(7)).await, first);
    assert_ne!(answer(json!(8)).await, first);
    assert_ne!(answer(json!(-1)).await, answer(json!(-1)).await, "-1 draws a seed");
    assert_eq!(answer(json!(u64::MAX - 1)).await, answer(json!(-2)).await, "negative seeds are seeds");
}

#[tokio::test]
async fn roles_parts_nulls_and_other_names_of_fields_are_understood() {
    let server = start().await;
    let plain = json!({"messages": [{"role": "system", "content": "be\nbrief"}, {"role": "user", "content": "hello"}],
        "max_tokens": 5, "temperature": 0});
    let fancy = json!({
        "model": "default",
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
            {"role": "user", "content": "hello", "name": "someone"},
        ],
        "max_completion_tokens": 5, "max_tokens": null, "temperature": 0.0, "stop": null, "n": null, "logit_bias": null,
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "user": "u", "store": false,
        "stream": false, "stream_options": null, "something_new": {"a": 1},
    });
    let (plain, fancy) = (server.chat(&plain).await.json(), server.chat(&fancy).await.json());
    assert_eq!(plain["choices"][0]["message"]["content"], fancy["choices"][0]["message"]["content"], "{fancy}");
    assert_eq!(fancy["usage"]["completion_tokens"], json!(5));
}

#[tokio::test]
async fn a_stop_text_ends_the_answer_and_is_not_part_of_it() {
    let server = start().await;
    let mut request = hello();
    request["max_tokens"] = json!(12);
    request["ignore_eos"] = json!(true);
    let whole = server.chat(&request).await.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let middle: String = whole.chars().skip(4).take(2).collect();
    let before = whole.find(&middle).unwrap();
    for stop in [json!(middle), json!(["\u{1}never", middle])] {
        request["stop"] = stop;
        let json = server.chat(&request).await.json();
        assert_eq!(json["choices"][0]["message"]["content"].as_str().unwrap(), &whole[..before]);
        assert_eq!(json["choices"][0]["finish_reason"], "stop");
    }
}

#[tokio::test]
async fn stop_token_ids_and_min_tokens_move_the_end_of_chats_and_completions() {
    let server = start().await;
    let mut request = hello();
    request["max_tokens"] = json!(40);
    let whole = server.chat(&request).await.json();
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    assert_eq!((text.len(), &whole["choices"][0]["finish_reason"]), (16, &json!("stop")));
    // The simulator's tokens are bytes.
    let byte = text.as_bytes()[5];
    request["stop_token_ids"] = json!([byte]);
    for stream in [false, true] {
        request["stream"] = json!(stream);
        let reply = server.chat(&request).await;
        let events = if stream { reply.events() } else { vec![reply.json()] };
        let part = |event: &serde_json::Value| {
            let choice = &event["choices"][0];
            let content = choice["delta"]["content"].as_str().or(choice["message"]["content"].as_str());
            content.unwrap_or_default().to_owned()
        };
        let cut: String = events.iter().map(part).collect();
        assert_eq!(cut, text[..text.find(char::from(byte)).unwrap()]);
        assert!(events.iter().any(|event| event["choices"][0]["finish_reason"] == "stop"), "{events:?}");
    }
    request["stop_token_ids"] = json!([]);
    request["stream"] = json!(false);
    request["min_tokens"] = json!(30);
    let long = server.chat(&request).await.json();
    assert_eq!(
        (&long["usage"]["completion_tokens"], &long["choices"][0]["finish_reason"]),
        (&json!(31), &json!("stop"))
    );

    let fields = json!({"prompt": ["one", "two"], "max_tokens": 20, "temperature": 0, "min_tokens": 12, "stop": "e"});
    let texts = server.complete(&fields).await.json();
    for choice in texts["choices"].as_array().unwrap() {
        assert!(choice["text"].as_str().unwrap().len() >= 12, "{texts}");
    }
}

#[tokio::test]
async fn a_hint_keeps_a_prompt_while_others_need_a_place() {
    let part = json!([{"type": "text", "text": "A long text that is asked about more than once.",
        "cache_control": {"type": "ephemeral"}}]);
    let ephemeral = json!({"type": "ephemeral", "ttl": "1h"});
    for (hinted, is_kept) in [
        (json!({}), false),
        (json!({"prompt_cache_key": "document 7"}), true),
        (json!({"cache_control": ephemeral}), true),
        (json!({"messages": [{"role": "user", "content": part}]}), true),
        (json!({"messages": [{"role": "user", "content": part[0]["text"], "cache_control": ephemeral}]}), true),
    ] {
        let server = start_with(SimConfig { n_seq_max: 2, host_cache_bytes: 0, ..sim() }, |_| {}).await;
        let plain = json!({"messages": [{"role": "user", "content": part[0]["text"]}], "max_tokens": 1});
        let mut first = plain.clone();
        first.as_object_mut().unwrap().extend(hinted.as_object().unwrap().clone());
        assert_eq!(server.chat(&first).await.status, 200, "{first}");
        for other in ["one", "two", "three"] {
            let prompt = format!("{other} of three other texts, none of which begins like it");
            server.complete(&json!({"prompt": prompt, "max_tokens": 1})).await;
        }
        let usage = server.chat(&plain).await.json()["usage"].clone();
        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        let whole = usage["prompt_tokens"].as_u64().unwrap() - 1;
        assert_eq!(cached, if is_kept { whole } else { 0 }, "{hinted}");
    }
}

#[tokio::test]
async fn cached_tokens_are_reported() {
    let server = start_with(sim(), |_| {}).await;
    let mut request = hello();
    request["messages"][0]["content"] = json!("tell me a long story about a server ".repeat(8));
    let cached = async |request: &Json| {
        let json = server.chat(request).await.json();
        json["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached(&request).await, 0);
    assert!(cached(&request).await > 200);
    request["cache_prompt"] = json!(false);
    assert_eq!(cached(&request).await, 0);
}
