//! GET /v1/status: where the model runs and why, what it takes, and how busy it is. Never waits for the engine.

use minerva_engine::probe::{self, ProbeReport};
use minerva_engine::{BuildInfo, EngineStats, LoadProgress, ModelInfo};
use serde::Serialize;

use crate::state::{App, Phase};

#[derive(Serialize)]
struct Status<'a> {
    /// `loading`, `ready`, `shutting_down` or `failed`.
    state: &'static str,
    uptime_seconds: f64,
    build: &'a BuildInfo,
    system_fingerprint: String,
    /// What is left out and why, when devices were tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    probe: Option<&'static ProbeReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    load: Option<LoadProgress>,
    requests: Requests,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<Device<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<&'a ModelInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    engine: Option<EngineStats>,
}

#[derive(Serialize)]
struct Requests {
    running: u64,
    queued: u64,
    /// Generation requests over HTTP that are not answered to the end.
    in_flight: usize,
}

/// The first thing that people look for; the whole placement is under `model`.
#[derive(Serialize)]
struct Device<'a> {
    kind: &'a str,
    name: &'a str,
    layers_on_gpu: u32,
    layers_total: u32,
    reason: &'a str,
}

/// The whole text.
pub(super) fn print(app: &App) -> Vec<u8> {
    let phase = app.phase();
    let mut status = Status {
        state: "loading",
        uptime_seconds: app.uptime().as_secs_f64(),
        build: &app.build,
        system_fingerprint: app.fingerprint(),
        probe: probe::report(),
        load: None,
        requests: Requests { running: 0, queued: 0, in_flight: app.in_flight.count() },
        device: None,
        model: None,
        engine: None,
    };
    match &phase {
        Phase::Loading(progress) => status.load = Some(progress.clone()),
        Phase::Failed => status.state = "failed",
        Phase::Ready(engine) => {
            let (info, counters) = (engine.info(), engine.stats());
            let placement = &info.placement;
            status.state = "ready";
            status.requests.running = counters.requests_running;
            status.requests.queued = counters.requests_queued;
            status.device = Some(Device {
                kind: &placement.device,
                name: &placement.device_name,
                layers_on_gpu: placement.n_gpu_layers,
                layers_total: placement.n_layers_total,
                reason: &placement.reason,
            });
            status.model = Some(info);
            status.engine = Some(counters);
        }
    }
    if app.is_draining() {
        status.state = "shutting_down";
    }
    serde_json::to_vec(&status).unwrap_or_default()
}
