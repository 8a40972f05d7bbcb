//! Which of the copies in host memory are checkpoints, and how one is taken.

use std::collections::HashMap;

use minerva_llama::SavedState;

use crate::backend::Backend;
use crate::scheduler::{Checkpoint, ParkId};

/// The checkpoints that are there.
#[derive(Debug)]
pub(crate) struct Checkpoints {
    /// They are the part of a sequence that does not stay in its cells.
    are_parts: bool,
    sizes_bytes: HashMap<ParkId, u64>,
    bytes: u64,
}

impl Checkpoints {
    pub(crate) fn new(are_parts: bool) -> Self {
        Self { are_parts, sizes_bytes: HashMap::new(), bytes: 0 }
    }

    /// What is to be kept of a sequence; `None` when it cannot be copied out.
    pub(crate) fn take(&mut self, backend: &mut dyn Backend, checkpoint: Checkpoint) -> Option<SavedState> {
        let Checkpoint { seq, at, .. } = checkpoint;
        let state = if self.are_parts { backend.save_part(seq) } else { backend.save(seq) }?;
        let n_bytes = state.len() as u64;
        self.bytes += n_bytes;
        self.sizes_bytes.insert(at, n_bytes);
        Some(state)
    }

    pub(crate) fn has(&self, id: ParkId) -> bool {
        self.sizes_bytes.contains_key(&id)
    }

    pub(crate) fn drop_all(&mut self, ids: &[ParkId]) {
        for id in ids {
            self.bytes -= self.sizes_bytes.remove(id).unwrap_or(0);
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}
