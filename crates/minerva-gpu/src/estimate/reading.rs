//! What one token reads: the measure of speed while one sequence is decoded.

use super::cache::CacheShape;
use super::model::ModelShape;
use super::placement::{Placement, is_expert};
use super::settings::LoadSettings;

/// Bytes that one token reads from each device, and how often it moves from one to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BytesRead {
    pub(crate) devices: Vec<u64>,
    pub(crate) host: u64,
    pub(crate) n_crossings: u32,
}

/// Weights that take part, and a quarter of the cache: of the experts only as many as are used, of the token table one row.
pub(crate) fn bytes_read_per_token(model: &ModelShape, settings: &LoadSettings, placement: &Placement) -> BytesRead {
    let mut bytes = vec![0_u64; placement.n_devices() + 1];
    let cache = CacheShape::of(model, settings);
    let n_sequences = u64::from(settings.n_sequences.max(1));
    let mut n_crossings = 0;
    for (il, layer) in (0..model.n_layers).zip(&model.layers) {
        let home = placement.layer_backend(il);
        for (name, tensor) in &layer.tensors {
            let read = match (is_expert(name), model.n_experts) {
                (true, n_experts) if n_experts > 0 => tensor.bytes / u64::from(n_experts) * layer.n_experts_used.max(1),
                _ => tensor.bytes,
            };
            bytes[placement.tensor_backend(il, name)] += read;
        }
        bytes[home] += cache.layer_tensors(model, il).iter().sum::<u64>() / n_sequences / 4;
        let next = if il + 1 < model.n_layers { placement.layer_backend(il + 1) } else { placement.output_backend() };
        n_crossings += u32::from(home != next);
        if placement.tensor_backend(il, "ffn_up_exps.weight") != home {
            n_crossings += 2;
        }
    }
    let output = if model.is_tied() { "token_embd.weight" } else { "output.weight" };
    bytes[placement.output_backend()] += model.outside.get(output).map_or(0, |tensor| tensor.bytes);
    let host = bytes.pop().unwrap_or(0);
    BytesRead { devices: bytes, host, n_crossings }
}

/// Weights and cache of each layer, the output layer last: what moves with a layer.
pub(crate) fn layer_bytes(model: &ModelShape, settings: &LoadSettings) -> Vec<u64> {
    let cache = CacheShape::of(model, settings);
    let layers = (0..model.n_layers_all).zip(&model.layers).map(|(il, layer)| {
        let weights: u64 = layer.tensors.values().map(|tensor| tensor.bytes).sum();
        let weights = if il < model.n_layers { weights } else { 0 };
        weights.saturating_add(cache.layer_tensors(model, il).iter().sum())
    });
    let output = if model.is_tied() { "token_embd.weight" } else { "output.weight" };
    layers.chain([model.outside.get(output).map_or(0, |tensor| tensor.bytes)]).collect()
}
