//! Why a model did not load and why a request was refused.

use crate::constrain::ConstraintError;
use crate::sampler::InvalidParam;

/// Why a request was refused. Nothing of it was computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// A parameter is outside its range.
    #[error(transparent)]
    InvalidParam(#[from] InvalidParam),
    /// The answer cannot be constrained in this way.
    #[error("the constraint cannot be used: {0}")]
    Constraint(#[from] ConstraintError),
    /// The prompt leaves no room for an answer in the context of one request.
    #[error("the prompt has {n_prompt_tokens} tokens, the context of one request is {n_ctx} tokens")]
    ContextLength {
        /// Tokens of the prompt. For a text that was refused before it was tokenized, the fewest it can have.
        n_prompt_tokens: usize,
        /// Tokens that one request may have, prompt and answer together.
        n_ctx: usize,
    },
    /// The prompt has no tokens.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// As many requests, or as many prompt tokens, wait as may.
    #[error("the queue is full: {queued} {unit} wait, the limit is {limit}")]
    QueueFull {
        /// What was counted: `requests`, `prompt tokens` or `constraints to compile`.
        unit: &'static str,
        /// How many wait.
        queued: usize,
        /// How many may.
        limit: usize,
        /// When it may be worth trying again.
        retry_after_s: u32,
    },
    /// The conversation cannot be rendered.
    #[error("the chat template cannot render these messages: {message}")]
    ChatTemplate {
        /// What the template engine said.
        message: String,
    },
    /// The model has no chat template.
    #[error("the model has no chat template; give one with `--chat-template-file`, or send a plain prompt")]
    NoChatTemplate,
    /// The tokenizer failed on the text.
    #[error("the text cannot be tokenized: {message}")]
    Tokenize {
        /// What the tokenizer said.
        message: String,
    },
    /// A token of the prompt is not in the vocabulary.
    #[error("token {token} of the prompt is outside the vocabulary of {n_vocab}")]
    UnknownToken {
        /// The token.
        token: i32,
        /// Tokens of the vocabulary.
        n_vocab: usize,
    },
    /// The engine takes no new requests.
    #[error("the engine is shutting down")]
    ShuttingDown,
}

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The device that was asked for cannot be used.
    #[error(transparent)]
    Device(#[from] minerva_gpu::GpuError),
    /// An RPC server cannot be used.
    #[error(transparent)]
    Rpc(#[from] minerva_llama::RpcError),
    /// No device works, or none may be touched: the probe's findings.
    #[error("nothing here can run a model: {reason}")]
    NothingWorks {
        /// Each thing that was tried, what happened, and what to do.
        reason: String,
    },
    /// llama.cpp could not load the model.
    #[error("cannot load the model")]
    Llama(#[from] minerva_llama::LoadError),
    /// The file is not a model that llama.cpp could load without harm.
    #[error(transparent)]
    Header(#[from] minerva_gpu::gguf::GgufError),
    /// The file's header lacks a size that memory depends on.
    #[error(transparent)]
    Estimate(minerva_gpu::estimate::EstimateError),
    /// The model does not fit where it was asked to go, or settings contradict each other. The texts are the guide's.
    #[error(transparent)]
    Plan(minerva_gpu::plan::PlanError),
    /// A first step failed, though there was room for it.
    #[error("the first full batch: {0}")]
    WarmUp(crate::backend::StepError),
    /// The plan failed and falling back is not allowed.
    #[error("{problem}")]
    NoFallback {
        /// What went wrong.
        problem: String,
        /// The table of what would fit.
        table: String,
    },
    /// The model cannot generate text (an embedding model, an encoder).
    #[error("`{name}` does not generate text: it is an encoder or an embedding model")]
    NotGenerative {
        /// The model.
        name: String,
    },
    /// A setting does not fit the model or another setting.
    #[error("`{name}` {problem}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What is wrong, with limit and value.
        problem: String,
    },
    /// The progress callback stopped the load.
    #[error("loading was cancelled")]
    Cancelled,
    /// The system refused a thread.
    #[error("cannot start the engine thread")]
    Thread(#[from] std::io::Error),
}
