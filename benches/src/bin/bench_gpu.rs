//! What a GPU brings, what a load takes, and the guide's three tables: `cargo xtask bench-gpu`, or this program by itself on
//! a machine without cargo. benches/README.md says what each number means.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the report is the output")]

use std::process::ExitCode;

use clap::Parser as _;
use minerva_benches::gpu::{self, Args, Outcome};

fn main() -> ExitCode {
    match gpu::run(&Args::parse(), |line| println!("{line}")) {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Worse) => ExitCode::FAILURE,
        Ok(Outcome::NoGpu) => ExitCode::from(2),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
