//! GET /v1/models and /v1/models/{model}.

use minerva_engine::ModelInfo;
use serde::Serialize;

use super::error::ApiError;
use crate::state::{App, Phase};

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Model<'a>>,
}

#[derive(Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// The most tokens one request may have, prompt and answer together (vLLM's name for it).
    max_model_len: u32,
    meta: Meta<'a>,
}

/// llama-server's names.
#[derive(Serialize)]
struct Meta<'a> {
    n_ctx: u32,
    n_ctx_train: u32,
    n_vocab: u32,
    n_params: u64,
    size: u64,
    description: &'a str,
}

impl<'a> Model<'a> {
    fn new(info: &'a ModelInfo, created: u64) -> Self {
        let meta = Meta {
            n_ctx: info.context_length_tokens,
            n_ctx_train: info.context_train_tokens,
            n_vocab: info.n_vocab,
            n_params: info.n_params,
            size: info.size_bytes,
            description: &info.description,
        };
        let max_model_len = info.context_length_tokens;
        Self { id: &info.name, object: "model", created, owned_by: "minerva", max_model_len, meta }
    }
}

/// The list: the model, or nothing while it is loading.
pub(super) fn list(app: &App) -> Vec<u8> {
    let phase = app.phase();
    let data = match &phase {
        Phase::Ready(engine) => vec![Model::new(engine.info(), created(app))],
        Phase::Loading(_) | Phase::Failed => Vec::new(),
    };
    serde_json::to_vec(&List { object: "list", data }).unwrap_or_default()
}

/// One model by name, or by `default`.
pub(super) fn get(app: &App, name: &str) -> Result<Vec<u8>, ApiError> {
    if let Phase::Ready(engine) = app.phase()
        && (name == engine.info().name || name == "default")
    {
        return Ok(serde_json::to_vec(&Model::new(engine.info(), created(app))).unwrap_or_default());
    }
    Err(ApiError::unknown_model(name, None))
}

/// When the server started.
fn created(app: &App) -> u64 {
    crate::state::unix_seconds().saturating_sub(app.uptime().as_secs())
}
