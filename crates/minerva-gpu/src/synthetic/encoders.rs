//! Embedding models.

use super::Draft;
use crate::gguf::{FileBuilder, GgmlType};

pub(super) fn shape(name: &str, n_layers: Option<u32>) -> Option<FileBuilder> {
    match name {
        "bert-base-f16" => Some(encoder("bert", n_layers)),
        "nomic-bert-f16" => Some(encoder("nomic-bert", n_layers)),
        _ => None,
    }
}

fn encoder(architecture: &'static str, n_layers: Option<u32>) -> FileBuilder {
    let (all_layers, n_embd, n_vocab, n_ff) = (12, 768, 30_522, 3072_u32);
    let n_layers = n_layers.unwrap_or(all_layers);
    let is_nomic = architecture == "nomic-bert";
    let mut draft = Draft::new(architecture, GgmlType::F16, n_layers, n_embd, n_vocab);
    draft.key("context_length", 512_u32);
    draft.key("feed_forward_length", n_ff);
    draft.key("attention.head_count", 12_u32);
    draft.key("attention.layer_norm_epsilon", 1e-12_f32);
    draft.key("attention.causal", false);
    draft.key("pooling_type", 1_u32);
    draft.file.set("tokenizer.ggml.token_type_count", 2_u32);
    let (n_embd, n_ff) = (u64::from(n_embd), u64::from(n_ff));
    draft.matrix("token_embd.weight", &[n_embd, n_vocab.into()]);
    draft.vector("token_types.weight", &[n_embd, 2]);
    if !is_nomic {
        draft.vector("position_embd.weight", &[n_embd, 512]);
    }
    for suffix in ["weight", "bias"] {
        draft.vector(&format!("token_embd_norm.{suffix}"), &[n_embd]);
    }
    for layer in 0..n_layers {
        let blk = |name: &str| format!("blk.{layer}.{name}");
        if is_nomic {
            draft.matrix(&blk("attn_qkv.weight"), &[n_embd, 3 * n_embd]);
            draft.matrix(&blk("attn_output.weight"), &[n_embd, n_embd]);
            draft.dense_feed_forward(layer, n_embd, n_ff);
        } else {
            draft.attention(layer, n_embd, 12, 12, 64);
            for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_down"] {
                draft.vector(&blk(&format!("{name}.bias")), &[n_embd]);
            }
            draft.matrix(&blk("ffn_up.weight"), &[n_embd, n_ff]);
            draft.vector(&blk("ffn_up.bias"), &[n_ff]);
            draft.matrix(&blk("ffn_down.weight"), &[n_ff, n_embd]);
        }
        for name in ["attn_output_norm", "layer_output_norm"] {
            for suffix in ["weight", "bias"] {
                draft.vector(&blk(&format!("{name}.{suffix}")), &[n_embd]);
            }
        }
    }
    draft.file
}
