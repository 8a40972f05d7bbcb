//! A listening server, from its first connection to its last: start it before the model is there, end it without losing
//! what was accepted.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::config::Config;
use crate::http::{self, Connections};
use crate::state::{App, Phase};

/// After the engine was told to stop: how long streams may take to write their error event.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// After the last response: how long connections may take to close.
const LAST_CLOSE: Duration = Duration::from_millis(300);

/// A server that listens and does not answer yet.
pub struct Server {
    listener: TcpListener,
    app: Arc<App>,
    config: Config,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Every accepted request was answered to its end.
    Drained,
    /// The grace time was over first: this many requests got an error.
    CutOff(usize),
}

impl Server {
    /// Binds the address of `config`.
    ///
    /// # Errors
    /// An address that must not be served without a key, or that cannot be bound.
    pub async fn bind(config: Config) -> anyhow::Result<Self> {
        let address = config.address()?;
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        let app = Arc::new(App::new(&config, address.ip().is_loopback()));
        Ok(Self { listener, app, config })
    }

    /// Where it listens, with the port that was free if the config said 0.
    ///
    /// # Errors
    /// Only if the system forgot the socket.
    pub fn local_address(&self) -> anyhow::Result<SocketAddr> {
        Ok(self.listener.local_addr()?)
    }

    /// The shared state: whoever loads the model reports its progress and the engine there.
    pub fn app(&self) -> Arc<App> {
        Arc::clone(&self.app)
    }

    /// Serves until `shutdown` resolves. Then readiness is 503 and new generation requests are refused, while accepted ones
    /// have the grace time to finish and health is still answered.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Outcome {
        let Self { listener, app, config } = self;
        let grace = config.server.grace_seconds.duration();
        let connections = Arc::new(Connections::new(&app, &config.server));
        let (close, closed) = watch::channel(false);
        let listening = tokio::spawn(http::listen(listener, Arc::clone(&app), Arc::clone(&connections), closed));
        shutdown.await;
        app.drain();
        let in_flight = app.in_flight.count();
        if in_flight > 0 {
            info!(in_flight, grace_seconds = grace.as_secs_f64(), "shutting down: finishing requests");
        }
        let mut outcome = Outcome::Drained;
        if tokio::time::timeout(grace, app.in_flight.none()).await.is_err() {
            let left = app.in_flight.count();
            warn!(left, "the grace time is over: ending requests with an error");
            outcome = Outcome::CutOff(left);
            if let Phase::Ready(engine) = app.phase() {
                engine.shutdown();
            }
            let _ = tokio::time::timeout(LAST_WORDS, app.in_flight.none()).await;
        }
        close.send_replace(true);
        let _ = tokio::time::timeout(LAST_CLOSE, connections.none()).await;
        listening.abort();
        if let Phase::Ready(engine) = app.phase() {
            engine.shutdown();
        }
        outcome
    }
}
