//! Models without meaning: headers of any shape, with random weights where speed or memory is measured.
//!
//! [`shape`] builds a named one, [`NAMES`] lists them; [`projector`] and [`PROJECTOR_NAMES`] do so for multimodal projectors. They follow real models of each kind that llama.cpp knows, from a
//! dense one to hybrids, so that plans can be checked against llama.cpp without downloading any. Random weights are fine for
//! memory and speed, never for quality.

mod adapters;
mod chain;
mod encoders;
mod projectors;
mod recurrent;
mod transformers;

pub use adapters::adapter;
pub use chain::{ChainHead, following_in_chain, write_chain};
pub use projectors::{PROJECTOR_NAMES, projector, projector_with_layers};

use crate::gguf::{Array, FileBuilder, GgmlType, Value};

/// Names that [`shape`] knows.
pub const NAMES: [&str; 22] = [
    "llama2-7b-q4_0",
    "llama3-8b-q8_0",
    "llama3-70b-q4_0",
    "gemma-2b-q8_0",
    "gemma2-2b-q4_0",
    "gemma3-4b-q4_0",
    "gemma3-1b-all-windowed",
    "qwen2-1.5b-q4_0",
    "qwen3-4b-q8_0",
    "phi3-mini-q4_0",
    "mixtral-8x7b-q4_0",
    "qwen3moe-30b-q4_0",
    "qwen2moe-14b-q4_0",
    "gpt-oss-20b-q4_0",
    "glm4moe-106b-q4_0",
    "deepseek2-lite-q4_0",
    "mamba-2.8b-q8_0",
    "mamba2-2.7b-q8_0",
    "jamba-mini-q4_0",
    "granitehybrid-7b-q4_0",
    "bert-base-f16",
    "nomic-bert-f16",
];

/// Names of shapes with a head for multi-token prediction, which [`shape`] knows too.
pub const NAMES_WITH_HEAD: [&str; 2] = ["glm4moe-106b-mtp-q4_0", "deepseek2-mtp-q4_0"];

/// The header of a named shape; `None` for a name that is not in [`NAMES`] or [`NAMES_WITH_HEAD`].
pub fn shape(name: &str) -> Option<FileBuilder> {
    build(name, None)
}

/// The same with so many layers: a model of that kind that is quick to write, load and mutate.
pub fn shape_with_layers(name: &str, n_layers: u32) -> Option<FileBuilder> {
    build(name, Some(n_layers))
}

fn build(name: &str, n_layers: Option<u32>) -> Option<FileBuilder> {
    transformers::shape(name, n_layers)
        .or_else(|| recurrent::shape(name, n_layers))
        .or_else(|| encoders::shape(name, n_layers))
}

/// A file under construction: keys get the architecture's name in front, matrices one type.
struct Draft {
    file: FileBuilder,
    architecture: &'static str,
    matrix_type: GgmlType,
}

impl Draft {
    fn new(architecture: &'static str, matrix_type: GgmlType, n_layers: u32, n_embd: u32, n_vocab: u32) -> Self {
        let mut file = FileBuilder::new();
        file.set("general.architecture", architecture.to_owned());
        file.set("general.name", format!("synthetic {architecture}"));
        file.set("tokenizer.ggml.model", "no_vocab".to_owned());
        let mut draft = Self { file, architecture, matrix_type };
        draft.key("vocab_size", n_vocab);
        draft.key("block_count", n_layers);
        draft.key("embedding_length", n_embd);
        draft.key("context_length", 131_072_u32);
        draft
    }

    fn key(&mut self, name: &str, value: impl Into<Value>) {
        self.file.set(&format!("{}.{name}", self.architecture), value);
    }

    fn key_per_layer(&mut self, name: &str, values: impl IntoIterator<Item = u32>) {
        self.key(name, Value::Array(Array::U32(values.into_iter().collect())));
    }

    fn matrix(&mut self, name: &str, dims: &[u64]) {
        self.file.add_tensor(name, self.matrix_type, dims);
    }

    /// Norms, biases and other small ones.
    fn vector(&mut self, name: &str, dims: &[u64]) {
        self.file.add_tensor(name, GgmlType::F32, dims);
    }

    /// Token table, output norm, and an output layer unless it is the table.
    fn ends(&mut self, n_embd: u64, n_vocab: u64, tied: bool) {
        self.matrix("token_embd.weight", &[n_embd, n_vocab]);
        self.vector("output_norm.weight", &[n_embd]);
        if !tied {
            self.matrix("output.weight", &[n_embd, n_vocab]);
        }
    }

    fn dense_feed_forward(&mut self, layer: u32, n_embd: u64, n_ff: u64) {
        for (name, dims) in [("ffn_gate", [n_embd, n_ff]), ("ffn_up", [n_embd, n_ff]), ("ffn_down", [n_ff, n_embd])] {
            self.matrix(&format!("blk.{layer}.{name}.weight"), &dims);
        }
    }

    fn experts(&mut self, layer: u32, n_embd: u64, n_ff: u64, n_experts: u64) {
        self.vector(&format!("blk.{layer}.ffn_gate_inp.weight"), &[n_embd, n_experts]);
        let shapes =
            [("ffn_gate_exps", [n_embd, n_ff]), ("ffn_up_exps", [n_embd, n_ff]), ("ffn_down_exps", [n_ff, n_embd])];
        for (name, [columns, rows]) in shapes {
            self.matrix(&format!("blk.{layer}.{name}.weight"), &[columns, rows, n_experts]);
        }
    }

    fn shared_expert(&mut self, layer: u32, n_embd: u64, n_ff: u64) {
        let shapes =
            [("ffn_gate_shexp", [n_embd, n_ff]), ("ffn_up_shexp", [n_embd, n_ff]), ("ffn_down_shexp", [n_ff, n_embd])];
        for (name, dims) in shapes {
            self.matrix(&format!("blk.{layer}.{name}.weight"), &dims);
        }
    }

    fn attention(&mut self, layer: u32, n_embd: u64, n_heads: u64, n_kv_heads: u64, head: u64) {
        let shapes = [
            ("attn_q", [n_embd, n_heads * head]),
            ("attn_k", [n_embd, n_kv_heads * head]),
            ("attn_v", [n_embd, n_kv_heads * head]),
            ("attn_output", [n_heads * head, n_embd]),
        ];
        for (name, dims) in shapes {
            self.matrix(&format!("blk.{layer}.{name}.weight"), &dims);
        }
    }
}
