//! Runs one round of a workload: clients that send one request after the other, all on one thread.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time;

use super::answer::{Answer, Sample, since_ms};
use super::client::Client;
use super::workload::{Ask, Asks, Beside, Leave, Round};
use crate::machine::own_ms;

/// What the clients of a round share.
struct Shared {
    client: Client,
    asks: Asks,
    clock: Instant,
    timeout: Duration,
    next_stream: AtomicUsize,
    answers: Mutex<Vec<Answer>>,
}

/// Runs a round after one short request that is not counted.
pub(super) async fn run(client: &Client, round: Round, timeout: Duration) -> anyhow::Result<Sample> {
    let asks = Asks::new(round);
    time::timeout(timeout, client.ask(&asks.warm_up(), Instant::now(), &mut Answer::default())).await??;

    let shape = asks.shape();
    let cpu_before_ms = own_ms();
    let shared = Arc::new(Shared {
        client: client.clone(),
        asks,
        clock: Instant::now(),
        timeout,
        next_stream: AtomicUsize::new(0),
        answers: Mutex::new(Vec::new()),
    });
    let mut clients = JoinSet::new();
    for _ in 0..shape.clients {
        clients.spawn(streams(Arc::clone(&shared)));
    }
    if let Some(beside) = shape.beside {
        clients.spawn(long_prompts(Arc::clone(&shared), beside));
    }
    while let Some(ended) = clients.join_next().await {
        ended?;
    }
    let wall_ms = since_ms(shared.clock);
    let load_cpu_ms = own_ms().zip(cpu_before_ms).map(|(after, before)| after - before);
    let answers = std::mem::take(&mut *shared.answers.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(Sample { wall_ms, load_cpu_ms, answers, others_cores: None, before: None, after: None })
}

/// One client: takes the next request as soon as its last one has ended.
async fn streams(shared: Arc<Shared>) {
    let shape = shared.asks.shape();
    loop {
        let index = shared.next_stream.fetch_add(1, Ordering::Relaxed);
        let is_over = shape.beside.is_some_and(|beside| shared.clock.elapsed() >= beside.window);
        if is_over || shape.requests.is_some_and(|requests| index >= requests) {
            return;
        }
        shared.send(&shared.asks.stream(index), false).await;
    }
}

/// The client with long prompts, back to back.
async fn long_prompts(shared: Arc<Shared>, beside: Beside) {
    time::sleep_until((shared.clock + beside.start).into()).await;
    for index in 0.. {
        if shared.clock.elapsed() >= beside.window {
            return;
        }
        shared.send(&shared.asks.long(&beside, index), true).await;
    }
}

impl Shared {
    async fn send(&self, ask: &Ask, is_long: bool) {
        let mut answer = Answer { is_long, start_ms: since_ms(self.clock), ..Answer::default() };
        let limit = match ask.leave {
            Some(Leave::After(limit)) => limit,
            _ => self.timeout,
        };
        // The future is dropped when the limit is over, and the connection with it.
        let result = time::timeout(limit, self.client.ask(ask, self.clock, &mut answer)).await;
        answer.end_ms = since_ms(self.clock);
        match result {
            Ok(Ok(())) => {}
            Ok(Err(error)) => answer.error = Some(format!("{error:#}")),
            Err(_) if matches!(ask.leave, Some(Leave::After(_))) => answer.has_left = true,
            Err(_) => answer.error = Some(format!("no end after {} s", limit.as_secs())),
        }
        let failed = answer.error.is_some();
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).push(answer);
        if failed {
            // A server that refuses at once would otherwise be asked thousands of times a second.
            time::sleep(Duration::from_millis(100)).await;
        }
    }
}
