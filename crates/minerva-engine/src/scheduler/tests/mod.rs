//! Schedules as text, and random schedules against a model of the cache.
//!
//! [`Replay`] does what the worker does, with a clock that is only counted and a cache that holds nothing but tokens. It
//! checks the scheduler's promises after every step, so each golden trace is a test of the invariants as well.
#![expect(clippy::needless_raw_string_hashes, reason = "expect-test writes them")]

mod admit;
mod checkpoints;
mod disk;
mod fairness;
mod forks;
mod guesses;
mod hints;
mod outlook;
mod places;
mod random;
mod replay;
mod reuse;
mod room;
mod sharing;
mod step;

use std::collections::BTreeMap;
use std::ops::Range;

use replay::Replay;

use super::{ClientId, Job, Keep, RequestId, Terms};
use crate::backend::BackendLimits;
use crate::request::TokenId;

/// What one request of a schedule asks for, and when it comes and goes.
#[derive(Debug, Clone)]
struct Script {
    id: RequestId,
    at_tick: usize,
    prompt: Vec<TokenId>,
    n: u32,
    /// Tokens after which each choice ends.
    n_generate: u32,
    /// Tokens that it could have generated, beyond those.
    n_spare: u32,
    reuse: bool,
    /// What is generated repeats itself after so many tokens.
    period: Option<usize>,
    guess: bool,
    /// Some of what is generated follows without being sampled.
    forces: bool,
    terms: Terms,
    cancelled_at: Option<usize>,
}

/// A request for the golden traces; its name is one letter.
fn request(name: &str) -> Script {
    let id = RequestId::from(name.as_bytes()[0]);
    Script {
        id,
        at_tick: 0,
        prompt: Vec::new(),
        n: 1,
        n_generate: 1,
        n_spare: 0,
        reuse: true,
        period: None,
        guess: true,
        forces: false,
        terms: Terms::default(),
        cancelled_at: None,
    }
}

impl Script {
    /// Appends tokens that no other request has.
    fn prompt(self, n_tokens: i32) -> Self {
        let text = self.id;
        self.text(text, 0..n_tokens)
    }

    /// Appends tokens of a text that other requests may have too.
    fn shares(self, text: &str, tokens: Range<i32>) -> Self {
        self.text(RequestId::from(text.as_bytes()[0]), tokens)
    }

    fn text(mut self, text: RequestId, tokens: Range<i32>) -> Self {
        self.prompt.extend(tokens.map(|i| text as TokenId * 1000 + i));
        self
    }

    /// Appends the whole text of an earlier request, its answer included.
    fn continues(mut self, earlier: &Script) -> Self {
        self.prompt.extend((0..earlier.prompt.len() + earlier.n_generate as usize).map(|i| earlier.token(0, i)));
        self
    }

    fn generate(self, n_generate: u32) -> Self {
        Self { n_generate, ..self }
    }

    fn choices(self, n: u32) -> Self {
        Self { n, ..self }
    }

    fn at_tick(self, at_tick: usize) -> Self {
        Self { at_tick, ..self }
    }

    fn cancelled_at(self, tick: usize) -> Self {
        Self { cancelled_at: Some(tick), ..self }
    }

    fn of_client(mut self, client: ClientId) -> Self {
        self.terms.client = client;
        self
    }

    fn priority(mut self, priority: i32) -> Self {
        self.terms.priority = priority;
        self
    }

    fn without_reuse(self) -> Self {
        Self { reuse: false, ..self }
    }

    /// Whether the token at a place of the answer has to follow: three of every six.
    fn is_forced(&self, place: u32) -> bool {
        self.forces && place % 6 >= 3
    }

    fn max_tokens(&self) -> u32 {
        self.n_generate + self.n_spare
    }

    fn n_cells(&self) -> usize {
        self.prompt.len() + self.max_tokens() as usize
    }

    /// The token at a place of a choice's history: the prompt, then what that choice generates.
    fn token(&self, choice: u32, place: usize) -> TokenId {
        let said = |i: usize| self.period.map_or(i, |period| i % period) as TokenId;
        let generated = |i: usize| self.id as TokenId * 1000 + 500 + 100 * choice as TokenId + said(i);
        self.prompt.get(place).copied().unwrap_or_else(|| generated(place - self.prompt.len()))
    }

    fn job(&self) -> Job {
        let Self { id, n, reuse, guess, terms, .. } = *self;
        Job { id, prompt: self.prompt.clone(), n, max_tokens: self.max_tokens(), reuse, guess, terms }
    }
}

fn limits(n_seq_max: u32, n_batch: u32) -> BackendLimits {
    let n_cells_per_seq = 64;
    let n_cells = n_cells_per_seq * n_seq_max;
    BackendLimits {
        n_seq_max,
        n_cells_per_seq,
        n_cells,
        unified: false,
        stream_bytes: 0,
        cell_bytes: 1,
        state_bytes: 0,
        keeps_beginnings: true,
        window_cell_bytes: 0,
        n_window_tokens: 0,
        n_copied_window_tokens: 0,
        checkpoints_need_cells: false,
        n_batch,
        n_ubatch: n_batch,
        n_vocab: 1 << 20,
    }
}

fn pool(n_seq_max: u32, n_cells: u32) -> BackendLimits {
    BackendLimits { n_cells_per_seq: n_cells, n_cells, unified: true, ..limits(n_seq_max, 16) }
}

/// Runs the requests to their ends and returns a line per step.
fn simulate<const N: usize>(limits: BackendLimits, scripts: &[Script; N]) -> String {
    let mut replay = Replay::new(limits);
    replay.run(scripts, &BTreeMap::new());
    replay.trace
}
