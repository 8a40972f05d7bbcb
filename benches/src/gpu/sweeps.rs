//! The guide's three tables: layers on the GPU, sequences at once, tokens of context.

use std::path::Path;
use std::time::{Duration, Instant};

use minerva_engine::EngineConfig;
use serde::Serialize;

use super::args::{Args, Part};
use super::calibrate::Calibration;
use super::place::{Place, Sizes};
use crate::engine::{Programs, Round, Runs, Sample, Sides, Workload};
use crate::stats::median;

/// The guide's batch sizes and what lies between and above them.
const BATCH: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];

/// The guide's contexts and what lies above them.
const CONTEXT: [u32; 8] = [512, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072];

/// Steps between no layer and all.
const LAYER_STEPS: u32 = 8;

/// One table: rates at several points on one place.
#[derive(Debug, Serialize)]
pub(super) struct Sweep {
    pub(super) part: &'static str,
    pub(super) place: Place,
    pub(super) points: Vec<Point>,
    /// Why there are not more points.
    pub(super) stopped: Option<String>,
}

/// One row.
#[derive(Debug, Serialize)]
pub(super) struct Point {
    /// Layers, sequences or tokens of context.
    pub(super) x: u32,
    pub(super) workload: Workload,
    round: Round,
}

/// What all sweeps need.
#[derive(Clone, Copy)]
pub(super) struct Sweeper<'a> {
    pub(super) model: &'a Path,
    pub(super) args: &'a Args,
    pub(super) programs: Programs<'a>,
    pub(super) say: fn(&str),
}

/// Patience with one sweep.
struct Limits {
    runs: Runs,
    /// No further point that would take longer.
    most_s: f64,
}

impl Limits {
    fn of(args: &Args) -> Self {
        let runs = |most, seconds| Runs { most, patience: Duration::from_secs(seconds) };
        if args.quick { Self { runs: runs(1, 4), most_s: 30.0 } } else { Self { runs: runs(5, 40), most_s: 240.0 } }
    }
}

impl Point {
    /// Decoded tokens per second, the median of a side.
    pub(super) fn decode_rate(&self, engine: bool) -> f64 {
        self.median(|run| side(run, engine).decode_rate())
    }

    /// Prompt tokens per second of one sequence, the median of a side.
    pub(super) fn prefill_rate(&self, engine: bool) -> f64 {
        let tokens = f64::from(self.workload.prompt_tokens);
        self.median(|run| tokens / side(run, engine).prefill_s())
    }

    /// The engine's decode rate over the floor's, of neighbouring runs.
    pub(super) fn ratio(&self) -> f64 {
        self.median(|run| run.engine.decode_rate() / run.bare.decode_rate())
    }

    fn median(&self, value: impl Fn(&Sides<Sample>) -> f64) -> f64 {
        median(self.round.runs[0].iter().map(value)).unwrap_or(f64::NAN)
    }
}

fn side(run: &Sides<Sample>, engine: bool) -> &Sample {
    if engine { &run.engine } else { &run.bare }
}

impl Sweeper<'_> {
    /// Layers on the device, from none (that is the CPU) to all that fit.
    pub(super) fn layers(self, cpu: &Place, device: &Place) -> anyhow::Result<Sweep> {
        let calibration = Calibration::of(self.model, cpu, self.args, self.programs)?;
        let workload = Workload { n_seq: 1, prompt_tokens: 64, generate_tokens: calibration.steps(16, 128) };
        let sizes = Sizes { n_seq: 1, context_tokens: workload.context_tokens() };
        let config = device.config(self.model, sizes, None, self.args.threads);
        let most = device.beside(&config, 0.0, self.programs)?.plan().n_gpu_layers;
        let steps = if self.args.quick { 2 } else { LAYER_STEPS };
        let mut points: Vec<u32> = (0..=steps).map(|step| most * step / steps).collect();
        points.dedup();
        self.sweep("layers", device, &points, |n_layers| {
            let place = if n_layers == 0 { cpu } else { device };
            let layers = (n_layers > 0).then_some(n_layers);
            (place, place.config(self.model, sizes, layers, self.args.threads), workload)
        })
    }

    /// Sequences at once.
    pub(super) fn batch(self, place: &Place) -> anyhow::Result<Sweep> {
        let calibration = Calibration::of(self.model, place, self.args, self.programs)?;
        let points: &[u32] = if self.args.quick { &[1, 8] } else { &BATCH };
        self.sweep("batch", place, points, |n_seq| {
            // A step of many sequences takes longer, but not as many times as there are of them.
            let generate_tokens = (calibration.steps(16, 128) >> (n_seq.ilog2() / 2)).max(16);
            let workload = Workload { n_seq, prompt_tokens: 16, generate_tokens };
            let sizes = Sizes { n_seq, context_tokens: workload.context_tokens() };
            (place, place.config(self.model, sizes, None, self.args.threads), workload)
        })
    }

    /// Tokens of context: the last ones of it are decoded, after a prompt of all others.
    pub(super) fn context(self, place: &Place) -> anyhow::Result<Sweep> {
        let calibration = Calibration::of(self.model, place, self.args, self.programs)?;
        let least = place.config(self.model, Sizes { n_seq: 1, context_tokens: CONTEXT[0] }, None, self.args.threads);
        let largest = place.beside(&least, 0.0, self.programs)?.plan().largest_context_tokens;
        let points: &[u32] = if self.args.quick { &[512, 2048] } else { &CONTEXT };
        let fitting: Vec<u32> = points.iter().copied().filter(|&context| context <= largest).collect();
        let mut sweep = self.sweep("context", place, &fitting, |context_tokens| {
            let generate_tokens = calibration.steps(16, 64);
            let workload = Workload { n_seq: 1, prompt_tokens: context_tokens - generate_tokens, generate_tokens };
            let sizes = Sizes { n_seq: 1, context_tokens };
            (place, place.config(self.model, sizes, None, self.args.threads), workload)
        })?;
        if sweep.stopped.is_none() && fitting.len() < points.len() {
            sweep.stopped = Some(format!("the plan says that {largest} tokens are the most that fit"));
        }
        Ok(sweep)
    }

    fn sweep<'a>(
        self,
        part: &'static str,
        place: &Place,
        points: &[u32],
        at: impl Fn(u32) -> (&'a Place, EngineConfig, Workload),
    ) -> anyhow::Result<Sweep> {
        let mut sweep = Sweep { part, place: place.clone(), points: Vec::new(), stopped: None };
        let limits = Limits::of(self.args);
        let mut last: Option<(u32, f64)> = None;
        for &x in points {
            let expected_s = last.map_or(0.0, |(before, seconds)| seconds * growth(part, before, x));
            if expected_s > limits.most_s {
                sweep.stopped = Some(format!("a run at {x} would take about {expected_s:.0} s"));
                break;
            }
            let (place, config, workload) = at(x);
            let sides = place.beside(&config, self.args.slow_down, self.programs)?;
            let began = Instant::now();
            let round = sides.round(&[workload], limits.runs, 0)?;
            last = Some((x, began.elapsed().as_secs_f64() / round.runs[0].len() as f64));
            let point = Point { x, workload, round };
            (self.say)(&format!(
                "{} {part}, {x}: {} {:.1}, engine {:.1} tok/s, ratio {:.3}",
                place.kind.key(),
                self.args.floor(),
                point.decode_rate(false),
                point.decode_rate(true),
                point.ratio()
            ));
            sweep.points.push(point);
        }
        Ok(sweep)
    }
}

impl Sweep {
    pub(super) fn is(&self, part: Part) -> bool {
        self.part == part.name()
    }
}

/// How many times longer the next point may take: prompts grow with the depth, and a little more.
fn growth(part: &str, before: u32, next: u32) -> f64 {
    match part {
        "context" => (f64::from(next) / f64::from(before)).powf(1.3),
        "batch" => 2.0,
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deeper_context_is_expected_to_take_more_than_its_share() {
        assert!((growth("layers", 4, 8) - 1.0).abs() < 1e-9);
        assert!(growth("context", 2048, 8192) > 4.0 && growth("context", 2048, 8192) < 8.0);
    }
}
