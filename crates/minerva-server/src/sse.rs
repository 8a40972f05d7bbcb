//! A stream of server-sent events: one JSON chunk per delta, comments while there is nothing to say, `[DONE]` at the end.
//!
//! The body is polled by hyper and polls the engine's events itself: no task and no channel between the two, so a client that
//! does not read holds back nothing but itself, and dropping the body cancels the request. Chunks are written straight into
//! one reused buffer; what all chunks of a request have in common was written once, at its start.

use std::future::Future as _;
use std::io::Write as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{BufMut as _, Bytes, BytesMut};
use minerva_engine::{Delta, Event, FinishReason};
use serde::Serialize;
use tokio::time::Sleep;

use crate::answer::Answer;
use crate::api::error::ApiError;
use crate::api::wire::{
    ChatChunkChoice, ChatDelta, ChatLogprobs, Shape, TextChunkChoice, TextLogprobs, Timings, Totals, Usage,
    finish_reason,
};

/// What every chunk of one answer says.
#[derive(Debug, Clone)]
pub(crate) struct Envelope {
    pub(crate) shape: Shape,
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: String,
}

/// How one stream is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: bool,
    pub(crate) has_logprobs: bool,
    pub(crate) ping: Duration,
    /// Events that may share one write.
    pub(crate) max_events_per_write: usize,
}

/// The body of a streamed answer.
pub(crate) struct SseBody {
    answer: Answer,
    writer: ChunkWriter,
    options: StreamOptions,
    last_write: Instant,
    ping: Pin<Box<Sleep>>,
    is_done: bool,
    request_id: String,
}

impl SseBody {
    pub(crate) fn new(answer: Answer, envelope: &Envelope, options: StreamOptions, request_id: String) -> Self {
        let writer = ChunkWriter::new(envelope, answer.n_choices(), options);
        let ping = Box::pin(tokio::time::sleep(options.ping));
        Self { answer, writer, options, last_write: Instant::now(), ping, is_done: false, request_id }
    }

    /// The next bytes to send; `None` after the last.
    pub(crate) fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let mut n_events = 0;
        while !self.is_done && n_events < self.options.max_events_per_write {
            match self.answer.poll_event(cx) {
                Poll::Pending => break,
                Poll::Ready(event) => self.take(event),
            }
            n_events += 1;
        }
        loop {
            if !self.writer.buffer.is_empty() {
                self.last_write = Instant::now();
                return Poll::Ready(Some(self.writer.buffer.split().freeze()));
            }
            if self.is_done {
                return Poll::Ready(None);
            }
            if n_events > 0 {
                // Events without text: look for more before waiting, since their waker is not registered.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            // The timer is set again only when it fires, not for every token.
            if self.ping.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let silent = self.last_write.elapsed();
            let wait = match self.options.ping.checked_sub(silent) {
                Some(rest) if !rest.is_zero() => rest,
                _ => {
                    self.writer.buffer.put_slice(b": ping\n\n");
                    self.options.ping
                }
            };
            self.ping.as_mut().reset(tokio::time::Instant::now() + wait);
        }
    }

    fn take(&mut self, event: Option<Event>) {
        match event {
            Some(Event::Delta(delta)) => self.writer.delta(delta),
            Some(Event::Queued { position, estimate_ms }) => {
                self.writer.queued(self.answer.last_prompt(), position, estimate_ms);
            }
            Some(Event::Started) => self.writer.started(self.answer.last_prompt()),
            Some(Event::Finished { choice, reason, .. }) => {
                self.writer.finished(choice, reason, self.answer.is_last_source());
            }
            Some(Event::Done(summary)) => self.writer.totals.add(&summary),
            Some(Event::Failed(failure)) => {
                let error = ApiError::failed(&failure);
                tracing::error!(request_id = self.request_id, code = error.code, "stream failed: {failure}");
                self.writer.error(&error);
                self.is_done = true;
            }
            None => {
                self.writer.end();
                self.is_done = true;
            }
        }
    }
}

/// Writes chunks into a buffer.
struct ChunkWriter {
    shape: Shape,
    options: StreamOptions,
    buffer: BytesMut,
    /// `data: {"id":…,"choices":[`
    head: Vec<u8>,
    choices: Vec<ChoiceState>,
    n_unfinished: usize,
    /// The last choice's end, held back for the timings, which come with the last event.
    held: Option<(u32, FinishReason)>,
    totals: Totals,
}

#[derive(Debug, Clone, Default)]
struct ChoiceState {
    has_role: bool,
    /// Characters of the tokens so far.
    n_chars: usize,
}

/// What follows the choices of a chunk.
#[derive(Serialize)]
struct Tail {
    usage: Usage,
    timings: Timings,
}

impl ChunkWriter {
    fn new(envelope: &Envelope, n_choices: usize, options: StreamOptions) -> Self {
        #[derive(Serialize)]
        struct Head<'a> {
            id: &'a str,
            object: &'static str,
            created: u64,
            model: &'a str,
            system_fingerprint: &'a str,
        }
        let Envelope { shape, id, created, model, fingerprint } = envelope;
        let head = Head { id, object: shape.chunk_object(), created: *created, model, system_fingerprint: fingerprint };
        let mut json = serde_json::to_string(&head).unwrap_or_default();
        json.pop(); // the brace: more fields follow
        let choices = vec![ChoiceState::default(); n_choices];
        Self {
            shape: *shape,
            options,
            buffer: BytesMut::with_capacity(1 << 10),
            head: format!("data: {json},\"choices\":[").into_bytes(),
            n_unfinished: n_choices,
            choices,
            held: None,
            totals: Totals::default(),
        }
    }

    /// A comment, which clients skip: where the request is in the queue.
    fn queued(&mut self, prompt: Option<usize>, position: u32, estimate_ms: Option<u64>) {
        let prompt = prompt.map_or_else(String::new, |prompt| format!(" prompt={prompt}"));
        let estimate = estimate_ms.map_or_else(String::new, |ms| format!(" estimate_ms={ms}"));
        self.buffer.put_slice(format!(": queue{prompt} position={position}{estimate}\n\n").as_bytes());
    }

    fn started(&mut self, prompt: Option<usize>) {
        let prompt = prompt.map_or_else(String::new, |prompt| format!(" prompt={prompt}"));
        self.buffer.put_slice(format!(": started{prompt}\n\n").as_bytes());
    }

    fn delta(&mut self, delta: Delta) {
        let Delta { choice, text, tokens } = delta;
        let has_logprobs = self.options.has_logprobs && !tokens.is_empty();
        if text.is_empty() && !has_logprobs {
            return; // half a character, or what may become a stop text
        }
        self.role(choice);
        match self.shape {
            Shape::Chat => {
                let mut logprobs = has_logprobs.then(ChatLogprobs::default);
                if let Some(logprobs) = &mut logprobs {
                    logprobs.push(tokens);
                }
                let delta = ChatDelta { role: None, content: Some(&text) };
                self.chunk(&ChatChunkChoice { index: choice, delta, logprobs, finish_reason: None });
            }
            Shape::Completion => {
                let mut logprobs = has_logprobs.then(TextLogprobs::default);
                if let (Some(logprobs), Some(state)) = (&mut logprobs, self.choices.get_mut(choice as usize)) {
                    state.n_chars = logprobs.push(tokens, state.n_chars);
                }
                self.chunk(&TextChunkChoice { index: choice, text: &text, logprobs, finish_reason: None });
            }
        }
    }

    /// A chat choice begins with its role. It comes with the first token and not earlier: the time to the first chunk is
    /// what clients measure.
    fn role(&mut self, choice: u32) {
        let Some(state) = self.choices.get_mut(choice as usize) else { return };
        if self.shape == Shape::Chat && !std::mem::replace(&mut state.has_role, true) {
            let delta = ChatDelta { role: Some("assistant"), content: Some("") };
            self.chunk(&ChatChunkChoice { index: choice, delta, logprobs: None, finish_reason: None });
        }
    }

    fn finished(&mut self, choice: u32, reason: FinishReason, is_last_source: bool) {
        self.role(choice);
        self.n_unfinished = self.n_unfinished.saturating_sub(1);
        if self.n_unfinished == 0 && is_last_source && !self.options.include_usage {
            self.held = Some((choice, reason));
        } else {
            self.finish_chunk(choice, reason, None);
        }
    }

    fn finish_chunk(&mut self, choice: u32, reason: FinishReason, tail: Option<Tail>) {
        let finish_reason = Some(finish_reason(reason));
        self.open();
        match self.shape {
            Shape::Chat => {
                let delta = ChatDelta::default();
                self.json(&ChatChunkChoice { index: choice, delta, logprobs: None, finish_reason });
            }
            Shape::Completion => {
                self.json(&TextChunkChoice { index: choice, text: "", logprobs: None, finish_reason });
            }
        }
        match tail {
            Some(tail) => {
                self.buffer.put_slice(b"],\"timings\":");
                self.json(&tail.timings);
                self.buffer.put_slice(b"}\n\n");
            }
            None => self.close(),
        }
    }

    fn end(&mut self) {
        let tail = Tail { usage: self.totals.usage, timings: self.totals.timings };
        if let Some((choice, reason)) = self.held.take() {
            self.finish_chunk(choice, reason, Some(tail));
        } else if self.options.include_usage {
            self.open();
            self.buffer.put_slice(b"],\"usage\":");
            self.json(&tail.usage);
            self.buffer.put_slice(b",\"timings\":");
            self.json(&tail.timings);
            self.buffer.put_slice(b"}\n\n");
        }
        self.buffer.put_slice(b"data: [DONE]\n\n");
    }

    /// An error in place of `[DONE]`.
    fn error(&mut self, error: &ApiError) {
        self.buffer.put_slice(b"data: ");
        self.buffer.put_slice(&error.body());
        self.buffer.put_slice(b"\n\n");
    }

    fn chunk<C: Serialize>(&mut self, choice: &C) {
        self.open();
        self.json(choice);
        self.close();
    }

    fn open(&mut self) {
        self.buffer.extend_from_slice(&self.head);
    }

    fn close(&mut self) {
        // With `include_usage`, OpenAI's chunks before the last have a null there.
        let tail: &[u8] = if self.options.include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" };
        self.buffer.put_slice(tail);
    }

    fn json<T: Serialize>(&mut self, value: &T) {
        let mut writer = (&mut self.buffer).writer();
        // Plain structs with text keys, into memory: neither can fail.
        let _ = serde_json::to_writer(&mut writer, value);
        let _ = writer.flush();
    }
}
