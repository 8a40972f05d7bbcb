//! What callers build on: handles that can go anywhere, and requests and events that survive JSON.

use futures_util::StreamExt;
use minerva_engine::{
    ChatMessage, Delta, Engine, EngineConfig, Event, EventStream, FinishReason, GenerationError, Prompt, Request,
    SamplingParams, SimConfig, Summary, TokenInfo, TopToken,
};
use proptest::prelude::*;

use crate::support;

const _: () = {
    const fn handle<T: Clone + Send + Sync + 'static>() {}
    const fn stream<T: Send + Unpin + 'static>() {}
    const fn error<T: std::error::Error + Send + Sync + 'static>() {}
    handle::<Engine>();
    handle::<Request>();
    handle::<Event>();
    stream::<EventStream>();
    error::<minerva_engine::RequestError>();
    error::<minerva_engine::LoadError>();
    error::<GenerationError>();
};

fn through_json<T: serde::Serialize + serde::de::DeserializeOwned>(value: &T) -> T {
    let json = serde_json::to_string(value).expect("it can be written");
    serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error} in {json}"))
}

#[test]
fn every_event_survives_json() {
    let top = TopToken { id: 7, bytes: vec![0xff, 0x00], logprob: -0.25 };
    let token = TokenInfo { id: 42, bytes: b"\xf0\x9f".to_vec(), logprob: Some(-1.5), top: vec![top] };
    let summary =
        Summary { prompt_tokens: 3, cached_tokens: 2, completion_tokens: 1, queue_ms: 0.5, ..Summary::default() };
    let events = [
        Event::Delta(Delta { choice: 2, text: "a \"quoted\" \u{1f600}\n".into(), tokens: vec![token] }),
        Event::Delta(Delta::default()),
        Event::Finished { choice: 0, reason: FinishReason::Stop, stop: Some("\n\n".into()) },
        Event::Finished { choice: 1, reason: FinishReason::Length, stop: None },
        Event::Done(summary),
        Event::Failed(GenerationError::Backend { message: "code -3".into() }),
        Event::Failed(GenerationError::Sampling { message: "NaN".into() }),
        Event::Failed(GenerationError::Shutdown),
    ];
    for event in events {
        assert_eq!(through_json(&event), event);
    }
}

#[test]
fn a_request_says_only_what_differs_from_the_defaults() {
    let request: Request =
        serde_json::from_str(r#"{"prompt": {"text": "Hi"}, "sampling": {"temperature": 0}}"#).expect("a request");
    assert_eq!(request, Request { sampling: SamplingParams::greedy(), ..Request::text("Hi") });
    let config = EngineConfig { n_cells: Some(4096), ..EngineConfig::new("a/model.gguf") };
    assert_eq!(through_json(&config), config);
    assert_eq!(config.model_name(), "model");
}

#[tokio::test]
async fn a_stream_of_events_is_a_stream_and_ends_once() {
    let engine = Engine::simulate(SimConfig::default());
    let request = Request::chat([ChatMessage::user("hello")]).greedy();
    let events: Vec<Event> = engine.generate(request.clone()).await.expect("accepted").collect().await;
    assert!(matches!(events.last(), Some(Event::Done(_))));
    let n_last = events.iter().filter(|event| matches!(event, Event::Done(_) | Event::Failed(_))).count();
    assert_eq!(n_last, 1);
    let blocking = tokio::task::spawn_blocking(move || support::ask(&engine, request)).await.expect("no panic");
    let text: String = events
        .iter()
        .filter_map(|event| if let Event::Delta(delta) = event { Some(&*delta.text) } else { None })
        .collect();
    assert_eq!(text, blocking.text(), "with and without an executor");
}

prop_compose! {
    fn sampling()(
        temperature in 0.0_f32..100.0, top_k in -1..1000, top_p in 0.0_f32..=1.0, min_p in 0.0_f32..=1.0,
        repeat_last_n in -1..4096, presence_penalty in -2.0_f32..2.0,
        logit_bias in prop::collection::vec((0..1000, prop_oneof![Just(f32::NEG_INFINITY), -99.0_f32..99.0]), 0..4),
        seed in any::<Option<u64>>(),
    ) -> SamplingParams {
        SamplingParams {
            temperature, top_k, top_p, min_p, repeat_last_n, presence_penalty, logit_bias, seed, ..SamplingParams::default()
        }
    }
}

fn prompt() -> impl Strategy<Value = Prompt> {
    prop_oneof![
        any::<String>().prop_map(Prompt::Text),
        prop::collection::vec(any::<i32>(), 0..9).prop_map(Prompt::Tokens),
        prop::collection::vec(("[a-z]*", any::<String>()), 0..4).prop_map(|turns| Prompt::Chat(
            turns.into_iter().map(|(role, content)| ChatMessage::new(role, content)).collect()
        )),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_request_survives_json(
        prompt in prompt(),
        sampling in sampling(),
        (n, max_tokens, logprobs) in any::<(u32, Option<u32>, Option<u32>)>(),
        stop in prop::collection::vec(any::<String>(), 0..4),
        (ignore_eos, cache_prompt) in any::<(bool, bool)>(),
        (client, priority, deadline_ms, max_itl_ms) in any::<(u64, i32, Option<u64>, Option<u64>)>(),
        speculate in any::<bool>(),
    ) {
        let terms = Request { speculate, client, priority, deadline_ms, max_itl_ms, ..Request::default() };
        let request =
            Request { prompt, n, max_tokens, stop, ignore_eos, sampling, logprobs, cache_prompt, ..terms };
        prop_assert_eq!(through_json(&request), request);
    }
}
