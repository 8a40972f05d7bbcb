//! What a device does in a step of one token: how fast it reads weights, and what it costs to reach it.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::ptr;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::backend::{self, Device, DeviceKind};
use crate::error::{CallError, call};
use crate::{log, rpc, sys};

/// A device as one sequence sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSpeed {
    /// Bytes of quantised weights that matrix-vector products read per second.
    pub bytes_per_second: u64,
    /// What it takes beyond the reading to go from the host to the device and back, a part of the weights on each; zero for the CPU.
    pub round_trip: Duration,
}

/// No device is slower or faster: anything else is a fault of the measurement.
pub const BELIEVABLE_BYTES_PER_SECOND: RangeInclusive<u64> = 10_000_000..=100_000_000_000_000;

/// By device and threads. Failures stay too: what a model uses meanwhile must not be measured. An RPC server that comes back is a
/// new device.
static MEASURED: Mutex<BTreeMap<(usize, u32), Result<DeviceSpeed, CallError>>> = Mutex::new(BTreeMap::new());

/// Measures the device at `index` once, beside a host with `n_threads` compute threads: another call with as many returns what the
/// first one found. Takes 64 MiB on either and a few tenths of a second.
///
/// # Errors
/// [`CallError`] when there is no such device, when it has no room or does not compute such products, or when its server is lost.
pub fn device_speed(index: usize, n_threads: u32) -> Result<DeviceSpeed, CallError> {
    let Some(device) = backend::device_at(index) else {
        return Err(CallError::Argument(format!("there is no device {index}")));
    };
    let n_threads = n_threads.clamp(1, sys::GGML_MAX_N_THREADS);
    let host = (device.kind != DeviceKind::Cpu || !rpc::links_of(&[index]).is_empty()).then(cpu).flatten();
    let mut measured = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    // What lies on a server's device by now would be lost: it keeps one graph a device, and none when a buffer is freed.
    let of_server = host.is_some().then(|| measured.range((index, 0)..=(index, u32::MAX)).next()).flatten();
    if let Some((_, found)) = of_server {
        return found.clone();
    }
    let measure = || {
        // On a thread of its own: libgomp keeps a team of threads for each thread that ever computed.
        let measured = thread::scope(|scope| scope.spawn(|| measure(index, host, n_threads)).join());
        measured.unwrap_or_else(|_| Err(CallError::Refused("the measurement failed".into())))
    };
    measured.entry((index, n_threads)).or_insert_with(measure).clone()
}

/// ggml's own CPU, not one that a server lends.
fn cpu() -> Option<usize> {
    let is_cpu = |device: &Device| device.kind == DeviceKind::Cpu && rpc::links_of(&[device.index]).is_empty();
    backend::devices().iter().find(|device| is_cpu(device)).map(|device| device.index)
}

fn measure(index: usize, host: Option<usize>, n_threads: u32) -> Result<DeviceSpeed, CallError> {
    log::take_last_error(); // of an earlier call
    let mut speed = sys::mnv_speed::default();
    let (device, host) = (backend::raw_device(index), host.map_or(ptr::null_mut(), backend::raw_device));
    let n_threads = i32::try_from(n_threads).unwrap_or(1);
    // SAFETY: devices of ggml's registry, or null for no host; `speed` receives the result.
    call(|error| unsafe { sys::mnv_speed_measure(device, host, n_threads, &raw mut speed, error) })?;
    if let Some(link) = rpc::links_of(&[index]).iter().find(|link| link.is_lost()) {
        return Err(CallError::Refused(format!("the RPC server {} is lost", link.address)));
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
    let bytes_per_second = speed.bytes_per_second as u64;
    if !BELIEVABLE_BYTES_PER_SECOND.contains(&bytes_per_second) {
        return Err(CallError::Refused(format!("{bytes_per_second} bytes per second are not believable")));
    }
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
        assert_eq!(speed.round_trip, Duration::ZERO);
        assert_eq!(device_speed(cpu.index, 1), Ok(speed));
        assert!(matches!(device_speed(9_999, 1), Err(CallError::Argument(_))));
    }
}
