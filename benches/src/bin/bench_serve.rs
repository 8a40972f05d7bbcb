//! Loads OpenAI-compatible servers by turns and compares them: `cargo xtask bench-serve --peer URL`.
//! benches/README.md says what each number means.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the report is the output")]

use std::process::ExitCode;

use clap::Parser as _;
use minerva_benches::serve::{self, Args};

fn main() -> ExitCode {
    match serve::run(&Args::parse(), |line| println!("{line}")) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
