//! POST /v1/completions, whole answers.

use expect_test::expect;
use serde_json::{Value as Json, json};

use crate::chat::stable;
use crate::server::start;

#[tokio::test]
async fn an_answer_has_openais_shape() {
    let reply =
        start().await.complete(&json!({"prompt": "hello", "max_tokens": 3, "temperature": 0, "logprobs": 2})).await;
    assert!(reply.json()["id"].as_str().unwrap().starts_with("cmpl-"));
    expect![[r#"
        {
          "id": "ID",
          "object": "text_completion",
          "created": 0,
          "model": "sim",
          "system_fingerprint": "FINGERPRINT",
          "choices": [
            {
              "index": 0,
              "text": "wap",
              "logprobs": {
                "tokens": [
                  "w",
                  "a",
                  "p"
                ],
                "token_logprobs": [
                  0.0,
                  0.0,
                  0.0
                ],
                "top_logprobs": [
                  {
                    "w": 0.0,
                    "\u0000": -20.0
                  },
                  {
                    "a": 0.0,
                    "\u0000": -20.0
                  },
                  {
                    "p": 0.0,
                    "\u0000": -20.0
                  }
                ],
                "text_offset": [
                  0,
                  1,
                  2
                ]
              },
              "finish_reason": "length"
            }
          ],
          "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
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
async fn text_and_token_prompts_come_alone_or_in_arrays() {
    let server = start().await;
    let texts = async |prompt: Json| {
        let reply = server.complete(&json!({"prompt": prompt, "max_tokens": 4, "temperature": 0})).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let json = reply.json();
        let choices = json["choices"].as_array().unwrap().clone();
        assert!(choices.iter().enumerate().all(|(i, choice)| choice["index"] == json!(i)));
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let (hi, yo) = (texts(json!("hi")).await, texts(json!("yo")).await);
    assert_ne!(hi, yo);
    assert_eq!(texts(json!([104, 105])).await, hi);
    assert_eq!(texts(json!(["hi", "yo"])).await, [hi[0].clone(), yo[0].clone()]);
    assert_eq!(texts(json!([[121, 111], [104, 105]])).await, [yo[0].clone(), hi[0].clone()]);
}

#[tokio::test]
async fn choices_of_several_prompts_are_numbered_through_and_usage_adds_up() {
    let server = start().await;
    let json =
        server.complete(&json!({"prompt": ["abc", "defgh"], "n": 2, "max_tokens": 3, "best_of": 2})).await.json();
    assert_eq!(json["choices"].as_array().unwrap().len(), 4);
    assert_eq!(json["usage"]["prompt_tokens"], json!(8));
    assert_eq!(json["usage"]["completion_tokens"], json!(12));
    assert_eq!(json["usage"]["total_tokens"], json!(20));
}

#[tokio::test]
async fn text_offsets_count_characters() {
    let server = start().await;
    let request = json!({"prompt": "hello", "max_tokens": 20, "temperature": 1.5, "seed": 3, "logprobs": 0});
    let json = server.complete(&request).await.json();
    let logprobs = &json["choices"][0]["logprobs"];
    let tokens: Vec<&str> =
        logprobs["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    let offsets: Vec<u64> =
        logprobs["text_offset"].as_array().unwrap().iter().map(|offset| offset.as_u64().unwrap()).collect();
    assert_eq!(tokens.len(), offsets.len());
    let mut expected = 0;
    for (token, offset) in tokens.iter().zip(offsets) {
        assert_eq!(offset, expected);
        expected += token.chars().count() as u64;
    }
    assert_eq!(logprobs["top_logprobs"], Json::Null);
}

#[tokio::test]
async fn the_fields_of_the_sampler_do_what_they_say() {
    let server = start().await;
    let text = async |fields: Json| {
        let mut request = json!({"prompt": "hello", "max_tokens": 30, "seed": 1, "top_k": 0, "top_p": 1, "min_p": 0});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let reply = server.complete(&request).await;
        reply.json()["choices"][0]["text"].as_str().expect("a text").to_owned()
    };
    let likeliest = text(json!({"temperature": 0})).await;
    // The simulator's likeliest token is 20 nats above all others; a temperature of 100 makes them all alike.
    for (fields, is_likeliest) in [
        (json!({}), false),
        (json!({"top_k": 1}), true),
        (json!({"top_k": 1, "samplers": ["temperature"]}), false),
        (json!({"top_k": 1, "samplers": "t"}), false),
        (json!({"top_k": 1, "samplers": ["Temp", "top-k"]}), true),
        (json!({"top_k": 1, "samplers": "tk"}), true),
        (json!({"temperature": 0, "logit_bias": [[104, 100]]}), false),
        (json!({"temperature": 0, "logit_bias": {"97": false}}), false), // an a comes soon
        (json!({"samplers": []}), true),                                 // no temperature either
        (json!({"top_n_sigma": 1}), true),
        (json!({"min_p": 0.5}), true),
        (json!({"min_p": 0.5, "min_keep": 200}), false),
        (json!({"typical_p": 0.5}), true),
        (json!({"mirostat": 2, "mirostat_tau": 0}), true),
        (json!({"mirostat": 1, "mirostat_tau": 100}), false),
        (json!({"temperature": 0, "dynatemp_range": 0}), true),
        (json!({"temperature": 0, "xtc_probability": 1, "xtc_threshold": 0}), false),
        (json!({"temperature": 0, "xtc_probability": 1, "xtc_threshold": 0.6}), true),
        (json!({"temperature": 0, "dry_multiplier": 30, "dry_allowed_length": 0}), false),
        (json!({"temperature": 0, "dry_multiplier": 30, "dry_allowed_length": 0, "dry_penalty_last_n": 0}), true),
        (json!({"temperature": 0, "dry_multiplier": 30, "dry_allowed_length": 40}), true),
        (json!({"temperature": 1, "samplers": "ta", "adaptive_target": 0}), false),
        (json!({"temperature": 1, "samplers": "ta", "adaptive_target": -1}), true),
    ] {
        let mut request = json!({"temperature": 100});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        assert_eq!(text(request).await == likeliest, is_likeliest, "{fields}");
    }
}
