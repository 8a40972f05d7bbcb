//! The caller's end of a request: a stream of events that cancels the request when it is dropped.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::engine::Inner;
use crate::event::{Event, GenerationError};
use crate::scheduler::RequestId;
use crate::worker::Command;

/// The events of one accepted request, in order; the last one is [`Event::Done`] or [`Event::Failed`].
///
/// Works on any executor, and without one through [`blocking_next`](Self::blocking_next). Dropping it before the end
/// cancels the request: its cells are free before the next step begins. It keeps the engine alive.
///
/// What waits in it is bounded by the context of one request: a reader that stops reading costs memory for one answer.
#[derive(Debug)]
pub struct EventStream {
    id: RequestId,
    prompt_tokens: u32,
    events: UnboundedReceiver<Event>,
    ended: bool,
    engine: Arc<Inner>,
}

impl EventStream {
    pub(crate) fn new(id: RequestId, prompt_tokens: u32, events: UnboundedReceiver<Event>, engine: Arc<Inner>) -> Self {
        Self { id, prompt_tokens, events, ended: false, engine }
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> u32 {
        self.prompt_tokens
    }

    /// The next event; `None` after the last one. Dropping the future loses no event.
    pub async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|context| self.poll_event(context)).await
    }

    /// The next event, for threads without an executor.
    pub fn blocking_next(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        let event = self.events.blocking_recv();
        Some(self.note(event))
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.events.poll_recv(context).map(|event| Some(self.note(event)))
    }

    /// A channel that closes without a last event means that the engine thread is gone.
    fn note(&mut self, event: Option<Event>) -> Event {
        let event = event.unwrap_or(Event::Failed(GenerationError::Shutdown));
        self.ended = matches!(event, Event::Done(_) | Event::Failed(_));
        event
    }
}

impl Stream for EventStream {
    type Item = Event;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.get_mut().poll_event(context)
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        if !self.ended {
            self.engine.send(Command::Cancel(self.id));
        }
    }
}
