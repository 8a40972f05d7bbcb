//! The engine's backend trait over one llama.cpp context.

use std::thread;

use minerva_llama::{Batch, Context, DecodeError, DeviceBytes, SavedState};

use super::claims::Claim;
use super::parts::Parts;
use crate::backend::{Backend, BackendLimits, HeadBackend, Row, SeqId, StepError};

/// A context and the batch that is filled anew for each step.
pub(crate) struct LlamaBackend {
    context: Context,
    batch: Batch,
    sizes: StateSizes,
    parts: Option<Parts>,
    /// After the context: what it holds is given back before others may have it.
    _claim: Claim,
}

impl LlamaBackend {
    pub(super) fn new(context: Context, claim: Claim) -> Self {
        let batch = Batch::new(&context);
        let sizes = StateSizes::by_plan(&context);
        let parts = Parts::of(&context);
        Self { context, batch, sizes, parts, _claim: claim }
    }

    /// Computes one token and forgets it, so that pages, graphs and kernels are there before the first request.
    ///
    /// On a thread that ends: OpenMP keeps a team of threads for every thread that ever computed, and once there are more of
    /// them than cores it stops spinning at its barriers. A team left behind on the caller's thread made every later step
    /// half as slow again (docs/benchmarks.md).
    pub(crate) fn warm_up(&mut self) {
        thread::scope(|scope| scope.spawn(|| self.decode_one()).join()).unwrap_or_else(|_| {
            tracing::warn!("the warm-up step panicked");
        });
    }

    /// As [`warm_up`](Self::warm_up), with as many tokens as are computed at once. A GPU's libraries take their workspaces with the first
    /// large batch: what a load takes is to be known when it ends, and whether there was room for it.
    pub(crate) fn warm_up_fully(&mut self) -> Result<(), StepError> {
        let token = self.context.model().bos().unwrap_or(0);
        let n = self.context.n_ubatch().min(self.context.n_batch()).min(self.context.n_ctx_seq());
        let rows: Vec<Row> = (0..n).map(|pos| Row { seq: 0, token, pos, output: pos + 1 == n }).collect();
        self.forgotten(|backend| backend.decode(&rows))
    }

    /// Computes on a thread that ends, and forgets what was computed.
    fn forgotten(&mut self, step: impl FnOnce(&mut Self) -> Result<(), StepError> + Send) -> Result<(), StepError> {
        let panicked = || StepError::new(false, "the warm-up step panicked");
        thread::scope(|scope| scope.spawn(|| step(self)).join()).unwrap_or_else(|_| Err(panicked()))?;
        self.truncate(0, 0);
        Ok(())
    }

    /// As [`warm_up`](Self::warm_up), of a head: one token, from a hidden state of zeros.
    pub(crate) fn warm_up_head(&mut self) -> Result<(), StepError> {
        let token = self.context.model().bos().unwrap_or(0);
        let hidden = vec![0.0; self.context.model().n_hidden()];
        self.forgotten(|head| head.decode_after(&[Row { seq: 0, token, pos: 0, output: true }], &hidden))
    }

    fn decode_one(&mut self) {
        let token = self.context.model().bos().unwrap_or(0);
        let row = Row { seq: 0, token, pos: 0, output: true };
        if let Err(error) = self.decode(&[row]) {
            tracing::warn!("the warm-up step failed: {error}");
        } else if let Ok((whole, part)) = self.context.saved_bytes(0) {
            self.sizes = StateSizes::measured(&self.context, whole as u64, part as u64);
        }
        self.truncate(0, 0);
    }

    /// Scores of a row of the last physical step.
    pub(super) fn scores(&self, row: usize) -> Option<&[f32]> {
        self.context.logits(row)
    }

    pub(crate) fn memory_bytes(&self) -> Vec<DeviceBytes> {
        self.context.memory_bytes().unwrap_or_default()
    }
}

impl Backend for LlamaBackend {
    fn limits(&self) -> BackendLimits {
        let kv_bytes: u64 = self.memory_bytes().iter().map(|device| device.kv_bytes).sum();
        let model = self.context.model();
        let keeps_beginnings = self.context.keeps_beginnings();
        let has_window = !keeps_beginnings && !model.is_recurrent();
        BackendLimits {
            n_seq_max: self.context.n_seq_max(),
            n_cells_per_seq: self.context.n_ctx_seq(),
            n_cells: self.context.n_ctx(),
            unified: self.context.kv_unified(),
            stream_bytes: if self.context.kv_unified() { 0 } else { kv_bytes / u64::from(self.context.n_seq_max()) },
            cell_bytes: self.sizes.cell,
            state_bytes: self.sizes.state,
            keeps_beginnings,
            window_cell_bytes: self.sizes.window_cell,
            n_window_tokens: if has_window { model.n_window_tokens() } else { 0 },
            n_copied_window_tokens: if keeps_beginnings { model.n_window_tokens() } else { 0 },
            checkpoints_need_cells: !keeps_beginnings && !model.is_only_recurrent(),
            n_batch: self.context.n_batch(),
            n_ubatch: self.context.n_ubatch(),
            n_vocab: model.n_vocab(),
        }
    }

    fn decode(&mut self, rows: &[Row]) -> Result<(), StepError> {
        let Some(mut parts) = self.parts.take() else { return self.decode_after(rows, &[]) };
        let decoded = parts.decode(self, rows);
        self.parts = Some(parts);
        decoded
    }

    fn hidden(&mut self) -> &[f32] {
        self.context.hidden()
    }

    fn logits(&self, i: usize) -> Option<&[f32]> {
        match &self.parts {
            Some(parts) if parts.is_in_use() => parts.logits(i),
            _ => self.context.logits(i),
        }
    }

    fn truncate(&mut self, seq: SeqId, n_tokens: u32) -> bool {
        let cut = self.context.truncate_seq(seq, n_tokens).unwrap_or(false);
        if !cut && n_tokens > 0 {
            let _ = self.context.clear_seq(seq); // the sequence exists, and emptying it never fails
        }
        cut
    }

    fn copy(&mut self, src: SeqId, dst: SeqId, n_tokens: u32) -> bool {
        self.context.copy_seq(src, dst, n_tokens).unwrap_or(false)
    }

    fn save(&mut self, seq: SeqId) -> Option<SavedState> {
        let saved = self.context.save_seq(seq);
        saved.inspect_err(|error| tracing::warn!("what a sequence holds cannot be copied out: {error}")).ok()
    }

    fn restore(&mut self, seq: SeqId, state: &[u8]) -> bool {
        let is_there = self.context.restore_seq(seq, state).unwrap_or(false);
        if !is_there {
            let _ = self.context.clear_seq(seq); // the sequence exists, and emptying it never fails
        }
        is_there
    }

    fn save_part(&mut self, seq: SeqId) -> Option<SavedState> {
        let saved = self.context.save_seq_part(seq);
        saved.inspect_err(|error| tracing::warn!("no checkpoint of a sequence can be taken: {error}")).ok()
    }

    fn rewind(&mut self, seq: SeqId, state: &[u8], n_tokens: u32) -> bool {
        let is_there = self.context.rewind_seq(seq, state, n_tokens).unwrap_or(false);
        if !is_there {
            let _ = self.context.clear_seq(seq); // the sequence exists, and emptying it never fails
        }
        is_there
    }
}

impl HeadBackend for LlamaBackend {
    fn decode_after(&mut self, rows: &[Row], hidden: &[f32]) -> Result<(), StepError> {
        self.batch.clear();
        let n_hidden = hidden.len() / rows.len().max(1);
        for (i, row) in rows.iter().enumerate() {
            let state = &hidden[i * n_hidden..(i + 1) * n_hidden];
            self.batch
                .push_after(state, row.token, row.pos, row.seq, row.output)
                .map_err(|error| StepError::new(true, error.to_string()))?;
        }
        self.context.decode(&mut self.batch).map_err(|error: DecodeError| StepError {
            cache_unchanged: error.cache_unchanged(),
            // Positions that do not go on from what llama.cpp holds.
            begins_anew: matches!(error, DecodeError::InvalidBatch { .. }),
            message: error.to_string(),
        })
    }
}

/// What copying a sequence out takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct StateSizes {
    /// Each cell.
    cell: u64,
    /// Whatever its length.
    state: u64,
    /// Each cell of layers with a window, as far as that reaches.
    window_cell: u64,
}

impl StateSizes {
    /// At most, by what the context takes.
    fn by_plan(context: &Context) -> Self {
        let kv_bytes: u64 = context.memory_bytes().unwrap_or_default().iter().map(|device| device.kv_bytes).sum();
        // A recurrent model has a state of fixed size in each sequence, whatever its length; of a hybrid both are counted.
        let state = if context.model().is_recurrent() { kv_bytes / u64::from(context.n_seq_max()) } else { 0 };
        Self { cell: kv_bytes.div_ceil(u64::from(context.n_ctx()).max(1)), state, window_cell: 0 }
    }

    /// By what a sequence of one token takes, all of it and the part that a checkpoint has.
    fn measured(context: &Context, whole_bytes: u64, part_bytes: u64) -> Self {
        let (is_recurrent, keeps) = (context.model().is_recurrent(), context.keeps_beginnings());
        let only_recurrent = context.model().is_only_recurrent();
        match (is_recurrent, keeps) {
            _ if only_recurrent => Self { cell: 0, state: whole_bytes, window_cell: 0 },
            (true, _) => Self { cell: whole_bytes.saturating_sub(part_bytes), state: part_bytes, window_cell: 0 },
            (false, true) => Self::by_plan(context),
            (false, false) => Self { cell: whole_bytes.saturating_sub(part_bytes), state: 0, window_cell: part_bytes },
        }
    }
}
