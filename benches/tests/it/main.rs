//! The guide's two benchmarks as tests, on the real model: `cargo test --release -- --nocapture bench_gpu`.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests may fail loudly, and these are read")]

mod bench_gpu;
