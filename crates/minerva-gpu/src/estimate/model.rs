//! What a header says about the model: the sizes that memory depends on, with llama.cpp's defaults where a key is missing.

use std::collections::HashMap;

use super::EstimateError;
use super::adapter::Adapters;
use super::windows;
use crate::gguf::{Header, TensorInfo};

/// Layers that llama.cpp accepts (`LLAMA_MAX_LAYERS`).
pub(super) const MAX_LAYERS: u32 = 512;

/// The largest single size that is believed: ten times that of any model there is. Products of these stay in 64 bits.
const MAX_SIZE: u64 = 1 << 24;

/// The most elements of keys or values that one layer keeps for a token.
const MAX_WIDTH: u64 = 1 << 28;

/// Sizes of a model, per layer where layers differ.
#[derive(Debug, Clone)]
pub struct ModelShape {
    /// `general.architecture`.
    pub architecture: String,
    /// Layers that a step computes.
    pub n_layers: u32,
    /// Layers in the file: with those that predict further tokens.
    pub n_layers_all: u32,
    /// The context that the model was trained for, in tokens.
    pub context_train_tokens: u32,
    /// Width of the hidden state.
    pub n_embd: u64,
    /// Rows of the output layer.
    pub n_vocab: u64,
    /// Experts per layer; 0 for a dense model.
    pub n_experts: u32,
    /// Whether positions see only those before them.
    pub causal: bool,
    pub(super) layers: Vec<Layer>,
    pub(super) recurrent: Recurrent,
    pub(super) latent: Option<Latent>,
    pub(super) memory: Memory,
    pub(super) window_tokens: u64,
    /// Granite's hybrids switch rotary positions off with a key of another name.
    pub(super) rotates_nothing: bool,
    pub(super) n_expert_groups: u64,
    pub(super) n_groups_used: u64,
    pub(super) n_shared_kv_layers: u32,
    /// Layers without experts before the others.
    pub(super) n_dense_layers: u32,
    /// No key says what llama.cpp ends the process for when it computes a head.
    pub(super) may_have_head: bool,
    pub(super) outside: HashMap<String, TensorInfo>,
    pub(super) adapters: Adapters,
    /// Hidden states are read for a head.
    pub(super) keeps_hidden: bool,
    pub(super) flags: HashMap<&'static str, f32>,
}

/// One layer.
#[derive(Debug, Clone, Default)]
pub(super) struct Layer {
    pub(super) n_heads: u64,
    pub(super) n_kv_heads: u64,
    pub(super) head_k: u64,
    pub(super) head_v: u64,
    pub(super) n_experts_used: u64,
    pub(super) n_ff: u64,
    /// Attention sees only the last [`ModelShape::window_tokens`].
    pub(super) is_windowed: bool,
    pub(super) is_recurrent: bool,
    /// Its tensors, by the name behind `blk.N.`.
    pub(super) tensors: HashMap<String, TensorInfo>,
}

impl Layer {
    pub(super) fn k_width(&self) -> u64 {
        self.head_k * self.n_kv_heads
    }

    pub(super) fn v_width(&self) -> u64 {
        self.head_v * self.n_kv_heads
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}

/// What llama.cpp keeps of past tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    /// Nothing: embedding and diffusion models see the whole text at once.
    None,
    /// Keys and values of attention layers.
    Attention,
    /// A state per sequence.
    Recurrent,
    /// Both, each for its layers.
    Hybrid,
}

/// Compressed attention (MLA): one latent vector per token in place of all heads' keys and values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Latent {
    pub(super) head_k: u64,
    pub(super) head_v: u64,
}

/// Sizes of recurrent layers; zero where the architecture has none of that kind.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Recurrent {
    pub(super) d_conv: u64,
    pub(super) d_inner: u64,
    pub(super) d_state: u64,
    pub(super) dt_rank: u64,
    pub(super) n_group: u64,
    /// Elements of the convolution's (or token shift's) history, per sequence and layer.
    pub(super) history: u64,
    /// Elements of the state proper.
    pub(super) state: u64,
}

/// The last of llama.cpp's ways to choose experts (`llama_expert_gating_func_type`).
const MOST_GATING: u32 = 4;

/// Architectures without a cache (`llama_model::create_memory`).
const WITHOUT_MEMORY: [&str; 15] = [
    "bert",
    "jina-bert-v2",
    "jina-bert-v3",
    "nomic-bert",
    "nomic-bert-moe",
    "neo-bert",
    "eurobert",
    "wavtokenizer-dec",
    "modern-bert",
    "gemma-embedding",
    "dream",
    "llada",
    "llada-moe",
    "rnd1",
    "clef",
];

/// `llm_arch_is_recurrent`.
const RECURRENT: [&str; 6] = ["mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"];

/// `llm_arch_is_hybrid`.
const HYBRID: [&str; 18] = [
    "jamba",
    "falcon-h1",
    "plamo2",
    "granitehybrid",
    "lfm2",
    "lfm2moe",
    "nemotron_h",
    "nemotron_h_moe",
    "qwen3next",
    "kimi-linear",
    "bailingmoe3",
    "kimi-k3",
    "glm5-next",
    "qwen35",
    "qwen35moe",
    "qwen4exp",
    "deepseek4",
    "minimax-01",
];

/// Hybrids whose attention layers come at a fixed interval instead of being those with KV heads.
const ATTENTION_AT_INTERVALS: [&str; 5] = ["qwen3next", "qwen35", "qwen35moe", "qwen4exp", "minimax-01"];

impl ModelShape {
    /// Reads the sizes from a header that passed its checks.
    ///
    /// # Errors
    /// [`EstimateError`] when a size is missing or cannot be.
    pub fn of(header: &Header) -> Result<Self, EstimateError> {
        Reader { header, architecture: header.architecture() }.model()
    }

    /// A number of the header that switches an operation on; 0 without it.
    pub(super) fn flag(&self, name: &str) -> f32 {
        self.flags.get(name).copied().unwrap_or(0.0)
    }

    pub(super) fn is_one_of(&self, architectures: &[&str]) -> bool {
        architectures.contains(&self.architecture.as_str())
    }

    /// Whether the output layer is the token table.
    pub(super) fn is_tied(&self) -> bool {
        self.has_output()
            && !self.outside.contains_key("output.weight")
            && self.outside.contains_key("token_embd.weight")
    }

    /// Whether some layers see only a window of past tokens.
    pub fn has_windows(&self) -> bool {
        self.window_tokens > 0
    }

    /// Whether each token of the past has a cell of its own, so that a sequence can be cut anywhere: no recurrent states.
    pub fn can_be_cut(&self) -> bool {
        self.memory == Memory::Attention
    }

    /// Bytes of each layer's experts.
    pub(crate) fn expert_bytes(&self) -> impl Iterator<Item = u64> + '_ {
        self.layers.iter().map(|layer| {
            let experts = layer.tensors.iter().filter(|(name, _)| super::placement::is_expert(name));
            experts.map(|(_, tensor)| tensor.bytes).sum()
        })
    }

    /// Encoders end with their last layer.
    pub(super) fn has_output(&self) -> bool {
        self.memory != Memory::None || self.outside.contains_key("output_norm.weight")
    }

    /// Layers that attend, with keys and values of their own.
    pub(super) fn has_cells(&self, il: u32) -> bool {
        let is_own = self.n_shared_kv_layers == 0 || il < self.n_layers_all - self.n_shared_kv_layers;
        let layer = &self.layers[il as usize];
        let attends = match self.memory {
            Memory::None | Memory::Recurrent => false,
            Memory::Attention => true,
            Memory::Hybrid if self.architecture == "falcon-h1" => true,
            Memory::Hybrid => !layer.is_recurrent && (layer.n_ff == 0 || !self.architecture.starts_with("nemotron_h")),
        };
        attends && is_own && il < self.n_layers
    }

    /// Layers that keep a recurrent state.
    pub(super) fn has_state(&self, il: u32) -> bool {
        match self.memory {
            Memory::None | Memory::Attention => false,
            Memory::Recurrent => il < self.n_layers,
            Memory::Hybrid if self.architecture == "falcon-h1" => true,
            Memory::Hybrid => self.layers[il as usize].is_recurrent && il < self.n_layers,
        }
    }
}

struct Reader<'a> {
    header: &'a Header,
    architecture: &'a str,
}

impl Reader<'_> {
    fn model(&self) -> Result<ModelShape, EstimateError> {
        let n_layers_all = self.required("block_count")?;
        if n_layers_all == 0 || n_layers_all > MAX_LAYERS {
            return Err(EstimateError::Size {
                key: self.key("block_count"),
                value: n_layers_all.into(),
                limit: MAX_LAYERS.into(),
            });
        }
        let n_further = self.number("nextn_predict_layers")?.unwrap_or(0);
        let n_layers = n_layers_all.checked_sub(n_further).filter(|&n| n > 0).unwrap_or(n_layers_all);
        let memory = match self.architecture {
            architecture if WITHOUT_MEMORY.contains(&architecture) => Memory::None,
            architecture if RECURRENT.contains(&architecture) => Memory::Recurrent,
            architecture if HYBRID.contains(&architecture) => Memory::Hybrid,
            _ => Memory::Attention,
        };
        let n_embd = self.required("embedding_length")?.into();
        let mut layers = self.layers(n_layers_all, n_layers, n_embd, memory)?;
        let window_tokens = windows::apply(self.architecture, &self.header.metadata, &mut layers, n_layers)?;
        let mut outside = HashMap::new();
        for tensor in &self.header.tensors {
            match layer_and_name(&tensor.name) {
                Some((il, name)) if il < layers.len() => {
                    layers[il].tensors.insert(name.to_owned(), tensor.clone());
                }
                _ => {
                    outside.insert(tensor.name.clone(), tensor.clone());
                }
            }
        }
        let recurrent = self.recurrent(n_embd, &layers)?;
        let latent = self.latent()?;
        self.check(n_embd, &layers, recurrent, latent)?;
        Ok(ModelShape {
            architecture: self.architecture.to_owned(),
            n_layers,
            n_layers_all,
            context_train_tokens: self.number("context_length")?.unwrap_or(0),
            n_embd,
            n_vocab: self.n_vocab(&outside)?,
            n_experts: self.number("expert_count")?.unwrap_or(0),
            causal: self.flag("attention.causal")?.unwrap_or(memory != Memory::None),
            recurrent,
            latent,
            memory,
            window_tokens,
            rotates_nothing: self.architecture == "granitehybrid"
                && self.flag("rope.scaling.finetuned")? == Some(false),
            n_expert_groups: self.number("expert_group_count")?.unwrap_or(0).into(),
            n_groups_used: self.number("expert_group_used_count")?.unwrap_or(0).into(),
            n_shared_kv_layers: self.number("attention.shared_kv_layers")?.unwrap_or(0).min(n_layers_all - 1),
            n_dense_layers: self.number("leading_dense_block_count")?.unwrap_or(0),
            may_have_head: self.may_have_head(n_embd)?,
            flags: self.flags()?,
            layers,
            outside,
            adapters: Adapters::default(),
            keeps_hidden: false,
        })
    }

    /// A file can claim anything; what no model has is an error before it is a multiplication.
    fn check(
        &self,
        n_embd: u64,
        layers: &[Layer],
        recurrent: Recurrent,
        latent: Option<Latent>,
    ) -> Result<(), EstimateError> {
        let check = |name: &str, value: u64, limit: u64| {
            if value <= limit { Ok(()) } else { Err(EstimateError::Size { key: self.key(name), value, limit }) }
        };
        check("embedding_length", n_embd, MAX_SIZE)?;
        for layer in layers {
            check("attention.head_count", layer.n_heads.max(layer.n_kv_heads), MAX_SIZE)?;
            check("attention.key_length", layer.head_k.max(layer.head_v), MAX_SIZE)?;
            check("attention.head_count", layer.n_heads * layer.head_k.max(layer.head_v), MAX_WIDTH)?;
            check("attention.head_count_kv", layer.k_width().max(layer.v_width()), MAX_WIDTH)?;
            check("expert_used_count", layer.n_experts_used, 1 << 16)?;
        }
        let Recurrent { d_conv, d_inner, d_state, dt_rank, n_group, history, state } = recurrent;
        check("ssm.inner_size", d_conv.max(d_inner).max(d_state).max(dt_rank).max(n_group), MAX_SIZE)?;
        check("ssm.state_size", history.max(state).max(n_group * d_state), MAX_WIDTH)?;
        if let Some(latent) = latent {
            check("attention.key_length_mla", latent.head_k.max(latent.head_v), MAX_SIZE)?;
        }
        Ok(())
    }

    fn layers(&self, n_all: u32, n_layers: u32, n_embd: u64, memory: Memory) -> Result<Vec<Layer>, EstimateError> {
        let n_heads = self.per_layer("attention.head_count", n_all)?.unwrap_or_else(|| vec![0; n_all as usize]);
        let n_kv_heads = self.per_layer("attention.head_count_kv", n_all)?.unwrap_or_else(|| n_heads.clone());
        let n_experts_used = self.per_layer("expert_used_count", n_all)?.unwrap_or_else(|| vec![0; n_all as usize]);
        let n_ff = self.per_layer("feed_forward_length", n_all)?.unwrap_or_else(|| vec![0; n_all as usize]);
        let default_head = n_heads.first().filter(|&&n| n > 0).map_or(0, |&n| n_embd / u64::from(n));
        let head_k = self.number("attention.key_length")?.map_or(default_head, u64::from);
        let head_v = self.number("attention.value_length")?.map_or(default_head, u64::from);
        let interval = self.number("full_attention_interval")?.filter(|&n| n > 0).unwrap_or(4);
        let layers = (0..n_all).map(|il| {
            let index = il as usize;
            let is_recurrent = match memory {
                Memory::None | Memory::Attention => false,
                Memory::Recurrent => true,
                Memory::Hybrid if ATTENTION_AT_INTERVALS.contains(&self.architecture) => {
                    il < n_layers && !(il + 1).is_multiple_of(interval)
                }
                Memory::Hybrid if self.architecture.starts_with("nemotron_h") => {
                    n_kv_heads[index] == 0 && n_ff[index] == 0
                }
                Memory::Hybrid => n_kv_heads[index] == 0,
            };
            Layer {
                n_heads: n_heads[index].into(),
                n_kv_heads: n_kv_heads[index].into(),
                head_k,
                head_v,
                n_experts_used: n_experts_used[index].into(),
                n_ff: n_ff[index].into(),
                is_recurrent,
                ..Layer::default()
            }
        });
        Ok(layers.collect())
    }

    fn n_vocab(&self, outside: &HashMap<String, TensorInfo>) -> Result<u64, EstimateError> {
        let rows =
            ["output.weight", "token_embd.weight"].iter().find_map(|name| outside.get(*name)?.dims.get(1).copied());
        match rows {
            Some(rows) => Ok(rows),
            None => Ok(self.number("vocab_size")?.unwrap_or(0).into()),
        }
    }

    fn latent(&self) -> Result<Option<Latent>, EstimateError> {
        let (Some(head_k), Some(head_v)) =
            (self.number("attention.key_length_mla")?, self.number("attention.value_length_mla")?)
        else {
            return Ok(None);
        };
        Ok(Some(Latent { head_k: head_k.into(), head_v: head_v.into() }))
    }

    /// `llama_hparams::n_embd_r` and `n_embd_s`.
    fn recurrent(&self, n_embd: u64, layers: &[Layer]) -> Result<Recurrent, EstimateError> {
        let size = |key| Ok::<u64, EstimateError>(self.number(key)?.unwrap_or(0).into());
        let mut sizes = Recurrent {
            d_conv: size("ssm.conv_kernel")?,
            d_inner: size("ssm.inner_size")?,
            d_state: size("ssm.state_size")?,
            dt_rank: size("ssm.time_step_rank")?,
            n_group: size("ssm.group_count")?,
            ..Recurrent::default()
        };
        let n_heads = layers.iter().map(|layer| layer.n_heads).max().unwrap_or(0);
        let (wkv, shortconv, kda) = (size("wkv.head_size")?, size("shortconv.l_cache")?, size("kda.head_dim")?);
        let n_conv = sizes.d_conv.saturating_sub(1);
        (sizes.history, sizes.state) = if wkv != 0 {
            (size("token_shift_count")?.max(2).saturating_mul(n_embd), n_embd.saturating_mul(wkv))
        } else if shortconv != 0 {
            (n_embd.saturating_mul(shortconv - 1), 0)
        } else if kda != 0 {
            let kernel = if sizes.d_conv > 0 { n_conv } else { 3 };
            (product(&[3, kernel, n_heads, kda]), product(&[kda, kda, n_heads]))
        } else if self.architecture == "minimax-01" {
            let head = layers.first().map_or(0, |layer| layer.head_k);
            (0, product(&[head, head, n_heads]))
        } else {
            let width = sizes.d_inner.saturating_add((2 * sizes.n_group).saturating_mul(sizes.d_state));
            (n_conv.saturating_mul(width), sizes.d_state.saturating_mul(sizes.d_inner))
        };
        Ok(sizes)
    }

    /// Switches that add an operation to the graph.
    fn flags(&self) -> Result<HashMap<&'static str, f32>, EstimateError> {
        const KEYS: [&str; 7] = [
            "embedding_scale",
            "residual_scale",
            "logit_scale",
            "final_logit_softcapping",
            "attn_logit_softcapping",
            "expert_weights_scale",
            "attention.temperature_scale",
        ];
        let mut flags = HashMap::new();
        for key in KEYS {
            if let Some(value) = self.header.metadata.f32(&self.key(key))? {
                flags.insert(key, value);
            }
        }
        if let Some(normed) = self.flag("expert_weights_norm")? {
            flags.insert("expert_weights_norm", f32::from(u8::from(normed)));
        }
        if let Some(gate) = self.number("expert_gating_func")? {
            #[allow(clippy::cast_precision_loss, reason = "one of four codes")]
            flags.insert("expert_gating_func", gate as f32);
        }
        Ok(flags)
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// Heads read states as wide as the model is, from each token, with one position a token; and experts are chosen in one of four ways.
    fn may_have_head(&self, n_embd: u64) -> Result<bool, EstimateError> {
        let width = self.number("embedding_length_out")?.unwrap_or(0);
        let has_sections = self.header.metadata.get(&self.key("rope.dimension_sections")).is_some();
        let (pooling, gating) = (self.number("pooling_type")?, self.number("expert_gating_func")?);
        let has_width = width == 0 || u64::from(width) == n_embd;
        let has_rank =
            self.architecture != "deepseek2" || self.number("attention.q_lora_rank")?.is_some_and(|rank| rank > 0);
        Ok(has_width && has_rank && !has_sections && pooling.unwrap_or(0) == 0 && gating.unwrap_or(0) <= MOST_GATING)
    }

    fn number(&self, name: &str) -> Result<Option<u32>, EstimateError> {
        Ok(self.header.metadata.u32(&self.key(name))?)
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, EstimateError> {
        Ok(self.header.metadata.bool(&self.key(name))?)
    }

    fn required(&self, name: &str) -> Result<u32, EstimateError> {
        self.number(name)?.ok_or_else(|| EstimateError::Missing { key: self.key(name) })
    }

    fn per_layer(&self, name: &str, n_layers: u32) -> Result<Option<Vec<u32>>, EstimateError> {
        Ok(self.header.metadata.u32_per_layer(&self.key(name), n_layers)?)
    }
}

pub(super) fn product(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |product: u64, &factor| product.saturating_mul(factor))
}

/// `blk.7.attn_q.weight` is layer 7's `attn_q.weight`.
pub(super) fn layer_and_name(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}
