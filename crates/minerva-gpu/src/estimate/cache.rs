//! The KV cache and recurrent states: how many cells of what width each layer keeps.

use super::model::{Memory, ModelShape};
use super::settings::{CELLS_STEP, LoadSettings};
use crate::gguf::GgmlType;

/// The cache of one load.
#[derive(Debug, Clone)]
pub(crate) struct CacheShape {
    pub(crate) type_k: GgmlType,
    pub(crate) type_v: GgmlType,
    pub(crate) n_streams: u64,
    pub(crate) has_windows: bool,
    /// V of the widest layer: without flash attention all layers are padded to it.
    pub(crate) widest_v: u64,
    n_sequences: u64,
    full_cells: u64,
    window_cells: u64,
    flash_attention: bool,
    rotations: [Rotation; 2],
}

/// Sides of the Hadamard matrices that K and V are multiplied with before they are quantised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Rotation {
    pub(crate) k: Option<u64>,
    pub(crate) v: Option<u64>,
}

/// One layer's cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::struct_field_names, reason = "`n_cells` is the field's word for a count of them")]
pub(crate) struct Cells {
    pub(crate) n_cells: u64,
    pub(crate) n_streams: u64,
    pub(crate) k_width: u64,
    /// 0 where values are a part of the keys (compressed attention).
    pub(crate) v_width: u64,
}

impl CacheShape {
    pub(super) fn of(model: &ModelShape, settings: &LoadSettings) -> Self {
        let rounded = settings.rounded(model.causal);
        let pooled = if settings.kv_unified { rounded.n_sequences } else { 1 };
        let window = model.window_tokens.saturating_mul(pooled).saturating_add(rounded.ubatch_tokens);
        let window_cells = if settings.full_windows {
            rounded.stream_cells
        } else {
            window.min(rounded.stream_cells).div_ceil(CELLS_STEP) * CELLS_STEP
        };
        let mut shape = Self {
            type_k: settings.cache_type_k,
            type_v: settings.cache_type_v,
            n_streams: rounded.n_streams,
            has_windows: model.window_tokens > 0,
            widest_v: model.layers.iter().map(super::model::Layer::v_width).max().unwrap_or(0),
            n_sequences: rounded.n_sequences,
            full_cells: rounded.stream_cells,
            window_cells,
            flash_attention: settings.flash_attention,
            rotations: [Rotation::default(); 2],
        };
        shape.rotations = [shape.rotation_of(model, false), shape.rotation_of(model, true)];
        shape
    }

    pub(crate) fn n_cells(&self, windowed: bool) -> u64 {
        if windowed { self.window_cells } else { self.full_cells }
    }

    pub(crate) fn rotation(&self, windowed: bool) -> Rotation {
        self.rotations[usize::from(windowed)]
    }

    /// Quantised caches of layers with one head size, a multiple of 64, are rotated (`llama_kv_cache`'s constructor).
    fn rotation_of(&self, model: &ModelShape, windowed: bool) -> Rotation {
        let own = || (0..model.n_layers).filter(|&il| model.has_cells(il)).map(|il| &model.layers[il as usize]);
        let layers = || own().filter(|layer| layer.is_windowed == windowed);
        let uniform = |head: fn(&super::model::Layer) -> u64| {
            let first = layers().next().map(head).filter(|&n| n > 0)?;
            layers().all(|layer| head(layer) == first).then_some(first)
        };
        let first_is_aligned = |head: fn(&super::model::Layer) -> u64| {
            model.layers.first().is_some_and(|layer| head(layer).is_multiple_of(64))
        };
        let k = uniform(|layer| layer.head_k)
            .filter(|_| is_quantised(self.type_k) && first_is_aligned(|layer| layer.head_k));
        let v = uniform(|layer| layer.head_v)
            .filter(|_| is_quantised(self.type_v) && first_is_aligned(|layer| layer.head_v));
        let largest = |head: u64| (6..63).map(|power| 1 << power).take_while(|side| head.is_multiple_of(*side)).last();
        Rotation { k: k.and_then(largest), v: v.map(|_| 64).filter(|_| model.latent.is_none()) }
    }

    /// The layer whose cells layer `il` reads: its own, or the last of its kind before sharing begins.
    pub(crate) fn owner(model: &ModelShape, il: u32) -> u32 {
        let n_own = model.n_layers_all - model.n_shared_kv_layers;
        if il < n_own {
            return il;
        }
        n_own.saturating_sub(if model.layers[il as usize].is_windowed { 2 } else { 1 })
    }

    pub(crate) fn cells(&self, model: &ModelShape, il: u32) -> Option<Cells> {
        if !model.has_cells(il) {
            return None;
        }
        let layer = &model.layers[il as usize];
        let v_width = match (model.latent.is_some(), self.flash_attention) {
            (true, _) => 0,
            (false, true) => layer.v_width(),
            (false, false) => self.widest_v,
        };
        let n_cells = self.n_cells(layer.is_windowed);
        Some(Cells { n_cells, n_streams: self.n_streams, k_width: layer.k_width(), v_width })
    }

    /// Bytes that layer `il` keeps: its tensors, each of which is rounded up on its own.
    pub(super) fn layer_tensors(&self, model: &ModelShape, il: u32) -> Vec<u64> {
        let mut tensors = Vec::new();
        if let Some(cells) = self.cells(model, il) {
            let n = cells.n_cells.saturating_mul(cells.n_streams);
            for (ggml_type, width) in [(self.type_k, cells.k_width), (self.type_v, cells.v_width)] {
                tensors.push(super::graph::row_bytes(ggml_type, width).saturating_mul(n));
            }
        }
        if model.memory != Memory::Attention && model.has_state(il) {
            for n in [model.recurrent.history, model.recurrent.state] {
                tensors.push(n.saturating_mul(4).saturating_mul(self.n_sequences));
            }
        }
        tensors
    }
}

fn is_quantised(ggml_type: GgmlType) -> bool {
    ggml_type.block_elements() > 1
}
