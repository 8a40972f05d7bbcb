//! A bound on the scratch of encoders whose graphs are not written down.
//!
//! It is the sum of what such graphs are made of, each taken too large rather than too small:
//! - the layers, as those of any vision transformer, with masks, rotary positions and attention as asked for, or with stored scores where
//!   the kind computes attention itself; twice that, for what a kind's layers keep besides;
//! - every product and convolution outside the layers, as if none of their inputs and outputs were ever given back.

use super::encoder::{Layers, Norm, Rotary, Writer};
use super::shape::{Encoder, Picture};
use crate::estimate::graph::{Backend, Id, Op, reserve};
use crate::estimate::model::product;
use crate::gguf::{GgmlType, TensorInfo};

/// Kinds that compute attention, or a part of it, with stored scores whatever is asked for.
const STORES_SCORES: [&str; 8] =
    ["deepseekocr", "deepseekocr2", "gemma4a", "granite_speech", "granite4_vision", "lfm2a", "parakeet", "mimo_audio"];

/// Bytes on the device, if there is one besides the host (`n_backends` is 2), and on the host.
pub(super) fn scratch_bytes(encoder: &Encoder, picture: Picture, flash_attention: bool, n_backends: usize) -> Vec<u64> {
    let flash_attention = flash_attention && !STORES_SCORES.contains(&encoder.family.name);
    let layers = layers_bytes(encoder, picture, flash_attention);
    let outside =
        encoder.outside.values().fold(0, |sum: u64, tensor| sum.saturating_add(of_tensor(encoder, picture, tensor)));
    let n_positions = positions(encoder, picture);
    // What the host writes: the picture, positions in four dimensions, and masks of all against all for windows.
    let input = product(&[picture.width, picture.height, 3, 4])
        .saturating_add(product(&[n_positions, 64]))
        .saturating_add(product(&[n_positions, n_positions, 8]));
    // Where nothing is learned in layers, norms of what goes in are the most of it.
    let outside = if encoder.layers.is_empty() { outside.max(input).saturating_mul(4) } else { outside };
    let all = layers.saturating_mul(2).saturating_add(outside).saturating_add(input);
    if n_backends > 1 { vec![all, input] } else { vec![all] }
}

/// Positions that the layers see: patches and some tokens beside them, or half as many as there are frames.
fn positions(encoder: &Encoder, picture: Picture) -> u64 {
    if encoder.is_sound && !encoder.layers.is_empty() {
        picture.width / 2
    } else if encoder.is_sound {
        picture.width
    } else {
        encoder.patches(picture).saturating_add(16)
    }
}

/// Scratch of the layers alone.
fn layers_bytes(encoder: &Encoder, picture: Picture, flash_attention: bool) -> u64 {
    let n_positions = positions(encoder, picture);
    let mut writer = Writer::new(encoder, picture, flash_attention);
    let input = writer.graph.input(GgmlType::F32, [encoder.n_embd, n_positions, 1, 1]);
    let mut hidden: Id = writer.graph.like(Op::Other, input, &[]);
    let rotary = Rotary::Joint(writer.graph.input(GgmlType::I32, [n_positions.saturating_mul(4), 1, 1, 1]));
    let mask = writer.graph.input(GgmlType::F32, [n_positions, n_positions, 1, 1]);
    // Two layers with a mask and one without are as many as there need to be: each gives back what it took.
    let n_layers = encoder.layers.len().min(3);
    let masks = [Some(mask), Some(mask)];
    let layers = Layers { norm: Norm::Full, rotary: Some(rotary), masks: &masks };
    for il in 0..n_layers {
        hidden = writer.layer(il, hidden, layers);
    }
    writer.graph.expand(hidden);
    let host = Backend { alignment: 128, offload_from_tokens: None };
    reserve(writer.graph, &[host], false).iter().sum()
}

/// What goes into a product or a convolution outside the layers, and what comes out.
fn of_tensor(encoder: &Encoder, picture: Picture, tensor: &TensorInfo) -> u64 {
    let dim = |at: usize| tensor.dims.get(at).copied().unwrap_or(1);
    let n_pixels = product(&[picture.width, picture.height]);
    let n_positions = positions(encoder, picture);
    let is_table = ["position_embd", "pos_embed", "token_embd"].iter().any(|part| tensor.name.contains(part));
    match tensor.dims.len() {
        0 | 1 => 0,
        _ if is_table => product(&[dim(0), n_positions.max(dim(1)), 4]),
        // A row of the product holds as many elements as several positions, or one.
        2 => {
            let n_elements = product(&[n_positions, encoder.n_embd]);
            let n_rows = (n_elements / dim(0).max(1)).clamp(1, n_positions.max(1)).saturating_add(16);
            product(&[n_rows, dim(0).saturating_add(product(&[2, dim(1)])), 4])
        }
        // Patches: no pixel belongs to two of them.
        4 if tensor.name.contains("patch_embd") => {
            let n_inner = product(&[dim(0), dim(1), dim(2)]);
            let n_patches = n_pixels / product(&[dim(0), dim(1)]).max(1);
            product(&[n_patches, n_inner.saturating_add(product(&[3, dim(3)])), 4])
        }
        _ => {
            let n_inner = product(&tensor.dims[..tensor.dims.len() - 1]);
            let n_channels = tensor.dims.last().copied().unwrap_or(1);
            let n_outputs = match (encoder.is_sound, tensor.dims.len()) {
                (true, 4) if dim(2) > 1 => n_pixels / 16,
                (true, 4) => n_pixels / 4,
                (true, _) => picture.width, // over time alone
                (false, _) => n_positions,
            };
            product(&[n_outputs, n_inner.saturating_add(product(&[3, n_channels])), 4])
        }
    }
}
