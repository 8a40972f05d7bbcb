//! What one token reads: the measure of speed while one sequence is decoded.

use super::cache::CacheShape;
use super::model::ModelShape;
use super::placement::{Placement, is_expert};
use super::settings::LoadSettings;

/// What one token reads and moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reads {
    pub(crate) devices: Vec<DeviceReads>,
    pub(crate) host_bytes: u64,
}

/// One device's part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct DeviceReads {
    pub(crate) bytes: u64,
    /// Tensors that come to the device or leave it.
    pub(crate) n_crossings: u32,
}

/// Tensors that cross where a layer's experts are elsewhere: the hidden state, which experts and how much of each, and the result.
const EXPERT_CROSSINGS: u32 = 4;

/// Weights that take part, and a quarter of the cache: of the experts only as many as are used, of the token table one row.
pub(crate) fn reads_per_token(model: &ModelShape, settings: &LoadSettings, placement: &Placement) -> Reads {
    let n_devices = placement.n_devices();
    // The host comes last.
    let mut reads = vec![DeviceReads::default(); n_devices + 1];
    let cache = CacheShape::of(model, settings);
    let n_sequences = u64::from(settings.n_sequences.max(1));
    let mut before = n_devices; // the token table
    for (il, layer) in (0..model.n_layers).zip(&model.layers) {
        let home = placement.layer_backend(il);
        for (name, tensor) in &layer.tensors {
            let read = match (is_expert(name), model.n_experts) {
                (true, n_experts) if n_experts > 0 => tensor.bytes / u64::from(n_experts) * layer.n_experts_used.max(1),
                _ => tensor.bytes,
            };
            reads[placement.tensor_backend(il, name)].bytes += read;
        }
        reads[home].bytes += model.adapters.layer_bytes(il);
        reads[home].bytes += cache.layer_tensors(model, il).iter().sum::<u64>() / n_sequences / 4;
        if layer.tensors.keys().any(|name| is_expert(name) && placement.tensor_backend(il, name) != home) {
            reads[home].n_crossings += EXPERT_CROSSINGS;
        }
        cross(&mut reads, before, home);
        before = home;
    }
    cross(&mut reads, before, placement.output_backend());
    cross(&mut reads, placement.output_backend(), n_devices); // who samples
    let output = if model.is_tied() { "token_embd.weight" } else { "output.weight" };
    reads[placement.output_backend()].bytes += model.outside.get(output).map_or(0, |tensor| tensor.bytes);
    let host_bytes = reads.pop().map_or(0, |host| host.bytes);
    Reads { devices: reads, host_bytes }
}

/// Between two devices the hidden state goes through the host.
fn cross(reads: &mut [DeviceReads], from: usize, to: usize) {
    if from != to {
        reads[from].n_crossings += 1;
        reads[to].n_crossings += 1;
    }
}

/// Weights and cache of each layer, the output layer last: what moves with a layer.
pub(crate) fn layer_bytes(model: &ModelShape, settings: &LoadSettings) -> Vec<u64> {
    let cache = CacheShape::of(model, settings);
    let layers = (0..model.n_layers_all).zip(&model.layers).map(|(il, layer)| {
        let weights: u64 = layer.tensors.values().map(|tensor| tensor.bytes).sum();
        let weights = if il < model.n_layers { weights + model.adapters.layer_bytes(il) } else { 0 };
        weights.saturating_add(cache.layer_tensors(model, il).iter().sum())
    });
    let output = if model.is_tied() { "token_embd.weight" } else { "output.weight" };
    layers.chain([model.outside.get(output).map_or(0, |tensor| tensor.bytes)]).collect()
}
