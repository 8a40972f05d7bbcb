//! The model's vocabulary and chat template, for all threads.

use std::sync::Arc;

use minerva_llama::{ChatPrompt, ChatTemplate, Model};
use serde::Serialize;

use crate::backend::{RenderedChat, Tokenizer};
use crate::error::{LoadError, RequestError};
use crate::request::{ChatMessage, TokenId};

/// Tokens to bytes is a look-up in a table made at load; text to tokens goes to llama.cpp.
pub(crate) struct LlamaTokenizer {
    model: Arc<Model>,
    template: Option<ChatTemplate>,
    end_of_generation: Vec<TokenId>,
    suppressed: Vec<TokenId>,
    /// The bytes of all tokens, one after the other, and where each begins; one more entry for the end.
    bytes: Vec<u8>,
    starts: Vec<u32>,
    max_token_bytes: usize,
}

#[derive(Serialize)]
struct ChatRequest<'a> {
    messages: &'a [ChatMessage],
}

impl LlamaTokenizer {
    pub(crate) fn new(model: &Arc<Model>, template: Option<&str>) -> Result<Self, LoadError> {
        let template = ChatTemplate::new(model, template)
            .map_err(|error| LoadError::Setting { name: "chat_template", problem: error.to_string() })?;
        let mut bytes = Vec::new();
        let mut starts = vec![0];
        let mut max_token_bytes = 1;
        for token in 0..model.n_vocab() as TokenId {
            let before = bytes.len();
            model.token_bytes(token, false, &mut bytes);
            max_token_bytes = max_token_bytes.max(bytes.len() - before);
            starts.push(bytes.len() as u32);
        }
        let end_of_generation = model.end_of_generation_tokens();
        let suppressed = model.suppressed_tokens();
        Ok(Self { model: Arc::clone(model), template, end_of_generation, suppressed, bytes, starts, max_token_bytes })
    }

    pub(crate) fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }
}

impl Tokenizer for LlamaTokenizer {
    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<TokenId>, RequestError> {
        let mut tokens = self
            .model
            .tokenize(text, add_special, parse_special)
            .map_err(|error| RequestError::Tokenize { message: error.to_string() })?;
        // A template that writes BOS itself and a tokenizer that adds one make two; models are trained with one.
        if add_special && parse_special && self.model.adds_bos() && tokens.len() > 1 {
            let bos = self.model.bos();
            if tokens.first().copied() == bos && tokens.get(1).copied() == bos {
                tokens.remove(0);
            }
        }
        Ok(tokens)
    }

    fn token_bytes(&self, token: TokenId, out: &mut Vec<u8>) {
        let Ok(token) = usize::try_from(token) else { return };
        if let (Some(&start), Some(&end)) = (self.starts.get(token), self.starts.get(token + 1)) {
            out.extend_from_slice(&self.bytes[start as usize..end as usize]);
        }
    }

    fn is_end_of_generation(&self, token: TokenId) -> bool {
        self.end_of_generation.binary_search(&token).is_ok()
    }

    fn end_of_generation(&self) -> &[TokenId] {
        &self.end_of_generation
    }

    fn suppressed(&self) -> &[TokenId] {
        &self.suppressed
    }

    fn max_token_bytes(&self) -> usize {
        self.max_token_bytes
    }

    fn render_chat(&self, messages: &[ChatMessage]) -> Result<RenderedChat, RequestError> {
        let template = self.template.as_ref().ok_or(RequestError::NoChatTemplate)?;
        let failed = |message: String| RequestError::ChatTemplate { message };
        let request = serde_json::to_string(&ChatRequest { messages }).map_err(|error| failed(error.to_string()))?;
        let answer = template.render(&request).map_err(|error| failed(error.to_string()))?;
        let prompt: ChatPrompt = serde_json::from_str(&answer).map_err(|error| failed(error.to_string()))?;
        Ok(RenderedChat { prompt: prompt.prompt, stops: prompt.additional_stops })
    }
}
