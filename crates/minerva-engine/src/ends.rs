//! Which tokens end a continuation, and from when on.

use crate::backend::Tokenizer;
use crate::request::{Request, TokenId};
use crate::sampler::InvalidParam;

/// The most tokens that a request may name; each is looked at for every token of the answer.
pub(crate) const MAX_STOP_TOKENS: usize = 256;

/// Checks what a request says about its ends; `max_tokens` is what it asked for.
pub(crate) fn validate(request: &Request, n_vocab: usize) -> Result<(), InvalidParam> {
    let n_given = request.stop_token_ids.len();
    if n_given > MAX_STOP_TOKENS {
        let given = format!("{n_given} tokens");
        return Err(InvalidParam::new("stop_token_ids", given, format!("at most {MAX_STOP_TOKENS} tokens")));
    }
    let is_outside = |&&token: &&TokenId| usize::try_from(token).map_or(true, |token| token >= n_vocab);
    if let Some(token) = request.stop_token_ids.iter().find(is_outside) {
        let allowed = format!("made of tokens of the vocabulary, 0 to {}", n_vocab.max(1) - 1);
        return Err(InvalidParam::new("stop_token_ids", token, allowed));
    }
    match request.max_tokens.filter(|&max_tokens| max_tokens < request.min_tokens) {
        Some(max_tokens) => {
            let allowed = format!("at most `max_tokens`, which is {max_tokens}");
            Err(InvalidParam::new("min_tokens", request.min_tokens, allowed))
        }
        None => Ok(()),
    }
}

/// The ends of one request.
#[derive(Debug)]
pub(crate) struct Ends {
    stop_tokens: Vec<TokenId>,
    min_tokens: u32,
    /// What is never sampled, and what is not sampled before `min_tokens`.
    banned: Vec<TokenId>,
    banned_at_first: Vec<TokenId>,
}

impl Ends {
    pub(crate) fn new(request: &Request, tokenizer: &dyn Tokenizer) -> Self {
        let end_of_generation = tokenizer.end_of_generation();
        let banned = if request.ignore_eos { end_of_generation.to_vec() } else { Vec::new() };
        let banned_at_first = match request.min_tokens {
            0 => Vec::new(),
            _ => [end_of_generation, &request.stop_token_ids].concat(),
        };
        Self { stop_tokens: request.stop_token_ids.clone(), min_tokens: request.min_tokens, banned, banned_at_first }
    }

    /// What must not be sampled as the next token of a continuation that has `n_generated`.
    pub(crate) fn banned(&self, n_generated: u32) -> &[TokenId] {
        if n_generated < self.min_tokens { &self.banned_at_first } else { &self.banned }
    }

    /// What must not be sampled at any time.
    pub(crate) fn always(&self) -> &[TokenId] {
        &self.banned
    }

    /// Whether a continuation may end with its token number `n_generated`, counted from 1.
    pub(crate) fn may_end_at(&self, n_generated: u32) -> bool {
        n_generated > self.min_tokens
    }

    pub(crate) fn is_stop_token(&self, token: TokenId) -> bool {
        self.stop_tokens.contains(&token)
    }
}
