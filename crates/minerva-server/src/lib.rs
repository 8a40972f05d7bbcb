//! Serves a model over an OpenAI-compatible HTTP API: everything that knows HTTP or JSON, and the two binaries' insides.
//!
//! A request's way: `http` accepts the connection and bounds what it may cost, [`api`] checks host, key and route and reads
//! the JSON, [`minerva_engine::Engine::generate`] takes it from there, and `sse` (or a whole body) carries the events back.
//! Nothing here computes, and nothing here waits for a step of the engine except the answer itself.
//! Start with [`Server`]; [`program`] wires it to a command line, [`config`] is every setting.
//!
//! # Invariants
//! - A request that is refused is refused before its response begins; after that a failure is an `error` event.
//! - Dropping a response (its client is gone) drops its event streams, which cancels them in the engine.
//! - Prompts and answers appear in no log line, at any level.
//! - What a client can hold is bounded: connections, bytes and time (`http` has the table).
#![forbid(unsafe_code)]

mod answer;
pub mod api;
mod auth;
mod browser;
pub mod config;
mod doctor;
mod http;
mod limits;
mod load;
mod logging;
mod metrics;
mod plan_command;
mod probing;
pub mod program;
mod rpc_worker;
mod server;
mod shutdown;
mod sse;
mod state;
mod tune_command;
mod warm_file;

pub use config::{Config, ConfigError};
pub use server::{Outcome, Server};
pub use state::{App, Phase};
