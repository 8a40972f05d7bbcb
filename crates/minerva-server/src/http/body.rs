//! The body of a response: a whole one, or a stream of events.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tracing::{debug, info};

use super::Busy;
use crate::sse::SseBody;
use crate::state::{App, InFlightGuard};

/// A whole body goes out in pieces of this size, so that its guard lives until the client has taken nearly all of it: of one piece the
/// connection keeps a copy and the body is done.
const MAX_FRAME_BYTES: usize = 16 << 10;

/// A response body, with what must live until its last byte is out or its client is gone.
pub(crate) struct ResponseBody {
    content: Content,
    /// Dropped with the body.
    guard: Option<Guard>,
}

enum Content {
    Whole(Bytes),
    Events(Box<SseBody>),
}

/// Closes the books of one request when it is dropped: with the last byte, or when the client has gone.
pub(crate) struct Guard {
    pub(crate) app: Arc<App>,
    pub(crate) endpoint: &'static str,
    pub(crate) status: u16,
    pub(crate) started: Instant,
    pub(crate) request_id: String,
    /// Set for generation requests.
    pub(crate) in_flight: Option<InFlightGuard>,
    pub(crate) busy: Busy,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Self { endpoint, status, ref request_id, .. } = *self;
        let (time, is_generation) = (self.started.elapsed(), self.in_flight.is_some());
        self.app.metrics.observe_response(endpoint, status, time, is_generation);
        let ms = time.as_millis();
        if is_generation {
            info!(endpoint, status, ms, request_id, "answered");
        } else {
            debug!(endpoint, status, ms, request_id, "answered");
        }
    }
}

impl ResponseBody {
    pub(crate) fn whole(bytes: impl Into<Bytes>) -> Self {
        Self { content: Content::Whole(bytes.into()), guard: None }
    }

    pub(crate) fn events(events: SseBody) -> Self {
        Self { content: Content::Events(Box::new(events)), guard: None }
    }

    pub(crate) fn guarded(mut self, guard: Guard) -> Self {
        self.guard = Some(guard);
        self
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut self.content {
            Content::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Content::Whole(bytes) => {
                let part = bytes.split_to(bytes.len().min(MAX_FRAME_BYTES));
                Poll::Ready(Some(Ok(Frame::data(part))))
            }
            Content::Events(events) => events.poll_bytes(cx).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Whole(bytes) => bytes.is_empty(),
            Content::Events(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Events(_) => SizeHint::default(),
        }
    }
}
