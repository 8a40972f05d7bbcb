//! The floor: prompts in full batches, then one token per sequence and step, the likeliest one.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use minerva_llama::{Batch, Context, ContextParams, Model, ModelParams};

use super::{Sample, Workload, prompt};

/// A context that nobody else uses.
pub(super) struct Bare {
    context: Context,
    batch: Batch,
    backend_s: f64,
    steps: u64,
}

impl Bare {
    /// Loads the model and computes one token, as the engine's load does.
    pub(super) fn load(path: &Path, model: &ModelParams, context: &ContextParams) -> anyhow::Result<Self> {
        let model = Model::load(path, model, &mut |_| ControlFlow::Continue(()))?;
        let context = Context::new(&model, context)?;
        let batch = Batch::new(&context);
        let mut bare = Self { context, batch, backend_s: 0.0, steps: 0 };
        bare.batch.push(model.bos().unwrap_or(0), 0, 0, true)?;
        bare.step(&mut Vec::new(), &mut [])?;
        Ok(bare)
    }

    pub(super) fn run(&mut self, workload: Workload, seed: u32) -> anyhow::Result<Sample> {
        let n_vocab = self.context.model().n_vocab() as u32;
        let n_batch = self.context.n_batch() as usize;
        for seq in 0..workload.n_seq {
            self.context.clear_seq(seq)?;
        }
        let prompts: Vec<_> = (0..workload.n_seq).map(|seq| prompt(n_vocab, workload, seq, seed)).collect();
        (self.backend_s, self.steps) = (0.0, 0);
        let began = Instant::now();
        let mut last = vec![0; workload.n_seq as usize];
        let mut waiting = Vec::new();
        self.batch.clear();
        for (seq, tokens) in prompts.iter().enumerate() {
            for (pos, &token) in tokens.iter().enumerate() {
                let is_last = pos + 1 == tokens.len();
                let row = self.batch.push(token, pos as u32, seq as u32, is_last)?;
                if is_last {
                    waiting.push((row, seq));
                }
                if self.batch.len() == n_batch {
                    self.step(&mut waiting, &mut last)?;
                }
            }
        }
        self.step(&mut waiting, &mut last)?;
        let decode_began = Instant::now();
        for n in 1..workload.generate_tokens {
            for seq in 0..workload.n_seq {
                let row = self.batch.push(last[seq as usize], workload.prompt_tokens + n - 1, seq, true)?;
                waiting.push((row, seq as usize));
            }
            self.step(&mut waiting, &mut last)?;
        }
        Ok(Sample {
            total_s: began.elapsed().as_secs_f64(),
            decode_s: decode_began.elapsed().as_secs_f64(),
            decode_tokens: u64::from(workload.n_seq) * u64::from(workload.generate_tokens - 1),
            backend_s: self.backend_s,
            overhead_s: 0.0,
            steps: self.steps,
        })
    }

    fn step(&mut self, waiting: &mut Vec<(usize, usize)>, last: &mut [i32]) -> anyhow::Result<()> {
        let began = Instant::now();
        self.context.decode(&mut self.batch)?;
        self.backend_s += began.elapsed().as_secs_f64();
        self.steps += 1;
        for (row, seq) in waiting.drain(..) {
            let logits = self.context.logits(row).ok_or_else(|| anyhow::anyhow!("row {row} has no logits"))?;
            last[seq] = argmax(logits);
        }
        self.batch.clear();
        Ok(())
    }
}

/// The index of the largest value; blocks let the compiler use vector instructions.
fn argmax(logits: &[f32]) -> i32 {
    let mut best = (f32::NEG_INFINITY, 0);
    for (block, values) in logits.chunks(64).enumerate() {
        let top = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if top > best.0 {
            best = (top, block);
        }
    }
    let start = best.1 * 64;
    let inside = logits[start..].iter().position(|&value| value >= best.0).unwrap_or(0);
    (start + inside) as i32
}
