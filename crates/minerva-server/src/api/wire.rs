//! The JSON of answers, in OpenAI's shapes.

use minerva_engine::{FinishReason, Summary, TokenInfo};
use serde::Serialize;

/// Which of the two APIs a request came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// /v1/chat/completions
    Chat,
    /// /v1/completions
    Completion,
}

impl Shape {
    pub(crate) fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl-",
            Self::Completion => "cmpl-",
        }
    }

    pub(crate) fn object(self) -> &'static str {
        match self {
            Self::Chat => "chat.completion",
            Self::Completion => "text_completion",
        }
    }

    pub(crate) fn chunk_object(self) -> &'static str {
        match self {
            Self::Chat => "chat.completion.chunk",
            Self::Completion => "text_completion",
        }
    }

    /// The request field that holds the prompt.
    pub(crate) fn prompt_field(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Completion => "prompt",
        }
    }
}

pub(crate) fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// Tokens used, over all choices.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) total_tokens: u32,
    pub(crate) prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct PromptTokensDetails {
    pub(crate) cached_tokens: u32,
}

/// Where the time went, in milliseconds. Several prompts of one request: the longest of each.
#[derive(Debug, Clone, Copy, Default, Serialize)]
#[allow(clippy::struct_field_names, reason = "the names on the wire")]
pub(crate) struct Timings {
    pub(crate) queue_ms: f64,
    pub(crate) prefill_ms: f64,
    pub(crate) decode_ms: f64,
    /// Tokens that were guessed and computed along, from whichever source, and those that were kept; llama-server's names.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) draft_n: u32,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) draft_n_accepted: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// Usage and timings of every prompt of a request.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Totals {
    pub(crate) usage: Usage,
    pub(crate) timings: Timings,
}

impl Totals {
    pub(crate) fn add(&mut self, summary: &Summary) {
        let usage = &mut self.usage;
        usage.prompt_tokens += summary.prompt_tokens;
        usage.completion_tokens += summary.completion_tokens;
        usage.total_tokens = usage.prompt_tokens + usage.completion_tokens;
        usage.prompt_tokens_details.cached_tokens += summary.cached_tokens;
        let timings = &mut self.timings;
        timings.queue_ms = timings.queue_ms.max(round_ms(summary.queue_ms));
        timings.prefill_ms = timings.prefill_ms.max(round_ms(summary.prefill_ms));
        timings.decode_ms = timings.decode_ms.max(round_ms(summary.decode_ms));
        timings.draft_n += summary.guessed_tokens;
        timings.draft_n_accepted += summary.right_guesses;
    }
}

/// Microseconds are enough, and shorter to send.
fn round_ms(ms: f64) -> f64 {
    (ms * 1e3).round() / 1e3
}

/// A whole answer.
#[derive(Debug, Serialize)]
pub(crate) struct Completion<'a, C> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) system_fingerprint: &'a str,
    pub(crate) choices: Vec<C>,
    pub(crate) usage: Usage,
    pub(crate) timings: Timings,
}

#[derive(Debug, Serialize)]
pub(crate) struct ChatChoice {
    pub(crate) index: u32,
    pub(crate) message: ChatAnswer,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: &'static str,
}

#[derive(Debug, Serialize)]
pub(crate) struct ChatAnswer {
    pub(crate) role: &'static str,
    pub(crate) content: String,
    pub(crate) refusal: Option<&'static str>,
}

#[derive(Debug, Serialize)]
pub(crate) struct TextChoice {
    pub(crate) index: u32,
    pub(crate) text: String,
    pub(crate) logprobs: Option<TextLogprobs>,
    pub(crate) finish_reason: &'static str,
}

/// One choice of a chunk of a stream.
#[derive(Debug, Serialize)]
pub(crate) struct ChatChunkChoice<'a> {
    pub(crate) index: u32,
    pub(crate) delta: ChatDelta<'a>,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct ChatDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<&'a str>,
}

#[derive(Debug, Serialize)]
pub(crate) struct TextChunkChoice<'a> {
    pub(crate) index: u32,
    pub(crate) text: &'a str,
    pub(crate) logprobs: Option<TextLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
}

/// Log-probabilities as chat completions have them.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatToken>,
    pub(crate) refusal: Option<&'static str>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ChatToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<ChatTopToken>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ChatTopToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub(crate) fn push(&mut self, tokens: Vec<TokenInfo>) {
        self.content.extend(tokens.into_iter().map(|token| {
            ChatToken {
                token: lossy(&token.bytes),
                logprob: token.logprob.map_or(LOWEST_LOGPROB, finite),
                bytes: token.bytes,
                top_logprobs: token
                    .top
                    .into_iter()
                    .map(|top| ChatTopToken {
                        token: lossy(&top.bytes),
                        logprob: finite(top.logprob),
                        bytes: top.bytes,
                    })
                    .collect(),
            }
        }));
    }
}

/// Log-probabilities as plain completions have them.
#[derive(Debug, Default, Serialize)]
pub(crate) struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    /// `None` where no alternatives were asked for.
    top_logprobs: Option<Vec<TopMap>>,
    /// Where each token begins in the choice's text, in characters.
    text_offset: Vec<usize>,
}

/// Alternatives by text, likeliest first. Two tokens of the same text would be one key twice: the likelier one stays.
#[derive(Debug)]
pub(crate) struct TopMap(Vec<(String, f32)>);

impl Serialize for TopMap {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

impl TextLogprobs {
    /// Adds `tokens`, whose text begins at character `offset` of the choice's text. Returns where the next one begins.
    pub(crate) fn push(&mut self, tokens: Vec<TokenInfo>, mut offset: usize) -> usize {
        for token in tokens {
            let text = lossy(&token.bytes);
            self.text_offset.push(offset);
            offset += text.chars().count();
            self.token_logprobs.push(token.logprob.map_or(LOWEST_LOGPROB, finite));
            self.tokens.push(text);
            if !token.top.is_empty() {
                let mut map = TopMap(Vec::with_capacity(token.top.len()));
                for top in token.top {
                    let text = lossy(&top.bytes);
                    if !map.0.iter().any(|(known, _)| *known == text) {
                        map.0.push((text, finite(top.logprob)));
                    }
                }
                self.top_logprobs.get_or_insert_default().push(map);
            }
        }
        offset
    }
}

/// JSON has no infinity; OpenAI uses this for "will not happen".
const LOWEST_LOGPROB: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LOWEST_LOGPROB }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
