//! The sampler of minerva-engine without the engine: valgrind knows no AVX-512, and building llama.cpp a second time for the instruction
//! set that it knows would take minutes. The sampler needs nothing of it.
#![forbid(unsafe_code)]

/// What the sampler takes from its crate.
pub mod request {
    /// A token of the vocabulary.
    pub type TokenId = i32;
}

#[path = "../../src/rows.rs"]
pub mod rows;

#[path = "../../../crates/minerva-engine/src/sampler/mod.rs"]
pub mod sampler;
