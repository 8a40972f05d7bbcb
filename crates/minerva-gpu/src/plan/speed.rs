//! How fast a load should be: tokens per second are bytes read per token over bandwidth, while one token is decoded at a time.

use serde::{Deserialize, Serialize};

use super::{PlanDevice, PlanHost};
use crate::estimate::{LoadSettings, ModelShape, Placement, bytes_read_per_token};

/// What a move of the hidden state from one device to the next costs: a copy and two waits, in seconds.
const CROSSING_SECONDS: f64 = 30e-6;

/// Of the nominal bandwidth, what matrix-vector products reach.
const BANDWIDTH_SHARE: f64 = 0.75;

/// A prediction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Tokens per second of one sequence, a quarter into its context.
    pub decode_tokens_per_second: f64,
    /// Of one token's time, the share that the host takes.
    pub host_share: f64,
}

/// Predicts the speed of one sequence.
pub(super) fn predict(
    model: &ModelShape,
    settings: &LoadSettings,
    placement: &Placement,
    devices: &[PlanDevice],
    host: &PlanHost,
) -> Speed {
    let read = bytes_read_per_token(model, settings, placement);
    #[allow(clippy::cast_precision_loss, reason = "a prediction")]
    let seconds = |bytes: u64, bandwidth: u64| bytes as f64 / (bandwidth.max(1) as f64 * BANDWIDTH_SHARE);
    let on_devices: f64 =
        read.devices.iter().zip(devices).map(|(&bytes, device)| seconds(bytes, device.bandwidth)).sum();
    let on_host = seconds(read.host, host.bandwidth);
    let total = on_devices + on_host + f64::from(read.n_crossings) * CROSSING_SECONDS;
    if total <= 0.0 {
        return Speed::default();
    }
    Speed { decode_tokens_per_second: 1.0 / total, host_share: on_host / total }
}
