//! The HTTP server: hyper on tokio, with every resource that a client can hold bounded.
//!
//! | a client that … | costs at most | then |
//! |---|---|---|
//! | opens connections | `max_connections` | the longest idle one is closed for the new one; all busy: 503 |
//! | sends headers slowly, or too many | 32 KiB, 100 headers, `header_timeout` | closed, or 431 |
//! | sends a body slowly, or too much | `max_body`, `body_timeout` | 408, 413 |
//! | stops reading | 64 KiB here and the kernel's buffers, `write_timeout` | closed, its request cancelled |
//! | keeps a connection without a request | `idle_timeout` | closed |
//!
//! Start with [`listen`]; one task per connection runs [`serve_connection`].

mod body;
mod connections;
mod io;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tracing::{debug, warn};

pub(crate) use body::{Guard, ResponseBody};
pub(crate) use connections::{Busy, Connections};
use io::GuardedIo;

use crate::state::App;

/// The largest request head. OpenAI clients send about 1 KiB.
const MAX_HEAD_BYTES: usize = 32 << 10;
const MAX_HEADERS: usize = 100;
/// What hyper may hold for one connection, each way.
const MAX_BUFFER_BYTES: usize = 64 << 10;
/// Connections beyond the limit that are told so at the same time; more are closed without a word.
const MAX_REFUSALS: usize = 64;

/// Accepts connections until `close` says true; then busy ones finish their response and idle ones are closed.
pub(crate) async fn listen(
    listener: TcpListener,
    app: Arc<App>,
    connections: Arc<Connections>,
    mut close: watch::Receiver<bool>,
) {
    let refusals = Arc::new(Semaphore::new(MAX_REFUSALS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = close.wait_for(|close| *close) => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(problem) => {
                // Out of file descriptors, most likely: make room, and do not spin.
                warn!(%problem, "cannot accept a connection");
                connections.evict_idle();
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if let Some(connection) = connections.admit() {
            tokio::spawn(serve_connection(stream, connection, Arc::clone(&app), close.clone()));
            continue;
        }
        app.metrics.connections_refused.fetch_add(1, Ordering::Relaxed);
        if let Ok(permit) = Arc::clone(&refusals).try_acquire_owned() {
            tokio::spawn(async move {
                let _ = tokio::time::timeout(Duration::from_secs(1), refuse(stream)).await;
                drop(permit);
            });
        }
    }
}

async fn serve_connection(
    stream: TcpStream,
    connection: connections::Admitted,
    app: Arc<App>,
    mut close: watch::Receiver<bool>,
) {
    let _ = stream.set_nodelay(true); // a token is a small write that must not wait for the next one
    let limits = connection.limits();
    let io = GuardedIo::new(stream, Arc::clone(&connection), limits.write);
    let state = Arc::clone(&connection);
    let service = service_fn(move |request| {
        let (app, busy) = (Arc::clone(&app), state.enter());
        async move { Ok::<_, Infallible>(crate::api::handle(app, request, busy).await) }
    });
    let http = http1::Builder::new()
        // Without a timer hyper's own header timeout does nothing. It also covers the wait for a first byte, so it gets the
        // longer limit here; `expired` below applies the shorter one from the first byte on.
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle.max(limits.header))
        .max_header_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_BUFFER_BYTES)
        .serve_connection(TokioIo::new(io), service);
    tokio::pin!(http);
    let mut is_closing = false;
    loop {
        tokio::select! {
            result = http.as_mut() => {
                if let Err(problem) = result {
                    debug!(%problem, "connection ended");
                }
                return;
            }
            () = connection.evicted() => if connection.is_idle() { return },
            () = tokio::time::sleep(connection.until_check()) => if connection.expired() { return },
            _ = close.wait_for(|close| *close), if !is_closing => {
                is_closing = true;
                http.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Says 503 to a connection that there is no room for, and reads what it sent so that the answer survives the close.
async fn refuse(mut stream: TcpStream) {
    const BODY: &str = r#"{"error":{"message":"too many connections","type":"server_error","param":null,"code":"too_many_connections"}}"#;
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {}\r\nretry-after: 1\r\n\
        connection: close\r\n\r\n",
        BODY.len()
    );
    if stream.write_all((head + BODY).as_bytes()).await.is_ok() && stream.shutdown().await.is_ok() {
        let mut scratch = [0; 4096];
        while stream.read(&mut scratch).await.is_ok_and(|n| n > 0) {}
    }
}
