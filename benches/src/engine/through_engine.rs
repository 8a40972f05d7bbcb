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
    let (decode_tokens, decode_s) = while_all_decode(&arrivals).context("no sequence")?;
    Ok(Sample {
        total_s,
        decode_s,
        decode_tokens,
        backend_s: (after.backend_us_total - before.backend_us_total) as f64 / 1e6,
        overhead_s: (after.overhead_us_total - before.overhead_us_total) as f64 / 1e6,
        steps: after.steps_total - before.steps_total,
    })
}

/// Tokens that came while every sequence decoded, and the time they took.
///
/// Each sequence is timed by its own arrivals: the tokens of one step come one after the other, and a window with the same ends
/// for all would cut the last step after its first token.
fn while_all_decode(arrivals: &[Vec<Instant>]) -> Option<(u64, f64)> {
    let from = arrivals.iter().filter_map(|times| times.first()).max()?;
    let to = arrivals.iter().filter_map(|times| times.last()).min()?;
    let within = arrivals.iter().map(|times| {
        let begin = times.partition_point(|at| at < from);
        let end = times.partition_point(|at| at <= to);
        &times[begin..end.max(begin)]
    });
    let spans =
        within.filter_map(|times| Some((times.len().checked_sub(1)?, times.last()?.duration_since(*times.first()?))));
    let (n_tokens, time) = spans.fold((0, 0.0), |(n, time), (more, span)| (n + more, time + span.as_secs_f64()));
    Some((n_tokens as u64, time / arrivals.len() as f64))
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_last_step_counts_as_a_whole_although_its_tokens_come_one_by_one() {
        let start = Instant::now();
        let ms = |ms: u64| start + Duration::from_millis(ms);
        // Steps of 10 ms, read 1 ms apart; the third sequence began a step later and ends a step later.
        let arrivals = [0, 1, 2].map(|seq| {
            let first = u64::from(seq == 2);
            (first..first + 6).map(|step| ms(10 * step + seq)).collect::<Vec<_>>()
        });
        let (n_tokens, seconds) = while_all_decode(&arrivals).unwrap();
        // From 12 ms to 50 ms the first two have the arrivals of steps 2 to 5 and 2 to 4, the third those of 1 to 4.
        assert_eq!(n_tokens, 3 + 2 + 3);
        assert!((seconds - (0.030 + 0.020 + 0.030) / 3.0).abs() < 1e-9);
        assert!((n_tokens as f64 / seconds - 300.0).abs() < 1e-6, "three tokens a step");
        assert_eq!(while_all_decode(&[]), None);
        assert_eq!(while_all_decode(&[vec![ms(0)], vec![ms(1)]]), Some((0, 0.0)), "one token each decodes nothing");
    }
}
