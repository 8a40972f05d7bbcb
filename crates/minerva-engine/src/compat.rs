//! The blocking, callback style of the GPU guide, as a thin layer over [`Engine`].

use std::ops::ControlFlow;
use std::path::Path;

use crate::config::EngineConfig;
use crate::engine::Engine;
use crate::error::{LoadError, RequestError};
use crate::event::{Event, GenerationError};
use crate::request::Request;
use crate::sampler::SamplingParams;

/// The guide's `top_k`.
const TOP_K: i32 = 40;

/// The guide's repetition penalty.
const REPEAT_PENALTY: f32 = 1.1;

/// Why [`LlamaCppBackend`] could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MinervaError {
    /// `load_model` was not called, or failed.
    #[error("no model is loaded: call `load_model` first")]
    NotLoaded,
    /// The model could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The request was refused.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The request failed on its way.
    #[error(transparent)]
    Generation(#[from] GenerationError),
}

/// The guide's result type.
pub type MinervaResult<T> = Result<T, MinervaError>;

/// One model, one caller at a time. [`engine`](Self::engine) gives the handle that many can share.
#[derive(Debug, Default)]
pub struct LlamaCppBackend {
    config: EngineConfig,
    engine: Option<Engine>,
}

impl LlamaCppBackend {
    /// A backend without a model; `config` says everything but the model file and the context.
    pub fn new(config: EngineConfig) -> Self {
        Self { config, engine: None }
    }

    /// Loads a GGUF file for requests of up to `n_ctx` tokens. A model that was loaded before is given up first.
    ///
    /// # Errors
    /// [`MinervaError::Load`].
    pub fn load_model(&mut self, path: &Path, n_ctx: usize) -> MinervaResult<()> {
        self.engine = None;
        let config = EngineConfig {
            model_path: path.to_path_buf(),
            context_length_tokens: u32::try_from(n_ctx).ok().or(self.config.context_length_tokens),
            ..self.config.clone()
        };
        self.engine = Some(Engine::load(config, |_| ControlFlow::Continue(()))?);
        Ok(())
    }

    /// Continues `prompt` and returns the new text.
    ///
    /// # Errors
    /// [`MinervaError`].
    pub fn generate(&self, prompt: &str, max_tokens: usize, temperature: f32, top_p: f32) -> MinervaResult<String> {
        let mut text = String::new();
        self.generate_with(prompt, max_tokens, temperature, top_p, |piece| {
            text.push_str(piece);
            ControlFlow::Continue(())
        })?;
        Ok(text)
    }

    /// Continues `prompt` and hands each piece of text to `on_text` as soon as it is there; `Break` ends the generation.
    ///
    /// # Errors
    /// [`MinervaError`].
    pub fn generate_with(
        &self,
        prompt: &str,
        max_tokens: usize,
        temperature: f32,
        top_p: f32,
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> MinervaResult<()> {
        let engine = self.engine.as_ref().ok_or(MinervaError::NotLoaded)?;
        let sampling = SamplingParams {
            temperature,
            top_p,
            top_k: TOP_K,
            repeat_penalty: REPEAT_PENALTY,
            ..SamplingParams::default()
        };
        let max_tokens = Some(u32::try_from(max_tokens).unwrap_or(u32::MAX));
        let mut events = engine.generate_blocking(Request { max_tokens, sampling, ..Request::text(prompt) })?;
        while let Some(event) = events.blocking_next() {
            match event {
                Event::Delta(delta) if on_text(&delta.text).is_break() => return Ok(()),
                Event::Failed(error) => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }

    /// The engine of the loaded model, for callers that outgrow this interface.
    pub fn engine(&self) -> Option<&Engine> {
        self.engine.as_ref()
    }
}
