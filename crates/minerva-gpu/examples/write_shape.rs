//! Writes a synthetic model: `cargo run --release -p minerva-gpu --example write_shape -- llama2-7b-q4_0 FILE [--random]`.
//!
//! Without `--random` the file holds the header only, its weights are a hole.
#![allow(clippy::print_stdout, reason = "a command line tool")]

use std::path::Path;

use minerva_gpu::{format_bytes, synthetic};

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let names = [synthetic::NAMES.as_slice(), &synthetic::PROJECTOR_NAMES].concat();
    let [name, file, rest @ ..] = args.as_slice() else {
        println!("usage: write_shape NAME FILE [--random]; names: {}", names.join(", "));
        return Ok(());
    };
    let Some(shape) = synthetic::shape(name).or_else(|| synthetic::projector(name)) else {
        println!("no shape `{name}`: {}", names.join(", "));
        return Ok(());
    };
    let bytes = match rest.first().map(String::as_str) {
        Some("--random") => shape.write_random(Path::new(file), 1, &mut |_| ())?,
        _ => shape.write_header_only(Path::new(file))?,
    };
    println!("{file}: {}", format_bytes(bytes));
    Ok(())
}
