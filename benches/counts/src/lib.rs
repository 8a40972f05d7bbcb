//! The sampler and the scheduler of minerva-engine without the engine: valgrind knows no AVX-512, and building llama.cpp a second time for
//! the instruction set that it knows would take minutes. Neither needs anything of it.
#![forbid(unsafe_code)]

pub mod backend;
pub mod drafter;

/// What both take from their crate.
pub mod request {
    /// A token of the vocabulary.
    pub type TokenId = i32;
}

/// Nothing is on disk here.
mod disk {
    pub(crate) const MOST_FILES: usize = 4096;

    pub(crate) fn file_bytes(_n_tokens: usize, n_state_bytes: u64) -> u64 {
        n_state_bytes
    }
}

#[path = "../../src/rows.rs"]
pub mod rows;

#[path = "../../../crates/minerva-engine/src/sampler/mod.rs"]
pub mod sampler;

#[path = "../../../crates/minerva-engine/src/scheduler/mod.rs"]
#[expect(dead_code, unused_imports, reason = "what the engine's thread asks of it beside turns")]
pub mod scheduler;

pub mod turns;
