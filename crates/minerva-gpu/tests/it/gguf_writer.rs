//! The files that the writer makes: the same for a seed, finite in every type, sparse where asked.

use std::fs;
use std::path::Path;

use minerva_gpu::gguf::{FileBuilder, GgmlType, Header};

/// One tensor of every type, of several chunks and an odd end, with some norms.
fn every_type() -> FileBuilder {
    let mut file = FileBuilder::new();
    file.set("general.architecture", "clip");
    for ggml_type in GgmlType::all() {
        file.add_tensor(&format!("{ggml_type}.weight"), ggml_type, &[ggml_type.block_elements() * 3, 7, 3]);
    }
    file.add_tensor("large.weight", GgmlType::Q6_K, &[256 * 1024, 21]);
    for ggml_type in [GgmlType::F32, GgmlType::F16, GgmlType::BF16] {
        file.add_tensor(&format!("blk.0.{ggml_type}_norm.weight"), ggml_type, &[5]);
    }
    file
}

fn data<'a>(bytes: &'a [u8], header: &Header, name: &str) -> &'a [u8] {
    let tensor = header.tensor(name).unwrap();
    let start = (header.data_offset + tensor.offset) as usize;
    &bytes[start..start + tensor.bytes as usize]
}

fn write(directory: &Path, name: &str, seed: u64) -> (Vec<u8>, Header) {
    let path = directory.join(name);
    let mut reported = 0;
    let file_bytes = every_type()
        .write_random(&path, seed, &mut |bytes| {
            assert!(bytes > reported, "progress goes up");
            reported = bytes;
        })
        .unwrap();
    let header = Header::open(&path).unwrap();
    assert_eq!(header.file_bytes, file_bytes);
    assert_eq!(reported, header.tensors.iter().map(|tensor| tensor.bytes).sum::<u64>());
    (fs::read(&path).unwrap(), header)
}

#[test]
fn random_weights_are_the_same_for_a_seed_and_differ_between_seeds_and_tensors() {
    let directory = tempfile::tempdir().unwrap();
    let (first, header) = write(directory.path(), "first.gguf", 7);
    let (again, _) = write(directory.path(), "again.gguf", 7);
    let (other, _) = write(directory.path(), "other.gguf", 8);
    assert!(first == again, "the same seed gives the same file");
    assert_ne!(data(&first, &header, "q4_K.weight"), data(&other, &header, "q4_K.weight"));
    assert_ne!(data(&first, &header, "q4_0.weight"), data(&first, &header, "iq4_nl.weight"));
    // The parts of a large tensor are not copies of each other: no block of it is there twice.
    let blocks: Vec<_> = data(&first, &header, "large.weight").chunks_exact(210).collect();
    let unique: std::collections::HashSet<_> = blocks.iter().collect();
    assert_eq!(unique.len(), blocks.len());
    // Pinned, so that benchmarks of different versions compare the same weights.
    assert_eq!(data(&first, &header, "q8_0.weight")[..8], PINNED);
}

/// The first bytes of `q8_0.weight` for seed 7.
const PINNED: [u8; 8] = [230, 16, 29, 32, 97, 211, 109, 100];

#[test]
fn floats_and_block_scales_are_small_finite_numbers() {
    let directory = tempfile::tempdir().unwrap();
    let (bytes, header) = write(directory.path(), "model.gguf", 1);
    let f16 = |block: &[u8], at: usize| f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]));
    // Where each block type holds its f16 numbers.
    for (name, places) in [
        ("f16", &[0][..]),
        ("q4_0", &[0]),
        ("q4_1", &[0, 2]),
        ("q5_0", &[0]),
        ("q5_1", &[0, 2]),
        ("q8_0", &[0]),
        ("q8_1", &[0, 2]),
        ("q2_K", &[80, 82]),
        ("q3_K", &[108]),
        ("q4_K", &[0, 2]),
        ("q5_K", &[0, 2]),
        ("q6_K", &[208]),
        ("iq2_xxs", &[0]),
        ("iq2_xs", &[0]),
        ("iq2_s", &[0]),
        ("iq3_xxs", &[0]),
        ("iq3_s", &[0]),
        ("iq1_s", &[0]),
        ("iq4_nl", &[0]),
        ("iq4_xs", &[0]),
        ("tq1_0", &[52]),
        ("tq2_0", &[64]),
        ("q1_0", &[0]),
        ("q2_0", &[0]),
    ] {
        let block_bytes = GgmlType::from_name(name).unwrap().block_bytes() as usize;
        for block in data(&bytes, &header, &format!("{name}.weight")).chunks_exact(block_bytes) {
            for &at in places {
                let number = f16(block, at);
                assert!(number != 0.0 && number.abs() < 0.3, "{name}: {number}");
            }
        }
    }
    for block in data(&bytes, &header, "f32.weight").as_chunks::<4>().0 {
        assert!(f32::from_le_bytes(*block).abs() < 0.3);
    }
    for block in data(&bytes, &header, "f64.weight").as_chunks::<8>().0 {
        assert!(f64::from_le_bytes(*block).abs() < 0.3);
    }
    for block in data(&bytes, &header, "bf16.weight").as_chunks::<2>().0 {
        assert!(f32::from_bits(u32::from(u16::from_le_bytes(*block)) << 16).abs() < 0.3);
    }
    for block in data(&bytes, &header, "q8_K.weight").chunks_exact(292) {
        assert!(f32::from_le_bytes(*block.first_chunk().unwrap()).abs() < 0.01);
    }
    for block in data(&bytes, &header, "mxfp4.weight").chunks_exact(17) {
        assert!((118..=121).contains(&block[0]), "2^-9 to 2^-6");
    }
    for block in data(&bytes, &header, "nvfp4.weight").chunks_exact(36) {
        assert!(block[..4].iter().all(|&scale| scale & 0x7F < 0x10));
    }
    for block in data(&bytes, &header, "iq1_m.weight").chunks_exact(56) {
        let nibble = |at: usize| u16::from(block[at] >> 4);
        let bits = nibble(49) | nibble(51) << 4 | nibble(53) << 8 | nibble(55) << 12;
        assert_eq!(bits, 0x1C00, "2^-8");
    }
    assert!(data(&bytes, &header, "i32.weight").iter().all(|&byte| byte == 0));
}

#[test]
fn norms_are_ones() {
    let directory = tempfile::tempdir().unwrap();
    let (bytes, header) = write(directory.path(), "model.gguf", 1);
    assert_eq!(data(&bytes, &header, "blk.0.f32_norm.weight"), 1_f32.to_le_bytes().repeat(5));
    assert_eq!(data(&bytes, &header, "blk.0.f16_norm.weight"), 0x3C00_u16.to_le_bytes().repeat(5));
    assert_eq!(data(&bytes, &header, "blk.0.bf16_norm.weight"), 0x3F80_u16.to_le_bytes().repeat(5));
}

fn f16_to_f32(bits: u16) -> f32 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let mantissa = f32::from(bits & 0x03FF);
    match bits >> 10 & 0x1F {
        0 => sign * mantissa * 2_f32.powi(-24),
        31 => f32::NAN,
        exponent => sign * (1.0 + mantissa / 1024.0) * 2_f32.powi(i32::from(exponent) - 15),
    }
}

#[test]
#[cfg(unix)]
fn a_file_of_holes_has_its_full_size_and_takes_no_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("large.gguf");
    let mut file = FileBuilder::new();
    file.set("general.architecture", "clip");
    for layer in 0..4 {
        file.add_tensor(&format!("blk.{layer}.weight"), GgmlType::F16, &[1 << 15, 1 << 15]);
    }
    let file_bytes = file.write_header_only(&path).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), file_bytes);
    assert!(file_bytes > 8 << 30);
    assert!(std::os::unix::fs::MetadataExt::blocks(&metadata) * 512 < 1 << 20, "a file system without holes");
    assert_eq!(Header::open(&path).unwrap().file_bytes, file_bytes);
}

#[test]
fn a_folder_that_is_not_there_is_an_error() {
    let path = Path::new("/no/such/folder/model.gguf");
    assert!(every_type().write_random(path, 1, &mut |_| {}).is_err());
    assert!(every_type().write_header_only(path).is_err());
}
