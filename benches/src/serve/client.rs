//! Sends one request and notes when its text comes: over HTTP, or straight to an engine in this process.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use minerva_engine::{ChatMessage, Engine, Event, Request, RequestError, SamplingParams};
use serde::Deserialize;
use serde_json::{Value, json};

use super::answer::Answer;
use super::http::HttpClient;
use super::replay::Token;
use super::schema;
use super::sse::SseParser;
use super::workload::Ask;

/// Where requests go.
#[derive(Clone)]
pub(super) enum Client {
    Http { http: HttpClient, model: String },
    Engine(Engine),
}

/// The longest that a client waits before it tries again.
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// How a request ended, other than by an error.
enum End {
    Answered,
    /// Not accepted: try again after so long.
    Refused(Duration),
}

impl Client {
    /// Runs one request to its end, or until its client leaves. What was seen before an error stays in `answer`. A server that
    /// is full is asked again after the time that it names.
    pub(super) async fn ask(&self, ask: &Ask, clock: Instant, answer: &mut Answer) -> anyhow::Result<()> {
        loop {
            let end = match self {
                Self::Http { http, model } => ask_http(http, model, ask, clock, answer).await?,
                Self::Engine(engine) => ask_engine(engine, ask, clock, answer).await?,
            };
            let End::Refused(pause) = end else { break };
            answer.refusals += 1;
            tokio::time::sleep(pause.min(LONGEST_RETRY)).await;
        }
        if answer.has_left {
            return Ok(());
        }
        if ask.has_schema {
            return schema::check(&answer.text);
        }
        if let Some(tokens) = answer.completion_tokens.filter(|tokens| *tokens != ask.max_tokens) {
            bail!("{tokens} tokens came instead of {}", ask.max_tokens);
        }
        Ok(())
    }
}

/// The body of a streamed chat completion whose length is exact, or whose answer follows the schema.
fn body(model: &str, ask: &Ask) -> Bytes {
    let system = ask.system.as_deref().map(|text| json!({ "role": "system", "content": text }));
    let user = json!({ "role": "user", "content": ask.user });
    let messages: Vec<Value> = system.into_iter().chain([user]).collect();
    let mut body = json!({
        "model": model,
        "messages": messages,
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    if ask.has_schema {
        body["response_format"] = schema::response_format();
    } else {
        body["ignore_eos"] = json!(true);
    }
    if !ask.cache_prompt {
        body["cache_prompt"] = json!(false);
    }
    if !ask.speculate {
        body["speculate"] = json!(false);
    }
    if let Some(seed) = ask.seed {
        body["seed"] = json!(seed);
        (body["temperature"], body["top_k"], body["top_p"], body["min_p"]) = (json!(1), json!(0), json!(1), json!(0));
    }
    if ask.top_logprobs > 0 {
        body["logprobs"] = json!(true);
        body["top_logprobs"] = json!(ask.top_logprobs);
    }
    body.to_string().into()
}

/// The fields of a chunk that matter here; serde_json skips the others without storing them.
#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow, default)]
    delta: Delta<'a>,
    logprobs: Option<Logprobs>,
}

#[derive(Deserialize)]
struct Logprobs {
    content: Option<Vec<Token>>,
}

#[derive(Default, Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<Cow<'a, str>>,
    #[serde(borrow)]
    reasoning_content: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u32>,
}

/// What one event of the stream means for the request.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    GoOn,
    Leave,
    Done,
}

async fn ask_http(
    http: &HttpClient,
    model: &str,
    ask: &Ask,
    clock: Instant,
    answer: &mut Answer,
) -> anyhow::Result<End> {
    let mut reply = http.post("/v1/chat/completions", body(model, ask), ask.key).await?;
    if let Some(pause) = reply.retry_after() {
        return Ok(End::Refused(pause));
    }
    if !reply.status.is_success() {
        let text = reply.text().await.unwrap_or_default();
        bail!("status {}: {}", reply.status.as_u16(), text.chars().take(300).collect::<String>());
    }
    let mut parser = SseParser::default();
    let mut step = Ok(Step::GoOn);
    while let Some(chunk) = reply.chunk().await? {
        parser.feed(&chunk, |data| {
            if matches!(step, Ok(Step::GoOn)) {
                step = note(data, ask, clock, answer);
            }
        });
        match step? {
            Step::GoOn => step = Ok(Step::GoOn),
            // Reading on to the end of the body would find nothing; leaving drops the connection.
            Step::Leave | Step::Done => return Ok(End::Answered),
        }
    }
    Err(anyhow!("the stream ended without [DONE]"))
}

/// Takes in one event.
fn note(data: &[u8], ask: &Ask, clock: Instant, answer: &mut Answer) -> anyhow::Result<Step> {
    if data == b"[DONE]" {
        return Ok(Step::Done);
    }
    let chunk: Chunk<'_> =
        serde_json::from_slice(data).with_context(|| format!("an odd chunk: {}", String::from_utf8_lossy(data)))?;
    if let Some(error) = chunk.error {
        bail!("the stream failed: {error}");
    }
    if let Some(usage) = chunk.usage {
        answer.prompt_tokens = Some(usage.prompt_tokens);
        answer.completion_tokens = Some(usage.completion_tokens);
        answer.cached_tokens = usage.prompt_tokens_details.and_then(|details| details.cached_tokens);
    }
    let has_text = |text: &Option<Cow<'_, str>>| text.as_ref().is_some_and(|text| !text.is_empty());
    let Some(choice) = chunk.choices.into_iter().next() else { return Ok(Step::GoOn) };
    if let Some(tokens) = choice.logprobs.and_then(|logprobs| logprobs.content) {
        answer.tokens.extend(tokens);
    }
    let delta = choice.delta;
    if let Some(text) = delta.content.as_deref().filter(|_| ask.keeps_text) {
        answer.text.push_str(text);
    }
    let is_piece = has_text(&delta.content) || has_text(&delta.reasoning_content);
    Ok(if is_piece && answer.piece(clock, ask.leave) { Step::Leave } else { Step::GoOn })
}

async fn ask_engine(engine: &Engine, ask: &Ask, clock: Instant, answer: &mut Answer) -> anyhow::Result<End> {
    if ask.has_schema {
        bail!("the engine is asked without schemas here");
    }
    let system = ask.system.as_deref().map(ChatMessage::system);
    let messages = system.into_iter().chain([ChatMessage::user(&*ask.user)]);
    let mut request = Request::chat(messages).max_tokens(ask.max_tokens).greedy();
    request.ignore_eos = true;
    request.cache_prompt = ask.cache_prompt;
    request.speculate = ask.speculate;
    if let Some(seed) = ask.seed {
        request.sampling =
            SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: Some(seed), ..request.sampling };
    }
    request.logprobs = (ask.top_logprobs > 0).then_some(ask.top_logprobs);
    let mut events = match engine.generate(request).await {
        Ok(events) => events,
        Err(RequestError::QueueFull { retry_after_s, .. }) => {
            return Ok(End::Refused(Duration::from_secs(retry_after_s.max(1).into())));
        }
        Err(error) => return Err(error.into()),
    };
    while let Some(event) = events.next().await {
        match event {
            Event::Delta(delta) => {
                if ask.keeps_text {
                    answer.text.push_str(&delta.text);
                }
                answer.tokens.extend(delta.tokens.into_iter().filter_map(Token::of_engine));
                if !delta.text.is_empty() && answer.piece(clock, ask.leave) {
                    return Ok(End::Answered);
                }
            }
            Event::Finished { .. } | Event::Queued { .. } | Event::Started => {}
            Event::Done(summary) => {
                answer.prompt_tokens = Some(summary.prompt_tokens);
                answer.cached_tokens = Some(summary.cached_tokens);
                answer.completion_tokens = Some(summary.completion_tokens);
            }
            Event::Failed(error) => return Err(error.into()),
        }
    }
    Ok(End::Answered)
}

#[cfg(test)]
mod tests {
    use super::super::workload::Leave;
    use super::*;

    fn read(events: &[&str], leave: Option<Leave>) -> (Answer, Vec<anyhow::Result<Step>>) {
        let ask = Ask { max_tokens: 9, leave, keeps_text: true, ..Ask::default() };
        let (clock, mut answer) = (Instant::now(), Answer::default());
        let steps = events.iter().map(|event| note(event.as_bytes(), &ask, clock, &mut answer)).collect();
        (answer, steps)
    }

    #[test]
    fn only_chunks_with_text_are_pieces_and_usage_may_come_without_choices() {
        let (answer, _) = read(
            &[
                r#"{"choices":[{"delta":{"role":"assistant","content":null}}],"id":"x"}"#,
                r#"{"choices":[{"delta":{"content":""}}]}"#,
                r#"{"choices":[{"delta":{"content":"a \"b\""}}]}"#,
                r#"{"choices":[{"delta":{"reasoning_content":"c"}}]}"#,
                r#"{"choices":[{"delta":{},"finish_reason":"length"}]}"#,
                r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":9,"prompt_tokens_details":{"cached_tokens":3}}}"#,
            ],
            None,
        );
        assert_eq!(answer.pieces_ms.len(), 2);
        assert_eq!(answer.text, "a \"b\"");
        let counts = (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens);
        assert_eq!(counts, (Some(5), Some(9), Some(3)));
    }

    #[test]
    fn a_replay_is_never_reused_and_reports_its_tokens() {
        let ask = Ask { cache_prompt: false, top_logprobs: 5, ..Ask::default() };
        let body: Value = serde_json::from_slice(&body("m", &ask)).expect("JSON");
        let of = |name: &str| body.get(name).cloned();
        assert_eq!((of("cache_prompt"), of("top_logprobs")), (Some(json!(false)), Some(json!(5))));
        assert_eq!((of("ignore_eos"), of("response_format")), (Some(json!(true)), None));
        assert_eq!((of("temperature"), of("speculate"), of("seed")), (Some(json!(0)), None, None));
        let chunk = r#"{"choices":[{"delta":{"content":"a"},"logprobs":{"content":[{"token":"a","bytes":[97],"logprob":-1,
            "top_logprobs":[{"token":"a","bytes":[97],"logprob":-1}]}]}}]}"#;
        assert_eq!(read(&[chunk], None).0.tokens.len(), 1);
    }

    #[test]
    fn a_client_leaves_at_the_piece_it_chose() {
        let piece = r#"{"choices":[{"delta":{"content":"x"}}]}"#;
        let (answer, steps) = read(&[piece, piece], Some(Leave::AtPiece(2)));
        assert!(answer.has_left);
        assert!(matches!(steps[..], [Ok(Step::GoOn), Ok(Step::Leave)]));
    }

    #[test]
    fn an_error_in_the_stream_and_a_broken_chunk_are_errors() {
        let (_, steps) = read(&[r#"{"error":{"message":"no"}}"#, "{", "[DONE]"], None);
        assert!(matches!(steps[..], [Err(_), Err(_), Ok(Step::Done)]));
    }
}
