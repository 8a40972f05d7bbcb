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
          "choices": [
            {
              "finish_reason": "length",
              "index": 0,
              "logprobs": {
                "text_offset": [
                  0,
                  1,
                  2
                ],
                "token_logprobs": [
                  0.0,
                  0.0,
                  0.0
                ],
                "tokens": [
                  "w",
                  "a",
                  "p"
                ],
                "top_logprobs": [
                  {
                    "\u0000": -20.0,
                    "w": 0.0
                  },
                  {
                    "\u0000": -20.0,
                    "a": 0.0
                  },
                  {
                    "\u0000": -20.0,
                    "p": 0.0
                  }
                ]
              },
              "text": "wap"
            }
          ],
          "created": 0,
          "id": "ID",
          "model": "sim",
          "object": "text_completion",
          "system_fingerprint": "FINGERPRINT",
          "timings": {
            "decode_ms": 0,
            "prefill_ms": 0,
            "queue_ms": 0
          },
          "usage": {
            "completion_tokens": 3,
            "prompt_tokens": 5,
            "prompt_tokens_details": {
              "cached_tokens": 0
            },
            "total_tokens": 8
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
