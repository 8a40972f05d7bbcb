//! Low-rank adapters (LoRA): two thin matrices beside each weight that they change, and two more products in the step.
//!
//! An adapter lies where the weights lie that it belongs to, so [`ModelShape::add_adapter`] makes it a part of the model's shape,
//! and every estimate and plan of that shape counts it.

use std::collections::HashMap;

use super::model::{ModelShape, layer_and_name};
use crate::gguf::{GgmlType, GgufError, Header, TensorInfo};

/// Adapters of one model.
pub const MAX_ADAPTERS: usize = 16;

/// Why a file is not an adapter of this model. llama.cpp would throw at most of these, and abort at the others.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A value of the wrong type.
    #[error(transparent)]
    Header(#[from] GgufError),
    /// Another kind of file.
    #[error("`{key}` is {given:?}, an adapter of this model says {wanted:?}")]
    Kind {
        /// The key.
        key: &'static str,
        /// Its value, empty where it is missing.
        given: String,
        /// The value that it should have.
        wanted: String,
    },
    /// Something that Minerva or llama.cpp does not do.
    #[error("{what} cannot be used: {why}")]
    Unsupported {
        /// What it is.
        what: String,
        /// Why not.
        why: &'static str,
    },
    /// A tensor whose name says nothing, that lacks its other half, or whose weight the model does not have.
    #[error("tensor `{name}` {problem}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// More than one model takes.
    #[error("there are {given} adapters, the limit is {MAX_ADAPTERS}")]
    TooMany {
        /// How many there are.
        given: usize,
    },
}

/// What is added to a product with a weight: `b · (a · x)`, scaled.
#[derive(Debug, Clone)]
pub(super) struct LowRank {
    pub(super) a: TensorInfo,
    pub(super) b: TensorInfo,
}

impl LowRank {
    pub(super) fn tensors(&self) -> [&TensorInfo; 2] {
        [&self.a, &self.b]
    }

    fn bytes(&self) -> u64 {
        self.a.bytes.saturating_add(self.b.bytes)
    }
}

/// The adapters of a model, by the weight that they belong to.
#[derive(Debug, Clone, Default)]
pub(super) struct Adapters {
    n_files: usize,
    /// By layer and the weight's name behind `blk.N.`.
    layers: Vec<HashMap<String, Vec<LowRank>>>,
    outside: HashMap<String, Vec<LowRank>>,
}

impl Adapters {
    pub(super) fn of_layer(&self, il: u32, name: &str) -> &[LowRank] {
        self.layers.get(il as usize).and_then(|layer| layer.get(name)).map_or(&[], Vec::as_slice)
    }

    pub(super) fn of_outside(&self, name: &str) -> &[LowRank] {
        self.outside.get(name).map_or(&[], Vec::as_slice)
    }

    /// Names of the weights of layer `il`, and what belongs to each.
    pub(super) fn layer(&self, il: u32) -> impl Iterator<Item = (&str, &[LowRank])> {
        let layer = self.layers.get(il as usize).into_iter().flatten();
        layer.map(|(name, parts)| (name.as_str(), parts.as_slice()))
    }

    /// The same of the weights outside the layers.
    pub(super) fn outside(&self) -> impl Iterator<Item = (&str, &[LowRank])> {
        self.outside.iter().map(|(name, parts)| (name.as_str(), parts.as_slice()))
    }

    pub(super) fn layer_bytes(&self, il: u32) -> u64 {
        self.layer(il).flat_map(|(_, parts)| parts).map(LowRank::bytes).sum()
    }
}

impl ModelShape {
    /// Makes an adapter a part of the model, after a look whether llama.cpp can use it with this model.
    ///
    /// # Errors
    /// [`AdapterError`]; the model is then as before.
    ///
    /// Source of the rules: `llama_adapter_lora_init_impl`, and the assertions of the products that its tensors take part in, at the
    /// pinned release.
    pub fn add_adapter(&mut self, header: &Header) -> Result<(), AdapterError> {
        if self.adapters.n_files >= MAX_ADAPTERS {
            return Err(AdapterError::TooMany { given: self.adapters.n_files + 1 });
        }
        check_kind(header, &self.architecture)?;
        let mut parts = Vec::new();
        for (weight, pair) in pairs(header)? {
            self.check_pair(&weight, &pair)?;
            parts.push((weight, pair));
        }
        parts.sort_by(|(a, _), (b, _)| a.cmp(b)); // llama.cpp's order: by name
        let adapters = &mut self.adapters;
        adapters.n_files += 1;
        for (weight, pair) in parts {
            match layer_and_name(&weight).filter(|(il, _)| *il < self.layers.len()) {
                Some((il, name)) => {
                    adapters.layers.resize_with(self.layers.len(), HashMap::new);
                    adapters.layers[il].entry(name.to_owned()).or_default().push(pair);
                }
                None => adapters.outside.entry(weight).or_default().push(pair),
            }
        }
        Ok(())
    }

    fn weight_of(&self, name: &str) -> Option<&TensorInfo> {
        match layer_and_name(name).filter(|(il, _)| *il < self.layers.len()) {
            Some((il, name)) => self.layers[il].tensors.get(name),
            None => self.outside.get(name),
        }
    }

    /// `[n_in, rank]` and `[rank, n_out]`, with as many planes as the weight has; of the token table transposed.
    fn check_pair(&self, weight: &str, LowRank { a, b }: &LowRank) -> Result<(), AdapterError> {
        let wrong = |name: &str, problem: String| Err(AdapterError::Tensor { name: name.to_owned(), problem });
        let Some(base) = self.weight_of(weight) else {
            return wrong(&a.name, format!("belongs to `{weight}`, which the model does not have"));
        };
        if base.ggml_type == GgmlType::NVFP4 {
            return wrong(
                &a.name,
                format!("belongs to a weight of type {}, which takes no adapters", base.ggml_type.name()),
            );
        }
        if weight == "token_embd.weight" && self.is_tied() {
            let why =
                "the token table of this model is its output layer too, and llama.cpp would take them for one shape";
            return Err(AdapterError::Unsupported { what: format!("tensor `{}`", a.name), why });
        }
        for part in [a, b] {
            if !is_multiplied(part.ggml_type) {
                return wrong(&part.name, format!("is of type {}, which no product takes", part.ggml_type.name()));
            }
        }
        let [n_in, n_out, n_planes, n_cubes] = base.shape();
        let rank = b.shape()[0];
        let wanted = if weight == "token_embd.weight" {
            [[rank, n_out, 1, 1], [rank, n_in, 1, 1]]
        } else {
            [[n_in, rank, n_planes, n_cubes], [rank, n_out, n_planes, n_cubes]]
        };
        for (part, wanted) in [a, b].into_iter().zip(wanted) {
            if part.shape() != wanted {
                return wrong(
                    &part.name,
                    format!("has the shape {:?}, beside `{weight}` it must be {wanted:?}", part.shape()),
                );
            }
        }
        Ok(())
    }
}

fn check_kind(header: &Header, architecture: &str) -> Result<(), AdapterError> {
    let metadata = &header.metadata;
    let wanted = [("general.type", "adapter"), ("general.architecture", architecture), ("adapter.type", "lora")];
    for (key, wanted) in wanted {
        let given = metadata.str(key)?.unwrap_or_default();
        if given != wanted {
            return Err(AdapterError::Kind { key, given: given.to_owned(), wanted: wanted.to_owned() });
        }
    }
    let unsupported = |what: &str, why| Err(AdapterError::Unsupported { what: what.to_owned(), why });
    if metadata.f32("adapter.lora.alpha")?.is_some_and(|alpha| !alpha.is_finite()) {
        return unsupported("`adapter.lora.alpha`", "it is not a finite number");
    }
    if metadata.get("adapter.alora.invocation_tokens").is_some() {
        return unsupported(
            "an adapter that begins at certain tokens",
            "the scale of an adapter is one for all tokens",
        );
    }
    if header.n_shards > 1 {
        return unsupported("an adapter in several files", "llama.cpp reads one");
    }
    Ok(())
}

/// Both halves of each weight's adapter, by the weight's name. Norms are left out, as llama.cpp does.
fn pairs(header: &Header) -> Result<Vec<(String, LowRank)>, AdapterError> {
    let mut halves: HashMap<&str, [Option<&TensorInfo>; 2]> = HashMap::new();
    for tensor in &header.tensors {
        let name = tensor.name.as_str();
        let half = [".lora_a", ".lora_b"].into_iter().position(|suffix| name.ends_with(suffix));
        match half {
            Some(half) => halves.entry(&name[..name.len() - ".lora_a".len()]).or_default()[half] = Some(tensor),
            None if name.ends_with("_norm.weight") => {}
            None => {
                let problem = "is none of an adapter's: their names end in `.lora_a` or `.lora_b`".to_owned();
                return Err(AdapterError::Tensor { name: name.to_owned(), problem });
            }
        }
    }
    if halves.is_empty() {
        return Err(AdapterError::Unsupported { what: "this adapter".to_owned(), why: "it has no matrices" });
    }
    halves
        .into_iter()
        .map(|(weight, halves)| match halves {
            [Some(a), Some(b)] => Ok((weight.to_owned(), LowRank { a: a.clone(), b: b.clone() })),
            [a, b] => {
                let name = a.or(b).map_or(weight, |tensor| &tensor.name).to_owned();
                Err(AdapterError::Tensor { name, problem: "lacks its other half".to_owned() })
            }
        })
        .collect()
}

/// Whether ggml has products with such a matrix: floats of two and four bytes, and everything in blocks.
fn is_multiplied(ggml_type: GgmlType) -> bool {
    matches!(ggml_type, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16) || ggml_type.block_elements() > 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimate::{DeviceTraits, HostTraits, LoadSettings, Placement, estimate};
    use crate::gguf::FileBuilder;
    use crate::synthetic;

    fn header(file: &FileBuilder) -> Header {
        Header::parse(&file.header_bytes(), file.file_bytes()).unwrap()
    }

    fn base(name: &str) -> (Header, ModelShape) {
        let header = header(&synthetic::shape_with_layers(name, 2).unwrap());
        let shape = ModelShape::of(&header).unwrap();
        (header, shape)
    }

    fn refusal(name: &str, change: impl FnOnce(&mut FileBuilder)) -> String {
        let (base, mut shape) = base(name);
        let mut file = synthetic::adapter(&base, 8, |weight| weight.contains("attn_q"));
        change(&mut file);
        shape.add_adapter(&header(&file)).expect_err("refused").to_string()
    }

    #[test]
    fn an_adapter_lies_where_its_weights_lie() {
        let (base, mut shape) = base("llama2-7b-q4_0");
        let unadapted = shape.clone();
        let adapter = header(&synthetic::adapter(&base, 16, |_| true));
        let bytes: u64 = adapter.tensors.iter().map(|tensor| tensor.bytes).sum();
        shape.add_adapter(&adapter).unwrap();
        for (n_layers, share) in [(3, 1.0), (0, 0.0)] {
            let placement = Placement::split(&shape, &[n_layers]);
            let of = |model| {
                estimate(model, &LoadSettings::default(), &placement, &[DeviceTraits::CUDA], &HostTraits::default())
            };
            let (with, without) = (of(&shape), of(&unadapted));
            let more = |with: u64, without: u64| (with - without) as f64 / bytes as f64;
            let on_device = more(with.devices[0].weights_bytes, without.devices[0].weights_bytes);
            let on_host = more(with.host.weights_bytes, without.host.weights_bytes);
            // The token table's part stays on the host with it.
            assert!((on_device - share).abs() < 0.2, "{on_device}");
            assert!((on_device + on_host - 1.0).abs() < 1e-9, "{on_device} {on_host}");
        }
    }

    #[test]
    fn adapters_that_llama_cpp_would_not_survive_are_refused() {
        let q = "blk.0.attn_q.weight";
        let shapes: [(&str, &[u64], &[u64]); 4] = [
            ("lora_a is as wide as the weight's input", &[4095, 8], &[8, 4096]),
            ("both have one rank", &[4096, 8], &[16, 4096]),
            ("lora_b is as long as the weight's output", &[4096, 8], &[8, 4095]),
            ("as many planes as the weight", &[4096, 8, 2], &[8, 4096]),
        ];
        for (rule, a, b) in shapes {
            let text = refusal("llama2-7b-q4_0", |file| {
                *file = synthetic::adapter(&base("llama2-7b-q4_0").0, 8, |_| false);
                file.add_tensor(&format!("{q}.lora_a"), GgmlType::F32, a);
                file.add_tensor(&format!("{q}.lora_b"), GgmlType::F32, b);
            });
            assert!(text.contains("has the shape"), "{rule}: {text}");
        }
        let model = "llama2-7b-q4_0";
        let alone =
            |name: &'static str| move |file: &mut FileBuilder| _ = file.add_tensor(name, GgmlType::F32, &[64, 8]);
        assert!(refusal(model, alone("blk.9.attn_q.weight.lora_a")).contains("lacks its other half"));
        assert!(refusal(model, alone("blk.0.attn_q.weight.bias")).contains("none of an adapter's"));
        let other = |file: &mut FileBuilder| _ = file.set("general.architecture", "gemma2");
        assert!(refusal(model, other).contains("says \"llama\""));
        assert!(refusal(model, |file| _ = file.set("general.type", "model")).contains("general.type"));
        assert!(refusal(model, |file| _ = file.set("adapter.type", "dora")).contains("adapter.type"));
        assert!(refusal(model, |file| _ = file.set("adapter.lora.alpha", f32::NAN)).contains("finite"));
        assert!(refusal(model, |file| _ = file.set("adapter.lora.alpha", 16_u64)).contains("adapter.lora.alpha"));
        let tied = refusal("gemma-2b-q8_0", |file| {
            file.add_tensor("token_embd.weight.lora_a", GgmlType::F32, &[8, 256_000]);
            file.add_tensor("token_embd.weight.lora_b", GgmlType::F32, &[8, 2048]);
        });
        assert!(tied.contains("output layer too"), "{tied}");
    }

    #[test]
    fn experts_have_a_pair_for_each_expert() {
        let (base, mut shape) = base("mixtral-8x7b-q4_0");
        let adapter = header(&synthetic::adapter(&base, 4, |weight| weight.contains("ffn_up_exps")));
        shape.add_adapter(&adapter).unwrap();
        assert_eq!(adapter.tensors[0].dims, [4096, 4, 8]);
        for _ in 1..MAX_ADAPTERS {
            shape.add_adapter(&adapter).unwrap();
        }
        assert!(matches!(shape.add_adapter(&adapter), Err(AdapterError::TooMany { given: 17 })));
    }
}
