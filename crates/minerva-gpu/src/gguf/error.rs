//! Why a file is not read: the field, where it stands, what it says and what it may say.

use std::io;

/// Why a GGUF file was refused or could not be read or written.
///
/// `offset` is a byte position in the file (in a split set: in the shard at hand). No variant holds a directory, only file
/// names, so a text may be shown to a client.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The operating system could not open, read or write the file.
    #[error("cannot access `{file}`")]
    Io {
        /// The file's name, without its directory.
        file: String,
        /// What the system says.
        source: io::Error,
    },
    /// The first four bytes are not `GGUF`.
    #[error("not a GGUF file: it begins with {found:02x?}, not with `GGUF`")]
    NotGguf {
        /// The bytes at its beginning.
        found: [u8; 4],
    },
    /// The version has its bytes the other way round.
    #[error(
        "this is a big-endian GGUF file (version field {version:#010x} at byte 4): convert it to little-endian with gguf-py's `gguf_convert_endian.py`"
    )]
    BigEndian {
        /// The version as it was read.
        version: u32,
    },
    /// A version that llama.cpp does not load.
    #[error("GGUF version {version} at byte 4 is not supported, only 2 and 3 are: convert the model again")]
    Version {
        /// The version of the file.
        version: u32,
    },
    /// The file ends before the field does.
    #[error(
        "{field} at byte {offset} needs {needed} bytes, the file has {left} left: it is damaged or still being downloaded"
    )]
    Truncated {
        /// What was being read.
        field: String,
        /// Where it begins.
        offset: u64,
        /// Bytes that it takes, at least.
        needed: u64,
        /// Bytes from there to the end of the file.
        left: u64,
    },
    /// More than [`limits`](super::limits) allows.
    #[error("{field} at byte {offset} is {given}, the limit is {limit}")]
    TooLarge {
        /// What it is.
        field: String,
        /// Where it stands.
        offset: u64,
        /// What the file says.
        given: u64,
        /// The most that is read.
        limit: u64,
    },
    /// A value that breaks a rule of the format, or that llama.cpp cannot work with.
    #[error("{field} at byte {offset} is {given}, {rule}")]
    Invalid {
        /// The key, tensor or part of the header.
        field: String,
        /// Where it stands.
        offset: u64,
        /// What the file says.
        given: String,
        /// The rule, as the rest of the sentence: `it must be a power of two`.
        rule: String,
    },
    /// A key, tensor or token that was there before.
    #[error("{field} at byte {offset} is there twice")]
    Duplicate {
        /// The key, tensor or token.
        field: String,
        /// Where the second one stands.
        offset: u64,
    },
    /// A metadata value of another type than its key has.
    #[error("`{key}` at byte {offset} is of type {given}, it must be {wanted}")]
    WrongType {
        /// The key.
        key: String,
        /// Where the entry begins.
        offset: u64,
        /// The type or types that the key may have.
        wanted: String,
        /// The type in the file.
        given: String,
    },
    /// A key that every model has.
    #[error("the metadata has no `{key}`")]
    Missing {
        /// The key.
        key: String,
    },
    /// A file of a split set that does not fit to the others, or is not there.
    #[error("`{file}` {why}")]
    Shard {
        /// The file's name, without its directory.
        file: String,
        /// What is wrong, as the rest of the sentence.
        why: String,
    },
}
