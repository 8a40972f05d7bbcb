//! What a projector's header says: its encoders, their sizes and tensors.

use std::collections::HashMap;

use super::family::{AtLoad, Family, Kind, Largest};
use crate::estimate::EstimateError;
use crate::gguf::{Array, Header, TensorInfo, Value};

/// Layers of an encoder: those of the text models are the measure.
const MAX_LAYERS: u64 = 512;
/// The largest width that is believed, and the largest of a tensor's dimensions.
const MAX_SIZE: u64 = 1 << 24;
/// Heads: a hundred times what there is.
const MAX_HEADS: u64 = 1 << 12;
/// Elements of one tensor.
const MAX_ELEMENTS: u64 = 1 << 36;
/// Pixels per side (`load_hparams` of `clip.cpp`).
const MAX_IMAGE_PIXELS: u64 = 8192;
/// Patches of one picture: scores between all of them still fit in 64 bits.
const MAX_PATCHES: u64 = 1 << 18;
/// Patches per side that become one output token.
const MAX_MERGE: u64 = 64;
/// Bands of a spectrum (`load_hparams` of `clip.cpp`; 640 samples where there is no spectrum).
const MAX_BANDS: u64 = 1024;

/// Tensors that `load_tensors` of `clip.cpp` asks for by a name of its own, whichever encoder it loads.
const TWICE: [&str; 4] = ["v.class_embd", "v.patch_embd.", "v.norm_embd.", "v.deepstack."];

/// Frames of sound that memory is reserved for: 30 seconds (`warmup_audio_size`).
const FRAMES: u64 = 3000;

/// Sizes of a multimodal projector: a file with `general.architecture = clip`, which llama.cpp loads beside a text model.
#[derive(Debug, Clone)]
pub struct ProjectorShape {
    pub(super) encoders: Vec<Encoder>,
    /// Bytes of every tensor that is loaded.
    pub(super) tensor_bytes: Vec<u64>,
}

/// An encoder of images or sound, with what is behind it.
#[derive(Debug, Clone)]
pub(super) struct Encoder {
    pub(super) family: &'static Family,
    pub(super) n_embd: u64,
    pub(super) n_heads: u64,
    pub(super) n_kv_heads: u64,
    pub(super) head: u64,
    /// Pixels per side of a patch; 1 for sound.
    pub(super) patch: u64,
    /// Patches per side that become one output token.
    pub(super) merge: u64,
    /// Positions that become one row (sound).
    pub(super) stack: u64,
    /// Of so many layers one sees more than its window; 0 without windows.
    pub(super) window_period: u64,
    /// Layers whose output is wanted, if not the last one's.
    pub(super) feature_layers: Vec<u64>,
    pub(super) is_sound: bool,
    /// Tensors of the layers, by the name behind `v.blk.N.`.
    pub(super) layers: Vec<HashMap<String, TensorInfo>>,
    pub(super) outside: HashMap<String, TensorInfo>,
    /// `clip.vision.image_size`, or the bands of a spectrum.
    image: u64,
    longest_edge: u64,
    max_pixels: Option<u64>,
}

/// What an encoder gets, in pixels; frames and bands for sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Picture {
    pub(super) width: u64,
    pub(super) height: u64,
}

impl ProjectorShape {
    /// Reads the sizes from a header that passed its checks.
    ///
    /// # Errors
    /// [`EstimateError`] when a size is missing or cannot be, or for a kind of projector that llama.cpp does not know.
    pub fn of(header: &Header) -> Result<Self, EstimateError> {
        let metadata = &header.metadata;
        for tensor in &header.tensors {
            let elements = tensor.dims.iter().fold(1, |n: u64, &dim| n.saturating_mul(dim.max(1)));
            let widest = tensor.dims.iter().copied().max().unwrap_or(0);
            limit(&format!("dimensions of {}", tensor.name), widest, MAX_SIZE)?;
            limit(&format!("elements of {}", tensor.name), elements, MAX_ELEMENTS)?;
        }
        let has_vision = metadata.bool("clip.has_vision_encoder")?.unwrap_or(false);
        let has_sound = metadata.bool("clip.has_audio_encoder")?.unwrap_or(false);
        let is_of_sound = |name: &str| name.starts_with("a.") || name.starts_with("mm.a.");
        let mut encoders = Vec::new();
        if has_vision {
            let tensors = header.tensors.iter().filter(|tensor| !has_sound || !is_of_sound(&tensor.name));
            encoders.push(Encoder::of(header, "vision", tensors)?);
        }
        // The encoder of sound of Gemma 3n is in the file, and llama.cpp passes over it.
        let skips_sound = encoders.first().is_some_and(|encoder| encoder.family.name == "gemma3nv");
        if has_sound && !skips_sound {
            let tensors = header.tensors.iter().filter(|tensor| !has_vision || is_of_sound(&tensor.name));
            encoders.push(Encoder::of(header, "audio", tensors)?);
        }
        if encoders.is_empty() {
            return Err(EstimateError::Missing { key: "clip.has_vision_encoder".to_owned() });
        }
        let tensors = header.tensors.iter().filter(|tensor| !skips_sound || !is_of_sound(&tensor.name));
        // The way in of the encoder of images is loaded for the one of sound once more.
        let is_twice = |name: &str| encoders.len() > 1 && TWICE.iter().any(|start| name.starts_with(start));
        let n_times = |name: &str| if is_twice(name) { 2 } else { 1 };
        let tensor_bytes =
            tensors.flat_map(|tensor| std::iter::repeat_n(tensor.bytes, n_times(&tensor.name))).collect();
        Ok(Self { encoders, tensor_bytes })
    }

    /// What the encoders' kinds are called, as `clip.projector_type` has it.
    pub fn kinds(&self) -> Vec<&'static str> {
        self.encoders.iter().map(|encoder| encoder.family.name).collect()
    }

    /// Whether scratch is a bound: the graph of one of the encoders is not written down.
    pub fn is_bound(&self) -> bool {
        self.encoders.iter().any(|encoder| encoder.family.kind == Kind::Other)
    }
}

impl Encoder {
    /// `kind` is `vision` or `audio`.
    fn of<'a>(
        header: &Header,
        kind: &str,
        tensors: impl Iterator<Item = &'a TensorInfo>,
    ) -> Result<Self, EstimateError> {
        let metadata = &header.metadata;
        let key = |name: &str| format!("clip.{kind}.{name}");
        let open = |name: &str, most: u64| {
            let value = metadata.u32(&key(name))?.map(u64::from);
            value.map_or(Ok(None), |value| limit(&key(name), value, most).map(Some))
        };
        let missing = |name: &str| EstimateError::Missing { key: key(name) };
        let given = |name: &str, most: u64| {
            let value = open(name, most)?.filter(|&value| value > 0);
            value.ok_or_else(|| missing(name))
        };
        let family = family(header, kind)?;
        let is_sound = kind == "audio";
        let n_layers = open("block_count", MAX_LAYERS)?.ok_or_else(|| missing("block_count"))?;
        // The blocks of MobileNet are numbered in stages.
        let n_layers = if family.kind == Kind::Mobile { 0 } else { n_layers };
        let n_embd = given("embedding_length", MAX_SIZE)?;
        let n_heads = open("attention.head_count", MAX_HEADS)?.ok_or_else(|| missing("attention.head_count"))?.max(1);
        let (image, patch) = if is_sound {
            // Gemma 4's are pieces of the wave itself.
            (if family.name == "gemma4ua" { 640 } else { given("num_mel_bins", MAX_BANDS)? }, 1)
        } else {
            (open("image_size", MAX_IMAGE_PIXELS)?.unwrap_or(0), given("patch_size", MAX_IMAGE_PIXELS)?)
        };
        let (image, patch) = if family.name.starts_with("deepseekocr") { (1024, 16) } else { (image, patch) };
        let merge = family.merge_key.map_or(Ok(None), |name| open(name, MAX_MERGE))?;
        let (mut layers, mut outside) = (vec![HashMap::new(); n_layers as usize], HashMap::new());
        for tensor in tensors {
            let of_layer = layer_and_name(&tensor.name).and_then(|(il, name)| Some((layers.get_mut(il)?, name)));
            let (map, name) = of_layer.unwrap_or((&mut outside, tensor.name.as_str()));
            map.insert(name.to_owned(), tensor.clone());
        }
        let merge = merge.unwrap_or_else(|| family.merge.into()).max(1);
        // Without an encoder, patches are as large as tokens from the start.
        let (patch, merge) = if family.name == "gemma4uv" { (patch * merge, 1) } else { (patch, merge) };
        let encoder = Self {
            family,
            n_embd,
            n_heads,
            n_kv_heads: open("attention.head_count_kv", MAX_HEADS)?.unwrap_or(n_heads).max(1),
            head: open("attention.head_dim", MAX_SIZE)?.filter(|&head| head > 0).unwrap_or(n_embd / n_heads),
            patch,
            merge,
            stack: open("projector.stack_factor", MAX_SIZE)?.unwrap_or(0),
            window_period: open("n_wa_pattern", MAX_LAYERS)?.unwrap_or(0),
            feature_layers: feature_layers(header, &key("feature_layer")),
            is_sound,
            layers,
            outside,
            image,
            longest_edge: open("preproc_image_size", MAX_IMAGE_PIXELS)?.unwrap_or(0),
            max_pixels: metadata.u32(&key("image_max_pixels"))?.map(u64::from),
        };
        encoder.check(kind)?;
        Ok(encoder)
    }

    /// No header makes a graph that cannot be counted.
    fn check(&self, kind: &str) -> Result<(), EstimateError> {
        let key = |name: &str| format!("clip.{kind}.{name}");
        limit(&key("attention.head_dim"), self.head.saturating_mul(self.n_heads.max(self.n_kv_heads)), MAX_SIZE)?;
        if !self.is_sound {
            for picture in [self.at_load(None), self.largest(None)] {
                limit(&key("image_size"), self.patches(picture), MAX_PATCHES)?;
            }
        }
        Ok(())
    }

    /// Patches of a picture.
    pub(super) fn patches(&self, Picture { width, height }: Picture) -> u64 {
        (width / self.patch).saturating_mul(height / self.patch)
    }

    /// The picture that llama.cpp reserves memory for when it loads the file.
    pub(super) fn at_load(&self, image_max_tokens: Option<u32>) -> Picture {
        if self.is_sound {
            return Picture { width: FRAMES, height: self.image };
        }
        match self.family.at_load {
            AtLoad::ImageSize => Picture { width: self.image, height: self.image },
            AtLoad::Side(side) => {
                let most = image_max_tokens.filter(|&most| most > 0 && most < side * side);
                let side = most.map_or(side, u32::isqrt).max(1);
                let pixels = u64::from(side) * self.patch * self.merge;
                Picture { width: pixels, height: pixels }
            }
            AtLoad::Largest => {
                let pixels = self.max_pixels(image_max_tokens).isqrt();
                Picture { width: pixels, height: pixels }
            }
        }
    }

    /// The largest picture that it is ever given.
    pub(super) fn largest(&self, image_max_tokens: Option<u32>) -> Picture {
        let at_load = self.at_load(image_max_tokens);
        let largest = match self.family.largest {
            _ if self.is_sound => at_load,
            Largest::ImageSize => at_load,
            Largest::LongestEdge => {
                let edge = if self.longest_edge > 0 { self.longest_edge } else { self.image };
                Picture { width: edge, height: edge }
            }
            Largest::Tokens(_) | Largest::Pixels(_) => {
                let token = self.patch * self.merge;
                let n_tokens = (self.max_pixels(image_max_tokens) / token.saturating_mul(token)).max(1);
                let columns = n_tokens.isqrt();
                Picture { width: columns * token, height: n_tokens.div_ceil(columns) * token }
            }
        };
        if self.patches(largest) < self.patches(at_load) { at_load } else { largest }
    }

    fn max_pixels(&self, image_max_tokens: Option<u32>) -> u64 {
        let token = self.patch.saturating_mul(self.merge).saturating_pow(2);
        let of = |n_tokens: u32| token.saturating_mul(n_tokens.into());
        match self.family.largest {
            Largest::Tokens(most) => match image_max_tokens.filter(|&n| n > 0) {
                Some(n_tokens) => of(n_tokens).min(self.patch.saturating_pow(2).saturating_mul(MAX_PATCHES)),
                None => of(most),
            },
            Largest::Pixels(most) => self.max_pixels.filter(|&n| n > 0).unwrap_or_else(|| of(most)),
            Largest::ImageSize | Largest::LongestEdge => self.image.saturating_pow(2),
        }
    }
}

fn limit(key: &str, value: u64, limit: u64) -> Result<u64, EstimateError> {
    if value <= limit { Ok(value) } else { Err(EstimateError::Size { key: key.to_owned(), value, limit }) }
}

/// By the key for the whole file, or by that of one encoder.
fn family(header: &Header, kind: &str) -> Result<&'static Family, EstimateError> {
    let own = format!("clip.{kind}.projector_type");
    let name = match header.metadata.str("clip.projector_type")? {
        Some(name) if !name.is_empty() => name,
        _ => header.metadata.str(&own)?.ok_or(EstimateError::Missing { key: own })?,
    };
    let name = match (name, kind) {
        ("qwen2.5o", "vision") => "qwen2.5vl_merger",
        ("qwen2.5o", _) => "qwen2a",
        _ => name,
    };
    Family::of(name).ok_or_else(|| EstimateError::Projector { name: name.to_owned() })
}

/// Converters write signed numbers here.
fn feature_layers(header: &Header, key: &str) -> Vec<u64> {
    match header.metadata.get(key) {
        Some(Value::Array(Array::I32(layers))) => {
            layers.iter().filter_map(|&layer| u64::try_from(layer).ok()).take(MAX_LAYERS as usize).collect()
        }
        _ => Vec::new(),
    }
}

/// `v.blk.7.ln1.weight` is layer 7's `ln1.weight`.
fn layer_and_name(name: &str) -> Option<(usize, &str)> {
    let rest = name.strip_prefix("v.blk.").or_else(|| name.strip_prefix("a.blk."))?;
    let (layer, rest) = rest.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}
