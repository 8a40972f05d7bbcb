//! What devices over RPC and the host really do: measured at each load, the best of a day remembered, so that a load does what the
//! plan a minute before it said.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use minerva_llama::Device;
use serde::{Deserialize, Serialize};

use crate::remembered;

const FILE: &str = "device-speeds.json";

/// How long the best of earlier measurements counts: a machine behind an address may be replaced.
const MOST_AGE: Duration = Duration::from_hours(24);

/// A device as a plan sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Speed {
    /// Bytes of weights that products read per second.
    pub(super) bandwidth: u64,
    /// Half of the way from the host there and back, in nanoseconds.
    pub(super) crossing_ns: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    speed: Speed,
    /// When it was first measured, in seconds since 1970.
    since_s: u64,
}

/// Measures the device beside a host of so many threads; `None` leaves the usual figures of its kind.
pub(super) fn measured(device: &Device, n_threads: u32) -> Option<Speed> {
    let measured = minerva_llama::device_speed(device.index, n_threads);
    let speed = match measured {
        Ok(speed) => speed,
        Err(problem) => {
            tracing::debug!(device = device.name, %problem, "its speed is not measured");
            return None;
        }
    };
    let crossing_ns = u64::try_from(speed.round_trip.as_nanos() / 2).unwrap_or(u64::MAX);
    let speed = Speed { bandwidth: speed.bytes_per_second, crossing_ns };
    // Two builds may compute with different instructions on the same host.
    let build = format!("{} {}", minerva_llama::version(), minerva_llama::cpu_features().join(" "));
    let key = format!("{} {} {n_threads} {build}", device.name, device.description);
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let mut all = remembered::read(FILE);
    let best = best_of(&mut all, &key, speed, now_s);
    remembered::write(FILE, &all);
    tracing::debug!(device = device.name, ?best, now = ?speed, "its speed");
    Some(best)
}

/// The best of what is remembered and of what was just found, which is remembered too.
fn best_of(all: &mut BTreeMap<String, Entry>, key: &str, found: Speed, now_s: u64) -> Speed {
    all.retain(|_, entry| {
        let is_fresh = now_s.saturating_sub(entry.since_s) < MOST_AGE.as_secs() && entry.since_s <= now_s;
        is_fresh && minerva_llama::BELIEVABLE_BYTES_PER_SECOND.contains(&entry.speed.bandwidth)
    });
    let entry = all.entry(key.to_owned()).or_insert(Entry { speed: found, since_s: now_s });
    entry.speed = Speed {
        bandwidth: entry.speed.bandwidth.max(found.bandwidth),
        crossing_ns: entry.speed.crossing_ns.min(found.crossing_ns),
    };
    entry.speed
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    #[test]
    fn the_best_of_a_day_counts() {
        let mut all = BTreeMap::new();
        let speed = |bandwidth, crossing_ns| Speed { bandwidth, crossing_ns };
        assert_eq!(best_of(&mut all, "a", speed(10 * GB, 500), 1_000_000), speed(10 * GB, 500));
        assert_eq!(best_of(&mut all, "a", speed(12 * GB, 700), 1_000_100), speed(12 * GB, 500));
        assert_eq!(best_of(&mut all, "b", speed(GB, 1), 1_000_100), speed(GB, 1));
        assert_eq!(best_of(&mut all, "a", speed(9 * GB, 600), 1_080_000), speed(12 * GB, 500));
        assert_eq!(best_of(&mut all, "a", speed(9 * GB, 600), 1_000_000 + 86_400), speed(9 * GB, 600), "the next day");
        assert_eq!(all.len(), 2);
        assert_eq!(best_of(&mut all, "b", speed(2 * GB, 2), 500), speed(2 * GB, 2), "the clock was set back");
        all.insert("c".to_owned(), Entry { speed: speed(u64::MAX, 0), since_s: 500 });
        assert_eq!(best_of(&mut all, "c", speed(GB, 9), 600), speed(GB, 9), "a damaged file");
    }
}
