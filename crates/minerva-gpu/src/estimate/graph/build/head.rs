//! The way into a head: the hidden state after a token beside the token that follows.

use super::{Builder, Id};
use crate::gguf::GgmlType;

impl Builder<'_> {
    /// Rows of the token table, the head's own or the model's.
    pub(super) fn head_rows(&mut self) -> Id {
        let (n_embd, n_tokens) = (self.model.n_embd, self.step.n_tokens);
        let tokens = self.graph.input(GgmlType::I32, [n_tokens, 1, 1, 1]);
        let own = self.weight(0, "nextn.embed_tokens.weight");
        match own.or_else(|| self.outside("token_embd.weight")) {
            Some(table) => self.graph.get_rows(table, tokens),
            None => self.graph.input(GgmlType::F32, [n_embd, n_tokens, 1, 1]),
        }
    }

    /// Both normed and side by side, and made one row again.
    pub(super) fn merged_rows(&mut self, rows: Id) -> Id {
        let state = self.graph.input(GgmlType::F32, [self.model.n_embd, self.step.n_tokens, 1, 1]);
        let state = self.norm(0, state, "nextn.hnorm");
        let rows = self.norm(0, rows, "nextn.enorm");
        let both = self.graph.concat(rows, state);
        self.product(0, "nextn.eh_proj.weight", both).unwrap_or(both)
    }
}
