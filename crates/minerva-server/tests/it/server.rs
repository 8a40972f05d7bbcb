//! A server over the simulator, for one test.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use minerva_engine::{Engine, EngineStats, SimConfig};
use minerva_server::config::Seconds;
use minerva_server::{App, Config, Outcome, Phase, Server};
use serde_json::Value as Json;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::client::{self, Reply};

pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    pub(crate) app: Arc<App>,
    pub(crate) engine: Engine,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<Outcome>,
}

/// A simulator that is not in a hurry: tests set what they need.
pub(crate) fn sim() -> SimConfig {
    SimConfig { answer_tokens: 16, ..SimConfig::default() }
}

/// A server with the default settings.
pub(crate) async fn start() -> TestServer {
    start_with(sim(), |_| {}).await
}

/// A server with other settings and another simulator.
pub(crate) async fn start_with(sim: SimConfig, change: impl FnOnce(&mut Config)) -> TestServer {
    let mut server = start_loading(change).await;
    server.engine = Engine::simulate(sim);
    server.app.set_phase(Phase::Ready(server.engine.clone()));
    server
}

/// A server whose model is not there yet; `engine` is one that it could have.
pub(crate) async fn start_loading(change: impl FnOnce(&mut Config)) -> TestServer {
    let mut config = Config::defaults().unwrap();
    config.server.port = 0;
    change(&mut config);
    let server = Server::bind(config).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let (address, app) = (server.local_address().unwrap(), server.app());
    let running = tokio::spawn(server.run(async {
        let _ = stopped.await;
    }));
    TestServer { address, app, engine: Engine::simulate(sim()), stop: Some(stop), running }
}

pub(crate) fn ms(ms: u64) -> Seconds {
    Seconds(ms as f64 / 1e3)
}

impl TestServer {
    pub(crate) async fn get(&self, path: &str) -> Reply {
        client::get(self.address, path).await
    }

    pub(crate) async fn post(&self, path: &str, json: &Json) -> Reply {
        client::post(self.address, path, &json.to_string()).await
    }

    pub(crate) async fn chat(&self, json: &Json) -> Reply {
        self.post("/v1/chat/completions", json).await
    }

    pub(crate) async fn complete(&self, json: &Json) -> Reply {
        self.post("/v1/completions", json).await
    }

    /// A plain request still gets a plain answer.
    pub(crate) async fn assert_serves(&self) {
        let reply = self.complete(&serde_json::json!({"prompt": "hello", "max_tokens": 2})).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }

    /// Waits until the engine has nothing to do.
    pub(crate) async fn idle(&self) -> EngineStats {
        let is_idle = |stats: &EngineStats| stats.requests_running + stats.requests_queued + stats.kv_cells_used == 0;
        eventually("the engine is idle", || is_idle(&self.engine.stats())).await;
        self.engine.stats()
    }

    pub(crate) fn stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    pub(crate) async fn stopped(self) -> Outcome {
        tokio::time::timeout(Duration::from_secs(20), self.running).await.expect("the server did not stop").unwrap()
    }
}

/// Waits until `condition` holds, and fails loudly if it never does.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(15), "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Fails a test that hangs.
pub(crate) async fn within<T>(seconds: u64, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(seconds), future).await.expect("took too long")
}
