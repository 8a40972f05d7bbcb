//! Memory stays a small multiple of the bytes that were read, whatever they claim: counted by the allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use minerva_gpu::gguf::{FileBuilder, GgmlType, Header, Value};
use proptest::prelude::*;

/// Counts the bytes that each thread holds, and the most it held.
struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // `try_with`: the allocator also runs while a thread's locals are taken down.
    let live = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        live.get()
    });
    if let Ok(live) = live {
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live)));
    }
}

// SAFETY: every call goes to the system's allocator unchanged; counting neither allocates nor panics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller keeps the contract, which is the same; `pointer` came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes of memory per byte of input, at most. Entries with one-byte keys are the worst: 100 bytes each, in a vector that
/// doubles, for 14 bytes of file.
const FACTOR: usize = 32;

/// The read buffer and small change.
const CONSTANT: usize = 128 << 10;

/// Reads `bytes` as the beginning of a file of `file_bytes` and returns the most memory that took.
fn peak_bytes(bytes: &[u8], file_bytes: u64) -> usize {
    let before = LIVE.get();
    PEAK.set(before);
    if let Ok(header) = Header::parse(bytes, file_bytes) {
        let _ = header.check_for_llama();
    }
    (PEAK.get() - before) as usize
}

#[track_caller]
fn assert_bounded(bytes: &[u8]) {
    for file_bytes in [bytes.len() as u64, 1 << 20, 1 << 40, u64::MAX] {
        let peak = peak_bytes(bytes, file_bytes);
        assert!(peak <= CONSTANT + FACTOR * bytes.len(), "{peak} bytes for an input of {}", bytes.len());
    }
}

#[test]
fn claims_of_the_largest_counts_take_no_memory() {
    let head = |n_tensors: u64, n_entries: u64| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend_from_slice(&n_tensors.to_le_bytes());
        bytes.extend_from_slice(&n_entries.to_le_bytes());
        bytes
    };
    assert_bounded(&head(1 << 17, 1 << 16));
    for element_type in 0_u32..13 {
        let mut bytes = head(0, 1);
        bytes.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, b'a', 9, 0, 0, 0]);
        bytes.extend_from_slice(&element_type.to_le_bytes());
        bytes.extend_from_slice(&(1_u64 << 24).to_le_bytes());
        bytes.extend_from_slice(&[0; 64]);
        assert_bounded(&bytes);
    }
    let mut text = head(0, 1);
    text.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, b'a', 8, 0, 0, 0]);
    text.extend_from_slice(&(16_u64 << 20).to_le_bytes());
    assert_bounded(&text);
}

#[test]
fn many_small_things_take_a_small_multiple() {
    let mut entries = FileBuilder::new();
    for index in 0..5000 {
        entries.set(&format!("{index:x}"), 0_u8);
    }
    assert_bounded(&entries.header_bytes());
    let mut strings = FileBuilder::new();
    strings.set("tokenizer.ggml.model", "rwkv").set("tokenizer.ggml.tokens", vec![""; 20_000]);
    assert_bounded(&strings.header_bytes());
    let mut tensors = FileBuilder::new();
    for index in 0..5000 {
        tensors.add_tensor(&format!("{index:x}"), GgmlType::I8, &[1]);
    }
    assert_bounded(&tensors.header_bytes());
}

/// A file with some of everything, as bytes to damage.
fn some_file() -> Vec<u8> {
    let mut file = FileBuilder::new();
    file.set("general.architecture", "llama")
        .set("llama.block_count", 2_u32)
        .set("llama.attention.head_count", vec![4_i32, 0])
        .set("tokenizer.ggml.model", "llama")
        .set("tokenizer.ggml.tokens", vec!["<unk>", "<s>", "</s>", "a"])
        .set("tokenizer.ggml.scores", vec![0_f32; 4])
        .set("flags", vec![true, false])
        .add_tensor("token_embd.weight", GgmlType::F16, &[64, 4])
        .add_tensor("blk.0.attn_q.weight", GgmlType::Q4_0, &[64, 64]);
    file.header_bytes()
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::from),
        any::<i16>().prop_map(Value::from),
        any::<u32>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-1e9_f32..1e9).prop_map(Value::from),
        (-1e9_f64..1e9).prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
        proptest::collection::vec(any::<u16>(), 0..9).prop_map(Value::from),
        proptest::collection::vec(any::<i32>(), 0..9).prop_map(Value::from),
        proptest::collection::vec(any::<u64>(), 0..9).prop_map(Value::from),
        proptest::collection::vec(any::<bool>(), 0..9).prop_map(Value::from),
        proptest::collection::vec(".{0,20}", 0..9).prop_map(Value::from),
    ]
}

proptest! {
    #[test]
    fn damaged_files_neither_panic_nor_take_memory(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        large in proptest::option::of((any::<prop::sample::Index>(), prop_oneof![Just(u64::MAX), Just(1_u64 << 24), any::<u64>()])),
        cut in any::<prop::sample::Index>(),
        cuts: bool,
    ) {
        let mut bytes = some_file();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some((at, number)) = large {
            let at = at.index(bytes.len() - 8);
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        if cuts {
            bytes.truncate(cut.index(bytes.len()));
        }
        assert_bounded(&bytes);
    }

    #[test]
    fn random_bytes_after_the_magic_neither_panic_nor_take_memory(tail in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend_from_slice(&tail);
        assert_bounded(&bytes);
    }

    #[test]
    fn what_is_written_is_read(
        entries in proptest::collection::btree_map("[a-z.]{1,20}", value(), 0..20),
        tensors in proptest::collection::btree_map(
            "[a-z0-9._]{1,63}",
            (0..GgmlType::all().count(), proptest::collection::vec(1_u64..6, 1..=4)),
            0..20,
        ),
        alignment in proptest::option::of(0_u32..=16),
    ) {
        let mut file = FileBuilder::new();
        for (key, value) in &entries {
            file.set(key, value.clone());
        }
        if let Some(shift) = alignment {
            file.alignment(1 << shift);
        }
        for (name, (index, dims)) in &tensors {
            let ggml_type = GgmlType::all().nth(*index).unwrap();
            let mut dims = dims.clone();
            dims[0] *= ggml_type.block_elements();
            file.add_tensor(name, ggml_type, &dims);
        }
        let bytes = file.header_bytes();
        let header = Header::parse(&bytes, file.file_bytes()).unwrap();
        prop_assert_eq!(header.metadata.len(), entries.len() + usize::from(alignment.is_some()));
        for (key, value) in &entries {
            prop_assert_eq!(header.metadata.get(key), Some(value));
        }
        prop_assert_eq!(header.tensors.len(), tensors.len());
        for (name, (index, _)) in &tensors {
            let tensor = header.tensor(name).unwrap();
            prop_assert_eq!(tensor.ggml_type, GgmlType::all().nth(*index).unwrap());
            prop_assert_eq!(tensor.offset % header.alignment, 0);
        }
        let last_end = header.tensors.last().map_or(0, |tensor| tensor.offset + tensor.bytes);
        prop_assert!(file.file_bytes() - header.data_offset - last_end < header.alignment);
        if let Some(last) = header.tensors.last() {
            // A byte less than the last tensor needs is one too few.
            prop_assert!(Header::parse(&bytes, header.data_offset + last.offset + last.bytes - 1).is_err());
        }
    }
}
