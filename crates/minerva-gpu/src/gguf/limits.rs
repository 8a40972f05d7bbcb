//! The most that a header may claim, each with its reason. Real files stay far below; hostile ones do not get further.

/// Bytes of a whole header. The largest real ones (256k tokens with scores and merges) take 15 MB.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;

/// Metadata entries. Real files have fewer than a hundred.
pub const MAX_METADATA_ENTRIES: u64 = 1 << 16;

/// Tensors of all shards together. The largest real models have some thousands.
pub const MAX_TENSORS: u64 = 1 << 17;

/// Bytes of a metadata key, from the format's specification.
pub const MAX_KEY_BYTES: u64 = (1 << 16) - 1;

/// Bytes of one string. The longest in real files, chat templates, have some tens of kilobytes.
pub const MAX_STRING_BYTES: u64 = 16 << 20;

/// Elements of one array: 16 million tokens, or a 16 MB character map.
pub const MAX_ARRAY_ELEMENTS: u64 = 1 << 24;

/// Bytes of a tensor's name: llama.cpp's `GGML_MAX_NAME` less the NUL.
pub const MAX_TENSOR_NAME_BYTES: u64 = 63;

/// Dimensions of a tensor: llama.cpp's `GGML_MAX_DIMS`.
pub const MAX_DIMS: u32 = 4;

/// Alignment of tensor data where a file names none: llama.cpp's `GGUF_DEFAULT_ALIGNMENT`.
pub const DEFAULT_ALIGNMENT: u32 = 32;

/// The largest alignment: one large page of Arm. More only makes holes.
pub const MAX_ALIGNMENT: u32 = 1 << 16;

/// Files of one split set. llama.cpp counts them in 16 bits; the largest real sets have some hundreds.
pub const MAX_SHARDS: u16 = 1024;

/// Layers of a model: llama.cpp's `LLAMA_MAX_LAYERS`, an assertion there.
pub const MAX_LAYERS: u32 = 512;

/// Experts of a layer: llama.cpp's `LLAMA_MAX_EXPERTS`, an assertion there.
pub const MAX_EXPERTS: u32 = 1024;

/// Heads of a layer, a hundred times what the largest models have: llama.cpp multiplies it by head sizes in 32 bits.
pub const MAX_HEADS: u32 = 1 << 14;

/// Elements of one head of keys or values. The largest real ones, of multi-head latent attention, have 576.
pub const MAX_HEAD_ELEMENTS: u32 = 1 << 16;

/// Width of a layer. The largest real ones have 18,432.
pub const MAX_EMBEDDING_LENGTH: u32 = 1 << 20;

/// Tokens of context: llama.cpp counts positions in a signed 32-bit number.
pub const MAX_CONTEXT_TOKENS: u32 = (1 << 31) - 1;

/// Bytes of one token. The longest in real vocabularies, runs of spaces, have some hundreds; llama.cpp's tries recurse once per
/// byte.
pub const MAX_TOKEN_BYTES: usize = 4096;

/// Where weights begin in a mapped file must be a multiple of this: ggml's `TENSOR_ALIGNMENT`, an assertion there.
pub const MAPPED_ALIGNMENT: u64 = 32;
