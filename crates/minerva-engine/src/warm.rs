//! Prefixes that are computed before anybody asks: a system prompt, a document, the beginning of every conversation.
//!
//! Each is computed like a request of its own and then kept in host memory for everybody; pinned ones never give way to others. What
//! lies in the disk tier is fetched instead of computed.

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

use crate::backend::{BackendLimits, Tokenizer};
use crate::error::RequestError;
use crate::event::{Event, GenerationError};
use crate::request::{ChatMessage, Prompt, Request, TokenId};
use crate::scheduler::common;

/// A prefix to compute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmPrompt {
    /// The text, tokens or messages that prompts begin with. A conversation that does not end with the user is warmed up to where
    /// the user's next message would begin.
    pub prompt: Prompt,
    /// Whether it stays in host memory as long as the engine lives.
    pub is_pinned: bool,
}

/// What warming came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WarmReport {
    /// Tokens of all prefixes.
    pub n_tokens: u64,
    /// Tokens of them that were computed.
    pub n_computed: u64,
    /// Host memory that the pinned ones take, in bytes.
    pub pinned_bytes: u64,
}

/// Why prefixes could not be warmed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WarmError {
    /// A prefix cannot be computed.
    #[error("prefix {} cannot be warmed: {source}", .index + 1)]
    Prompt {
        /// Which one, from 0.
        index: usize,
        /// What is wrong with it.
        source: RequestError,
    },
    /// The pinned prefixes do not fit in host memory.
    #[error("the pinned prefixes need {needed_bytes} bytes of host memory, the limit is {limit_bytes} bytes")]
    TooLarge {
        /// What they take together.
        needed_bytes: u64,
        /// What there is for all copies of sequences.
        limit_bytes: u64,
    },
    /// Computing a prefix failed.
    #[error("prefix {} cannot be warmed: {source}", .index + 1)]
    Failed {
        /// Which one, from 0.
        index: usize,
        /// What went wrong.
        source: GenerationError,
    },
    /// The caller stopped it.
    #[error("warming was cancelled")]
    Cancelled,
}

/// What warming needs to know of an engine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    pub(crate) limits: BackendLimits,
    pub(crate) host_cache_bytes: u64,
}

impl Room {
    fn bytes_of(&self, n_tokens: usize) -> u64 {
        let n_window = (n_tokens as u64).min(u64::from(self.limits.n_window_tokens));
        self.limits.state_bytes + self.limits.cell_bytes * n_tokens as u64 + self.limits.window_cell_bytes * n_window
    }
}

/// Checks all prefixes, then computes one after the other. `submit` runs a request and says how it went.
pub(crate) fn warm(
    prompts: &[WarmPrompt],
    tokenizer: &dyn Tokenizer,
    room: Room,
    mut submit: impl FnMut(Request, bool) -> Result<Result<u32, GenerationError>, RequestError>,
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<WarmReport, WarmError> {
    let tokens = prompts.iter().enumerate().map(|(index, warm)| {
        let tokens = prefix(&warm.prompt, tokenizer).map_err(|source| WarmError::Prompt { index, source })?;
        Ok((tokens, warm.is_pinned))
    });
    let all: Vec<(Vec<TokenId>, bool)> = tokens.collect::<Result<_, WarmError>>()?;
    let pinned = all.iter().filter(|(_, is_pinned)| *is_pinned);
    let pinned_bytes = pinned.map(|(tokens, _)| room.bytes_of(tokens.len())).fold(0, u64::saturating_add);
    if pinned_bytes > room.host_cache_bytes {
        return Err(WarmError::TooLarge { needed_bytes: pinned_bytes, limit_bytes: room.host_cache_bytes });
    }
    let mut report = WarmReport { pinned_bytes, ..WarmReport::default() };
    for (index, (tokens, is_pinned)) in all.into_iter().enumerate() {
        if progress(index).is_break() {
            return Err(WarmError::Cancelled);
        }
        let n_tokens = tokens.len() as u64;
        // Behind everybody, should there be somebody.
        let request = Request {
            prompt: Prompt::Tokens(tokens),
            priority: i32::MAX,
            speculate: false,
            ignore_eos: true,
            ..Request::default()
        };
        let went = submit(request.greedy().max_tokens(1), is_pinned);
        let went = went.map_err(|source| WarmError::Prompt { index, source })?;
        let n_cached = went.map_err(|source| WarmError::Failed { index, source })?;
        report.n_tokens += n_tokens;
        report.n_computed += n_tokens - u64::from(n_cached);
    }
    Ok(report)
}

/// How a request went that is read to its end: prompt tokens that were not computed.
pub(crate) fn cached_tokens(mut events: crate::stream::EventStream) -> Result<u32, GenerationError> {
    loop {
        match events.blocking_next() {
            Some(Event::Done(summary)) => return Ok(summary.cached_tokens),
            Some(Event::Failed(error)) => return Err(error),
            Some(_) => {}
            None => return Err(GenerationError::Shutdown),
        }
    }
}

/// The tokens that are the same whatever follows.
fn prefix(prompt: &Prompt, tokenizer: &dyn Tokenizer) -> Result<Vec<TokenId>, RequestError> {
    let rendered = |messages: &[ChatMessage]| {
        let chat = tokenizer.render_chat(messages)?;
        tokenizer.tokenize(&chat.prompt, true, true)
    };
    match prompt {
        Prompt::Tokens(tokens) => Ok(tokens.clone()),
        Prompt::Text(text) => tokenizer.tokenize(text, true, false),
        Prompt::Chat(messages) if messages.last().is_some_and(|last| last.role == "user") => rendered(messages),
        Prompt::Chat(messages) => {
            let with = |text: &str| rendered(&[messages.as_slice(), &[ChatMessage::user(text)]].concat());
            let (one, other) = (with("A")?, with("7")?);
            Ok(one[..common(&one, &other)].to_vec())
        }
    }
}
