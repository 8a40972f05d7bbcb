//! The guide's `./minerva --gpu=auto`: serves without a subcommand; `minerva config` prints the configuration.

use std::process::ExitCode;

use minerva_server::config::Program;

fn main() -> ExitCode {
    minerva_server::program::run(Program::Minerva)
}
