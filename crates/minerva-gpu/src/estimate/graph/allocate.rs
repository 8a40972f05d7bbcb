//! ggml's graph allocator: every tensor gets the smallest hole that fits, and gives it back after its last use.
//!
//! Source: ggml-alloc.c at the pinned release. A hole at the end of memory is used last; operations that may write over a
//! source of the same layout do so when they are its last user.

use super::tensor::{Id, Op};
use super::{Graph, schedule::Backend};

/// One entry of the order of execution that the scheduler wrote down.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    pub(super) tensor: Id,
    pub(super) backend: usize,
}

/// Bytes that each backend needs to run `steps`; `leafs` are allocated first.
pub(super) fn peak_bytes(graph: &Graph, leafs: &[Step], steps: &[Step], backends: &[Backend]) -> Vec<u64> {
    let mut run = Run {
        graph,
        state: vec![State::default(); graph.tensors.len()],
        memory: backends.iter().map(|backend| Memory::new(backend.alignment)).collect(),
    };
    for &leaf in leafs {
        run.allocate(leaf);
    }
    run.count_uses(steps);
    for &step in steps {
        run.execute(step);
    }
    run.memory.iter().map(|memory| memory.peak).collect()
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    children: i64,
    views: i64,
    /// Where it lies; only meaningful while `allocated`.
    backend: usize,
    offset: u64,
    allocated: bool,
}

struct Run<'a> {
    graph: &'a Graph,
    state: Vec<State>,
    memory: Vec<Memory>,
}

impl Run<'_> {
    fn count_uses(&mut self, steps: &[Step]) {
        for &step in steps {
            let tensor = self.graph.get(step.tensor);
            if let (Some(target), true) = (tensor.view_of, tensor.op != Op::Leaf) {
                self.state[target.index()].views += 1;
            }
            if tensor.is_input {
                self.allocate(step);
            }
            for source in tensor.sources.iter() {
                self.state[source.index()].children += 1;
                if self.graph.get(source).is_input {
                    self.allocate(Step { tensor: source, ..step });
                }
            }
        }
    }

    fn execute(&mut self, step: Step) {
        let sources = self.graph.get(step.tensor).sources;
        for source in sources.iter() {
            self.allocate(Step { tensor: source, ..step });
        }
        self.allocate(step);
        for source in sources.iter() {
            self.release_one_use(source);
        }
    }

    fn release_one_use(&mut self, id: Id) {
        let state = &mut self.state[id.index()];
        state.children -= 1;
        if state.children != 0 || state.views != 0 {
            return;
        }
        match self.graph.get(id).view_of {
            Some(target) => {
                let target_state = &mut self.state[target.index()];
                target_state.views -= 1;
                if target_state.views == 0 && target_state.children == 0 && target_state.allocated {
                    self.free(target);
                }
            }
            None if state.allocated => self.free(id),
            None => {}
        }
    }

    fn allocate(&mut self, Step { tensor: id, backend }: Step) {
        let tensor = self.graph.get(id);
        if tensor.home.is_some() || tensor.view_of.is_some() || self.state[id.index()].allocated {
            return;
        }
        self.state[id.index()].allocated = true;
        if tensor.op.can_reuse_a_source() && self.reuse_a_source(id) {
            return;
        }
        let offset = self.memory[backend].allocate(tensor.bytes());
        let state = &mut self.state[id.index()];
        state.backend = backend;
        state.offset = offset;
    }

    /// Views are never reused: ggml marks only tensors that it gave memory to as its own.
    fn reuse_a_source(&mut self, id: Id) -> bool {
        let tensor = self.graph.get(id);
        let reusable = tensor.sources.iter().find(|source| {
            let (parent, uses) = (self.graph.get(*source), self.state[source.index()]);
            uses.allocated && !parent.is_output && tensor.same_layout(parent) && uses.children == 1 && uses.views == 0
        });
        reusable.inspect(|&source| self.take_over(id, source)).is_some()
    }

    fn take_over(&mut self, id: Id, from: Id) {
        let State { backend, offset, .. } = self.state[from.index()];
        self.state[from.index()].allocated = false;
        let state = &mut self.state[id.index()];
        state.backend = backend;
        state.offset = offset;
        let memory = &mut self.memory[backend];
        let (old, new) = (memory.padded(self.graph.get(from).bytes()), memory.padded(self.graph.get(id).bytes()));
        if old > new {
            memory.free(offset + new, old - new);
        }
    }

    fn free(&mut self, id: Id) {
        let tensor = self.graph.get(id);
        if tensor.is_output {
            return;
        }
        let state = &mut self.state[id.index()];
        state.allocated = false;
        let memory = &mut self.memory[state.backend];
        memory.free(state.offset, memory.padded(tensor.bytes()));
    }
}

#[derive(Debug, Clone, Copy)]
struct Hole {
    offset: u64,
    bytes: u64,
}

/// One backend's memory: holes in the order of their addresses, the last of them without end.
#[derive(Debug)]
struct Memory {
    alignment: u64,
    holes: Vec<Hole>,
    peak: u64,
}

impl Memory {
    fn new(alignment: u64) -> Self {
        Self { alignment, holes: vec![Hole { offset: 0, bytes: u64::MAX / 2 }], peak: 0 }
    }

    fn padded(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.alignment).saturating_mul(self.alignment)
    }

    fn allocate(&mut self, bytes: u64) -> u64 {
        let bytes = self.padded(bytes);
        let last = self.holes.len() - 1;
        let mut best = last;
        for (index, hole) in self.holes[..last].iter().enumerate() {
            // Of equal holes the later one, as ggml's `<=` takes it.
            if hole.bytes >= bytes && (best == last || hole.bytes <= self.holes[best].bytes) {
                best = index;
            }
        }
        let hole = &mut self.holes[best];
        let offset = hole.offset;
        hole.offset = hole.offset.saturating_add(bytes);
        hole.bytes = hole.bytes.saturating_sub(bytes);
        if hole.bytes == 0 && best != last {
            self.holes.remove(best);
        }
        self.peak = self.peak.max(offset.saturating_add(bytes));
        offset
    }

    /// Joins the first neighbour in the list, as ggml does: with empty tensors in play there may be more than one.
    fn free(&mut self, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes);
        for index in 0..self.holes.len() {
            let hole = self.holes[index];
            if hole.offset + hole.bytes == offset {
                self.holes[index].bytes += bytes;
                self.join(index);
                return;
            }
            if hole.offset == end {
                self.holes[index] = Hole { offset, bytes: hole.bytes.saturating_add(bytes) };
                if index > 0 {
                    self.join(index - 1);
                }
                return;
            }
        }
        let position = self.holes.partition_point(|hole| hole.offset < offset);
        self.holes.insert(position, Hole { offset, bytes });
    }

    /// Makes one of two neighbouring holes if they touch.
    fn join(&mut self, index: usize) {
        let Some(&next) = self.holes.get(index + 1) else { return };
        let hole = &mut self.holes[index];
        if hole.offset + hole.bytes == next.offset {
            hole.bytes = hole.bytes.saturating_add(next.bytes);
            self.holes.remove(index + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Memory;

    proptest! {
        #[test]
        fn live_tensors_never_overlap_and_all_that_is_freed_joins_again(
            sizes in prop::collection::vec(1_u64..5_000, 1..60),
            picks in prop::collection::vec(any::<u32>(), 60),
        ) {
            let mut memory = Memory::new(32);
            let mut live: Vec<(u64, u64)> = Vec::new();
            for (size, pick) in sizes.into_iter().zip(picks) {
                let offset = memory.allocate(size);
                let bytes = memory.padded(size);
                prop_assert!(live.iter().all(|&(other, n)| offset + bytes <= other || other + n <= offset));
                prop_assert!(offset + bytes <= memory.peak && offset.is_multiple_of(32));
                live.push((offset, bytes));
                if pick % 3 == 0 {
                    let (offset, bytes) = live.swap_remove(pick as usize % live.len());
                    memory.free(offset, bytes);
                }
            }
            for (offset, bytes) in live {
                memory.free(offset, bytes);
            }
            prop_assert_eq!(memory.holes.len(), 1);
            prop_assert_eq!(memory.holes[0].offset, 0);
        }
    }

    #[test]
    fn the_smallest_hole_that_fits_is_taken_and_the_end_last() {
        let mut memory = Memory::new(1);
        let offsets: Vec<u64> = [100, 1, 50, 1].map(|bytes| memory.allocate(bytes)).to_vec();
        memory.free(offsets[0], 100);
        memory.free(offsets[2], 50);
        assert_eq!(memory.allocate(40), offsets[2]);
        assert_eq!(memory.allocate(60), offsets[0]);
        assert_eq!(memory.allocate(200), 152);
        assert_eq!(memory.peak, 352);
    }
}
