//! What can only be seen from outside: how much memory the reader takes, and what the writer leaves on disk.
#![allow(clippy::unwrap_used)]

mod gguf_memory;
mod gguf_writer;
