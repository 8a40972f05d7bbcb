//! What chat and plain completions do alike once the request is read: submit it, then stream the answer or collect it.

use std::sync::Arc;
use std::time::Instant;

use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response};
use minerva_engine::{Engine, Event, FinishReason, Prompt, Request as EngineRequest};

use super::error::ApiError;
use super::fields::Fields;
use super::params::Delivery;
use super::wire::{
    ChatAnswer, ChatChoice, ChatLogprobs, Completion, Shape, TextChoice, TextLogprobs, Totals, finish_reason,
};
use super::{Answered, Call, body, chat, completions};
use crate::answer::Answer;
use crate::http::ResponseBody;
use crate::sse::{Envelope, SseBody, StreamOptions};
use crate::state::{App, Phase, unix_seconds};

/// Bodies above this are parsed off the threads that serve other connections.
const MAX_INLINE_PARSE_BYTES: usize = 128 << 10;

/// Answers one generation request.
pub(super) async fn answer(
    call: &Call<'_>,
    request: Request<Incoming>,
    shape: Shape,
    client: u64,
) -> Result<Answered, ApiError> {
    let app = call.app;
    // Counted first, checked second: a drain that begins in between waits for us.
    let in_flight = app.in_flight.enter();
    let engine = ready_engine(app)?;
    let body = body::read(app, request, call.busy).await?;
    let (mut request, prompts, delivery) = if body.bytes.len() > MAX_INLINE_PARSE_BYTES {
        let (app, engine) = (Arc::clone(app), engine.clone());
        // What a large body becomes is many times its size: few at once.
        let permit = Arc::clone(&app.large_bodies).acquire_owned().await;
        let permit = permit.map_err(|problem| ApiError::internal(problem.to_string()))?;
        let parsed = move || {
            let _permit = permit;
            parse(&body.bytes, &app, &engine, shape)
        };
        tokio::task::spawn_blocking(parsed)
            .await
            .map_err(|problem| ApiError::internal(format!("parsing a request panicked: {problem}")))??
    } else {
        parse(&body.bytes, app, &engine, shape)?
    };
    request.client = client;
    request.queue_updates = delivery.queue_updates;
    if request.priority < 0 && !app.settings.allow_priority {
        let message = "`priority` must be at least 0: this server does not let requests go before others";
        return Err(ApiError::field("priority", "priority_not_allowed", message));
    }
    let has_logprobs = request.logprobs.is_some();
    let answer = submit(app, &engine, (request, prompts), (shape, delivery), call.started).await?;
    let envelope = Envelope {
        shape,
        id: app.new_id(shape.id_prefix()),
        created: unix_seconds(),
        model: engine.info().name.clone(),
        fingerprint: app.fingerprint(),
    };
    let mut response = if delivery.stream {
        let options = StreamOptions {
            include_usage: delivery.include_usage,
            has_logprobs,
            ping: app.settings.ping_seconds.duration(),
            max_events_per_write: app.token_buffer,
        };
        let events = SseBody::new(answer, &envelope, options, call.request_id.to_owned());
        let mut response = Response::new(ResponseBody::events(events));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        // nginx buffers whole responses otherwise.
        response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    } else {
        super::json(collect(answer, &envelope, has_logprobs).await?)
    };
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    Ok(Answered { response, in_flight: Some(in_flight) })
}

/// The engine, if there is one and it takes requests.
fn ready_engine(app: &App) -> Result<Engine, ApiError> {
    if app.is_draining() {
        return Err(ApiError::shutting_down());
    }
    match app.phase() {
        Phase::Ready(engine) => Ok(engine),
        Phase::Loading(progress) => {
            let percent = (progress.fraction.clamp(0.0, 1.0) * 100.0).floor();
            Err(ApiError::unavailable("model_loading", format!("the model is loading ({percent} %)"), 2))
        }
        Phase::Failed => Err(ApiError::unavailable("model_failed", "the model could not be loaded", 30)),
    }
}

/// A request, and the prompts that it is for: copies of it are made one by one, as they are accepted.
type Parsed = (EngineRequest, Vec<Prompt>, Delivery);

fn parse(bytes: &[u8], app: &App, engine: &Engine, shape: Shape) -> Result<Parsed, ApiError> {
    let fields = Fields::parse(bytes)?;
    match shape {
        Shape::Chat => chat::parse(fields, app, engine.info()).map(|(mut request, delivery)| {
            let prompt = std::mem::replace(&mut request.prompt, Prompt::Tokens(Vec::new()));
            (request, vec![prompt], delivery)
        }),
        Shape::Completion => completions::parse(fields, app, engine.info()),
    }
}

/// All prompts or none: when one is refused, dropping the others' streams cancels them.
async fn submit(
    app: &Arc<App>,
    engine: &Engine,
    (request, prompts): (EngineRequest, Vec<Prompt>),
    (shape, delivery): (Shape, Delivery),
    started: Instant,
) -> Result<Answer, ApiError> {
    let (is_single, n) = (prompts.len() == 1, request.n);
    let mut streams = Vec::with_capacity(prompts.len());
    for (p, prompt) in prompts.into_iter().enumerate() {
        let stream = engine.generate(EngineRequest { prompt, ..request.clone() }).await.map_err(|refusal| {
            let field = shape.prompt_field();
            let prompt = if is_single { field.to_owned() } else { format!("{field}[{p}]") };
            ApiError::refused(&refusal, &prompt, delivery.constraint_field)
        })?;
        streams.push(stream);
    }
    Ok(Answer::new(app, streams, n, started))
}

/// One choice of a whole answer, so far.
#[derive(Default)]
struct Choice {
    text: String,
    chat_logprobs: ChatLogprobs,
    text_logprobs: TextLogprobs,
    n_chars: usize,
    reason: Option<FinishReason>,
}

async fn collect(mut answer: Answer, envelope: &Envelope, has_logprobs: bool) -> Result<Vec<u8>, ApiError> {
    let mut choices: Vec<Choice> = (0..answer.n_choices()).map(|_| Choice::default()).collect();
    let mut totals = Totals::default();
    while let Some(event) = answer.next_event().await {
        match event {
            Event::Delta(delta) => {
                let Some(choice) = choices.get_mut(delta.choice as usize) else { continue };
                choice.text.push_str(&delta.text);
                match envelope.shape {
                    _ if !has_logprobs => {}
                    Shape::Chat => choice.chat_logprobs.push(delta.tokens),
                    Shape::Completion => choice.n_chars = choice.text_logprobs.push(delta.tokens, choice.n_chars),
                }
            }
            Event::Finished { choice, reason, .. } => {
                if let Some(choice) = choices.get_mut(choice as usize) {
                    choice.reason = Some(reason);
                }
            }
            Event::Done(summary) => totals.add(&summary),
            Event::Queued { .. } | Event::Started => {} // comments of a stream
            Event::Failed(failure) => return Err(ApiError::failed(&failure)),
        }
    }
    let numbered = choices.into_iter().zip(0..).map(|(choice, index)| {
        let reason = finish_reason(choice.reason.unwrap_or(FinishReason::Length));
        (choice, index, reason)
    });
    Ok(match envelope.shape {
        Shape::Chat => {
            let choices = numbered.map(|(choice, index, finish_reason)| ChatChoice {
                index,
                message: ChatAnswer { role: "assistant", content: choice.text, refusal: None },
                logprobs: has_logprobs.then_some(choice.chat_logprobs),
                finish_reason,
            });
            whole(envelope, choices.collect(), totals)
        }
        Shape::Completion => {
            let choices = numbered.map(|(choice, index, finish_reason)| TextChoice {
                index,
                text: choice.text,
                logprobs: has_logprobs.then_some(choice.text_logprobs),
                finish_reason,
            });
            whole(envelope, choices.collect(), totals)
        }
    })
}

fn whole<C: serde::Serialize>(envelope: &Envelope, choices: Vec<C>, totals: Totals) -> Vec<u8> {
    let completion = Completion {
        id: &envelope.id,
        object: envelope.shape.object(),
        created: envelope.created,
        model: &envelope.model,
        system_fingerprint: &envelope.fingerprint,
        choices,
        usage: totals.usage,
        timings: totals.timings,
    };
    serde_json::to_vec(&completion).unwrap_or_default()
}
