//! Graphs of encoders of sound.
//!
//! Source: `whisper-enc.cpp` and `qwen3a.cpp` among mtmd's models at the pinned release.

use super::encoder::{Norm, Writer, unfolded};
use super::family::{Sound, SoundEnd};
use crate::estimate::graph::{Id, Op};
use crate::gguf::GgmlType;

impl Writer<'_> {
    /// `clip_graph_whisper_enc`.
    pub(super) fn whisper(&mut self, sound: Sound) -> Id {
        let n_positions = self.picture.width / 2;
        let spectrum = self.graph.input(GgmlType::F32, [self.picture.width, self.picture.height, 1, 1]);
        let once = self.over_time(spectrum, "a.conv1d.1", 1);
        let twice = self.over_time(once, "a.conv1d.2", 2);
        let turned = self.graph.transpose(twice);
        let input = self.cont(turned);
        let positions = self.outside("a.position_embd.weight").map(|table| {
            let (n_embd, row) = (self.graph.shape(table)[0], self.graph.get(table).strides[1]);
            self.graph.view_2d(table, [n_embd, n_positions], row)
        });
        let hidden = self.vit(input, Norm::Full, positions, None);
        let rows = if sound.stacks { self.stacked(hidden) } else { hidden };
        match sound.end {
            SoundEnd::Product => self.outer_linear(rows, "mm.a.fc"),
            SoundEnd::BetweenTokens => {
                let normed = self.outer_norm(rows, Norm::Full, "mm.a.norm_pre");
                let stacked = self.stacked(normed);
                let tokens = self.outer_feed_forward(stacked, ["mm.a.mlp.1", "mm.a.mlp.2"]);
                let tokens = self.outside("v.boi").map_or(tokens, |begin| self.below(begin, tokens));
                self.outside("v.eoi").map_or(tokens, |end| self.below(tokens, end))
            }
            SoundEnd::TwoProducts => self.outer_feed_forward(rows, ["mm.a.mlp.1", "mm.a.mlp.2"]),
            SoundEnd::GatedBetweenNorms => {
                let weight = self.outside("mm.a.norm_pre.weight");
                let normed = self.norm(rows, Norm::Rms, weight, None);
                let wide = self.outer_linear(normed, "mm.a.mlp.1");
                let [n, n_rows, ..] = self.graph.shape(wide);
                let gated = self.graph.result(Op::Other, GgmlType::F32, [n / 2, n_rows, 1, 1], &[wide]);
                let weight = self.outside("mm.a.norm_mid.weight");
                let normed = self.norm(gated, Norm::Rms, weight, None);
                self.outer_linear(normed, "mm.a.mlp.2")
            }
        }
    }

    /// A convolution over time with its bias and activation: `[n_positions, n_embd]`.
    fn over_time(&mut self, a: Id, name: &str, stride: u64) -> Id {
        let Some(kernel) = self.outside(&format!("{name}.weight")) else { return a };
        let [width, channels, n_embd, _] = self.graph.shape(kernel);
        let n_before = self.graph.shape(a)[0];
        let n_after = n_before.saturating_add(width / 2 * 2).saturating_sub(width) / stride + 1;
        let n_inner = width.saturating_mul(channels);
        let ggml_type = unfolded(self.graph.get(kernel).ggml_type);
        let unfolded = self.graph.result(Op::Other, ggml_type, [n_inner, n_after, 1, 1], &[kernel, a]);
        let flat = self.graph.reshape(unfolded, [n_inner, n_after, 1, 1]);
        let flat_kernel = self.graph.reshape(kernel, [n_inner, n_embd, 1, 1]);
        let product = self.graph.mul_mat(flat, flat_kernel);
        let product = self.graph.reshape(product, [n_after, n_embd, 1, 1]);
        let bias = self.outside(&format!("{name}.bias"));
        let sum = self.plus(product, bias);
        self.graph.in_place(sum, &[])
    }

    /// `clip_graph_qwen3a`: each piece of a second by itself, until the layers see all.
    pub(super) fn pieces(&mut self) -> Id {
        const FRAMES: u64 = 100;
        let [n_frames, n_bands] = [self.picture.width, self.picture.height];
        let n_pieces = n_frames / FRAMES;
        let spectrum = self.graph.input(GgmlType::F32, [n_frames, n_bands, 1, 1]);
        let strides = [4 * n_frames, 4 * FRAMES, 4 * FRAMES];
        let view = self.graph.view_4d(spectrum, [FRAMES, n_bands, 1, n_pieces], strides);
        let mut current = self.cont(view);
        for number in 1..=3 {
            let Some(kernel) = self.outside(&format!("a.conv2d.{number}.weight")) else { continue };
            let [width, height, ..] = self.graph.shape(current);
            let half = |n: u64| n.saturating_sub(1) / 2 + 1;
            current = self.convolved(kernel, current, [half(width), half(height), n_pieces]);
            if let Some(bias) = self.outside(&format!("a.conv2d.{number}.bias")) {
                let n_channels = self.graph.shape(current)[2];
                let bias = self.graph.reshape(bias, [1, 1, n_channels, 1]);
                current = self.graph.in_place(current, &[bias]);
            }
            current = self.graph.in_place(current, &[]);
        }
        let [columns, rows, channels, _] = self.graph.shape(current);
        let turned = self.graph.permute(current, [2, 0, 1, 3]);
        current = self.cont(turned);
        let n_positions = columns.saturating_mul(n_pieces);
        current = self.graph.reshape(current, [rows.saturating_mul(channels), n_positions, 1, 1]);
        current = self.outer_linear(current, "a.conv_out");
        if let Some(table) = self.outside("a.position_embd.weight") {
            let (n_embd, row) = (self.graph.shape(table)[0], self.graph.get(table).strides[1]);
            let first = self.graph.view_2d(table, [n_embd, columns], row);
            let all = self.graph.result(Op::Other, GgmlType::F32, [n_embd, n_positions, 1, 1], &[first]);
            current = self.graph.in_place(current, &[all]);
        }
        let hidden = self.vit(current, Norm::Full, None, None);
        self.outer_feed_forward(hidden, ["mm.a.mlp.1", "mm.a.mlp.2"])
    }

    /// `build_stack`: several positions become one row; the last one is filled up.
    fn stacked(&mut self, hidden: Id) -> Id {
        let stride = self.encoder.n_embd.saturating_mul(self.encoder.stack);
        if self.encoder.stack <= 1 {
            return hidden;
        }
        let n_elements = self.graph.get(hidden).elements();
        let n_padded = n_elements.div_ceil(stride).saturating_mul(stride);
        let mut current = hidden;
        if n_padded > n_elements {
            let flat = self.graph.view_1d(current, n_elements);
            current = self.graph.result(Op::Other, GgmlType::F32, [n_padded, 1, 1, 1], &[flat]);
        }
        let row = self.graph.row_bytes_of(current, stride);
        self.graph.view_2d(current, [stride, n_padded / stride], row)
    }
}
