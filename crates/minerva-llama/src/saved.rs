//! The bytes of a sequence that was copied out.

use std::fmt;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// A copy of this size or more has memory pages of its own. The system allows a process 65,530 ranges of pages
/// (`vm.max_map_count`), so no smaller ones.
const PAGES_FROM_BYTES: usize = 1 << 20;

/// What a sequence held.
///
/// The pages of a large copy go back to the system when it is dropped. Copies of all sizes that come and go in a heap leave
/// holes, and with a full cache the process would go on growing.
pub struct SavedState {
    memory: Memory,
    n_bytes: usize,
}

enum Memory {
    Heap(Vec<u8>),
    Pages(MmapMut),
}

impl SavedState {
    /// Room for `n_bytes`, all of them 0; `None` when there is no memory for it.
    #[must_use]
    pub fn zeroed(n_bytes: usize) -> Option<Self> {
        let memory = if n_bytes >= PAGES_FROM_BYTES {
            Memory::Pages(MmapMut::map_anon(n_bytes).ok()?)
        } else {
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(n_bytes).ok()?;
            bytes.resize(n_bytes, 0);
            Memory::Heap(bytes)
        };
        Some(Self { memory, n_bytes })
    }

    /// Forgets what follows the first `n_bytes`.
    pub(crate) fn truncate(&mut self, n_bytes: usize) {
        self.n_bytes = self.n_bytes.min(n_bytes);
    }
}

impl Deref for SavedState {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let bytes: &[u8] = match &self.memory {
            Memory::Heap(bytes) => bytes,
            Memory::Pages(pages) => pages,
        };
        &bytes[..self.n_bytes]
    }
}

impl DerefMut for SavedState {
    fn deref_mut(&mut self) -> &mut [u8] {
        let bytes: &mut [u8] = match &mut self.memory {
            Memory::Heap(bytes) => bytes,
            Memory::Pages(pages) => pages,
        };
        &mut bytes[..self.n_bytes]
    }
}

impl From<Vec<u8>> for SavedState {
    fn from(bytes: Vec<u8>) -> Self {
        Self { n_bytes: bytes.len(), memory: Memory::Heap(bytes) }
    }
}

impl PartialEq for SavedState {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl fmt::Debug for SavedState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SavedState({} bytes)", self.n_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_ones_are_zero_hold_what_is_written_and_shrink() {
        for n_bytes in [0, 1, PAGES_FROM_BYTES - 1, PAGES_FROM_BYTES, PAGES_FROM_BYTES * 2 + 1] {
            let mut state = SavedState::zeroed(n_bytes).expect("there is memory");
            assert!(state.len() == n_bytes && state.iter().all(|byte| *byte == 0));
            state.fill(7);
            state.truncate(n_bytes / 2);
            assert_eq!(state, SavedState::from(vec![7; n_bytes / 2]));
        }
    }

    #[test]
    fn memory_that_nobody_has_is_refused() {
        assert_eq!(SavedState::zeroed(usize::MAX / 2), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_memory_of_a_large_one_goes_back_at_once() {
        let private_kib = || {
            let status = std::fs::read_to_string("/proc/self/status").expect("a status");
            let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("its memory");
            line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number")
        };
        // From here on glibc would take pieces of this size from its heap.
        drop(std::hint::black_box(vec![1_u8; PAGES_FROM_BYTES * 16]));
        let mut states: Vec<SavedState> = (0..8).filter_map(|_| SavedState::zeroed(PAGES_FROM_BYTES * 8)).collect();
        for state in &mut states {
            state.fill(1);
        }
        let before_kib = private_kib();
        states.drain(..7);
        assert!(private_kib() + 7 * 6 * 1024 < before_kib, "{} of {before_kib} KiB", private_kib());
    }
}
