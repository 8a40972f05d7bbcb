//! The events of one HTTP request: those of each prompt's stream, with choices numbered through, and observed on the way.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::Stream as _;
use minerva_engine::{Delta, Event, EventStream, GenerationError};

use crate::state::App;

/// One engine request per prompt. Dropping it cancels them all.
pub(crate) struct Answer {
    sources: Vec<Source>,
    /// Where the next poll begins, so that no prompt starves another.
    next: usize,
    observer: Observer,
}

struct Source {
    /// `None` once it is complete.
    stream: Option<EventStream>,
    /// The number of its first choice.
    first_choice: u32,
}

impl Answer {
    /// `streams` in the order of the prompts, each with `n` choices.
    pub(crate) fn new(app: &Arc<App>, streams: Vec<EventStream>, n: u32, started: Instant) -> Self {
        let n_choices = streams.len() * n as usize;
        let source = |(p, stream)| Source { stream: Some(stream), first_choice: p as u32 * n };
        let observer = Observer { app: Arc::clone(app), started, last_token: vec![None; n_choices], has_token: false };
        Self { sources: streams.into_iter().enumerate().map(source).collect(), next: 0, observer }
    }

    pub(crate) fn n_choices(&self) -> usize {
        self.observer.last_token.len()
    }

    /// The next event of any prompt; `None` when all are done. After [`Event::Failed`] there is nothing more.
    pub(crate) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        let n = self.sources.len();
        let mut is_done = true;
        for i in 0..n {
            let at = (self.next + i) % n;
            let source = &mut self.sources[at];
            let Some(stream) = &mut source.stream else { continue };
            let event = match Pin::new(stream).poll_next(cx) {
                Poll::Pending => {
                    is_done = false;
                    continue;
                }
                Poll::Ready(Some(event)) => event,
                Poll::Ready(None) => {
                    let message = "the engine closed a stream without its last event".to_owned();
                    Event::Failed(GenerationError::Backend { message })
                }
            };
            self.next = at + 1;
            let event = self.number(event, at);
            match &event {
                Event::Done(summary) => {
                    self.sources[at].stream = None;
                    let queue = Duration::try_from_secs_f64(summary.queue_ms / 1e3).unwrap_or_default();
                    self.observer.app.metrics.observe_queue(queue);
                }
                Event::Failed(_) => self.sources.clear(),
                Event::Delta(delta) => self.observer.token(delta),
                Event::Finished { .. } | Event::Queued { .. } | Event::Started => {}
            }
            return Poll::Ready(Some(event));
        }
        if is_done { Poll::Ready(None) } else { Poll::Pending }
    }

    pub(crate) async fn next_event(&mut self) -> Option<Event> {
        std::future::poll_fn(|cx| self.poll_event(cx)).await
    }

    /// Whether only one prompt is left to finish, so that its `Done` is the last of all.
    pub(crate) fn is_last_source(&self) -> bool {
        self.sources.iter().filter(|source| source.stream.is_some()).count() <= 1
    }

    /// Which prompt the last event was about, where there are several.
    pub(crate) fn last_prompt(&self) -> Option<usize> {
        (self.sources.len() > 1).then(|| self.next.saturating_sub(1))
    }

    fn number(&self, event: Event, at: usize) -> Event {
        let first = self.sources[at].first_choice;
        match event {
            Event::Delta(delta) => Event::Delta(Delta { choice: first + delta.choice, ..delta }),
            Event::Finished { choice, reason, stop } => Event::Finished { choice: first + choice, reason, stop },
            other => other,
        }
    }
}

/// Times tokens as the server sees them.
struct Observer {
    app: Arc<App>,
    started: Instant,
    last_token: Vec<Option<Instant>>,
    has_token: bool,
}

impl Observer {
    fn token(&mut self, delta: &Delta) {
        if delta.tokens.is_empty() {
            return;
        }
        let now = Instant::now();
        if !self.has_token {
            self.has_token = true;
            self.app.metrics.observe_first_token(now - self.started);
        }
        if let Some(last) = self.last_token.get_mut(delta.choice as usize)
            && let Some(before) = last.replace(now)
        {
            self.app.metrics.observe_token_gap(now - before);
        }
    }
}
