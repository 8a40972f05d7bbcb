//! Text to tokens and back.

use std::ffi::c_char;
use std::thread;

use crate::error::{CallError, call};
use crate::{Model, sys};

/// A token id.
#[doc(alias = "llama_token")]
pub type Token = sys::llama_token;

/// llama.cpp's splitters recurse once per character of a long run of one character class (upstream issues 27783 and
/// 27427: 26,000 to 131,000 characters end the process on an 8 MiB stack). A text longer than this is tokenized on a
/// thread whose stack grows with the text.
const LARGE_TEXT_BYTES: usize = 4 << 10;

/// Stack per byte of text: std::regex of libstdc++ takes up to about 600 bytes a character (measured in
/// tests/lifecycle.rs with runs of one letter), doubled. Only touched pages are ever backed by memory.
const STACK_PER_BYTE: usize = 1536;

impl Model {
    /// Tokens of `text`. `add_special` adds BOS and EOS where the model wants them; `parse_special` reads the text of
    /// control tokens as these tokens instead of as plain text.
    ///
    /// # Errors
    /// [`CallError`] when llama.cpp's tokenizer fails on the text.
    #[doc(alias = "llama_tokenize")]
    pub fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<Token>, CallError> {
        if !self.has_texts() {
            return Err(CallError::Argument("this model has no vocabulary: give it tokens instead of text".into()));
        }
        if text.len() <= LARGE_TEXT_BYTES {
            return self.tokenize_here(text, add_special, parse_special);
        }
        let stack_bytes = text.len().saturating_mul(STACK_PER_BYTE).saturating_add(1 << 20);
        thread::scope(|scope| {
            let worker = thread::Builder::new().name("minerva-tokenize".into()).stack_size(stack_bytes);
            match worker.spawn_scoped(scope, || self.tokenize_here(text, add_special, parse_special)) {
                Ok(handle) => {
                    handle.join().unwrap_or_else(|_| Err(CallError::Exception("the tokenizer panicked".into())))
                }
                Err(_) => Err(CallError::NoMemory),
            }
        })
    }

    fn tokenize_here(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<Token>, CallError> {
        let text_len = i32::try_from(text.len()).map_err(|_| {
            CallError::Argument(format!("a text of {} bytes is longer than {} bytes", text.len(), i32::MAX))
        })?;
        // A token covers at least one byte in almost every vocabulary; where not, the second round has the exact size.
        let mut tokens: Vec<Token> = vec![0; text.len() + 8];
        loop {
            let mut n = i32::try_from(tokens.len()).unwrap_or(i32::MAX);
            let room = n;
            // SAFETY: pointer and length of live buffers; `n` holds the room and receives the count.
            let status = call(|error| unsafe {
                sys::mnv_tokenize(
                    self.raw_vocab(),
                    text.as_ptr().cast::<c_char>(),
                    text_len,
                    tokens.as_mut_ptr(),
                    &raw mut n,
                    add_special,
                    parse_special,
                    error,
                )
            })?;
            let n_tokens = usize::try_from(n).unwrap_or(0);
            if status == sys::MNV_TOO_SMALL && n > room {
                tokens.resize(n_tokens, 0);
                continue;
            }
            tokens.truncate(n_tokens);
            tokens.shrink_to_fit();
            return Ok(tokens);
        }
    }

    /// Appends the bytes of one token to `out`; a token can be part of a character. `special` renders control tokens
    /// too, which are otherwise empty. An id outside the vocabulary appends nothing.
    #[doc(alias = "llama_token_to_piece")]
    pub fn token_bytes(&self, token: Token, special: bool, out: &mut Vec<u8>) {
        if !self.has_token(token) || !self.has_texts() {
            return;
        }
        let start = out.len();
        let mut room = 32;
        // Twice at most: the first answer says how much room the token needs.
        for _ in 0..2 {
            out.resize(start + room, 0);
            let mut n = i32::try_from(room).unwrap_or(i32::MAX);
            // SAFETY: the buffer has `n` bytes behind `start`; the token is in the vocabulary.
            let status = call(|error| unsafe {
                sys::mnv_token_to_piece(
                    self.raw_vocab(),
                    token,
                    out[start..].as_mut_ptr().cast::<c_char>(),
                    &raw mut n,
                    special,
                    error,
                )
            });
            let n_bytes = usize::try_from(n).unwrap_or(0);
            match status {
                Ok(sys::MNV_TOO_SMALL) => room = n_bytes,
                Ok(_) => return out.truncate(start + n_bytes),
                Err(_) => break,
            }
        }
        out.truncate(start);
    }

    /// Whether `token` is in the vocabulary.
    pub fn has_token(&self, token: Token) -> bool {
        usize::try_from(token).is_ok_and(|token| token < self.n_vocab())
    }

    /// Whether tokens stand for texts. A file may have none (`tokenizer.ggml.model` is `none`); llama.cpp aborts the process when
    /// such a vocabulary is asked about a token.
    #[doc(alias = "llama_vocab_type")]
    pub fn has_texts(&self) -> bool {
        // SAFETY: a live vocabulary.
        unsafe { sys::llama_vocab_type(self.raw_vocab()) != sys::LLAMA_VOCAB_TYPE_NONE }
    }

    /// Whether `token` ends a generation (EOS, end of turn and the like).
    #[doc(alias = "llama_vocab_is_eog")]
    pub fn is_end_of_generation(&self, token: Token) -> bool {
        // SAFETY: a live vocabulary; the token is checked, because llama.cpp indexes without a check.
        self.has_token(token) && self.has_texts() && unsafe { sys::llama_vocab_is_eog(self.raw_vocab(), token) }
    }

    /// Whether `token` is a control token, which has no text of its own.
    pub fn is_control(&self, token: Token) -> bool {
        // SAFETY: as above.
        self.has_token(token) && self.has_texts() && unsafe { sys::llama_vocab_is_control(self.raw_vocab(), token) }
    }

    /// Every token that ends a generation.
    pub fn end_of_generation_tokens(&self) -> Vec<Token> {
        let n_vocab = Token::try_from(self.n_vocab()).unwrap_or(Token::MAX);
        (0..n_vocab).filter(|&token| self.is_end_of_generation(token)).collect()
    }

    /// Tokens that the file says are never to be sampled (`tokenizer.ggml.suppress_tokens`), ascending.
    #[doc(alias = "llama_vocab_get_suppress_tokens")]
    pub fn suppressed_tokens(&self) -> Vec<Token> {
        let mut n = 0;
        // SAFETY: a live vocabulary; `n` receives the count.
        let tokens = unsafe { sys::llama_vocab_get_suppress_tokens(self.raw_vocab(), &raw mut n) };
        let n = usize::try_from(n).unwrap_or(0);
        if tokens.is_null() || n == 0 {
            return Vec::new();
        }
        // SAFETY: so many tokens, which live as long as the vocabulary.
        let listed = unsafe { std::slice::from_raw_parts(tokens, n) };
        let mut tokens: Vec<Token> = listed.iter().copied().filter(|&token| self.has_token(token)).collect();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    /// The token that begins a text, if the vocabulary has one.
    pub fn bos(&self) -> Option<Token> {
        // SAFETY: a live vocabulary.
        let token = unsafe { sys::llama_vocab_bos(self.raw_vocab()) };
        self.has_token(token).then_some(token)
    }

    /// Whether the tokenizer puts BOS before a text.
    pub fn adds_bos(&self) -> bool {
        // SAFETY: a live vocabulary.
        unsafe { sys::llama_vocab_get_add_bos(self.raw_vocab()) }
    }
}
