//! Medians, the ratio, and where the time goes that the bare loop does not need.

use std::fmt;

use serde::Serialize;

use super::{Sample, Settings, Workload};

/// All samples of one workload.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What was measured.
    pub workload: Workload,
    /// With which settings.
    pub settings: Settings,
    /// The bare loop, run by run.
    pub bare: Vec<Sample>,
    /// The engine, run by run.
    pub engine: Vec<Sample>,
}

impl Report {
    pub(super) fn new(workload: Workload, settings: Settings) -> Self {
        Self { workload, settings, bare: Vec::new(), engine: Vec::new() }
    }

    pub(super) fn push(&mut self, bare: Sample, engine: Sample) {
        self.bare.push(bare);
        self.engine.push(engine);
    }

    /// The engine's decode rate over the bare loop's: the median of the rounds' ratios, each of two runs that followed
    /// one another, so that a machine that speeds up or slows down meanwhile does not count.
    pub fn ratio(&self) -> f64 {
        median(self.bare.iter().zip(&self.engine).map(|(bare, engine)| engine.decode_rate() / bare.decode_rate()))
    }

    /// The same for the whole run, prompts included.
    pub fn total_ratio(&self) -> f64 {
        median(self.bare.iter().zip(&self.engine).map(|(bare, engine)| bare.total_s / engine.total_s))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = |samples: &[Sample]| median(samples.iter().map(Sample::decode_rate));
        let per_step = |value: fn(&Sample) -> f64, samples: &[Sample]| {
            median(samples.iter().map(|sample| value(sample) / sample.steps as f64 * 1e6))
        };
        let (bare_us, engine_us) = (per_step(|s| s.backend_s, &self.bare), per_step(|s| s.backend_s, &self.engine));
        let overhead_us = per_step(|s| s.overhead_s, &self.engine);
        writeln!(
            f,
            "{:>3} sequences | bare {:7.1} tok/s | engine {:7.1} tok/s | decode ratio {:.3} | with prompts {:.3}",
            self.workload.n_seq,
            rate(&self.bare),
            rate(&self.engine),
            self.ratio(),
            self.total_ratio(),
        )?;
        write!(
            f,
            "              | a step: llama_decode {engine_us:.0} us (bare {bare_us:.0} us), sampling, text, events and \
             scheduling {overhead_us:.0} us = {:.2} %",
            overhead_us / (engine_us + overhead_us) * 100.0,
        )
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    if values.is_empty() { f64::NAN } else { values[values.len() / 2] }
}
