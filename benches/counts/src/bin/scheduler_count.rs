//! `N` turns of the scheduler in one setting: `scheduler_count SETTING N`; without arguments it prints the settings' names.
//!
//! `cargo xtask count` runs it under callgrind with two values of `N`: the difference is what the turns cost.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "the names are its answer")]

use std::hint::black_box;

use minerva_counts::turns::{burst, decoding, finished, job, turn};

/// Sequences that decode while a turn is counted.
const DECODING: [(&str, u32); 4] = [("decode 1", 1), ("decode 8", 8), ("decode 32", 32), ("decode 128", 128)];

/// A prompt comes whose beginning lies in one of 32 seats, is computed and leaves.
const ADMISSIONS: &str = "admit among 32";

/// 64 requests that share 8,000 tokens come at once, until the last one decodes.
const BURSTS: &str = "burst of 64 with 8k";

fn main() {
    let mut args = std::env::args().skip(1);
    let (Some(name), Some(n)) = (args.next(), args.next().and_then(|n| n.parse::<u64>().ok())) else {
        for name in DECODING.map(|(name, _)| name).into_iter().chain([ADMISSIONS, BURSTS]) {
            println!("{name}");
        }
        return;
    };
    if name == ADMISSIONS {
        let (mut scheduler, mut step) = finished(32);
        for id in 0..n {
            scheduler.enqueue(job(id), 0);
            black_box(turn(&mut scheduler, &mut step));
            let seqs: Vec<_> = scheduler.running().collect();
            for seq in seqs {
                scheduler.release(seq);
            }
        }
    } else if name == BURSTS {
        for _ in 0..n {
            black_box(burst(64, 8_000));
        }
    } else if let Some((_, n_sequences)) = DECODING.into_iter().find(|(known, _)| *known == name) {
        let (mut scheduler, mut step) = decoding(n_sequences);
        for _ in 0..n {
            black_box(turn(&mut scheduler, &mut step));
        }
    } else {
        println!("no setting is called `{name}`");
        std::process::exit(2);
    }
}
