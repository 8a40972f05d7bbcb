//! A graph on its way to a server, without what the server does not need.
//!
//! llama.cpp sends every tensor that a graph's nodes come from, back to the model's first layer. Where a model is split in many
//! places, as with experts on the host, each piece brings all pieces before it: hundreds of kilobytes a layer, which the server
//! builds anew and never looks at. A tensor that is no node of the graph is an input; where it came from does not matter.
//!
//! Source of the layout: `serialize_graph` and `rpc_tensor` in ggml/src/ggml-rpc/ggml-rpc.cpp at the pin; docs/ffi.md.

use std::collections::{HashMap, HashSet};

use super::protocol::word;

/// `sizeof(rpc_tensor)`.
const TENSOR_BYTES: usize = 296;
/// Offsets in it.
const OP: usize = 52;
const SOURCES: usize = 124;
const VIEW_SOURCE: usize = 204;
/// `GGML_OP_DUP`, for what an earlier graph computed. Not `GGML_OP_NONE`, which stands for weights: kernels that are fused take it
/// that nothing else lies in a weight's place. Nor what it was: some backends look at the sources of some operations.
const COMPUTED: u32 = 1;
/// `GGML_MAX_SRC`.
const N_SOURCES: usize = 10;

/// The payload of a `GRAPH_COMPUTE` with only the nodes, what they read, and what that is a view of. A payload that is not laid out
/// as expected comes back as it is.
pub(super) fn without_history(payload: Vec<u8>) -> Vec<u8> {
    pruned(&payload).unwrap_or(payload)
}

/// `device (4) | n_nodes (4) | ids of nodes | n_tensors (4) | tensors`.
fn pruned(payload: &[u8]) -> Option<Vec<u8>> {
    let n_nodes = count(payload, 4)?;
    let nodes_end = n_nodes.checked_mul(8)?.checked_add(8)?;
    let nodes: HashSet<u64> = ids(payload.get(8..nodes_end)?).collect();
    let n_tensors = count(payload, nodes_end)?;
    let tensors = payload.get(nodes_end + 4..)?;
    if tensors.len() != n_tensors.checked_mul(TENSOR_BYTES)? {
        return None;
    }
    let tensors: HashMap<u64, &[u8]> =
        tensors.chunks_exact(TENSOR_BYTES).filter_map(|tensor| Some((word(tensor, 0)?, tensor))).collect();

    let mut kept = Vec::with_capacity(2 * n_nodes);
    let mut seen = HashSet::with_capacity(2 * n_nodes);
    let mut wanted: Vec<u64> = ids(&payload[8..nodes_end]).collect();
    while let Some(id) = wanted.pop() {
        if id == 0 || !seen.insert(id) {
            continue;
        }
        let tensor = *tensors.get(&id)?;
        wanted.push(word(tensor, VIEW_SOURCE)?);
        if nodes.contains(&id) {
            wanted.extend(ids(&tensor[SOURCES..VIEW_SOURCE]));
        }
        kept.push((id, tensor));
    }

    let mut out = Vec::with_capacity(nodes_end + 4 + kept.len() * TENSOR_BYTES);
    out.extend(&payload[..nodes_end]);
    out.extend(u32::try_from(kept.len()).ok()?.to_ne_bytes());
    for (id, tensor) in kept {
        let start = out.len();
        out.extend(tensor);
        if !nodes.contains(&id) {
            if tensor[OP..OP + 4] != [0; 4] {
                out[start + OP..start + OP + 4].copy_from_slice(&COMPUTED.to_ne_bytes());
            }
            out[start + SOURCES..start + SOURCES + 8 * N_SOURCES].fill(0);
        }
    }
    Some(out)
}

fn count(payload: &[u8], at: usize) -> Option<usize> {
    payload.get(at..)?.first_chunk().and_then(|bytes| usize::try_from(u32::from_ne_bytes(*bytes)).ok())
}

fn ids(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).filter_map(|chunk| word(chunk, 0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A tensor that comes from `sources` by an operation.
    fn tensor(id: u64, sources: &[u64], view_of: u64) -> Vec<u8> {
        let mut bytes = vec![0xee; TENSOR_BYTES];
        bytes[..8].copy_from_slice(&id.to_ne_bytes());
        bytes[SOURCES..VIEW_SOURCE].fill(0);
        for (at, source) in sources.iter().enumerate() {
            bytes[SOURCES + 8 * at..SOURCES + 8 * at + 8].copy_from_slice(&source.to_ne_bytes());
        }
        bytes[VIEW_SOURCE..VIEW_SOURCE + 8].copy_from_slice(&view_of.to_ne_bytes());
        bytes
    }

    fn graph(nodes: &[u64], tensors: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = 3_u32.to_ne_bytes().to_vec();
        bytes.extend(u32::try_from(nodes.len()).unwrap().to_ne_bytes());
        bytes.extend(nodes.iter().flat_map(|id| id.to_ne_bytes()));
        bytes.extend(u32::try_from(tensors.len()).unwrap().to_ne_bytes());
        bytes.extend(tensors.concat());
        bytes
    }

    fn op(payload: &[u8], id: u64) -> u32 {
        let n_nodes = count(payload, 4).unwrap();
        let tensors = payload[12 + 8 * n_nodes..].chunks_exact(TENSOR_BYTES);
        let found = tensors.into_iter().find(|t| word(t, 0) == Some(id)).unwrap();
        u32::from_ne_bytes(*found[OP..].first_chunk().unwrap())
    }

    fn kept(payload: &[u8]) -> Vec<(u64, Vec<u64>)> {
        let n_nodes = count(payload, 4).unwrap();
        let mut kept: Vec<_> = payload[12 + 8 * n_nodes..]
            .chunks_exact(TENSOR_BYTES)
            .map(|t| (word(t, 0).unwrap(), ids(&t[SOURCES..VIEW_SOURCE]).filter(|&id| id != 0).collect()))
            .collect();
        kept.sort();
        kept
    }

    #[test]
    fn inputs_lose_their_past_and_views_keep_what_they_look_at() {
        // 1 -> 2 -> 3 were computed before; 4 = f(3, 10) and 5 = f(4, 7) are computed now; 7 is a view of 6, 6 came from 1.
        let tensors = [
            tensor(1, &[], 0),
            tensor(2, &[1], 0),
            tensor(3, &[2], 0),
            tensor(4, &[3, 10], 0),
            tensor(5, &[4, 7], 0),
            tensor(6, &[1], 0),
            tensor(7, &[6], 6),
            tensor(10, &[], 0),
        ];
        let out = without_history(graph(&[4, 5], &tensors));
        let expected = [(3, vec![]), (4, vec![3, 10]), (5, vec![4, 7]), (6, vec![]), (7, vec![]), (10, vec![])];
        assert_eq!(kept(&out), expected);
        assert_eq!((op(&out, 3), op(&out, 4)), (COMPUTED, 0xeeee_eeee), "3 is no weight, 4 is computed now");
        assert_eq!(out[..24], graph(&[4, 5], &[])[..24], "device and nodes stay");
        assert_eq!(out.len(), 8 + 16 + 4 + 6 * TENSOR_BYTES);
    }

    #[test]
    fn what_is_laid_out_otherwise_goes_on_as_it_is() {
        let whole = graph(&[2], &[tensor(1, &[], 0), tensor(2, &[1], 0)]);
        for bad in [&whole[..whole.len() - 1], &whole[..7], &[], &graph(&[9], &[tensor(1, &[], 0)])[..]] {
            assert_eq!(without_history(bad.to_vec()), bad);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
            without_history(bytes);
        }

        #[test]
        fn every_node_stays_and_nothing_points_nowhere(
            links in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>()), 1..40),
        ) {
            // Each tensor comes from two earlier ones; the last half are nodes.
            let of = |at: usize, index: &prop::sample::Index| if at == 0 { 0 } else { 1 + index.index(at) as u64 };
            let tensors: Vec<Vec<u8>> = links.iter().enumerate().map(|(at, (one, other, is_view))| {
                tensor(at as u64 + 1, &[of(at, one), of(at, other)], if *is_view { of(at, one) } else { 0 })
            }).collect();
            let nodes: Vec<u64> = (links.len() as u64 / 2 + 1..=links.len() as u64).collect();
            let kept = kept(&without_history(graph(&nodes, &tensors)));
            let there: HashSet<u64> = kept.iter().map(|(id, _)| *id).collect();
            prop_assert!(nodes.iter().all(|id| there.contains(id)));
            prop_assert!(kept.iter().flat_map(|(_, sources)| sources).all(|id| there.contains(id)));
            prop_assert!(kept.iter().all(|(id, sources)| nodes.contains(id) || sources.is_empty()));
        }
    }
}
