//! What must hold on any machine, however busy: short runs, loose bounds. `cargo xtask bench-gpu` measures properly.
//!
//! Needs the default model: `cargo xtask setup` fetches it.

use std::ffi::OsString;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use clap::Parser as _;
use minerva_benches::gpu::{self, Args, Report};

/// One at a time: each would be the other's busy neighbour.
static MACHINE: Mutex<()> = Mutex::new(());

fn measure(parts: &str, more: &[&str]) -> Report {
    let _alone = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let model =
        std::env::var_os("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model");
    // One thread: threads that meet at barriers stand still when another program is busy.
    let line = ["bench_gpu", "--quick", "--threads", "1", "--parts", parts, "--model"];
    let args =
        Args::parse_from(line.map(OsString::from).into_iter().chain([model]).chain(more.iter().map(OsString::from)));
    let report = gpu::report(&args, Path::new(env!("CARGO_BIN_EXE_bench_gpu")), |line| println!("{line}"));
    let report = report.unwrap();
    println!("{}", report.markdown());
    report
}

/// Says in the output what was not measured, and whether there was a GPU.
fn has_gpu(report: &Report) -> bool {
    report.not_measured().iter().for_each(|what| println!("NOT MEASURED: {what}"));
    report.not_measured().is_empty()
}

#[test]
fn bench_gpu_vs_cpu() {
    let report = measure("speed", &[]);
    let mut places = vec!["cpu"];
    if has_gpu(&report) {
        places.push("gpu");
        let gain = report.ratio("gpu/cpu.prefill").unwrap();
        assert!(gain > 1.0, "a GPU computes prompts {gain:.2} times as fast as one core");
    }
    for place in places {
        for what in ["decode-1", "decode-8", "prefill"] {
            let ratio = report.ratio(&format!("{place}.{what}")).unwrap();
            assert!(ratio > 0.5, "{place}.{what}: the engine has {ratio:.3} of the bare loop's speed");
        }
        let load = report.ratio(&format!("{place}.load")).unwrap();
        assert!(load < 4.0, "the engine takes {load:.1} times as long to load as llama.cpp alone");
    }
}

#[test]
fn bench_memory_usage() {
    let report = measure("memory", &[]);
    let places: &[&str] = if has_gpu(&report) { &["cpu", "gpu"] } else { &["cpu"] };
    if cfg!(target_os = "linux") {
        for place in places {
            let ratio = report.ratio(&format!("{place}.memory")).unwrap();
            // Less than the plan, since scratch is planned for the largest step; and the runtime's own few megabytes.
            assert!((0.3..1.15).contains(&ratio), "{place}: the peak is {ratio:.3} of the plan");
        }
    }
    assert_eq!(report.leaks(), Vec::<String>::new());
}

#[test]
fn a_leak_of_a_megabyte_with_every_load_is_found() {
    let leaks = measure("memory", &["--leak", "1048576"]).leaks();
    if cfg!(target_os = "linux") {
        assert!(leaks.iter().any(|leak| leak.contains("loads and unloads the process grew by")), "{leaks:?}");
    }
}
