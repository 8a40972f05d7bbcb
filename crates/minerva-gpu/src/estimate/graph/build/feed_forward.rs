//! Dense feed-forward blocks.

use super::{Builder, Id, Op};
use crate::estimate::model::Layer;

/// How the hidden half of a block is made from its products.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Activation {
    /// One of them gates the other; a fused operation with a result of its own.
    Gated,
    /// Up and gate lie in one product twice as wide.
    GatedInOne,
    /// Applied to each element.
    Plain,
    /// Two operations on each element (squared rectifier).
    PlainTwice,
}

impl Builder<'_> {
    /// Dense block, experts, or experts with a shared one beside them.
    pub(super) fn feed_forward(&mut self, il: u32, a: Id) -> Id {
        let layer = self.layer_of(il);
        if !layer.has("ffn_gate_inp.weight") {
            return self.dense(il, a, ["ffn_up", "ffn_gate", "ffn_down"]);
        }
        let routed = self.experts(il, a);
        if !layer.has("ffn_up_shexp.weight") {
            return routed;
        }
        let gate = layer.has("ffn_gate_inp_shexp.weight").then(|| self.shared_gate(il, a));
        let shared = self.dense(il, a, ["ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp"]);
        let shared = match gate {
            Some(gate) => self.graph.in_place(shared, &[gate]),
            None => shared,
        };
        self.graph.in_place(routed, &[shared])
    }

    /// How much the shared expert counts for each token.
    fn shared_gate(&mut self, il: u32, a: Id) -> Id {
        let Some(logits) = self.product(il, "ffn_gate_inp_shexp.weight", a) else { return a };
        let silu = self.graph.in_place(logits, &[]);
        self.graph.in_place(silu, &[logits])
    }

    /// `build_ffn`.
    fn dense(&mut self, il: u32, a: Id, [up, gate, down]: [&str; 3]) -> Id {
        let Some(wide) = self.linear(il, up, a) else { return a };
        let gated = self.linear(il, gate, a);
        let hidden = match (self.activation(il, gated.is_some(), self.graph.shape(wide)[0]), gated) {
            (Activation::Gated, Some(gated)) => self.graph.like(Op::Other, gated, &[wide]),
            (Activation::GatedInOne, _) => {
                let [n, tokens, ..] = self.graph.shape(wide);
                let ggml_type = self.graph.get(wide).ggml_type;
                self.graph.result(Op::Other, ggml_type, [n / 2, tokens, 1, 1], &[wide])
            }
            (Activation::PlainTwice, _) => {
                let once = self.graph.in_place(wide, &[]);
                self.graph.in_place(once, &[])
            }
            _ => self.graph.in_place(wide, &[]),
        };
        self.linear(il, down, hidden).unwrap_or(hidden)
    }

    fn activation(&self, il: u32, has_gate: bool, n_up: u64) -> Activation {
        let n_down = self.layer_of(il).tensors.get("ffn_down.weight").and_then(|tensor| tensor.dims.first().copied());
        match has_gate {
            true => Activation::Gated,
            false if n_down.is_some_and(|n| n.saturating_mul(2) == n_up) => Activation::GatedInOne,
            false if self.model.is_one_of(&["nemotron", "nemotron_h", "nemotron_h_moe", "arcee"]) => {
                Activation::PlainTwice
            }
            false => Activation::Plain,
        }
    }
}

/// Layers of some hybrids have no feed-forward block.
pub(super) fn has_feed_forward(layer: &Layer) -> bool {
    ["ffn_up.weight", "ffn_up_exps.weight", "ffn_gate_up_exps.weight"].iter().any(|name| layer.has(name))
}
