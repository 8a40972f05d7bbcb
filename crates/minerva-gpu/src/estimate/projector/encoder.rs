//! What the graphs of encoders have in common: the way in, layers, and products.
//!
//! Source: `build_vit` and what it calls, in `clip.cpp` at the pinned release. Order matters: memory is packed in it.

use super::shape::{Encoder, Picture};
use crate::estimate::graph::{Graph, Home, Id, Op};
use crate::gguf::{GgmlType, TensorInfo};

/// Where the weights lie: on the device, or on the host if there is none.
const HOME: Home = Home { backend: 0, is_weights: true };

/// The graph of one encoder in the making.
pub(super) struct Writer<'a> {
    pub(super) graph: Graph,
    pub(super) encoder: &'a Encoder,
    pub(super) picture: Picture,
    pub(super) flash_attention: bool,
}

/// The norm of an encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Norm {
    /// Subtracts the mean.
    Full,
    /// Root mean square; may overwrite its input.
    Rms,
}

/// Rotary positions.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rotary {
    /// Rows and columns, each for half of a head.
    Halves(Id, Id),
    /// All in one operation.
    Joint(Id),
}

/// What the layers of an encoder share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layers<'m> {
    pub(super) norm: Norm,
    pub(super) rotary: Option<Rotary>,
    /// The mask of each layer; layers beyond its end have none.
    pub(super) masks: &'m [Option<Id>],
}

impl<'a> Writer<'a> {
    pub(super) fn new(encoder: &'a Encoder, picture: Picture, flash_attention: bool) -> Self {
        Self { graph: Graph::default(), encoder, picture, flash_attention }
    }

    /// Patches from left to right, and from top to bottom.
    pub(super) fn grid(&self) -> [u64; 2] {
        [self.picture.width / self.encoder.patch, self.picture.height / self.encoder.patch]
    }

    pub(super) fn n_patches(&self) -> u64 {
        self.encoder.patches(self.picture)
    }

    fn add_weight(&mut self, tensor: &TensorInfo) -> Id {
        self.graph.external(tensor.ggml_type, tensor.shape(), HOME)
    }

    /// A weight outside the layers.
    pub(super) fn outside(&mut self, name: &str) -> Option<Id> {
        let encoder = self.encoder;
        encoder.outside.get(name).map(|tensor| self.add_weight(tensor))
    }

    /// A weight of layer `il`.
    pub(super) fn weight(&mut self, il: usize, name: &str) -> Option<Id> {
        let encoder = self.encoder;
        encoder.layers.get(il)?.get(name).map(|tensor| self.add_weight(tensor))
    }

    /// `v.` or `a.` in front of a name.
    pub(super) fn own(&self, name: &str) -> String {
        format!("{}.{name}", if self.encoder.is_sound { "a" } else { "v" })
    }

    /// Adds what is there.
    pub(super) fn plus(&mut self, a: Id, more: Option<Id>) -> Id {
        more.map_or(a, |more| self.graph.in_place(a, &[more]))
    }

    pub(super) fn cont(&mut self, a: Id) -> Id {
        let shape = self.graph.shape(a);
        self.graph.cont(a, shape)
    }

    /// Concatenation in dimension 1.
    pub(super) fn below(&mut self, a: Id, b: Id) -> Id {
        let [n0, n1, n2, n3] = self.graph.shape(a);
        let shape = [n0, n1.saturating_add(self.graph.shape(b)[1]), n2, n3];
        self.graph.result(Op::Other, self.graph.get(a).ggml_type, shape, &[a, b])
    }

    pub(super) fn norm(&mut self, a: Id, norm: Norm, weight: Option<Id>, bias: Option<Id>) -> Id {
        let op = if norm == Norm::Rms { Op::InPlace } else { Op::Other };
        let normed = self.graph.like(op, a, &[]);
        let scaled = self.plus(normed, weight);
        self.plus(scaled, bias)
    }

    /// A norm outside the layers, if the file has it.
    pub(super) fn outer_norm(&mut self, a: Id, norm: Norm, name: &str) -> Id {
        let Some(weight) = self.outside(&format!("{name}.weight")) else { return a };
        let bias = self.outside(&format!("{name}.bias"));
        self.norm(a, norm, Some(weight), bias)
    }

    /// A product with a weight outside the layers, and its bias.
    pub(super) fn outer_linear(&mut self, a: Id, name: &str) -> Id {
        let Some(weight) = self.outside(&format!("{name}.weight")) else { return a };
        let product = self.graph.mul_mat(weight, a);
        let bias = self.outside(&format!("{name}.bias"));
        self.plus(product, bias)
    }

    /// Two products with an activation between them.
    pub(super) fn outer_feed_forward(&mut self, a: Id, [up, down]: [&str; 2]) -> Id {
        let wide = self.outer_linear(a, up);
        let active = self.graph.in_place(wide, &[]);
        self.outer_linear(active, down)
    }

    fn linear(&mut self, il: usize, a: Id, name: &str) -> Option<Id> {
        let weight = self.weight(il, &format!("{name}.weight"))?;
        let product = self.graph.mul_mat(weight, a);
        let bias = self.weight(il, &format!("{name}.bias"));
        Some(self.plus(product, bias))
    }

    /// `ggml_conv_2d`: `[columns, rows, channels, pieces]`.
    pub(super) fn convolved(&mut self, kernel: Id, input: Id, [columns, rows, pieces]: [u64; 3]) -> Id {
        let [kw, kh, channels, n_out] = self.graph.shape(kernel);
        let n_inner = kw.saturating_mul(kh).saturating_mul(channels);
        let ggml_type = unfolded(self.graph.get(kernel).ggml_type);
        let unfolded = self.graph.result(Op::Other, ggml_type, [n_inner, columns, rows, pieces], &[kernel, input]);
        let n_places = columns.saturating_mul(rows).saturating_mul(pieces);
        let flat = self.graph.reshape(unfolded, [n_inner, n_places, 1, 1]);
        let flat_kernel = self.graph.reshape(kernel, [n_inner, n_out, 1, 1]);
        let product = self.graph.mul_mat(flat, flat_kernel);
        let planes = self.graph.reshape(product, [columns, rows, pieces, n_out]);
        let turned = self.graph.permute(planes, [0, 1, 3, 2]);
        self.cont(turned)
    }

    /// A picture's patches, which do not overlap: `[columns, rows, n_embd, 1]`.
    pub(super) fn patches_of(&mut self, raw: Id, name: &str) -> Option<Id> {
        let kernel = self.outside(name)?;
        let [columns, rows] = self.grid();
        Some(self.convolved(kernel, raw, [columns, rows, 1]))
    }

    /// What the host writes: a picture with three channels.
    pub(super) fn raw_picture(&mut self) -> Id {
        self.graph.input(GgmlType::F32, [self.picture.width, self.picture.height, 3, 1])
    }

    /// `build_inp`: `[n_embd, n_patches, 1]`.
    pub(super) fn patches(&mut self) -> Id {
        let raw = self.raw_picture();
        self.patches_from(raw)
    }

    pub(super) fn patches_from(&mut self, raw: Id) -> Id {
        let Some(planes) = self.patches_of(raw, "v.patch_embd.weight") else { return raw };
        let (n_patches, n_embd) = (self.n_patches(), self.graph.shape(planes)[2]);
        let flat = self.graph.reshape(planes, [n_patches, n_embd, 1, 1]);
        let turned = self.graph.transpose(flat);
        let patches = self.cont(turned);
        let bias = self.outside("v.patch_embd.bias");
        self.plus(patches, bias)
    }

    /// `build_vit`: positions are added, then all layers, an average for some of the sound, and a norm.
    pub(super) fn vit(&mut self, input: Id, norm: Norm, positions: Option<Id>, rotary: Option<Rotary>) -> Id {
        let placed = self.plus(input, positions);
        let [n_embd, n_positions, ..] = self.graph.shape(placed);
        let flat = self.graph.reshape(placed, [n_embd, n_positions, 1, 1]);
        let pre_norm = self.own("pre_ln");
        let mut hidden = self.outer_norm(flat, norm, &pre_norm);
        let layers = Layers { norm, rotary, masks: &[] };
        for il in 0..self.encoder.layers.len() {
            hidden = self.layer(il, hidden, layers);
        }
        if self.averages() {
            hidden = self.average(hidden);
        }
        let post_norm =
            if self.encoder.family.name == "dots_ocr" { "mm.post_norm".to_owned() } else { self.own("post_ln") };
        let normed = self.outer_norm(hidden, norm, &post_norm);
        let [n_embd, n_positions, ..] = self.graph.shape(normed);
        self.graph.reshape(normed, [n_embd, n_positions, 1, 1])
    }

    fn averages(&self) -> bool {
        matches!(self.encoder.family.kind, super::family::Kind::Whisper(sound) if sound.averages)
    }

    /// The mean of two neighbours.
    fn average(&mut self, a: Id) -> Id {
        let turned = self.graph.transpose(a);
        let rows = self.cont(turned);
        let [n, n_embd, ..] = self.graph.shape(rows);
        let pooled = self.graph.result(Op::Other, GgmlType::F32, [n / 2, n_embd, 1, 1], &[rows]);
        let back = self.graph.transpose(pooled);
        self.cont(back)
    }

    /// One layer: `[n_embd, n_positions]` in and out.
    pub(super) fn layer(&mut self, il: usize, input: Id, layers: Layers<'_>) -> Id {
        let normed = self.layer_norm(il, input, layers.norm, "ln1");
        let mask = layers.masks.get(il).copied().flatten();
        let mut current = self.attention(il, normed, layers, mask);
        for name in ["ls1.weight", "attn_post_norm.weight"] {
            current = self.scaled(il, current, layers.norm, name);
        }
        let middle = self.graph.in_place(current, &[input]);
        let normed = self.layer_norm(il, middle, layers.norm, "ln2");
        let mut current = self.feed_forward(il, normed);
        for name in ["ffn_post_norm.weight", "ls2.weight"] {
            current = self.scaled(il, current, layers.norm, name);
        }
        let output = self.graph.in_place(middle, &[current]);
        self.scaled(il, output, layers.norm, "out_scale.weight")
    }

    fn layer_norm(&mut self, il: usize, a: Id, norm: Norm, name: &str) -> Id {
        let weight = self.weight(il, &format!("{name}.weight"));
        let bias = self.weight(il, &format!("{name}.bias"));
        self.norm(a, norm, weight, bias)
    }

    /// A factor, or a norm, where the layer has one.
    fn scaled(&mut self, il: usize, a: Id, norm: Norm, name: &str) -> Id {
        let Some(weight) = self.weight(il, name) else { return a };
        if name.contains("norm") { self.norm(a, norm, Some(weight), None) } else { self.graph.in_place(a, &[weight]) }
    }

    fn attention(&mut self, il: usize, normed: Id, layers: Layers<'_>, mask: Option<Id>) -> Id {
        let Encoder { head, n_heads, n_kv_heads, .. } = *self.encoder;
        let n_positions = self.graph.shape(normed)[1];
        let heads = if let Some(fused) = self.linear(il, normed, "attn_qkv") {
            let row = self.graph.get(fused).strides[1];
            let element = 4; // products are f32
            [n_heads, n_kv_heads, n_kv_heads].map(|n| {
                let strides = [element * head, row, row.saturating_mul(n_positions)];
                self.graph.view_4d(fused, [head, n, n_positions, 1], strides)
            })
        } else {
            let [Some(q), Some(k), Some(v)] = ["attn_q", "attn_k", "attn_v"].map(|name| self.linear(il, normed, name))
            else {
                return normed;
            };
            let [q, k] =
                [(q, "attn_q_norm"), (k, "attn_k_norm")].map(|(id, name)| self.head_norm(il, id, layers, name, false));
            [(q, n_heads), (k, n_kv_heads), (v, n_kv_heads)]
                .map(|(id, n)| self.graph.reshape(id, [head, n, n_positions, 1]))
        };
        let [q, k, v] = heads;
        let [q, k] =
            [(q, "attn_q_norm"), (k, "attn_k_norm")].map(|(id, name)| self.head_norm(il, id, layers, name, true));
        let [q, k] = [q, k].map(|id| self.rotated(id, layers.rotary));
        let v = if self.encoder.family.name == "gemma4v" { self.graph.in_place(v, &[]) } else { v };
        let attended = self.attend([q, k, v], mask);
        self.linear(il, attended, "attn_out").unwrap_or(attended)
    }

    /// Norms of queries and keys, over the whole row or per head.
    fn head_norm(&mut self, il: usize, a: Id, layers: Layers<'_>, name: &str, per_head: bool) -> Id {
        let Some(weight) = self.weight(il, &format!("{name}.weight")) else { return a };
        if (self.graph.shape(weight)[0] == self.encoder.head) != per_head {
            return a;
        }
        self.norm(a, layers.norm, Some(weight), None)
    }

    fn rotated(&mut self, a: Id, rotary: Option<Rotary>) -> Id {
        match rotary {
            None => a,
            Some(Rotary::Joint(positions)) => self.graph.rope(a, positions, None),
            Some(Rotary::Halves(rows, columns)) => {
                let once = self.graph.rope(a, rows, None);
                self.graph.rope(once, columns, None)
            }
        }
    }

    /// `build_attn` up to its last product.
    pub(super) fn attend(&mut self, heads: [Id; 3], mask: Option<Id>) -> Id {
        let graph = &mut self.graph;
        for id in heads {
            graph.expand(id);
        }
        let [q, k, v] = heads;
        let [head, n_heads, n_positions, _] = graph.shape(q);
        let width = head.saturating_mul(n_heads);
        let q = graph.permute(q, [0, 2, 1, 3]);
        let k = graph.permute(k, [0, 2, 1, 3]);
        if self.flash_attention {
            let v = graph.permute(v, [0, 2, 1, 3]);
            let k = graph.cast(k, GgmlType::F16);
            let v = graph.cast(v, GgmlType::F16);
            let mut sources = vec![q, k, v];
            sources.extend(mask.map(|mask| graph.cast(mask, GgmlType::F16)));
            let shape = [head, n_heads, n_positions, 1];
            let attended = graph.result(Op::FlashAttention, GgmlType::F32, shape, &sources);
            return graph.reshape(attended, [width, n_positions, 1, 1]);
        }
        let v = graph.permute(v, [1, 2, 0, 3]);
        let shape = graph.shape(v);
        let v = graph.cont(v, shape);
        let scores = graph.mul_mat(k, q);
        let more: Vec<Id> = mask.into_iter().collect();
        let probs = graph.in_place(scores, &more);
        let mixed = graph.mul_mat(v, probs);
        let back = graph.permute(mixed, [0, 2, 1, 3]);
        graph.cont(back, [width, n_positions, 1, 1])
    }

    fn feed_forward(&mut self, il: usize, a: Id) -> Id {
        let (up, down) = if self.is_swapped(il) { ("ffn_down", "ffn_up") } else { ("ffn_up", "ffn_down") };
        let wide = self.linear(il, a, up).unwrap_or(a);
        let hidden = match self.linear(il, a, "ffn_gate") {
            Some(gate) => self.graph.like(Op::Other, gate, &[wide]),
            None => self.graph.in_place(wide, &[]),
        };
        self.linear(il, hidden, down).unwrap_or(hidden)
    }

    /// Whether the file has the two products the wrong way round: the one named `down` reads the width of the layer.
    fn is_swapped(&self, il: usize) -> bool {
        let down = self.encoder.layers.get(il).and_then(|layer| layer.get("ffn_down.weight"));
        self.encoder.family.may_be_swapped && down.is_some_and(|down| down.dims.first() == Some(&self.encoder.n_embd))
    }
}

/// The type of a picture's unfolded patches.
pub(super) fn unfolded(kernel: GgmlType) -> GgmlType {
    if kernel == GgmlType::BF16 { GgmlType::F32 } else { GgmlType::F16 }
}
