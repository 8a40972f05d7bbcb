//! What a caller asks for: plain data, so that the same request can be sent to an engine in another process later.

use serde::{Deserialize, Serialize};

use crate::constrain::Constraint;
use crate::sampler::SamplingParams;

/// A token of the model's vocabulary, `0..n_vocab` (llama.cpp's `llama_token`).
pub type TokenId = i32;

/// The longest [`Request::cache_key`], in bytes.
pub const MAX_CACHE_KEY_BYTES: usize = 512;

/// One generation request: a prompt and how to continue it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Request {
    /// What to continue.
    pub prompt: Prompt,
    /// How many independent continuations to make. The prompt is computed once. Default 1.
    pub n: u32,
    /// The most tokens each continuation may have. `None` means until the context of the sequence is full.
    pub max_tokens: Option<u32>,
    /// Generation ends before any of these texts would appear.
    pub stop: Vec<String>,
    /// Tokens that end a continuation as an end-of-generation token does; their text is not part of the answer.
    pub stop_token_ids: Vec<TokenId>,
    /// Tokens that each continuation has at least: before that neither an end-of-generation token nor one of `stop_token_ids` is sampled,
    /// and a stop text is text like any other. Only a constraint that allows nothing more ends it earlier. Default 0.
    pub min_tokens: u32,
    /// Never sample an end-of-generation token, so that only `max_tokens`, `stop_token_ids` or a stop text ends the request.
    pub ignore_eos: bool,
    /// How each token is chosen.
    pub sampling: SamplingParams,
    /// `Some(k)`: report each token's log-probability and the `k` most likely alternatives. `None`: none of it.
    pub logprobs: Option<u32>,
    /// What the answer has to follow, such as a JSON schema. `None`: nothing.
    pub constraint: Option<Constraint>,
    /// Reuse cached cells of an earlier request that began with the same tokens. Default true.
    pub cache_prompt: bool,
    /// Requests with the same key, of at most [`MAX_CACHE_KEY_BYTES`], are expected to begin alike: what they computed is kept longer than
    /// what else their client left. A hint that costs other clients nothing.
    pub cache_key: Option<String>,
    /// For so many milliseconds, an hour at most, what this request computes is the last that is given up of what its client left. A hint
    /// like `cache_key`, and before it.
    pub keep_ms: Option<u64>,
    /// Send [`Event::Queued`](crate::Event::Queued) while the request waits, and [`Event::Started`](crate::Event::Started). Default false.
    pub queue_updates: bool,
    /// Whether the next tokens may be guessed from what the text has said before and computed along. It never changes what is sampled.
    /// Default true.
    pub speculate: bool,
    /// Whose request it is; 0 for nobody in particular. Seats and steps are shared evenly between clients.
    pub client: u64,
    /// Lower is served earlier, and may take the seat of what is served later. Default 0.
    pub priority: i32,
    /// Milliseconds after which the answer is worth nothing: a request that still waits then never begins, one that runs ends with
    /// [`FinishReason::Length`](crate::FinishReason::Length).
    pub deadline_ms: Option<u64>,
    /// The longest gap between two tokens that prompts of others may cause, in milliseconds, as far as steps can be cut that
    /// short. `None` is the engine's own limit.
    pub max_itl_ms: Option<u64>,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            prompt: Prompt::Text(String::new()),
            n: 1,
            max_tokens: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            min_tokens: 0,
            ignore_eos: false,
            sampling: SamplingParams::default(),
            logprobs: None,
            constraint: None,
            cache_prompt: true,
            cache_key: None,
            keep_ms: None,
            queue_updates: false,
            speculate: true,
            client: 0,
            priority: 0,
            deadline_ms: None,
            max_itl_ms: None,
        }
    }
}

impl Request {
    /// A request that continues `text` as it is.
    pub fn text(text: impl Into<String>) -> Self {
        Self { prompt: Prompt::Text(text.into()), ..Self::default() }
    }

    /// A request that answers a conversation, through the model's chat template.
    pub fn chat(messages: impl IntoIterator<Item = ChatMessage>) -> Self {
        Self { prompt: Prompt::Chat(messages.into_iter().collect()), ..Self::default() }
    }

    /// The same request with a bound on the tokens of each continuation.
    #[must_use]
    pub fn max_tokens(mut self, max_tokens: u32) -> Self {
        self.max_tokens = Some(max_tokens);
        self
    }

    /// The same request, always taking the most likely token.
    #[must_use]
    pub fn greedy(mut self) -> Self {
        self.sampling = SamplingParams::greedy();
        self
    }
}

/// The start of the sequence that the model continues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prompt {
    /// Plain text. The tokenizer adds the model's BOS token where the model wants one; special tokens in the text are
    /// text, not control.
    Text(String),
    /// Token ids, used as they are.
    Tokens(Vec<TokenId>),
    /// A conversation, rendered by the model's chat template with the prompt for an answer at its end.
    Chat(Vec<ChatMessage>),
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or what else the model's template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

impl ChatMessage {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// An instruction from whoever runs the conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }
}
