//! The texts that end a repetition for DRY, as the token sequences of one vocabulary.
//!
//! A text can lie inside of a token, or begin in one and end in later ones, so every token of the vocabulary is looked at once. That
//! takes milliseconds: it happens on the intake thread, and the last few lists are kept.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::Tokenizer;
use crate::request::TokenId;
use crate::sampler::Breakers;

/// Lists that are kept; most clients send one, or none and get the default.
const MAX_CACHED: usize = 8;

/// The longest rest of a breaker after its first token. Source: `llama_sampler_init_dry` at the pinned commit.
const MAX_REST_TOKENS: usize = 20;

/// The breakers of recent requests, newest first.
#[derive(Debug, Default)]
pub(crate) struct BreakerCache {
    lists: Mutex<VecDeque<(Vec<String>, Arc<Breakers>)>>,
}

impl BreakerCache {
    /// The breakers for `texts`, made now if nobody asked for them lately.
    pub(crate) fn get(&self, texts: &[String], tokenizer: &dyn Tokenizer, n_vocab: usize) -> Arc<Breakers> {
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        let found = lists.iter().position(|(cached, _)| cached == texts).and_then(|at| lists.remove(at));
        let entry = found.unwrap_or_else(|| (texts.to_vec(), Arc::new(make(texts, tokenizer, n_vocab))));
        let breakers = Arc::clone(&entry.1);
        lists.push_front(entry);
        lists.truncate(MAX_CACHED);
        breakers
    }
}

fn make(texts: &[String], tokenizer: &dyn Tokenizer, n_vocab: usize) -> Breakers {
    let mut breakers = Breakers::default();
    let rests: Vec<Vec<Option<Vec<TokenId>>>> = texts.iter().map(|text| rests(text, tokenizer)).collect();
    let mut bytes = Vec::new();
    for token in 0..n_vocab as TokenId {
        bytes.clear();
        tokenizer.token_bytes(token, &mut bytes);
        let Some(&last) = bytes.last() else { continue };
        for (text, rests) in texts.iter().zip(&rests) {
            let text = text.as_bytes();
            if bytes.windows(text.len()).any(|part| part == text) {
                breakers.add(token, Vec::new());
                continue;
            }
            for n_inside in 1..text.len() {
                if text[n_inside - 1] == last
                    && bytes.ends_with(&text[..n_inside])
                    && let Some(rest) = &rests[n_inside]
                {
                    breakers.add(token, rest.clone());
                }
            }
        }
    }
    // Control tokens have no bytes: such a text is the whole token.
    for text in texts {
        if let Ok(tokens) = tokenizer.tokenize(text, false, true)
            && let [token] = tokens[..]
        {
            breakers.add(token, Vec::new());
        }
    }
    breakers
}

/// The tokens of `text` from each of its bytes on; `None` inside of a character.
fn rests(text: &str, tokenizer: &dyn Tokenizer) -> Vec<Option<Vec<TokenId>>> {
    let rest = |start| {
        let mut tokens = tokenizer.tokenize(text.get(start..)?, false, false).ok()?;
        tokens.truncate(MAX_REST_TOKENS);
        Some(tokens)
    };
    (0..text.len()).map(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::RenderedChat;
    use crate::error::RequestError;
    use crate::request::ChatMessage;

    /// Words of a text that a space ends are tokens; so are the words below.
    struct Words;

    const WORDS: [&str; 8] = ["ab", "b:", "::", "x<", "<e", "n", "nd>", ""];

    impl Tokenizer for Words {
        fn tokenize(&self, text: &str, _: bool, parse_special: bool) -> Result<Vec<TokenId>, RequestError> {
            Ok(match text {
                "nd>" => vec![6],
                "end>" => vec![4, 6],
                "<ctrl>" if parse_special => vec![7],
                _ => vec![0, 0],
            })
        }

        fn token_bytes(&self, token: TokenId, out: &mut Vec<u8>) {
            out.extend_from_slice(WORDS[token as usize].as_bytes());
        }

        fn is_end_of_generation(&self, _: TokenId) -> bool {
            false
        }

        fn end_of_generation(&self) -> &[TokenId] {
            &[]
        }

        fn max_token_bytes(&self) -> usize {
            3
        }

        fn render_chat(&self, _: &[ChatMessage]) -> Result<RenderedChat, RequestError> {
            Err(RequestError::NoChatTemplate)
        }
    }

    fn breakers(sequences: &[(TokenId, &[TokenId])]) -> Breakers {
        let mut breakers = Breakers::default();
        for (head, rest) in sequences {
            breakers.add(*head, rest.to_vec());
        }
        breakers
    }

    #[test]
    fn a_breaker_is_found_inside_a_token_across_tokens_and_as_a_control_token() {
        let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let made = |list: &[&str]| make(&texts(list), &Words, WORDS.len());
        assert_eq!(made(&[":"]), breakers(&[(1, &[]), (2, &[])]));
        assert_eq!(made(&["<end>"]), breakers(&[(3, &[4, 6]), (4, &[6])]));
        assert_eq!(made(&["<ctrl>"]), breakers(&[(3, &[0, 0]), (7, &[])]));
        assert_eq!(made(&["é"]), breakers(&[]), "no token has its first byte, and nothing is cut inside of it");
        assert_eq!(made(&[]), breakers(&[]));
    }

    #[test]
    fn the_last_lists_are_kept() {
        let cache = BreakerCache::default();
        let get = |i: usize| cache.get(&[format!("{i}")], &Words, WORDS.len());
        let first = get(0);
        for i in 1..MAX_CACHED {
            get(i);
        }
        assert!(Arc::ptr_eq(&first, &get(0)));
        for i in 1..=MAX_CACHED {
            get(i);
        }
        assert!(!Arc::ptr_eq(&first, &get(0)), "asked for longest ago");
    }
}
