//! What a load is asked for, in llama.cpp's terms.

use crate::gguf::GgmlType;

/// Cells are counted in steps of this many (`GGML_PAD(n_ctx, 256)`).
pub(super) const CELLS_STEP: u64 = 256;

/// Sizes and switches of a context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadSettings {
    /// KV cells of all sequences together, in tokens.
    pub context_tokens: u32,
    /// Sequences.
    pub n_sequences: u32,
    /// The most tokens of one batch.
    pub batch_tokens: u32,
    /// The most tokens that a device computes at once.
    pub ubatch_tokens: u32,
    /// Attention that does not store its scores.
    pub flash_attention: bool,
    /// Element type of the K cache.
    pub cache_type_k: GgmlType,
    /// Element type of the V cache; quantised only with flash attention.
    pub cache_type_v: GgmlType,
    /// One pool of cells for all sequences instead of a share for each.
    pub kv_unified: bool,
    /// Windowed layers keep the whole context, so that a sequence can be cut anywhere.
    pub full_windows: bool,
}

impl Default for LoadSettings {
    fn default() -> Self {
        Self {
            context_tokens: 4096,
            n_sequences: 1,
            batch_tokens: 2048,
            ubatch_tokens: 512,
            flash_attention: true,
            cache_type_k: GgmlType::F16,
            cache_type_v: GgmlType::F16,
            kv_unified: false,
            full_windows: false,
        }
    }
}

/// The settings as llama.cpp rounds them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rounded {
    /// Cells of one stream.
    pub(super) stream_cells: u64,
    pub(super) n_streams: u64,
    pub(super) batch_tokens: u64,
    pub(super) ubatch_tokens: u64,
    pub(super) n_sequences: u64,
    /// Tokens of the step that memory is reserved for: as many for each sequence.
    pub(super) step_tokens: u64,
    pub(super) n_outputs: u64,
}

impl LoadSettings {
    pub(super) fn rounded(&self, causal: bool) -> Rounded {
        let n_sequences = u64::from(self.n_sequences.max(1));
        let context = u64::from(self.context_tokens.max(1));
        let batch = if causal { context.min(self.batch_tokens.into()) } else { self.batch_tokens.into() }.max(1);
        let ubatch_tokens = match self.ubatch_tokens {
            0 => batch,
            tokens => batch.min(tokens.into()),
        };
        let pad = |n: u64| n.div_ceil(CELLS_STEP) * CELLS_STEP;
        let (stream_cells, n_streams) =
            if self.kv_unified { (pad(context), 1) } else { (pad((pad(context) / n_sequences).max(1)), n_sequences) };
        let all_cells = stream_cells.saturating_mul(n_streams);
        let wanted = all_cells.min(ubatch_tokens);
        Rounded {
            stream_cells,
            n_streams,
            batch_tokens: batch,
            ubatch_tokens,
            n_sequences,
            step_tokens: wanted.div_ceil(n_sequences) * n_sequences,
            n_outputs: wanted.min(batch),
        }
    }
}
