//! GET /health/live, /health/ready and /health: none of them waits for the engine.

use std::time::Duration;

use hyper::{Response, StatusCode};
use serde::Serialize;

use crate::http::ResponseBody;
use crate::state::{App, Phase};

/// So many failed steps in a row mean that the device is lost, and not that a step had bad luck.
const MOST_FAILED_STEPS: u64 = 3;

/// So long after the last of them requests are let in again: nothing else would show that the device is back.
const FAILURE_LASTS: Duration = Duration::from_secs(30);

#[derive(Serialize)]
struct Health<'a> {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    stage: Option<&'a str>,
    /// From 0 to 1, while loading.
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<f32>,
}

/// The process answers.
pub(super) fn live() -> Response<ResponseBody> {
    answer(StatusCode::OK, &Health { status: "ok", stage: None, progress: None })
}

/// Whether requests are answered: 503 while the model loads, while a step hangs or one after the other fails, and while the server
/// shuts down.
pub(super) fn ready(app: &App) -> Response<ResponseBody> {
    let unavailable = StatusCode::SERVICE_UNAVAILABLE;
    if app.is_draining() {
        return answer(unavailable, &Health { status: "shutting_down", stage: None, progress: None });
    }
    match app.phase() {
        Phase::Ready(engine) => {
            // A device that hangs takes its step with it; the engine thread cannot say so itself.
            let deadline = app.settings.step_deadline_seconds.duration();
            let is_stalled = engine.step_age().is_some_and(|age| age > deadline);
            let is_failing =
                engine.failing_steps().is_some_and(|(n, age)| n >= MOST_FAILED_STEPS && age < FAILURE_LASTS);
            let (status, word) = match (engine.is_accepting(), is_stalled, is_failing) {
                (false, _, _) => (unavailable, "failed"),
                (true, true, _) => (unavailable, "stalled"),
                (true, false, true) => (unavailable, "failing"),
                (true, false, false) => (StatusCode::OK, "ok"),
            };
            answer(status, &Health { status: word, stage: None, progress: None })
        }
        Phase::Loading(load) => {
            let health = Health { status: "loading", stage: Some(&load.stage), progress: Some(load.fraction) };
            answer(unavailable, &health)
        }
        Phase::Failed => answer(unavailable, &Health { status: "failed", stage: None, progress: None }),
    }
}

fn answer(status: StatusCode, health: &Health<'_>) -> Response<ResponseBody> {
    let mut response = super::json(serde_json::to_vec(health).unwrap_or_default());
    *response.status_mut() = status;
    response
}
