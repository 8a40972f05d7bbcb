//! The container's syntax: one file's bytes to a [`Header`], every number checked before it is used.
//!
//! Layout, little-endian: magic, version, tensor count, entry count, the entries, the tensors' descriptions, padding, data.
//! Source: `gguf_init_from_reader` of ggml at our pin, which this reader follows check by check; what it refuses beyond that
//! is in [`limits`](super::limits), and a bool other than 0 and 1, a NUL in a name, and a dimension of 0.

use std::io::Read;

use super::error::GgufError;
use super::ggml_type::GgmlType;
use super::header::{Header, TensorInfo};
use super::limits::{
    DEFAULT_ALIGNMENT, MAX_ALIGNMENT, MAX_ARRAY_ELEMENTS, MAX_DIMS, MAX_KEY_BYTES, MAX_METADATA_ENTRIES,
    MAX_STRING_BYTES, MAX_TENSOR_NAME_BYTES, MAX_TENSORS,
};
use super::metadata::{Entry, Metadata};
use super::source::Source;
use super::value::{Array, StringArray, Value, ValueType};

/// Bytes of the shortest entry: an empty key's length, a type, one byte of value.
const MIN_ENTRY_BYTES: u64 = 8 + 4 + 1;

/// Bytes of the shortest tensor description: name length, dimension count, one dimension, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// Reads the header of one file.
pub(super) fn header(reader: impl Read, file_bytes: u64) -> Result<Header, GgufError> {
    let source = &mut Source::new(reader, file_bytes);
    let version = magic_and_version(source)?;
    let n_tensors = count(source, "the number of tensors", MAX_TENSORS, MIN_TENSOR_BYTES)?;
    let n_entries = count(source, "the number of metadata entries", MAX_METADATA_ENTRIES, MIN_ENTRY_BYTES)?;

    // Grown as they are read, not reserved: a count that the file could hold may still be a lie.
    let mut entries = Vec::new();
    for index in 0..n_entries {
        entries.push(entry(source, index)?);
    }
    let metadata = Metadata::new(entries)?;
    let alignment = alignment(&metadata)?;

    let mut tensors = Vec::new();
    let mut expected_offset = 0;
    for index in 0..n_tensors {
        tensors.push(tensor(source, index, alignment, &mut expected_offset)?);
    }
    let data_offset = data_offset(source, &tensors, alignment)?;
    check_ends(&tensors, data_offset, file_bytes)?;
    Header::new(version, alignment, metadata, tensors, data_offset, file_bytes)
}

fn magic_and_version<R: Read>(source: &mut Source<R>) -> Result<u32, GgufError> {
    let found: [u8; 4] = source.array(format_args!("the magic number"))?;
    if found != *b"GGUF" {
        return Err(GgufError::NotGguf { found });
    }
    let version = source.u32(format_args!("the version"))?;
    match version {
        2 | 3 => Ok(version), // the same layout; 3 added big-endian files
        _ if (1..=3).contains(&version.swap_bytes()) => Err(GgufError::BigEndian { version }),
        _ => Err(GgufError::Version { version }),
    }
}

/// A count of things that take at least `min_bytes` each, so the rest of the file bounds it.
fn count<R: Read>(source: &mut Source<R>, field: &str, limit: u64, min_bytes: u64) -> Result<u64, GgufError> {
    let offset = source.position();
    let given = source.u64(format_args!("{field}"))?;
    if given > limit {
        return Err(GgufError::TooLarge { field: field.to_owned(), offset, given, limit });
    }
    let needed = given * min_bytes; // no overflow: both have limits among our constants
    if needed > source.left() {
        let field = format!("{field} ({given})");
        return Err(GgufError::Truncated { field, offset, needed, left: source.left() });
    }
    Ok(given)
}

fn entry<R: Read>(source: &mut Source<R>, index: u64) -> Result<Entry, GgufError> {
    let offset = source.position();
    let mut key = Vec::new();
    source.append_string(&mut key, MAX_KEY_BYTES, format_args!("key {index}"))?;
    let key = name(key, offset, format_args!("key {index}"))?;
    let value_type = value_type(source, &key)?;
    let value = if value_type == ValueType::Array {
        Value::Array(array(source, &key)?)
    } else {
        scalar(source, &key, value_type)?
    };
    Ok(Entry { key, value, offset })
}

/// A key or tensor name: not empty (llama.cpp aborts), UTF-8, and without a NUL, where llama.cpp would cut it.
fn name(bytes: Vec<u8>, offset: u64, field: std::fmt::Arguments<'_>) -> Result<String, GgufError> {
    let invalid = |given: String, rule: &str| GgufError::Invalid {
        field: field.to_string(),
        offset,
        given,
        rule: rule.to_owned(),
    };
    if bytes.is_empty() {
        return Err(invalid("empty".to_owned(), "it must have a name"));
    }
    if bytes.contains(&0) {
        return Err(invalid(format!("{:?}", String::from_utf8_lossy(&bytes)), "it must not contain a NUL"));
    }
    String::from_utf8(bytes)
        .map_err(|error| invalid(format!("{:?}", String::from_utf8_lossy(error.as_bytes())), "it must be UTF-8"))
}

fn value_type<R: Read>(source: &mut Source<R>, key: &str) -> Result<ValueType, GgufError> {
    let offset = source.position();
    let id = source.u32(format_args!("the type of `{key}`"))?;
    ValueType::from_id(id).ok_or_else(|| GgufError::Invalid {
        field: format!("the type of `{key}`"),
        offset,
        given: id.to_string(),
        rule: "types are 0 to 12".to_owned(),
    })
}

fn scalar<R: Read>(source: &mut Source<R>, key: &str, value_type: ValueType) -> Result<Value, GgufError> {
    let offset = source.position();
    let field = format_args!("`{key}`");
    Ok(match value_type {
        ValueType::U8 => Value::U8(u8::from_le_bytes(source.array(field)?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(source.array(field)?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(source.array(field)?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(source.array(field)?)),
        ValueType::U32 => Value::U32(u32::from_le_bytes(source.array(field)?)),
        ValueType::I32 => Value::I32(i32::from_le_bytes(source.array(field)?)),
        ValueType::U64 => Value::U64(u64::from_le_bytes(source.array(field)?)),
        ValueType::I64 => Value::I64(i64::from_le_bytes(source.array(field)?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(source.array(field)?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(source.array(field)?)),
        ValueType::Bool => {
            let [byte] = source.array(field)?;
            Value::Bool(truth(byte, key, offset)?)
        }
        ValueType::String => {
            let mut text = Vec::new();
            source.append_string(&mut text, MAX_STRING_BYTES, field)?;
            let text =
                String::from_utf8(text).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
            Value::String(text)
        }
        ValueType::Array => return Err(nested_array(key, offset)), // `entry` reads those
    })
}

fn truth(byte: u8, key: &str, offset: u64) -> Result<bool, GgufError> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(GgufError::Invalid {
            field: format!("`{key}`"),
            offset,
            given: byte.to_string(),
            rule: "a bool is 0 or 1".to_owned(),
        }),
    }
}

fn nested_array(key: &str, offset: u64) -> GgufError {
    GgufError::Invalid {
        field: format!("`{key}`"),
        offset,
        given: "an array of arrays".to_owned(),
        rule: "arrays hold scalars and strings".to_owned(),
    }
}

fn array<R: Read>(source: &mut Source<R>, key: &str) -> Result<Array, GgufError> {
    let offset = source.position();
    let element_type = value_type(source, key)?;
    if element_type == ValueType::Array {
        return Err(nested_array(key, offset));
    }
    let n = count(source, &format!("the length of `{key}`"), MAX_ARRAY_ELEMENTS, element_type.min_bytes())?;
    if element_type == ValueType::String {
        return Ok(Array::String(strings(source, key, n)?));
    }
    let offset = source.position();
    let mut bytes = Vec::new();
    source.append(&mut bytes, n * element_type.min_bytes(), format_args!("`{key}`"))?;
    Ok(match element_type {
        ValueType::U8 => Array::U8(bytes),
        ValueType::I8 => Array::I8(numbers(&bytes, i8::from_le_bytes)),
        ValueType::U16 => Array::U16(numbers(&bytes, u16::from_le_bytes)),
        ValueType::I16 => Array::I16(numbers(&bytes, i16::from_le_bytes)),
        ValueType::U32 => Array::U32(numbers(&bytes, u32::from_le_bytes)),
        ValueType::I32 => Array::I32(numbers(&bytes, i32::from_le_bytes)),
        ValueType::U64 => Array::U64(numbers(&bytes, u64::from_le_bytes)),
        ValueType::I64 => Array::I64(numbers(&bytes, i64::from_le_bytes)),
        ValueType::F32 => Array::F32(numbers(&bytes, f32::from_le_bytes)),
        ValueType::F64 => Array::F64(numbers(&bytes, f64::from_le_bytes)),
        ValueType::Bool => {
            let truths = bytes.iter().zip(offset..).map(|(&byte, offset)| truth(byte, key, offset));
            Array::Bool(truths.collect::<Result<_, _>>()?)
        }
        ValueType::String | ValueType::Array => return Err(nested_array(key, offset)), // returned above
    })
}

fn numbers<T, const N: usize>(bytes: &[u8], from_le_bytes: fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|&chunk| from_le_bytes(chunk)).collect()
}

/// Strings that lie in the source's buffer as a whole are taken in one go: a vocabulary has 100,000 of seven bytes.
fn strings<R: Read>(source: &mut Source<R>, key: &str, n: u64) -> Result<StringArray, GgufError> {
    let mut strings = StringArray::default();
    while (strings.len() as u64) < n {
        let mut at_hand = source.at_hand();
        let n_bytes = at_hand.len();
        while (strings.len() as u64) < n
            && let Some((length, rest)) = at_hand.split_first_chunk::<8>()
            && let length = u64::from_le_bytes(*length)
            && length <= rest.len() as u64
        {
            let (string, rest) = rest.split_at(length as usize);
            strings.push(string);
            at_hand = rest;
        }
        let used = n_bytes - at_hand.len();
        source.consume(used);
        if (strings.len() as u64) < n {
            let index = strings.len();
            let field = format_args!("`{key}`, element {index}");
            source.append_string(strings.bytes_mut(), MAX_STRING_BYTES, field)?;
            strings.end_string();
        }
    }
    Ok(strings)
}

/// The alignment of tensor data: `general.alignment`, or the default.
fn alignment(metadata: &Metadata) -> Result<u64, GgufError> {
    const KEY: &str = "general.alignment";
    let alignment = match metadata.get(KEY) {
        None => DEFAULT_ALIGNMENT,
        Some(Value::U32(alignment)) => *alignment,
        Some(_) => return Err(metadata.wrong_type(KEY, "u32")),
    };
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        let rule = format!("it must be a power of two, at most {MAX_ALIGNMENT}");
        return Err(metadata.invalid(KEY, &alignment, rule));
    }
    Ok(u64::from(alignment))
}

/// One tensor's description. Data lies in the order of the descriptions, each at the next multiple of the alignment, so the
/// offset must be `expected_offset`; that leaves no room for overlaps, holes or another order.
fn tensor<R: Read>(
    source: &mut Source<R>,
    index: u64,
    alignment: u64,
    expected_offset: &mut u64,
) -> Result<TensorInfo, GgufError> {
    let at = source.position();
    let mut bytes = Vec::new();
    source.append_string(&mut bytes, MAX_TENSOR_NAME_BYTES, format_args!("the name of tensor {index}"))?;
    let name = name(bytes, at, format_args!("the name of tensor {index}"))?;
    let invalid = |what: &str, offset: u64, given: String, rule: String| GgufError::Invalid {
        field: format!("{what} of tensor `{name}`"),
        offset,
        given,
        rule,
    };

    let at = source.position();
    let n_dims = source.u32(format_args!("the number of dimensions of tensor `{name}`"))?;
    if n_dims == 0 || n_dims > MAX_DIMS {
        return Err(invalid("the number of dimensions", at, n_dims.to_string(), format!("it must be 1 to {MAX_DIMS}")));
    }
    let dims_at = source.position();
    let mut dims = Vec::with_capacity(n_dims as usize);
    for dimension in 0..n_dims {
        let at = source.position();
        let n = source.u64(format_args!("dimension {dimension} of tensor `{name}`"))?;
        if n == 0 {
            return Err(invalid("a dimension", at, "0".to_owned(), "it must be at least 1".to_owned()));
        }
        dims.push(n);
    }
    // llama.cpp counts elements in a signed 64-bit number.
    let n_elements = dims.iter().try_fold(1_u64, |product, &n| product.checked_mul(n));
    if n_elements.is_none_or(|n| n > i64::MAX as u64) {
        return Err(invalid("the shape", dims_at, format!("{dims:?}"), "the product overflows".to_owned()));
    }

    let at = source.position();
    let id = source.u32(format_args!("the type of tensor `{name}`"))?;
    let ggml_type = GgmlType::from_id(id)
        .ok_or_else(|| invalid("the type", at, id.to_string(), "llama.cpp has no such type".to_owned()))?;
    if !dims[0].is_multiple_of(ggml_type.block_elements()) {
        let rule = format!("{ggml_type} stores blocks of {}", ggml_type.block_elements());
        return Err(invalid("the row", dims_at, format!("{} elements long", dims[0]), rule));
    }
    let padded_bytes = |bytes: u64| bytes.checked_next_multiple_of(alignment);
    let bytes = ggml_type.tensor_bytes(&dims);
    let (Some(bytes), Some(padded_bytes)) = (bytes, bytes.and_then(padded_bytes)) else {
        return Err(invalid("the shape", dims_at, format!("{dims:?}"), "its bytes overflow".to_owned()));
    };

    let at = source.position();
    let offset = source.u64(format_args!("the offset of tensor `{name}`"))?;
    if offset != *expected_offset {
        let rule = format!("the tensors before it end at {expected_offset}");
        return Err(invalid("the offset", at, offset.to_string(), rule));
    }
    *expected_offset = offset
        .checked_add(padded_bytes)
        .ok_or_else(|| invalid("the end", at, format!("{offset} + {padded_bytes}"), "the sum overflows".to_owned()))?;
    Ok(TensorInfo { name, ggml_type, dims, offset, shard: 0, bytes })
}

/// Where tensor data begins: the end of the header, padded if there are tensors.
fn data_offset<R: Read>(source: &Source<R>, tensors: &[TensorInfo], alignment: u64) -> Result<u64, GgufError> {
    let end = source.position();
    if tensors.is_empty() {
        return Ok(end);
    }
    let data_offset = end.next_multiple_of(alignment); // the header is at most MAX_HEADER_BYTES long
    source.require(data_offset - end, format_args!("the padding before the tensor data"))?;
    Ok(data_offset)
}

/// Every tensor's data must lie in the file. Only the last one can be cut off, but the first one that is makes the better
/// message.
fn check_ends(tensors: &[TensorInfo], data_offset: u64, file_bytes: u64) -> Result<(), GgufError> {
    for tensor in tensors {
        let start = data_offset.saturating_add(tensor.offset);
        if start.checked_add(tensor.bytes).is_none_or(|end| end > file_bytes) {
            return Err(GgufError::Truncated {
                field: format!("the data of tensor `{}`", tensor.name),
                offset: start,
                needed: tensor.bytes,
                left: file_bytes.saturating_sub(start),
            });
        }
    }
    Ok(())
}
