//! How to embed Minerva, one program per idea. Each takes the path of a GGUF file, or uses the one that
//! `cargo xtask setup` fetched: `cargo run --release -p minerva-examples --bin stream_tokens`.

use std::path::PathBuf;

/// The model file: the first argument, or the default model.
///
/// # Errors
/// When there is neither.
pub fn model_path() -> anyhow::Result<PathBuf> {
    let argument = std::env::args_os().nth(1);
    let default = || std::env::var_os("MINERVA_TEST_MODEL");
    let path = argument.or_else(default);
    path.map(PathBuf::from).ok_or_else(|| anyhow::anyhow!("give a GGUF file, or run `cargo xtask setup` first"))
}
