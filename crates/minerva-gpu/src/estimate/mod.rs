//! How much memory a model will take on each device, from its header alone: no weights are read, no llama.cpp is linked.
//!
//! Weights and cache are sums over tensors. Scratch is simulated: `graph` writes down the step that llama.cpp would reserve
//! memory for and packs it with ggml's own rules, so that the figure follows every change of batch, context, cache type and
//! placement. [`ModelShape`] reads the sizes, [`LoadSettings`] and [`Placement`] say what is wanted, [`estimate`] answers.

mod adapter;
mod cache;
mod graph;
mod head;
mod model;
mod placement;
mod projector;
mod reading;
mod settings;
#[cfg(test)]
mod tests;
mod windows;

use serde::{Deserialize, Serialize};

pub use adapter::{AdapterError, MAX_ADAPTERS};
pub use head::HeadShape;
pub use model::ModelShape;
pub use placement::Placement;
pub use projector::{PictureSize, ProjectorEstimate, ProjectorSettings, ProjectorShape, estimate_projector};
pub(crate) use reading::{DeviceReads, layer_bytes, reads_per_token};
pub use settings::LoadSettings;

use crate::gguf::{GgmlType, GgufError, TensorInfo};
use adapter::LowRank;
use cache::CacheShape;
use graph::Backend;
use graph::build::{Step, build};

/// Why a header cannot be estimated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EstimateError {
    /// A key that every model has.
    #[error("the file has no `{key}`")]
    Missing {
        /// The key.
        key: String,
    },
    /// A size that no model has.
    #[error("`{key}` is {value}, the limit is {limit}")]
    Size {
        /// The key.
        key: String,
        /// Its value.
        value: u64,
        /// The largest that is accepted.
        limit: u64,
    },
    /// A kind of projector of which nothing is known.
    #[error("`clip.projector_type` is `{name}`, which is no kind that can be estimated")]
    Projector {
        /// The kind.
        name: String,
    },
    /// A value of the wrong type.
    #[error(transparent)]
    Header(#[from] GgufError),
}

/// What memory on a device is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceTraits {
    /// Bytes that each tensor is rounded up to.
    pub alignment_bytes: u64,
    /// From this many tokens on the device fetches weights that lie on the host instead of leaving the work there.
    pub offload_from_tokens: Option<u64>,
    /// Computes while the host goes on: several such devices that hold a whole model work on several steps at once, and
    /// llama.cpp keeps four copies of what goes in.
    pub pipelines: bool,
    /// Offers pinned memory of the host. Weights that stay on the host are then not repacked.
    pub pins_host: bool,
}

impl DeviceTraits {
    /// The host (`TENSOR_ALIGNMENT` in ggml-impl.h).
    pub const HOST: Self = Self { alignment_bytes: 32, offload_from_tokens: None, pipelines: false, pins_host: false };
    /// A server that lends its own memory (ggml-rpc.cpp).
    pub const RPC: Self = Self { alignment_bytes: 32, offload_from_tokens: None, pipelines: true, pins_host: false };
    /// An NVIDIA device (ggml-cuda.cu).
    pub const CUDA: Self =
        Self { alignment_bytes: 128, offload_from_tokens: Some(32), pipelines: true, pins_host: true };
    /// A Mac's GPU (ggml-metal.cpp): it sees the host's memory, so nothing is fetched.
    pub const METAL: Self = Self { alignment_bytes: 32, offload_from_tokens: None, pipelines: false, pins_host: false };
}

/// What the host does with weights.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostTraits {
    /// Types that the host's matrix code repacks: such weights are allocated even where the file is mapped, and a tied output layer of
    /// such a type is kept twice.
    pub repacked_types: Vec<GgmlType>,
}

/// Bytes on one device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceLoad {
    /// Weights.
    pub weights_bytes: u64,
    /// KV cache and recurrent states.
    pub cache_bytes: u64,
    /// Scratch for one step.
    pub compute_bytes: u64,
}

impl DeviceLoad {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes.saturating_add(self.cache_bytes).saturating_add(self.compute_bytes)
    }
}

/// Bytes on each device, the host last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// In the order of the placement's devices.
    pub devices: Vec<DeviceLoad>,
    /// The host: what is not on a device.
    pub host: DeviceLoad,
    /// Of the host's weights, what is never the file's own pages: repacked ones, and adapters.
    #[serde(default)]
    pub copied_weights_bytes: u64,
}

impl Estimate {
    /// What has to be allocated on the host, where the file is mapped or where it is not: the system can drop the pages of a mapped
    /// file and read them again.
    pub fn host_allocated_bytes(&self, maps_weights: bool) -> u64 {
        let mapped = if maps_weights { self.host.weights_bytes.saturating_sub(self.copied_weights_bytes) } else { 0 };
        self.host.total_bytes().saturating_sub(mapped)
    }
}

/// Bytes that a load with these settings takes on each device.
///
/// `devices` has the traits of the placement's devices, in their order; missing ones count as [`DeviceTraits::CUDA`].
pub fn estimate(
    model: &ModelShape,
    settings: &LoadSettings,
    placement: &Placement,
    devices: &[DeviceTraits],
    host: &HostTraits,
) -> Estimate {
    let backends = backends(placement, devices);
    let cache = CacheShape::of(model, settings);
    let (mut loads, copied_weights_bytes) = held(model, placement, &cache, &backends, host);
    for (load, bytes) in loads.iter_mut().zip(compute_bytes(model, settings, placement, &cache, &backends)) {
        load.compute_bytes = bytes;
    }
    let mut host = loads.pop().unwrap_or_default();
    host.compute_bytes = host.compute_bytes.saturating_add(head::hidden_bytes(model, settings));
    Estimate { devices: loads, host, copied_weights_bytes }
}

/// As [`estimate`], without scratch: a hundred times faster, and a lower bound.
pub(crate) fn estimate_held(
    model: &ModelShape,
    settings: &LoadSettings,
    placement: &Placement,
    devices: &[DeviceTraits],
    host: &HostTraits,
) -> Estimate {
    let cache = CacheShape::of(model, settings);
    let (mut loads, copied_weights_bytes) = held(model, placement, &cache, &backends(placement, devices), host);
    let host = loads.pop().unwrap_or_default();
    Estimate { devices: loads, host, copied_weights_bytes }
}

fn backends(placement: &Placement, devices: &[DeviceTraits]) -> Vec<DeviceTraits> {
    let traits = |index: usize| devices.get(index).copied().unwrap_or(DeviceTraits::CUDA);
    (0..placement.n_devices()).map(traits).chain([DeviceTraits::HOST]).collect()
}

/// Weights and cache per backend, the host last; and what the host copies of its weights.
fn held(
    model: &ModelShape,
    placement: &Placement,
    cache: &CacheShape,
    backends: &[DeviceTraits],
    host: &HostTraits,
) -> (Vec<DeviceLoad>, u64) {
    let mut loads = vec![DeviceLoad::default(); backends.len()];
    let mut copied_bytes: u64 = 0;
    let on_host = backends.len() - 1;
    let nothing = HostTraits::default();
    let host = if backends[..on_host].iter().any(|device| device.pins_host) { &nothing } else { host };
    let pad = |bytes: u64, backend: usize| {
        let alignment = backends[backend].alignment_bytes.max(1);
        bytes.div_ceil(alignment).saturating_mul(alignment)
    };
    each_weight(model, placement, host, |weight, backend| {
        let (load, bytes) = (&mut loads[backend], pad(weight.tensor.bytes, backend));
        load.weights_bytes = load.weights_bytes.saturating_add(bytes);
        let is_copied = match weight.read_by {
            Reader::Lookup => false,
            Reader::Product => host.repacked_types.contains(&weight.tensor.ggml_type),
            Reader::Adapter => true,
        };
        if backend == on_host && is_copied {
            copied_bytes = copied_bytes.saturating_add(bytes);
        }
    });
    for il in 0..model.n_layers_all {
        let backend = placement.layer_backend(il);
        for bytes in cache.layer_tensors(model, il) {
            loads[backend].cache_bytes = loads[backend].cache_bytes.saturating_add(pad(bytes, backend));
        }
    }
    (loads, copied_bytes)
}

/// A tensor that a load reads.
struct Weight<'a> {
    tensor: &'a TensorInfo,
    read_by: Reader,
}

enum Reader {
    /// Rows of a table.
    Lookup,
    /// A matrix product.
    Product,
    /// A product of an adapter, whose weights llama.cpp always copies and never repacks.
    Adapter,
}

/// Calls `add` with every tensor that a load reads, and its place.
fn each_weight(model: &ModelShape, placement: &Placement, host: &HostTraits, mut add: impl FnMut(Weight<'_>, usize)) {
    let multiplied = |tensor| Weight { tensor, read_by: Reader::Product };
    let adapter = |tensor| Weight { tensor, read_by: Reader::Adapter };
    for (il, layer) in (0..model.n_layers).zip(&model.layers) {
        for (name, tensor) in &layer.tensors {
            add(multiplied(tensor), placement.tensor_backend(il, name));
        }
        for (name, parts) in model.adapters.layer(il) {
            let tensors = parts.iter().flat_map(LowRank::tensors);
            tensors.for_each(|tensor| add(adapter(tensor), placement.tensor_backend(il, name)));
        }
    }
    for (name, tensor) in &model.outside {
        let read_by = if name == "output.weight" { Reader::Product } else { Reader::Lookup };
        add(Weight { tensor, read_by }, placement.outside_backend(name));
    }
    for (name, parts) in model.adapters.outside() {
        let tensors = parts.iter().flat_map(LowRank::tensors);
        tensors.for_each(|tensor| add(adapter(tensor), placement.outside_backend(name)));
    }
    if let (true, Some(table)) = (model.is_tied(), model.outside.get("token_embd.weight")) {
        let on_device = placement.output_backend() < placement.n_devices();
        if on_device || host.repacked_types.contains(&table.ggml_type) {
            add(multiplied(table), placement.output_backend());
        }
    }
}

fn compute_bytes(
    model: &ModelShape,
    settings: &LoadSettings,
    placement: &Placement,
    cache: &CacheShape,
    backends: &[DeviceTraits],
) -> Vec<u64> {
    let rounded = settings.rounded(model.causal);
    let step = Step {
        n_tokens: rounded.step_tokens,
        n_sequences: rounded.n_sequences,
        n_outputs: rounded.n_outputs,
        flash_attention: settings.flash_attention,
    };
    let devices = &backends[..placement.n_devices()];
    let pipelined = devices.len() > 1
        && placement.is_full_offload()
        && placement.expert_layers_on_host().is_empty()
        && devices.iter().all(|device| device.pipelines);
    let backends: Vec<Backend> = backends
        .iter()
        .map(|traits| Backend {
            alignment: traits.alignment_bytes.max(1),
            offload_from_tokens: traits.offload_from_tokens,
        })
        .collect();
    graph::reserve(build(model, placement, cache, step), &backends, pipelined)
}
