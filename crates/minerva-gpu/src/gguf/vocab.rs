//! The vocabulary's rules: what llama.cpp's tokenizers take for granted about the arrays and ids in the metadata.
//!
//! Source: `llama_vocab::impl::load` and the tokenizers in `llama-vocab.cpp` at our pin.

use super::error::GgufError;
use super::limits::MAX_TOKEN_BYTES;
use super::metadata::Metadata;
use super::unique::UniqueStrings;
use super::value::{Array, StringArray, Value};

pub(super) const MODEL: &str = "tokenizer.ggml.model";
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const CHARACTER_MAP: &str = "tokenizer.ggml.precompiled_charsmap";
const SUPPRESSED: &str = "tokenizer.ggml.suppress_tokens";
pub(super) const BOS: &str = "tokenizer.ggml.bos_token_id";
pub(super) const EOS: &str = "tokenizer.ggml.eos_token_id";
pub(super) const PRE_TOKENIZER: &str = "tokenizer.ggml.pre";
pub(super) const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
pub(super) const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";

/// llama.cpp's `LLAMA_TOKEN_TYPE_BYTE`.
const BYTE_TOKEN: i32 = 6;

/// Ids of tokens that llama.cpp ignores, with a warning, where they are not in the vocabulary.
const TOKEN_IDS: [&str; 17] = [
    BOS,
    EOS,
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.seperator_token_id", // sic
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.fim_pre_token_id",
    "tokenizer.ggml.fim_suf_token_id",
    "tokenizer.ggml.fim_mid_token_id",
    "tokenizer.ggml.fim_pad_token_id",
    "tokenizer.ggml.fim_rep_token_id",
    "tokenizer.ggml.fim_sep_token_id",
    "tokenizer.ggml.prefix_token_id",
    "tokenizer.ggml.suffix_token_id",
    "tokenizer.ggml.middle_token_id",
];

/// Pre-tokenizers that put a BOS token in front unless the file says otherwise.
const PRE_TOKENIZERS_WITH_BOS: [&str; 11] = [
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
    "chameleon",
];

/// What a tokenizer assumes where the metadata says nothing.
pub(super) struct Defaults {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    separator: Option<u32>,
    pub(super) add_bos: bool,
    pub(super) add_eos: bool,
}

/// Checks the vocabulary, if the file has one.
pub(super) fn check(metadata: &Metadata) -> Result<(), GgufError> {
    let model = metadata.str(MODEL)?.unwrap_or_default();
    if matches!(model, "none" | "no_vocab") {
        return Ok(()); // llama.cpp reads nothing else
    }
    let Some(tokens) = metadata.strings(TOKENS)? else { return Ok(()) };
    if tokens.is_empty() {
        return Err(metadata.invalid(TOKENS, &"empty", "a vocabulary has tokens"));
    }
    check_tokens(metadata, tokens)?;
    check_scores(metadata, tokens.len())?;
    check_token_types(metadata, tokens.len(), model)?;
    metadata.strings(MERGES)?;
    check_character_map(metadata)?;
    if let Some(value) = metadata.get(SUPPRESSED)
        && !matches!(value, Value::Array(Array::I32(_)))
    {
        return Err(metadata.wrong_type(SUPPRESSED, "arr[i32]"));
    }
    check_token_ids(metadata, tokens.len() as u64)?;
    check_added_tokens(metadata, model, tokens.len() as u64)
}

/// Two tokens of one text abort llama.cpp, which cuts texts at a NUL and names empty ones `[EMPTY_7]`. Long ones overflow its
/// stack: its tries recurse once per byte.
fn check_tokens(metadata: &Metadata, tokens: &StringArray) -> Result<(), GgufError> {
    let has_nul = tokens.contains_byte(0);
    let mut seen = UniqueStrings::with_capacity(tokens.len());
    let mut empty = Vec::new();
    for (index, mut token) in tokens.iter().enumerate() {
        if has_nul && let Some(end) = token.iter().position(|&byte| byte == 0) {
            token = &token[..end];
        }
        if token.len() > MAX_TOKEN_BYTES {
            return Err(GgufError::TooLarge {
                field: format!("the length of token {index} in `{TOKENS}`"),
                offset: metadata.offset(TOKENS),
                given: token.len() as u64,
                limit: MAX_TOKEN_BYTES as u64,
            });
        }
        if token.is_empty() {
            empty.push(index);
        } else if !seen.insert(token) {
            return Err(duplicate(metadata, index, token));
        }
    }
    for index in empty {
        let stand_in = format!("[EMPTY_{index}]");
        if seen.contains(stand_in.as_bytes()) {
            return Err(duplicate(metadata, index, stand_in.as_bytes()));
        }
    }
    Ok(())
}

fn duplicate(metadata: &Metadata, index: usize, token: &[u8]) -> GgufError {
    GgufError::Duplicate {
        field: format!("token {index} of `{TOKENS}`, {:?},", String::from_utf8_lossy(token)),
        offset: metadata.offset(TOKENS),
    }
}

/// Scores may be longer than the list, as llama.cpp allows; shorter ones were read past their end by older versions.
fn check_scores(metadata: &Metadata, n_tokens: usize) -> Result<(), GgufError> {
    match metadata.get(SCORES) {
        None => Ok(()),
        Some(Value::Array(array @ (Array::F32(_) | Array::I32(_)))) => {
            at_least(metadata, SCORES, array.len(), n_tokens)
        }
        Some(_) => Err(metadata.wrong_type(SCORES, "arr[f32] or arr[i32]")),
    }
}

fn check_token_types(metadata: &Metadata, n_tokens: usize, model: &str) -> Result<(), GgufError> {
    let types = match metadata.get(TOKEN_TYPES) {
        None => return Ok(()),
        Some(Value::Array(Array::I32(types))) => types,
        Some(_) => return Err(metadata.wrong_type(TOKEN_TYPES, "arr[i32]")),
    };
    at_least(metadata, TOKEN_TYPES, types.len(), n_tokens)?;
    // llama.cpp aborts when it asks a WordPiece vocabulary for the byte of one.
    if model == "bert"
        && let Some(index) = types[..n_tokens].iter().position(|&token_type| token_type == BYTE_TOKEN)
    {
        let given = format!("{BYTE_TOKEN} for token {index}");
        return Err(metadata.invalid(TOKEN_TYPES, &given, "a `bert` vocabulary has no byte tokens"));
    }
    Ok(())
}

fn at_least(metadata: &Metadata, key: &str, n: usize, n_tokens: usize) -> Result<(), GgufError> {
    if n < n_tokens {
        return Err(metadata.invalid(key, &format!("{n} elements long"), format!("there are {n_tokens} tokens")));
    }
    Ok(())
}

/// The character map begins with the length of its first part, which must leave something for the second.
fn check_character_map(metadata: &Metadata) -> Result<(), GgufError> {
    let (head, n_bytes) = match metadata.get(CHARACTER_MAP) {
        None => return Ok(()),
        Some(Value::Array(Array::U8(bytes))) => (bytes.first_chunk::<4>().copied(), bytes.len()),
        Some(Value::Array(Array::I8(bytes))) => {
            (bytes.first_chunk::<4>().map(|head| head.map(i8::cast_unsigned)), bytes.len())
        }
        Some(_) => return Err(metadata.wrong_type(CHARACTER_MAP, "arr[u8] or arr[i8]")),
    };
    let first_part_bytes = head.map(|head| u64::from(u32::from_le_bytes(head)));
    if first_part_bytes.is_none_or(|first| first + 4 >= n_bytes as u64) {
        let given = format!("{n_bytes} bytes long");
        return Err(metadata.invalid(CHARACTER_MAP, &given, "its first part ends after that"));
    }
    Ok(())
}

/// Ids outside the vocabulary are in many real files, as 4294967295 for "none" or as the id of a token that was added later.
/// llama.cpp ignores them, so they are worth a line in the log, not an error.
fn check_token_ids(metadata: &Metadata, n_tokens: u64) -> Result<(), GgufError> {
    for key in TOKEN_IDS {
        if let Some(id) = metadata.u32(key)?
            && u64::from(id) >= n_tokens
            && id != u32::MAX
        {
            tracing::warn!("`{key}` is {id}, the vocabulary has {n_tokens} tokens: llama.cpp ignores it");
        }
    }
    Ok(())
}

/// A token that the tokenizer adds to every text must be there: llama.cpp aborts on the first text otherwise.
fn check_added_tokens(metadata: &Metadata, model: &str, n_tokens: u64) -> Result<(), GgufError> {
    let defaults = defaults(model, metadata.str(PRE_TOKENIZER)?.unwrap_or_default());
    let id = |key: &str, default: Option<u32>| -> Result<Option<u32>, GgufError> {
        let in_vocabulary = |id: &u32| u64::from(*id) < n_tokens;
        Ok(metadata.u32(key)?.filter(in_vocabulary).or(default.filter(in_vocabulary)))
    };
    let adds_start = metadata.bool(ADD_BOS)?.unwrap_or(defaults.add_bos);
    let adds_end = metadata.bool(ADD_EOS)?.unwrap_or(defaults.add_eos);
    let word_piece = model == "bert"; // adds both ends whatever the file says
    let unused = matches!(model, "rwkv" | "test"); // add nothing
    for (added, key, default) in [
        (adds_start && !unused || word_piece, TOKEN_IDS[0], defaults.bos),
        (adds_end && !unused && !word_piece, TOKEN_IDS[1], defaults.eos),
        (word_piece, TOKEN_IDS[5], defaults.separator),
    ] {
        if added && id(key, default)?.is_none() {
            let given = metadata.get(key).map_or_else(|| "missing".to_owned(), ToString::to_string);
            let rule = format!("the tokenizer adds this token and there are {n_tokens} tokens");
            return Err(metadata.invalid(key, &given, rule));
        }
    }
    Ok(())
}

pub(super) fn defaults(model: &str, pre_tokenizer: &str) -> Defaults {
    let none = Defaults { bos: None, eos: None, separator: None, add_bos: false, add_eos: false };
    match model {
        "llama" => Defaults { bos: Some(1), eos: Some(2), add_bos: true, ..none },
        "plamo2" => Defaults { bos: Some(1), eos: Some(2), ..none },
        "bert" => Defaults { bos: Some(101), separator: Some(102), add_bos: true, ..none },
        "t5" => Defaults { eos: Some(1), add_eos: true, ..none },
        "gpt2" | "hybriddna" | "whitespace" => {
            let add_bos = PRE_TOKENIZERS_WITH_BOS.contains(&pre_tokenizer);
            Defaults { bos: Some(11), eos: Some(11), add_bos, ..none }
        }
        "gemma4" => Defaults { add_bos: true, ..none },
        _ => none,
    }
}
