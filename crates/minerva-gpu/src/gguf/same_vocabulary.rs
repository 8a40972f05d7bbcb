//! Whether two models speak of the same tokens, so that one can guess for the other.

use super::header::Header;
use super::metadata::Metadata;
use super::value::StringArray;
use super::vocab::{ADD_BOS, ADD_EOS, BOS, EOS, MODEL, PRE_TOKENIZER, TOKENS, defaults};

/// Vocabularies of one family differ by a few tokens at their end, which are padding or were added later.
///
/// Source: `SPEC_VOCAB_MAX_SIZE_DIFFERENCE` in llama.cpp's speculative.cpp.
pub const MAX_VOCABULARY_DIFFERENCE: usize = 128;

/// The first tokens are control tokens whose texts differ between versions of a model.
///
/// Source: `SPEC_VOCAB_CHECK_START_TOKEN_ID` in llama.cpp's speculative.cpp.
const FIRST_COMPARED: usize = 5;

/// How the vocabulary of a draft model differs from that of the main one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VocabularyMismatch {
    /// Two tokenizers.
    #[error("its tokenizer is `{draft}`, the main model's is `{main}`")]
    Tokenizer {
        /// Of the main model.
        main: String,
        /// Of the draft model.
        draft: String,
    },
    /// A token that begins or ends each text.
    #[error("it puts {draft} at the {end} of a text, the main model {main}")]
    Added {
        /// `beginning` or `end`.
        end: &'static str,
        /// What the main model puts there.
        main: String,
        /// What the draft model puts there.
        draft: String,
    },
    /// Two sizes.
    #[error(
        "it has {draft} tokens, the main model {main}: they may differ by {MAX_VOCABULARY_DIFFERENCE}, not by {}",
        main.abs_diff(*draft)
    )]
    Size {
        /// Tokens of the main model.
        main: usize,
        /// Tokens of the draft model.
        draft: usize,
    },
    /// One token with two texts.
    #[error("its token {token} is {draft:?}, the main model's is {main:?}")]
    Text {
        /// The first that differs.
        token: usize,
        /// The main model's text.
        main: String,
        /// The draft model's.
        draft: String,
    },
}

impl Header {
    /// Whether the model of `draft` can guess tokens for this one: the same tokenizer, the same tokens, and as many but for a few.
    ///
    /// # Errors
    /// [`VocabularyMismatch`]: the first difference that matters.
    pub fn check_same_vocabulary(&self, draft: &Self) -> Result<(), VocabularyMismatch> {
        let tokenizer = |header: &Self| text(&header.metadata, MODEL);
        let (main_kind, draft_kind) = (tokenizer(self), tokenizer(draft));
        if main_kind != draft_kind {
            return Err(VocabularyMismatch::Tokenizer { main: main_kind, draft: draft_kind });
        }
        for (end, is_start) in [("beginning", true), ("end", false)] {
            let (main, draft) = (added(&self.metadata, is_start), added(&draft.metadata, is_start));
            if main != draft {
                return Err(VocabularyMismatch::Added { end, main: named(main), draft: named(draft) });
            }
        }
        let (main_n, draft_n) = (self.n_tokens(), draft.n_tokens());
        if main_n.abs_diff(draft_n) > MAX_VOCABULARY_DIFFERENCE {
            return Err(VocabularyMismatch::Size { main: main_n, draft: draft_n });
        }
        let texts = |header: &'_ Self| header.metadata.strings(TOKENS).ok().flatten().cloned();
        let (Some(main), Some(draft)) = (texts(self), texts(draft)) else { return Ok(()) };
        let mut pairs = main.iter().zip(draft.iter()).enumerate().skip(FIRST_COMPARED);
        match pairs.find(|(_, (main, draft))| main != draft) {
            None => Ok(()),
            Some((token, (main, draft))) => {
                let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                Err(VocabularyMismatch::Text { token, main: lossy(main), draft: lossy(draft) })
            }
        }
    }

    /// Tokens of the vocabulary; of a model without one, rows of its output layer.
    fn n_tokens(&self) -> usize {
        let listed = self.metadata.strings(TOKENS).ok().flatten().map(StringArray::len);
        let named = || self.metadata.u32(&format!("{}.vocab_size", self.architecture())).ok().flatten();
        listed.or_else(|| named().map(|n| n as usize)).unwrap_or(0)
    }
}

fn text(metadata: &Metadata, key: &str) -> String {
    metadata.str(key).ok().flatten().unwrap_or_default().to_owned()
}

/// The token that the tokenizer puts at the beginning or at the end of a text, if it puts one there.
fn added(metadata: &Metadata, is_start: bool) -> Option<u32> {
    let defaults = defaults(&text(metadata, MODEL), &text(metadata, PRE_TOKENIZER));
    let (adds, adds_by_default, id, id_by_default) = if is_start {
        (ADD_BOS, defaults.add_bos, BOS, defaults.bos)
    } else {
        (ADD_EOS, defaults.add_eos, EOS, defaults.eos)
    };
    let adds = metadata.bool(adds).ok().flatten().unwrap_or(adds_by_default);
    metadata.u32(id).ok().flatten().or(id_by_default).filter(|_| adds)
}

fn named(token: Option<u32>) -> String {
    token.map_or_else(|| "nothing".to_owned(), |token| format!("token {token}"))
}

#[cfg(test)]
mod tests {
    use super::super::value::{Array, StringArray, Value};
    use super::super::writer::FileBuilder;
    use super::*;

    /// A vocabulary of texts.
    fn vocabulary(tokens: &[&str]) -> FileBuilder {
        let mut file = FileBuilder::new();
        let mut texts = StringArray::default();
        for token in tokens {
            texts.push(token.as_bytes());
        }
        file.set("general.architecture", "llama").set(MODEL, "gpt2").set(TOKENS, Value::Array(Array::String(texts)));
        file
    }

    fn header(file: &FileBuilder) -> Header {
        Header::parse(&file.header_bytes(), file.file_bytes()).unwrap()
    }

    const WORDS: [&str; 8] = ["<s>", "</s>", "<u>", "<p>", "<x>", "the", "cat", "sat"];

    #[test]
    fn the_same_tokens_with_other_control_texts_and_a_few_more_at_the_end_are_the_same_vocabulary() {
        let (main, mut longer) = (header(&vocabulary(&WORDS)), WORDS.to_vec());
        assert_eq!(main.check_same_vocabulary(&main), Ok(()));
        longer[0] = "<begin>";
        longer.push("on");
        let longer = header(&vocabulary(&longer));
        assert_eq!(main.check_same_vocabulary(&longer), Ok(()));
        assert_eq!(longer.check_same_vocabulary(&main), Ok(()));
    }

    #[test]
    fn each_difference_that_matters_has_its_name() {
        let main = header(&vocabulary(&WORDS));
        let problem = |file: &FileBuilder| main.check_same_vocabulary(&header(file)).unwrap_err().to_string();
        let mut other = vocabulary(&WORDS);
        assert_eq!(problem(other.set(MODEL, "llama")), "its tokenizer is `llama`, the main model's is `gpt2`");
        let mut other = vocabulary(&WORDS);
        other.set(ADD_BOS, true).set(BOS, 3_u32);
        assert_eq!(problem(&other), "it puts token 3 at the beginning of a text, the main model nothing");
        let mut words = WORDS;
        words[6] = "dog";
        assert_eq!(problem(&vocabulary(&words)), "its token 6 is \"dog\", the main model's is \"cat\"");
        let many: Vec<String> = (0..200).map(|i| format!("word{i}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(
            problem(&vocabulary(&many)),
            "it has 200 tokens, the main model 8: they may differ by 128, not by 192"
        );
    }

    #[test]
    fn without_texts_the_sizes_are_compared() {
        let size = |n: u32| {
            let mut file = FileBuilder::new();
            file.set("general.architecture", "llama").set(MODEL, "no_vocab").set("llama.vocab_size", n);
            header(&file)
        };
        assert_eq!(size(1000).check_same_vocabulary(&size(1128)), Ok(()));
        let problem = size(1000).check_same_vocabulary(&size(1129));
        assert_eq!(problem, Err(VocabularyMismatch::Size { main: 1000, draft: 1129 }));
    }
}
