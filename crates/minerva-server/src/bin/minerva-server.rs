//! Serves a model: the server without the other commands of `minerva`.

use std::process::ExitCode;

use minerva_server::config::Program;

fn main() -> ExitCode {
    minerva_server::program::run(Program::Server)
}
