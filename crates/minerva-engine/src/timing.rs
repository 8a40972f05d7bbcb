//! How long something takes, as a histogram that any thread may add to without a lock.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The upper bounds of the buckets, in microseconds: from a mask that takes next to nothing to a compilation at its limit.
pub const TIMING_BOUNDS_US: [u64; 16] =
    [10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000, 250_000, 1_000_000, 2_500_000, 5_000_000];

/// Durations so far.
#[derive(Debug, Default)]
pub(crate) struct Timing {
    counts: [AtomicU64; TIMING_BOUNDS_US.len() + 1],
    sum_ns: AtomicU64,
}

/// A [histogram](TIMING_BOUNDS_US) of durations as it was at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimingStats {
    /// How many were within each bound and above the one before, and how many were above the last.
    pub counts: [u64; TIMING_BOUNDS_US.len() + 1],
    /// Their sum, in microseconds.
    pub sum_us: u64,
}

impl Timing {
    pub(crate) fn observe(&self, time: Duration) {
        let us = time.as_nanos().div_ceil(1_000).try_into().unwrap_or(u64::MAX);
        let bucket = TIMING_BOUNDS_US.partition_point(|&bound| bound < us);
        self.counts[bucket].fetch_add(1, Relaxed);
        self.sum_ns.fetch_add(time.as_nanos().try_into().unwrap_or(u64::MAX), Relaxed);
    }

    pub(crate) fn stats(&self) -> TimingStats {
        TimingStats {
            counts: std::array::from_fn(|i| self.counts[i].load(Relaxed)),
            sum_us: self.sum_ns.load(Relaxed) / 1_000,
        }
    }
}

impl TimingStats {
    /// How many durations there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_duration_is_in_the_first_bucket_that_holds_it() {
        let timing = Timing::default();
        for ns in [0, 10_000, 10_001, 5_000_000_000, 5_000_000_001] {
            timing.observe(Duration::from_nanos(ns));
        }
        let stats = timing.stats();
        assert_eq!((stats.counts[0], stats.counts[1], stats.counts[15], stats.counts[16]), (2, 1, 1, 1));
        assert_eq!((stats.count(), stats.sum_us), (5, 10_000_020));
    }
}
