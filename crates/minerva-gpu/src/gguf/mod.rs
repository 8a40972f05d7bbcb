//! A bounded reader of GGUF headers and a writer of GGUF files, in pure Rust.
//!
//! Every model file passes through [`Header::open`] before llama.cpp sees it: whatever would make llama.cpp abort, read out of
//! bounds or ask for absurd amounts of memory is a [`GgufError`] here. Only the header is read, through a buffer; tensor data
//! is never touched and nothing is mapped, so a file that is shortened while it is read is an error, not a SIGBUS.
//! Start with [`Header`]; [`FileBuilder`] writes files with random weights for tests and benchmarks.
//!
//! # Invariants
//! - Every count, length, dimension, offset and type is checked against the bytes left in the file and against a cap of
//!   [`limits`] before anything is allocated for it; memory grows with the bytes that were read, not with what they claim.
//! - All arithmetic on numbers of the file is checked; no input panics.
//! - What llama.cpp at our pin loads is not refused, but for files that break the format's own rules ([`limits`] and
//!   [`Header::check_for_llama`] name each one).
mod architectures;
mod check;
mod error;
mod ggml_type;
mod header;
pub mod limits;
mod metadata;
mod read;
mod same_vocabulary;
mod source;
mod split;
mod unique;
mod value;
mod vocab;
mod weights;
mod writer;

#[cfg(test)]
mod tests;

pub use error::GgufError;
pub use ggml_type::GgmlType;
pub use header::{Header, TensorInfo};
pub use metadata::Metadata;
pub use same_vocabulary::{MAX_VOCABULARY_DIFFERENCE, VocabularyMismatch};
pub use value::{Array, StringArray, Value};
pub use writer::FileBuilder;
