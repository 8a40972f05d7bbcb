//! ggml's backend scheduler: where each operation runs, and what is copied between devices.
//!
//! Source: `ggml_backend_sched_split_graph` in ggml-backend.cpp at the pinned release, for backends that support every
//! operation of a graph. Weights attract operations, devices spread from there in both directions, the host takes the rest.

use super::Graph;
use super::allocate::{Step, peak_bytes};
use super::tensor::{Id, Op, Sources, Tensor};

/// A device as the scheduler sees it. The host is the last of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Backend {
    /// Bytes that every allocation is rounded up to.
    pub(crate) alignment: u64,
    /// From this many tokens on the device fetches weights from the host to compute with them (CUDA: 32).
    pub(crate) offload_from_tokens: Option<u64>,
}

/// Copies of every input while several devices work on different steps at once (`GGML_SCHED_MAX_COPIES`).
const PIPELINE_COPIES: usize = 4;

/// Bytes that each backend needs for scratch to run `graph`; with `pipelined`, several steps of it at once.
pub(crate) fn reserve(mut graph: Graph, backends: &[Backend], pipelined: bool) -> Vec<u64> {
    let mut schedule =
        Schedule { places: vec![None; graph.tensors.len()], backends, host: backends.len() - 1, pipelined };
    schedule.place_by_memory(&graph);
    schedule.spread(&graph, true);
    schedule.spread(&graph, false);
    schedule.place_the_rest(&graph);
    let splits = schedule.split(&mut graph);
    let steps = schedule.steps(&mut graph, &splits);
    let mut leafs = schedule.pipeline_leafs(&mut graph, &splits);
    leafs.extend(graph.leafs.iter().map(|&tensor| schedule.step(tensor)));
    peak_bytes(&graph, &leafs, &steps, backends)
}

/// Operations that run on one backend without a break, and what is copied there first.
struct Split {
    backend: usize,
    first_node: usize,
    /// The tensor elsewhere and its copy here.
    inputs: Vec<(Id, Id)>,
}

struct Schedule<'a> {
    places: Vec<Option<usize>>,
    backends: &'a [Backend],
    host: usize,
    pipelined: bool,
}

impl Schedule<'_> {
    fn place(&self, id: Id) -> Option<usize> {
        self.places[id.index()]
    }

    /// After [`place_the_rest`](Self::place_the_rest) every tensor has a place.
    fn step(&self, tensor: Id) -> Step {
        Step { tensor, backend: self.place(tensor).unwrap_or(self.host) }
    }

    /// Pass 1: what lies somewhere already stays there, and operations go to their weights.
    fn place_by_memory(&mut self, graph: &Graph) {
        for &id in graph.leafs.iter().chain(&graph.nodes) {
            let tensor = graph.get(id);
            self.places[id.index()] = tensor.pinned.or_else(|| self.place_from_memory(graph, tensor));
        }
    }

    fn place_from_memory(&self, graph: &Graph, tensor: &Tensor) -> Option<usize> {
        let memory = tensor.view_of.map_or(tensor, |target| graph.get(target));
        if let Some(home) = memory.home {
            return Some(home.backend);
        }
        if tensor.is_input {
            return Some(self.host);
        }
        if matches!(tensor.op, Op::Rope | Op::FlashAttention) {
            return None;
        }
        let weights = tensor.sources.iter().find_map(|source| graph.get(source).home.filter(|home| home.is_weights))?;
        if weights.backend == self.host {
            let n_tokens = tokens_at_once(tensor);
            let fetches = |backend: &Backend| backend.offload_from_tokens.is_some_and(|from| n_tokens >= from);
            return Some(self.backends[..self.host].iter().position(fetches).unwrap_or(self.host));
        }
        Some(weights.backend)
    }

    /// Pass 2: neighbours without a place follow, down and then up; first along the devices only.
    fn spread(&mut self, graph: &Graph, devices_only: bool) {
        let nodes = || graph.nodes.iter().filter(|id| graph.get(**id).op != Op::View);
        self.spread_along(nodes(), devices_only);
        self.spread_along(nodes().rev(), devices_only);
    }

    fn spread_along<'g>(&mut self, nodes: impl Iterator<Item = &'g Id>, devices_only: bool) {
        let mut current = None;
        for id in nodes {
            match self.place(*id) {
                Some(place) if devices_only && place == self.host => current = None,
                Some(place) => current = Some(place),
                None => self.places[id.index()] = current,
            }
        }
    }

    /// Pass 4: views go where their memory is, sources where they are used.
    fn place_the_rest(&mut self, graph: &Graph) {
        for &id in &graph.nodes {
            let tensor = graph.get(id);
            if let (Some(target), None) = (tensor.view_of, self.place(id)) {
                self.places[id.index()] = self.place(target);
            }
            for source in
                tensor.sources.iter().filter(|source| self.places[source.index()].is_none()).collect::<Vec<_>>()
            {
                let from = graph.get(source).view_of.map_or(self.place(id), |target| self.place(target));
                self.places[source.index()] = from;
            }
            if self.place(id).is_none() {
                self.places[id.index()] = Some(0);
            }
        }
    }

    /// Pass 5: cuts the graph where the backend changes, and puts copies in place of sources that lie elsewhere.
    fn split(&mut self, graph: &mut Graph) -> Vec<Split> {
        let mut splits: Vec<Split> = Vec::new();
        let mut copies = std::collections::HashMap::new();
        for index in 0..graph.nodes.len() {
            let id = graph.nodes[index];
            if graph.get(id).op == Op::View {
                continue;
            }
            let backend = self.step(id).backend;
            let starts = splits.last().is_none_or(|split| {
                split.backend != backend || (!split.inputs.is_empty() && uses_weights_of_another(graph, id, backend))
            });
            if starts {
                let first_node = if splits.is_empty() { 0 } else { index };
                splits.push(Split { backend, first_node, inputs: Vec::new() });
            }
            let Some(split) = splits.last_mut() else { continue };
            for position in 0..graph.get(id).sources.len() {
                let Some(source) = graph.get(id).sources.get(position) else { continue };
                if self.lies_on(graph, source, backend) {
                    continue;
                }
                let copy = *copies.entry((source, backend)).or_insert_with(|| {
                    let copy = self.add_copy(graph, source, backend);
                    split.inputs.push((source, copy));
                    copy
                });
                graph.get_mut(id).sources.replace(position, copy);
            }
        }
        splits
    }

    fn lies_on(&self, graph: &Graph, source: Id, backend: usize) -> bool {
        let tensor = graph.get(source);
        let memory = tensor.view_of.map_or(tensor, |target| graph.get(target));
        let place = memory.home.map(|home| home.backend).or(self.place(source));
        place == Some(backend)
    }

    fn add_copy(&mut self, graph: &mut Graph, source: Id, backend: usize) -> Id {
        let tensor = graph.get(source);
        // In a pipeline nothing may overwrite a copy before its step is done.
        let copy = Tensor {
            strides: tensor.strides,
            is_input: self.pipelined,
            is_output: self.pipelined,
            ..Tensor::leaf(tensor.ggml_type, tensor.shape)
        };
        self.places.push(Some(backend));
        graph.add(copy)
    }

    /// In a pipeline every input, and every copy at the start of a split, exists once per step in flight.
    fn pipeline_leafs(&mut self, graph: &mut Graph, splits: &[Split]) -> Vec<Step> {
        let mut leafs = Vec::new();
        if !self.pipelined {
            return leafs;
        }
        let inputs: Vec<Id> = graph.leafs.iter().copied().filter(|&id| graph.get(id).is_input).collect();
        let copies = splits.iter().flat_map(|split| split.inputs.iter().map(|&(_, copy)| copy));
        for first in inputs.into_iter().chain(copies) {
            graph.get_mut(first).is_output = true;
            leafs.push(self.step(first));
            let backend = self.step(first).backend;
            for _ in 1..PIPELINE_COPIES {
                let copy = self.add_copy(graph, first, backend);
                leafs.push(self.step(copy));
            }
        }
        leafs
    }

    /// The order of execution with the copies in it: each keeps its original alive until it is made.
    fn steps(&mut self, graph: &mut Graph, splits: &[Split]) -> Vec<Step> {
        let mut steps = Vec::with_capacity(graph.nodes.len() + splits.len() * 8);
        for (number, split) in splits.iter().enumerate() {
            for &(source, copy) in &split.inputs {
                let dependency = self.add_dependency(graph, source);
                steps.push(self.step(dependency));
                steps.push(Step { tensor: copy, backend: split.backend });
            }
            let end = splits.get(number + 1).map_or(graph.nodes.len(), |next| next.first_node);
            steps.extend(graph.nodes[split.first_node..end].iter().map(|&id| self.step(id)));
        }
        steps
    }

    /// A view that nothing computes and that only uses `source`.
    fn add_dependency(&mut self, graph: &mut Graph, source: Id) -> Id {
        let tensor = graph.get(source);
        let view = Tensor {
            op: Op::Leaf,
            sources: Sources::of(&[source]),
            view_of: Some(tensor.view_of.unwrap_or(source)),
            home: None,
            is_input: false,
            is_output: false,
            pinned: None,
            ..tensor.clone()
        };
        self.places.push(self.place(source));
        graph.add(view)
    }
}

/// Rows that an operation works on at once, as CUDA counts them when it decides whether fetching weights pays.
fn tokens_at_once(tensor: &Tensor) -> u64 {
    match tensor.op {
        Op::GetRows => 0,
        Op::MatMul => tensor.shape[1],
        Op::ExpertMatMul => tensor.shape[2],
        _ => tensor.rows(),
    }
}

/// A new split frees the weights that the one before it had fetched.
fn uses_weights_of_another(graph: &Graph, id: Id, backend: usize) -> bool {
    let is_elsewhere =
        |source: Id| graph.get(source).home.is_some_and(|home| home.is_weights && home.backend != backend);
    graph.get(id).sources.iter().any(is_elsewhere)
}
