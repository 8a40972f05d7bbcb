//! One test per class of hostile file, each a small sound model with one thing wrong; and real-looking files that must pass.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Array, FileBuilder, GgmlType, GgufError, Header, Value};

/// A sound two-layer model with a vocabulary of four tokens.
fn model() -> FileBuilder {
    let mut file = FileBuilder::new();
    file.set("general.architecture", "llama")
        .set("llama.block_count", 2_u32)
        .set("llama.context_length", 128_u32)
        .set("llama.embedding_length", 64_u32)
        .set("llama.attention.head_count", 4_u32)
        .set("llama.attention.head_count_kv", 2_u32)
        .set("tokenizer.ggml.model", "llama")
        .set("tokenizer.ggml.tokens", vec!["<unk>", "<s>", "</s>", "a"])
        .set("tokenizer.ggml.scores", vec![0_f32, 0., 0., -1.])
        .set("tokenizer.ggml.token_type", vec![2_i32, 3, 3, 1])
        .add_tensor("token_embd.weight", GgmlType::F16, &[64, 4])
        .add_tensor("blk.0.attn_q.weight", GgmlType::Q4_0, &[64, 64])
        .add_tensor("blk.1.attn_q.weight", GgmlType::Q4_0, &[64, 64]);
    file
}

fn check_bytes(bytes: &[u8], file_bytes: u64) -> Result<Header, GgufError> {
    let header = Header::parse(bytes, file_bytes)?;
    header.check_for_llama()?;
    Ok(header)
}

fn check(file: &FileBuilder) -> Result<Header, GgufError> {
    check_bytes(&file.header_bytes(), file.file_bytes())
}

/// The error text of a sound model after `change`.
fn refused(change: impl FnOnce(&mut FileBuilder)) -> String {
    let mut file = model();
    change(&mut file);
    check(&file).unwrap_err().to_string()
}

fn accepted(change: impl FnOnce(&mut FileBuilder)) -> Header {
    let mut file = model();
    change(&mut file);
    check(&file).unwrap()
}

/// The error text of a sound model whose bytes, `skip` after the first `marker`, are overwritten.
fn refused_bytes(marker: &str, skip: usize, bytes: &[u8]) -> String {
    let file = model();
    let mut header = file.header_bytes();
    let at = header.windows(marker.len()).position(|window| window == marker.as_bytes()).unwrap() + marker.len() + skip;
    header[at..at + bytes.len()].copy_from_slice(bytes);
    check_bytes(&header, file.file_bytes()).unwrap_err().to_string()
}

#[track_caller]
fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{text}` does not say `{part}`");
    }
}

#[test]
fn a_sound_model_reads_back_as_it_was_written() {
    let header = check(&model()).unwrap();
    assert_eq!((header.version, header.alignment, header.n_shards), (3, 32, 1));
    assert_eq!(header.architecture(), "llama");
    assert_eq!(header.file_bytes, header.data_offset + 512 + 2 * 64 * 36);
    let query = header.tensor("blk.1.attn_q.weight").unwrap();
    assert_eq!((query.ggml_type, query.dims.as_slice(), query.bytes), (GgmlType::Q4_0, &[64, 64][..], 64 * 36));
    assert_eq!(query.offset, 512 + 64 * 36);
    assert!(header.tensor("blk.2.attn_q.weight").is_none());
    let tokens = header.metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!((tokens.len(), tokens.get(3), tokens.get(4)), (4, Some(&b"a"[..]), None));
}

#[test]
fn counts_beyond_the_file_or_the_caps_are_refused_before_anything_is_allocated() {
    for given in [1 << 32, 1 << 63, u64::MAX, 1 << 17, 100_000] {
        assert_says(&refused_bytes("GGUF", 4, &given.to_le_bytes()), &["the number of tensors", "byte 8"]);
        assert_says(&refused_bytes("GGUF", 12, &given.to_le_bytes()), &["the number of metadata entries", "byte 16"]);
        // The length of the first key, of a string, and of an array of strings and of floats.
        assert_says(&refused_bytes("GGUF", 20, &given.to_le_bytes()), &["key 0"]);
        assert_says(&refused_bytes("general.architecture", 4, &given.to_le_bytes()), &["general.architecture"]);
        assert_says(&refused_bytes("tokenizer.ggml.tokens", 8, &given.to_le_bytes()), &["tokenizer.ggml.tokens"]);
        assert_says(&refused_bytes("tokenizer.ggml.scores", 8, &given.to_le_bytes()), &["tokenizer.ggml.scores"]);
        // The length of an array element.
        assert_says(&refused_bytes("tokenizer.ggml.tokens", 16, &given.to_le_bytes()), &["element 0"]);
    }
}

#[test]
fn limits_hold_where_the_file_would_be_large_enough() {
    let mut bytes = model().header_bytes();
    bytes[8..16].copy_from_slice(&((1_u64 << 17) + 1).to_le_bytes());
    let error = Header::parse(&bytes, 1 << 40).unwrap_err();
    assert!(matches!(error, GgufError::TooLarge { offset: 8, limit: 131_072, .. }), "{error}");

    let mut file = model();
    file.set("general.description", "x".repeat((16 << 20) + 1));
    assert_says(&check(&file).unwrap_err().to_string(), &["general.description", "is 16777217, the limit is 16777216"]);

    let mut file = model();
    file.set(&"k".repeat(1 << 16), 1_u8);
    assert_says(&check(&file).unwrap_err().to_string(), &["is 65536, the limit is 65535"]);

    let mut file = model();
    for index in 0..17 {
        file.set(&format!("text.{index}"), "x".repeat(16 << 20));
    }
    assert_says(&check(&file).unwrap_err().to_string(), &["the header's length", "the limit is 268435456"]);
}

#[test]
fn another_magic_version_or_byte_order_has_its_own_error() {
    let parse = |bytes: &[u8]| Header::parse(bytes, bytes.len() as u64).unwrap_err();
    assert!(matches!(parse(b"PK\x03\x04\0\0\0\0"), GgufError::NotGguf { found: [b'P', b'K', 3, 4] }));
    assert!(matches!(parse(b"GGUF\x01\0\0\0"), GgufError::Version { version: 1 }));
    assert!(matches!(parse(b"GGUF\0\0\0\0"), GgufError::Version { version: 0 }));
    assert!(matches!(parse(b"GGUF\x04\0\0\0"), GgufError::Version { version: 4 }));
    assert!(matches!(parse(b"GGUF\0\0\0\x03"), GgufError::BigEndian { version: 0x0300_0000 }));
    assert!(matches!(parse(b""), GgufError::Truncated { offset: 0, needed: 4, left: 0, .. }));
    let mut version_2 = model().header_bytes();
    version_2[4] = 2;
    assert_eq!(check_bytes(&version_2, model().file_bytes()).unwrap().version, 2);
}

#[test]
fn a_file_cut_anywhere_is_truncated_and_says_where() {
    let file = model();
    let bytes = file.header_bytes();
    for length in 0..bytes.len() {
        let error = Header::parse(&bytes[..length], length as u64).unwrap_err();
        assert!(matches!(error, GgufError::Truncated { .. }), "{length}: {error}");
    }
    // The size says more than there is, as when the file is shortened while it is read. The padding is not needed.
    for length in 0..bytes.len() - 31 {
        let error = Header::parse(&bytes[..length], file.file_bytes()).unwrap_err();
        assert!(matches!(error, GgufError::Truncated { .. }), "{length}: {error}");
    }
    let error = check_bytes(&bytes, file.file_bytes() - 1).unwrap_err();
    assert_says(&error.to_string(), &["the data of tensor `blk.1.attn_q.weight`", "2304 bytes", "2303 left"]);
}

#[test]
fn keys_are_not_empty_not_there_twice_and_without_nul() {
    assert_says(&refused(|file| _ = file.set("", 1_u32)), &["key 10", "is empty"]);
    assert_says(&refused(|file| _ = file.set("a\0b", 1_u32)), &["NUL"]);
    assert_says(&refused_bytes("llama.block_", 0, b"\xFF"), &["key 1", "it must be UTF-8"]);
    assert_says(&refused_bytes("blk.0.", 0, b"\xFF"), &["the name of tensor 1", "it must be UTF-8"]);
    accepted(|file| _ = file.set("llama.a_key_that_nobody_knows", 1_u32));
}

#[test]
fn a_key_or_tensor_that_is_there_twice_is_refused() {
    let mut bytes = model().header_bytes();
    // `tokenizer.ggml.scores` and `tokenizer.ggml.tokens` have names of one length.
    let scores = bytes.windows(21).position(|window| window == b"tokenizer.ggml.scores").unwrap();
    bytes[scores..scores + 21].copy_from_slice(b"tokenizer.ggml.tokens");
    let error = Header::parse(&bytes, model().file_bytes()).unwrap_err();
    assert!(matches!(&error, GgufError::Duplicate { offset, .. } if *offset == scores as u64 - 8), "{error}");

    let text = refused(|file| _ = file.add_tensor("blk.0.attn_q.weight", GgmlType::F32, &[8]));
    assert_says(&text, &["the tensor `blk.0.attn_q.weight`", "twice"]);
}

#[test]
fn nested_arrays_unknown_types_and_other_bools_are_refused() {
    assert_says(
        &refused_bytes("tokenizer.ggml.scores", 4, &9_u32.to_le_bytes()),
        &["tokenizer.ggml.scores", "an array of arrays"],
    );
    for id in [13_u32, 255, u32::MAX] {
        assert_says(&refused_bytes("llama.block_count", 0, &id.to_le_bytes()), &["llama.block_count", &id.to_string()]);
        assert_says(&refused_bytes("tokenizer.ggml.scores", 4, &id.to_le_bytes()), &["tokenizer.ggml.scores"]);
    }
    let mut file = model();
    file.set("z.flag", true).set("z.flags", vec![true, false]);
    let bytes = file.header_bytes();
    for (marker, skip) in [("z.flag", 4), ("z.flags", 4 + 4 + 8 + 1)] {
        let mut bytes = bytes.clone();
        let at = bytes.windows(marker.len()).position(|window| window == marker.as_bytes()).unwrap();
        bytes[at + marker.len() + skip] = 2;
        let error = check_bytes(&bytes, file.file_bytes()).unwrap_err().to_string();
        assert_says(&error, &[marker, "a bool is 0 or 1"]);
    }
}

#[test]
fn a_bad_number_of_dimensions_or_a_bad_dimension_is_refused() {
    for n in [0_u32, 5, u32::MAX] {
        let text = refused_bytes("blk.0.attn_q.weight", 0, &n.to_le_bytes());
        assert_says(&text, &["the number of dimensions of tensor `blk.0.attn_q.weight`", &n.to_string(), "1 to 4"]);
    }
    assert_says(
        &refused_bytes("blk.0.attn_q.weight", 4, &0_u64.to_le_bytes()),
        &["a dimension of tensor", "at least 1"],
    );
    for dims in [[(1 << 42) + 32, 1 << 22], [u64::MAX, 2], [1 << 32, 1 << 32], [1 << 63, 1]] {
        let text = refused(|file| _ = file.add_tensor("large", GgmlType::F16, &dims));
        assert_says(&text, &["the shape of tensor `large`", "the product overflows"]);
    }
    // The elements fit in 63 bits, their bytes do not fit in 64.
    let text = refused(|file| _ = file.add_tensor("large", GgmlType::F64, &[1 << 31, 1 << 31]));
    assert_says(&text, &["the shape of tensor `large`", "its bytes overflow"]);
    // All of it fits in 64 bits, but not in the file.
    let mut file = model();
    file.add_tensor("large", GgmlType::F16, &[1 << 31, 1 << 31]).add_tensor(
        "larger",
        GgmlType::F16,
        &[1 << 31, 1 << 31],
    );
    let bytes = file.header_bytes();
    assert_says(&check_bytes(&bytes, 1 << 40).unwrap_err().to_string(), &["the end of tensor `larger`", "overflows"]);
    let mut file = model();
    file.add_tensor("large", GgmlType::F16, &[1 << 31, 1 << 31]);
    let bytes = file.header_bytes();
    assert_says(&check_bytes(&bytes, 1 << 40).unwrap_err().to_string(), &["the data of tensor `large`"]);
}

#[test]
fn a_row_that_is_not_whole_blocks_and_a_type_that_is_not_there_are_refused() {
    let text = refused(|file| _ = file.add_tensor("odd", GgmlType::Q4_K, &[128, 4]));
    assert_says(&text, &["the row of tensor `odd`", "128 elements long", "q4_K stores blocks of 256"]);
    for id in [4_u32, 31, 36, 43, u32::MAX] {
        let text = refused_bytes("blk.0.attn_q.weight", 4 + 16, &id.to_le_bytes());
        assert_says(&text, &["the type of tensor `blk.0.attn_q.weight`", &id.to_string()]);
    }
}

#[test]
fn alignments_that_are_not_powers_of_two_or_too_large_are_refused() {
    for alignment in [0, 3, 33, 1 << 30, u32::MAX] {
        let text = refused(|file| _ = file.set("general.alignment", alignment));
        assert_says(&text, &["`general.alignment`", &alignment.to_string(), "a power of two"]);
    }
    for value in [Value::from(32_i32), Value::from(32_u64), Value::from("32")] {
        let type_name = value.type_name();
        let text = refused(|file| _ = file.set("general.alignment", value));
        assert_says(&text, &["`general.alignment`", &type_name, "u32"]);
    }
    assert_eq!(accepted(|file| _ = file.alignment(4096)).data_offset % 4096, 0);
    // Sound for the format, but llama.cpp asserts where it maps such a file.
    let mut file = model();
    file.alignment(8).set("z", 1_u8).add_tensor("a", GgmlType::F32, &[1]).add_tensor("b", GgmlType::F32, &[1]);
    assert_says(&check(&file).unwrap_err().to_string(), &["llama.cpp maps weights at multiples of 32"]);
}

#[test]
fn offsets_follow_each_other_without_overlap_hole_or_another_order() {
    let expected = 512_u64;
    for offset in [0, 511, 513, 544, 1 << 40, u64::MAX] {
        let text = refused_bytes("blk.0.attn_q.weight", 4 + 16 + 4, &u64::to_le_bytes(offset));
        assert_says(&text, &["the offset of tensor `blk.0.attn_q.weight`", &offset.to_string(), &expected.to_string()]);
    }
}

#[test]
fn vocabulary_arrays_of_another_type_or_shorter_than_the_tokens_are_refused() {
    for (key, value, wanted) in [
        ("tokenizer.ggml.scores", Value::from(vec![0_u8; 4]), "arr[f32]"),
        ("tokenizer.ggml.scores", Value::from(1_f32), "arr[f32]"),
        ("tokenizer.ggml.token_type", Value::from(vec![0_f64; 4]), "arr[i32]"),
        ("tokenizer.ggml.token_type", Value::from(vec![0_u32; 4]), "arr[i32]"),
        ("tokenizer.ggml.tokens", Value::from(vec![0_u8; 4]), "arr[str]"),
        ("tokenizer.ggml.merges", Value::from(vec![0_i32; 4]), "arr[str]"),
        ("tokenizer.ggml.suppress_tokens", Value::from(vec![0_u8; 4]), "arr[i32]"),
        ("tokenizer.ggml.precompiled_charsmap", Value::from(vec![0_u32; 4]), "arr[u8]"),
    ] {
        let given = value.type_name();
        assert_says(&refused(|file| _ = file.set(key, value)), &[key, &given, wanted]);
    }
    for (key, value) in [
        ("tokenizer.ggml.scores", Value::from(vec![0_f32; 3])),
        ("tokenizer.ggml.token_type", Value::from(vec![0_i32; 3])),
    ] {
        assert_says(&refused(|file| _ = file.set(key, value)), &[key, "3 elements", "4 tokens"]);
    }
    for map in [vec![], vec![0_u8; 3], vec![0, 0, 0, 0], vec![255; 64]] {
        assert_says(
            &refused(|file| _ = file.set("tokenizer.ggml.precompiled_charsmap", map)),
            &["precompiled_charsmap"],
        );
    }
    accepted(|file| {
        file.set("tokenizer.ggml.scores", vec![0_f32; 5]).set("tokenizer.ggml.token_type", vec![1_i32; 5]);
    });
    accepted(|file| _ = file.set("tokenizer.ggml.precompiled_charsmap", vec![0_u8; 5]));
}

#[test]
fn tokens_are_there_once_as_llama_cpp_sees_them() {
    let tokens = |tokens: Vec<&str>| {
        refused(|file| {
            file.set("tokenizer.ggml.tokens", tokens)
                .set("tokenizer.ggml.scores", vec![0_f32; 9])
                .set("tokenizer.ggml.token_type", vec![1_i32; 9]);
        })
    };
    assert_says(&tokens(vec!["a", "b", "c", "a"]), &["token 3", "\"a\"", "twice"]);
    assert_says(&tokens(vec!["a", "b\0c", "c", "b"]), &["token 3", "\"b\"", "twice"]);
    assert_says(&tokens(vec!["a", "", "[EMPTY_1]", "b"]), &["token 1", "[EMPTY_1]", "twice"]);
    assert_says(&tokens(vec![]), &["tokenizer.ggml.tokens", "empty"]);
    assert_says(&tokens(vec![&"x".repeat(5000)]), &["the length of token 0", "5000", "4096"]);
    accepted(|file| _ = file.set("tokenizer.ggml.tokens", vec!["", "\0", "b", "c"]));
    let not_utf8: super::StringArray = [b"\xFF".as_slice(), b"\xFE", b"\xC0\x80", b"d"].iter().collect();
    accepted(|file| _ = file.set("tokenizer.ggml.tokens", not_utf8));
}

#[test]
fn token_ids_outside_the_vocabulary_are_refused_where_llama_cpp_would_abort_and_ignored_where_it_ignores_them() {
    // The defaults 1 and 2 stand in for these.
    for id in [4_u32, 32_000, u32::MAX] {
        for key in ["bos", "eos", "unknown", "seperator", "padding", "eot", "eom"] {
            accepted(|file| _ = file.set(&format!("tokenizer.ggml.{key}_token_id"), id));
        }
    }
    let key = "tokenizer.ggml.bos_token_id";
    assert_says(&refused(|file| _ = file.set(key, 1_i32)), &[key, "i32", "u32"]);
    let one_token = |file: &mut FileBuilder| _ = file.set("tokenizer.ggml.tokens", vec!["<unk>"]);
    assert_says(&refused(one_token), &[key, "missing", "1 tokens"]);
    let text = refused(|file| {
        one_token(file);
        file.set(key, 1_u32);
    });
    assert_says(&text, &[key, "is 1", "adds this token"]);
    accepted(|file| {
        one_token(file);
        file.set("tokenizer.ggml.add_bos_token", false);
    });
    accepted(|file| {
        one_token(file);
        file.set(key, 0_u32);
    });
    let bpe = |file: &mut FileBuilder| {
        one_token(file);
        file.set("tokenizer.ggml.model", "gpt2").set("tokenizer.ggml.pre", "smollm");
    };
    accepted(bpe);
    let text = refused(|file| {
        bpe(file);
        file.set("tokenizer.ggml.add_eos_token", true);
    });
    assert_says(&text, &["tokenizer.ggml.eos_token_id"]);
    let text = refused(|file| {
        bpe(file);
        file.set("tokenizer.ggml.pre", "llama-bpe");
    });
    assert_says(&text, &[key]);
    let text = refused(|file| _ = file.set("tokenizer.ggml.model", "bert"));
    assert_says(&text, &[key, "missing"]);
}

#[test]
fn word_piece_vocabularies_have_no_byte_tokens() {
    let word_piece = |types: Vec<i32>| {
        let mut file = model();
        file.set("tokenizer.ggml.model", "bert")
            .set("tokenizer.ggml.bos_token_id", 1_u32)
            .set("tokenizer.ggml.seperator_token_id", 2_u32)
            .set("tokenizer.ggml.token_type", types);
        check(&file)
    };
    word_piece(vec![1, 1, 1, 1]).unwrap();
    assert_says(&word_piece(vec![1, 1, 6, 1]).unwrap_err().to_string(), &["token_type", "token 2"]);
}

#[test]
fn hyperparameters_that_llama_cpp_asserts_on_are_refused() {
    for (key, value) in [
        ("block_count", Value::from(0_u32)),
        ("block_count", Value::from(513_u32)),
        ("block_count", Value::from(u32::MAX)),
        ("block_count", Value::from(2_i32)),
        ("context_length", Value::from(0_u32)),
        ("context_length", Value::from(u32::MAX)),
        ("embedding_length", Value::from(0_u32)),
        ("embedding_length", Value::from(u32::MAX)),
        ("embedding_length", Value::from("64")),
        ("vocab_size", Value::from(u32::MAX)),
        ("attention.head_count", Value::from(u32::MAX)),
        ("attention.head_count", Value::from(7_u32)),
        ("attention.head_count", Value::from(vec![4_u32])),
        ("attention.head_count", Value::from(vec![4_i32, -4])),
        ("attention.head_count", Value::from(vec![4_f32, 4.])),
        ("attention.head_count_kv", Value::from(3_u32)),
        ("attention.head_count_kv", Value::from(vec![2_i32, 3])),
        ("attention.key_length", Value::from(u32::MAX)),
        ("nextn_predict_layers", Value::from(3_u32)),
        ("full_attention_interval", Value::from(0_u32)),
        ("wkv.head_size", Value::from(0_u32)),
        ("rope.dimension_count", Value::from(8_u32)),
        ("rope.dimension_count", Value::from(u32::MAX)),
        ("attention.value_length", Value::from(8_u32)),
        ("attention.layer_norm_rms_epsilon", Value::from(f32::NAN)),
        ("attention.layer_norm_epsilon", Value::from(-1_f32)),
        ("attention.group_norm_epsilon", Value::from(f32::INFINITY)),
        ("ssm.time_step_rank", Value::from(0_u32)),
        ("attention.indexer.block_size", Value::from(0_u32)),
        ("pooling_type", Value::from(9_u32)),
        ("rope.scaling.type", Value::from("su")),
        ("expert_count", Value::from(1025_u32)),
        ("expert_used_count", Value::from(2_u32)),
        ("expert_group_count", Value::from(1_u32)),
    ] {
        let key = format!("llama.{key}");
        let shown = value.to_string();
        let text = refused(|file| _ = file.set(&key, value));
        let names_it = text.contains(&key) || (key.contains("expert") && text.contains("llama.expert_"));
        assert!(names_it, "`{text}` does not name `{key}` ({shown})");
    }
}

#[test]
fn architectures_have_rules_of_their_own() {
    let check_of = |architecture: &str, key: &str, value: u32| {
        let mut file = FileBuilder::new();
        file.set("general.architecture", architecture).set(&format!("{architecture}.block_count"), 2_u32);
        file.set(&format!("{architecture}.{key}"), value);
        check(&file).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_says(&check_of("mamba2", "ssm.group_count", 0).unwrap_err(), &["`mamba2.ssm.group_count`", "1 to"]);
    check_of("plamo2", "ssm.group_count", 0).unwrap();
    assert_says(&check_of("rwkv7", "token_shift_count", 1).unwrap_err(), &["`rwkv7.token_shift_count`", "2 to 2"]);
    check_of("arwkv7", "token_shift_count", 1).unwrap();
    assert_says(&check_of("glm4moe", "expert_used_count", 0).unwrap_err(), &["no `glm4moe.expert_count`"]);
    assert_says(&check_of("ernie4_5-moe", "interleave_moe_layer_step", 0).unwrap_err(), &["interleave_moe_layer_step"]);
    check_of("llama4", "interleave_moe_layer_step", 0).unwrap();
    // Heads: all of these have an embedding of 64, of which 4 heads make 16 each.
    let check_heads = |architecture: &str, keys: &[(&str, u32)]| {
        let mut file = FileBuilder::new();
        file.set("general.architecture", architecture).set(&format!("{architecture}.block_count"), 2_u32);
        file.set(&format!("{architecture}.embedding_length"), 64_u32);
        file.set(&format!("{architecture}.attention.head_count"), 4_u32);
        for (key, value) in keys {
            file.set(&format!("{architecture}.{key}"), *value);
        }
        check(&file).map(|_| ()).map_err(|error| error.to_string())
    };
    let lengths = [("attention.key_length", 32), ("attention.value_length", 32)];
    assert_says(&check_heads("qwen2", &lengths).unwrap_err(), &["`qwen2.attention.head_count`", "embedding length 64"]);
    check_heads("qwen3", &lengths).unwrap();
    assert_says(&check_heads("qwen2", &[("rope.dimension_count", 8)]).unwrap_err(), &["rope.dimension_count", "16"]);
    check_heads("gptneox", &[("rope.dimension_count", 8)]).unwrap();
    for n in [7, 18] {
        assert_says(&check_heads("gptneox", &[("rope.dimension_count", n)]).unwrap_err(), &["even and at most"]);
    }
    check_heads("deepseek2", &[("attention.key_length", 24), ("rope.dimension_count", 8)]).unwrap();
    check_heads("llama", &[("attention.key_length", 24), ("attention.key_length_swa", 16)]).unwrap();
    // One expert is none to these two.
    check_of("hunyuan-dense", "expert_count", 1).unwrap();
    assert_says(&check_of("llama", "expert_count", 1).unwrap_err(), &["expert_used_count"]);
}

#[test]
fn experts_come_in_whole_groups_some_of_them_used() {
    let experts = |count: u32, used: Value, groups: u32, groups_used: u32| {
        let mut file = model();
        file.set("llama.expert_count", count)
            .set("llama.expert_used_count", used)
            .set("llama.expert_group_count", groups)
            .set("llama.expert_group_used_count", groups_used);
        check(&file).map(|_| ()).map_err(|error| error.to_string())
    };
    experts(8, 2_u32.into(), 0, 0).unwrap();
    experts(8, vec![0_i32, 2].into(), 4, 2).unwrap();
    experts(8, 2_u32.into(), 1, 0).unwrap();
    assert_says(&experts(8, 0_u32.into(), 0, 0).unwrap_err(), &["expert_used_count", "8 experts"]);
    assert_says(&experts(8, 9_u32.into(), 0, 0).unwrap_err(), &["expert_used_count"]);
    assert_says(&experts(8, 2_u32.into(), 3, 1).unwrap_err(), &["expert_group_count", "divide the 8 experts"]);
    assert_says(&experts(8, 2_u32.into(), 8, 1).unwrap_err(), &["expert_group_count"]);
    assert_says(&experts(8, 2_u32.into(), 4, 0).unwrap_err(), &["expert_group_used_count"]);
    assert_says(&experts(8, 2_u32.into(), 4, 4).unwrap_err(), &["expert_group_used_count"]);
}

#[test]
fn sound_files_of_other_kinds_pass() {
    // A recurrent model has no heads, a hybrid one has them in some layers.
    accepted(|file| _ = file.set("llama.attention.head_count", 0_u32).unset("llama.attention.head_count_kv"));
    accepted(|file| _ = file.set("llama.attention.head_count_kv", vec![0_i32, 2]));
    accepted(|file| {
        file.set("llama.attention.head_count", 7_u32)
            .set("llama.attention.head_count_kv", 1_u32)
            .set("llama.attention.key_length", 16_u32)
            .set("llama.attention.value_length", 16_u32);
    });
    // A vocabulary of its own kind, or none.
    accepted(|file| _ = file.set("tokenizer.ggml.model", "none").set("tokenizer.ggml.tokens", vec!["a", "a"]));
    accepted(|file| {
        for key in ["model", "tokens", "scores", "token_type"] {
            file.unset(&format!("tokenizer.ggml.{key}"));
        }
    });
    // A vision projector says `clip`, an adapter and an importance matrix say so in their type.
    let sound = |build: &dyn Fn(&mut FileBuilder)| {
        let mut file = FileBuilder::new();
        build(&mut file);
        check(&file).unwrap()
    };
    sound(&|file| {
        file.set("general.architecture", "clip").set("general.type", "mmproj").set("clip.block_count", 0_u32);
    });
    sound(&|file| {
        file.set("general.architecture", "llama").set("general.type", "adapter").set("adapter.type", "lora");
        file.add_tensor("blk.0.attn_q.weight.lora_a", GgmlType::F32, &[64, 8]);
    });
    sound(&|file| _ = file.set("general.type", "imatrix").set("imatrix.chunk_count", 1_u32));
    let without = Header::parse(&FileBuilder::new().header_bytes(), 24).unwrap();
    assert!(matches!(without.check_for_llama(), Err(GgufError::Missing { .. })));
}

#[test]
fn a_lie_about_the_kind_of_file_skips_no_check() {
    let text = refused(|file| _ = file.set("general.type", "adapter").set("llama.block_count", 0_u32));
    assert_says(&text, &["llama.block_count"]);
}

#[test]
fn typed_access_names_the_key_and_both_types() {
    let header = accepted(|file| _ = file.set("n", 3_u8).set("wide", 1_u64 << 40).set("labels", vec!["a", "b"]));
    let metadata = &header.metadata;
    assert_eq!(metadata.u32("n").unwrap(), Some(3));
    assert_eq!(metadata.u64("n").unwrap(), Some(3));
    assert_eq!(metadata.u64("wide").unwrap(), Some(1 << 40));
    assert_eq!(metadata.u32("absent").unwrap(), None);
    assert_eq!(metadata.array_len("labels").unwrap(), Some(2));
    assert_eq!(metadata.u32_per_layer("n", 3).unwrap(), Some(vec![3; 3]));
    assert_says(&metadata.u32("wide").unwrap_err().to_string(), &["`wide`", "u64", "u32"]);
    assert_says(&metadata.f32("n").unwrap_err().to_string(), &["`n`", "u8", "f32"]);
    assert_says(&metadata.bool("n").unwrap_err().to_string(), &["`n`", "u8", "bool"]);
    assert_says(&metadata.str("labels").unwrap_err().to_string(), &["`labels`", "arr[str]", "str"]);
    assert_says(&metadata.array_len("n").unwrap_err().to_string(), &["`n`", "u8", "array"]);
    assert_says(&metadata.u32_per_layer("n", u32::MAX).unwrap_err().to_string(), &["`n`", "4294967295", "512"]);
    assert_eq!(metadata.iter().count(), metadata.len());
    let tokens = metadata.get("tokenizer.ggml.tokens").unwrap();
    assert!(matches!(tokens, Value::Array(Array::String(_))));
    assert_eq!(tokens.to_string(), "str[4]");
}

/// The files of a split set, before they are written.
fn shards(n: u16) -> Vec<FileBuilder> {
    (0..n)
        .map(|number| {
            let mut file = if number == 0 { model() } else { FileBuilder::new() };
            if number > 0 {
                file.add_tensor(&format!("blk.{number}.ffn_up.weight"), GgmlType::F32, &[u64::from(number) * 8, 3]);
            }
            file.set("split.no", number).set("split.count", n).set("split.tensors.count", i32::from(n) + 2);
            file
        })
        .collect()
}

fn write_shards(directory: &Path, shards: &[FileBuilder]) -> Vec<PathBuf> {
    let path = |number: usize| directory.join(format!("model-{:05}-of-{:05}.gguf", number + 1, shards.len()));
    for (number, shard) in shards.iter().enumerate() {
        shard.write_header_only(&path(number)).unwrap();
    }
    (0..shards.len()).map(path).collect()
}

/// The error text of opening the first of three shards after `change`.
fn refused_shards(change: impl FnOnce(&mut Vec<FileBuilder>)) -> String {
    let directory = tempfile::tempdir().unwrap();
    let mut shards = shards(3);
    change(&mut shards);
    let paths = write_shards(directory.path(), &shards);
    Header::open(&paths[0]).unwrap_err().to_string()
}

#[test]
fn any_shard_opens_the_whole_set() {
    let directory = tempfile::tempdir().unwrap();
    let shards = shards(3);
    let paths = write_shards(directory.path(), &shards);
    let total: u64 = paths.iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    for path in &paths {
        let header = Header::open(path).unwrap();
        assert_eq!((header.n_shards, header.tensors.len(), header.file_bytes), (3, 5, total));
        assert_eq!(header.architecture(), "llama");
        let last = header.tensor("blk.2.ffn_up.weight").unwrap();
        assert_eq!((last.shard, last.offset, last.bytes), (2, 0, 16 * 3 * 4));
        assert_eq!(header.shard_data_offset(2), Some(shards[2].header_bytes().len() as u64));
        assert_eq!(header.shard_data_offset(3), None);
    }
}

#[test]
fn shards_that_are_missing_misplaced_or_of_another_model_are_refused() {
    assert_says(
        &refused_shards(|shards| _ = shards[1].set("split.no", 2_u16)),
        &["model-00002-of-00003.gguf", "shard 2"],
    );
    assert_says(&refused_shards(|shards| _ = shards[1].set("split.no", 1_u32)), &["split.no", "u32", "u16"]);
    assert_says(
        &refused_shards(|shards| _ = shards[1].unset("split.no")),
        &["model-00002-of-00003.gguf", "no `split.no`"],
    );
    assert_says(
        &refused_shards(|shards| _ = shards[2].set("split.count", 4_u16)),
        &["model-00003-of-00003.gguf", "a set of 4"],
    );
    assert_says(
        &refused_shards(|shards| _ = shards[0].set("split.count", 65_535_u16)),
        &["split.count", "65535", "1024"],
    );
    assert_says(&refused_shards(|shards| _ = shards[0].set("split.count", 4_u16)), &["-00001-of-00004.gguf"]);
    assert_says(&refused_shards(|shards| _ = shards[0].set("split.count", -1_i16)), &["split.count", "i16"]);
    assert_says(&refused_shards(|shards| _ = shards[0].set("split.no", 3_u16)), &["shard 3", "of 3"]);
    assert_says(&refused_shards(|shards| _ = shards[0].unset("split.no")), &["split.no"]);
    assert_says(&refused_shards(|shards| _ = shards[0].unset("split.tensors.count")), &["split.tensors.count"]);
    let count = |file: &mut FileBuilder| _ = file.set("split.tensors.count", 6_i32);
    assert_says(
        &refused_shards(|shards| shards.iter_mut().for_each(count)),
        &["split.tensors.count", "6", "5 tensors"],
    );
    assert_says(&refused_shards(|shards| count(&mut shards[1])), &["another model", "split.tensors.count"]);
    let text = refused_shards(|shards| _ = shards[1].set("general.architecture", "qwen2"));
    assert_says(&text, &["model-00002-of-00003.gguf", "another model", "qwen2"]);
    let text = refused_shards(|shards| _ = shards[2].add_tensor("blk.1.ffn_up.weight", GgmlType::F32, &[8]));
    assert_says(&text, &["blk.1.ffn_up.weight", "twice"]);

    let directory = tempfile::tempdir().unwrap();
    let paths = write_shards(directory.path(), &shards(3));
    fs::remove_file(&paths[1]).unwrap();
    let text = Header::open(&paths[2]).unwrap_err().to_string();
    assert_says(&text, &["`model-00002-of-00003.gguf` is missing", "split into 3"]);
    assert!(!text.contains(&directory.path().display().to_string()), "no directories in error texts: {text}");
}

#[test]
fn shards_are_looked_for_beside_the_file_under_its_own_name_only() {
    let directory = tempfile::tempdir().unwrap();
    let paths = write_shards(directory.path(), &shards(3));
    // Under another name the others cannot be found, whatever the file says.
    let renamed = directory.path().join("..-00001-of-00003.gguf.gguf");
    fs::copy(&paths[0], &renamed).unwrap();
    assert_says(&Header::open(&renamed).unwrap_err().to_string(), &["its name must end in `-00001-of-00003.gguf`"]);
    // A name of nothing but the numbers.
    let bare = directory.path().join("-00001-of-00003.gguf");
    fs::copy(&paths[0], &bare).unwrap();
    assert_says(&Header::open(&bare).unwrap_err().to_string(), &["its name must end in"]);
    // A prefix of dots stays a file name: the siblings of `..-00001-of-00003.gguf` lie in the same directory.
    let dots = directory.path().join("..-00001-of-00003.gguf");
    fs::copy(&paths[0], &dots).unwrap();
    assert_says(&Header::open(&dots).unwrap_err().to_string(), &["`..-00002-of-00003.gguf` is missing"]);
}

#[test]
fn only_regular_files_are_opened() {
    let directory = tempfile::tempdir().unwrap();
    assert_says(&Header::open(directory.path()).unwrap_err().to_string(), &["is not a regular file"]);
    let error = Header::open(&directory.path().join("absent.gguf")).unwrap_err();
    assert_eq!(error.to_string(), "cannot access `absent.gguf`");
    assert!(matches!(error, GgufError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound));
}

#[test]
fn a_reader_that_fails_or_ends_early_is_an_error() {
    struct Failing(usize);
    impl std::io::Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.0 += 1;
            match self.0 {
                1 => {
                    buffer[..4].copy_from_slice(b"GGUF");
                    Ok(4)
                }
                2 => Err(std::io::ErrorKind::Interrupted.into()),
                3 => {
                    buffer[0] = 3;
                    Ok(1)
                }
                _ => Err(std::io::Error::other("the disk is gone")),
            }
        }
    }
    let error = Header::read(Failing(0), 1000).unwrap_err();
    assert_says(&error.to_string(), &["cannot access `the version`"]);
    let error = Header::read(&b"GGUF\x03\0\0\0"[..], 1000).unwrap_err();
    assert_says(&error.to_string(), &["the number of tensors at byte 8", "0 left"]);
}
