//! Graphs of encoders of images.
//!
//! Source: `siglip.cpp`, `internvl.cpp`, `pixtral.cpp` and `llava.cpp` among mtmd's models at the pinned release.

use super::encoder::{Layers, Norm, Rotary, Writer};
use super::family::Tail;
use crate::estimate::graph::{Id, Op, Tensor};
use crate::gguf::GgmlType;

impl Writer<'_> {
    /// `clip_graph_siglip`.
    pub(super) fn siglip(&mut self, tail: Tail) -> Id {
        let input = self.patches();
        let positions = self.outside("v.position_embd.weight");
        let positions = match tail {
            Tail::ShuffleTwice | Tail::Products([0, 2]) => positions.map(|positions| self.resized(positions)),
            _ => positions,
        };
        let hidden = self.vit(input, Norm::Full, positions, None);
        match tail {
            Tail::Pool => self.pooled(hidden),
            Tail::Shuffle => {
                let rows = self.shuffled(hidden);
                self.outer_linear(rows, "mm.model.fc")
            }
            Tail::ShuffleTwice => {
                let mut rows = self.shuffled(hidden);
                if let Some(weight) = self.outside("mm.input_norm.weight") {
                    rows = self.norm(rows, Norm::Full, Some(weight), None);
                }
                let bias = self.outside("mm.input_norm.bias");
                rows = self.plus(rows, bias);
                self.outer_feed_forward(rows, ["mm.1", "mm.2"])
            }
            Tail::Products([up, down]) => self.outer_feed_forward(hidden, [&format!("mm.{up}"), &format!("mm.{down}")]),
        }
    }

    /// `resize_position_embeddings`: a square of positions becomes the picture's rectangle.
    pub(super) fn resized(&mut self, positions: Id) -> Id {
        let [columns, rows] = self.grid();
        let [n_embd, n_positions, ..] = self.graph.shape(positions);
        let side = n_positions.isqrt();
        if columns == side && rows == side {
            return positions;
        }
        let square = self.graph.reshape(positions, [n_embd, side, side, 1]);
        let turned = self.graph.permute(square, [2, 0, 1, 3]);
        let stretched = self.graph.result(Op::Other, GgmlType::F32, [columns, rows, n_embd, 1], &[turned]);
        let back = self.graph.permute(stretched, [1, 2, 0, 3]);
        self.graph.cont(back, [n_embd, columns.saturating_mul(rows), 1, 1])
    }

    /// Gemma 3: the mean over squares of patches, a norm, and a product with a matrix that is turned around first.
    fn pooled(&mut self, hidden: Id) -> Id {
        let ([side, _], merge, n_embd) = (self.grid(), self.encoder.merge, self.encoder.n_embd);
        let turned = self.graph.transpose(hidden);
        let planes = self.graph.cont(turned, [side, side, n_embd, 1]);
        let less = side / merge;
        let pooled = self.graph.result(Op::Other, GgmlType::F32, [less, less, n_embd, 1], &[planes]);
        let flat = self.graph.reshape(pooled, [less * less, n_embd, 1, 1]);
        let turned = self.graph.transpose(flat);
        let rows = self.cont(turned);
        let weight = self.outside("mm.soft_emb_norm.weight");
        let normed = self.norm(rows, Norm::Rms, weight, None);
        let Some(weight) = self.outside("mm.input_projection.weight") else { return normed };
        let turned = self.graph.transpose(weight);
        let weight = self.cont(turned);
        self.graph.mul_mat(weight, normed)
    }

    /// `build_patch_merge_permute`: squares of patches become one row; the last ones are filled up.
    pub(super) fn shuffled(&mut self, hidden: Id) -> Id {
        let ([width, height], merge) = (self.grid(), self.encoder.merge);
        let n_embd = self.graph.shape(hidden)[0];
        let mut current = self.graph.reshape(hidden, [n_embd, width, height, 1]);
        let [padded_width, padded_height] = [width, height].map(|n| n.div_ceil(merge) * merge);
        if [padded_width, padded_height] != [width, height] {
            let shape = [n_embd, padded_width, padded_height, 1];
            current = self.graph.result(Op::Other, GgmlType::F32, shape, &[current]);
        }
        let (columns, rows) = (padded_width / merge, padded_height / merge);
        let wide = n_embd.saturating_mul(merge);
        current = self.graph.reshape(current, [wide, columns, padded_height, 1]);
        current = self.graph.permute(current, [0, 2, 1, 3]);
        let wide = wide.saturating_mul(merge);
        current = self.graph.cont(current, [wide, rows, columns, 1]);
        current = self.graph.permute(current, [0, 2, 1, 3]);
        self.graph.cont(current, [wide, columns.saturating_mul(rows), 1, 1])
    }

    /// `clip_graph_internvl`, for one picture.
    pub(super) fn internvl(&mut self) -> Id {
        let (n_embd, merge) = (self.encoder.n_embd, self.encoder.merge);
        let ([columns, rows], n_patches) = (self.grid(), self.n_patches());
        let mut input = self.patches();
        if let Some(class) = self.outside("v.class_embd") {
            let repeated = self.graph.result(Op::Other, GgmlType::F32, [n_embd, 1, 1, 1], &[class]);
            input = self.below(input, repeated);
        }
        // The largest of the family (6B) has another norm, and no key says so.
        let norm = if n_embd == 3200 && self.encoder.layers.len() == 45 { Norm::Rms } else { Norm::Full };
        let positions = self.outside("v.position_embd.weight");
        let hidden = self.vit(input, norm, positions, None);
        let [_, row, plane, _] = self.graph.get(hidden).strides;
        let without_class = self.graph.view_3d(hidden, [n_embd, n_patches, 1], [row, plane]);
        let mut current = self.cont(without_class);
        let wide = n_embd.saturating_mul(merge);
        current = self.graph.reshape(current, [wide, rows / merge, columns, 1]);
        current = self.graph.permute(current, [0, 2, 1, 3]);
        let wide = wide.saturating_mul(merge);
        current = self.graph.cont(current, [wide, rows / merge, columns / merge, 1]);
        current = self.graph.permute(current, [0, 2, 1, 3]);
        let n_rows = (columns / merge).saturating_mul(rows / merge);
        current = self.graph.cont(current, [wide, n_rows, 1, 1]);
        current = self.outer_norm(current, Norm::Full, "mm.model.mlp.0");
        self.outer_feed_forward(current, ["mm.model.mlp.1", "mm.model.mlp.3"])
    }

    /// `clip_graph_pixtral`.
    pub(super) fn pixtral(&mut self) -> Id {
        let ([columns, rows], merge) = (self.grid(), self.encoder.merge);
        let n_patches = self.n_patches();
        let [tops, lefts] = [(); 2].map(|()| self.graph.input(GgmlType::I32, [n_patches, 1, 1, 1]));
        let input = self.patches();
        let mut current = self.vit(input, Norm::Rms, None, Some(Rotary::Halves(tops, lefts)));
        if let Some(merger) = self.outside("mm.patch_merger.weight") {
            let weight = self.outside("mm.input_norm.weight");
            current = self.norm(current, Norm::Rms, weight, None);
            let n_embd = self.encoder.n_embd;
            current = self.graph.reshape(current, [n_embd, columns, rows, 1]);
            current = self.graph.permute(current, [2, 0, 1, 3]);
            current = self.cont(current);
            let kernel = self.graph.view_3d(current, [merge, merge, n_embd], [0, 0]);
            let wide = n_embd.saturating_mul(merge * merge);
            let shape = [wide, columns / merge, rows / merge, 1];
            current = self.graph.result(Op::Other, GgmlType::F32, shape, &[kernel, current]);
            current = self.graph.reshape(current, [wide, shape[1].saturating_mul(shape[2]), 1, 1]);
            current = self.graph.mul_mat(merger, current);
        }
        current = self.outer_feed_forward(current, ["mm.1", "mm.2"]);
        match self.outside("v.token_embd.img_break") {
            Some(token) => self.with_row_ends(current, token),
            None => current,
        }
    }

    /// A token at the end of each row but the last.
    fn with_row_ends(&mut self, rows_of_tokens: Id, token: Id) -> Id {
        let [columns, rows] = self.grid().map(|n| n / self.encoder.merge);
        let n_out = self.graph.shape(rows_of_tokens)[0];
        let grid = self.graph.reshape(rows_of_tokens, [n_out, columns, rows, 1]);
        let empty = self.graph.add(Tensor::leaf(GgmlType::F32, [n_out, 1, rows, 1]));
        let zeros = self.graph.in_place(empty, &[]);
        let ends = self.graph.in_place(zeros, &[token]);
        let all = self.below(grid, ends);
        let n_tokens = columns.saturating_add(1).saturating_mul(rows).saturating_sub(1);
        let row = self.graph.row_bytes_of(all, n_out);
        self.graph.view_2d(all, [n_out, n_tokens], row)
    }

    /// `clip_graph_llava` with a projector of products.
    pub(super) fn llava(&mut self) -> Id {
        let n_layers = self.encoder.layers.len();
        let deepest = self.encoder.feature_layers.iter().max().copied();
        let deepest = deepest.map_or(n_layers.saturating_sub(1), |layer| (layer as usize).min(n_layers));
        let encoder = self.encoder;
        let is_wanted = |il: usize| encoder.feature_layers.contains(&(il as u64));
        let mut input = self.patches();
        if let Some(class) = self.outside("v.class_embd") {
            input = self.below(input, class);
        }
        let n_positions = self.graph.shape(input)[1];
        let ids = self.graph.input(GgmlType::I32, [n_positions, 1, 1, 1]);
        if let Some(table) = self.outside("v.position_embd.weight") {
            let rows = self.graph.get_rows(table, ids);
            input = self.graph.in_place(input, &[rows]);
        }
        let mut hidden = self.outer_norm(input, Norm::Full, "v.pre_ln");
        let layers = Layers { norm: Norm::Full, rotary: None, masks: &[] };
        let mut stack = Vec::new();
        for il in 0..deepest {
            if is_wanted(il) {
                stack.push(hidden);
            }
            hidden = self.layer(il, hidden, layers);
        }
        hidden = self.outer_norm(hidden, Norm::Full, "v.post_ln");
        if is_wanted(deepest) {
            stack.push(hidden);
        }
        let stacked = stack.into_iter().reduce(|above, below| self.graph.concat(above, below));
        self.llava_projector(stacked.unwrap_or(hidden))
    }

    fn llava_projector(&mut self, hidden: Id) -> Id {
        let [wide, n_positions, ..] = self.graph.shape(hidden);
        let flat = self.graph.reshape(hidden, [wide, n_positions, 1, 1]);
        let ids = self.graph.input(GgmlType::I32, [self.n_patches(), 1, 1, 1]);
        let patches = self.graph.get_rows(flat, ids);
        let first = self.outer_linear(patches, "mm.0");
        if self.encoder.outside.contains_key("mm.3.weight") {
            let normed = self.outer_norm(first, Norm::Full, "mm.1");
            let active = self.graph.in_place(normed, &[]);
            let second = self.outer_linear(active, "mm.3");
            return self.outer_norm(second, Norm::Full, "mm.4");
        }
        let active = self.graph.in_place(first, &[]);
        self.outer_linear(active, "mm.2")
    }
}
