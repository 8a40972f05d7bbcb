//! Mixtures of experts: routing, the chosen experts' products, their sum.

use super::{Builder, Id, Op};
use crate::gguf::GgmlType;

/// Codes of `expert_gating_func`.
const SIGMOID: f32 = 2.0;
/// Softmax over the chosen experts only.
const SOFTMAX_OF_CHOSEN: f32 = 3.0;

/// Architectures whose weights of the chosen experts do not add up to one.
const WITHOUT_NORM: [&str; 6] = ["qwen2moe", "jamba", "nomic-bert-moe", "olmoe", "gpt-oss", "deepseek"];

impl Builder<'_> {
    /// `build_moe_ffn`.
    pub(super) fn experts(&mut self, il: u32, a: Id) -> Id {
        let layer = self.layer_of(il);
        let [n_embd, n_tokens, ..] = self.graph.shape(a);
        let n_experts = u64::from(self.model.n_experts);
        let n_used = layer.n_experts_used.max(1);
        let Some(logits) = self.linear(il, "ffn_gate_inp", a) else { return a };
        let gating = self.gating();
        #[allow(clippy::float_cmp, reason = "small whole numbers")]
        let chosen_only = gating == SOFTMAX_OF_CHOSEN;
        let probs = if chosen_only { logits } else { self.graph.in_place(logits, &[]) };
        let mut selection = probs;
        if let Some(bias) = self.weight(il, "exp_probs_b.bias") {
            selection = self.graph.in_place(probs, &[bias]);
        }
        if self.model.n_expert_groups > 1 {
            selection = self.select_groups(selection, n_experts, n_tokens);
        }
        let chosen = self.graph.top_k(selection, n_used);
        let columns = self.graph.reshape(probs, [1, n_experts, n_tokens, 1]);
        let mut weights = self.graph.get_rows(columns, chosen);
        if chosen_only {
            let flat = self.graph.reshape(weights, [n_used, n_tokens, 1, 1]);
            let normed = self.graph.in_place(flat, &[]);
            weights = self.graph.reshape(normed, [1, n_used, n_tokens, 1]);
        }
        if self.norms_weights() {
            let flat = self.graph.reshape(weights, [n_used, n_tokens, 1, 1]);
            let sum = self.graph.sum_rows(flat);
            let clamped = self.graph.in_place(sum, &[]);
            let normed = self.graph.in_place(flat, &[clamped]);
            weights = self.graph.reshape(normed, [1, n_used, n_tokens, 1]);
        }
        let scale = self.model.flag("expert_weights_scale");
        if scale != 0.0 && (scale - 1.0).abs() > f32::EPSILON {
            weights = self.graph.in_place(weights, &[]);
        }
        self.graph.expand(weights);

        let mut single = self.graph.reshape(a, [n_embd, 1, n_tokens, 1]);
        let weighs_first = self.model.architecture == "llama4";
        if weighs_first {
            let repeated = self.graph.result(Op::Other, GgmlType::F32, [n_embd, n_used, n_tokens, 1], &[single]);
            single = self.graph.in_place(repeated, &[weights]);
        }
        let hidden = self.expert_hidden(il, single, chosen);
        let Some(mut outputs) = self.expert_product(il, "ffn_down_exps.weight", hidden, chosen) else { return a };
        if let Some(bias) = self.weight(il, "ffn_down_exps.bias") {
            outputs = self.graph.in_place(outputs, &[bias, chosen]);
        }
        if !weighs_first {
            outputs = self.graph.in_place(outputs, &[weights]);
        }
        self.graph.expand(outputs);
        self.sum_of_experts(outputs, n_embd, n_tokens, n_used)
    }

    /// The chosen experts' hidden halves: `[n_ff, chosen, tokens]`.
    fn expert_hidden(&mut self, il: u32, a: Id, chosen: Id) -> Id {
        if let Some(product) = self.expert_product(il, "ffn_gate_up_exps.weight", a, chosen) {
            let [n, n_used, n_tokens, _] = self.graph.shape(product);
            let strides = self.graph.get(product).strides;
            let gate = self.graph.view_3d(product, [n / 2, n_used, n_tokens], [strides[1], strides[2]]);
            let up = self.graph.view_3d(product, [n / 2, n_used, n_tokens], [strides[1], strides[2]]);
            return self.graph.like(Op::Other, gate, &[up]);
        }
        let product = |builder: &mut Self, name: &str| {
            let product = builder.expert_product(il, &format!("{name}.weight"), a, chosen)?;
            Some(match builder.weight(il, &format!("{name}.bias")) {
                Some(bias) => builder.graph.in_place(product, &[bias, chosen]),
                None => product,
            })
        };
        let Some(up) = product(self, "ffn_up_exps") else { return a };
        match product(self, "ffn_gate_exps") {
            Some(gate) => self.graph.like(Op::Other, gate, &[up]),
            None => self.graph.in_place(up, &[]),
        }
    }

    fn sum_of_experts(&mut self, outputs: Id, n_embd: u64, n_tokens: u64, n_used: u64) -> Id {
        let stride = self.graph.get(outputs).strides[2];
        let parts: Vec<Id> = (0..n_used).map(|_| self.graph.view_2d(outputs, [n_embd, n_tokens], stride)).collect();
        for &part in &parts {
            self.graph.expand(part);
        }
        let mut sum = parts[0];
        for &part in &parts[1..] {
            sum = self.graph.in_place(sum, &[part]);
            self.graph.expand(sum);
        }
        if n_used == 1 {
            sum = self.graph.cont(sum, [n_embd, n_tokens, 1, 1]);
        }
        sum
    }

    /// Keeps the best groups of experts and hides the others.
    fn select_groups(&mut self, probs: Id, n_experts: u64, n_tokens: u64) -> Id {
        let n_groups = self.model.n_expert_groups;
        let per_group = n_experts / n_groups;
        let n_used = self.model.n_groups_used;
        let groups = self.graph.reshape(probs, [per_group, n_groups, n_tokens, 1]);
        let best_two = self.graph.top_k(groups, 2);
        let columns = self.graph.reshape(groups, [1, per_group, n_groups, n_tokens]);
        let scores = self.graph.get_rows(columns, best_two);
        let pairs = self.graph.reshape(scores, [2, n_groups, n_tokens, 1]);
        let sums = self.graph.sum_rows(pairs);
        let flat = self.graph.reshape(sums, [n_groups, n_tokens, 1, 1]);
        let chosen = self.graph.top_k(flat, n_used);
        let kept = self.graph.get_rows(groups, chosen);
        let hidden = self.graph.in_place(groups, &[]);
        let masked = self.graph.set_rows(hidden, kept, chosen);
        self.graph.reshape(masked, [n_experts, n_tokens, 1, 1])
    }

    fn gating(&self) -> f32 {
        match self.model.flag("expert_gating_func") {
            0.0 if self.model.architecture == "gpt-oss" => SOFTMAX_OF_CHOSEN,
            0.0 if self.model.architecture == "llama4" => SIGMOID,
            gating => gating,
        }
    }

    fn norms_weights(&self) -> bool {
        match self.model.flags.get("expert_weights_norm") {
            Some(&normed) => normed != 0.0,
            // DeepSeek's files say so when they are.
            None => !self.model.is_one_of(&WITHOUT_NORM) && !self.model.is_one_of(&["deepseek2", "llama4", "glm4moe"]),
        }
    }
}
