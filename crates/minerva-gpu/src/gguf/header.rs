//! What a GGUF file says about itself: metadata and the list of tensors, without the tensors' data.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::error::GgufError;
use super::ggml_type::GgmlType;
use super::metadata::Metadata;
use super::{read, split};

/// The header of a GGUF file, or of a split set of them merged into one.
///
/// # Examples
/// ```
/// use minerva_gpu::gguf::{FileBuilder, GgmlType, Header};
/// let mut file = FileBuilder::new();
/// file.set("general.architecture", "llama").set("llama.block_count", 2_u32);
/// file.add_tensor("token_embd.weight", GgmlType::Q8_0, &[64, 100]);
/// let header = Header::parse(&file.header_bytes(), file.file_bytes())?;
/// assert_eq!(header.metadata.u32("llama.block_count")?, Some(2));
/// assert_eq!(header.tensor("token_embd.weight").unwrap().bytes, 100 * 2 * 34);
/// # Ok::<(), minerva_gpu::gguf::GgufError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Header {
    /// The format's version: 2 or 3.
    pub version: u32,
    /// Tensor data begins at multiples of this, in bytes; of the first shard.
    pub alignment: u64,
    /// Keys and values of the first shard; the others repeat the `split.*` keys only.
    pub metadata: Metadata,
    /// All tensors, in file order, shard after shard.
    pub tensors: Vec<TensorInfo>,
    /// The first byte of tensor data, of the first shard.
    pub data_offset: u64,
    /// Size of the file, of all shards together.
    pub file_bytes: u64,
    /// Files of the split set; 1 for a single file.
    pub n_shards: u16,
    /// Per shard, where its tensor data begins.
    pub(super) shard_data_offsets: Vec<u64>,
    /// Indices into `tensors`, ordered by name.
    by_name: Vec<u32>,
}

/// One tensor: what it is and where its data lies.
#[derive(Debug, Clone, PartialEq, Eq)]
#[doc(alias = "gguf_tensor_info")]
pub struct TensorInfo {
    /// Its name: `blk.0.attn_q.weight`.
    pub name: String,
    /// How its elements are stored.
    pub ggml_type: GgmlType,
    /// One to four dimensions as in the file, the row's length (`ne0`) first; none is 0.
    pub dims: Vec<u64>,
    /// Where its data begins, from the start of its shard's tensor data ([`Header::shard_data_offset`]).
    pub offset: u64,
    /// The file of the split set that holds it, from 0.
    pub shard: u16,
    /// Bytes of its data, without padding.
    pub bytes: u64,
}

impl TensorInfo {
    /// All four dimensions: those that the file leaves out are 1.
    pub(crate) fn shape(&self) -> [u64; 4] {
        let mut shape = [1; 4];
        for (to, from) in shape.iter_mut().zip(&self.dims) {
            *to = *from;
        }
        shape
    }
}

impl Header {
    /// Reads the header of a file, or of the split set that the file belongs to, and checks it for llama.cpp.
    ///
    /// Any shard of a set `NAME-00001-of-00003.gguf` opens the whole set; the others are looked for beside it and nowhere
    /// else. The file is read through a buffer, not mapped: shortening it meanwhile is an error, not a signal.
    ///
    /// # Errors
    /// [`GgufError`]: not readable, not a GGUF file, damaged, or one that llama.cpp would not survive
    /// ([`check_for_llama`](Self::check_for_llama)).
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let header = split::open(path)?;
        header.check_for_llama()?;
        Ok(header)
    }

    /// Reads the header of one file, without looking for other shards and without
    /// [`check_for_llama`](Self::check_for_llama).
    ///
    /// # Errors
    /// [`GgufError`] as for [`open`](Self::open).
    pub(super) fn open_shard(path: &Path) -> Result<Self, GgufError> {
        let file_name = || path.file_name().map_or_else(|| "?".to_owned(), |name| name.to_string_lossy().into_owned());
        let io_error = |source| GgufError::Io { file: file_name(), source };
        // Looked at before it is opened: opening a named pipe would wait for a writer.
        if !path.metadata().map_err(io_error)?.is_file() {
            return Err(GgufError::Shard { file: file_name(), why: "is not a regular file".to_owned() });
        }
        let file = File::open(path).map_err(io_error)?;
        let file_bytes = file.metadata().map_err(io_error)?.len();
        Self::read(file, file_bytes)
    }

    /// Reads the header of one file from a stream of `file_bytes` bytes; the reader is left somewhere after it.
    ///
    /// Reads are buffered here; the reader itself need not be.
    ///
    /// # Errors
    /// [`GgufError`] for anything that breaks the format, a tensor that ends after `file_bytes` included.
    pub fn read(reader: impl Read, file_bytes: u64) -> Result<Self, GgufError> {
        read::header(reader, file_bytes)
    }

    /// Reads the header of one file of `file_bytes` bytes from its beginning, which must hold the whole header.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn parse(bytes: &[u8], file_bytes: u64) -> Result<Self, GgufError> {
        read::header(bytes, file_bytes)
    }

    /// Puts the parts of one shard together. `tensors` are checked, but for their names being unique.
    ///
    /// # Errors
    /// [`GgufError::Duplicate`] for two tensors of one name.
    pub(super) fn new(
        version: u32,
        alignment: u64,
        metadata: Metadata,
        tensors: Vec<TensorInfo>,
        data_offset: u64,
        file_bytes: u64,
    ) -> Result<Self, GgufError> {
        let mut header = Self {
            version,
            alignment,
            metadata,
            tensors,
            data_offset,
            file_bytes,
            n_shards: 1,
            shard_data_offsets: vec![data_offset],
            by_name: Vec::new(),
        };
        header.index_names()?;
        Ok(header)
    }

    /// Orders the names for [`tensor`](Self::tensor), which also finds those that are there twice.
    pub(super) fn index_names(&mut self) -> Result<(), GgufError> {
        let name = |index: u32| self.tensors[index as usize].name.as_str();
        let mut by_name: Vec<u32> = (0..self.tensors.len() as u32).collect();
        by_name.sort_by_key(|&index| name(index)); // stable: the second stays second
        for pair in by_name.windows(2) {
            if name(pair[0]) == name(pair[1]) {
                let second = &self.tensors[pair[1] as usize];
                return Err(GgufError::Duplicate {
                    field: format!("the tensor `{}` with data", second.name),
                    offset: self.shard_data_offset(second.shard).unwrap_or(0).saturating_add(second.offset),
                });
            }
        }
        self.by_name = by_name;
        Ok(())
    }

    /// `general.architecture`, such as `llama`; empty if the file has none.
    pub fn architecture(&self) -> &str {
        self.metadata.str("general.architecture").ok().flatten().unwrap_or("")
    }

    /// The tensor of this name. Finds nothing reliably once `tensors` was reordered.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        let tensor = |index: u32| self.tensors.get(index as usize).map_or("", |tensor| tensor.name.as_str());
        let position = self.by_name.binary_search_by(|&index| tensor(index).cmp(name)).ok()?;
        self.tensors.get(self.by_name[position] as usize)
    }

    /// The first byte of tensor data in a shard, from 0; `None` past the last shard.
    pub fn shard_data_offset(&self, shard: u16) -> Option<u64> {
        self.shard_data_offsets.get(usize::from(shard)).copied()
    }
}

impl TensorInfo {
    /// Elements; exact, because the reader checked the product.
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product()
    }
}
