//! The guide's callback style, blocking: `cargo run --release -p minerva-examples --bin callback_style [model.gguf]`.
use std::{io::Write, ops::ControlFlow};

use minerva_engine::{EngineConfig, compat::LlamaCppBackend};

fn main() -> anyhow::Result<()> {
    let mut backend = LlamaCppBackend::new(EngineConfig::default());
    backend.load_model(&minerva_examples::model_path()?, 2048)?;
    backend.generate_with("Once upon a time", 48, 0.8, 0.95, |piece| {
        print!("{piece}");
        std::io::stdout().flush().map_or(ControlFlow::Break(()), ControlFlow::Continue)
    })?;
    println!();
    println!("{}", backend.generate("The three primary colours are", 16, 0.0, 1.0)?.trim());
    Ok(())
}
