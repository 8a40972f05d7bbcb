//! What llama.cpp takes for granted about a file that its container syntax allows: the values that would stop the process.
//!
//! llama.cpp answers most bad files with an exception, which is an error to us; this module is about the others, where it
//! asserts, divides by zero or reads out of bounds. Keys are checked where they are present, in files of every kind: what a
//! file says it is (`general.type`) decides nothing, because llama.cpp does not ask.
//! Source: `llama_model_base::load_hparams` in `llama-model.cpp`, `llama-model-loader.cpp`, `ggml-backend.cpp` at our pin.

use std::fmt::Display;

use super::architectures::{
    EQUAL_HEADS, EXPERTS_ONLY, GROUPED_STATE, POSITIVE, QUERIES_AS_WIDE_AS_EMBEDDING, WHOLE_HEAD_ROTATED,
};
use super::error::GgufError;
use super::header::Header;
use super::limits::{
    MAPPED_ALIGNMENT, MAX_ARRAY_ELEMENTS, MAX_CONTEXT_TOKENS, MAX_EMBEDDING_LENGTH, MAX_EXPERTS, MAX_HEAD_ELEMENTS,
    MAX_HEADS, MAX_LAYERS,
};
use super::metadata::Metadata;
use super::vocab;

const ARCHITECTURE: &str = "general.architecture";

impl Header {
    /// Checks what llama.cpp asserts on: hyperparameters, vocabulary, and where tensors lie.
    ///
    /// [`open`](Self::open) calls it. Files of other kinds pass as long as what they have is sound: adapters, vision and audio
    /// projectors, vocabularies without tensors, models without a vocabulary.
    ///
    /// # Errors
    /// [`GgufError`] with the key, its value and the rule.
    pub fn check_for_llama(&self) -> Result<(), GgufError> {
        let metadata = &self.metadata;
        let is_model = metadata.str("general.type")?.is_none_or(|kind| kind == "model");
        match metadata.str(ARCHITECTURE)? {
            None if is_model => return Err(GgufError::Missing { key: ARCHITECTURE.to_owned() }),
            None | Some("clip") => {} // `clip` is a projector: llama.cpp reads no hyperparameters of these
            Some(architecture) => Hyperparameters { metadata, architecture }.check()?,
        }
        vocab::check(metadata)?;
        self.check_mapped_alignment()
    }

    /// llama.cpp maps files and asserts that the part of a mapping that it uses as a buffer begins at a multiple of 32 bytes.
    /// Which tensor is the first of such a part depends on the devices, so each has to be aligned.
    fn check_mapped_alignment(&self) -> Result<(), GgufError> {
        for tensor in &self.tensors {
            let position = self.shard_data_offset(tensor.shard).unwrap_or(0).saturating_add(tensor.offset);
            if !position.is_multiple_of(MAPPED_ALIGNMENT) {
                return Err(GgufError::Invalid {
                    field: format!("the position of tensor `{}`'s data", tensor.name),
                    offset: position,
                    given: position.to_string(),
                    rule: format!("llama.cpp maps weights at multiples of {MAPPED_ALIGNMENT}"),
                });
            }
        }
        Ok(())
    }
}

/// The keys `ARCHITECTURE.…` of a model.
struct Hyperparameters<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl Hyperparameters<'_> {
    fn check(&self) -> Result<(), GgufError> {
        self.in_range("context_length", 1, MAX_CONTEXT_TOKENS)?;
        self.in_range("embedding_length", 1, MAX_EMBEDDING_LENGTH)?;
        self.in_range("embedding_length_out", 0, MAX_EMBEDDING_LENGTH)?;
        self.in_range("vocab_size", 0, MAX_ARRAY_ELEMENTS as u32)?; // llama.cpp makes that many tokens up
        for key in ["key_length", "value_length", "key_length_swa", "value_length_swa"] {
            self.in_range(&format!("attention.{key}"), 0, MAX_HEAD_ELEMENTS)?;
        }
        self.check_divisors()?;
        self.check_epsilons()?;
        self.check_pooling()?;
        self.check_rope_scaling()?;
        if let Some(n_layers) = self.in_range("block_count", 1, MAX_LAYERS)? {
            for key in ["nextn_predict_layers", "posnet.block_count", "convnext.block_count"] {
                self.in_range(key, 0, n_layers)?;
            }
            self.check_experts(n_layers)?;
            self.check_heads(n_layers)?;
        }
        Ok(())
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.metadata.u32(&self.key(key))
    }

    fn invalid<T>(&self, key: &str, given: impl Display, rule: impl Into<String>) -> Result<T, GgufError> {
        Err(self.metadata.invalid(&self.key(key), &given, rule))
    }

    /// The value, if the key is there.
    fn in_range(&self, key: &str, min: u32, max: u32) -> Result<Option<u32>, GgufError> {
        match self.u32(key)? {
            Some(value) if value < min || value > max => self.invalid(key, value, format!("it must be {min} to {max}")),
            value => Ok(value),
        }
    }

    /// Source: the integer divisions and assertions in `src/models/*.cpp` that only a key's value decides.
    fn check_divisors(&self) -> Result<(), GgufError> {
        for key in POSITIVE {
            self.in_range(key, 1, u32::MAX)?;
        }
        if self.architecture == "ernie4_5-moe" {
            self.in_range("interleave_moe_layer_step", 1, u32::MAX)?; // llama4 writes 0 and means none
        }
        if GROUPED_STATE.contains(&self.architecture) {
            self.in_range("ssm.group_count", 1, u32::MAX)?;
        }
        if matches!(self.architecture, "rwkv6" | "rwkv7") {
            self.in_range("token_shift_count", 2, 2)?;
        }
        if EXPERTS_ONLY.contains(&self.architecture) && self.u32("block_count")?.is_some() {
            self.in_range("expert_count", 1, MAX_EXPERTS)?
                .ok_or_else(|| GgufError::Missing { key: self.key("expert_count") })?;
        }
        Ok(())
    }

    /// Norms assert that theirs is not negative, which a NaN fails too.
    fn check_epsilons(&self) -> Result<(), GgufError> {
        for norm in ["layer_norm", "layer_norm_rms", "group_norm"] {
            let key = format!("attention.{norm}_epsilon");
            if let Some(epsilon) = self.metadata.f32(&self.key(&key))?
                && !(epsilon >= 0.0 && epsilon.is_finite())
            {
                return self.invalid(&key, epsilon, "it must be a finite number, not negative");
            }
        }
        Ok(())
    }

    /// Values of `enum llama_pooling_type`; the graph builder aborts on others.
    fn check_pooling(&self) -> Result<(), GgufError> {
        match self.u32("pooling_type")? {
            None | Some(0..=4 | u32::MAX) => Ok(()), // the last is -1, unspecified
            Some(other) => self.invalid("pooling_type", other, "it must be 0 to 4"),
        }
    }

    fn check_rope_scaling(&self) -> Result<(), GgufError> {
        match self.metadata.str(&self.key("rope.scaling.type"))? {
            None | Some("none" | "linear" | "yarn" | "longrope") => Ok(()),
            Some(other) => {
                self.invalid("rope.scaling.type", format!("{other:?}"), "it must be none, linear, yarn or longrope")
            }
        }
    }

    fn check_experts(&self, n_layers: u32) -> Result<(), GgufError> {
        let n_experts = self.in_range("expert_count", 0, MAX_EXPERTS)?.unwrap_or(0);
        let used = self.metadata.u32_per_layer(&self.key("expert_used_count"), n_layers)?;
        let n_used = used.and_then(|used| used.into_iter().max()).unwrap_or(0);
        let n_groups = self.u32("expert_group_count")?.unwrap_or(0);
        // These two say that they have one expert, which is none.
        let dense = matches!(self.architecture, "hunyuan_vl" | "hunyuan-dense") && n_experts <= 1;
        if dense {
            return self.in_range("expert_group_count", 0, 0).map(|_| ());
        }
        if n_used > n_experts || (n_experts > 0 && n_used == 0) {
            return self.invalid("expert_used_count", n_used, format!("the model has {n_experts} experts"));
        }
        if n_groups > 0 && n_groups >= n_experts {
            return self.invalid("expert_group_count", n_groups, format!("the model has {n_experts} experts"));
        }
        if n_groups > 1 {
            if !n_experts.is_multiple_of(n_groups) {
                let rule = format!("it must divide the {n_experts} experts");
                return self.invalid("expert_group_count", n_groups, rule);
            }
            let n_groups_used = self.u32("expert_group_used_count")?.unwrap_or(0);
            if n_groups_used == 0 || n_groups_used >= n_groups {
                let rule = format!("the model has {n_groups} groups of experts");
                return self.invalid("expert_group_used_count", n_groups_used, rule);
            }
        }
        Ok(())
    }

    /// Zero heads are a layer without attention, as in recurrent and hybrid models.
    fn check_heads(&self, n_layers: u32) -> Result<(), GgufError> {
        const HEADS: &str = "attention.head_count";
        const KV_HEADS: &str = "attention.head_count_kv";
        let heads = self.metadata.u32_per_layer(&self.key(HEADS), n_layers)?.unwrap_or_default();
        let kv_heads = self.metadata.u32_per_layer(&self.key(KV_HEADS), n_layers)?.unwrap_or_default();
        for (key, counts) in [(HEADS, &heads), (KV_HEADS, &kv_heads)] {
            if let Some(&given) = counts.iter().find(|&&n| n > MAX_HEADS) {
                return self.invalid(key, given, format!("it must be at most {MAX_HEADS}"));
            }
        }
        for (&n_heads, &n_kv_heads) in heads.iter().zip(&kv_heads) {
            // Query heads share key heads evenly, or the matrix product asserts.
            if n_heads > 0 && n_kv_heads > 0 && !n_heads.is_multiple_of(n_kv_heads) {
                return self.invalid(KV_HEADS, n_kv_heads, format!("it must divide the {n_heads} query heads"));
            }
        }
        match heads.first() {
            Some(&n_heads) if n_heads > 0 => self.check_head_lengths(n_heads),
            _ => Ok(()), // llama.cpp takes a first layer without heads as a model without attention here
        }
    }

    /// `n_heads` of the first layer are what llama.cpp derives lengths from.
    fn check_head_lengths(&self, n_heads: u32) -> Result<(), GgufError> {
        const KEY: &str = "attention.key_length";
        const VALUE: &str = "attention.value_length";
        const ROTATED: &str = "rope.dimension_count";
        let (key, value) = (self.u32(KEY)?, self.u32(VALUE)?);
        let Some(width) = self.u32("embedding_length")? else { return Ok(()) };
        if !width.is_multiple_of(n_heads) && (key.is_none() || value.is_none()) {
            let rule = format!("it must divide the embedding length {width} where no key and value lengths are given");
            return self.invalid("attention.head_count", n_heads, rule);
        }
        // Sliding-window layers may have lengths of their own, and which layer is asserted on is then up to the pattern.
        for swa in ["attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"] {
            if self.u32(swa)?.is_some() {
                return Ok(());
            }
        }
        let key = key.unwrap_or(width / n_heads);
        let value = value.unwrap_or(width / n_heads);
        if EQUAL_HEADS.contains(&self.architecture) && key != value {
            return self.invalid(VALUE, value, format!("it must be the key length, {key}"));
        }
        let rotated = self.u32(ROTATED)?.unwrap_or(key);
        if WHOLE_HEAD_ROTATED.contains(&self.architecture) && rotated != value {
            return self.invalid(ROTATED, rotated, format!("it must be the length of a head, {value}"));
        }
        if rotated > key || !rotated.is_multiple_of(2) && self.u32(ROTATED)?.is_some() {
            return self.invalid(ROTATED, rotated, format!("it must be even and at most the key length, {key}"));
        }
        // No overflow: both have limits.
        if QUERIES_AS_WIDE_AS_EMBEDDING.contains(&self.architecture) && key * n_heads != width {
            let rule = format!("with key length {key} it must make the embedding length {width}");
            return self.invalid("attention.head_count", n_heads, rule);
        }
        Ok(())
    }
}
