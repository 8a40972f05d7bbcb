//! The guide's three tables: layers on the GPU, sequences at once, depth of the context.

use std::path::Path;
use std::time::Instant;

use minerva_engine::Engine;
use serde::Serialize;

use super::args::{Args, Part};
use super::calibrate::Calibration;
use super::place::{Place, Sizes};
use crate::engine::{Round, Workload};
use crate::stats::median;

/// The guide's batch sizes and what lies between and above them.
const BATCH: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];

/// The guide's contexts and what lies above them.
const CONTEXT: [u32; 8] = [512, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072];

/// Steps between no layer and all.
const LAYER_STEPS: u32 = 8;

/// Cells beyond the depth that is measured: the steps, and what a context is rounded to.
const ROOM: u32 = 512;

/// One table: rates at several points on one place.
#[derive(Debug, Serialize)]
pub(super) struct Sweep {
    pub(super) part: &'static str,
    pub(super) place: Place,
    pub(super) points: Vec<Point>,
    /// Why there are not more points.
    pub(super) stopped: Option<String>,
}

/// One row: every round of one point.
#[derive(Debug, Serialize)]
pub(super) struct Point {
    /// Layers, sequences or depth.
    pub(super) x: u32,
    pub(super) workload: Workload,
    rounds: Vec<Round>,
}

/// Patience with one sweep.
struct Limits {
    n_rounds: usize,
    /// No second round after so long.
    point_s: f64,
    /// No further point that would take longer for one round.
    most_s: f64,
}

impl Limits {
    fn of(args: &Args) -> Self {
        if args.quick {
            Self { n_rounds: 1, point_s: 4.0, most_s: 30.0 }
        } else {
            Self { n_rounds: 3, point_s: 40.0, most_s: 240.0 }
        }
    }
}

impl Point {
    /// Decoded tokens per second, the median of a side.
    pub(super) fn decode_rate(&self, engine: bool) -> f64 {
        self.median(|round| side(round, engine).decode_rate())
    }

    /// Prompt tokens per second of one sequence, the median of a side.
    pub(super) fn prefill_rate(&self, engine: bool) -> f64 {
        let tokens = f64::from(self.workload.prompt_tokens);
        self.median(|round| tokens / side(round, engine).prefill_s())
    }

    /// The engine's decode rate over the floor's, of neighbouring runs.
    pub(super) fn ratio(&self) -> f64 {
        self.median(|round| side(round, true).decode_rate() / side(round, false).decode_rate())
    }

    fn median(&self, value: impl Fn(&Round) -> f64) -> f64 {
        median(self.rounds.iter().map(value)).unwrap_or(f64::NAN)
    }
}

fn side(round: &Round, engine: bool) -> &crate::engine::Sample {
    &(if engine { &round.engine } else { &round.bare }).samples[0]
}

/// Layers on the device, from none (that is the CPU) to all that fit.
pub(super) fn layers(model: &Path, cpu: &Place, device: &Place, args: &Args, say: fn(&str)) -> anyhow::Result<Sweep> {
    let calibration = Calibration::of(model, cpu, args)?;
    let workload = Workload { n_seq: 1, prompt_tokens: 64, generate_tokens: calibration.steps(16, 128) };
    let sizes = Sizes { n_seq: 1, context_tokens: workload.context_tokens() };
    let config = device.config(model, sizes, None, args.threads);
    let most = Engine::plan(&config, &Engine::machine(&config)?)?.best().placement.n_gpu_layers();
    let steps = if args.quick { 2 } else { LAYER_STEPS };
    let mut points: Vec<u32> = (0..=steps).map(|step| most * step / steps).collect();
    points.dedup();
    let mut sweep = Sweep::new("layers", device);
    sweep.run(&points, args, say, |n_layers| {
        let place = if n_layers == 0 { cpu } else { device };
        let layers = (n_layers > 0).then_some(n_layers);
        Ok((place.pair(place.config(model, sizes, layers, args.threads))?, workload))
    })?;
    Ok(sweep)
}

/// Sequences at once.
pub(super) fn batch(model: &Path, place: &Place, args: &Args, say: fn(&str)) -> anyhow::Result<Sweep> {
    let calibration = Calibration::of(model, place, args)?;
    let points: &[u32] = if args.quick { &[1, 8] } else { &BATCH };
    let mut sweep = Sweep::new("batch", place);
    sweep.run(points, args, say, |n_seq| {
        // A step of many sequences takes longer, but not as many times as there are of them.
        let generate_tokens = (calibration.steps(16, 128) >> (n_seq.ilog2() / 2)).max(16);
        let workload = Workload { n_seq, prompt_tokens: 16, generate_tokens };
        let sizes = Sizes { n_seq, context_tokens: workload.context_tokens() };
        Ok((place.pair(place.config(model, sizes, None, args.threads))?, workload))
    })?;
    Ok(sweep)
}

/// Depth: the tokens before the ones that are decoded.
pub(super) fn context(model: &Path, place: &Place, args: &Args, say: fn(&str)) -> anyhow::Result<Sweep> {
    let calibration = Calibration::of(model, place, args)?;
    let largest = place.largest_context_tokens(model)?;
    let points: &[u32] = if args.quick { &[512, 2048] } else { &CONTEXT };
    let fitting: Vec<u32> = points.iter().copied().filter(|depth| depth + ROOM <= largest).collect();
    let mut sweep = Sweep::new("context", place);
    sweep.run(&fitting, args, say, |depth| {
        let generate_tokens = calibration.steps(16, 64);
        let workload = Workload { n_seq: 1, prompt_tokens: depth, generate_tokens };
        let sizes = Sizes { n_seq: 1, context_tokens: depth + ROOM };
        Ok((place.pair(place.config(model, sizes, None, args.threads))?, workload))
    })?;
    if sweep.stopped.is_none() && fitting.len() < points.len() {
        sweep.stopped = Some(format!("the plan says that {largest} tokens are the most that fit"));
    }
    Ok(sweep)
}

impl Sweep {
    fn new(part: &'static str, place: &Place) -> Self {
        Self { part, place: place.clone(), points: Vec::new(), stopped: None }
    }

    fn run(
        &mut self,
        points: &[u32],
        args: &Args,
        say: fn(&str),
        pair: impl Fn(u32) -> anyhow::Result<(crate::engine::Pair, Workload)>,
    ) -> anyhow::Result<()> {
        let limits = Limits::of(args);
        let mut last: Option<(u32, f64)> = None;
        for &x in points {
            let expected_s = last.map_or(0.0, |(before, seconds)| seconds * growth(self.part, before, x));
            if expected_s > limits.most_s {
                self.stopped = Some(format!("a round at {x} would take about {expected_s:.0} s"));
                break;
            }
            let (pair, workload) = pair(x)?;
            let pair = pair.slowed_down(args.slow_down);
            let (began, mut rounds) = (Instant::now(), Vec::new());
            while rounds.len() < limits.n_rounds
                && (rounds.is_empty() || began.elapsed().as_secs_f64() < limits.point_s)
            {
                rounds.push(pair.round(&[workload], rounds.len() as u32)?);
            }
            last = Some((x, began.elapsed().as_secs_f64() / rounds.len() as f64));
            let point = Point { x, workload, rounds };
            say(&format!(
                "{} {}, {x}: floor {:.1}, engine {:.1} tok/s, ratio {:.3}",
                self.place.kind.key(),
                self.part,
                point.decode_rate(false),
                point.decode_rate(true),
                point.ratio()
            ));
            self.points.push(point);
        }
        Ok(())
    }

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
