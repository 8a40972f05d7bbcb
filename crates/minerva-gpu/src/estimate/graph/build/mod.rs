//! The steps of a model, written down as llama.cpp's graph builders do.
//!
//! One builder for all architectures: which blocks a layer has is read from the names of its tensors, and only what names do
//! not show (activation, order of norms, scaling) comes from the architecture. Order matters: memory is packed in it.
//!
//! Source: `src/llama-graph.cpp` and `src/models/` at the pinned release.

mod attention;
mod experts;
mod feed_forward;
mod head;
mod latent;
mod recurrent;

use super::{Graph, Home, Id, Op, row_bytes};
use crate::estimate::adapter::LowRank;
use crate::estimate::cache::CacheShape;
use crate::estimate::model::{Layer, Memory, ModelShape};
use crate::estimate::placement::Placement;
use crate::gguf::{GgmlType, TensorInfo};

/// The step that llama.cpp reserves memory for: the largest there can be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) n_tokens: u64,
    pub(crate) n_sequences: u64,
    pub(crate) n_outputs: u64,
    pub(crate) flash_attention: bool,
}

/// Graph of one step.
pub(crate) fn build(model: &ModelShape, placement: &Placement, cache: &CacheShape, step: Step) -> Graph {
    let mut builder = Builder { graph: Graph::default(), model, placement, cache, step, inputs: Inputs::default() };
    builder.build();
    builder.graph
}

/// Inputs that all layers share.
#[derive(Default)]
struct Inputs {
    positions: Option<Id>,
    output_rows: Option<Id>,
    /// For layers that see everything, and for layers with a window.
    attention: [Option<attention::Input>; 2],
    states: Option<recurrent::Input>,
    temperature: Option<Id>,
}

struct Builder<'a> {
    graph: Graph,
    model: &'a ModelShape,
    placement: &'a Placement,
    cache: &'a CacheShape,
    step: Step,
    inputs: Inputs,
}

/// Architectures whose attention and feed-forward blocks both read the same normed input.
const PARALLEL: [&str; 6] = ["command-r", "cohere2", "cohere2moe", "phi2", "falcon", "plamo"];

/// Attention without rotary positions: learned, linear-bias or none at all.
const WITHOUT_ROPE: [&str; 10] =
    ["bert", "jina-bert-v2", "jamba", "gpt2", "mpt", "bloom", "starcoder", "refact", "jais", "nemotron_h"];

/// Models that scale the queries before attention instead of the scores in it.
const SCALES_QUERIES: [&str; 7] = ["gemma", "gemma2", "gemma3", "gemma3n", "phi2", "phi3", "gemma-embedding"];

impl<'a> Builder<'a> {
    fn layer_of(&self, il: u32) -> &'a Layer {
        &self.model.layers[il as usize]
    }

    fn build(&mut self) {
        let is_post_norm = self.model.memory == Memory::None
            && self.model.layers.first().is_some_and(|layer| !layer.has("attn_norm.weight"));
        let mut hidden = if self.model.is_head() { self.head_rows() } else { self.embeddings() };
        self.add_inputs();
        if self.model.is_head() {
            hidden = self.merged_rows(hidden);
        }
        for il in 0..self.model.n_layers {
            hidden = if is_post_norm { self.post_norm_layer(il, hidden) } else { self.layer(il, hidden) };
        }
        self.output(hidden);
    }

    /// Token table, scaling, and what encoders add to it.
    fn embeddings(&mut self) -> Id {
        let Step { n_tokens, .. } = self.step;
        let n_embd = self.model.n_embd;
        let is_encoder = self.model.outside.contains_key("token_embd_norm.weight") && self.model.memory == Memory::None;
        if is_encoder && self.model.architecture != "jina-bert-v2" {
            self.positions();
        }
        let tokens = self.graph.input(GgmlType::I32, [n_tokens, 1, 1, 1]);
        let vectors = self.graph.input(GgmlType::F32, [n_embd, n_tokens, 1, 1]);
        let Some(table) = self.outside("token_embd.weight") else {
            self.graph.expand(vectors);
            return vectors;
        };
        let mut hidden = self.rows_of_table(table, tokens);
        self.graph.expand(hidden);
        self.graph.expand(vectors);
        self.mixed_embeddings(table);
        if self.model.flag("embedding_scale") != 0.0 {
            hidden = self.graph.in_place(hidden, &[]);
        }
        if self.model.is_one_of(&["gemma3", "gemma4"]) {
            let scales = self.graph.input(GgmlType::F32, [1, n_tokens, 1, 1]);
            hidden = self.graph.in_place(hidden, &[scales]);
        }
        self.graph.expand(hidden);
        if self.model.is_one_of(&["gemma", "gemma2", "gemma3n", "gemma-embedding"]) {
            hidden = self.graph.in_place(hidden, &[]);
        }
        if is_encoder {
            hidden = self.encoder_embeddings(hidden);
        }
        hidden
    }

    /// The third way in, for batches of tokens and vectors at once: never computed for text, but part of the graph.
    fn mixed_embeddings(&mut self, table: Id) {
        const WITHOUT: [&str; 6] = ["cogvlm", "deepseek4", "granite-switch", "eagle3", "dflash", "gemma4-assistant"];
        if self.model.is_one_of(&WITHOUT) {
            return;
        }
        let (n_embd, n_tokens) = (self.model.n_embd, self.step.n_tokens);
        let tokens = self.graph.input(GgmlType::I32, [n_tokens, 1, 1, 1]);
        let slots = self.graph.input(GgmlType::I64, [n_tokens, 1, 1, 1]);
        let vectors = self.graph.input(GgmlType::F32, [n_embd, n_tokens, 1, 1]);
        let copy = self.graph.cont(vectors, [n_embd, n_tokens, 1, 1]);
        let rows = self.rows_of_table(table, tokens);
        let mixed = self.graph.set_rows(copy, rows, slots);
        self.graph.expand(mixed);
    }

    /// Rows of the token table, and what adapters add to them: the halves of a table's adapter are transposed.
    fn rows_of_table(&mut self, table: Id, tokens: Id) -> Id {
        let mut rows = self.graph.get_rows(table, tokens);
        for part in self.model.adapters.of_outside("token_embd.weight") {
            let [a, b] = self.add_low_rank(part, self.placement.outside_backend("token_embd.weight"));
            let picked = self.graph.get_rows(a, tokens);
            let more = self.graph.mul_mat(b, picked);
            rows = self.add_scaled(rows, more);
        }
        rows
    }

    fn encoder_embeddings(&mut self, mut hidden: Id) -> Id {
        let n_embd = self.model.n_embd;
        if let Some(types) = self.outside("token_types.weight") {
            let first_row = self.graph.view_1d(types, n_embd);
            hidden = self.graph.in_place(hidden, &[first_row]);
        }
        if let (Some(table), Some(positions)) = (self.outside("position_embd.weight"), self.inputs.positions) {
            let rows = self.graph.get_rows(table, positions);
            hidden = self.graph.in_place(rows, &[hidden]);
        }
        let (weight, bias) = (self.outside("token_embd_norm.weight"), self.outside("token_embd_norm.bias"));
        self.norm_with(hidden, weight, bias, Some(0))
    }

    /// Inputs in the order in which the models make them; what is not used never enters the graph.
    fn add_inputs(&mut self) {
        let (memory, n_sequences) = (self.model.memory, self.step.n_sequences);
        if memory == Memory::Hybrid || memory == Memory::Recurrent {
            let copies = self.graph.input(GgmlType::I32, [n_sequences, 1, 1, 1]);
            let main = self.graph.view_1d(copies, n_sequences);
            let tail = self.graph.view_1d(copies, n_sequences - 1);
            self.inputs.states = Some(recurrent::Input { copies, main, tail });
        }
        if memory != Memory::Recurrent {
            self.add_attention_inputs();
        }
        self.inputs.output_rows = Some(self.graph.input(GgmlType::I32, [self.step.n_outputs, 1, 1, 1]));
    }

    fn positions(&mut self) -> Id {
        let n_tokens = self.step.n_tokens;
        // Multimodal rotary positions have four numbers per token.
        let per_token = if self.model.is_one_of(&["qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "glm4v"]) {
            4
        } else {
            1
        };
        let graph = &mut self.graph;
        *self.inputs.positions.get_or_insert_with(|| graph.input(GgmlType::I32, [n_tokens * per_token, 1, 1, 1]))
    }

    /// A layer with norms before its blocks.
    fn layer(&mut self, il: u32, input: Id) -> Id {
        let model = self.model;
        let layer = self.layer_of(il);
        let normed = if layer.has("attn_norm.weight") { self.norm(il, input, "attn_norm") } else { input };
        let mut residual = input;
        let mut current = self.mix(il, normed);
        let mut parallel_input = normed;
        if il + 1 == model.n_layers && !self.selects_rows_at_the_end() {
            current = self.output_rows(current);
            residual = self.output_rows(residual);
            if model.is_one_of(&PARALLEL) {
                parallel_input = self.output_rows(parallel_input);
            }
        }
        if layer.has("post_attention_norm.weight") && !names_its_ffn_norm_otherwise(layer) {
            current = self.norm(il, current, "post_attention_norm");
        }
        if model.flag("residual_scale") != 0.0 {
            current = self.graph.in_place(current, &[]);
        }
        if model.is_one_of(&PARALLEL) {
            let fed = self.feed_forward(il, parallel_input);
            let sum = self.graph.in_place(fed, &[residual]);
            return self.graph.in_place(sum, &[current]);
        }
        let middle = if model.architecture == "jamba" {
            self.graph.in_place(residual, &[current])
        } else {
            self.graph.in_place(current, &[residual])
        };
        if !feed_forward::has_feed_forward(layer) {
            return middle;
        }
        let ffn_input = if layer.has("ffn_norm.weight") {
            self.norm(il, middle, "ffn_norm")
        } else if names_its_ffn_norm_otherwise(layer) {
            self.norm(il, middle, "post_attention_norm")
        } else {
            middle
        };
        let mut fed = self.feed_forward(il, ffn_input);
        if layer.has("post_ffw_norm.weight") {
            let (weight, bias) = (self.weight(il, "post_ffw_norm.weight"), self.weight(il, "post_ffw_norm.bias"));
            let pin = (!model.is_one_of(&["gemma2", "gemma3", "gemma-embedding"])).then_some(il);
            fed = self.norm_with(fed, weight, bias, pin);
        }
        if model.flag("residual_scale") != 0.0 {
            fed = self.graph.in_place(fed, &[]);
        }
        if model.is_one_of(&["jamba", "phi3"]) {
            self.graph.in_place(middle, &[fed])
        } else {
            self.graph.in_place(fed, &[middle])
        }
    }

    /// Attention or a recurrent block.
    fn mix(&mut self, il: u32, normed: Id) -> Id {
        let layer = self.layer_of(il);
        if self.model.has_state(il) && !self.model.has_cells(il) {
            self.recurrent(il, normed)
        } else if self.model.architecture == "falcon-h1" {
            let attended = self.attention(il, normed);
            let state = self.recurrent(il, normed);
            self.graph.in_place(attended, &[state])
        } else if layer.has("attn_kv_a_mqa.weight") {
            self.latent_attention(il, normed)
        } else if layer.n_heads > 0 && (layer.has("attn_q.weight") || layer.has("attn_qkv.weight")) {
            self.attention(il, normed)
        } else {
            normed
        }
    }

    /// A layer of an encoder with norms behind its blocks.
    fn post_norm_layer(&mut self, il: u32, input: Id) -> Id {
        let mut residual = input;
        let mut current = self.attention(il, input);
        if il + 1 == self.model.n_layers {
            current = self.output_rows(current);
            residual = self.output_rows(residual);
        }
        current = self.graph.in_place(current, &[residual]);
        current = self.norm(il, current, "attn_output_norm");
        if self.layer_of(il).has("attn_norm_2.weight") {
            current = self.graph.in_place(current, &[residual]);
            current = self.norm(il, current, "attn_norm_2");
        }
        let fed = self.feed_forward(il, current);
        let sum = self.graph.in_place(fed, &[current]);
        self.norm(il, sum, "layer_output_norm")
    }

    fn output(&mut self, hidden: Id) {
        if !self.model.has_output() {
            self.graph.get_mut(hidden).is_output = true;
            self.graph.expand(hidden);
            return;
        }
        let hidden = if self.selects_rows_before_the_norm() {
            self.graph.get_mut(hidden).is_output = true;
            self.output_rows(hidden)
        } else {
            hidden
        };
        let mut normed = self.last_norm(hidden);
        self.graph.get_mut(normed).is_output = true;
        if self.selects_rows_behind_the_norm() {
            normed = self.output_rows(normed);
            self.graph.get_mut(normed).is_output = true;
        }
        let mut last = normed;
        let own = if self.model.is_head() { self.weight(0, "nextn.shared_head_head.weight") } else { None };
        if let Some(output) = own.or_else(|| self.output_weight()) {
            let parts = if self.model.latent.is_some() { &[] } else { self.model.adapters.of_outside("output.weight") };
            last = self.adapted_product(output, normed, parts, self.placement.output_backend());
            if let Some(bias) = self.outside("output.bias") {
                last = self.graph.in_place(last, &[bias]);
            }
            if self.model.flag("logit_scale") != 0.0 {
                last = self.graph.in_place(last, &[]);
            }
            if self.model.flag("final_logit_softcapping") != 0.0 {
                for _ in ["scale down", "tanh", "scale up"] {
                    last = self.graph.in_place(last, &[]);
                }
            }
            self.graph.get_mut(last).is_output = true;
        }
        self.graph.expand(last);
    }

    /// Models that could feed a drafting head keep the whole last hidden state.
    fn selects_rows_before_the_norm(&self) -> bool {
        self.model.architecture == "gpt-oss"
    }

    /// The heads that are built here read the state behind the norm, and give such a state on.
    fn selects_rows_behind_the_norm(&self) -> bool {
        self.model.keeps_hidden || self.model.is_head()
    }

    fn selects_rows_at_the_end(&self) -> bool {
        self.selects_rows_before_the_norm() || self.selects_rows_behind_the_norm()
    }

    fn last_norm(&mut self, hidden: Id) -> Id {
        let own = if self.model.is_head() { self.weight(0, "nextn.shared_head_norm.weight") } else { None };
        let weight = own.or_else(|| self.outside("output_norm.weight"));
        let bias = self.outside("output_norm.bias");
        self.norm_with(hidden, weight, bias, None)
    }

    fn output_rows(&mut self, a: Id) -> Id {
        match self.inputs.output_rows {
            Some(rows) => self.graph.get_rows(a, rows),
            None => a,
        }
    }

    fn norm(&mut self, il: u32, a: Id, name: &str) -> Id {
        let weight = self.weight(il, &format!("{name}.weight"));
        let bias = self.weight(il, &format!("{name}.bias"));
        self.norm_with(a, weight, bias, Some(il))
    }

    /// `build_norm`: with everything on devices, the norm itself is pinned to the layer's.
    fn norm_with(&mut self, a: Id, weight: Option<Id>, bias: Option<Id>, il: Option<u32>) -> Id {
        // The root-mean-square norm may overwrite its input, the other one may not.
        let op = if bias.is_some() || self.is_full_norm() { Op::Other } else { Op::InPlace };
        let mut current = self.graph.like(op, a, &[]);
        if let (Some(il), true) = (il, self.placement.is_full_offload() && (weight.is_some() || bias.is_some())) {
            self.graph.get_mut(current).pinned = Some(self.placement.layer_backend(il));
        }
        for more in [weight, bias].into_iter().flatten() {
            current = self.graph.in_place(current, &[more]);
        }
        current
    }

    /// Norms that subtract the mean even though the file has no bias for them.
    fn is_full_norm(&self) -> bool {
        self.model.is_one_of(&["command-r", "cohere2", "cohere2moe", "mpt", "dbrx", "olmo", "modern-bert"])
    }

    fn weight(&mut self, il: u32, name: &str) -> Option<Id> {
        let model = self.model;
        let tensor = model.layers[il as usize].tensors.get(name)?;
        Some(self.add_weight(tensor, self.placement.tensor_backend(il, name)))
    }

    fn outside(&mut self, name: &str) -> Option<Id> {
        let model = self.model;
        let tensor = model.outside.get(name)?;
        Some(self.add_weight(tensor, self.placement.outside_backend(name)))
    }

    /// The output layer; a tied one is a second copy of the token table, on the output's device.
    fn output_weight(&mut self) -> Option<Id> {
        if self.model.is_tied() {
            self.model
                .outside
                .get("token_embd.weight")
                .map(|table| self.add_weight(table, self.placement.output_backend()))
        } else {
            self.outside("output.weight")
        }
    }

    fn add_weight(&mut self, tensor: &TensorInfo, backend: usize) -> Id {
        self.add_tensor(tensor, Home { backend, is_weights: true })
    }

    fn add_tensor(&mut self, tensor: &TensorInfo, home: Home) -> Id {
        self.graph.external(tensor.ggml_type, tensor.shape(), home)
    }

    /// A product with a weight of layer `il`, its adapters and its bias, if the layer has that weight.
    fn linear(&mut self, il: u32, name: &str, a: Id) -> Option<Id> {
        let product = self.product(il, &format!("{name}.weight"), a)?;
        Some(match self.weight(il, &format!("{name}.bias")) {
            Some(bias) => self.graph.in_place(product, &[bias]),
            None => product,
        })
    }

    /// `build_lora_mm`.
    fn product(&mut self, il: u32, name: &str, a: Id) -> Option<Id> {
        let weight = self.weight(il, name)?;
        let parts = self.model.adapters.of_layer(il, name);
        Some(self.adapted_product(weight, a, parts, self.placement.tensor_backend(il, name)))
    }

    fn adapted_product(&mut self, weight: Id, x: Id, parts: &[LowRank], backend: usize) -> Id {
        let mut product = self.graph.mul_mat(weight, x);
        for part in parts {
            let [a, b] = self.add_low_rank(part, backend);
            let thin = self.graph.mul_mat(a, x);
            let more = self.graph.mul_mat(b, thin);
            product = self.add_scaled(product, more);
        }
        product
    }

    /// `build_lora_mm_id`: the same for the chosen of several experts.
    fn expert_product(&mut self, il: u32, name: &str, x: Id, chosen: Id) -> Option<Id> {
        let weight = self.weight(il, name)?;
        let mut product = self.graph.mul_mat_id(weight, x, chosen);
        for part in self.model.adapters.of_layer(il, name) {
            let [a, b] = self.add_low_rank(part, self.placement.tensor_backend(il, name));
            let thin = self.graph.mul_mat_id(a, x, chosen);
            let more = self.graph.mul_mat_id(b, thin, chosen);
            product = self.add_scaled(product, more);
        }
        Some(product)
    }

    /// llama.cpp does not mark the memory of adapters as weights, so their products run wherever their neighbours do.
    fn add_low_rank(&mut self, part: &LowRank, backend: usize) -> [Id; 2] {
        part.tensors().map(|tensor| self.add_tensor(tensor, Home { backend, is_weights: false }))
    }

    fn add_scaled(&mut self, a: Id, more: Id) -> Id {
        let scaled = self.graph.in_place(more, &[]);
        self.graph.in_place(a, &[scaled])
    }
}

/// Some families call the norm before the feed-forward block the one after attention.
fn names_its_ffn_norm_otherwise(layer: &Layer) -> bool {
    layer.has("post_attention_norm.weight") && !layer.has("ffn_norm.weight") && !layer.has("post_ffw_norm.weight")
}
