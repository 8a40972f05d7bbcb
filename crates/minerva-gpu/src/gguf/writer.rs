//! Writes GGUF files: any metadata, any tensors, with weights as holes or as seeded random numbers.
//!
//! For tests, for memory plans of models that are not here, and for benchmarks, where random weights are as good as real ones:
//! fine for memory and speed, never for quality. The writer writes what it is told, mistakes included, so that tests can show
//! what the reader refuses.

use std::fs::File;
use std::io;
use std::path::Path;

use super::ggml_type::GgmlType;
use super::limits::DEFAULT_ALIGNMENT;
use super::value::{Array, Value};
use super::weights;

/// A GGUF file in the making: metadata and tensors, in the order in which they were added.
///
/// # Examples
/// ```
/// use minerva_gpu::gguf::{FileBuilder, GgmlType, Header};
/// let mut file = FileBuilder::new();
/// file.set("general.architecture", "clip").set("clip.vision.is_norm_crop", true);
/// file.add_tensor("v.blk.0.attn_q.weight", GgmlType::F16, &[64, 64]);
/// let directory = tempfile::tempdir()?;
/// let path = directory.path().join("projector.gguf");
/// file.write_random(&path, 7, &mut |_bytes| {})?;
/// assert_eq!(Header::open(&path)?.tensors.len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct FileBuilder {
    alignment: u32,
    metadata: Vec<(String, Value)>,
    tensors: Vec<PlannedTensor>,
}

#[derive(Debug, Clone)]
struct PlannedTensor {
    name: String,
    ggml_type: GgmlType,
    dims: Vec<u64>,
    /// 0 for dimensions that no file can hold.
    bytes: u64,
}

impl Default for FileBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl FileBuilder {
    /// A file without metadata and tensors.
    pub fn new() -> Self {
        Self { alignment: DEFAULT_ALIGNMENT, metadata: Vec::new(), tensors: Vec::new() }
    }

    /// Lets tensor data begin at multiples of `alignment` bytes and says so in `general.alignment`. Default 32, unsaid.
    pub fn alignment(&mut self, alignment: u32) -> &mut Self {
        self.alignment = alignment;
        self.set("general.alignment", alignment)
    }

    /// Sets a key; one that is there already keeps its place.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        let value = value.into();
        match self.metadata.iter_mut().find(|(existing, _)| existing == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
        self
    }

    /// Removes a key, if it is there.
    pub fn unset(&mut self, key: &str) -> &mut Self {
        self.metadata.retain(|(existing, _)| existing != key);
        self
    }

    /// Adds a tensor; `dims` has the row's length first. Dimensions that no file can hold (a row that is not whole blocks, a
    /// product that overflows) are written as given, with no data.
    pub fn add_tensor(&mut self, name: &str, ggml_type: GgmlType, dims: &[u64]) -> &mut Self {
        let bytes = ggml_type.tensor_bytes(dims).unwrap_or(0);
        self.tensors.push(PlannedTensor { name: name.to_owned(), ggml_type, dims: dims.to_vec(), bytes });
        self
    }

    /// The header, padded to where tensor data begins.
    pub fn header_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(b"GGUF");
        bytes.extend_from_slice(&3_u32.to_le_bytes());
        bytes.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            write_string(&mut bytes, key.as_bytes());
            bytes.extend_from_slice(&value.value_type().id().to_le_bytes());
            write_value(&mut bytes, value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            write_string(&mut bytes, tensor.name.as_bytes());
            bytes.extend_from_slice(&(tensor.dims.len() as u32).to_le_bytes());
            for n in &tensor.dims {
                bytes.extend_from_slice(&n.to_le_bytes());
            }
            bytes.extend_from_slice(&tensor.ggml_type.id().to_le_bytes());
            bytes.extend_from_slice(&u64::to_le_bytes(offset));
            offset = self.padded(offset.saturating_add(tensor.bytes));
        }
        if !self.tensors.is_empty() {
            bytes.resize(self.padded(bytes.len() as u64) as usize, 0);
        }
        bytes
    }

    /// Size of the file with its tensor data, in bytes, padding after the last tensor included.
    pub fn file_bytes(&self) -> u64 {
        let data_bytes = self.tensors.iter().fold(0, |sum: u64, tensor| self.padded(sum.saturating_add(tensor.bytes)));
        (self.header_bytes().len() as u64).saturating_add(data_bytes)
    }

    /// Writes the header and sets the file to its full size: the weights are holes, which read as zeros and take no disk.
    ///
    /// Returns the size of the file. For memory plans; a model of zeros computes zeros.
    ///
    /// # Errors
    /// What the system says, with a size that it does not support as [`io::ErrorKind::InvalidInput`] or
    /// [`io::ErrorKind::FileTooLarge`].
    pub fn write_header_only(&self, path: &Path) -> io::Result<u64> {
        let mut file = File::create(path)?;
        io::Write::write_all(&mut file, &self.header_bytes())?;
        let file_bytes = self.file_bytes();
        file.set_len(file_bytes)?;
        Ok(file_bytes)
    }

    /// Writes the whole file with random weights, the same for the same `seed` on every machine.
    ///
    /// Weights are finite numbers, most within ±0.1 and none beyond ±0.5, whatever the type; tensors whose name ends in `_norm.weight` are ones,
    /// and so are frequency factors; integers are 0, a valid index everywhere. All processors generate and write.
    /// `progress` is called from the calling thread, with the bytes written so far. Returns the size of the file.
    ///
    /// # Errors
    /// What the system says; the file is then unfinished.
    pub fn write_random(&self, path: &Path, seed: u64, progress: &mut dyn FnMut(u64)) -> io::Result<u64> {
        let mut file = File::create(path)?;
        let header = self.header_bytes();
        io::Write::write_all(&mut file, &header)?;
        let file_bytes = self.file_bytes();
        file.set_len(file_bytes)?;

        let mut position = header.len() as u64;
        let mut placed = Vec::with_capacity(self.tensors.len());
        for tensor in &self.tensors {
            placed.push(weights::PlacedTensor {
                name: &tensor.name,
                ggml_type: tensor.ggml_type,
                position,
                bytes: tensor.bytes,
            });
            position = self.padded(position.saturating_add(tensor.bytes));
        }
        weights::write(&file, &placed, seed, progress)?;
        Ok(file_bytes)
    }

    fn padded(&self, bytes: u64) -> u64 {
        bytes.checked_next_multiple_of(u64::from(self.alignment.max(1))).unwrap_or(u64::MAX)
    }
}

fn write_string(bytes: &mut Vec<u8>, string: &[u8]) {
    bytes.extend_from_slice(&(string.len() as u64).to_le_bytes());
    bytes.extend_from_slice(string);
}

fn write_value(bytes: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(value) => bytes.push(*value),
        Value::I8(value) => bytes.extend_from_slice(&value.to_le_bytes()),
        Value::U16(value) => bytes.extend_from_slice(&value.to_le_bytes()),
        Value::I16(value) => bytes.extend_from_slice(&value.to_le_bytes()),
        Value::U32(value) => bytes.extend_from_slice(&value.to_le_bytes()),
        Value::I32(value) => bytes.extend_from_slice(&value.to_le_bytes()),
        Value::U64(value) => bytes.extend_from_slice(&value.to_le_bytes()),
        Value::I64(value) => bytes.extend_from_slice(&value.to_le_bytes()),
        Value::F32(value) => bytes.extend_from_slice(&value.to_le_bytes()),
        Value::F64(value) => bytes.extend_from_slice(&value.to_le_bytes()),
        Value::Bool(value) => bytes.push(u8::from(*value)),
        Value::String(value) => write_string(bytes, value.as_bytes()),
        Value::Array(array) => write_array(bytes, array),
    }
}

fn write_array(bytes: &mut Vec<u8>, array: &Array) {
    bytes.extend_from_slice(&array.element_type().id().to_le_bytes());
    bytes.extend_from_slice(&(array.len() as u64).to_le_bytes());
    match array {
        Array::U8(values) => bytes.extend_from_slice(values),
        Array::I8(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U16(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I16(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U32(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I32(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U64(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I64(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F32(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F64(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::Bool(values) => bytes.extend(values.iter().map(|&value| u8::from(value))),
        Array::String(strings) => strings.iter().for_each(|string| write_string(bytes, string)),
    }
}
