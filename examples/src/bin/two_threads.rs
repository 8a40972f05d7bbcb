//! Two threads share one engine; their requests are computed in the same steps, with no lock in sight:
//! `cargo run --release -p minerva-examples --bin two_threads [model.gguf]`.
use std::thread;

use minerva_engine::{Engine, Event, Request};

fn main() -> anyhow::Result<()> {
    let engine = Engine::open(minerva_examples::model_path()?)?;
    let workers = ["The sun is", "The moon is"].map(|prompt| {
        let engine = engine.clone();
        thread::spawn(move || -> anyhow::Result<String> {
            let mut answer = prompt.to_owned();
            let mut events = engine.generate_blocking(Request::text(prompt).max_tokens(24).greedy())?;
            while let Some(event) = events.blocking_next() {
                match event {
                    Event::Delta(delta) => answer.push_str(&delta.text),
                    Event::Failed(error) => return Err(error.into()),
                    _ => {}
                }
            }
            Ok(answer)
        })
    });
    for worker in workers {
        println!("{}", worker.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??);
    }
    let stats = engine.stats();
    println!("{} tokens in {} steps", stats.generated_tokens_total, stats.steps_total);
    anyhow::ensure!(stats.steps_total < stats.generated_tokens_total, "the two did not share steps");
    Ok(())
}
