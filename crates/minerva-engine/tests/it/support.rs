//! Reads streams to their end, checks the rules that hold for every stream, and waits without a fixed pause.

use std::thread;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use minerva_engine::{
    Engine, Event, EventStream, FinishReason, GenerationError, Prompt, Request, SamplingParams, SimConfig, Summary,
    TokenId, TokenInfo,
};

/// Far longer than any wait of a passing test, on a busy machine too.
const PATIENCE: Duration = Duration::from_mins(1);

/// Everything that one stream said.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    pub(crate) choices: Vec<Choice>,
    pub(crate) end: Result<Summary, GenerationError>,
}

/// One continuation.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Choice {
    pub(crate) text: String,
    pub(crate) tokens: Vec<TokenInfo>,
    pub(crate) finished: Option<(FinishReason, Option<String>)>,
}

impl Choice {
    pub(crate) fn ids(&self) -> Vec<TokenId> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    pub(crate) fn reason(&self) -> FinishReason {
        self.finished.as_ref().expect("the choice is finished").0
    }
}

impl Answer {
    /// The text of a request with one choice that was finished.
    pub(crate) fn text(&self) -> &str {
        self.summary();
        assert_eq!(self.choices.len(), 1);
        &self.choices[0].text
    }

    pub(crate) fn summary(&self) -> Summary {
        *self.end.as_ref().expect("the request was finished")
    }
}

/// Reads a stream to its end: deltas of a choice only before its end, one end per choice, one last event of all.
pub(crate) fn read(mut events: EventStream) -> Answer {
    let mut choices: Vec<Choice> = Vec::new();
    loop {
        match next(&mut events).expect("a stream ends with a last event") {
            Event::Delta(delta) => {
                let choice = grow(&mut choices, delta.choice);
                assert_eq!(choice.finished, None, "a delta after the end of its choice");
                assert!(!delta.text.is_empty() || !delta.tokens.is_empty(), "a delta that says nothing");
                choice.text += &delta.text;
                choice.tokens.extend(delta.tokens);
            }
            Event::Queued { .. } | Event::Started => assert!(choices.is_empty(), "news of the queue behind a delta"),
            Event::Finished { choice, reason, stop } => {
                let before = grow(&mut choices, choice).finished.replace((reason, stop));
                assert_eq!(before, None, "a choice ended twice");
            }
            Event::Done(summary) => {
                assert!(choices.iter().all(|choice| choice.finished.is_some()), "done, but {choices:?}");
                assert_eq!(events.blocking_next(), None, "an event after the last one");
                return Answer { choices, end: Ok(summary) };
            }
            Event::Failed(error) => {
                assert_eq!(events.blocking_next(), None, "an event after the last one");
                return Answer { choices, end: Err(error) };
            }
        }
    }
}

/// The next event; panics when none comes, so that a bug that starves a request ends the test instead of hanging it.
fn next(events: &mut EventStream) -> Option<Event> {
    let start = Instant::now();
    loop {
        if let Some(event) = events.next().now_or_never() {
            return event;
        }
        assert!(start.elapsed() < PATIENCE, "no event for {PATIENCE:?}");
        thread::sleep(Duration::from_micros(500));
    }
}

fn grow(choices: &mut Vec<Choice>, choice: u32) -> &mut Choice {
    let choice = choice as usize;
    assert!(choice < 64, "choice {choice}");
    choices.resize_with(choices.len().max(choice + 1), Choice::default);
    &mut choices[choice]
}

/// Submits a request that has to be accepted.
pub(crate) fn submit(engine: &Engine, request: Request) -> EventStream {
    engine.generate_blocking(request).expect("the request is accepted")
}

pub(crate) fn ask(engine: &Engine, request: Request) -> Answer {
    read(submit(engine, request))
}

/// What the request gets from an engine that nobody else uses and that has no time, faults or cache.
pub(crate) fn ask_alone(config: &SimConfig, request: Request) -> Answer {
    let config = SimConfig { step_us: 0, us_per_token: 0, fail_every_steps: None, ..config.clone() };
    ask(&Engine::simulate(config), Request { cache_prompt: false, ..request })
}

/// A request whose text depends on the seed, sampled from everything.
pub(crate) fn sampled(seed: u64, n_tokens: u32) -> Request {
    let sampling = SamplingParams { seed: Some(seed), temperature: 1.0, ..SamplingParams::default() };
    Request { sampling, ..greedy(tokens(seed, 20), n_tokens) }
}

/// Greedy, from tokens.
pub(crate) fn greedy(prompt: impl IntoIterator<Item = TokenId>, max_tokens: u32) -> Request {
    let prompt = Prompt::Tokens(prompt.into_iter().collect());
    Request { prompt, ..Request::default() }.greedy().max_tokens(max_tokens)
}

/// `n` tokens that differ from those of any other `salt`, all of them lower-case letters.
pub(crate) fn tokens(salt: u64, n: usize) -> Vec<TokenId> {
    let mut random = Random::new(salt);
    (0..n).map(|_| TokenId::from(b'a') + random.below(26) as TokenId).collect()
}

/// Returns as soon as `condition` holds; panics when it never does.
pub(crate) fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        thread::sleep(Duration::from_micros(200));
    }
}

/// Returns when nothing runs, waits or holds cells.
pub(crate) fn wait_until_idle(engine: &Engine) {
    wait_until("the engine is idle", || {
        let stats = engine.stats();
        (stats.requests_running, stats.requests_queued, stats.kv_cells_used) == (0, 0, 0)
    });
}

/// SplitMix64: the same numbers on every run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d))
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 33) % n
    }
}
