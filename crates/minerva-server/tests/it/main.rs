//! The server from outside: a real socket in front, the engine's simulator behind.
//!
//! - [`chat`], [`completions`], [`stream`]: what is answered, in which shape
//! - [`errors`], [`fuzz`]: what is refused, and how
//! - [`limits`]: clients that are slow, greedy or gone
//! - [`access`]: keys, hosts, origins
//! - [`operation`]: health, status, metrics, request ids
//! - [`drop`]: many clients, some of which leave
//! - [`ladder`]: devices without the memory that was planned
//! - [`plan`]: `minerva plan`, with the server's flags
//! - [`shutdown`], [`programs`]: the binaries: signals, exit codes, logs
//! - [`probing`], `modules`: drivers and backends that crash, hang or lie

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, which does not cover their helpers")]

mod access;
mod chat;
mod client;
mod completions;
mod constrained;
mod drop;
mod errors;
mod fuzz;
mod ladder;
mod limits;
#[cfg(all(feature = "dynamic-backends", target_os = "linux"))]
mod modules;
mod operation;
mod plan;
mod probing;
mod process;
mod programs;
mod rpc_worker;
mod server;
mod shutdown;
mod stream;
mod terms;
mod tiers;
mod tune;
