//! A load that allocates nothing: exact bytes per device, before the real one.

use std::path::Path;
use std::sync::Arc;

use crate::error::LoadError;
use crate::{Context, ContextParams, DeviceBytes, Model, ModelParams, backend};

/// llama.cpp's name for what lies in the system's memory.
const HOST: &str = "Host";

/// A model without weights. Any number of contexts can be measured on it, about a millisecond each.
#[derive(Debug)]
pub struct Simulation {
    model: Arc<Model>,
    devices: Vec<String>,
}

impl Simulation {
    /// Reads the header, as a real load would, and places every tensor without making room for it.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load(path: &Path, params: &ModelParams) -> Result<Self, LoadError> {
        let model = Model::load_without_weights(path, params)?;
        let all = backend::devices();
        let devices = params.devices.iter().filter_map(|&index| Some(all.get(index)?.name.clone())).collect();
        Ok(Self { model, devices })
    }

    /// Bytes per device that a context with these parameters takes with its model: the devices of the load in their order,
    /// the host last.
    ///
    /// # Errors
    /// As [`Context::new`].
    pub fn memory_bytes(&self, params: &ContextParams) -> Result<Vec<DeviceBytes>, LoadError> {
        let context = Context::new(&self.model, params)?;
        let taken = context.memory_bytes().map_err(LoadError::Call)?;
        let of = |name: &str| {
            let nothing = DeviceBytes { device: name.to_owned(), ..DeviceBytes::default() };
            taken.iter().find(|bytes| bytes.device == name).cloned().unwrap_or(nothing)
        };
        Ok(self.devices.iter().map(String::as_str).chain([HOST]).map(of).collect())
    }

    /// Transformer layers.
    pub fn n_layers(&self) -> u32 {
        self.model.n_layers()
    }

    /// The context the model was trained for, in tokens.
    pub fn context_train_tokens(&self) -> u32 {
        self.model.context_train_tokens()
    }
}
