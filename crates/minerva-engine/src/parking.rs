//! Copies of sequences in host memory, by the names that the scheduler gave them.

use std::collections::HashMap;
use std::sync::Arc;

use minerva_llama::SavedState;

use crate::scheduler::ParkId;

/// The copies. Each is shared with the disk's thread while it is written, and stays here until that is over.
#[derive(Debug, Default)]
pub(crate) struct Parking {
    states: HashMap<ParkId, Arc<SavedState>>,
    bytes: u64,
}

impl Parking {
    pub(crate) fn keep(&mut self, id: ParkId, state: SavedState) {
        self.bytes += state.len() as u64;
        if let Some(before) = self.states.insert(id, Arc::new(state)) {
            self.bytes -= before.len() as u64;
        }
    }

    pub(crate) fn get(&self, id: ParkId) -> Option<&[u8]> {
        self.states.get(&id).map(|state| &***state)
    }

    pub(crate) fn share(&self, id: ParkId) -> Option<Arc<SavedState>> {
        self.states.get(&id).map(Arc::clone)
    }

    pub(crate) fn drop_all(&mut self, ids: Vec<ParkId>) {
        for id in ids {
            self.bytes -= self.states.remove(&id).map_or(0, |state| state.len() as u64);
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}
