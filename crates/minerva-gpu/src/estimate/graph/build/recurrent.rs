//! Recurrent blocks: state-space layers of both Mamba generations, and a bound for the other kinds.
#![allow(clippy::many_single_char_names, reason = "x, z, b, c and y are the papers' names")]

use super::{Builder, Home, Id, Op};
use crate::gguf::GgmlType;

/// Which state each sequence continues.
#[derive(Clone, Copy)]
pub(super) struct Input {
    pub(super) copies: Id,
    /// Of the step's sequences.
    pub(super) main: Id,
    /// Without the first: a scan reads that one from the cache itself.
    pub(super) tail: Id,
}

/// A state-space layer's sizes in one step.
#[derive(Clone, Copy)]
struct Scan {
    /// Channels that are convolved.
    width: u64,
    n_heads: u64,
    head: u64,
    per_sequence: u64,
}

impl Builder<'_> {
    pub(super) fn recurrent(&mut self, il: u32, normed: Id) -> Id {
        let layer = self.layer_of(il);
        if layer.has("ssm_x.weight") {
            self.mamba(il, normed)
        } else if layer.has("ssm_in.weight") {
            self.mamba2(il, normed)
        } else if layer.has("shortconv.in_proj.weight") {
            self.short_convolution(il, normed)
        } else {
            self.other_recurrent(il, normed)
        }
    }

    fn state(&mut self, il: u32, n_elements: u64) -> Id {
        let home = Home { backend: self.placement.layer_backend(il), is_weights: false };
        self.graph.external(GgmlType::F32, [n_elements, self.step.n_sequences, 1, 1], home)
    }

    /// `build_rs`: clears what must be cleared and answers the states of the step's sequences.
    fn load_state(&mut self, state: Id) -> Id {
        let [n, n_states, ..] = self.graph.shape(state);
        let Some(Input { copies, .. }) = self.inputs.states else { return state };
        let states = self.prepare_state(state);
        let all = self.graph.get_rows(states, copies);
        let stride = self.graph.get(all).strides[1];
        let current = self.graph.view_2d(all, [n, n_states], stride);
        self.graph.expand(current);
        self.store_extra_states(all, state);
        current
    }

    fn prepare_state(&mut self, state: Id) -> Id {
        let [n, n_states, ..] = self.graph.shape(state);
        let states = self.graph.reshape(state, [n, n_states, 1, 1]);
        let nothing = self.graph.view_1d(states, 0);
        let cleared = self.graph.scale_in_place(nothing);
        self.graph.expand(cleared);
        states
    }

    /// States of sequences that are not in the step: none when all are.
    fn store_extra_states(&mut self, all: Id, state: Id) {
        let n = self.graph.shape(state)[0];
        let stride = self.graph.get(state).strides[1];
        let extra = self.graph.view_2d(all, [n, 0], stride);
        let target = self.graph.view_2d(state, [n, 0], stride);
        let stored = self.graph.cpy(extra, target);
        self.graph.expand(stored);
    }

    /// Convolution over the history and the step's tokens; the last columns become the new history.
    fn convolve(&mut self, il: u32, channels: Id, history: Id, width: u64, n_sequences: u64) -> Id {
        let n_kept = self.model.recurrent.d_conv.saturating_sub(1);
        let loaded = self.load_state(history);
        let loaded = self.graph.reshape(loaded, [n_kept, width, n_sequences, 1]);
        let turned = self.graph.transpose(channels);
        let joined = self.graph.concat(loaded, turned);
        let strides = self.graph.get(joined).strides;
        let last = self.graph.view_3d(joined, [n_kept, width, n_sequences], [strides[1], strides[2]]);
        let target = self.graph.view_1d(history, n_kept * width * n_sequences);
        let stored = self.graph.cpy(last, target);
        self.graph.expand(stored);
        let n_columns = self.graph.shape(joined)[0] - n_kept;
        let Some(kernel) = self.weight(il, "ssm_conv1d.weight") else { return joined };
        let mut convolved =
            self.graph.result(Op::Other, GgmlType::F32, [width, n_columns, n_sequences, 1], &[joined, kernel]);
        if let Some(bias) = self.weight(il, "ssm_conv1d.bias") {
            convolved = self.graph.in_place(convolved, &[bias]);
        }
        self.graph.in_place(convolved, &[])
    }

    /// `build_mamba_layer`.
    fn mamba(&mut self, il: u32, normed: Id) -> Id {
        let sizes = self.model.recurrent;
        let (d_inner, d_state, dt_rank) = (sizes.d_inner, sizes.d_state, sizes.dt_rank);
        let n_sequences = self.step.n_sequences;
        let per_sequence = self.step.n_tokens / n_sequences;
        let (history, states) = (self.state(il, sizes.history), self.state(il, sizes.state));
        let n_embd = self.graph.shape(normed)[0];
        let columns = self.graph.reshape(normed, [n_embd, per_sequence, n_sequences, 1]);
        // The history is gathered before the projection runs.
        let Some(both) = self.product(il, "ssm_in.weight", columns) else { return normed };
        let strides = self.graph.get(both).strides;
        let half = |builder: &mut Self| {
            builder.graph.view_3d(both, [d_inner, per_sequence, n_sequences], [strides[1], strides[2]])
        };
        let (x, z) = (half(self), half(self));
        let x = self.convolve(il, x, history, d_inner, n_sequences);

        let Some(parts) = self.product(il, "ssm_x.weight", x) else { return normed };
        let strides = self.graph.get(parts).strides;
        let dt = self.graph.view_3d(parts, [dt_rank, per_sequence, n_sequences], [strides[1], strides[2]]);
        let vector = |builder: &mut Self| {
            let shape = [d_state, 1, per_sequence, n_sequences];
            builder.graph.view_4d(parts, shape, [d_state * 4, strides[1], strides[2]])
        };
        let (mut b, mut c) = (vector(self), vector(self));
        let dt = if self.layer_of(il).has("ssm_dt_norm.weight") {
            let dt = self.norm(il, dt, "ssm_dt_norm");
            b = self.norm(il, b, "ssm_b_norm");
            c = self.norm(il, c, "ssm_c_norm");
            dt
        } else {
            self.graph.cont(dt, [dt_rank, per_sequence, n_sequences, 1])
        };
        let dt = self.linear(il, "ssm_dt", dt).unwrap_or(dt);
        let heads = self.graph.reshape(x, [1, d_inner, per_sequence, n_sequences]);
        let scan = Scan { width: d_inner, n_heads: d_inner, head: 1, per_sequence };
        let scanned = self.scan(il, states, scan, [heads, dt, b, c]);
        let row = d_inner * 4;
        let y = self.graph.view_3d(scanned, [d_inner, per_sequence, n_sequences], [row, row * per_sequence]);
        let skip = self.weight(il, "ssm_d");
        let skip: Vec<Id> = skip.into_iter().collect();
        let skipped = self.graph.in_place(x, &skip);
        let y = self.graph.in_place(y, &[skipped]);
        let gate = self.graph.cont(z, [d_inner, per_sequence, n_sequences, 1]);
        let y = self.graph.like(Op::Other, gate, &[y]);
        self.project_state(il, y)
    }

    /// `build_mamba2_layer`.
    fn mamba2(&mut self, il: u32, normed: Id) -> Id {
        let sizes = self.model.recurrent;
        let (d_inner, d_state, n_group, n_heads) = (sizes.d_inner, sizes.d_state, sizes.n_group, sizes.dt_rank.max(1));
        let head = d_inner / n_heads;
        let width = d_inner + 2 * n_group * d_state;
        let n_sequences = self.step.n_sequences;
        let per_sequence = self.step.n_tokens / n_sequences;
        let (history, states) = (self.state(il, sizes.history), self.state(il, sizes.state));
        let Some(all) = self.linear(il, "ssm_in", normed) else { return normed };
        let n_all = self.graph.shape(all)[0];
        let all = self.graph.reshape(all, [n_all, per_sequence, n_sequences, 1]);
        let strides = self.graph.get(all).strides;
        let heads = [head, n_heads, per_sequence, n_sequences];
        let z = self.graph.view_4d(all, heads, [head * 4, strides[1], strides[2]]);
        let channels = self.graph.view_3d(all, [width, per_sequence, n_sequences], [strides[1], strides[2]]);
        let dt = self.graph.view_3d(all, [n_heads, per_sequence, n_sequences], [strides[1], strides[2]]);
        let convolved = self.convolve(il, channels, history, width, n_sequences);
        let strides = self.graph.get(convolved).strides;
        let x = self.graph.view_4d(convolved, heads, [head * 4, strides[1], strides[2]]);
        let vectors = [d_state, n_group, per_sequence, n_sequences];
        let b = self.graph.view_4d(convolved, vectors, [d_state * 4, strides[1], strides[2]]);
        let c = self.graph.view_4d(convolved, vectors, [d_state * 4, strides[1], strides[2]]);
        let dt = self.graph.cont(dt, [n_heads, per_sequence, n_sequences, 1]);
        let bias: Vec<Id> = self.weight(il, "ssm_dt.bias").into_iter().collect();
        let dt = self.graph.in_place(dt, &bias);
        let scan = Scan { width: d_inner, n_heads, head, per_sequence };
        let scanned = self.scan(il, states, scan, [x, dt, b, c]);
        let strides = self.graph.get(x).strides;
        let y =
            self.graph.view_4d(scanned, heads, [strides[1], n_heads * strides[1], per_sequence * n_heads * strides[1]]);
        let skip: Vec<Id> = self.weight(il, "ssm_d").into_iter().collect();
        let skipped = self.graph.in_place(x, &skip);
        let y = self.graph.in_place(y, &[skipped]);
        let gate = self.graph.cont(z, heads);
        let mut y = self.graph.like(Op::Other, gate, &[y]);
        if self.layer_of(il).has("ssm_norm.weight") {
            let groups = self.graph.reshape(y, [d_inner / n_group.max(1), n_group, per_sequence, n_sequences]);
            y = self.norm(il, groups, "ssm_norm");
        }
        let y = self.graph.reshape(y, [d_inner, self.step.n_tokens, 1, 1]);
        self.linear(il, "ssm_out", y).unwrap_or(y)
    }

    /// The scan over the states, and the states that it leaves.
    fn scan(&mut self, il: u32, states: Id, scan: Scan, [x, dt, b, c]: [Id; 4]) -> Id {
        let n_sequences = self.step.n_sequences;
        let d_state = self.model.recurrent.d_state;
        let rows = self.prepare_state(states);
        let viewed = self.graph.reshape(rows, [d_state, scan.head, scan.n_heads, n_sequences]);
        let Some(Input { main, tail, .. }) = self.inputs.states else { return x };
        let extra = self.graph.get_rows(rows, tail);
        let decay = self.weight(il, "ssm_a").unwrap_or(x);
        let n_out = scan.width * scan.per_sequence * n_sequences + d_state * scan.width * n_sequences;
        let scanned =
            self.graph.result(Op::Other, GgmlType::F32, [n_out, 1, 1, 1], &[viewed, x, dt, decay, b, c, main]);
        self.graph.expand(scanned);
        self.store_extra_states(extra, states);
        let last = self.graph.view_1d(scanned, d_state * scan.width * n_sequences);
        let target = self.graph.view_1d(states, d_state * scan.width * n_sequences);
        let stored = self.graph.cpy(last, target);
        self.graph.expand(stored);
        scanned
    }

    fn project_state(&mut self, il: u32, y: Id) -> Id {
        let out = self.linear(il, "ssm_out", y).unwrap_or(y);
        let n = self.graph.shape(out)[0];
        self.graph.reshape(out, [n, self.step.n_tokens, 1, 1])
    }

    /// Gated short convolutions (LFM2).
    fn short_convolution(&mut self, il: u32, normed: Id) -> Id {
        let n_embd = self.model.n_embd;
        let n_sequences = self.step.n_sequences;
        let per_sequence = self.step.n_tokens / n_sequences;
        let history = self.state(il, self.model.recurrent.history);
        let Some(all) = self.linear(il, "shortconv.in_proj", normed) else { return normed };
        let all = self.graph.reshape(all, [3 * n_embd, per_sequence, n_sequences, 1]);
        let turned = self.graph.transpose(all);
        let strides = self.graph.get(turned).strides;
        let part = |builder: &mut Self| {
            builder.graph.view_3d(turned, [per_sequence, n_embd, n_sequences], [strides[1], strides[2]])
        };
        let (b, c, x) = (part(self), part(self), part(self));
        let gated = self.graph.like(Op::Other, b, &[x]);
        let loaded = self.load_state(history);
        let n_kept = self.model.recurrent.history / n_embd.max(1);
        let loaded = self.graph.reshape(loaded, [n_kept, n_embd, n_sequences, 1]);
        let joined = self.graph.concat(loaded, gated);
        let strides = self.graph.get(joined).strides;
        let last = self.graph.view_3d(joined, [n_kept, n_embd, n_sequences], [strides[1], strides[2]]);
        let target = self.graph.view_1d(history, n_kept * n_embd * n_sequences);
        let stored = self.graph.cpy(last, target);
        self.graph.expand(stored);
        let Some(kernel) = self.weight(il, "shortconv.conv.weight") else { return normed };
        let convolved =
            self.graph.result(Op::Other, GgmlType::F32, [n_embd, per_sequence, n_sequences, 1], &[joined, kernel]);
        let gate = self.graph.transpose(c);
        let y = self.graph.in_place(convolved, &[gate]);
        let y = self.graph.reshape(y, [n_embd, self.step.n_tokens, 1, 1]);
        self.linear(il, "shortconv.out_proj", y).unwrap_or(y)
    }

    /// Linear attention of a kind that is not written down here (delta nets, RWKV): every projection of the layer at once,
    /// which is more than such a layer holds at any moment.
    fn other_recurrent(&mut self, il: u32, normed: Id) -> Id {
        let layer = self.layer_of(il);
        let mut names: Vec<&str> = layer
            .tensors
            .iter()
            .filter(|(name, tensor)| {
                !name.starts_with("ffn_") && tensor.dims.len() == 2 && tensor.dims[0] == self.model.n_embd
            })
            .filter_map(|(name, _)| name.strip_suffix(".weight"))
            .collect();
        names.sort_unstable();
        let (history, states) =
            (self.state(il, self.model.recurrent.history.max(1)), self.state(il, self.model.recurrent.state.max(1)));
        let loaded = [self.load_state(history), self.load_state(states)];
        let mut sources: Vec<Id> = names.iter().filter_map(|name| self.linear(il, name, normed)).take(4).collect();
        sources.extend(loaded);
        let shape = self.graph.shape(normed);
        let mixed = self.graph.result(Op::Other, GgmlType::F32, shape, &sources);
        self.graph.expand(mixed);
        mixed
    }
}
