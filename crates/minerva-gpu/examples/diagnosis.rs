//! Prints what `--gpu=debug` prints: `cargo run -p minerva-gpu --example diagnosis -- --gpu=auto`.

use minerva_gpu::{BuildBackends, Diagnosis, GpuOptions};

#[allow(clippy::print_stdout)]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let choice = std::env::args().nth(1).unwrap_or_else(|| "auto".to_owned());
    let options = GpuOptions {
        choice: choice.trim_start_matches("--gpu=").parse()?,
        build: BuildBackends::ALL,
        memory_limit_bytes: None,
    };
    print!("{}", Diagnosis::collect(options));
    Ok(())
}
