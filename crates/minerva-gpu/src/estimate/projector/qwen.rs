//! Graphs of Qwen's encoders: two frames at once, 2x2 patches beside each other, windows, and a stack of features.
//!
//! Source: `qwen2vl.cpp` and `qwen3vl.cpp` among mtmd's models at the pinned release.

use super::encoder::{Layers, Norm, Rotary, Writer};
use crate::estimate::graph::Id;
use crate::gguf::GgmlType;

impl Writer<'_> {
    /// `build_inp_with_temporal_merge`, for a still picture.
    fn two_frames(&mut self) -> Id {
        let raw = self.raw_picture();
        let first = self.patches_of(raw, "v.patch_embd.weight").unwrap_or(raw);
        let second = self.patches_of(raw, "v.patch_embd.weight.1").unwrap_or(raw);
        self.graph.in_place(first, &[second])
    }

    /// From `[columns, rows, n_embd]`, or with the width first, to the order in which four neighbours follow each other.
    pub(super) fn in_squares(&mut self, a: Id) -> Id {
        let ([columns, rows], n_embd) = (self.grid(), self.encoder.n_embd);
        let pair = n_embd.saturating_mul(2);
        let current = self.graph.cont(a, [pair, columns / 2, rows, 1]);
        let current = self.graph.reshape(current, [pair, columns / 2, 2, rows / 2]);
        let current = self.graph.permute(current, [0, 2, 1, 3]);
        self.graph.cont(current, [n_embd, columns.saturating_mul(rows), 1, 1])
    }

    pub(super) fn squares_of_frames(&mut self) -> Id {
        let frames = self.two_frames();
        let turned = self.graph.permute(frames, [1, 2, 0, 3]);
        self.in_squares(turned)
    }

    /// `clip_graph_qwen2vl`.
    pub(super) fn qwen2vl(&mut self) -> Id {
        let (n_embd, n_positions) = (self.encoder.n_embd, self.n_patches());
        let period = self.encoder.window_period as usize;
        let norm = if self.encoder.family.name == "qwen2.5vl_merger" { Norm::Rms } else { Norm::Full };
        let input = self.squares_of_frames();
        let positions = self.graph.input(GgmlType::I32, [n_positions.saturating_mul(4), 1, 1, 1]);
        let mut hidden = self.outer_norm(input, norm, "v.pre_ln");
        let mut window = None;
        if period > 0 {
            let order = self.graph.input(GgmlType::I32, [n_positions / 4, 1, 1, 1]);
            let mask = self.graph.input(GgmlType::F32, [n_positions, n_positions, 1, 1]);
            window = Some(if self.flash_attention { self.graph.cast(mask, GgmlType::F16) } else { mask });
            hidden = self.graph.reshape(hidden, [n_embd.saturating_mul(4), n_positions / 4, 1, 1]);
            hidden = self.graph.get_rows(hidden, order);
            hidden = self.graph.reshape(hidden, [n_embd, n_positions, 1, 1]);
        }
        let n_layers = self.encoder.layers.len();
        let masks: Vec<Option<Id>> =
            (1..=n_layers).map(|n| window.filter(|_| period > 0 && !n.is_multiple_of(period))).collect();
        let layers = Layers { norm, rotary: Some(Rotary::Joint(positions)), masks: &masks };
        for il in 0..n_layers {
            hidden = self.layer(il, hidden, layers);
        }
        hidden = self.outer_norm(hidden, norm, "v.post_ln");
        let rows = self.graph.reshape(hidden, [n_embd.saturating_mul(4), n_positions / 4, 1, 1]);
        let tokens = self.outer_feed_forward(rows, ["mm.0", "mm.2"]);
        if period == 0 {
            return tokens;
        }
        let order = self.graph.input(GgmlType::I32, [n_positions / 4, 1, 1, 1]);
        self.graph.get_rows(tokens, order)
    }

    /// `clip_graph_qwen3vl`.
    pub(super) fn qwen3vl(&mut self) -> Id {
        let (n_embd, n_positions) = (self.encoder.n_embd, self.n_patches());
        let mut hidden = self.squares_of_frames();
        let bias = self.outside("v.patch_embd.bias");
        hidden = self.plus(hidden, bias);
        if let Some(table) = self.outside("v.position_embd.weight") {
            let resized = self.resized(table);
            let learned = self.in_squares(resized);
            hidden = self.graph.in_place(hidden, &[learned]);
        }
        let positions = self.graph.input(GgmlType::I32, [n_positions.saturating_mul(4), 1, 1, 1]);
        hidden = self.outer_norm(hidden, Norm::Full, "v.pre_ln");
        let n_layers = self.encoder.layers.len();
        let layers = Layers { norm: Norm::Full, rotary: Some(Rotary::Joint(positions)), masks: &[] };
        let square = self.encoder.merge * self.encoder.merge;
        let mut features = None;
        for il in 0..n_layers {
            hidden = self.layer(il, hidden, layers);
            let name = |part: &str| format!("v.deepstack.{il}.{part}");
            if self.encoder.outside.contains_key(&name("fc1.weight")) {
                let rows = self.graph.reshape(hidden, [n_embd.saturating_mul(square), n_positions / square, 1, 1]);
                let normed = self.outer_norm(rows, Norm::Full, &name("norm"));
                let feature = self.outer_feed_forward(normed, [&name("fc1"), &name("fc2")]);
                features = Some(match features {
                    Some(before) => self.graph.concat(before, feature),
                    None => feature,
                });
            }
        }
        hidden = self.outer_norm(hidden, Norm::Full, "v.post_ln");
        let rows = self.graph.reshape(hidden, [n_embd.saturating_mul(4), n_positions / 4, 1, 1]);
        let tokens = self.outer_feed_forward(rows, ["mm.0", "mm.2"]);
        match features {
            Some(features) => self.graph.concat(tokens, features),
            None => tokens,
        }
    }
}
