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
    suppressed: Vec<TokenId>,
}

impl Ends {
    pub(crate) fn new(request: &Request, tokenizer: &dyn Tokenizer) -> Self {
        let end_of_generation = tokenizer.end_of_generation();
        let suppressed = tokenizer.suppressed().to_vec();
        let mut banned = suppressed.clone();
        if request.ignore_eos {
            banned.extend_from_slice(end_of_generation);
        }
        let banned_at_first = match request.min_tokens {
            0 => Vec::new(),
            _ => [&suppressed, end_of_generation, &request.stop_token_ids].concat(),
        };
        let stop_tokens = request.stop_token_ids.clone();
        Self { stop_tokens, min_tokens: request.min_tokens, banned, banned_at_first, suppressed }
    }

    /// What must not be sampled as the next token of a continuation that has `n_generated`.
    pub(crate) fn banned(&self, n_generated: u32) -> &[TokenId] {
        if n_generated < self.min_tokens { &self.banned_at_first } else { &self.banned }
    }

    /// What the model's file says is never to be sampled.
    pub(crate) fn suppressed(&self) -> &[TokenId] {
        &self.suppressed
    }

    /// Whether a continuation may end with its token number `n_generated`, counted from 1.
    pub(crate) fn may_end_at(&self, n_generated: u32) -> bool {
        n_generated > self.min_tokens
    }

    pub(crate) fn is_stop_token(&self, token: TokenId) -> bool {
        self.stop_tokens.contains(&token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::RenderedChat;
    use crate::error::RequestError;
    use crate::request::ChatMessage;

    /// Token 1 ends, token 2 is never to be sampled.
    struct Words;

    impl Tokenizer for Words {
        fn tokenize(&self, _: &str, _: bool, _: bool) -> Result<Vec<TokenId>, RequestError> {
            Ok(Vec::new())
        }

        fn token_bytes(&self, _: TokenId, _: &mut Vec<u8>) {}

        fn is_end_of_generation(&self, token: TokenId) -> bool {
            token == 1
        }

        fn end_of_generation(&self) -> &[TokenId] {
            &[1]
        }

        fn suppressed(&self) -> &[TokenId] {
            &[2]
        }

        fn max_token_bytes(&self) -> usize {
            1
        }

        fn render_chat(&self, _: &[ChatMessage]) -> Result<RenderedChat, RequestError> {
            Err(RequestError::NoChatTemplate)
        }
    }

    #[test]
    fn what_the_file_suppresses_is_banned_whatever_else_is() {
        let ends = |request: Request| Ends::new(&request, &Words);
        assert_eq!(ends(Request::text("")).banned(0), [2]);
        assert_eq!(ends(Request { ignore_eos: true, ..Request::text("") }).banned(9), [2, 1]);
        let at_first = ends(Request { min_tokens: 3, stop_token_ids: vec![7], ..Request::text("") });
        assert_eq!((at_first.banned(2), at_first.banned(3)), (&[2, 1, 7][..], &[2][..]));
        assert_eq!(at_first.suppressed(), [2]);
    }
}
