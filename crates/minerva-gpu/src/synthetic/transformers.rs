//! Decoders with attention in every layer.

use super::Draft;
use crate::gguf::{FileBuilder, GgmlType};

/// Sizes that the families share; the fields are llama.cpp's hyperparameters.
#[derive(Clone, Copy)]
struct Sizes {
    architecture: &'static str,
    matrix_type: GgmlType,
    n_layers: u32,
    n_embd: u32,
    n_heads: u32,
    n_kv_heads: u32,
    head: u32,
    n_ff: u32,
    n_vocab: u32,
    tied: bool,
}

const fn sizes(
    architecture: &'static str,
    matrix_type: GgmlType,
    layers_embd_ff: [u32; 3],
    heads: [u32; 3],
    vocab: (u32, bool),
) -> Sizes {
    let [n_layers, n_embd, n_ff] = layers_embd_ff;
    let [n_heads, n_kv_heads, head] = heads;
    let (n_vocab, tied) = vocab;
    Sizes { architecture, matrix_type, n_layers, n_embd, n_heads, n_kv_heads, head, n_ff, n_vocab, tied }
}

pub(super) fn shape(name: &str, n_layers: Option<u32>) -> Option<FileBuilder> {
    use GgmlType::{Q4_0, Q8_0};
    let sizes = |architecture, matrix_type, layers_embd_ff, heads, vocab| {
        let all = sizes(architecture, matrix_type, layers_embd_ff, heads, vocab);
        Sizes { n_layers: n_layers.unwrap_or(all.n_layers), ..all }
    };
    let file = match name {
        "llama2-7b-q4_0" => dense(sizes("llama", Q4_0, [32, 4096, 11008], [32, 32, 128], (32_000, false))),
        "llama3-8b-q8_0" => dense(sizes("llama", Q8_0, [32, 4096, 14336], [32, 8, 128], (128_256, false))),
        "llama3-70b-q4_0" => dense(sizes("llama", Q4_0, [80, 8192, 28672], [64, 8, 128], (128_256, false))),
        "gemma-2b-q8_0" => dense(sizes("gemma", Q8_0, [18, 2048, 16384], [8, 1, 256], (256_000, true))),
        "gemma2-2b-q4_0" => gemma(sizes("gemma2", Q4_0, [26, 2304, 9216], [8, 4, 256], (256_000, true)), 4096, None),
        "gemma3-4b-q4_0" => gemma(sizes("gemma3", Q4_0, [34, 2560, 10240], [8, 4, 256], (262_144, true)), 1024, None),
        "gemma3-1b-all-windowed" => {
            gemma(sizes("gemma3", Q4_0, [26, 1152, 6912], [4, 1, 256], (262_144, true)), 512, Some(0))
        }
        "qwen2-1.5b-q4_0" => dense(sizes("qwen2", Q4_0, [28, 1536, 8960], [12, 2, 128], (151_936, true))),
        "qwen3-4b-q8_0" => dense(sizes("qwen3", Q8_0, [36, 2560, 9728], [32, 8, 128], (151_936, true))),
        "phi3-mini-q4_0" => phi3(sizes("phi3", Q4_0, [32, 3072, 8192], [32, 32, 96], (32_064, false))),
        "mixtral-8x7b-q4_0" => {
            experts(sizes("llama", Q4_0, [32, 4096, 14336], [32, 8, 128], (32_000, false)), 8, 2, 14336)
        }
        "qwen3moe-30b-q4_0" => {
            experts(sizes("qwen3moe", Q4_0, [48, 2048, 6144], [32, 4, 128], (151_936, false)), 128, 8, 768)
        }
        "qwen2moe-14b-q4_0" => {
            experts(sizes("qwen2moe", Q4_0, [24, 2048, 5632], [16, 16, 128], (151_936, false)), 60, 4, 1408)
        }
        "gpt-oss-20b-q4_0" => gpt_oss(sizes("gpt-oss", Q4_0, [24, 2880, 2880], [64, 8, 64], (201_088, false)), 32, 4),
        "glm4moe-106b-q4_0" => {
            glm4moe(sizes("glm4moe", Q4_0, [46, 4096, 10944], [96, 8, 128], (151_552, false)), 128, 8, 1408)
        }
        "glm4moe-106b-mtp-q4_0" => {
            let sizes = sizes("glm4moe", Q4_0, [47, 4096, 10944], [96, 8, 128], (151_552, false));
            with_head(glm4moe(sizes, 128, 8, 1408), sizes)
        }
        "deepseek2-lite-q4_0" => {
            deepseek2(sizes("deepseek2", Q4_0, [27, 2048, 10944], [16, 1, 576], (102_400, false)), None)
        }
        "deepseek2-mtp-q4_0" => {
            let sizes = sizes("deepseek2", Q4_0, [29, 2048, 10944], [16, 1, 576], (102_400, false));
            with_head(deepseek2(sizes, Some(1536)), sizes)
        }
        _ => return None,
    };
    Some(file)
}

fn begin(sizes: Sizes) -> Draft {
    let mut draft = Draft::new(sizes.architecture, sizes.matrix_type, sizes.n_layers, sizes.n_embd, sizes.n_vocab);
    draft.key("feed_forward_length", sizes.n_ff);
    draft.key("attention.head_count", sizes.n_heads);
    draft.key("attention.head_count_kv", sizes.n_kv_heads);
    draft.key("attention.key_length", sizes.head);
    draft.key("attention.value_length", sizes.head);
    draft.key("attention.layer_norm_rms_epsilon", 1e-5_f32);
    draft.key("rope.freq_base", 10_000.0_f32);
    draft.ends(sizes.n_embd.into(), sizes.n_vocab.into(), sizes.tied);
    draft
}

fn layer_start(draft: &mut Draft, sizes: Sizes, layer: u32) {
    let n_embd = sizes.n_embd.into();
    draft.vector(&format!("blk.{layer}.attn_norm.weight"), &[n_embd]);
    draft.attention(layer, n_embd, sizes.n_heads.into(), sizes.n_kv_heads.into(), sizes.head.into());
    let has_biases = ["qwen2", "qwen2moe", "gpt-oss", "glm4moe"].contains(&sizes.architecture);
    for (name, n_heads) in [("attn_q", sizes.n_heads), ("attn_k", sizes.n_kv_heads), ("attn_v", sizes.n_kv_heads)] {
        if has_biases {
            draft.vector(&format!("blk.{layer}.{name}.bias"), &[u64::from(n_heads) * u64::from(sizes.head)]);
        }
    }
    if ["qwen3", "qwen3moe", "gemma3"].contains(&sizes.architecture) {
        for name in ["attn_q_norm", "attn_k_norm"] {
            draft.vector(&format!("blk.{layer}.{name}.weight"), &[sizes.head.into()]);
        }
    }
}

fn dense(sizes: Sizes) -> FileBuilder {
    let mut draft = begin(sizes);
    for layer in 0..sizes.n_layers {
        layer_start(&mut draft, sizes, layer);
        draft.vector(&format!("blk.{layer}.ffn_norm.weight"), &[sizes.n_embd.into()]);
        draft.dense_feed_forward(layer, sizes.n_embd.into(), sizes.n_ff.into());
    }
    draft.file
}

/// Norms on both sides of each block, and windows.
fn gemma(sizes: Sizes, window_tokens: u32, period: Option<u32>) -> FileBuilder {
    let mut draft = begin(sizes);
    draft.key("attention.sliding_window", window_tokens);
    if let Some(period) = period {
        draft.key("attention.sliding_window_pattern", period);
    }
    if sizes.architecture == "gemma2" {
        draft.key("attn_logit_softcapping", 50.0_f32);
        draft.key("final_logit_softcapping", 30.0_f32);
    }
    for layer in 0..sizes.n_layers {
        layer_start(&mut draft, sizes, layer);
        for name in ["post_attention_norm", "ffn_norm", "post_ffw_norm"] {
            draft.vector(&format!("blk.{layer}.{name}.weight"), &[sizes.n_embd.into()]);
        }
        draft.dense_feed_forward(layer, sizes.n_embd.into(), sizes.n_ff.into());
    }
    draft.file
}

/// One matrix for queries, keys and values, one for up and gate.
fn phi3(sizes: Sizes) -> FileBuilder {
    let mut draft = begin(sizes);
    let (n_embd, n_ff) = (u64::from(sizes.n_embd), u64::from(sizes.n_ff));
    let head = u64::from(sizes.head);
    let n_qkv = (u64::from(sizes.n_heads) + 2 * u64::from(sizes.n_kv_heads)) * head;
    for layer in 0..sizes.n_layers {
        for name in ["attn_norm", "ffn_norm"] {
            draft.vector(&format!("blk.{layer}.{name}.weight"), &[n_embd]);
        }
        draft.matrix(&format!("blk.{layer}.attn_qkv.weight"), &[n_embd, n_qkv]);
        draft.matrix(&format!("blk.{layer}.attn_output.weight"), &[u64::from(sizes.n_heads) * head, n_embd]);
        draft.matrix(&format!("blk.{layer}.ffn_up.weight"), &[n_embd, 2 * n_ff]);
        draft.matrix(&format!("blk.{layer}.ffn_down.weight"), &[n_ff, n_embd]);
    }
    draft.file
}

fn experts(sizes: Sizes, n_experts: u32, n_used: u32, n_ff_expert: u32) -> FileBuilder {
    let mut draft = begin(sizes);
    draft.key("expert_count", n_experts);
    draft.key("expert_used_count", n_used);
    draft.key("expert_feed_forward_length", n_ff_expert);
    let has_shared = sizes.architecture == "qwen2moe";
    if has_shared {
        draft.key("expert_shared_feed_forward_length", sizes.n_ff);
    }
    for layer in 0..sizes.n_layers {
        layer_start(&mut draft, sizes, layer);
        draft.vector(&format!("blk.{layer}.ffn_norm.weight"), &[sizes.n_embd.into()]);
        draft.experts(layer, sizes.n_embd.into(), n_ff_expert.into(), n_experts.into());
        if has_shared {
            draft.vector(&format!("blk.{layer}.ffn_gate_inp_shexp.weight"), &[sizes.n_embd.into()]);
            draft.shared_expert(layer, sizes.n_embd.into(), sizes.n_ff.into());
        }
    }
    draft.file
}

/// Every other layer windowed, attention sinks, biases on everything.
fn gpt_oss(sizes: Sizes, n_experts: u32, n_used: u32) -> FileBuilder {
    let mut draft = begin(sizes);
    let (n_embd, n_ff, n_experts_wide) = (u64::from(sizes.n_embd), u64::from(sizes.n_ff), u64::from(n_experts));
    draft.key("attention.sliding_window", 128_u32);
    draft.key("expert_count", n_experts);
    draft.key("expert_used_count", n_used);
    draft.key("expert_feed_forward_length", sizes.n_ff);
    for layer in 0..sizes.n_layers {
        layer_start(&mut draft, sizes, layer);
        let blk = |name: &str| format!("blk.{layer}.{name}");
        draft.vector(&blk("attn_output.bias"), &[n_embd]);
        draft.vector(&blk("attn_sinks.weight"), &[sizes.n_heads.into()]);
        draft.vector(&blk("post_attention_norm.weight"), &[n_embd]);
        draft.experts(layer, n_embd, n_ff, n_experts_wide);
        draft.vector(&blk("ffn_gate_inp.bias"), &[n_experts_wide]);
        for (name, n) in [("ffn_gate_exps", n_ff), ("ffn_up_exps", n_ff), ("ffn_down_exps", n_embd)] {
            draft.vector(&blk(&format!("{name}.bias")), &[n, n_experts_wide]);
        }
    }
    draft.file
}

/// A dense first layer, then experts with a shared one beside them.
fn glm4moe(sizes: Sizes, n_experts: u32, n_used: u32, n_ff_expert: u32) -> FileBuilder {
    let mut draft = begin(sizes);
    let n_embd = u64::from(sizes.n_embd);
    draft.key("expert_count", n_experts);
    draft.key("expert_used_count", n_used);
    draft.key("expert_shared_count", 1_u32);
    draft.key("expert_feed_forward_length", n_ff_expert);
    draft.key("leading_dense_block_count", 1_u32);
    draft.key("expert_weights_norm", true);
    draft.key("expert_gating_func", 2_u32);
    for layer in 0..sizes.n_layers {
        layer_start(&mut draft, sizes, layer);
        draft.vector(&format!("blk.{layer}.post_attention_norm.weight"), &[n_embd]);
        if layer == 0 {
            draft.dense_feed_forward(layer, n_embd, sizes.n_ff.into());
        } else {
            draft.experts(layer, n_embd, n_ff_expert.into(), n_experts.into());
            draft.vector(&format!("blk.{layer}.exp_probs_b.bias"), &[n_experts.into()]);
            draft.shared_expert(layer, n_embd, n_ff_expert.into());
        }
    }
    draft.file
}

/// Compressed attention and shared experts.
///
/// Larger models compress queries too, to `q_rank` numbers.
fn deepseek2(sizes: Sizes, q_rank: Option<u32>) -> FileBuilder {
    let (rank, n_rot, nope, head_v) = (512_u32, 64_u32, 128_u32, 128_u32);
    let (n_experts, n_used, n_ff_expert, n_shared) = (64_u32, 6_u32, 1408_u32, 2_u32);
    let mut draft = begin(sizes);
    draft.key("attention.value_length", rank);
    draft.key("attention.key_length_mla", nope + n_rot);
    draft.key("attention.value_length_mla", head_v);
    draft.key("attention.kv_lora_rank", rank);
    draft.key("rope.dimension_count", n_rot);
    draft.key("expert_count", n_experts);
    draft.key("expert_used_count", n_used);
    draft.key("expert_shared_count", n_shared);
    draft.key("expert_feed_forward_length", n_ff_expert);
    draft.key("leading_dense_block_count", 1_u32);
    draft.key("expert_weights_scale", 1.0_f32);
    if let Some(q_rank) = q_rank {
        draft.key("attention.q_lora_rank", q_rank);
    }
    let (n_embd, n_heads) = (u64::from(sizes.n_embd), u64::from(sizes.n_heads));
    let [rank, n_rot, nope, head_v] = [rank, n_rot, nope, head_v].map(u64::from);
    for layer in 0..sizes.n_layers {
        let blk = |name: &str| format!("blk.{layer}.{name}.weight");
        draft.vector(&blk("attn_norm"), &[n_embd]);
        if let Some(q_rank) = q_rank {
            draft.matrix(&blk("attn_q_a"), &[n_embd, q_rank.into()]);
            draft.vector(&blk("attn_q_a_norm"), &[q_rank.into()]);
            draft.matrix(&blk("attn_q_b"), &[q_rank.into(), n_heads * (nope + n_rot)]);
        } else {
            draft.matrix(&blk("attn_q"), &[n_embd, n_heads * (nope + n_rot)]);
        }
        draft.matrix(&blk("attn_kv_a_mqa"), &[n_embd, rank + n_rot]);
        draft.vector(&blk("attn_kv_a_norm"), &[rank]);
        draft.matrix(&blk("attn_k_b"), &[nope, rank, n_heads]);
        draft.matrix(&blk("attn_v_b"), &[rank, head_v, n_heads]);
        draft.matrix(&blk("attn_output"), &[n_heads * head_v, n_embd]);
        draft.vector(&blk("ffn_norm"), &[n_embd]);
        if layer == 0 {
            draft.dense_feed_forward(layer, n_embd, sizes.n_ff.into());
        } else {
            draft.experts(layer, n_embd, n_ff_expert.into(), n_experts.into());
            draft.shared_expert(layer, n_embd, u64::from(n_ff_expert * n_shared));
        }
    }
    draft.file
}

/// A few experts beside a shared one in each layer, the last of which is a head.
pub(super) fn small_with_head(n_layers: u32, n_embd: u32, n_vocab: u32) -> FileBuilder {
    let sizes = sizes("glm4moe", GgmlType::F32, [n_layers, n_embd, n_embd], [2, 1, 64], (n_vocab, false));
    with_head(glm4moe(sizes, 4, 2, n_embd), sizes)
}

/// Makes the last layer a head that predicts a further token.
fn with_head(mut file: FileBuilder, sizes: Sizes) -> FileBuilder {
    let (layer, n_embd) = (sizes.n_layers - 1, u64::from(sizes.n_embd));
    file.set(&format!("{}.nextn_predict_layers", sizes.architecture), 1_u32);
    file.add_tensor(&format!("blk.{layer}.nextn.eh_proj.weight"), sizes.matrix_type, &[2 * n_embd, n_embd]);
    for name in ["enorm", "hnorm", "shared_head_norm"] {
        file.add_tensor(&format!("blk.{layer}.nextn.{name}.weight"), GgmlType::F32, &[n_embd]);
    }
    file
}
