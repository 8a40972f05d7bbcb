//! Everything that was measured: JSON with every round, Markdown to read or paste, a chart.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use minerva_engine::{BuildInfo, Engine};
use minerva_gpu::format_bytes;
use serde::Serialize;

use super::args::{Args, Part};
use super::baseline::MIN_ROUNDS;
use super::experts::Experts;
use super::measured::Measured;
use super::memory::Memory;
use super::place::{Place, slug};
use super::speed::{Figure, Speed};
use super::sweeps::Sweep;
use crate::chart::{Chart, Line, svg};
use crate::table::Table;

/// One run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The model's name; never a folder.
    pub(super) model: String,
    /// What was measured, the CPU first.
    pub(super) places: Vec<Place>,
    build: BuildInfo,
    /// What was asked for and could not be measured, with the reason.
    pub(super) not_measured: Vec<String>,
    pub(super) speed: Option<Speed>,
    pub(super) memory: Vec<Memory>,
    pub(super) sweeps: Vec<Sweep>,
    pub(super) experts: Option<Experts>,
    /// Lines of the comparison with the baseline.
    pub(super) comparison: Vec<String>,
    /// What the engine is compared with.
    floor: &'static str,
    /// The percent by which the engine was slowed down on purpose.
    slow_down: f64,
}

/// The guide's rates at its batch sizes and contexts, over the first of them.
const GUIDE_BATCH: [(u32, f64); 4] = [(1, 1.0), (4, 2.4), (8, 3.6), (16, 4.0)];
const GUIDE_CONTEXT: [(u32, f64); 4] = [(512, 1.0), (2048, 0.6), (4096, 0.4), (8192, 0.2)];

impl Report {
    pub(super) fn new(model: String, places: Vec<Place>, args: &Args) -> Self {
        Self {
            model,
            places,
            build: Engine::build_info(),
            not_measured: Vec::new(),
            speed: None,
            memory: Vec::new(),
            sweeps: Vec::new(),
            experts: None,
            comparison: Vec::new(),
            floor: args.floor(),
            slow_down: args.slow_down,
        }
    }

    /// The device that the run is named after: the last place.
    pub(super) fn device(&self) -> &Place {
        self.places.last().unwrap_or(&self.places[0])
    }

    /// Every ratio that a baseline can hold.
    pub(super) fn measured(&self) -> Vec<Measured> {
        let speed = self.speed.as_ref().map(Speed::measured).unwrap_or_default();
        speed.into_iter().chain(self.memory.iter().filter_map(Memory::measured)).collect()
    }

    /// The median of a ratio by its name, such as `cpu.decode-1` (engine over floor) or `gpu/cpu.prefill`.
    pub fn ratio(&self, name: &str) -> Option<f64> {
        self.measured().iter().find(|ratio| ratio.name == name).map(Measured::median)
    }

    /// What was asked for and could not be measured, with the reason.
    pub fn not_measured(&self) -> &[String] {
        &self.not_measured
    }

    /// Growth of memory and threads beyond what is allowed.
    pub fn leaks(&self) -> Vec<String> {
        let growth = self.memory.iter().flat_map(Memory::growth);
        growth.filter(|growth| !growth.holds).map(|growth| growth.line).collect()
    }

    /// Writes `NAME.json`, `NAME.md` and `NAME.svg` into the folder, all named after device and model.
    pub(super) fn write(&self, folder: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let write = |extension: &str, text: &str| {
            let path = folder.join(format!("{}.{extension}", self.file_name()));
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("json", &(serde_json::to_string(&self)? + "\n"))?;
        write("md", &self.markdown())?;
        if let Some(chart) = self.chart() {
            write("svg", &chart)?;
        }
        Ok(())
    }

    fn file_name(&self) -> String {
        format!("bench-gpu-{}-{}", slug(&self.device().name), slug(&self.model))
    }

    /// Headed tables that can be pasted into docs/benchmarks.md.
    pub fn markdown(&self) -> String {
        let devices: Vec<String> =
            self.places.iter().map(|place| format!("{}: {}", place.kind.title(), place.name)).collect();
        let mut lines = vec![
            format!("## {} on {}", self.model, self.device().name),
            String::new(),
            format!(
                "{}. llama.cpp {}, {}. {}, by turns with the engine. A ratio is the median over pairs of runs that followed \
                 one another, so it need not be the quotient of the rates beside it.",
                devices.join("; "),
                self.build.llama_cpp,
                self.build.cpu_features.join(" "),
                match self.floor {
                    "floor" => "Floor: the same work through a bare `llama_decode` loop",
                    _ => "The other build: the same work through another program's engine",
                },
            ),
            String::new(),
        ];
        if self.slow_down > 0.0 {
            lines.push(format!("**The engine was slowed down by {} % on purpose.**\n", self.slow_down));
        }
        if let Some(speed) = &self.speed {
            speed_section(speed, self.floor, &mut lines);
        }
        for part in [Part::Layers, Part::Batch, Part::Context] {
            self.sweep_section(part, &mut lines);
        }
        if let Some(experts) = &self.experts {
            experts.section(&mut lines);
        }
        if self.chart().is_some() {
            lines.push(format!("![decode speed by batch, context and layers]({}.svg)\n", self.file_name()));
        }
        if !self.memory.is_empty() {
            memory_section(&self.memory, &mut lines);
        }
        list("Not measured", &self.not_measured, &mut lines);
        list("Against the baseline", &self.comparison, &mut lines);
        while lines.last().is_some_and(String::is_empty) {
            lines.pop();
        }
        lines.join("\n") + "\n"
    }

    fn sweep_section(&self, part: Part, lines: &mut Vec<String>) {
        let sweeps: Vec<&Sweep> = self.sweeps.iter().filter(|sweep| sweep.is(part)).collect();
        if sweeps.is_empty() {
            return;
        }
        let (title, x, guide): (_, _, &[(u32, f64)]) = match part {
            Part::Layers => ("Layers on the device", "layers", &[]),
            Part::Batch => ("Sequences at once", "sequences", &GUIDE_BATCH),
            _ => ("Tokens of context", "context", &GUIDE_CONTEXT),
        };
        lines.extend([format!("### {title}"), String::new()]);
        let (floor, ratio) = (format!("{} tok/s", self.floor), format!("engine / {}", self.floor));
        let mut titles = vec!["where", x, &floor, "engine tok/s", &ratio, "× of the first"];
        titles.extend((!guide.is_empty()).then_some("the guide's ×"));
        titles.extend((part == Part::Context).then_some("prefill tok/s"));
        let mut table = Table::new(titles);
        for sweep in &sweeps {
            let first = sweep.points.first().map_or(f64::NAN, |point| point.decode_rate(true));
            for point in &sweep.points {
                let mut row = vec![
                    sweep.place.kind.title().to_owned(),
                    point.x.to_string(),
                    number(point.decode_rate(false)),
                    number(point.decode_rate(true)),
                    format!("{:.3}", point.ratio()),
                    format!("{:.2}", point.decode_rate(true) / first),
                ];
                if !guide.is_empty() {
                    let factor = guide.iter().find(|(x, _)| *x == point.x).map(|(_, factor)| format!("{factor:.1}"));
                    row.push(factor.unwrap_or_else(|| "–".to_owned()));
                }
                row.extend((part == Part::Context).then(|| number(point.prefill_rate(true))));
                table.row(row);
            }
        }
        lines.push(table.render());
        let notes = sweeps.iter().filter_map(|sweep| {
            let stopped = sweep.stopped.as_ref()?;
            let last = sweep.points.last().map_or(0, |point| point.x);
            Some(format!("{}: no further than {last}: {stopped}.\n", sweep.place.kind.title()))
        });
        lines.extend(notes);
    }

    /// A panel per sweep, every place in it; `None` when there is no sweep.
    fn chart(&self) -> Option<String> {
        let panels = [
            (Part::Batch, "Sequences at once", "sequences", true),
            (Part::Context, "Tokens of context", "tokens", true),
            (Part::Layers, "Layers on the device", "layers", false),
        ];
        let charts: Vec<Chart> = panels
            .into_iter()
            .map(|(part, title, x_label, log_x)| {
                let sweeps = self.sweeps.iter().filter(|sweep| sweep.is(part));
                let lines = sweeps.flat_map(|sweep| [true, false].map(|engine| self.line(sweep, engine)));
                Chart { title: title.to_owned(), x_label, y_label: "tok/s", log_x, lines: lines.collect() }
            })
            .filter(|chart| !chart.lines.is_empty())
            .collect();
        (!charts.is_empty()).then(|| svg(&charts))
    }

    fn line(&self, sweep: &Sweep, engine: bool) -> Line {
        Line {
            name: format!("{}, {}", sweep.place.kind.title(), if engine { "engine" } else { self.floor }),
            colour: self.places.iter().position(|place| place.kind == sweep.place.kind).unwrap_or(0),
            dashed: !engine,
            points: sweep.points.iter().map(|point| (f64::from(point.x), point.decode_rate(engine))).collect(),
        }
    }
}

fn speed_section(speed: &Speed, floor: &str, lines: &mut Vec<String>) {
    lines.extend(["### Speed".to_owned(), String::new()]);
    let mut table = Table::new(["where", "what", floor, "engine", &format!("engine / {floor}"), "spread"]);
    let ratios = speed.measured();
    let ratio_cells = |name: &str| {
        let found = ratios.iter().find(|ratio| ratio.name == name);
        let ratio = found.map_or_else(|| "–".to_owned(), |ratio| format!("{:.3}", ratio.median()));
        let interval = found.and_then(Measured::interval);
        [ratio, interval.map_or_else(|| "–".to_owned(), |(low, high)| format!("{low:.3} to {high:.3}"))]
    };
    for (at, place) in speed.places.iter().enumerate() {
        let (title, key) = (place.place.kind.title().to_owned(), place.place.kind.key());
        let [one, many, prefill] = &place.workloads;
        let rows = [
            (0, format!("decode, 1 sequence, {} tokens", one.generate_tokens), "decode-1"),
            (1, format!("decode, {} sequences, {} tokens each", many.n_seq, many.generate_tokens), "decode-8"),
            (2, format!("prefill, {} tokens", prefill.prompt_tokens), "prefill"),
        ];
        for (index, what, name) in rows {
            let Figure { bare, engine } = speed.figure(at, index);
            let [ratio, spread] = ratio_cells(&format!("{key}.{name}"));
            let rate = |rate: f64| format!("{} tok/s", number(rate));
            table.row([title.clone(), what, rate(bare), rate(engine), ratio, spread]);
        }
        let Figure { bare, engine } = speed.load(at);
        let [ratio, spread] = ratio_cells(&format!("{key}.load"));
        let time = |seconds: f64| format!("{} ms", number(seconds * 1e3));
        table.row([title, "load, the file in the cache".to_owned(), time(bare), time(engine), ratio, spread]);
    }
    lines.push(table.render());
    let against_cpu: Vec<String> = speed
        .places
        .iter()
        .skip(1)
        .map(|place| {
            let key = place.place.kind.key();
            let [one, many, prefill] =
                ["decode-1", "decode-8", "prefill"].map(|name| ratio_cells(&format!("{key}/cpu.{name}"))[0].clone());
            format!(
                "{} with {} layers on it against the CPU, engine both: decode {one} × (1 sequence) and {many} × (8), prefill \
                 {prefill} ×. The guide says 5 to 10 ×, and 6.7 and 25 × in its examples.\n",
                place.place.kind.title(),
                place.layers
            )
        })
        .collect();
    lines.extend(against_cpu);
    let (counted, all, others) = speed.conditions();
    let rounds = if counted < all {
        format!("{counted} of {all} rounds count: other programs disturbed the rest")
    } else {
        format!("All {all} rounds count")
    };
    let others = others.map_or_else(String::new, |cores| format!("; others took {cores:.2} cores in the median"));
    lines.push(format!(
        "{rounds}{others}. The spread is where the median lies with 97 % certainty; it takes {MIN_ROUNDS} values to say.\n"
    ));
}

fn memory_section(all: &[Memory], lines: &mut Vec<String>) {
    lines.extend(["### Memory".to_owned(), String::new()]);
    let mut table = Table::new([
        "where",
        "planned",
        "peak beyond the start",
        "peak / plan",
        "resident after the load",
        "later, at most",
    ]);
    for memory in all {
        let peak = memory.peak_bytes();
        let shown = |bytes: Option<u64>| bytes.map_or_else(|| "–".to_owned(), format_bytes);
        table.row([
            memory.place.kind.title().to_owned(),
            format_bytes(memory.planned_bytes()),
            shown(peak),
            memory.measured().map_or_else(|| "–".to_owned(), |ratio| format!("{:.3}", ratio.median())),
            shown(memory.resident_bytes().map(|(loaded, _)| loaded)),
            shown(memory.resident_bytes().map(|(_, most)| most)),
        ]);
    }
    lines.push(table.render());
    lines.extend(all.iter().flat_map(Memory::growth).map(|growth| format!("- {}", growth.line)));
    lines.push(String::new());
}

fn list(title: &str, items: &[String], lines: &mut Vec<String>) {
    if !items.is_empty() {
        lines.extend([format!("### {title}"), String::new()]);
        lines.extend(items.iter().map(|item| format!("- {item}")));
        lines.push(String::new());
    }
}

/// Three digits that matter.
fn number(value: f64) -> String {
    match value.abs() {
        size if size < 10.0 => format!("{value:.2}"),
        size if size < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}
