//! A load that allocates nothing: exact bytes per device, before the real one.

use std::path::Path;
use std::sync::Arc;

use crate::error::LoadError;
use crate::memory::HOST;
use crate::{Context, ContextParams, DeviceBytes, Model, ModelParams, backend, sys};

/// A model without weights. Any number of contexts can be measured on it, about a millisecond each.
#[derive(Debug)]
pub struct Simulation {
    model: Arc<Model>,
    devices: Vec<String>,
}

/// A vocabulary as far as a simulation has to know it.
#[derive(Debug, Clone, Copy)]
pub struct VocabSize<'a> {
    /// The file's `general.architecture`.
    pub architecture: &'a str,
    /// Tokens in its list, which is also the number of rows of the token table.
    pub n_tokens: u64,
}

impl Simulation {
    /// Reads the header, as a real load would, and places every tensor without making room for it.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load(path: &Path, params: &ModelParams) -> Result<Self, LoadError> {
        Self::with_overrides(path, params, &[END])
    }

    /// The same without building the tables of the tokenizer, which are four fifths of the time and change no size.
    ///
    /// # Errors
    /// As [`Model::load`], but for what only the tokenizer refuses.
    pub fn load_without_vocabulary(path: &Path, params: &ModelParams, vocab: VocabSize<'_>) -> Result<Self, LoadError> {
        // As in a file without a tokenizer: llama.cpp makes up as many tokens as the key says.
        let size_key = format!("{}.vocab_size", vocab.architecture);
        let n_tokens = i64::try_from(vocab.n_tokens).ok().filter(|&n| n > 0);
        match n_tokens.and_then(|n| size_override(&size_key, n)) {
            Some(size) => Self::with_overrides(path, params, &[no_tokenizer(), size, END]),
            None => Self::load(path, params),
        }
    }

    fn with_overrides(
        path: &Path,
        params: &ModelParams,
        overrides: &[sys::llama_model_kv_override],
    ) -> Result<Self, LoadError> {
        let model = Model::load_without_weights(path, params, overrides)?;
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

/// A list of overrides ends with an empty key.
const END: sys::llama_model_kv_override = sys::llama_model_kv_override {
    tag: sys::LLAMA_KV_OVERRIDE_TYPE_INT,
    key: [0; 128],
    __bindgen_anon_1: sys::llama_model_kv_override__bindgen_ty_1 { val_i64: 0 },
};

fn no_tokenizer() -> sys::llama_model_kv_override {
    let mut name = [0; 128];
    copy(&mut name, "none");
    let mut no_tokenizer = sys::llama_model_kv_override {
        tag: sys::LLAMA_KV_OVERRIDE_TYPE_STR,
        __bindgen_anon_1: sys::llama_model_kv_override__bindgen_ty_1 { val_str: name },
        ..END
    };
    copy(&mut no_tokenizer.key, "tokenizer.ggml.model");
    no_tokenizer
}

/// `None` for a key that llama.cpp has no room for.
fn size_override(key: &str, n_tokens: i64) -> Option<sys::llama_model_kv_override> {
    let mut size = sys::llama_model_kv_override {
        __bindgen_anon_1: sys::llama_model_kv_override__bindgen_ty_1 { val_i64: n_tokens },
        ..END
    };
    (key.len() < size.key.len() && !key.contains('\0')).then(|| copy(&mut size.key, key))?;
    Some(size)
}

/// Leaves the NUL at the end.
fn copy(to: &mut [std::ffi::c_char; 128], from: &str) {
    for (to, &from) in to[..127].iter_mut().zip(from.as_bytes()) {
        *to = from as std::ffi::c_char;
    }
}
