//! What a device does in a step of one token: how fast it reads weights, and what it costs to reach it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::backend::{self, DeviceKind};
use crate::error::{CallError, call};
use crate::{log, rpc, sys};

/// A device as one sequence sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSpeed {
    /// Bytes of quantised weights that matrix-vector products read per second.
    pub bytes_per_second: u64,
    /// From a vector's way there until the result of something small is back.
    pub round_trip: Duration,
}

/// No device is slower or faster: anything else is a fault of the measurement.
const BELIEVABLE: std::ops::RangeInclusive<f64> = 1e7..=1e14;

/// By device and threads. Failures stay too: what a model uses meanwhile must not be measured. An RPC server that comes back is a
/// new device.
static MEASURED: Mutex<BTreeMap<(usize, u32), Result<DeviceSpeed, CallError>>> = Mutex::new(BTreeMap::new());

/// Measures the device at `index` once: another call with as many threads returns what the first one found. `n_threads` counts
/// where the device is the CPU. Takes 64 MiB on the device and about a tenth of a second.
///
/// # Errors
/// [`CallError`] when there is no such device, when it has no room or does not compute such products, or when its server is lost.
pub fn device_speed(index: usize, n_threads: u32) -> Result<DeviceSpeed, CallError> {
    let Some(device) = backend::device_at(index) else {
        return Err(CallError::Argument(format!("there is no device {index}")));
    };
    let n_threads = if device.kind == DeviceKind::Cpu { n_threads.clamp(1, sys::GGML_MAX_N_THREADS) } else { 0 };
    let mut measured = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    let measure = || {
        // On a thread of its own: libgomp keeps a team of threads for each thread that ever computed.
        let measured = thread::scope(|scope| scope.spawn(|| measure(index, n_threads)).join());
        measured.unwrap_or_else(|_| Err(CallError::Refused("the measurement failed".into())))
    };
    measured.entry((index, n_threads)).or_insert_with(measure).clone()
}

fn measure(index: usize, n_threads: u32) -> Result<DeviceSpeed, CallError> {
    log::take_last_error(); // of an earlier call
    let mut speed = sys::mnv_speed::default();
    let n_threads = i32::try_from(n_threads.max(1)).unwrap_or(1);
    // SAFETY: a device of ggml's registry; `speed` receives the result.
    call(|error| unsafe { sys::mnv_speed_measure(backend::raw_device(index), n_threads, &raw mut speed, error) })?;
    if let Some(link) = rpc::links_of(&[index]).iter().find(|link| link.is_lost()) {
        return Err(CallError::Refused(format!("the RPC server {} is lost", link.address)));
    }
    if !BELIEVABLE.contains(&speed.bytes_per_second) {
        return Err(CallError::Refused(format!("{:.1e} bytes per second are not believable", speed.bytes_per_second)));
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within the range above")]
    let bytes_per_second = speed.bytes_per_second as u64;
    Ok(DeviceSpeed { bytes_per_second, round_trip: Duration::from_secs_f64(speed.round_trip_seconds.max(0.0)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_faster_than_a_disk_and_measured_once() {
        let cpu = backend::devices().into_iter().find(|device| device.kind == DeviceKind::Cpu).expect("a CPU");
        let speed = device_speed(cpu.index, 1).expect("it computes");
        assert!((50_000_000..10_000_000_000_000).contains(&speed.bytes_per_second), "{speed:?}");
        assert!(speed.round_trip < Duration::from_millis(100), "{speed:?}");
        assert_eq!(device_speed(cpu.index, 1), Ok(speed));
        assert!(matches!(device_speed(9_999, 1), Err(CallError::Argument(_))));
    }
}
