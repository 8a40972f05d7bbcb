//! Multi-token prediction (MTP, NextN): a layer behind the model's own that guesses the token after the next.
//!
//! It reads the hidden state after a token and the token that follows, has keys and values of its own, and shares the token table and
//! the output layer with the model. As its estimate counts them with the model, it is a model of one layer whose ends take nothing.
//!
//! Source: `graph_mtp` of each model in `src/models/` at the pinned release.

use super::LoadSettings;
use super::adapter::Adapters;
use super::model::{Layer, Memory, ModelShape};

/// Architectures whose heads are planned and used here.
const ARCHITECTURES: [&str; 2] = ["glm4moe", "deepseek2"];

/// What llama.cpp takes for granted of a head that it has loaded, or does not need to load a model without its head.
const NEEDED: [&str; 4] = ["nextn.eh_proj.weight", "nextn.enorm.weight", "nextn.hnorm.weight", "ffn_down_shexp.weight"];

/// The hidden states of a batch on the host, where they are read. llama.cpp's own figures leave them out.
pub(super) fn hidden_bytes(model: &ModelShape, settings: &LoadSettings) -> u64 {
    if !model.keeps_hidden && !model.is_head() {
        return 0;
    }
    model.n_embd.saturating_mul(4).saturating_mul(settings.rounded(model.causal).batch_tokens)
}

/// A model with a head that llama.cpp can compute.
#[derive(Debug, Clone)]
pub struct HeadShape {
    /// The model when its hidden states are read: rows are selected behind the last norm.
    pub model: ModelShape,
    /// The head as a model of one layer: its weights, its cells and its steps, without the ends that it shares with the model.
    pub head: ModelShape,
}

impl HeadShape {
    /// The head of a model, if it has one.
    pub fn of(model: &ModelShape) -> Option<Self> {
        Some(Self { model: ModelShape { keeps_hidden: true, ..model.clone() }, head: model.head()? })
    }
}

impl ModelShape {
    /// Layers of the file that predict further tokens, whether they can be used here ([`HeadShape::of`]) or not.
    pub fn n_head_layers(&self) -> u32 {
        self.n_layers_all - self.n_layers
    }

    fn head(&self) -> Option<Self> {
        let is_known = self.is_one_of(&ARCHITECTURES) && self.memory == Memory::Attention;
        if !is_known || !self.may_have_head || self.n_head_layers() != 1 {
            return None;
        }
        let layer = self.layers.get(self.n_layers as usize)?;
        let has = |name: &str| layer.has(&format!("{name}.weight"));
        let has_all = |names: &[&str]| names.iter().all(|name| has(name));
        let attends = if self.architecture == "deepseek2" {
            // llama.cpp computes such a head with compressed queries only, and without scaled ones.
            let is_scaled = self.flag("attention.temperature_scale") != 0.0;
            self.latent.is_some()
                && !is_scaled
                && !self.is_lite()
                && has_all(&["attn_q_a", "attn_q_b", "attn_k_b", "attn_v_b"])
        } else {
            // It takes the first layer's heads for the head's.
            let like_first = |n: fn(&Layer) -> [u64; 4]| self.layers.first().is_some_and(|first| n(first) == n(layer));
            self.latent.is_none()
                && (has("attn_qkv") || has_all(&["attn_q", "attn_k", "attn_v"]))
                && like_first(|layer| [layer.n_heads, layer.n_kv_heads, layer.head_k, layer.head_v])
        };
        let has_experts =
            has("ffn_down_exps") && (has_all(&["ffn_up_exps", "ffn_gate_exps"]) || has("ffn_gate_up_exps"));
        let reads_experts = self.n_dense_layers <= self.n_layers && self.n_experts > 0;
        let is_whole = NEEDED.iter().all(|name| layer.has(name)) && self.outside.contains_key("output_norm.weight");
        (attends && has_experts && reads_experts && is_whole).then(|| self.of_layer(layer))
    }

    /// Of such a `deepseek2` llama.cpp does not read that it compresses queries, which its head must.
    fn is_lite(&self) -> bool {
        self.architecture == "deepseek2"
            && (matches!(self.n_layers, 26 | 27) || self.n_layers == 48 && self.n_vocab == 128_256)
    }

    fn of_layer(&self, layer: &Layer) -> Self {
        let mut outside = self.outside.clone();
        for tensor in outside.values_mut() {
            tensor.bytes = 0;
        }
        let (layers, adapters) = (vec![layer.clone()], Adapters::default());
        Self { n_layers: 1, n_layers_all: 1, layers, outside, adapters, ..self.clone() }
    }

    /// Whether this is the head of another.
    pub(super) fn is_head(&self) -> bool {
        self.layers.first().is_some_and(|layer| layer.has("nextn.eh_proj.weight"))
    }
}
