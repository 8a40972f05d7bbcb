//! What the host's memory delivers: the measure of how fast a model on the CPU can be.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

/// Bytes that each thread reads: more than the caches hold.
const BYTES_PER_THREAD: usize = 96 << 20;

/// Passes over the memory; the best counts, since others use the machine too.
const N_PASSES: usize = 3;

/// Bytes per second that `n_threads` threads read together, each from memory of its own. Takes about a tenth of a second.
pub fn measure_host_bandwidth(n_threads: usize) -> u64 {
    let n_threads = n_threads.clamp(1, 64);
    let words = BYTES_PER_THREAD / size_of::<u64>() / n_threads.clamp(1, 8);
    let mut buffers: Vec<Vec<u64>> = (0..n_threads).map(|_| vec![1; words]).collect();
    let best = (0..N_PASSES).map(|_| {
        let start = Instant::now();
        thread::scope(|scope| {
            for buffer in &mut buffers {
                scope.spawn(|| black_box(buffer.iter().fold(0_u64, |sum, word| sum.wrapping_add(*word))));
            }
        });
        start.elapsed()
    });
    let seconds = best.min().map_or(1.0, |time| time.as_secs_f64()).max(1e-6);
    let bytes = words * size_of::<u64>() * n_threads;
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a measurement"
    )]
    let bandwidth = (bytes as f64 / seconds) as u64;
    bandwidth
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_faster_than_a_disk_and_slower_than_light() {
        let bandwidth = measure_host_bandwidth(2);
        assert!((100_000_000..20_000_000_000_000).contains(&bandwidth), "{bandwidth}");
    }
}
