//! Low-rank adapters of a model: loaded with it, freed with it, switched on in each of its contexts.

use std::ptr::{self, NonNull};

use crate::error::{CallError, LoadError, call};
use crate::memory::device_bytes;
use crate::model::model_path;
use crate::{Adapter, DeviceBytes, sys};

/// The adapters of one [`Model`](crate::Model), which frees them.
#[derive(Debug, Default)]
pub(crate) struct Adapters {
    raw: Vec<NonNull<sys::llama_adapter_lora>>,
    scales: Vec<f32>,
    bytes: Vec<DeviceBytes>,
}

impl Adapters {
    /// Loads adapters into a model. The caller holds the lock of loads, and nothing else knows the model yet: llama.cpp writes into it.
    /// With `only_sizes` each gives its memory back at once: a simulation lives until the real load is done.
    ///
    /// # Errors
    /// [`LoadError`] for the first that is not one of this model's, or that its devices have no room for.
    pub(crate) fn load(
        model: NonNull<sys::llama_model>,
        adapters: &[Adapter],
        only_sizes: bool,
    ) -> Result<Self, LoadError> {
        let mut loaded = Self::default();
        for adapter in adapters {
            let path = model_path(&adapter.path)?;
            let mut raw = ptr::null_mut();
            // SAFETY: a live model that only this thread knows, and a path that outlives the call; `raw` receives the adapter.
            call(|error| unsafe { sys::mnv_adapter_load(model.as_ptr(), path.as_ptr(), &raw mut raw, error) })?;
            let raw = NonNull::new(raw).ok_or_else(|| CallError::Refused("no adapter was returned".into()))?;
            // SAFETY: a live adapter; `out` has room for `n` entries.
            let bytes = device_bytes(|out, n, error| unsafe { sys::mnv_adapter_memory(raw.as_ptr(), out, n, error) })?;
            if only_sizes {
                // SAFETY: a live adapter that no context knows yet; nothing will compute with it.
                call(|error| unsafe { sys::mnv_adapter_give_back(raw.as_ptr(), error) })?;
            }
            loaded.raw.push(raw);
            loaded.scales.push(adapter.scale);
            loaded.bytes.extend(bytes);
        }
        Ok(loaded)
    }

    /// Makes a new context compute with them.
    ///
    /// # Errors
    /// [`CallError`] when there is no room for the larger steps.
    pub(crate) fn use_in(&self, context: NonNull<sys::llama_context>) -> Result<(), CallError> {
        if self.raw.is_empty() {
            return Ok(());
        }
        let mut adapters: Vec<_> = self.raw.iter().map(|adapter| adapter.as_ptr()).collect();
        // SAFETY: a live context of the adapters' model, and as many scales as adapters; both lists are only read.
        call(|error| unsafe {
            let (adapters, n) = (adapters.as_mut_ptr(), adapters.len());
            sys::mnv_adapters_use(context.as_ptr(), adapters, self.scales.as_ptr(), n, error)
        })?;
        Ok(())
    }

    /// Adds what they take to what a context and its model take.
    pub(crate) fn add_to(&self, taken: &mut Vec<DeviceBytes>) {
        for adapter in &self.bytes {
            match taken.iter_mut().find(|bytes| bytes.device == adapter.device) {
                Some(bytes) => bytes.weights_bytes += adapter.weights_bytes,
                None => taken.push(adapter.clone()),
            }
        }
    }
}
