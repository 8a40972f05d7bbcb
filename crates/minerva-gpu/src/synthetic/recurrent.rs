//! State-space models, and hybrids of them with attention.

use super::Draft;
use crate::gguf::{FileBuilder, GgmlType};

pub(super) fn shape(name: &str, n_layers: Option<u32>) -> Option<FileBuilder> {
    let file = match name {
        "mamba-2.8b-q8_0" => mamba(n_layers),
        "mamba2-2.7b-q8_0" => mamba2(n_layers),
        "jamba-mini-q4_0" => jamba(n_layers),
        "granitehybrid-7b-q4_0" => granite_hybrid(n_layers),
        _ => return None,
    };
    Some(file)
}

/// Sizes of a first-generation state-space layer.
#[derive(Clone, Copy)]
struct Scan {
    n_embd: u64,
    d_inner: u64,
    d_state: u64,
    dt_rank: u64,
    d_conv: u64,
}

fn scan_keys(draft: &mut Draft, [d_conv, d_inner, d_state, dt_rank]: [u32; 4]) {
    draft.key("ssm.conv_kernel", d_conv);
    draft.key("ssm.inner_size", d_inner);
    draft.key("ssm.state_size", d_state);
    draft.key("ssm.time_step_rank", dt_rank);
    draft.key("attention.layer_norm_rms_epsilon", 1e-5_f32);
}

fn scan_layer(draft: &mut Draft, layer: u32, sizes: Scan, has_norms: bool) {
    let Scan { n_embd, d_inner, d_state, dt_rank, d_conv } = sizes;
    let blk = |name: &str| format!("blk.{layer}.{name}");
    draft.matrix(&blk("ssm_in.weight"), &[n_embd, 2 * d_inner]);
    draft.vector(&blk("ssm_conv1d.weight"), &[d_conv, d_inner]);
    draft.vector(&blk("ssm_conv1d.bias"), &[d_inner]);
    draft.matrix(&blk("ssm_x.weight"), &[d_inner, dt_rank + 2 * d_state]);
    draft.matrix(&blk("ssm_dt.weight"), &[dt_rank, d_inner]);
    draft.vector(&blk("ssm_dt.bias"), &[d_inner]);
    draft.vector(&blk("ssm_a"), &[d_state, d_inner]);
    draft.vector(&blk("ssm_d"), &[d_inner]);
    draft.matrix(&blk("ssm_out.weight"), &[d_inner, n_embd]);
    if has_norms {
        for (name, n) in [("ssm_dt_norm", dt_rank), ("ssm_b_norm", d_state), ("ssm_c_norm", d_state)] {
            draft.vector(&blk(&format!("{name}.weight")), &[n]);
        }
    }
}

fn mamba(n_layers: Option<u32>) -> FileBuilder {
    let (all_layers, n_embd, n_vocab) = (64, 2560, 50_280);
    let n_layers = n_layers.unwrap_or(all_layers);
    let mut draft = Draft::new("mamba", GgmlType::Q8_0, n_layers, n_embd, n_vocab);
    scan_keys(&mut draft, [4, 5120, 16, 160]);
    draft.key("feed_forward_length", 0_u32);
    draft.key("attention.head_count", 0_u32);
    draft.ends(n_embd.into(), n_vocab.into(), true);
    let sizes = Scan { n_embd: n_embd.into(), d_inner: 5120, d_state: 16, dt_rank: 160, d_conv: 4 };
    for layer in 0..n_layers {
        draft.vector(&format!("blk.{layer}.attn_norm.weight"), &[n_embd.into()]);
        scan_layer(&mut draft, layer, sizes, false);
    }
    draft.file
}

/// A second-generation layer.
fn scan2_layer(draft: &mut Draft, layer: u32, n_embd: u64, [d_inner, d_state, n_heads, n_group]: [u64; 4]) {
    let blk = |name: &str| format!("blk.{layer}.{name}");
    let width = d_inner + 2 * n_group * d_state;
    draft.matrix(&blk("ssm_in.weight"), &[n_embd, d_inner + width + n_heads]);
    draft.vector(&blk("ssm_conv1d.weight"), &[4, width]);
    draft.vector(&blk("ssm_conv1d.bias"), &[width]);
    draft.vector(&blk("ssm_dt.bias"), &[n_heads]);
    draft.vector(&blk("ssm_a"), &[1, n_heads]);
    draft.vector(&blk("ssm_d"), &[1, n_heads]);
    draft.vector(&blk("ssm_norm.weight"), &[d_inner / n_group, n_group]);
    draft.matrix(&blk("ssm_out.weight"), &[d_inner, n_embd]);
}

fn mamba2(n_layers: Option<u32>) -> FileBuilder {
    let (all_layers, n_embd, n_vocab) = (64, 2560, 50_288);
    let n_layers = n_layers.unwrap_or(all_layers);
    let mut draft = Draft::new("mamba2", GgmlType::Q8_0, n_layers, n_embd, n_vocab);
    scan_keys(&mut draft, [4, 5120, 128, 80]);
    draft.key("ssm.group_count", 1_u32);
    draft.key("feed_forward_length", 0_u32);
    draft.key("attention.head_count", 0_u32);
    draft.ends(n_embd.into(), n_vocab.into(), true);
    for layer in 0..n_layers {
        draft.vector(&format!("blk.{layer}.attn_norm.weight"), &[n_embd.into()]);
        scan2_layer(&mut draft, layer, n_embd.into(), [5120, 128, 80, 1]);
    }
    draft.file
}

/// One layer in eight attends; every other one has experts.
fn jamba(n_layers: Option<u32>) -> FileBuilder {
    let (all_layers, n_embd, n_vocab, n_ff) = (16, 2048, 65_536, 7168_u32);
    let n_layers = n_layers.unwrap_or(all_layers);
    let mut draft = Draft::new("jamba", GgmlType::Q4_0, n_layers, n_embd, n_vocab);
    scan_keys(&mut draft, [4, 4096, 16, 128]);
    draft.key("feed_forward_length", n_ff);
    draft.key("attention.head_count", 32_u32);
    draft.key_per_layer("attention.head_count_kv", (0..n_layers).map(|layer| if layer % 8 == 4 { 8 } else { 0 }));
    draft.key("expert_count", 16_u32);
    draft.key("expert_used_count", 2_u32);
    draft.ends(n_embd.into(), n_vocab.into(), false);
    let sizes = Scan { n_embd: n_embd.into(), d_inner: 4096, d_state: 16, dt_rank: 128, d_conv: 4 };
    for layer in 0..n_layers {
        for name in ["attn_norm", "ffn_norm"] {
            draft.vector(&format!("blk.{layer}.{name}.weight"), &[n_embd.into()]);
        }
        if layer % 8 == 4 {
            draft.attention(layer, n_embd.into(), 32, 8, 64);
        } else {
            scan_layer(&mut draft, layer, sizes, true);
        }
        if layer % 2 == 1 {
            draft.experts(layer, n_embd.into(), n_ff.into(), 16);
        } else {
            draft.dense_feed_forward(layer, n_embd.into(), n_ff.into());
        }
    }
    draft.file
}

/// Second-generation layers, one in ten attends, experts with a shared one everywhere.
fn granite_hybrid(n_layers: Option<u32>) -> FileBuilder {
    let (all_layers, n_embd, n_vocab, n_ff) = (40, 1536, 100_352, 512_u32);
    let n_layers = n_layers.unwrap_or(all_layers);
    let mut draft = Draft::new("granitehybrid", GgmlType::Q4_0, n_layers, n_embd, n_vocab);
    scan_keys(&mut draft, [4, 3072, 128, 48]);
    draft.key("ssm.group_count", 1_u32);
    draft.key("feed_forward_length", n_ff);
    draft.key("attention.head_count", 12_u32);
    draft.key_per_layer("attention.head_count_kv", (0..n_layers).map(|layer| if layer % 10 == 5 { 4 } else { 0 }));
    draft.key("expert_count", 64_u32);
    draft.key("expert_used_count", 6_u32);
    draft.key("expert_shared_feed_forward_length", 1024_u32);
    draft.key("embedding_scale", 12.0_f32);
    draft.key("residual_scale", 0.22_f32);
    draft.key("logit_scale", 6.0_f32);
    draft.key("rope.scaling.finetuned", false);
    draft.ends(n_embd.into(), n_vocab.into(), true);
    for layer in 0..n_layers {
        for name in ["attn_norm", "ffn_norm"] {
            draft.vector(&format!("blk.{layer}.{name}.weight"), &[n_embd.into()]);
        }
        if layer % 10 == 5 {
            draft.attention(layer, n_embd.into(), 12, 4, 128);
        } else {
            scan2_layer(&mut draft, layer, n_embd.into(), [3072, 128, 48, 1]);
        }
        draft.experts(layer, n_embd.into(), n_ff.into(), 64);
        draft.shared_expert(layer, n_embd.into(), 1024);
    }
    draft.file
}
