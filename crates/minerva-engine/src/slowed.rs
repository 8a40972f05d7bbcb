//! A backend that takes longer than it needs, so that a benchmark can prove that it notices.

use std::hint;
use std::time::Instant;

use minerva_llama::SavedState;

use crate::backend::{Backend, BackendLimits, Row, SeqId, StepError};

/// The inner backend, with every step longer by a share of its own time.
pub(crate) struct Slowed {
    inner: Box<dyn Backend>,
    /// 1.1 makes a step take a tenth longer.
    factor: f64,
}

impl Slowed {
    pub(crate) fn new(inner: Box<dyn Backend>, percent: f64) -> Self {
        Self { inner, factor: 1.0 + percent.max(0.0) / 100.0 }
    }
}

impl Backend for Slowed {
    fn limits(&self) -> BackendLimits {
        self.inner.limits()
    }

    fn decode(&mut self, rows: &[Row]) -> Result<(), StepError> {
        let began = Instant::now();
        let result = self.inner.decode(rows);
        let until = began + began.elapsed().mul_f64(self.factor);
        // Not a sleep: the compute threads would fall asleep too, and the next step would pay for waking them.
        while Instant::now() < until {
            hint::spin_loop();
        }
        result
    }

    fn logits(&self, i: usize) -> Option<&[f32]> {
        self.inner.logits(i)
    }

    fn truncate(&mut self, seq: SeqId, n_tokens: u32) -> bool {
        self.inner.truncate(seq, n_tokens)
    }

    fn copy(&mut self, src: SeqId, dst: SeqId, n_tokens: u32) -> bool {
        self.inner.copy(src, dst, n_tokens)
    }

    fn save(&mut self, seq: SeqId) -> Option<SavedState> {
        self.inner.save(seq)
    }

    fn restore(&mut self, seq: SeqId, state: &[u8]) -> bool {
        self.inner.restore(seq, state)
    }

    fn save_part(&mut self, seq: SeqId) -> Option<SavedState> {
        self.inner.save_part(seq)
    }

    fn rewind(&mut self, seq: SeqId, state: &[u8], n_tokens: u32) -> bool {
        self.inner.rewind(seq, state, n_tokens)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// Takes 20 ms a step.
    struct Sleeper;

    impl Backend for Sleeper {
        fn limits(&self) -> BackendLimits {
            BackendLimits {
                n_seq_max: 1,
                n_cells_per_seq: 8,
                n_cells: 8,
                unified: false,
                stream_bytes: 0,
                cell_bytes: 1,
                state_bytes: 0,
                keeps_beginnings: true,
                window_cell_bytes: 0,
                n_window_tokens: 0,
                n_copied_window_tokens: 0,
                checkpoints_need_cells: false,
                n_batch: 8,
                n_ubatch: 8,
                n_vocab: 2,
            }
        }

        fn decode(&mut self, _rows: &[Row]) -> Result<(), StepError> {
            thread::sleep(Duration::from_millis(20));
            Ok(())
        }

        fn logits(&self, i: usize) -> Option<&[f32]> {
            (i == 3).then_some(&[0.5, 0.25])
        }

        fn truncate(&mut self, _seq: SeqId, n_tokens: u32) -> bool {
            n_tokens == 1
        }

        fn copy(&mut self, src: SeqId, _dst: SeqId, _n_tokens: u32) -> bool {
            src == 1
        }

        fn save(&mut self, seq: SeqId) -> Option<SavedState> {
            (seq == 1).then(|| vec![7].into())
        }

        fn restore(&mut self, _seq: SeqId, state: &[u8]) -> bool {
            state == [7]
        }
    }

    #[test]
    fn a_slowed_step_takes_its_share_longer_and_everything_else_is_the_inner_backends() {
        let mut slowed = Slowed::new(Box::new(Sleeper), 50.0);
        let began = Instant::now();
        assert_eq!(slowed.decode(&[]), Ok(()));
        assert!(began.elapsed() >= Duration::from_millis(30));
        assert_eq!(slowed.limits(), Sleeper.limits());
        assert_eq!((slowed.logits(3), slowed.logits(2)), (Some(&[0.5, 0.25][..]), None));
        assert_eq!((slowed.truncate(0, 1), slowed.truncate(0, 2)), (true, false));
        assert_eq!((slowed.copy(1, 0, 0), slowed.copy(0, 1, 0)), (true, false));
        assert_eq!((slowed.save(1), slowed.save(0)), (Some(vec![7].into()), None));
        assert_eq!((slowed.restore(0, &[7]), slowed.restore(0, &[8])), (true, false));
    }
}
