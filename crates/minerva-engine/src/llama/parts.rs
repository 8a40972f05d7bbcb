//! Steps of models with a sliding window, one physical batch after the other.
//!
//! llama.cpp plans all physical batches of a step before it computes the first (`llama_kv_cache::prepare`). A later one may take cells that
//! are outside its own window, and what was before them in the sequence is given up for good: cells that an earlier one still attends to,
//! where cells are not in the order of positions (after a sequence was restored, or in a pool that all sequences share). So no step has
//! rows of one sequence in two physical batches, and in a pool no step has two.

use minerva_llama::Context;

use super::backend::LlamaBackend;
use crate::backend::{HeadBackend as _, Row, SeqId, StepError};

/// Divides steps, and keeps the scores of the parts of one that was divided.
#[derive(Debug)]
pub(super) struct Parts {
    is_pool: bool,
    n_ubatch: usize,
    n_vocab: usize,
    /// Where the scores of each row of the step begin; empty for a step that was not divided.
    begins: Vec<Option<usize>>,
    scores: Vec<f32>,
}

impl Parts {
    /// `None` where every cell within a window's reach stays, whatever the order.
    pub(super) fn of(context: &Context) -> Option<Self> {
        let keeps_all = context.keeps_beginnings() && !context.kv_unified();
        // Of a hybrid llama.cpp gives equally many rows to every sequence of a physical batch, also in a pool.
        let is_pool = context.kv_unified() && !context.model().is_recurrent();
        (context.model().n_window_tokens() > 0 && !keeps_all).then(|| Self {
            is_pool,
            n_ubatch: context.n_ubatch() as usize,
            n_vocab: context.model().n_vocab(),
            begins: Vec::new(),
            scores: Vec::new(),
        })
    }

    pub(super) fn is_in_use(&self) -> bool {
        !self.begins.is_empty()
    }

    pub(super) fn logits(&self, row: usize) -> Option<&[f32]> {
        let begin = (*self.begins.get(row)?)?;
        self.scores.get(begin..begin + self.n_vocab)
    }

    /// Computes a step. After a failure some of its parts may be in the cache.
    pub(super) fn decode(&mut self, backend: &mut LlamaBackend, rows: &[Row]) -> Result<(), StepError> {
        self.begins.clear();
        self.scores.clear();
        let parts = divided(rows, self.n_ubatch, self.is_pool);
        if parts.len() < 2 {
            return backend.decode_after(rows, &[]);
        }
        self.begins.resize(rows.len(), None);
        for (n_done, part) in parts.iter().enumerate() {
            let of_part: Vec<Row> = part.iter().map(|&at| rows[at]).collect();
            backend
                .decode_after(&of_part, &[])
                .map_err(|error| StepError { cache_unchanged: error.cache_unchanged && n_done == 0, ..error })?;
            for (row, &at) in part.iter().enumerate().filter(|&(_, &at)| rows[at].output) {
                if let Some(scores) = backend.scores(row) {
                    self.begins[at] = Some(self.scores.len());
                    self.scores.extend_from_slice(scores);
                }
            }
        }
        Ok(())
    }
}

/// The rows of each part, as places in the step. Rows of one sequence stay in order.
fn divided(rows: &[Row], n_ubatch: usize, is_pool: bool) -> Vec<Vec<usize>> {
    let all: Vec<usize> = (0..rows.len()).collect();
    if is_pool {
        return all.chunks(n_ubatch).map(<[usize]>::to_vec).collect();
    }
    let mut of_seq: Vec<(SeqId, Vec<usize>)> = Vec::new();
    for (at, row) in rows.iter().enumerate() {
        match of_seq.iter_mut().find(|(seq, _)| *seq == row.seq) {
            Some((_, places)) => places.push(at),
            None => of_seq.push((row.seq, vec![at])),
        }
    }
    // llama.cpp gives as many rows to every sequence of a physical batch: those with equally many go together.
    of_seq.sort_by_key(|(_, places)| places.len());
    let mut parts: Vec<Vec<usize>> = Vec::new();
    let mut n_each = 0;
    for (_, places) in of_seq {
        for piece in places.chunks(n_ubatch) {
            match parts.last_mut().filter(|part| n_each == piece.len() && part.len() + piece.len() <= n_ubatch) {
                Some(part) => part.extend_from_slice(piece),
                None => parts.push(piece.to_vec()),
            }
            n_each = if places.len() > n_ubatch { 0 } else { piece.len() };
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rows(counts: &[usize]) -> Vec<Row> {
        let rows = (0..).zip(counts).flat_map(|(seq, &n)| {
            (0..n as u32).map(move |pos| Row { seq, token: 1, pos, output: pos as usize + 1 == n })
        });
        rows.collect()
    }

    #[test]
    fn sequences_with_equally_many_rows_go_together() {
        let parts =
            |counts: &[usize]| -> Vec<usize> { divided(&rows(counts), 64, false).iter().map(Vec::len).collect() };
        assert_eq!(parts(&[1, 1, 1]), [3]);
        assert_eq!(parts(&[1, 60, 1]), [2, 60]);
        assert_eq!(parts(&[30, 30, 30]), [60, 30]);
        assert_eq!(parts(&[130]), [64, 64, 2]);
        assert_eq!(divided(&rows(&[40, 40]), 64, true).len(), 2);
    }

    proptest! {
        #[test]
        fn every_row_is_in_one_part_and_no_part_is_too_large(
            counts in prop::collection::vec(0_usize..200, 1..6),
            n_ubatch in 1_usize..80,
            is_pool: bool,
        ) {
            let rows = rows(&counts);
            let parts = divided(&rows, n_ubatch, is_pool);
            let mut all: Vec<usize> = parts.concat();
            for (seq, n) in (0..).zip(&counts) {
                let of_seq: Vec<u32> = all.iter().map(|&at| rows[at]).filter(|row| row.seq == seq).map(|row| row.pos).collect();
                prop_assert_eq!(of_seq, (0..*n as u32).collect::<Vec<_>>());
            }
            all.sort_unstable();
            prop_assert_eq!(all, (0..rows.len()).collect::<Vec<_>>());
            prop_assert!(parts.iter().all(|part| !part.is_empty() && part.len() <= n_ubatch));
            if !is_pool {
                for part in &parts {
                    let n_of = |seq| part.iter().filter(|&&at| rows[at].seq == seq).count();
                    let mut counts: Vec<usize> = (0..counts.len() as SeqId).map(n_of).filter(|&n| n > 0).collect();
                    counts.dedup();
                    prop_assert_eq!(counts.len(), 1, "equally many each");
                }
            }
        }
    }
}
