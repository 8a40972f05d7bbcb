//! Safe handles over llama.cpp: models, contexts, batches, vocabularies, chat templates.
//!
//! This is the only crate that touches llama.cpp; [`sys`] is the raw layer and everything else is safe. It knows nothing
//! of requests, scheduling or HTTP. Children keep their parents alive ([`Context`] holds its [`Model`]), every length,
//! index and sequence id is checked here because llama.cpp aborts on bad ones, C++ exceptions become errors, and
//! messages go to `tracing` with the target `llama.cpp`.
//!
//! Start with [`Model::load`], then [`Context::new`] and [`Context::decode`]. docs/ffi.md has the thread rule, who frees
//! what, and the upgrade checklist of the pin.
//!
//! # What can still end the process
//! A `GGML_ASSERT` inside llama.cpp and a failed allocation inside a GPU computation call `abort()`. An RPC server that goes
//! away does not: [`add_rpc_server`].

pub mod sys;

mod adapters;
mod backend;
mod batch;
mod chat;
mod context;
mod error;
mod log;
mod memory;
mod model;
mod modules;
mod params;
mod repack;
mod rpc;
mod sampler_chain;
mod saved;
mod simulation;
mod speed;
mod threads;
mod trial;
mod vocab;

pub use backend::{
    Device, DeviceKind, ExtraBuffers, amx_state, compiler, cpu_features, device_at, device_names, devices,
    extra_buffers, has_backend, init, leave_out_devices, leave_out_extra_buffers, version,
};
pub use batch::Batch;
pub use chat::{ChatPrompt, ChatTemplate};
pub use context::Context;
pub use error::{BatchError, CallError, DecodeError, LoadError};
pub use memory::DeviceBytes;
pub use model::Model;
pub use modules::{ModuleGroup, load_module, module_groups, module_score, use_modules};
pub use params::{Adapter, ContextKind, ContextParams, FlashAttention, KvType, ModelParams};
pub use repack::repacked_types;
pub use rpc::{RpcError, RpcServer, RpcWorkerError, RpcWorkerOptions, add_rpc_server, has_rpc, serve_rpc};
/// For tests and benchmarks of our own sampler.
#[doc(hidden)]
pub use sampler_chain::{ChainStage, SamplerChain};
pub use saved::SavedState;
pub use simulation::{Simulation, VocabSize};
pub use speed::{BELIEVABLE_BYTES_PER_SECOND, DeviceSpeed, device_speed};
pub use threads::ThreadPool;
pub use trial::{TrialError, TrialStep, prepare_trial_process, try_device};
pub use vocab::Token;
