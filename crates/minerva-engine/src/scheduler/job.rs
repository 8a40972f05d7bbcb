//! What the scheduler knows of a request: its prompt, its sizes, and on which terms it is served.

use serde::{Deserialize, Serialize};

use super::hints::Keep;
use crate::request::TokenId;

/// A request's number, unique within an engine.
pub type RequestId = u64;

/// Whose request it is; 0 for nobody in particular. Seats are shared evenly between clients.
pub type ClientId = u64;

/// One request, or one choice of a request that had to give its seat away and goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// The request.
    pub id: RequestId,
    /// Its prompt; at least one token.
    pub prompt: Vec<TokenId>,
    /// Continuations, each in a sequence of its own; at most `n_seq_max`.
    pub n: u32,
    /// The most tokens of each continuation; prompt and continuation fit in one sequence.
    pub max_tokens: u32,
    /// Whether cells of other requests may be reused.
    pub reuse: bool,
    /// Whether its next tokens may be guessed.
    pub guess: bool,
    /// On which terms it is served.
    pub terms: Terms,
}

/// On which terms a request is served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// Whose it is.
    pub client: ClientId,
    /// Cells are only shared between requests of the same namespace.
    pub namespace: u64,
    /// Lower is served earlier; 0 is usual.
    pub priority: i32,
    /// When it is too late to start, on the clock of [`admit`](super::Scheduler::admit), in microseconds.
    pub deadline_us: Option<u64>,
    /// The longest that a step may take while this request's tokens are streamed, in microseconds, as far as prompts of others
    /// are what makes it long.
    pub max_itl_us: Option<u64>,
    /// What it says about the use of its prompt to come.
    #[serde(default)]
    pub keep: Keep,
}

/// What holds for all requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// [`Terms::max_itl_us`] of requests that have none.
    pub max_itl_us: Option<u64>,
    /// Bytes of host memory for what sequences held when they had to give their cells away.
    pub host_cache_bytes: u64,
    /// The most checkpoints of one text, where memory cannot be cut; 0 is none.
    #[serde(default)]
    pub max_checkpoints: u32,
    /// Bytes of disk for what lies in host memory and what had to leave it.
    #[serde(default)]
    pub disk_cache_bytes: u64,
    /// How many cells of one pool are set aside for a request.
    #[serde(default)]
    pub reservation: Reservation,
    /// Whether tokens may be guessed from what a text has said before.
    pub guess: bool,
    /// How a draft model may be used; `None` without one.
    #[serde(default)]
    pub draft: Option<DraftLimits>,
}

/// How long the guesses of a draft model may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DraftLimits {
    /// The most tokens of a guess.
    pub max_tokens: u32,
    /// Where no guess of so many tokens has room, there is none.
    pub min_tokens: u32,
}

/// How many cells of one pool are set aside for a request that runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reservation {
    /// Its prompt and all that it may generate: nobody ever yields because an answer is long.
    #[default]
    Full,
    /// Its prompt and what answers usually take: more requests run at once, and when answers turn out longer the last to come waits, with
    /// what it has in host memory, and goes on with the same tokens.
    Expected,
}
