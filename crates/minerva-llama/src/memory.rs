//! The KV cache of a context, sequence by sequence, and its bytes.

use std::ptr;

use serde::{Deserialize, Serialize};

use crate::error::{CallError, call};
use crate::{Context, SavedState, backend, sys};

/// llama.cpp's name for what lies in the system's memory.
pub(crate) const HOST: &str = "Host";

/// Devices that one load can name: llama.cpp's own bound is 16, the host is one more.
const MAX_DEVICES: usize = 32;

/// What a model and its context take on one device, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceBytes {
    /// llama.cpp's name of the device, `Host` for the system's memory.
    pub device: String,
    /// Weights.
    pub weights_bytes: u64,
    /// KV cache and recurrent state.
    pub kv_bytes: u64,
    /// Scratch for one step.
    pub compute_bytes: u64,
}

pub(crate) fn device_bytes(
    fill: impl FnOnce(*mut sys::mnv_device_bytes, *mut usize, *mut sys::mnv_error) -> i32,
) -> Result<Vec<DeviceBytes>, CallError> {
    let empty = sys::mnv_device_bytes { name: [0; 64], model_bytes: 0, context_bytes: 0, compute_bytes: 0 };
    let mut entries = [empty; MAX_DEVICES];
    let mut n = entries.len();
    let status = call(|error| fill(entries.as_mut_ptr(), &raw mut n, error))?;
    if status == sys::MNV_TOO_SMALL {
        return Err(CallError::Argument(format!("{n} devices, the limit is {MAX_DEVICES}")));
    }
    Ok(entries[..n]
        .iter()
        .map(|entry| DeviceBytes {
            device: backend::text(entry.name.as_ptr()),
            weights_bytes: entry.model_bytes as u64,
            kv_bytes: entry.context_bytes as u64,
            compute_bytes: entry.compute_bytes as u64,
        })
        .collect())
}

impl Context {
    /// What this context, its model and the model's adapters really take, per device.
    ///
    /// # Errors
    /// [`CallError`] when llama.cpp cannot say.
    pub fn memory_bytes(&self) -> Result<Vec<DeviceBytes>, CallError> {
        // SAFETY: a live context; `out` has room for `n` entries.
        let mut taken = device_bytes(|out, n, error| unsafe { sys::mnv_context_memory(self.raw(), out, n, error) })?;
        self.model().adapters().add_to(&mut taken);
        if let Some(host) = taken.iter_mut().find(|bytes| bytes.device == HOST) {
            host.compute_bytes += self.hidden_bytes();
        }
        Ok(taken)
    }

    /// Frees the cells of `seq` from position `from` on. `false` if this kind of memory cannot be cut there (recurrent
    /// memory, and windows that have moved on); the sequence must then be cleared as a whole.
    ///
    /// # Errors
    /// [`CallError::Argument`] for a sequence that does not exist.
    #[doc(alias = "llama_memory_seq_rm")]
    pub fn truncate_seq(&mut self, seq: u32, from: u32) -> Result<bool, CallError> {
        let seq = self.checked_seq(seq)?;
        if from > 0 && !self.has_window_before(seq, from) {
            return Ok(false);
        }
        let mut removed = false;
        // SAFETY: a live context and a checked sequence; -1 means the end.
        call(|error| unsafe { sys::mnv_seq_rm(self.raw(), seq, from.cast_signed(), -1, &raw mut removed, error) })?;
        Ok(removed)
    }

    /// Frees all cells of `seq`.
    ///
    /// # Errors
    /// [`CallError::Argument`] for a sequence that does not exist.
    pub fn clear_seq(&mut self, seq: u32) -> Result<(), CallError> {
        // Removing a whole sequence never fails (llama.h, `llama_memory_seq_rm`).
        self.truncate_seq(seq, 0).map(|_| ())
    }

    /// Makes `dst` hold the first `n_tokens` tokens of `src`; what `dst` held is freed. With a unified cache the cells are shared unless
    /// layers keep their window only, otherwise they are copied. `false` if this kind of memory cannot be cut at `n_tokens`: `dst` is
    /// then empty.
    ///
    /// # Errors
    /// [`CallError::Argument`] for a sequence that does not exist or is copied onto itself.
    #[doc(alias = "llama_memory_seq_cp")]
    pub fn copy_seq(&mut self, src: u32, dst: u32, n_tokens: u32) -> Result<bool, CallError> {
        if src == dst {
            return Err(CallError::Argument(format!("sequence {src} cannot be copied onto itself")));
        }
        let (src, dst_raw) = (self.checked_seq(src)?, self.checked_seq(dst)?);
        if self.kv_unified() && self.has_short_windows() {
            // llama.cpp never reuses a window's cell that two sequences have: shared ones soon leave no room.
            let state = self.save(src.cast_unsigned(), false)?;
            if !self.restore_seq(dst, &state)? {
                self.clear_seq(dst)?;
                return Ok(false);
            }
        } else {
            self.clear_seq(dst)?;
            // SAFETY: a live context and checked sequences. The full range, because between streams llama.cpp asserts it.
            call(|error| unsafe { sys::mnv_seq_cp(self.raw(), src, dst_raw, -1, -1, error) })?;
        }
        let cut = self.truncate_seq(dst, n_tokens)?;
        if !cut {
            self.clear_seq(dst)?;
        }
        Ok(cut)
    }

    /// All that `seq` holds, as bytes that [`restore_seq`](Self::restore_seq) takes: cells that are in use, and recurrent state.
    ///
    /// # Errors
    /// [`CallError::Argument`] for a sequence that does not exist; [`CallError`] when there is no memory for the copy.
    #[doc(alias = "llama_state_seq_get_data")]
    pub fn save_seq(&mut self, seq: u32) -> Result<SavedState, CallError> {
        self.save(seq, false)
    }

    /// What of `seq` does not stay in its cells when it goes on, for [`rewind_seq`](Self::rewind_seq): recurrent state, and cells of layers
    /// with a window.
    ///
    /// # Errors
    /// As of [`save_seq`](Self::save_seq).
    #[doc(alias = "llama_state_seq_get_data_ext")]
    pub fn save_seq_part(&mut self, seq: u32) -> Result<SavedState, CallError> {
        self.save(seq, true)
    }

    /// The sizes of [`save_seq`](Self::save_seq) and [`save_seq_part`](Self::save_seq_part) as things are, in bytes.
    ///
    /// # Errors
    /// [`CallError::Argument`] for a sequence that does not exist.
    pub fn saved_bytes(&mut self, seq: u32) -> Result<(usize, usize), CallError> {
        let seq = self.checked_seq(seq)?;
        Ok((self.state_bytes(seq, false)?, self.state_bytes(seq, true)?))
    }

    fn state_bytes(&mut self, seq: sys::llama_seq_id, part: bool) -> Result<usize, CallError> {
        let mut n_bytes = 0;
        // SAFETY: a live context and a checked sequence; without a buffer the shim only says how many bytes are needed.
        call(|error| unsafe {
            sys::mnv_state_seq_get(self.raw(), seq, part, ptr::null_mut(), &raw mut n_bytes, error)
        })?;
        Ok(n_bytes)
    }

    fn save(&mut self, seq: u32, part: bool) -> Result<SavedState, CallError> {
        let seq = self.checked_seq(seq)?;
        let mut n_bytes = self.state_bytes(seq, part)?;
        let no_memory = || CallError::Refused(format!("no memory for {n_bytes} bytes"));
        let mut state = SavedState::zeroed(n_bytes).ok_or_else(no_memory)?;
        // SAFETY: as before, and the buffer has `n_bytes` bytes.
        call(|error| unsafe {
            sys::mnv_state_seq_get(self.raw(), seq, part, state.as_mut_ptr(), &raw mut n_bytes, error)
        })?;
        if n_bytes == 0 {
            return Err(CallError::Refused("llama.cpp wrote no state".into()));
        }
        state.truncate(n_bytes);
        Ok(state)
    }

    /// Makes `seq` hold what [`save_seq`](Self::save_seq) returned from a context of the same model and settings. `false` when there is
    /// no room for it: the sequence is then empty, or to be cleared.
    ///
    /// # Errors
    /// [`CallError::Argument`] for a sequence that does not exist.
    #[doc(alias = "llama_state_seq_set_data")]
    pub fn restore_seq(&mut self, seq: u32, state: &[u8]) -> Result<bool, CallError> {
        self.clear_seq(seq)?;
        self.set_state(seq, false, state)
    }

    /// Makes `seq` hold its first `n_tokens` tokens and no more, with what [`save_seq_part`](Self::save_seq_part) returned when a sequence
    /// with the same beginning had that length. `false` when it cannot be: the sequence is then to be cleared.
    ///
    /// # Errors
    /// [`CallError::Argument`] for a sequence that does not exist.
    #[doc(alias = "llama_state_seq_set_data_ext")]
    pub fn rewind_seq(&mut self, seq: u32, state: &[u8], n_tokens: u32) -> Result<bool, CallError> {
        Ok(self.set_state(seq, true, state)? && self.truncate_seq(seq, n_tokens)? && self.n_held(seq)? == n_tokens)
    }

    fn set_state(&mut self, seq: u32, part: bool, state: &[u8]) -> Result<bool, CallError> {
        let seq = self.checked_seq(seq)?;
        let mut restored = false;
        // SAFETY: a live context, a checked sequence and a buffer of `state.len()` bytes, which is only read.
        call(|error| unsafe {
            sys::mnv_state_seq_set(self.raw(), seq, part, state.as_ptr(), state.len(), &raw mut restored, error)
        })?;
        Ok(restored)
    }

    /// Tokens that `seq` holds, by its last place.
    fn n_held(&self, seq: u32) -> Result<u32, CallError> {
        let seq = self.checked_seq(seq)?;
        // SAFETY: a live context.
        let memory = unsafe { sys::llama_get_memory(self.raw()) };
        // SAFETY: the memory lives as long as its context, and the sequence was checked.
        let last = unsafe { sys::llama_memory_seq_pos_max(memory, seq) };
        Ok(last.saturating_add(1).max(0).cast_unsigned())
    }

    /// Whether a token at `from` would still find all that its window reaches back to. llama.cpp cuts without asking: what is
    /// left of the window then has a hole, or nothing.
    fn has_window_before(&self, seq: sys::llama_seq_id, from: u32) -> bool {
        if self.model().n_window_tokens() == 0 || self.model().is_recurrent() {
            return true;
        }
        // SAFETY: a live context.
        let memory = unsafe { sys::llama_get_memory(self.raw()) };
        // SAFETY: the memory lives as long as its context, and the sequence was checked.
        let first = unsafe { sys::llama_memory_seq_pos_min(memory, seq) };
        // SAFETY: a live context; the shim only reads the model's sizes.
        let begin = unsafe { sys::mnv_window_begin(self.raw(), from.cast_signed()) };
        (0..=begin).contains(&first)
    }

    fn checked_seq(&self, seq: u32) -> Result<sys::llama_seq_id, CallError> {
        if seq < self.n_seq_max() {
            Ok(seq.cast_signed())
        } else {
            Err(CallError::Argument(format!("sequence {seq} does not exist: the context has {}", self.n_seq_max())))
        }
    }
}
