//! How much memory a multimodal projector will take, from its header alone: weights, and the scratch of its encoders.
//!
//! A projector (`general.architecture = clip`) turns images or sound into rows of a text model's width. llama.cpp's `mtmd`
//! library loads it beside the model, as a whole, onto one device or the host, and reserves scratch for one picture of a size that
//! the header decides. A larger picture makes the scratch grow when it comes, so that an estimate can be asked for either.
//! [`ProjectorShape`] reads the sizes, [`ProjectorSettings`] say what is wanted, [`estimate_projector`] answers.
//!
//! Kinds whose graphs are not written down get a bound; [`ProjectorEstimate::is_bound`] says so.

mod bound;
mod encoder;
mod family;
mod merged;
mod mobile;
mod qwen;
mod shape;
mod sound;
#[cfg(test)]
mod tests;
mod vision;

use serde::{Deserialize, Serialize};

pub use shape::ProjectorShape;

use super::graph::{Backend, reserve};
use super::{DeviceLoad, DeviceTraits, Estimate};
use encoder::Writer;
use family::Kind;
use shape::{Encoder, Picture};

/// The picture that scratch is counted for. For sound both are 30 seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PictureSize {
    /// The one that llama.cpp reserves memory for when it loads the projector.
    AtLoad,
    /// The largest one that a request can bring, alone in its batch: scratch grows to that when it comes.
    #[default]
    Largest,
}

/// How a projector is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectorSettings {
    /// Attention that does not store its scores.
    pub flash_attention: bool,
    /// The most tokens of one picture (`--image-max-tokens`), for kinds that have no fixed size.
    pub image_max_tokens: Option<u32>,
    /// What scratch is counted for.
    pub picture: PictureSize,
}

impl Default for ProjectorSettings {
    fn default() -> Self {
        Self { flash_attention: true, image_max_tokens: None, picture: PictureSize::default() }
    }
}

/// Bytes that a projector takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectorEstimate {
    /// On its device, if it has one, and on the host.
    pub bytes: Estimate,
    /// Scratch is an upper bound.
    pub is_bound: bool,
}

/// Bytes that a projector takes on a device like `device` and on the host, or on the host alone.
pub fn estimate_projector(
    projector: &ProjectorShape,
    device: Option<DeviceTraits>,
    settings: &ProjectorSettings,
) -> ProjectorEstimate {
    let all: Vec<DeviceTraits> = device.into_iter().chain([DeviceTraits::HOST]).collect();
    let mut loads = vec![DeviceLoad::default(); all.len()];
    let alignment = all[0].alignment_bytes.max(1);
    for bytes in &projector.tensor_bytes {
        let padded = bytes.div_ceil(alignment).saturating_mul(alignment);
        loads[0].weights_bytes = loads[0].weights_bytes.saturating_add(padded);
    }
    let backends: Vec<Backend> = all
        .iter()
        .map(|traits| Backend { alignment: traits.alignment_bytes.max(1), offload_from_tokens: None })
        .collect();
    // Each encoder has a context of its own, and none gives its scratch back for another.
    for encoder in &projector.encoders {
        let scratch = scratch_bytes(encoder, settings, &backends);
        for (load, bytes) in loads.iter_mut().zip(scratch) {
            load.compute_bytes = load.compute_bytes.saturating_add(bytes);
        }
    }
    let host = loads.pop().unwrap_or_default();
    ProjectorEstimate {
        bytes: Estimate { devices: loads, host, copied_weights_bytes: 0 },
        is_bound: projector.is_bound(),
    }
}

/// Scratch of one encoder on each backend.
fn scratch_bytes(encoder: &Encoder, settings: &ProjectorSettings, backends: &[Backend]) -> Vec<u64> {
    let at_load = encoder.at_load(settings.image_max_tokens);
    let mut bytes = scratch_for(encoder, at_load, settings, backends);
    let largest = encoder.largest(settings.image_max_tokens);
    if settings.picture == PictureSize::Largest && largest != at_load {
        let more = scratch_for(encoder, largest, settings, backends);
        bytes.iter_mut().zip(more).for_each(|(bytes, more)| *bytes = more.max(*bytes));
    }
    bytes
}

fn scratch_for(encoder: &Encoder, picture: Picture, settings: &ProjectorSettings, backends: &[Backend]) -> Vec<u64> {
    if encoder.family.kind == Kind::Other {
        return bound::scratch_bytes(encoder, picture, settings.flash_attention, backends.len());
    }
    let mut writer = Writer::new(encoder, picture, settings.flash_attention);
    let output = match encoder.family.kind {
        Kind::Siglip(tail) => writer.siglip(tail),
        Kind::InternVl => writer.internvl(),
        Kind::Pixtral => writer.pixtral(),
        Kind::Llava => writer.llava(),
        Kind::Qwen2Vl => writer.qwen2vl(),
        Kind::Qwen3Vl => writer.qwen3vl(),
        Kind::Gemma4 => writer.gemma4(),
        Kind::Merger(merger) => writer.merger(merger),
        Kind::Glm4V => writer.glm4v(),
        Kind::Hunyuan => writer.hunyuan(),
        Kind::Mobile => writer.mobile(),
        Kind::Resampler => writer.resampler(),
        Kind::Whisper(sound) => writer.whisper(sound),
        Kind::Pieces => writer.pieces(),
        Kind::Other => return Vec::new(),
    };
    writer.graph.expand(output);
    reserve(writer.graph, backends, false)
}
