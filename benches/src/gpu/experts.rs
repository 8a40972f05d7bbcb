//! A mixture of experts on a device that holds a part of it: what the planner chooses against the other way to make it fit.

use std::path::Path;
use std::time::Duration;

use minerva_engine::EngineConfig;
use minerva_gpu::estimate::ModelShape;
use minerva_gpu::format_bytes;
use minerva_gpu::gguf::Header;
use serde::Serialize;

use super::args::Args;
use super::place::{Place, Sizes};
use crate::engine::{Beside, Planned, Programs, Round, Runs, Sample, Sides, Workload};
use crate::stats::median;
use crate::table::Table;

/// Shares of the memory that the whole model needs, in percent.
const SHARES: [u64; 3] = [30, 50, 80];

/// Cells of the one sequence. Predictions are for a quarter of them.
const CONTEXT_TOKENS: u32 = 4096;

/// One place's table.
#[derive(Debug, Serialize)]
pub(super) struct Experts {
    pub(super) place: Place,
    /// On the device, with everything there.
    needed_bytes: u64,
    points: Vec<Point>,
}

/// One row: the planner's choice as `engine`, the other way as `bare`.
#[derive(Debug, Serialize)]
struct Point {
    percent: u64,
    limit_bytes: u64,
    plans: Sides<Planned>,
    workload: Workload,
    rounds: Vec<Round>,
}

/// Whether the file is a mixture of experts.
pub(super) fn has_experts(model: &Path) -> anyhow::Result<bool> {
    Ok(ModelShape::of(&Header::open(model)?).is_ok_and(|shape| shape.n_experts > 0))
}

/// Measures both ways at each share.
pub(super) fn measure(
    model: &Path,
    place: &Place,
    args: &Args,
    programs: Programs<'_>,
    say: fn(&str),
) -> anyhow::Result<Experts> {
    let sizes = Sizes { n_seq: 1, context_tokens: CONTEXT_TOKENS };
    let config = place.config(model, sizes, None, args.threads);
    let whole = EngineConfig { n_expert_layers_on_host: Some(0), fallback_to_cpu: false, ..config.clone() };
    let needed_bytes = place.beside(&whole, 0.0, programs)?.plan().device_bytes;
    let (prompt_tokens, generate_tokens, n_rounds) = if args.quick { (16, 16, 1) } else { (CONTEXT_TOKENS / 4, 32, 2) };
    let n_rounds = args.rounds.unwrap_or(n_rounds);
    let workload = Workload { n_seq: 1, prompt_tokens, generate_tokens };
    let mut experts = Experts { place: place.clone(), needed_bytes, points: Vec::new() };
    for percent in SHARES {
        let limit_bytes = needed_bytes / 100 * percent;
        let chosen = place.limited(&config, limit_bytes);
        let (_, plan) = Beside::of_engines(programs, Sides { bare: &chosen, engine: &chosen }, place.llama_devices())?;
        // Experts on the host, or whole layers: whichever the planner did not take.
        let left = if plan.engine.n_expert_layers_on_host > 0 { 0 } else { u32::MAX };
        let other = EngineConfig { n_expert_layers_on_host: Some(left), ..chosen.clone() };
        let configs = Sides { bare: &other, engine: &chosen };
        let (beside, plans) = Beside::of_engines(programs, configs, place.llama_devices())?;
        let runs = Runs { most: 3, patience: Duration::from_mins(2) };
        let rounds = (0..n_rounds).map(|round| beside.round(&[workload], runs, round));
        let point = Point { percent, limit_bytes, plans, workload, rounds: rounds.collect::<Result<_, _>>()? };
        say(&format!("{} experts, {percent} %: {}", place.kind.key(), point.line()));
        experts.points.push(point);
    }
    Ok(experts)
}

impl Point {
    fn rate(&self, side: fn(&Sides<Sample>) -> &Sample) -> f64 {
        median(self.runs().map(|run| side(run).decode_rate())).unwrap_or(f64::NAN)
    }

    /// The choice's decode rate over the other's, of neighbouring runs.
    fn ratio(&self) -> f64 {
        median(self.runs().map(|run| run.engine.decode_rate() / run.bare.decode_rate())).unwrap_or(f64::NAN)
    }

    fn runs(&self) -> impl Iterator<Item = &Sides<Sample>> {
        self.rounds.iter().flat_map(|round| &round.runs[0])
    }

    fn line(&self) -> String {
        format!(
            "{} {:.1} tok/s, {} {:.1}, ratio {:.3}",
            way(&self.plans.engine),
            self.rate(|run| &run.engine),
            way(&self.plans.bare),
            self.rate(|run| &run.bare),
            self.ratio()
        )
    }
}

impl Experts {
    pub(super) fn section(&self, lines: &mut Vec<String>) {
        let mut table = Table::new([
            "room",
            "chosen",
            "cache on the host",
            "tok/s (predicted)",
            "the other way",
            "tok/s (predicted)",
            "chosen / other",
        ]);
        for point in &self.points {
            let Sides { bare: other, engine: chosen } = &point.plans;
            let rates = [(point.rate(|run| &run.engine), chosen), (point.rate(|run| &run.bare), other)];
            let [ours, theirs] = rates.map(|(rate, plan)| format!("{rate:.1} ({:.1})", plan.tokens_per_second));
            table.row([
                format!("{} %: {}", point.percent, format_bytes(point.limit_bytes)),
                way(chosen),
                format_bytes(chosen.host_cache_bytes),
                ours,
                way(other),
                theirs,
                format!("{:.3}", point.ratio()),
            ]);
        }
        let prompt_tokens = self.points.first().map_or(0, |point| point.workload.prompt_tokens);
        lines.extend([
            "### Experts beside the device".to_owned(),
            String::new(),
            format!(
                "{}: the whole model takes {} of it. One sequence after a prompt of {prompt_tokens} tokens.\n",
                self.place.kind.title(),
                format_bytes(self.needed_bytes)
            ),
            table.render(),
        ]);
    }
}

/// What goes where, in a few words.
fn way(plan: &Planned) -> String {
    match plan.n_expert_layers_on_host {
        0 => format!("{} whole layers", plan.n_gpu_layers),
        n => format!("{} layers, the experts of {n} on the host", plan.n_gpu_layers),
    }
}
