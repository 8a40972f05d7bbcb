//! Multi-token prediction (MTP, NextN): a layer behind the model's own that guesses the token after the next.
//!
//! It reads the hidden state after a token and the token that follows, has keys and values of its own, and shares the token table and
//! the output layer with the model. As its estimate counts them with the model, it is a model of one layer whose ends take nothing.
//!
//! Source: `graph_mtp` of each model in `src/models/` at the pinned release.

use super::LoadSettings;
use super::adapter::Adapters;
use super::model::{Layer, Memory, ModelShape};

/// What a head needs beside what all of them do. llama.cpp ends the process where one of these is missing.
const NEEDED: [(&str, &[&str]); 2] = [
    ("glm4moe", &["post_attention_norm.weight", "ffn_gate_shexp.weight"]),
    (
        "deepseek2",
        &[
            "attn_q_a.weight",
            "attn_q_a_norm.weight",
            "attn_q_b.weight",
            "attn_kv_a_mqa.weight",
            "attn_kv_a_norm.weight",
            "attn_k_b.weight",
            "attn_v_b.weight",
            "ffn_norm.weight",
            "ffn_gate_shexp.weight",
        ],
    ),
];

const NEEDED_BY_ALL: [&str; 8] = [
    "nextn.eh_proj.weight",
    "nextn.enorm.weight",
    "nextn.hnorm.weight",
    "attn_norm.weight",
    "attn_output.weight",
    "ffn_gate_inp.weight",
    "ffn_down_exps.weight",
    "ffn_up_shexp.weight",
];

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
    fn head(&self) -> Option<Self> {
        if self.memory != Memory::Attention || self.n_layers_all != self.n_layers + 1 {
            return None;
        }
        let layer = self.layers.get(self.n_layers as usize)?;
        let (_, needed) = NEEDED.iter().find(|(architecture, _)| *architecture == self.architecture)?;
        let has_all = needed.iter().chain(&NEEDED_BY_ALL).all(|name| layer.has(name));
        let has_experts = ["ffn_up_exps.weight", "ffn_gate_exps.weight"].iter().all(|name| layer.has(name))
            || layer.has("ffn_gate_up_exps.weight") && self.latent.is_some();
        let is_sound = has_all && has_experts && self.outside.contains_key("output_norm.weight");
        let is_latent = self.latent.is_some() == (self.architecture == "deepseek2");
        let reads_experts = self.n_dense_layers <= self.n_layers && self.n_experts > 0;
        let is_scaled = self.flag("attention.temperature_scale") != 0.0;
        (is_sound && is_latent && reads_experts && !is_scaled && !self.is_lite()).then(|| self.of_layer(layer))
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
