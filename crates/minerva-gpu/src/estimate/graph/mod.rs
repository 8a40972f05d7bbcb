//! llama.cpp's compute graph, built from a header: which tensors a step needs, in which order, and for how long.
//!
//! [`Graph`] is a ggml graph without data; [`build`] writes down the steps of a model as llama.cpp does; [`schedule`] cuts
//! the graph between devices and [`allocate`] packs it into memory, both with ggml's rules. The sizes that come out are those
//! that llama.cpp reserves.

mod allocate;
pub(super) mod build;
mod ops;
mod schedule;
mod tensor;

pub(crate) use schedule::{Backend, reserve};
pub(crate) use tensor::row_bytes;
pub(super) use tensor::{Home, Id, Op, Tensor};

/// Tensors, and the order in which they are computed.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    tensors: Vec<Tensor>,
    /// Computed tensors and views, in order.
    nodes: Vec<Id>,
    /// Tensors that nothing computes, in the order of their first use.
    leafs: Vec<Id>,
    visited: Vec<bool>,
}

impl Graph {
    pub(crate) fn add(&mut self, tensor: Tensor) -> Id {
        let id = Id(u32::try_from(self.tensors.len()).unwrap_or(u32::MAX));
        self.tensors.push(tensor);
        self.visited.push(false);
        id
    }

    pub(crate) fn get(&self, id: Id) -> &Tensor {
        &self.tensors[id.index()]
    }

    pub(crate) fn get_mut(&mut self, id: Id) -> &mut Tensor {
        &mut self.tensors[id.index()]
    }

    /// Puts `root` and everything that it needs behind what is already in the graph: sources first, from left to right
    /// (`ggml_build_forward_expand`). With a stack of its own, since a file decides how deep the graph is.
    pub(crate) fn expand(&mut self, root: Id) {
        if self.visited[root.index()] {
            return;
        }
        self.visited[root.index()] = true;
        let mut stack = vec![(root, 0)];
        while let Some((id, next)) = stack.pop() {
            match self.tensors[id.index()].sources.get(next) {
                Some(source) => {
                    stack.push((id, next + 1));
                    if !self.visited[source.index()] {
                        self.visited[source.index()] = true;
                        stack.push((source, 0));
                    }
                }
                None if self.tensors[id.index()].op == Op::Leaf => self.leafs.push(id),
                None => self.nodes.push(id),
            }
        }
    }
}
