//! Tensors without data: shape, strides, sources. The arithmetic is ggml's, so that sizes come out the same.

use crate::gguf::GgmlType;

/// A tensor of one [`Graph`](super::Graph).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Id(pub(super) u32);

impl Id {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// What the allocator and the scheduler need to know of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    /// Weights, cache and inputs: nothing computes them.
    Leaf,
    /// Another look at the same memory; nothing runs.
    View,
    /// May write its result over a source of the same layout (`ggml_op_can_inplace`).
    InPlace,
    /// As [`InPlace`](Self::InPlace); its tiny weights never decide where it runs.
    Rope,
    /// Fused attention; its tiny weights never decide where it runs.
    FlashAttention,
    /// A product with a weight matrix.
    MatMul,
    /// A product with the chosen experts of a weight stack.
    ExpertMatMul,
    /// Rows picked from a table.
    GetRows,
    /// Anything else that computes.
    Other,
}

impl Op {
    pub(super) fn can_reuse_a_source(self) -> bool {
        matches!(self, Self::InPlace | Self::Rope)
    }
}

/// Memory that exists before the graph does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Home {
    /// The backend that holds it; the host is the last.
    pub(crate) backend: usize,
    /// Weights attract the operations that use them, cache does not.
    pub(crate) is_weights: bool,
}

/// The most sources that one operation has here (`ggml_ssm_scan` has seven).
const MAX_SOURCES: usize = 7;

/// Sources in order, without a heap allocation per tensor.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sources {
    ids: [Option<Id>; MAX_SOURCES],
    len: usize,
}

impl Sources {
    pub(crate) fn of(ids: &[Id]) -> Self {
        let mut sources = Self::default();
        for &id in ids.iter().take(MAX_SOURCES) {
            sources.push(id);
        }
        sources
    }

    pub(crate) fn push(&mut self, id: Id) {
        if self.len < MAX_SOURCES {
            self.ids[self.len] = Some(id);
            self.len += 1;
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Id> + '_ {
        self.ids[..self.len].iter().filter_map(|id| *id)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn get(&self, index: usize) -> Option<Id> {
        self.ids.get(index).copied().flatten()
    }

    pub(super) fn replace(&mut self, index: usize, id: Id) {
        self.ids[index] = Some(id);
    }
}

/// Elements per dimension, the fastest first.
pub(crate) type Shape = [u64; 4];

/// One tensor.
#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) ggml_type: GgmlType,
    pub(crate) shape: Shape,
    /// Bytes from one element to the next in each dimension.
    pub(crate) strides: Shape,
    pub(crate) op: Op,
    pub(crate) sources: Sources,
    /// The tensor whose memory this one shows.
    pub(crate) view_of: Option<Id>,
    pub(crate) home: Option<Home>,
    /// The backend that llama.cpp's graph callback asks for.
    pub(crate) pinned: Option<usize>,
    pub(crate) is_input: bool,
    pub(crate) is_output: bool,
}

impl Tensor {
    /// A contiguous tensor that nothing computes.
    pub(crate) fn leaf(ggml_type: GgmlType, shape: Shape) -> Self {
        Self {
            ggml_type,
            shape,
            strides: contiguous_strides(ggml_type, shape),
            op: Op::Leaf,
            sources: Sources::default(),
            view_of: None,
            home: None,
            pinned: None,
            is_input: false,
            is_output: false,
        }
    }

    pub(crate) fn elements(&self) -> u64 {
        self.shape.iter().fold(1, |product: u64, &n| product.saturating_mul(n))
    }

    /// Rows: all dimensions but the first.
    pub(crate) fn rows(&self) -> u64 {
        self.shape[1..].iter().fold(1, |product: u64, &n| product.saturating_mul(n))
    }

    /// Bytes from the first element to the end of the last (`ggml_nbytes`).
    pub(crate) fn bytes(&self) -> u64 {
        if self.shape.contains(&0) {
            return 0;
        }
        let block = self.ggml_type.block_elements();
        let (first, skip) = if block == 1 {
            (self.ggml_type.block_bytes(), 0)
        } else {
            (self.shape[0].saturating_mul(self.strides[0]) / block, 1)
        };
        self.shape
            .iter()
            .zip(self.strides)
            .skip(skip)
            .fold(first, |bytes, (&n, stride)| bytes.saturating_add((n - 1).saturating_mul(stride)))
    }

    pub(super) fn same_layout(&self, other: &Self) -> bool {
        self.ggml_type == other.ggml_type && self.shape == other.shape && self.strides == other.strides
    }

    pub(crate) fn is_contiguous(&self) -> bool {
        self.strides == contiguous_strides(self.ggml_type, self.shape)
    }
}

/// Bytes of `n` elements in a row.
pub(crate) fn row_bytes(ggml_type: GgmlType, n: u64) -> u64 {
    n.saturating_mul(ggml_type.block_bytes()) / ggml_type.block_elements()
}

fn contiguous_strides(ggml_type: GgmlType, shape: Shape) -> Shape {
    let element = ggml_type.block_bytes();
    let row = row_bytes(ggml_type, shape[0]);
    let plane = row.saturating_mul(shape[1]);
    [element, row, plane, plane.saturating_mul(shape[2])]
}
