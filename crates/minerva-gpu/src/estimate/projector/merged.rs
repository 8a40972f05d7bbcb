//! Graphs of encoders of images whose ends have a shape of their own.
//!
//! Source: `gemma4v.cpp`, `kimivl.cpp`, `paddleocr.cpp`, `dotsocr.cpp`, `glm4v.cpp`, `hunyuanvl.cpp` and `minicpmv.cpp` among mtmd's models
//! at the pinned release.

use super::encoder::{Norm, Rotary, Writer};
use super::family::Merger;
use crate::estimate::graph::{Id, Op};
use crate::gguf::GgmlType;

/// Elements of a head of MiniCPM-V's queries.
const RESAMPLER_HEAD: u64 = 128;

impl Writer<'_> {
    fn ids(&mut self, n: u64) -> Id {
        self.graph.input(GgmlType::I32, [n, 1, 1, 1])
    }

    /// `clip_graph_gemma4v`, for one picture.
    pub(super) fn gemma4(&mut self) -> Id {
        let ([columns, rows], merge) = (self.grid(), self.encoder.merge);
        let (n_embd, n_patches) = (self.encoder.n_embd, self.n_patches());
        let raw = self.raw_picture();
        let scaled = self.graph.in_place(raw, &[]);
        let mut input = self.patches_from(scaled);
        let [lefts, tops] = [(); 2].map(|()| self.ids(n_patches));
        if let Some(table) = self.outside("v.position_embd.weight") {
            let (n_positions, row) = (self.graph.shape(table)[1], self.graph.get(table).strides[1]);
            for ids in [lefts, tops] {
                let half = self.graph.view_2d(table, [n_embd, n_positions], row);
                let positions = self.graph.get_rows(half, ids);
                input = self.graph.in_place(input, &[positions]);
            }
        }
        let hidden = self.vit(input, Norm::Rms, None, Some(Rotary::Halves(lefts, tops)));
        let turned = self.graph.transpose(hidden);
        let planes = self.graph.cont(turned, [columns, rows, n_embd, 1]);
        let [less_columns, less_rows] = [columns / merge, rows / merge];
        let shape = [less_columns, less_rows, n_embd, 1];
        let pooled = self.graph.result(Op::Other, GgmlType::F32, shape, &[planes]);
        let flat = self.graph.reshape(pooled, [less_columns.saturating_mul(less_rows), n_embd, 1, 1]);
        let turned = self.graph.transpose(flat);
        let tokens = self.cont(turned);
        let mut current = self.graph.in_place(tokens, &[]);
        if let (Some(bias), Some(scale)) = (self.outside("v.std_bias"), self.outside("v.std_scale")) {
            current = self.graph.in_place(current, &[bias]);
            current = self.graph.in_place(current, &[scale]);
        }
        current = self.norm(current, Norm::Rms, None, None);
        self.outer_linear(current, "mm.input_projection")
    }

    /// `clip_graph_kimivl`, `clip_graph_paddleocr` and `clip_graph_dotsocr`.
    pub(super) fn merger(&mut self, merger: Merger) -> Id {
        let (n_embd, n_patches) = (self.encoder.n_embd, self.n_patches());
        let rotary = if merger.rotates_in_halves {
            Rotary::Halves(self.ids(n_patches), self.ids(n_patches))
        } else {
            Rotary::Joint(self.ids(n_patches.saturating_mul(4)))
        };
        let learned = self.outside("v.position_embd.weight").filter(|_| merger.learns_positions);
        let learned = learned.map(|table| self.resized(table));
        let input = self.patches();
        let norm = if merger.is_rms { Norm::Rms } else { Norm::Full };
        let mut current = self.vit(input, norm, learned, Some(rotary));
        if merger.norm_is_behind {
            current = self.shuffled(current);
            let [wide, n_rows, ..] = self.graph.shape(current);
            let n_small = (wide / n_embd).saturating_mul(n_rows);
            let row = self.graph.row_bytes_of(current, n_embd);
            current = self.graph.view_2d(current, [n_embd, n_small], row);
            current = self.outer_norm(current, Norm::Full, "mm.input_norm");
            let row = self.graph.row_bytes_of(current, wide);
            current = self.graph.view_2d(current, [wide, n_rows], row);
        } else {
            current = self.outer_norm(current, Norm::Full, "mm.input_norm");
            current = self.shuffled(current);
        }
        let [up, down] = merger.products.map(|number| format!("mm.{number}"));
        self.outer_feed_forward(current, [&up, &down])
    }

    /// `clip_graph_glm4v`.
    pub(super) fn glm4v(&mut self) -> Id {
        let (n_embd, merge, n_patches) = (self.encoder.n_embd, self.encoder.merge, self.n_patches());
        let mut input = self.squares_of_frames();
        let positions = self.ids(n_patches.saturating_mul(4));
        let bias = self.outside("v.patch_embd.bias");
        input = self.plus(input, bias);
        input = self.outer_norm(input, Norm::Rms, "v.norm_embd");
        let learned = self.outside("v.position_embd.weight").map(|table| {
            let resized = self.resized(table);
            self.in_squares(resized)
        });
        let hidden = self.vit(input, Norm::Rms, learned, Some(Rotary::Joint(positions)));
        let n_tokens = n_patches / (merge * merge);
        let squares = self.graph.reshape(hidden, [n_embd, merge, merge, n_tokens]);
        let turned = self.graph.permute(squares, [2, 0, 1, 3]);
        let mut current = self.cont(turned);
        if let Some(kernel) = self.outside("mm.patch_merger.weight") {
            current = self.convolved(kernel, current, [1, 1, n_tokens]);
            let n_out = self.graph.shape(current)[2];
            current = self.graph.reshape(current, [n_out, n_tokens, 1, 1]);
        }
        let bias = self.outside("mm.patch_merger.bias");
        current = self.plus(current, bias);
        current = self.outer_linear(current, "mm.model.fc");
        current = self.outer_norm(current, Norm::Full, "mm.post_norm");
        current = self.graph.in_place(current, &[]);
        let wide = self.outer_linear(current, "mm.up");
        let gate = self.outer_linear(current, "mm.gate");
        let gated = self.graph.like(Op::Other, gate, &[wide]);
        self.outer_linear(gated, "mm.down")
    }

    /// `clip_graph_hunyuanvl`.
    pub(super) fn hunyuan(&mut self) -> Id {
        let ([columns, rows], merge) = (self.grid(), self.encoder.merge);
        let (n_embd, n_patches) = (self.encoder.n_embd, self.n_patches());
        let positions = self.graph.input(GgmlType::F32, [n_embd, n_patches, 1, 1]);
        let input = self.patches();
        let hidden = self.vit(input, Norm::Full, Some(positions), None);
        let weight = self.outside("mm.pre_norm.weight");
        let normed = self.norm(hidden, Norm::Rms, weight, None);
        let picture = self.graph.reshape(normed, [n_embd, columns, rows, 1]);
        let turned = self.graph.permute(picture, [2, 0, 1, 3]);
        let planes = self.cont(turned);
        let [columns, rows] = [columns / merge, rows / merge];
        let once = self.convolved_plane(planes, "mm.0", [columns, rows]);
        let active = self.graph.in_place(once, &[]);
        let mut current = self.convolved_plane(active, "mm.2", [columns, rows]);
        let n_channels = self.graph.shape(current)[2];
        if let Some(newline) = self.outside("v.image_newline") {
            let end = self.graph.reshape(newline, [1, 1, n_channels, 1]);
            let ends = self.graph.result(Op::Other, GgmlType::F32, [1, rows, n_channels, 1], &[end]);
            current = self.graph.concat(current, ends);
        }
        let turned = self.graph.permute(current, [1, 2, 0, 3]);
        let n_tokens = columns.saturating_add(1).saturating_mul(rows);
        current = self.graph.cont(turned, [n_channels, n_tokens, 1, 1]);
        current = self.outer_linear(current, "mm.model.fc");
        if let Some(begin) = self.outside("mm.image_begin") {
            let begin = self.as_row(begin);
            current = self.below(begin, current);
        }
        if let Some(end) = self.outside("mm.image_end") {
            let end = self.as_row(end);
            current = self.below(current, end);
        }
        let weight = self.outside("mm.post_norm.weight");
        self.norm(current, Norm::Rms, weight, None)
    }

    fn as_row(&mut self, a: Id) -> Id {
        let n = self.graph.shape(a)[0];
        self.graph.reshape(a, [n, 1, 1, 1])
    }

    /// A convolution and its bias.
    fn convolved_plane(&mut self, a: Id, name: &str, [columns, rows]: [u64; 2]) -> Id {
        let Some(kernel) = self.outside(&format!("{name}.weight")) else { return a };
        let current = self.convolved(kernel, a, [columns, rows, 1]);
        let Some(bias) = self.outside(&format!("{name}.bias")) else { return current };
        let n_channels = self.graph.shape(current)[2];
        let bias = self.graph.reshape(bias, [1, 1, n_channels, 1]);
        self.graph.in_place(current, &[bias])
    }

    /// `clip_graph_minicpmv`.
    pub(super) fn resampler(&mut self) -> Id {
        let n_patches = self.n_patches();
        let ids = self.ids(n_patches);
        let learned = self.outside("v.position_embd.weight").map(|table| self.graph.get_rows(table, ids));
        let input = self.patches();
        let hidden = self.vit(input, Norm::Full, learned, None);
        let Some(queries) = self.outside("resampler.query") else { return hidden };
        let [n_out, n_queries, ..] = self.graph.shape(queries);
        let values = self.outer_linear(hidden, "resampler.kv");
        let queries = self.outer_norm(queries, Norm::Full, "resampler.ln_q");
        let values = self.outer_norm(values, Norm::Full, "resampler.ln_kv");
        let positions = self.waves(n_out / 4, n_patches);
        let keys = self.graph.in_place(values, &[positions]);
        let q = self.outer_linear(queries, "resampler.attn.q");
        let k = self.outer_linear(keys, "resampler.attn.k");
        let v = self.outer_linear(values, "resampler.attn.v");
        let n_heads = n_out / RESAMPLER_HEAD;
        let heads = [(q, n_queries), (k, n_patches), (v, n_patches)]
            .map(|(id, n)| self.graph.reshape(id, [RESAMPLER_HEAD, n_heads, n, 1]));
        let attended = self.attend(heads, None);
        let mixed = self.outer_linear(attended, "resampler.attn.out");
        let normed = self.outer_norm(mixed, Norm::Full, "resampler.ln_post");
        self.outer_linear(normed, "resampler.proj")
    }

    /// Sines and cosines of columns and rows: `[4 * n_waves, n_patches]`.
    fn waves(&mut self, n_waves: u64, n_patches: u64) -> Id {
        let shape = [n_waves, n_patches, 1, 1];
        let lengths = self.graph.input(GgmlType::F32, [n_waves, 1, 1, 1]);
        let [tops, lefts] = [(); 2].map(|()| self.graph.input(GgmlType::F32, [1, n_patches, 1, 1]));
        let repeated = self.graph.result(Op::Other, GgmlType::F32, shape, &[lengths]);
        let angles = [lefts, tops].map(|places| self.graph.in_place(repeated, &[places]));
        let [x, y] = angles.map(|angle| {
            let [sine, cosine] = [(); 2].map(|()| self.graph.like(Op::Other, angle, &[]));
            self.graph.concat(sine, cosine)
        });
        self.graph.concat(x, y)
    }
}
