//! Reads a request body: bounded in size, in time, and over all connections together.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE};
use hyper::{HeaderMap, Request, StatusCode};

use super::error::ApiError;
use crate::http::Busy;
use crate::state::App;

/// A body that keeps this pace never times out, however large it is.
const MIN_BYTES_PER_SECOND: usize = 64 << 10;
/// Bodies in memory at once, in units of the largest one.
const MAX_BODIES: usize = 64;

/// Bytes of one body, counted in the sum over all requests until this is dropped.
#[derive(Debug)]
pub(crate) struct BodyBytes {
    pub(crate) bytes: Vec<u8>,
    counted: usize,
    sum: Arc<AtomicUsize>,
}

impl BodyBytes {
    fn grow(&mut self, data: &[u8], max_sum: usize) -> Result<(), ApiError> {
        if self.sum.fetch_add(data.len(), Ordering::Relaxed) + data.len() > max_sum {
            self.sum.fetch_sub(data.len(), Ordering::Relaxed);
            return Err(ApiError::unavailable("too_many_bodies", "too many large requests at once", 1));
        }
        self.counted += data.len();
        self.bytes.extend_from_slice(data);
        Ok(())
    }
}

impl Drop for BodyBytes {
    fn drop(&mut self) {
        self.sum.fetch_sub(self.counted, Ordering::Relaxed);
    }
}

/// The whole body of a request that must be JSON.
pub(crate) async fn read(app: &App, request: Request<Incoming>, busy: &Busy) -> Result<BodyBytes, ApiError> {
    let (head, mut body) = request.into_parts();
    check_headers(&head.headers)?;
    let max = app.settings.max_body_bytes;
    let too_large = || {
        let message = format!("the request body is larger than {max} bytes, the limit");
        ApiError::request(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    };
    if body.size_hint().lower() > max as u64 {
        return Err(too_large()); // an honest Content-Length: refused before a byte of it is read
    }
    let mut read = BodyBytes { bytes: Vec::new(), counted: 0, sum: Arc::clone(&app.body_bytes) };
    let started = tokio::time::Instant::now();
    loop {
        let earned = Duration::from_secs((read.bytes.len() / MIN_BYTES_PER_SECOND) as u64);
        let deadline = started + app.settings.body_timeout_seconds.duration() + earned;
        let frame = tokio::time::timeout_at(deadline, body.frame()).await.map_err(|_| {
            let message = "the request body did not arrive in time";
            ApiError::request(StatusCode::REQUEST_TIMEOUT, "body_timeout", message)
        })?;
        match frame {
            None => break,
            Some(Err(_)) => return Err(ApiError::invalid("bad_body", "the request body is broken")),
            Some(Ok(frame)) => {
                let Ok(data) = frame.into_data() else { continue };
                if read.bytes.len() + data.len() > max {
                    return Err(too_large());
                }
                read.grow(&data, max.saturating_mul(MAX_BODIES))?;
            }
        }
    }
    busy.set_unread_body(false);
    Ok(read)
}

/// Only JSON, and said so: a web form can reach a server on the visitor's machine, but not with this type.
fn check_headers(headers: &HeaderMap) -> Result<(), ApiError> {
    let unsupported = |code, message: &str| Err(ApiError::request(StatusCode::UNSUPPORTED_MEDIA_TYPE, code, message));
    let essence = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = essence.and_then(|value| value.split(';').next()).map(|value| value.trim().to_ascii_lowercase());
    let is_json = essence.is_some_and(|essence| {
        essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
    });
    if !is_json {
        return unsupported("unsupported_media_type", "the request needs the header `Content-Type: application/json`");
    }
    match headers.get(CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => {
            unsupported("unsupported_encoding", "compressed request bodies are not accepted")
        }
        _ => Ok(()),
    }
}
