//! Feeds the GGUF header reader, guided by coverage: `cargo +nightly fuzz run gguf_header -- -max_len=16384`.
//!
//! Without nightly: `cargo run --release -p minerva-gpu --example fuzz_gguf -- --seconds 1800`, which runs the same function.
#![no_main]

#[path = "../gguf_header_entry.rs"]
mod entry;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    entry::gguf_header(data);
});
