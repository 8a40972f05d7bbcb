//! How fast a load should be, while one token is decoded at a time: each device reads its bytes at its bandwidth, and the hidden
//! state moves from one to the next.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{PlanDevice, PlanHost};
use crate::estimate::{DeviceReads, LoadSettings, ModelShape, Placement, reads_per_token};

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
    let read = reads_per_token(model, settings, placement);
    #[allow(clippy::cast_precision_loss, reason = "a prediction")]
    let seconds = |bytes: u64, bandwidth: u64| bytes as f64 / bandwidth.max(1) as f64;
    let of_device = |(read, device): (&DeviceReads, &PlanDevice)| {
        let crossings = Duration::from_nanos(device.crossing_ns) * read.n_crossings;
        seconds(read.bytes, device.bandwidth) + crossings.as_secs_f64()
    };
    let on_devices: f64 = read.devices.iter().zip(devices).map(of_device).sum();
    let on_host = seconds(read.host_bytes, host.bandwidth);
    let total = on_devices + on_host;
    if total <= 0.0 {
        return Speed::default();
    }
    Speed { decode_tokens_per_second: 1.0 / total, host_share: on_host / total }
}
