//! Runs one round of a workload: clients that send one request after the other, all on one thread.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time;

use super::answer::{Answer, Sample, since_ms};
use super::client::Client;
use super::workload::{Ask, Asks, Leave, Role, Round, Workload};
use super::{canary, replay};
use crate::machine::own_ms;

/// Requests of a client that is alone, before the flood.
const IDLE_REQUESTS: usize = 5;

/// Requests of that client during the flood.
const FLOODED_REQUESTS: usize = 5;

/// The flood runs so long before the other client asks.
const FLOOD_HEAD_START: Duration = Duration::from_secs(2);

/// Answers that are asked for again after a round, times the scale, within these bounds.
const REPLAYS: (f64, f64, f64) = (8.0, 8.0, 64.0);

/// Requests of an overload or a flood may wait for so much longer: they queue behind all the others.
const QUEUE_PATIENCE: u32 = 6;

/// What the clients of a round share.
struct Shared {
    client: Client,
    asks: Asks,
    clock: Instant,
    timeout: Duration,
    next: AtomicUsize,
    answers: Mutex<Vec<Answer>>,
}

/// Runs a round after what is not counted: one short request, or a prompt in each sequence.
pub(super) async fn run(client: &Client, round: Round, timeout: Duration) -> anyhow::Result<Sample> {
    let asks = Asks::new(round);
    let mut warm_ups = JoinSet::new();
    for ask in asks.warm_ups() {
        let client = client.clone();
        warm_ups.spawn(async move {
            time::timeout(timeout, client.ask(&ask, Instant::now(), &mut Answer::default())).await?
        });
    }
    while let Some(ended) = warm_ups.join_next().await {
        ended??;
    }

    let workload = round.workload;
    let cpu_before_ms = own_ms();
    let shared = Arc::new(Shared {
        client: client.clone(),
        asks,
        clock: Instant::now(),
        timeout: match workload {
            Workload::Overload | Workload::Fairness => timeout * QUEUE_PATIENCE,
            _ => timeout,
        },
        next: AtomicUsize::new(0),
        answers: Mutex::new(Vec::new()),
    });
    let mut sample = Sample::default();
    match workload {
        Workload::Fairness => flood(&shared).await?,
        Workload::Repetitions | Workload::RandomText => pairs(&shared).await,
        _ => streams_and_long_prompts(&shared).await?,
    }
    sample.wall_ms = since_ms(shared.clock);
    sample.load_cpu_ms = own_ms().zip(cpu_before_ms).map(|(after, before)| after - before);
    match workload {
        Workload::JsonSchema => sample.twin_ms = Some(twins(&shared).await?),
        Workload::Overload | Workload::Repetitions => sample.replayed = replays(&shared, round.scale).await,
        Workload::Canary => shared.search(&mut sample),
        _ => {}
    }
    sample.answers = std::mem::take(&mut *shared.lock());
    Ok(sample)
}

async fn streams_and_long_prompts(shared: &Arc<Shared>) -> anyhow::Result<()> {
    let mut clients = JoinSet::new();
    for _ in 0..shared.asks.shape().clients {
        clients.spawn(client_loop(Arc::clone(shared), Role::Stream));
    }
    if shared.asks.shape().beside.is_some() {
        clients.spawn(long_prompts(Arc::clone(shared)));
    }
    join(clients).await
}

async fn join(mut clients: JoinSet<()>) -> anyhow::Result<()> {
    while let Some(ended) = clients.join_next().await {
        ended?;
    }
    Ok(())
}

/// One client: takes the next request as soon as its last one has ended.
async fn client_loop(shared: Arc<Shared>, role: Role) {
    let shape = shared.asks.shape();
    loop {
        let index = shared.next.fetch_add(1, Ordering::Relaxed);
        let is_over = shape.window.is_some_and(|window| shared.clock.elapsed() >= window);
        if is_over || shape.requests.is_some_and(|requests| index >= requests) {
            return;
        }
        shared.send(role, index).await;
    }
}

/// The client with long prompts, back to back.
async fn long_prompts(shared: Arc<Shared>) {
    let shape = shared.asks.shape();
    let Some((beside, window)) = shape.beside.zip(shape.window) else { return };
    time::sleep_until((shared.clock + beside.start).into()).await;
    for index in 0.. {
        if shared.clock.elapsed() >= window {
            return;
        }
        shared.send(Role::Long, index).await;
    }
}

/// Answers without the schema, as many and of the same lengths; returns how long they take.
async fn twins(shared: &Arc<Shared>) -> anyhow::Result<f64> {
    let mut lengths: Vec<(usize, u32)> =
        shared.lock().iter().filter_map(|answer| Some((answer.index, answer.completion_tokens?))).collect();
    lengths.sort_unstable();
    let lengths = Arc::new(lengths);
    let next = Arc::new(AtomicUsize::new(0));
    let began = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..shared.asks.shape().clients {
        let (shared, lengths, next) = (Arc::clone(shared), Arc::clone(&lengths), Arc::clone(&next));
        clients.spawn(async move {
            while let Some(&(index, tokens)) = lengths.get(next.fetch_add(1, Ordering::Relaxed)) {
                let ask = Ask { max_tokens: tokens.max(1), ..shared.asks.ask(Role::Twin, index) };
                shared.send_this(Role::Twin, index, &ask).await;
            }
        });
    }
    join(clients).await?;
    Ok(since_ms(began))
}

/// Each request and its twin, one after the other; every second pair the other way round.
async fn pairs(shared: &Arc<Shared>) {
    for index in 0..shared.asks.shape().requests.unwrap_or(0) {
        let mut roles = [Role::Stream, Role::Twin];
        roles.rotate_left(index % 2);
        for role in roles {
            shared.send(role, index).await;
        }
    }
}

/// Key B alone, then key A with everything at once and key B beside it, one request after the other.
async fn flood(shared: &Arc<Shared>) -> anyhow::Result<()> {
    for index in 0..IDLE_REQUESTS {
        shared.send(Role::Idle, index).await;
    }
    let mut clients = JoinSet::new();
    for _ in 0..shared.asks.shape().clients {
        clients.spawn(client_loop(Arc::clone(shared), Role::Flood));
    }
    time::sleep(FLOOD_HEAD_START).await;
    for index in 0..FLOODED_REQUESTS {
        if clients.is_empty() {
            break;
        }
        shared.send(Role::Stream, index).await;
        while clients.try_join_next().transpose()?.is_some() {}
    }
    join(clients).await
}

/// Asks again, one at a time, without the cache and without guessing ahead, for some of the answers that were complete.
async fn replays(shared: &Arc<Shared>, scale: f64) -> Vec<(usize, replay::Verdict)> {
    let complete = |answer: &&Answer| answer.role == Role::Stream && answer.error.is_none() && !answer.has_left;
    let mut survivors: Vec<(usize, String)> =
        shared.lock().iter().filter(complete).map(|answer| (answer.index, answer.text.clone())).collect();
    survivors.sort_unstable();
    let (each, least, most) = REPLAYS;
    let wanted = ((each * scale) as usize).clamp(least as usize, most as usize).min(survivors.len());
    let mut verdicts = Vec::with_capacity(wanted);
    for at in 0..wanted {
        let (index, text) = &survivors[at * survivors.len() / wanted];
        let ask = Ask {
            leave: None,
            cache_prompt: false,
            speculate: false,
            top_logprobs: replay::TOP_LOGPROBS,
            ..shared.asks.ask(Role::Stream, *index)
        };
        let mut answer = Answer::default();
        let result = time::timeout(shared.timeout, shared.client.ask(&ask, shared.clock, &mut answer)).await;
        verdicts.push((
            *index,
            match result {
                Ok(Ok(())) => replay::compare(text, &answer.text, &answer.tokens),
                Ok(Err(error)) => replay::Verdict::Wrong(format!("the replay failed: {error:#}")),
                Err(_) => replay::Verdict::Wrong("the replay has no end".to_owned()),
            },
        ));
    }
    verdicts
}

impl Shared {
    async fn send(&self, role: Role, index: usize) {
        self.send_this(role, index, &self.asks.ask(role, index)).await;
    }

    async fn send_this(&self, role: Role, index: usize, ask: &Ask) {
        let mut answer = Answer { role, index, start_ms: since_ms(self.clock), ..Answer::default() };
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
        self.lock().push(answer);
        if failed {
            // A server that refuses at once would otherwise be asked thousands of times a second.
            time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Looks for the secret of each request in the answers to all others.
    fn search(&self, sample: &mut Sample) {
        let answers = self.lock();
        let secrets = answers.iter().map(|answer| (answer.index, self.asks.secret(answer.index)));
        let found = canary::search(secrets, answers.iter().map(|answer| (answer.index, answer.text.as_str())));
        (sample.own_secrets, sample.leaks) = (found.own, found.leaks);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Answer>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
