//! ggml's operations, as far as shapes go. Names and argument order are ggml's.

use super::tensor::{Id, Op, Shape, Sources, Tensor, row_bytes};
use super::{Graph, Home};
use crate::gguf::GgmlType;

impl Graph {
    /// Memory that exists: a weight or a cache.
    pub(crate) fn external(&mut self, ggml_type: GgmlType, shape: Shape, home: Home) -> Id {
        self.add(Tensor { home: Some(home), ..Tensor::leaf(ggml_type, shape) })
    }

    /// What the host writes before each step.
    pub(crate) fn input(&mut self, ggml_type: GgmlType, shape: Shape) -> Id {
        self.add(Tensor { is_input: true, ..Tensor::leaf(ggml_type, shape) })
    }

    pub(crate) fn shape(&self, id: Id) -> Shape {
        self.get(id).shape
    }

    /// A result of its own.
    pub(crate) fn result(&mut self, op: Op, ggml_type: GgmlType, shape: Shape, sources: &[Id]) -> Id {
        self.add(Tensor { op, sources: Sources::of(sources), ..Tensor::leaf(ggml_type, shape) })
    }

    /// A result shaped as `a`, which it may overwrite.
    pub(crate) fn in_place(&mut self, a: Id, more: &[Id]) -> Id {
        self.like(Op::InPlace, a, more)
    }

    /// A result shaped as `a`.
    pub(crate) fn like(&mut self, op: Op, a: Id, more: &[Id]) -> Id {
        let (ggml_type, shape) = (self.get(a).ggml_type, self.get(a).shape);
        let mut sources = Sources::of(&[a]);
        for &id in more {
            sources.push(id);
        }
        self.add(Tensor { op, sources, ..Tensor::leaf(ggml_type, shape) })
    }

    fn view(&mut self, a: Id, shape: Shape, strides: Shape) -> Id {
        let source = self.get(a);
        let view_of = Some(source.view_of.unwrap_or(a));
        let ggml_type = source.ggml_type;
        let sources = Sources::of(&[a]);
        self.add(Tensor { op: Op::View, sources, view_of, strides, ..Tensor::leaf(ggml_type, shape) })
    }

    pub(crate) fn reshape(&mut self, a: Id, shape: Shape) -> Id {
        let strides = Tensor::leaf(self.get(a).ggml_type, shape).strides;
        self.view(a, shape, strides)
    }

    pub(crate) fn view_1d(&mut self, a: Id, n: u64) -> Id {
        self.reshape(a, [n, 1, 1, 1])
    }

    pub(crate) fn view_2d(&mut self, a: Id, shape: [u64; 2], stride: u64) -> Id {
        let plane = stride.saturating_mul(shape[1]);
        let element = self.get(a).ggml_type.block_bytes();
        self.view(a, [shape[0], shape[1], 1, 1], [element, stride, plane, plane])
    }

    pub(crate) fn view_3d(&mut self, a: Id, shape: [u64; 3], strides: [u64; 2]) -> Id {
        let last = strides[1].saturating_mul(shape[2]);
        let element = self.get(a).ggml_type.block_bytes();
        self.view(a, [shape[0], shape[1], shape[2], 1], [element, strides[0], strides[1], last])
    }

    pub(crate) fn view_4d(&mut self, a: Id, shape: Shape, strides: [u64; 3]) -> Id {
        let element = self.get(a).ggml_type.block_bytes();
        self.view(a, shape, [element, strides[0], strides[1], strides[2]])
    }

    /// Dimension `i` of `a` becomes dimension `axes[i]`.
    pub(crate) fn permute(&mut self, a: Id, axes: [usize; 4]) -> Id {
        let source = self.get(a);
        let (mut shape, mut strides) = ([0; 4], [0; 4]);
        for (from, &to) in axes.iter().enumerate() {
            shape[to] = source.shape[from];
            strides[to] = source.strides[from];
        }
        self.view(a, shape, strides)
    }

    pub(crate) fn transpose(&mut self, a: Id) -> Id {
        self.permute(a, [1, 0, 2, 3])
    }

    /// A contiguous copy with the shape `shape`.
    pub(crate) fn cont(&mut self, a: Id, shape: Shape) -> Id {
        let ggml_type = self.get(a).ggml_type;
        self.result(Op::Other, ggml_type, shape, &[a])
    }

    pub(crate) fn cast(&mut self, a: Id, ggml_type: GgmlType) -> Id {
        let shape = self.shape(a);
        self.result(Op::Other, ggml_type, shape, &[a])
    }

    pub(crate) fn mul_mat(&mut self, a: Id, b: Id) -> Id {
        let (rows, [_, columns, planes, cubes]) = (self.shape(a)[1], self.shape(b));
        self.result(Op::MatMul, GgmlType::F32, [rows, columns, planes, cubes], &[a, b])
    }

    pub(crate) fn mul_mat_id(&mut self, experts: Id, b: Id, ids: Id) -> Id {
        let shape = [self.shape(experts)[1], self.shape(ids)[0], self.shape(b)[2], 1];
        self.result(Op::ExpertMatMul, GgmlType::F32, shape, &[experts, b, ids])
    }

    pub(crate) fn get_rows(&mut self, a: Id, ids: Id) -> Id {
        let (row, [n0, n1, n2, _]) = (self.shape(a)[0], self.shape(ids));
        let ggml_type = if self.get(a).ggml_type == GgmlType::I32 { GgmlType::I32 } else { GgmlType::F32 };
        self.result(Op::GetRows, ggml_type, [row, n0, n1, n2], &[a, ids])
    }

    /// Writes rows into `a`; the result is `a` itself.
    pub(crate) fn set_rows(&mut self, a: Id, rows: Id, ids: Id) -> Id {
        self.write_into(a, &[rows, ids, a])
    }

    /// Copies `a` into `b`; the result is `b` itself.
    pub(crate) fn cpy(&mut self, a: Id, b: Id) -> Id {
        self.write_into(b, &[a, b])
    }

    pub(crate) fn scale_in_place(&mut self, a: Id) -> Id {
        self.write_into(a, &[a])
    }

    /// An operation that computes and whose result is a view.
    fn write_into(&mut self, a: Id, sources: &[Id]) -> Id {
        let target = self.get(a);
        let tensor = Tensor {
            op: Op::Other,
            sources: Sources::of(sources),
            view_of: Some(target.view_of.unwrap_or(a)),
            home: None,
            is_input: false,
            is_output: false,
            pinned: None,
            ..target.clone()
        };
        self.add(tensor)
    }

    /// `a` and `b` one behind the other in the first dimension.
    pub(crate) fn concat(&mut self, a: Id, b: Id) -> Id {
        let [n0, n1, n2, n3] = self.shape(a);
        let shape = [n0 + self.shape(b)[0], n1, n2, n3];
        let ggml_type = self.get(a).ggml_type;
        self.result(Op::Other, ggml_type, shape, &[a, b])
    }

    pub(crate) fn sum_rows(&mut self, a: Id) -> Id {
        let [_, n1, n2, n3] = self.shape(a);
        self.result(Op::Other, GgmlType::F32, [1, n1, n2, n3], &[a])
    }

    /// The indices of the `k` largest of each row.
    pub(crate) fn top_k(&mut self, a: Id, k: u64) -> Id {
        let shape = self.shape(a);
        let sorted = self.result(Op::Other, GgmlType::I32, shape, &[a]);
        let strides = self.get(sorted).strides;
        self.view_4d(sorted, [k, shape[1], shape[2], shape[3]], [strides[1], strides[2], strides[3]])
    }

    pub(crate) fn rope(&mut self, a: Id, positions: Id, factors: Option<Id>) -> Id {
        let more: Vec<Id> = std::iter::once(positions).chain(factors).collect();
        self.like(Op::Rope, a, &more)
    }

    /// Bytes of `n` elements of `a`'s type.
    pub(crate) fn row_bytes_of(&self, a: Id, n: u64) -> u64 {
        row_bytes(self.get(a).ggml_type, n)
    }
}
