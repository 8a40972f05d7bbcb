//! What the relay must know of llama.cpp's RPC protocol: the frame, the handshake, and how long each reply is.
//!
//! A request is a command byte, a length of 8 bytes and the payload; a reply, where there is one, a length and the
//! payload. Numbers are in the machine's own order, as llama.cpp sends them.
//!
//! Source: ggml/src/ggml-rpc/ggml-rpc.cpp at the pin; the upgrade checklist in docs/ffi.md asks for its diff.

use std::io::{self, Read, Write};
use std::net::TcpStream;

/// `RPC_PROTO_MAJOR_VERSION`: a server of another one is refused.
pub(super) const MAJOR: u8 = 7;
/// `RPC_PROTO_MINOR_VERSION`: a server may be older, not newer.
pub(super) const MINOR: u8 = 0;

pub(super) const ALLOC_BUFFER: u8 = 0;
pub(super) const GET_ALIGNMENT: u8 = 1;
pub(super) const GET_MAX_SIZE: u8 = 2;
pub(super) const BUFFER_GET_BASE: u8 = 3;
pub(super) const FREE_BUFFER: u8 = 4;
pub(super) const SET_TENSOR_HASH: u8 = 7;
pub(super) const GET_TENSOR: u8 = 8;
pub(super) const COPY_TENSOR: u8 = 9;
pub(super) const GRAPH_COMPUTE: u8 = 10;
pub(super) const GET_DEVICE_MEMORY: u8 = 11;
pub(super) const GET_ALLOC_SIZE: u8 = 13;
pub(super) const HELLO: u8 = 14;
pub(super) const DEVICE_COUNT: u8 = 15;

/// Command and length.
pub(super) const HEAD_BYTES: usize = 9;
/// What each side says of faster transports. All zero is plain TCP, the only one that a relay can carry.
const CAPS_BYTES: usize = 24;
/// Version, padding and capabilities.
pub(super) const HELLO_REPLY_BYTES: usize = 4 + CAPS_BYTES;

/// What the client waits for after a request.
pub(super) enum Reply {
    /// Nothing.
    None,
    /// Up to 16 bytes; what to say when the server is gone. An allocation fails, a question gets an answer that the
    /// client's own checks accept.
    Short(Vec<u8>),
    /// So many bytes of a tensor.
    Tensor(u64),
}

/// The reply to `command`. The payload of a request that has one is small, and at hand.
pub(super) fn reply(command: u8, payload: &[u8]) -> Reply {
    let word = |value: u64| value.to_ne_bytes().to_vec();
    match command {
        ALLOC_BUFFER | GET_DEVICE_MEMORY => Reply::Short(vec![0; 16]),
        GET_ALIGNMENT => Reply::Short(word(64)),
        GET_MAX_SIZE => Reply::Short(word(u64::MAX)),
        BUFFER_GET_BASE => Reply::Short(word(1 << 12)), // never read through, but ggml asserts that it is not null
        GET_ALLOC_SIZE => Reply::Short(word(0)),        // the client takes the larger of this and its own figure
        SET_TENSOR_HASH | COPY_TENSOR => Reply::Short(vec![1]), // done: spares the client from sending the data
        DEVICE_COUNT => Reply::Short(0_u32.to_ne_bytes().to_vec()),
        GET_TENSOR => Reply::Tensor(payload.last_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes))),
        _ => Reply::None,
    }
}

/// Whether the payload of `command` must be read before it is sent on: it has a reply, or the relay keeps count.
pub(super) fn is_short(command: u8) -> bool {
    command == FREE_BUFFER || !matches!(reply(command, &[]), Reply::None)
}

/// The 8 bytes of `payload` at `at`.
pub(super) fn word(payload: &[u8], at: usize) -> Option<u64> {
    payload.get(at..)?.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes))
}

/// The device that a request without a tensor names first.
pub(super) fn device(payload: &[u8]) -> Option<u32> {
    payload.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// A request in one piece.
pub(super) fn request(command: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![command];
    bytes.extend((payload.len() as u64).to_ne_bytes());
    bytes.extend(payload);
    bytes
}

/// A reply in one piece.
pub(super) fn answer(payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u64).to_ne_bytes().to_vec();
    bytes.extend(payload);
    bytes
}

/// The answer to a `HELLO`: our version, plain TCP.
pub(super) fn hello_answer() -> Vec<u8> {
    let mut payload = [0; HELLO_REPLY_BYTES];
    payload[..2].copy_from_slice(&[MAJOR, MINOR]);
    answer(&payload)
}

/// Sends a `HELLO` for plain TCP and returns the server's version, major first.
pub(super) fn hello(stream: &mut TcpStream) -> io::Result<[u8; 3]> {
    let reply: [u8; HELLO_REPLY_BYTES] = ask(stream, HELLO, &[0; CAPS_BYTES])?;
    Ok([reply[0], reply[1], reply[2]])
}

/// How many devices the server offers.
pub(super) fn device_count(stream: &mut TcpStream) -> io::Result<u32> {
    Ok(u32::from_ne_bytes(ask(stream, DEVICE_COUNT, &[])?))
}

fn ask<const N: usize>(stream: &mut TcpStream, command: u8, payload: &[u8]) -> io::Result<[u8; N]> {
    stream.write_all(&request(command, payload))?;
    let mut reply = [0; N];
    read_reply(stream, &mut reply)?;
    Ok(reply)
}

/// Reads a reply that must have exactly the length of `into`.
pub(super) fn read_reply(stream: &mut TcpStream, into: &mut [u8]) -> io::Result<()> {
    expect_length(stream, into.len() as u64)?;
    stream.read_exact(into)
}

/// Reads the length of a reply, which must be `n_bytes`.
pub(super) fn expect_length(stream: &mut TcpStream, n_bytes: u64) -> io::Result<()> {
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    match u64::from_ne_bytes(length) {
        length if length == n_bytes => Ok(()),
        length => {
            let problem = format!("a reply of {length} bytes where {n_bytes} were due");
            Err(io::Error::new(io::ErrorKind::InvalidData, problem))
        }
    }
}
