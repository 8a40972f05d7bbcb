//! Streams one answer, token by token: `cargo run --release -p minerva-examples --bin stream_tokens [model.gguf]`.
#![expect(clippy::print_stdout, reason = "the answer is the output")]
use std::{io::Write, ops::ControlFlow};

use minerva_engine::{ChatMessage, Engine, EngineConfig, Event, Request};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let engine = Engine::load(EngineConfig::new(minerva_examples::model_path()?), |_| ControlFlow::Continue(()))?;
    let question = ChatMessage::user("What is the capital of France?");
    let mut events = engine.generate(Request::chat([question]).max_tokens(64)).await?;
    while let Some(event) = events.next().await {
        if let Event::Delta(delta) = event {
            print!("{}", delta.text);
            std::io::stdout().flush()?;
        }
    }
    Ok(println!())
}
