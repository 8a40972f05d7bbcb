//! A small model whose answers are known: each byte is followed by another, by a fixed rule, and its head for multi-token prediction
//! knows that too. Its layers compute, and add nothing.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use super::transformers;
use crate::gguf::{Array, FileBuilder, GgmlType, Header, StringArray, TensorInfo, Value};

const N_EMBD: u32 = 128;

/// Tokens before those of the bytes: unknown, beginning, end.
const N_CONTROL: u32 = 3;

const N_VOCAB: u32 = N_CONTROL + 256;

/// What the head guesses from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainHead {
    /// The token that follows, so that it can go on from its own guesses.
    Token,
    /// The hidden state of the model, so that only its first guess is right.
    Hidden,
}

/// The token that the model says after `token`; the rule runs through all bytes.
pub fn following_in_chain(token: u32) -> u32 {
    let byte = token.saturating_sub(N_CONTROL);
    N_CONTROL + (5 * byte + 7) % 256
}

/// Writes the model with `n_layers` layers and a head behind them.
///
/// # Errors
/// What the system says; the file is then unfinished.
pub fn write_chain(path: &Path, n_layers: u32, head: ChainHead) -> io::Result<()> {
    let file = header(n_layers, head);
    file.write_header_only(path)?;
    let header = Header::parse(&file.header_bytes(), file.file_bytes()).map_err(io::Error::other)?;
    let mut writer = File::options().write(true).open(path)?;
    for tensor in &header.tensors {
        let numbers = numbers(tensor, head);
        if numbers.is_empty() {
            continue; // zeros, as the file has them already
        }
        writer.seek(SeekFrom::Start(header.data_offset + tensor.offset))?;
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        writer.write_all(&bytes)?;
    }
    Ok(())
}

fn header(n_layers: u32, head: ChainHead) -> FileBuilder {
    let mut file = transformers::small_with_head(n_layers + 1, N_EMBD, N_VOCAB);
    let bytes = (0..=255_u8).map(|byte| format!("<0x{byte:02X}>"));
    let tokens: StringArray = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().chain(bytes).collect();
    let types = [2, 3, 3].into_iter().chain([6; 256]);
    file.set("tokenizer.ggml.model", "llama".to_owned())
        .set("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)))
        .set("tokenizer.ggml.scores", Value::Array(Array::F32(vec![0.0; N_VOCAB as usize])))
        .set("tokenizer.ggml.token_type", Value::Array(Array::I32(types.collect())))
        .set("tokenizer.ggml.add_bos_token", false);
    if head == ChainHead::Hidden {
        let dims = [N_EMBD.into(), N_VOCAB.into()];
        file.add_tensor(&format!("blk.{n_layers}.nextn.shared_head_head.weight"), GgmlType::F32, &dims);
    }
    file
}

/// What a tensor holds; nothing for zeros.
fn numbers(tensor: &TensorInfo, head: ChainHead) -> Vec<f32> {
    let n_embd = N_EMBD as usize;
    let name = tensor.name.as_str();
    if name == "token_embd.weight" {
        return (0..N_VOCAB).flat_map(row).collect();
    }
    if name == "output.weight" {
        return rows_said_after(following_in_chain);
    }
    if name.ends_with("shared_head_head.weight") {
        return rows_said_after(|token| following_in_chain(following_in_chain(token)));
    }
    if name.ends_with("norm.weight") {
        return vec![1.0; n_embd];
    }
    if name.ends_with("eh_proj.weight") {
        let from = if head == ChainHead::Token { 0 } else { n_embd };
        let mut matrix = vec![0.0; 2 * n_embd * n_embd];
        (0..n_embd).for_each(|i| matrix[i * 2 * n_embd + from + i] = 1.0);
        return matrix;
    }
    Vec::new()
}

/// An output layer for which the token likeliest after `token` is `said(token)`.
fn rows_said_after(said: impl Fn(u32) -> u32) -> Vec<f32> {
    let n_embd = N_EMBD as usize;
    let mut rows = vec![0.0; N_VOCAB as usize * n_embd];
    for token in N_CONTROL..N_VOCAB {
        let at = said(token) as usize * n_embd;
        rows[at..at + n_embd].copy_from_slice(&row(token).collect::<Vec<f32>>());
    }
    rows
}

/// A row of the token table: numbers by chance, so that no row is like another.
fn row(token: u32) -> impl Iterator<Item = f32> {
    (0..N_EMBD).map(move |i| {
        // SplitMix64 by Steele, Lea and Flood.
        let mut x = (u64::from(token) << 32 | u64::from(i)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 40) as f32 / (1_u32 << 24) as f32 - 0.5
    })
}
