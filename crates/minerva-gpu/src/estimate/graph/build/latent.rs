//! Compressed attention (MLA), as DeepSeek's models have it.

use super::attention::Heads;
use super::{Builder, Id, Op, row_bytes};
use crate::gguf::GgmlType;

impl Builder<'_> {
    pub(super) fn latent_attention(&mut self, il: u32, normed: Id) -> Id {
        let layer = self.layer_of(il);
        let n_tokens = self.step.n_tokens;
        let (n_heads, rank, n_rot, head_k, head_v) = self.latent_sizes(il);
        let nope = head_k.saturating_sub(n_rot);
        let q = match self.plain_product(il, "attn_q_a.weight", normed) {
            Some(compressed) => {
                let normed = self.norm(il, compressed, "attn_q_a_norm");
                self.plain_product(il, "attn_q_b.weight", normed).unwrap_or(normed)
            }
            None => self.plain_product(il, "attn_q.weight", normed).unwrap_or(normed),
        };
        let q = self.graph.reshape(q, [head_k, n_heads, n_tokens, 1]);
        let Some(both) = self.plain_product(il, "attn_kv_a_mqa.weight", normed) else { return normed };
        let stride = row_bytes(GgmlType::F32, rank + n_rot);
        let compressed = self.graph.view_2d(both, [rank, n_tokens], stride);
        let k_rot = self.graph.view_3d(both, [n_rot, 1, n_tokens], [stride, stride]);
        let positions = self.positions();
        let k_rot = self.graph.rope(k_rot, positions, None);
        let compressed = self.norm(il, compressed, "attn_kv_a_norm");
        let attended = if layer.has("attn_k_b.weight") {
            let strides = self.graph.get(q).strides;
            let q_nope = self.graph.view_3d(q, [nope, n_heads, n_tokens], [strides[1], strides[2]]);
            let q_rot = self.graph.view_3d(q, [n_rot, n_heads, n_tokens], [strides[1], strides[2]]);
            let q_rot = self.graph.rope(q_rot, positions, None);
            let turned = self.graph.permute(q_nope, [0, 2, 1, 3]);
            let Some(absorb) = self.weight(il, "attn_k_b.weight") else { return normed };
            let absorbed = self.graph.mul_mat(absorb, turned);
            let absorbed = self.graph.permute(absorbed, [0, 2, 1, 3]);
            let q = self.graph.concat(absorbed, q_rot);
            let v = self.graph.reshape(compressed, [rank, 1, n_tokens, 1]);
            let k = self.graph.concat(v, k_rot);
            let q = self.scale_by_temperature(q);
            let expand_v = self.weight(il, "attn_v_b.weight");
            self.attend_latent(il, Heads { q, k, v }, expand_v)
        } else {
            let Some(wide) = self.plain_product(il, "attn_kv_b.weight", compressed) else { return normed };
            let (head, all) =
                (row_bytes(GgmlType::F32, nope + head_v), row_bytes(GgmlType::F32, (nope + head_v) * n_heads));
            let k_nope = self.graph.view_3d(wide, [nope, n_heads, n_tokens], [head, all]);
            let v = self.graph.view_3d(wide, [head_v, n_heads, n_tokens], [head, all]);
            let v = self.graph.cont(v, [head_v, n_heads, n_tokens, 1]);
            let q = self.graph.rope(q, positions, None);
            let repeated = self.graph.result(Op::Other, GgmlType::F32, [n_rot, n_heads, n_tokens, 1], &[k_rot]);
            let k = self.graph.concat(k_nope, repeated);
            let q = self.scale_by_temperature(q);
            self.attend(il, Heads { q, k, v })
        };
        self.linear(il, "attn_output", attended).unwrap_or(attended)
    }

    /// Adapters of these weights have no effect: the models multiply them as they are.
    fn plain_product(&mut self, il: u32, name: &str, a: Id) -> Option<Id> {
        let weight = self.weight(il, name)?;
        Some(self.graph.mul_mat(weight, a))
    }

    /// Heads, rank, rotated part, and the head sizes of keys and values before they were compressed.
    fn latent_sizes(&self, il: u32) -> (u64, u64, u64, u64, u64) {
        let layer = self.layer_of(il);
        let latent = self.model.latent;
        let rank =
            layer.tensors.get("attn_kv_a_norm.weight").and_then(|tensor| tensor.dims.first().copied()).unwrap_or(0);
        let both =
            layer.tensors.get("attn_kv_a_mqa.weight").and_then(|tensor| tensor.dims.get(1).copied()).unwrap_or(0);
        let (head_k, head_v) = latent.map_or((layer.head_k, layer.head_v), |latent| (latent.head_k, latent.head_v));
        (layer.n_heads, rank, both.saturating_sub(rank), head_k, head_v)
    }

    fn scale_by_temperature(&mut self, q: Id) -> Id {
        if self.model.flag("attention.temperature_scale") == 0.0 {
            return q;
        }
        let n_tokens = self.step.n_tokens;
        let graph = &mut self.graph;
        let scale = *self.inputs.temperature.get_or_insert_with(|| graph.input(GgmlType::F32, [1, 1, n_tokens, 1]));
        self.graph.in_place(q, &[scale])
    }
}
