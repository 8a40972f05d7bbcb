//! Prefill, decode and load on every place, all places by turns in each round, and both sides by turns in each run.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::args::Args;
use super::baseline::{Baseline, MIN_ROUNDS, Verdict};
use super::calibrate::Calibration;
use super::measured::{Better, Measured};
use super::place::{Place, Sizes};
use crate::engine::{Beside, Programs, Round, Runs, Sample, Sides, Workload};
use crate::stats::median;

/// Other programs with more than this spoil a round: on two cores a busy neighbour costs a step not a share but a multiple.
const DISTURBED_CORES: f64 = 0.15;

/// Rounds after which a gate that is still open goes by the median.
const MAX_GATE_ROUNDS: usize = 25;

/// What is measured, in the order of a turn's samples.
const WORKLOADS: [&str; 3] = ["decode-1", "decode-8", "prefill"];

/// Sequences of `decode-8`: the guide's "good balance".
const N_SEQ: u32 = 8;

/// Every round of every place.
#[derive(Debug, Serialize)]
pub(super) struct Speed {
    pub(super) places: Vec<PlaceSpeed>,
    /// Runs of each workload in a round.
    runs_per_round: u32,
    /// A round of each place, in their order.
    rounds: Vec<Vec<Round>>,
}

/// What a place was given to do.
#[derive(Debug, Serialize)]
pub(super) struct PlaceSpeed {
    pub(super) place: Place,
    pub(super) layers: u32,
    pub(super) workloads: [Workload; 3],
    #[serde(skip)]
    beside: Beside,
}

/// The medians of one figure on one place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Figure {
    pub(super) bare: f64,
    pub(super) engine: f64,
}

/// Measures all places. With a baseline to be judged by, as many rounds as the verdict takes.
pub(super) fn measure(
    model: &Path,
    places: &[Place],
    args: &Args,
    programs: Programs<'_>,
    judge_by: Option<(&Baseline, &str)>,
    say: fn(&str),
) -> anyhow::Result<Speed> {
    let runs_per_round = if args.quick { 1 } else { 3 };
    // No patience needed: a workload is cut to a fraction of a second.
    let runs = Runs { most: runs_per_round, patience: Duration::MAX };
    let mut speed = Speed { places: Vec::new(), runs_per_round, rounds: Vec::new() };
    for place in places {
        speed.places.push(prepare(model, place, args, programs)?);
    }
    let wanted = if judge_by.is_some() { MAX_GATE_ROUNDS } else { args.n_rounds() as usize };
    for round in 0.. {
        let sides = speed.places.iter().map(|place| place.beside.round(&place.workloads, runs, round));
        let sides = sides.collect::<anyhow::Result<Vec<Round>>>()?;
        speed.rounds.push(sides);
        say(&speed.last_line());
        let n_counted = speed.counted().len();
        let is_decided = judge_by.is_some_and(|(baseline, model)| {
            n_counted >= MIN_ROUNDS && speed.measured().iter().all(|ratio| is_decided(baseline, model, ratio))
        });
        if is_decided || n_counted >= wanted {
            break;
        }
    }
    Ok(speed)
}

fn is_decided(baseline: &Baseline, model: &str, ratio: &Measured) -> bool {
    baseline.limit(model, &ratio.name).is_none_or(|limit| limit.judge(ratio) != Verdict::Open)
}

/// Workloads that take about as long on a slow place as on a fast one.
fn prepare(model: &Path, place: &Place, args: &Args, programs: Programs<'_>) -> anyhow::Result<PlaceSpeed> {
    let calibration = Calibration::of(model, place, args, programs)?;
    let decode = calibration.steps(16, 256);
    let workloads = [
        Workload { n_seq: 1, prompt_tokens: 32, generate_tokens: decode },
        Workload { n_seq: N_SEQ, prompt_tokens: 8, generate_tokens: (decode / 2).max(16) },
        Workload { n_seq: 1, prompt_tokens: calibration.prompt_tokens(128, 512), generate_tokens: 1 },
    ];
    let context_tokens = workloads.iter().map(Workload::context_tokens).max().unwrap_or(0);
    let sizes = Sizes { n_seq: N_SEQ, context_tokens };
    let config = place.config(model, sizes, None, args.threads);
    let beside = place.beside(&config, args.slow_down, programs)?;
    Ok(PlaceSpeed { place: place.clone(), layers: beside.plan().n_gpu_layers, workloads, beside })
}

impl Speed {
    /// The rounds that other programs left alone, or all of them when those are fewer than half.
    fn counted(&self) -> Vec<&Vec<Round>> {
        let calm: Vec<_> =
            self.rounds.iter().filter(|round| others(round).is_none_or(|c| c <= DISTURBED_CORES)).collect();
        if calm.len() * 2 >= self.rounds.len() { calm } else { self.rounds.iter().collect() }
    }

    /// How many rounds count, of how many, and the median of what others took.
    pub(super) fn conditions(&self) -> (usize, usize, Option<f64>) {
        let others = median(self.rounds.iter().filter_map(|round| others(round)));
        (self.counted().len(), self.rounds.len(), others)
    }

    /// Every ratio, run by run; of loads round by round.
    pub(super) fn measured(&self) -> Vec<Measured> {
        let rounds = self.counted();
        let mut all = Vec::new();
        for (at, place) in self.places.iter().enumerate() {
            let key = place.place.kind.key();
            for (index, name) in WORKLOADS.iter().enumerate() {
                let ratios = rounds.iter().flat_map(|round| place.ratios(&round[at], index));
                let ratios = Measured::new(format!("{key}.{name}"), Better::Higher, ratios);
                all.extend(ratios.map(|ratios| ratios.per_round(self.runs_per_round as usize)));
            }
            let loads = rounds.iter().map(|round| round[at].load_s.engine / round[at].load_s.bare);
            all.extend(Measured::new(format!("{key}.load"), Better::Lower, loads));
        }
        // The first place is the CPU.
        for (at, place) in self.places.iter().enumerate().skip(1) {
            for (index, name) in WORKLOADS.iter().enumerate() {
                let name = format!("{}/cpu.{name}", place.place.kind.key());
                let ratios = rounds
                    .iter()
                    .map(|round| place.rate(&round[at], index, true) / self.places[0].rate(&round[0], index, true));
                all.extend(Measured::new(name, Better::Higher, ratios));
            }
        }
        all
    }

    /// The medians of one workload, in tokens per second.
    pub(super) fn figure(&self, at: usize, workload: usize) -> Figure {
        let rounds = self.counted();
        let side = |engine: bool| {
            median(rounds.iter().map(|round| self.places[at].rate(&round[at], workload, engine))).unwrap_or(f64::NAN)
        };
        Figure { bare: side(false), engine: side(true) }
    }

    /// The medians of the time to load, in seconds.
    pub(super) fn load(&self, at: usize) -> Figure {
        let rounds = self.counted();
        let side = |seconds: fn(&Sides<f64>) -> f64| {
            median(rounds.iter().map(|round| seconds(&round[at].load_s))).unwrap_or(f64::NAN)
        };
        Figure { bare: side(|load_s| load_s.bare), engine: side(|load_s| load_s.engine) }
    }

    /// A line per round, so that a long run shows that it lives.
    fn last_line(&self) -> String {
        let Some(round) = self.rounds.last() else { return String::new() };
        let ratios = self.places.iter().zip(round).map(|(place, round)| {
            let ratios =
                [0, 1, 2].map(|index| format!("{:.3}", median(place.ratios(round, index)).unwrap_or(f64::NAN)));
            format!("{} {}", place.place.kind.key(), ratios.join(" "))
        });
        let others = others(round).map_or_else(String::new, |cores| format!("; others took {cores:.2} cores"));
        let ratios = ratios.collect::<Vec<_>>().join(", ");
        format!("round {}: {}: {ratios}{others}", self.rounds.len(), WORKLOADS.join(", "))
    }
}

impl PlaceSpeed {
    /// Tokens per second of a workload on one side, the median of a round.
    fn rate(&self, round: &Round, index: usize, engine: bool) -> f64 {
        let rates =
            round.runs[index].iter().map(|run| self.rate_of(if engine { &run.engine } else { &run.bare }, index));
        median(rates).unwrap_or(f64::NAN)
    }

    /// Of the prompt where nothing more than the first token is generated.
    fn rate_of(&self, sample: &Sample, index: usize) -> f64 {
        let workload = &self.workloads[index];
        match workload.generate_tokens {
            1 => f64::from(workload.prompt_tokens) / sample.prefill_s(),
            _ => sample.decode_rate(),
        }
    }

    /// The engine over the floor, of every run.
    fn ratios<'a>(&'a self, round: &'a Round, index: usize) -> impl Iterator<Item = f64> + 'a {
        round.runs[index].iter().map(move |run| self.rate_of(&run.engine, index) / self.rate_of(&run.bare, index))
    }
}

/// What other programs took during a round, at most.
fn others(round: &[Round]) -> Option<f64> {
    round.iter().filter_map(|round| round.others_cores).reduce(f64::max)
}
