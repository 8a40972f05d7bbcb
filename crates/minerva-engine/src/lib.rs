//! Turns requests into tokens: admission, continuous batching, KV-cache bookkeeping, sampling, streaming.
//!
//! Callers hand a [`Request`] to an [`Engine`] and read [`Event`]s from an [`EventStream`]. HTTP lives above this crate;
//! tensors and device memory live below it, behind [`backend::Backend`]. Requests and events are plain data.
//! Start with [`Engine::generate`], then [`scheduler`], which is pure and decides everything; the rest serves it.
//! [`sim`] runs the engine without a model. [`compat`] is the callback style of the GPU guide.
//!
//! # Threads
//! One engine thread owns the backend (`worker`). One intake thread renders templates and tokenizes (`intake`). With a
//! disk tier one more reads and writes its files (`disk`). A few more
//! compile grammars and compute their masks (`constrain`). Whoever calls only sends and receives. Any executor will do, and none is needed: see [`Engine::generate_blocking`].
//!
//! # Invariants
//! - Every accepted request gets exactly one last event: [`Event::Done`] or [`Event::Failed`].
//! - Dropping the event stream frees the request's cells before the next step begins.
//! - A sequence is reused only for a prompt that begins with the very tokens it holds.
#![forbid(unsafe_code)]

mod config; // modules in reading order
mod engine;
mod error;
mod event;
mod request;
mod status;
mod stream;

mod breakers;
mod checkpoints;
mod constrain;
mod disk;
mod ends;
mod generation;
mod intake;
mod parking;
mod queue_watch;
mod serving;
mod shared;
mod timing;
mod warm;
mod worker;

pub mod backend;
mod cache;
pub mod compat;
pub mod decoder;
pub mod drafter;
mod llama;
pub mod probe;
mod remembered;
pub mod sampler;
pub mod sampling_pool;
pub mod scheduler;
pub mod sim;
mod slowed;
mod tune;

pub use cache::cache_dir;
pub use config::{AdapterConfig, DraftConfig, DraftingConfig, EngineConfig, FlashAttention, KvType, ProjectorConfig};
pub use constrain::{Constraint, ConstraintError, ConstraintStats};
pub use disk::{ClientSecret, DiskCache};
pub use engine::Engine;
pub use error::{LoadError, RequestError};
pub use event::{Delta, Event, FinishReason, GenerationError, Summary, TokenInfo, TopToken};
pub use intake::MAX_LOGPROBS;
/// The other end of [`EngineConfig::rpc_servers`].
pub use minerva_llama::{RpcServer, RpcWorkerError, RpcWorkerOptions, serve_rpc};
pub use request::{ChatMessage, MAX_CACHE_KEY_BYTES, Prompt, Request, TokenId};
pub use sampler::{InvalidParam, SamplerStage, SamplingParams};
pub use scheduler::{Miss, Reservation};
pub use serving::{CacheIsolation, Speculation};
pub use sim::{SimBrake, SimConfig, SimDisk, SimDraft, SimMemory};
pub use status::{
    AdapterInfo, BuildInfo, DeviceMemory, DiskCacheStats, DraftInfo, EngineStats, LoadProgress, ModelInfo, Placement,
    PrefixMisses,
};
pub use stream::EventStream;
pub use timing::{TIMING_BOUNDS_US, TimingStats};
pub use tune::{
    DEFAULT_BUDGET_MS, Rates, THOROUGH_MS, TuneConfig, TuneMode, TuneReport, TuneRow, TuneSource, TunedSettings,
};
pub use warm::{WarmError, WarmPrompt, WarmReport};
