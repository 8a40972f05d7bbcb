//! The KV cache of a context, sequence by sequence, and the bytes of a load.

use std::path::Path;
use std::sync::PoisonError;

use serde::{Deserialize, Serialize};

use crate::error::{CallError, LoadError, call};
use crate::model::{LOADING, model_path};
use crate::rpc::links_of;
use crate::{Context, ContextParams, ModelParams, backend, log, sys};

/// Devices that one load can name: llama.cpp's own bound is 16, the host is one more.
const MAX_DEVICES: usize = 32;

/// What a model and its context take on one device, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceBytes {
    /// llama.cpp's name of the device, `Host` for the system's memory.
    pub device: String,
    /// Weights.
    pub weights_bytes: u64,
    /// KV cache and recurrent state.
    pub kv_bytes: u64,
    /// Scratch for one step.
    pub compute_bytes: u64,
    /// All memory of the device; 0 where only the use was asked for.
    pub total_bytes: u64,
    /// Free memory of the device; 0 where only the use was asked for.
    pub free_bytes: u64,
}

/// What a load would take, and the sizes of the model that a plan needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SimulatedLoad {
    /// Bytes per device, the host last.
    pub devices: Vec<DeviceBytes>,
    /// Transformer layers.
    pub n_layers: u32,
    /// The context the model was trained for, in tokens.
    pub context_train_tokens: u32,
    /// Experts per layer; 0 for a dense model.
    pub n_experts: u32,
}

/// The exact bytes per device of a load, from a load that allocates nothing (about 0.1 s).
///
/// # Errors
/// [`LoadError`] as a real load would give it.
#[doc(alias = "common_get_device_memory_data")]
pub fn simulate_load(path: &Path, params: &ModelParams, context: &ContextParams) -> Result<SimulatedLoad, LoadError> {
    backend::init();
    let c_path = model_path(path)?;
    let (raw_model, _devices) = params.raw();
    let raw_context = context.raw();
    let _guard = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut shape = sys::mnv_model_shape::default();
    let (model, context, out_shape) = (&raw const raw_model, &raw const raw_context, &raw mut shape);
    let result = device_bytes(|out, n, error| {
        // SAFETY: path, parameters and device list outlive the call; `out` has room for `n` entries.
        unsafe { sys::mnv_device_memory(c_path.as_ptr(), model, context, out, n, out_shape, error) }
    });
    // The simulation swaps the log callback and does not put it back when it fails.
    log::install();
    if let Some(link) = links_of(&params.devices).iter().find(|link| link.is_lost()) {
        return Err(LoadError::DeviceLost { address: link.address.clone() });
    }
    let devices = result.map_err(|error| match (error, log::take_last_error()) {
        (CallError::Exception(_), Some(reason)) => LoadError::Call(CallError::Refused(reason)),
        (error, _) => LoadError::Call(error),
    })?;
    Ok(SimulatedLoad {
        devices,
        n_layers: shape.n_layers,
        context_train_tokens: shape.n_ctx_train,
        n_experts: shape.n_experts,
    })
}

fn device_bytes(
    fill: impl FnOnce(*mut sys::mnv_device_bytes, *mut usize, *mut sys::mnv_error) -> i32,
) -> Result<Vec<DeviceBytes>, CallError> {
    let empty = sys::mnv_device_bytes {
        name: [0; 64],
        total_bytes: 0,
        free_bytes: 0,
        model_bytes: 0,
        context_bytes: 0,
        compute_bytes: 0,
    };
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
            total_bytes: u64::try_from(entry.total_bytes).unwrap_or(0),
            free_bytes: u64::try_from(entry.free_bytes).unwrap_or(0),
        })
        .collect())
}

impl Context {
    /// What this context and its model really take, per device.
    ///
    /// # Errors
    /// [`CallError`] when llama.cpp cannot say.
    pub fn memory_bytes(&self) -> Result<Vec<DeviceBytes>, CallError> {
        // SAFETY: a live context; `out` has room for `n` entries.
        device_bytes(|out, n, error| unsafe { sys::mnv_context_memory(self.raw(), out, n, error) })
    }

    /// Frees the cells of `seq` from position `from` on. `false` if this kind of memory cannot be cut there (recurrent
    /// and sliding-window memory); the sequence must then be cleared as a whole.
    ///
    /// # Errors
    /// [`CallError::Argument`] for a sequence that does not exist.
    #[doc(alias = "llama_memory_seq_rm")]
    pub fn truncate_seq(&mut self, seq: u32, from: u32) -> Result<bool, CallError> {
        let seq = self.checked_seq(seq)?;
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

    /// Makes `dst` hold the first `n_tokens` tokens of `src`; what `dst` held is freed. With a unified cache the cells
    /// are shared, otherwise they are copied. `false` if this kind of memory cannot be cut at `n_tokens`: `dst` is then
    /// empty.
    ///
    /// # Errors
    /// [`CallError::Argument`] for a sequence that does not exist or is copied onto itself.
    #[doc(alias = "llama_memory_seq_cp")]
    pub fn copy_seq(&mut self, src: u32, dst: u32, n_tokens: u32) -> Result<bool, CallError> {
        if src == dst {
            return Err(CallError::Argument(format!("sequence {src} cannot be copied onto itself")));
        }
        let (src, dst_raw) = (self.checked_seq(src)?, self.checked_seq(dst)?);
        self.clear_seq(dst)?;
        // SAFETY: a live context and checked sequences. The full range, because between streams llama.cpp asserts it.
        call(|error| unsafe { sys::mnv_seq_cp(self.raw(), src, dst_raw, -1, -1, error) })?;
        let cut = self.truncate_seq(dst, n_tokens)?;
        if !cut {
            self.clear_seq(dst)?;
        }
        Ok(cut)
    }

    fn checked_seq(&self, seq: u32) -> Result<sys::llama_seq_id, CallError> {
        if seq < self.n_seq_max() {
            Ok(seq.cast_signed())
        } else {
            Err(CallError::Argument(format!("sequence {seq} does not exist: the context has {}", self.n_seq_max())))
        }
    }
}
