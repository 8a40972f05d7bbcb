//! The graph of Gemma 3n's encoder of images, MobileNet-V5: convolutions, and attention of many queries to one head.
//!
//! Source: `mobilenetv5.cpp` among mtmd's models at the pinned release.

use super::encoder::{Writer, unfolded};
use super::shape::Encoder;
use crate::estimate::graph::{Id, Op};
use crate::gguf::GgmlType;

/// Stages of blocks; each begins with one that halves the picture.
const N_STAGES: usize = 4;
/// Columns, and rows, of what goes to the text model.
const OUTPUT_SIDE: u64 = 16;
/// The most blocks of a stage.
const MAX_BLOCKS: usize = 512;

/// How many blocks each stage has: they are numbered from 0 without a gap.
fn blocks_per_stage(encoder: &Encoder) -> [usize; N_STAGES] {
    const FIRST: [&str; 4] = ["conv_exp", "dw_start.conv", "pw_exp.conv", "attn.query.proj"];
    std::array::from_fn(|stage| {
        let is_there = |block: &usize| {
            FIRST.iter().any(|name| encoder.outside.contains_key(&format!("v.blk.{stage}.{block}.{name}.weight")))
        };
        (0..MAX_BLOCKS).take_while(is_there).count()
    })
}

impl Writer<'_> {
    /// `clip_graph_mobilenetv5`.
    pub(super) fn mobile(&mut self) -> Id {
        let raw = self.raw_picture();
        let padded = self.padded(raw, 3, 2);
        let Some(kernel) = self.outside("v.conv_stem.conv.weight") else { return raw };
        let mut current = self.direct(kernel, padded, 2, 0);
        let bias = self.outside("v.conv_stem.conv.bias");
        current = self.plus(current, bias);
        current = self.normed(current, "v.conv_stem.bn.weight");
        current = self.graph.in_place(current, &[]);
        let counts = blocks_per_stage(self.encoder);
        let has_all = counts.iter().all(|&n| n > 0);
        let last = counts.iter().rposition(|&n| n > 0);
        let mut features = Vec::new();
        for (stage, n_blocks) in counts.into_iter().enumerate() {
            for block in 0..n_blocks {
                current = self.mobile_block(&format!("v.blk.{stage}.{block}"), current, if block == 0 { 2 } else { 1 });
            }
            let is_wanted = if has_all { stage >= 2 } else { Some(stage) == last };
            if is_wanted {
                features.push(current);
            }
        }
        current = self.fused(&features).unwrap_or(current);
        self.mobile_tokens(current)
    }

    fn mobile_block(&mut self, name: &str, input: Id, stride: u64) -> Id {
        if let Some(kernel) = self.outside(&format!("{name}.conv_exp.weight")) {
            return self.edge_residual(name, kernel, input, stride);
        }
        if let Some(queries) = self.outside(&format!("{name}.attn.query.proj.weight")) {
            return self.mobile_attention(name, queries, input);
        }
        let mut current = input;
        if let Some(kernel) = self.outside(&format!("{name}.dw_start.conv.weight")) {
            current = self.depthwise(kernel, current, 1);
            current = self.normed(current, &format!("{name}.dw_start.bn.weight"));
        }
        if let Some(kernel) = self.outside(&format!("{name}.pw_exp.conv.weight")) {
            current = self.direct(kernel, current, 1, 0);
            current = self.normed(current, &format!("{name}.pw_exp.bn.weight"));
            current = self.graph.in_place(current, &[]);
        }
        if let Some(kernel) = self.outside(&format!("{name}.dw_mid.conv.weight")) {
            current = self.depthwise(kernel, current, stride);
            current = self.normed(current, &format!("{name}.dw_mid.bn.weight"));
            current = self.graph.in_place(current, &[]);
        }
        if let Some(kernel) = self.outside(&format!("{name}.pw_proj.conv.weight")) {
            current = self.direct(kernel, current, 1, 0);
            current = self.normed(current, &format!("{name}.pw_proj.bn.weight"));
        }
        let scale = self.outside(&format!("{name}.layer_scale.gamma"));
        current = self.plus(current, scale);
        self.with_residual(current, input)
    }

    fn edge_residual(&mut self, name: &str, kernel: Id, input: Id, stride: u64) -> Id {
        let mut current = if stride == 2 {
            let padded = self.padded(input, 3, 2);
            self.direct(kernel, padded, 2, 0)
        } else {
            self.direct(kernel, input, 1, 1)
        };
        current = self.normed(current, &format!("{name}.bn1.weight"));
        current = self.graph.in_place(current, &[]);
        if let Some(kernel) = self.outside(&format!("{name}.conv_pwl.weight")) {
            current = self.direct(kernel, current, 1, 0);
        }
        current = self.normed(current, &format!("{name}.bn2.weight"));
        if stride == 1 { self.with_residual(current, input) } else { current }
    }

    /// Where the picture is as large as before and has as many channels.
    fn with_residual(&mut self, a: Id, input: Id) -> Id {
        if self.graph.shape(a)[..3] == self.graph.shape(input)[..3] { self.graph.in_place(a, &[input]) } else { a }
    }

    /// Attention with stored scores: one head of keys and values, of a picture of half the side where they have a convolution.
    fn mobile_attention(&mut self, name: &str, queries: Id, input: Id) -> Id {
        let current = self.normed(input, &format!("{name}.norm.weight"));
        let q = self.direct(queries, current, 1, 0);
        let [k, v] = ["key", "value"].map(|part| {
            let mut less = current;
            if let Some(kernel) = self.outside(&format!("{name}.attn.{part}.down_conv.weight")) {
                less = self.depthwise(kernel, less, 2);
                less = self.normed(less, &format!("{name}.attn.{part}.norm.weight"));
            }
            match self.outside(&format!("{name}.attn.{part}.proj.weight")) {
                Some(kernel) => self.direct(kernel, less, 1, 0),
                None => less,
            }
        });
        let [width, height, ..] = self.graph.shape(current);
        let n_queries = width.saturating_mul(height);
        let [key_width, key_height, head, _] = self.graph.shape(k);
        let n_keys = key_width.saturating_mul(key_height);
        let all = self.graph.shape(q)[2];
        let n_heads = all / head.max(1);
        let graph = &mut self.graph;
        let q = graph.reshape(q, [n_queries, all, 1, 1]);
        let q = graph.reshape(q, [n_queries, head, n_heads, 1]);
        let q = graph.permute(q, [1, 0, 2, 3]);
        let q = self.cont(q);
        let [k, v] = [k, v].map(|id| {
            let flat = self.graph.reshape(id, [n_keys, head, 1, 1]);
            self.graph.reshape(flat, [n_keys, head, 1, 1])
        });
        let k = self.graph.permute(k, [1, 0, 2, 3]);
        let k = self.cont(k);
        let v = self.cont(v);
        let scores = self.graph.mul_mat(k, q);
        let scaled = self.graph.in_place(scores, &[]);
        let probs = self.graph.in_place(scaled, &[]);
        let mixed = self.graph.mul_mat(v, probs);
        let mixed = self.graph.permute(mixed, [1, 0, 2, 3]);
        let mixed = self.cont(mixed);
        let mixed = self.graph.reshape(mixed, [n_queries, all, 1, 1]);
        let mixed = self.graph.reshape(mixed, [width, height, all, 1]);
        let mixed = self.cont(mixed);
        let Some(kernel) = self.outside(&format!("{name}.attn.output.proj.weight")) else { return mixed };
        let output = self.direct(kernel, mixed, 1, 0);
        let ([before, _, channels, _], [after, _, n_out, _]) = (self.graph.shape(input), self.graph.shape(output));
        if (before, channels) != (after, n_out) {
            return output;
        }
        let scale = self.outside(&format!("{name}.layer_scale.gamma"));
        let scaled = self.plus(output, scale);
        self.graph.in_place(scaled, &[input])
    }

    /// The last two stages beside each other, at the size of the first of them.
    fn fused(&mut self, features: &[Id]) -> Option<Id> {
        let (&first, more) = features.split_first()?;
        let [width, height, ..] = self.graph.shape(first);
        let mut current = first;
        for &feature in more {
            let [own_width, own_height, channels, _] = self.graph.shape(feature);
            let mut feature = feature;
            if own_width < width || own_height < height {
                let scale = width / own_width.max(1);
                let shape = [own_width.saturating_mul(scale), own_height.saturating_mul(scale), channels, 1];
                feature = self.graph.result(Op::Other, GgmlType::F32, shape, &[feature]);
            }
            let [_, _, before, _] = self.graph.shape(current);
            let shape = [width, height, before.saturating_add(channels), 1];
            current = self.graph.result(Op::Other, GgmlType::F32, shape, &[current, feature]);
        }
        if let Some(kernel) = self.outside("v.msfa.ffn.pw_exp.conv.weight") {
            current = self.direct(kernel, current, 1, 0);
            current = self.normed(current, "v.msfa.ffn.pw_exp.bn.weight");
            current = self.graph.in_place(current, &[]);
        }
        if let Some(kernel) = self.outside("v.msfa.ffn.pw_proj.conv.weight") {
            current = self.direct(kernel, current, 1, 0);
            current = self.normed(current, "v.msfa.ffn.pw_proj.bn.weight");
        }
        let [width, height, channels, _] = self.graph.shape(current);
        if width > OUTPUT_SIDE {
            let side = width / OUTPUT_SIDE;
            let shape = [width / side, height / side, channels, 1];
            current = self.graph.result(Op::Other, GgmlType::F32, shape, &[current]);
        }
        Some(self.normed(current, "v.msfa.norm.weight"))
    }

    fn mobile_tokens(&mut self, picture: Id) -> Id {
        let [width, height, channels, _] = self.graph.shape(picture);
        let turned = self.graph.permute(picture, [2, 1, 0, 3]);
        let turned = self.graph.permute(turned, [0, 2, 1, 3]);
        let rows = self.cont(turned);
        let flat = self.graph.reshape(rows, [channels, width.saturating_mul(height), 1, 1]);
        let mut current = self.cont(flat);
        // Scaled, and normed.
        current = self.graph.in_place(current, &[]);
        current = self.graph.in_place(current, &[]);
        let weight = self.outside("mm.soft_emb_norm.weight");
        current = self.plus(current, weight);
        current = self.outer_linear(current, "mm.input_projection");
        self.graph.in_place(current, &[])
    }

    /// `rms_norm_2d`: over the channels of each place, where the file has it.
    fn normed(&mut self, a: Id, name: &str) -> Id {
        let Some(weight) = self.outside(name) else { return a };
        let turned = self.graph.permute(a, [2, 1, 0, 3]);
        let rows = self.cont(turned);
        let normed = self.graph.in_place(rows, &[]);
        let scaled = self.graph.in_place(normed, &[weight]);
        let back = self.graph.permute(scaled, [2, 1, 0, 3]);
        self.cont(back)
    }

    /// `pad_same_2d`: so much that the result of a convolution without padding is the picture's size by the stride, rounded up.
    fn padded(&mut self, a: Id, kernel: u64, stride: u64) -> Id {
        let [width, height, channels, pieces] = self.graph.shape(a);
        let padded = |n: u64| (n.div_ceil(stride).saturating_sub(1) * stride).saturating_add(kernel).max(n);
        let shape = [padded(width), padded(height), channels, pieces];
        if shape == self.graph.shape(a) { a } else { self.graph.result(Op::Other, GgmlType::F32, shape, &[a]) }
    }

    /// `ggml_conv_2d_direct`: nothing is unfolded.
    fn direct(&mut self, kernel: Id, a: Id, stride: u64, padding: u64) -> Id {
        let ([side, _, _, n_out], [width, height, ..]) = (self.graph.shape(kernel), self.graph.shape(a));
        let after = |n: u64| convolved(n, side, stride, padding);
        let shape = [after(width), after(height), n_out, 1];
        self.graph.result(Op::Other, GgmlType::F32, shape, &[kernel, a])
    }

    /// `ggml_conv_2d_dw`: one kernel per channel. With a stride the picture is padded first.
    fn depthwise(&mut self, kernel: Id, a: Id, stride: u64) -> Id {
        let [side, rows, _, channels] = self.graph.shape(kernel);
        let (a, padding) = if stride > 1 { (self.padded(a, side, stride), 0) } else { (a, side / 2) };
        let [width, height, n_channels, _] = self.graph.shape(a);
        let ggml_type = unfolded(self.graph.get(kernel).ggml_type);
        let flat_kernel = self.graph.reshape(kernel, [side, rows, 1, channels]);
        let planes = self.graph.reshape(a, [width, height, 1, n_channels]);
        let [columns, lines] = [convolved(width, side, stride, padding), convolved(height, rows, stride, padding)];
        let n_inner = side.saturating_mul(rows);
        let shape = [n_inner, columns, lines, n_channels];
        let unfolded = self.graph.result(Op::Other, ggml_type, shape, &[flat_kernel, planes]);
        let n_places = columns.saturating_mul(lines);
        let flat = self.graph.reshape(unfolded, [n_inner, n_places, n_channels, 1]);
        let flat_kernel = self.graph.reshape(flat_kernel, [n_inner, 1, channels, 1]);
        let product = self.graph.mul_mat(flat_kernel, flat);
        self.graph.reshape(product, [columns, lines, n_channels, 1])
    }
}

/// Places of a convolution's result in one dimension.
fn convolved(n: u64, kernel: u64, stride: u64, padding: u64) -> u64 {
    n.saturating_add(2 * padding).saturating_sub(kernel) / stride + 1
}
