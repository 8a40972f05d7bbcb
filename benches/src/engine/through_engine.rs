//! The same work through the engine: every sequence is a request, read by a thread of its own as an application would.

use std::thread;
use std::time::Instant;

use anyhow::{Context as _, bail};
use minerva_engine::{Engine, Event, Prompt, Request};

use super::{Sample, Workload, prompt};

/// Runs the workload to its end; `seed` chooses the prompts.
pub(crate) fn run(engine: &Engine, workload: Workload, seed: u32) -> anyhow::Result<Sample> {
    let before = engine.stats();
    let n_vocab = engine.info().n_vocab;
    let began = Instant::now();
    let readers: Vec<_> = (0..workload.n_seq)
        .map(|seq| {
            let request = Request {
                prompt: Prompt::Tokens(prompt(n_vocab, workload, seq, seed)),
                ignore_eos: true,
                ..Request::default().greedy().max_tokens(workload.generate_tokens)
            };
            let engine = engine.clone();
            thread::spawn(move || read(&engine, request))
        })
        .collect();
    let mut arrivals = Vec::new();
    for reader in readers {
        arrivals.push(reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??);
    }
    let total_s = began.elapsed().as_secs_f64();
    let after = engine.stats();
    // While every sequence decodes: from the last first token to the first last one.
    let from = arrivals.iter().map(|times| times[0]).max().context("no sequence")?;
    let to = arrivals.iter().map(|times| times[times.len() - 1]).min().context("no sequence")?;
    let decode_tokens = arrivals.iter().flatten().filter(|&&at| at > from && at <= to).count() as u64;
    Ok(Sample {
        total_s,
        decode_s: to.duration_since(from).as_secs_f64(),
        decode_tokens,
        backend_s: (after.backend_us_total - before.backend_us_total) as f64 / 1e6,
        overhead_s: (after.overhead_us_total - before.overhead_us_total) as f64 / 1e6,
        steps: after.steps_total - before.steps_total,
    })
}

/// When each token arrived.
fn read(engine: &Engine, request: Request) -> anyhow::Result<Vec<Instant>> {
    let wanted = request.max_tokens.unwrap_or(0) as usize;
    let mut events = engine.generate_blocking(request)?;
    let mut arrivals = Vec::with_capacity(wanted);
    while let Some(event) = events.blocking_next() {
        match event {
            Event::Delta(delta) => arrivals.extend(delta.tokens.iter().map(|_| Instant::now())),
            Event::Failed(error) => bail!("a request failed: {error}"),
            _ => {}
        }
    }
    anyhow::ensure!(arrivals.len() == wanted, "{} of {wanted} tokens arrived", arrivals.len());
    Ok(arrivals)
}
