//! Attention over a cache, or over the tokens of the step alone.

use super::{Builder, Id, Memory, Op, SCALES_QUERIES, WITHOUT_ROPE, row_bytes};
use crate::estimate::cache::{CacheShape, Cells};
use crate::gguf::GgmlType;

/// Inputs of the layers that see everything, or of those with a window.
#[derive(Clone, Copy)]
pub(super) struct Input {
    k_rows: Id,
    v_rows: Id,
    mask: Id,
    /// Hadamard matrices that spread a quantised cache's error over the head.
    k_rotation: Option<Id>,
    v_rotation: Option<Id>,
}

/// Queries, keys and values of a step, each `[head, heads, tokens]`.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(super) q: Id,
    pub(super) k: Id,
    pub(super) v: Id,
}

impl Builder<'_> {
    pub(super) fn add_attention_inputs(&mut self) {
        let n_tokens = self.step.n_tokens;
        let mask_type = if self.step.flash_attention { GgmlType::F16 } else { GgmlType::F32 };
        if self.model.memory == Memory::None {
            for windowed in [false, true] {
                let mask = self.graph.input(mask_type, [n_tokens, n_tokens, 1, 1]);
                self.inputs.attention[usize::from(windowed)] =
                    Some(Input { k_rows: mask, v_rows: mask, mask, k_rotation: None, v_rotation: None });
            }
            return;
        }
        for windowed in [false, true] {
            let n_cells = self.cache.n_cells(windowed);
            let n_streams = self.cache.n_streams;
            let k_rows = self.graph.input(GgmlType::I64, [n_tokens, 1, 1, 1]);
            let rows_per_token = if self.step.flash_attention { 1 } else { self.cache.widest_v };
            let v_rows = self.graph.input(GgmlType::I64, [n_tokens * rows_per_token, 1, 1, 1]);
            let mask = self.graph.input(mask_type, [n_cells, n_tokens / n_streams, 1, n_streams]);
            let rotation = self.cache.rotation(windowed);
            let k_rotation = rotation.k.map(|n| self.graph.input(GgmlType::F32, [n, n, 1, 1]));
            let v_rotation = rotation.v.map(|n| self.graph.input(GgmlType::F32, [n, n, 1, 1]));
            self.inputs.attention[usize::from(windowed)] = Some(Input { k_rows, v_rows, mask, k_rotation, v_rotation });
        }
    }

    /// Projections, rotary positions, the attention itself and its output projection.
    pub(super) fn attention(&mut self, il: u32, normed: Id) -> Id {
        let layer = self.layer_of(il);
        let model = self.model;
        let mut heads = self.project(il, normed);
        let rotates = !model.is_one_of(&WITHOUT_ROPE) && !model.rotates_nothing;
        for (head, name) in [(&mut heads.q, "attn_q_norm"), (&mut heads.k, "attn_k_norm")] {
            if layer.has(&format!("{name}.weight")) {
                *head = self.head_norm(il, *head, name);
            }
            if rotates {
                let positions = self.positions();
                let factors = self.outside("rope_freqs.weight");
                *head = self.graph.rope(*head, positions, factors);
            }
        }
        if model.is_one_of(&SCALES_QUERIES) {
            heads.q = self.graph.in_place(heads.q, &[]);
        }
        let attended = self.attend(il, heads);
        self.linear(il, "attn_output", attended).unwrap_or(attended)
    }

    /// Norms over heads, or over all heads at once where the weight is that long.
    fn head_norm(&mut self, il: u32, head: Id, name: &str) -> Id {
        let shape = self.graph.shape(head);
        let width =
            self.layer_of(il).tensors.get(&format!("{name}.weight")).and_then(|tensor| tensor.dims.first().copied());
        if width == Some(shape[0]) {
            return self.norm(il, head, name);
        }
        let flat = self.graph.reshape(head, [shape[0] * shape[1], shape[2], 1, 1]);
        let normed = self.norm(il, flat, name);
        self.graph.reshape(normed, shape)
    }

    fn project(&mut self, il: u32, a: Id) -> Heads {
        let layer = self.layer_of(il);
        let n_tokens = self.step.n_tokens;
        let (q_shape, k_shape, v_shape) = (
            [layer.head_k, layer.n_heads, n_tokens],
            [layer.head_k, layer.n_kv_heads, n_tokens],
            [layer.head_v, layer.n_kv_heads, n_tokens],
        );
        if let Some(qkv) = self.linear(il, "attn_qkv", a) {
            let stride = self.graph.get(qkv).strides[1];
            let row = |n| row_bytes(GgmlType::F32, n);
            let mut part = |shape: [u64; 3]| self.graph.view_3d(qkv, shape, [row(shape[0]), stride]);
            return Heads { q: part(q_shape), k: part(k_shape), v: part(v_shape) };
        }
        let parts = ["attn_q", "attn_k", "attn_v"].map(|name| self.linear(il, name, a).unwrap_or(a));
        let mut part = |id, [n0, n1, n2]: [u64; 3]| self.graph.reshape(id, [n0, n1, n2, 1]);
        Heads { q: part(parts[0], q_shape), k: part(parts[1], k_shape), v: part(parts[2], v_shape) }
    }

    /// `build_attn`: stores keys and values, then attends to all that are stored.
    pub(super) fn attend(&mut self, il: u32, mut heads: Heads) -> Id {
        let windowed = self.layer_of(il).is_windowed;
        let Some(input) = self.inputs.attention[usize::from(windowed)] else { return heads.q };
        if self.model.memory == Memory::None {
            for id in [heads.q, heads.k, heads.v] {
                self.graph.expand(id);
            }
            return self.attend_to(il, heads, input.mask, None);
        }
        if let Some(rotation) = input.k_rotation {
            heads.q = self.rotate(heads.q, rotation);
            heads.k = self.rotate(heads.k, rotation);
        }
        if let Some(rotation) = input.v_rotation {
            heads.v = self.rotate(heads.v, rotation);
        }
        // Models with windows and those without expand in different orders.
        let order = if self.cache.has_windows { [heads.q, heads.k, heads.v] } else { [heads.q, heads.v, heads.k] };
        for id in order {
            self.graph.expand(id);
        }
        let Some(cells) = self.cells(il) else { return heads.q };
        if self.model.has_cells(il) {
            self.store(heads.k, cells.k, input.k_rows, cells, false);
            self.store(heads.v, cells.v, input.v_rows, cells, !self.step.flash_attention);
        }
        let (k, v) = self.stored(il, cells);
        let attended = self.attend_to(il, Heads { k, v, ..heads }, input.mask, None);
        match input.v_rotation {
            Some(rotation) => self.rotate(attended, rotation),
            None => attended,
        }
    }

    /// The cache of layer `il`, or of the layer whose cache it shares.
    fn cells(&mut self, il: u32) -> Option<CellIds> {
        let owner = CacheShape::owner(self.model, il);
        let cells = self.cache.cells(self.model, owner)?;
        let home = super::Home { backend: self.placement.layer_backend(owner), is_weights: false };
        let Cells { n_cells, n_streams, k_width, v_width, .. } = cells;
        let k = self.graph.external(self.cache.type_k, [k_width, n_cells, n_streams, 1], home);
        let v = self.graph.external(self.cache.type_v, [v_width.max(1), n_cells, n_streams, 1], home);
        Some(CellIds { k, v, n_cells, n_streams })
    }

    /// `cpy_k` and `cpy_v`.
    fn store(&mut self, a: Id, cache: Id, rows: Id, cells: CellIds, transposed: bool) {
        let [head, n_heads, n_tokens, _] = self.graph.shape(a);
        let width = head * n_heads;
        let stored = if transposed {
            let is_dense = self.graph.row_bytes_of(a, width) == self.graph.get(a).strides[2];
            let flat = if is_dense {
                self.graph.reshape(a, [width, n_tokens, 1, 1])
            } else {
                self.graph.cont(a, [width, n_tokens, 1, 1])
            };
            let padded_width = self.graph.shape(cache)[0];
            let flat = if width < padded_width {
                self.graph.result(Op::Other, GgmlType::F32, [padded_width, n_tokens, 1, 1], &[flat])
            } else {
                flat
            };
            let n_cache = self.graph.get(cache).elements();
            let target = self.graph.reshape(cache, [1, n_cache, 1, 1]);
            let n_flat = self.graph.get(flat).elements();
            let single = self.graph.reshape(flat, [1, n_flat, 1, 1]);
            self.graph.set_rows(target, single, rows)
        } else {
            let stride = self.graph.get(a).strides[2];
            let flat = self.graph.view_2d(a, [width, n_tokens], stride);
            let target = if cells.n_streams > 1 {
                self.graph.reshape(cache, [width, cells.n_cells * cells.n_streams, 1, 1])
            } else {
                cache
            };
            self.graph.set_rows(target, flat, rows)
        };
        self.graph.expand(stored);
    }

    /// `get_k` and `get_v`: `[head, heads, cells, streams]`, V with its first three turned around without flash attention.
    fn stored(&mut self, il: u32, cells: CellIds) -> (Id, Id) {
        let layer = self.layer_of(il);
        let view = |builder: &mut Self, cache: Id, head: u64| {
            let width = builder.graph.shape(cache)[0];
            let row = |n| builder.graph.row_bytes_of(cache, n);
            let strides = [row(head), row(width), row(width * cells.n_cells)];
            builder.graph.view_4d(cache, [head, layer.n_kv_heads, cells.n_cells, cells.n_streams], strides)
        };
        let k = view(self, cells.k, layer.head_k);
        if self.step.flash_attention {
            return (k, view(self, cells.v, layer.head_v));
        }
        let width = self.graph.shape(cells.v)[0];
        let row = |n| self.graph.row_bytes_of(cells.v, n);
        let strides = [row(cells.n_cells * layer.head_v), row(cells.n_cells), row(cells.n_cells * width)];
        let shape = [cells.n_cells, layer.n_kv_heads, layer.head_v, cells.n_streams];
        (k, self.graph.view_4d(cells.v, shape, strides))
    }

    /// `llama_mul_mat_hadamard`: blocks of the head times the matrix.
    fn rotate(&mut self, a: Id, rotation: Id) -> Id {
        let n = self.graph.shape(rotation)[0];
        let shape = self.graph.shape(a);
        let n_elements = self.graph.get(a).elements();
        let source = if self.graph.get(a).is_contiguous() { a } else { self.graph.cont(a, shape) };
        let blocks = self.graph.reshape(source, [n, n_elements / n, 1, 1]);
        let turned = self.graph.mul_mat(rotation, blocks);
        self.graph.reshape(turned, shape)
    }

    /// `build_attn_mha`.
    pub(super) fn attend_to(&mut self, il: u32, Heads { q, k, v }: Heads, mask: Id, expand_v: Option<Id>) -> Id {
        let graph = &mut self.graph;
        let n_streams = graph.shape(k)[3];
        let v_strides = graph.get(v).strides;
        let is_transposed = v_strides[1] > v_strides[2];
        let [head, n_heads, n_tokens, _] = graph.shape(q);
        let q_strides = graph.get(q).strides;
        let per_stream = n_tokens / n_streams;
        let q = graph.view_4d(
            q,
            [head, n_heads, per_stream, n_streams],
            [q_strides[1], q_strides[2], q_strides[2] * per_stream],
        );
        let [q, mut k, mut v] = [q, k, v].map(|id| graph.permute(id, [0, 2, 1, 3]));
        let softcap = self.model.flag("attn_logit_softcapping") != 0.0;
        let sinks = self.weight(il, "attn_sinks.weight");
        let graph = &mut self.graph;
        let attended = if self.step.flash_attention {
            if is_transposed {
                v = graph.transpose(v);
            }
            for cached in [&mut k, &mut v] {
                if graph.get(*cached).ggml_type == GgmlType::F32 {
                    *cached = graph.cast(*cached, GgmlType::F16);
                }
            }
            let shape = [graph.shape(v)[0], n_heads, per_stream, n_streams];
            let sources: Vec<Id> = [q, k, v, mask].into_iter().chain(sinks).collect();
            let mut attended = graph.result(Op::FlashAttention, GgmlType::F32, shape, &sources);
            if let Some(expand_v) = expand_v {
                let turned = graph.permute(attended, [0, 2, 1, 3]);
                let wide = graph.mul_mat(expand_v, turned);
                let back = graph.permute(wide, [0, 2, 1, 3]);
                let shape = graph.shape(back);
                attended = graph.cont(back, shape);
            }
            let [n0, n1, n2, n3] = graph.shape(attended);
            graph.reshape(attended, [n0 * n1, n2 * n3, 1, 1])
        } else {
            let mut scores = graph.mul_mat(k, q);
            for _ in 0..if softcap { 3 } else { 0 } {
                scores = graph.in_place(scores, &[]);
            }
            let more: Vec<Id> = std::iter::once(mask).chain(sinks).collect();
            let probs = graph.in_place(scores, &more);
            if !is_transposed {
                let turned = graph.transpose(v);
                let shape = graph.shape(turned);
                v = graph.cont(turned, shape);
            }
            let mut mixed = graph.mul_mat(v, probs);
            if let Some(expand_v) = expand_v {
                mixed = graph.mul_mat(expand_v, mixed);
            }
            let back = graph.permute(mixed, [0, 2, 1, 3]);
            let [n0, n1, n2, n3] = graph.shape(back);
            graph.cont(back, [n0 * n1, n2 * n3, 1, 1])
        };
        graph.expand(attended);
        attended
    }
}

/// A layer's cache in the graph.
#[derive(Clone, Copy)]
struct CellIds {
    k: Id,
    v: Id,
    n_cells: u64,
    n_streams: u64,
}

impl Builder<'_> {
    /// Compressed attention keeps keys only; values are their first `rank` elements.
    pub(super) fn attend_latent(&mut self, il: u32, heads: Heads, expand_v: Option<Id>) -> Id {
        let Some(input) = self.inputs.attention[0] else { return heads.q };
        for id in [heads.q, heads.v, heads.k] {
            self.graph.expand(id);
        }
        let Some(cells) = self.cells(il) else { return heads.q };
        self.store(heads.k, cells.k, input.k_rows, cells, false);
        let width = self.graph.shape(cells.k)[0];
        let row = |n| self.graph.row_bytes_of(cells.k, n);
        let strides = [row(width), row(width), row(width * cells.n_cells)];
        let k = self.graph.view_4d(cells.k, [width, 1, cells.n_cells, cells.n_streams], strides);
        let rank = self.graph.shape(heads.v)[0];
        let v = self.graph.view_4d(k, [rank, 1, cells.n_cells, cells.n_streams], strides);
        self.attend_to(il, Heads { k, v, ..heads }, input.mask, expand_v)
    }
}
