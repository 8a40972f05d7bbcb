//! The model's vocabulary as llguidance wants it: a trie of the tokens' bytes, and a tokenizer for what a grammar forces.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};

use crate::backend::Tokenizer;

/// The longest forced text that is tokenized as the model would; what is longer is taken apart greedily. llama.cpp's
/// tokenizer recurses on runs of one character class, so it does not get to see long ones.
const MAX_TOKENIZED_BYTES: usize = 1024;

/// llguidance's end of the [`Tokenizer`].
struct Vocabulary {
    tokenizer: Arc<dyn Tokenizer>,
    trie: TokTrie,
}

/// What every grammar of a model is compiled against. Takes a few hundred milliseconds for a vocabulary of 256k tokens.
///
/// # Errors
/// A text: llguidance cannot work with this vocabulary.
pub(super) fn factory(tokenizer: &Arc<dyn Tokenizer>, n_vocab: usize) -> Result<ParserFactory, String> {
    let env: TokEnv = Arc::new(Vocabulary { tokenizer: Arc::clone(tokenizer), trie: trie(&**tokenizer, n_vocab) });
    let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &SlicedBiasComputer::json_slices())
        .map_err(|error| error.to_string())?;
    factory.quiet();
    Ok(factory)
}

fn trie(tokenizer: &dyn Tokenizer, n_vocab: usize) -> TokTrie {
    let words: Vec<Vec<u8>> = (0..n_vocab)
        .map(|token| {
            let mut bytes = Vec::new();
            // An end of generation is none of the answer's text, even where the vocabulary has it as plain text: a string
            // that allows any character must not allow to break off in its middle.
            let is_never = tokenizer.suppressed().contains(&(token as i32));
            if !is_never && !tokenizer.is_end_of_generation(token as i32) {
                tokenizer.token_bytes(token as i32, &mut bytes);
            }
            bytes
        })
        .collect();
    let ends: Vec<u32> = tokenizer.end_of_generation().iter().map(|end| end.cast_unsigned()).collect();
    let first = ends.first().copied().unwrap_or(llguidance::toktrie::INVALID_TOKEN);
    let trie = TokTrie::from(&TokRxInfo::new(n_vocab as u32, first), &words);
    if ends.is_empty() { trie } else { trie.with_eos_tokens(&ends) }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    /// The tokens that the model's own tokenizer makes of `bytes`. Where these are not a text, or come back with other bytes
    /// (some tokenizers put a blank in front), the longest tokens from left to right.
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        if bytes.len() <= MAX_TOKENIZED_BYTES
            && let Ok(text) = std::str::from_utf8(bytes)
            && let Ok(tokens) = self.tokenizer.tokenize(text, false, false)
        {
            let tokens: Vec<u32> = tokens.into_iter().map(i32::cast_unsigned).collect();
            if self.trie.decode_raw(&tokens) == bytes {
                return tokens;
            }
        }
        self.trie.greedy_tokenize(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::{self, END, SimConfig};

    #[test]
    fn every_token_has_its_bytes_and_the_end_of_generation_has_none() {
        let (loaded, info) = sim::load(SimConfig::default());
        let factory = factory(&loaded.tokenizer, info.n_vocab as usize).expect("a vocabulary of bytes");
        let trie = factory.tok_env().tok_trie();
        assert_eq!(trie.eos_tokens(), [END.cast_unsigned()]);
        assert_eq!(trie.token(u32::from(b'{')), b"{");
        assert_eq!(trie.token(END.cast_unsigned()), b"");
        assert_eq!(factory.tok_env().tokenize_bytes(b"\xff\x00a"), [255, 0, 97]);
    }
}
