//! Streams one answer, token by token: `cargo run --release -p minerva-examples --bin stream_tokens [model.gguf]`.
use std::io::Write as _;

use minerva_engine::{ChatMessage, Engine, Event, Request};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let engine = Engine::open(minerva_examples::model_path()?)?;
    let chat =
        [ChatMessage::system("You are a helpful assistant."), ChatMessage::user("What is the capital of France?")];
    let mut events = engine.generate(Request::chat(chat).greedy().max_tokens(64)).await?;
    while let Some(event) = events.next().await {
        if let Event::Delta(delta) = event {
            print!("{}", delta.text);
            std::io::stdout().flush()?;
        }
    }
    Ok(())
}
