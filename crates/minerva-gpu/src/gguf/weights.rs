//! Random weights that every ggml type reads as small finite numbers, made in parallel and written by position.
//!
//! A word of random bits is a function of the seed, the tensor's index and the word's index in the tensor, so the file does
//! not depend on the number of threads or on who writes which part. Quantized blocks are random bits with their scales set:
//! the codes of every type are valid whatever their bits, floats and scales are not (infinities, NaN).

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use super::ggml_type::GgmlType;

/// Bytes of one write, about: large enough that system calls cost nothing, small enough to stay in the second-level cache.
const CHUNK_BYTES: u64 = 1 << 20;

/// A tensor and where its data goes in the file.
pub(super) struct PlacedTensor<'a> {
    pub(super) name: &'a str,
    pub(super) ggml_type: GgmlType,
    pub(super) position: u64,
    pub(super) bytes: u64,
}

/// A piece of one tensor's data: whole blocks, and a whole number of 8-byte words before it.
struct Chunk {
    tensor: usize,
    start: u64,
    bytes: usize,
}

/// Writes the data of all tensors; `progress` hears the bytes written so far, on this thread.
pub(super) fn write(
    file: &File,
    tensors: &[PlacedTensor<'_>],
    seed: u64,
    progress: &mut dyn FnMut(u64),
) -> io::Result<()> {
    let chunks = chunks(tensors);
    let n_threads = thread::available_parallelism().map_or(1, usize::from).min(chunks.len().max(1));
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..n_threads {
            let sender = sender.clone();
            let (next, failed, chunks) = (&next, &failed, &chunks);
            scope.spawn(move || {
                let mut buffer = Vec::new();
                while !failed.load(Ordering::Relaxed) {
                    let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                    let tensor = &tensors[chunk.tensor];
                    buffer.resize(chunk.bytes, 0);
                    fill(&mut buffer, tensor, key(seed, chunk.tensor), chunk.start);
                    let written = write_at(file, &buffer, tensor.position + chunk.start).map(|()| chunk.bytes as u64);
                    failed.fetch_or(written.is_err(), Ordering::Relaxed);
                    if sender.send(written).is_err() {
                        break; // the receiver went with an earlier error
                    }
                }
            });
        }
        drop(sender); // so that the loop ends with the last thread
        let mut total = 0;
        for written in receiver {
            total += written?;
            progress(total);
        }
        Ok(())
    })
}

fn chunks(tensors: &[PlacedTensor<'_>]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (index, tensor) in tensors.iter().enumerate() {
        // A multiple of 8 blocks is a multiple of 8 bytes, which `fill` counts words from.
        let unit = tensor.ggml_type.block_bytes() * 8;
        let step = (CHUNK_BYTES / unit).max(1) * unit;
        let mut start = 0;
        while start < tensor.bytes {
            let bytes = step.min(tensor.bytes - start);
            chunks.push(Chunk { tensor: index, start, bytes: bytes as usize });
            start += bytes;
        }
    }
    chunks
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], position: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, position)
}

#[cfg(windows)]
fn write_at(file: &File, mut bytes: &[u8], mut position: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_write(file, bytes, position)?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[n..];
        position += n as u64;
    }
    Ok(())
}

fn key(seed: u64, tensor: usize) -> u64 {
    mix(mix(seed) ^ (tensor as u64))
}

/// The finalizer of SplitMix64: every input bit changes half of the output bits.
fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}

/// The bytes of a tensor from byte `start`, a multiple of 8, on.
fn fill(buffer: &mut [u8], tensor: &PlacedTensor<'_>, key: u64, start: u64) {
    if let Some(pattern) = constant(tensor.name, tensor.ggml_type) {
        for element in buffer.chunks_mut(pattern.len()) {
            element.copy_from_slice(&pattern[..element.len()]);
        }
        return;
    }
    let mut counter = key.wrapping_add((start / 8).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let (words, rest) = buffer.as_chunks_mut::<8>();
    for word in words {
        *word = mix(counter).to_le_bytes();
        counter = counter.wrapping_add(0x9E37_79B9_7F4A_7C15);
    }
    rest.copy_from_slice(&mix(counter).to_le_bytes()[..rest.len()]);
    make_finite(buffer, tensor.ggml_type);
}

/// Tensors that are one number throughout: norms and frequency factors are 1, integers 0.
fn constant(name: &str, ggml_type: GgmlType) -> Option<Vec<u8>> {
    let ones = name.ends_with("_norm.weight") || name.starts_with("rope_f") || name.contains(".rope_f");
    match ggml_type {
        GgmlType::I8 | GgmlType::I16 | GgmlType::I32 | GgmlType::I64 => Some(vec![0; ggml_type.block_bytes() as usize]),
        GgmlType::F32 if ones => Some(1_f32.to_le_bytes().to_vec()),
        GgmlType::F64 if ones => Some(1_f64.to_le_bytes().to_vec()),
        GgmlType::F16 if ones => Some(0x3C00_u16.to_le_bytes().to_vec()),
        GgmlType::BF16 if ones => Some(0x3F80_u16.to_le_bytes().to_vec()),
        _ => None,
    }
}

/// An f16 of exponent `2^exponent`, at least -14, with the mantissa that is there.
fn set_f16(block: &mut [u8], at: usize, exponent: i32) {
    let bits = u16::from_le_bytes([block[at], block[at + 1]]);
    write_f16(block, at, bits & 0x03FF | (((exponent + 15) as u16) << 10));
}

fn write_f16(block: &mut [u8], at: usize, bits: u16) {
    block[at..at + 2].copy_from_slice(&bits.to_le_bytes());
}

/// Sets the scale `d` at byte `at`, and after it the minimum as `d * -2^shift`, which puts the middle of the codes near 0.
fn set_scale_and_minimum(block: &mut [u8], at: usize, exponent: i32, shift: i32, sign: u16) {
    set_f16(block, at, exponent);
    let d = u16::from_le_bytes([block[at], block[at + 1]]);
    write_f16(block, at + 2, (d + ((shift as u16) << 10)) | sign);
}

const NEGATIVE: u16 = 0x8000;

/// Turns random bytes into blocks of finite numbers: the floats and the scales get exponents that keep weights small.
///
/// Source: the block layouts in `ggml-common.h` and the `dequantize_row_*` functions of ggml at our pin.
fn make_finite(buffer: &mut [u8], ggml_type: GgmlType) {
    let blocks = buffer.chunks_exact_mut(ggml_type.block_bytes() as usize);
    match ggml_type {
        // Random sign, mantissa and two bits of exponent: 2^-7 to 2^-3.
        GgmlType::F32 => blocks.for_each(|b| b[3] = b[3] & 0x81 | 0x3C),
        GgmlType::BF16 => blocks.for_each(|b| b[1] = b[1] & 0x81 | 0x3C),
        GgmlType::F16 => blocks.for_each(|b| b[1] = b[1] & 0x8F | 0x20),
        GgmlType::F64 => blocks.for_each(|b| {
            b[6] = b[6] & 0x3F | 0x80;
            b[7] = b[7] & 0x80 | 0x3F;
        }),
        // Codes are centred on 0: the scale is all.
        GgmlType::Q4_0 => blocks.for_each(|b| set_f16(b, 0, -7)),
        GgmlType::Q5_0 => blocks.for_each(|b| set_f16(b, 0, -8)),
        GgmlType::Q8_0 | GgmlType::IQ4_NL => blocks.for_each(|b| set_f16(b, 0, -11)),
        GgmlType::Q1_0 | GgmlType::Q2_0 => blocks.for_each(|b| set_f16(b, 0, -5)),
        GgmlType::Q8_1 => blocks.for_each(|b| {
            set_f16(b, 0, -11);
            // The sum of the codes times the scale; not read from files, so a small number will do.
            set_f16(b, 2, -8);
        }),
        // Codes from 0 up, with a minimum added.
        GgmlType::Q4_1 => blocks.for_each(|b| set_scale_and_minimum(b, 0, -7, 3, NEGATIVE)),
        GgmlType::Q5_1 => blocks.for_each(|b| set_scale_and_minimum(b, 0, -8, 4, NEGATIVE)),
        // Super-blocks: scales of 4 or 6 bits times `d`, less minimums of as many bits times `dmin`.
        GgmlType::Q2_K => blocks.for_each(|b| set_scale_and_minimum(b, 80, -9, 1, 0)),
        GgmlType::Q3_K => blocks.for_each(|b| set_f16(b, 108, -10)),
        GgmlType::Q4_K => blocks.for_each(|b| set_scale_and_minimum(b, 0, -13, 3, 0)),
        GgmlType::Q5_K => blocks.for_each(|b| set_scale_and_minimum(b, 0, -14, 4, 0)),
        GgmlType::Q6_K => blocks.for_each(|b| set_f16(b, 208, -14)),
        GgmlType::Q8_K => blocks.for_each(|b| {
            b[2] &= 0x7F; // an f32 of 2^-11
            b[3] = 0x3A;
        }),
        GgmlType::TQ1_0 => blocks.for_each(|b| set_f16(b, 52, -5)),
        GgmlType::TQ2_0 => blocks.for_each(|b| set_f16(b, 64, -5)),
        // Codes that choose a row of a grid.
        GgmlType::IQ2_XXS | GgmlType::IQ2_XS | GgmlType::IQ2_S => blocks.for_each(|b| set_f16(b, 0, -11)),
        GgmlType::IQ3_XXS | GgmlType::IQ3_S => blocks.for_each(|b| set_f16(b, 0, -12)),
        GgmlType::IQ1_S => blocks.for_each(|b| set_f16(b, 0, -8)),
        GgmlType::IQ4_XS => blocks.for_each(|b| set_f16(b, 0, -14)),
        // The f16 scale lies in the upper four bits of the four 16-bit scales, lowest bits first.
        GgmlType::IQ1_M => blocks.for_each(|b| {
            b[49] &= 0x0F; // an f16 of 2^-8: 0x1C00
            b[51] &= 0x0F;
            b[53] = b[53] & 0x0F | 0xC0;
            b[55] = b[55] & 0x0F | 0x10;
        }),
        // Scales of 8 bits: powers of two, or floats of 4 bits of exponent; the largest codes mean NaN.
        GgmlType::MXFP4 => blocks.for_each(|b| b[0] = 118 + (b[0] & 3)),
        GgmlType::NVFP4 => blocks.for_each(|b| b[..4].iter_mut().for_each(|scale| *scale = *scale & 0x0F | 0x08)),
        // All of `constant`.
        GgmlType::I8 | GgmlType::I16 | GgmlType::I32 | GgmlType::I64 => {}
    }
}
