//! The figures of a run: medians over its rounds, a table that is valid Markdown, and JSON with everything raw.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::{Value, json};

use super::answer::{Figures, Sample};
use super::replay::Verdict;
use super::workload::Workload;
use crate::stats::median;
use crate::table::Table;

/// What can be compared with another contender, or judged by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Metric {
    Throughput,
    TtftP50,
    TtftP99,
    GapP50,
    GapP99,
    LongRate,
    /// After the round.
    Resident,
    Errors,
    /// Gap p99 beside long prompts over the one before them.
    Stretch,
    /// Throughput with a schema over that without.
    OfFree,
    Fairness,
    Computed,
    /// Decoding with guesses over decoding without.
    Speculation,
    LeftOver,
    Wrong,
    Leaks,
    /// MiB a minute.
    MemorySlope,
}

impl Metric {
    const ALL: [(Self, &'static str); 17] = [
        (Self::Throughput, "throughput"),
        (Self::TtftP50, "ttft-p50"),
        (Self::TtftP99, "ttft-p99"),
        (Self::GapP50, "gap-p50"),
        (Self::GapP99, "gap-p99"),
        (Self::LongRate, "long-rate"),
        (Self::Resident, "resident"),
        (Self::Errors, "errors"),
        (Self::Stretch, "stretch"),
        (Self::OfFree, "of-free"),
        (Self::Fairness, "fairness"),
        (Self::Computed, "computed"),
        (Self::Speculation, "speculation"),
        (Self::LeftOver, "left-over"),
        (Self::Wrong, "wrong"),
        (Self::Leaks, "leaks"),
        (Self::MemorySlope, "memory-slope"),
    ];

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|(metric, _)| *metric)
    }

    pub(super) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(metric, _)| *metric == self).map_or("", |(_, name)| name)
    }

    /// Whether ours is compared with another's; the rest are figures of one server.
    pub(super) fn is_ratio(self) -> bool {
        use Metric::{GapP50, GapP99, LongRate, Resident, Throughput, TtftP50, TtftP99};
        matches!(self, Throughput | TtftP50 | TtftP99 | GapP50 | GapP99 | LongRate | Resident)
    }

    /// Whether one round with more than the others decides.
    fn is_count(self) -> bool {
        matches!(self, Self::Errors | Self::LeftOver | Self::Wrong | Self::Leaks)
    }

    fn of(self, figures: &Figures) -> Option<f64> {
        match self {
            Self::Throughput => figures.throughput,
            Self::TtftP50 => figures.ttft_p50_ms,
            Self::TtftP99 => figures.ttft_p99_ms,
            Self::GapP50 => figures.gap_p50_ms,
            Self::GapP99 => figures.gap_p99_ms,
            Self::LongRate => figures.long_prompts_per_minute,
            Self::Resident => figures.resident_mib,
            Self::Errors => Some(figures.errors as f64),
            Self::Stretch => Some(figures.gap_p99_ms? / figures.alone_gap_p99_ms?),
            Self::OfFree => Some(figures.throughput? / figures.twin_throughput?),
            Self::Fairness => figures.fairness,
            Self::Computed => figures.computed_share,
            Self::Speculation => figures.speculation,
            Self::LeftOver => figures.left_over,
            Self::Wrong => figures.replays.map(|[.., wrong]| wrong as f64),
            Self::Leaks => figures.leaks.map(|n| n as f64),
            Self::MemorySlope => figures.memory_slope.map(|[squares, _]| squares),
        }
    }
}

/// All rounds of one workload against one contender.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Series {
    pub(super) workload: Workload,
    pub(super) contender: &'static str,
    pub(super) figures: Vec<Figures>,
    pub(super) samples: Vec<Sample>,
}

impl Series {
    fn values(&self, metric: Metric) -> impl Iterator<Item = f64> {
        self.figures.iter().filter_map(move |figures| metric.of(figures))
    }

    fn median(&self, metric: Metric) -> Option<f64> {
        median(self.values(metric))
    }

    /// Of all rounds: of counts the most.
    fn overall(&self, metric: Metric) -> Option<f64> {
        if metric.is_count() { self.values(metric).reduce(f64::max) } else { self.median(metric) }
    }
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// What was run, a line each.
    pub(super) heading: Vec<String>,
    /// The contenders in full and the settings, for the JSON.
    pub(super) about: Value,
    pub(super) series: Vec<Series>,
    /// What the gates said.
    pub(super) gates: Vec<String>,
}

const COLUMNS: [(Metric, &str); 5] = [
    (Metric::Throughput, "tok/s"),
    (Metric::TtftP50, "TTFT p50 ms"),
    (Metric::TtftP99, "TTFT p99"),
    (Metric::GapP50, "gap p50 ms"),
    (Metric::GapP99, "gap p99"),
];

impl Report {
    /// The series of one workload and contender, made when it is not there yet.
    pub(super) fn series_mut(&mut self, workload: Workload, contender: &'static str) -> &mut Series {
        let found = self.series.iter().position(|s| s.workload == workload && s.contender == contender);
        let at = found.unwrap_or_else(|| {
            self.series.push(Series { workload, contender, figures: Vec::new(), samples: Vec::new() });
            self.series.len() - 1
        });
        &mut self.series[at]
    }

    fn find(&self, workload: Workload, contender: &str) -> Option<&Series> {
        self.series.iter().find(|series| series.workload == workload && series.contender == contender)
    }

    /// Ours / the other's, of the medians over rounds.
    pub(super) fn ratio(&self, workload: Workload, metric: Metric, other: &str) -> Option<f64> {
        let median = |contender| self.find(workload, contender)?.median(metric);
        let ratio = median("ours")? / median(other)?;
        ratio.is_finite().then_some(ratio)
    }

    /// A figure of ours over all rounds; `None` when a round lacks it.
    pub(super) fn own(&self, workload: Workload, metric: Metric) -> Option<f64> {
        let ours = self.find(workload, "ours")?;
        ours.overall(metric).filter(|_| ours.values(metric).count() == ours.figures.len())
    }

    /// Errors over all rounds; `None` when the workload was not run.
    pub(super) fn errors(&self, workload: Workload, contender: &str) -> Option<usize> {
        Some(self.find(workload, contender)?.figures.iter().map(|figures| figures.errors).sum())
    }

    /// The smallest and largest ratio of two rounds that ran one after the other.
    fn ratio_range(&self, workload: Workload, metric: Metric, other: &str) -> Option<(f64, f64)> {
        let (ours, theirs) = (self.find(workload, "ours")?, self.find(workload, other)?);
        let ratios = ours.values(metric).zip(theirs.values(metric)).map(|(ours, theirs)| ours / theirs);
        ratios.fold(None, |range, ratio| match range {
            None => Some((ratio, ratio)),
            Some((low, high)) => Some((f64::min(low, ratio), f64::max(high, ratio))),
        })
    }

    /// Heading, table, notes and gates as Markdown that reads well in a terminal.
    pub(super) fn markdown(&self) -> String {
        let mut lines: Vec<String> = self.heading.iter().map(|line| format!("- {line}")).collect();
        lines.push(String::new());
        lines.push(self.table().render());
        lines.push("Medians over rounds; a ratio's range is over pairs of neighbouring rounds.".to_owned());
        lines.push(String::new());
        lines.extend(self.series.iter().flat_map(notes).map(|note| format!("- {note}")));
        if !self.gates.is_empty() {
            lines.push(String::new());
            lines.extend(self.gates.iter().map(|gate| format!("- {gate}")));
        }
        lines.join("\n") + "\n"
    }

    fn table(&self) -> Table {
        let titles = ["workload", "who"].into_iter().chain(COLUMNS.map(|(_, title)| title)).chain(["errors"]);
        let mut table = Table::new(titles);
        for series in &self.series {
            let is_first = self.series.iter().find(|s| s.workload == series.workload).map(|s| s.contender);
            let workload = if is_first == Some(series.contender) { series.workload.name() } else { "" };
            let figures = COLUMNS.map(|(metric, _)| number(series.median(metric)));
            let requests: usize = series.figures.iter().map(|f| f.requests).sum();
            let errors: usize = series.figures.iter().map(|f| f.errors).sum();
            let row = [workload.to_owned(), series.contender.to_owned()].into_iter().chain(figures);
            table.row(row.chain([format!("{errors} of {requests}")]));

            let is_last = self.series.iter().rfind(|s| s.workload == series.workload).map(|s| s.contender);
            if is_last == Some(series.contender) {
                self.ratio_rows(series.workload, &mut table);
            }
        }
        table
    }

    fn ratio_rows(&self, workload: Workload, table: &mut Table) {
        for other in ["peer", "engine"] {
            if self.find(workload, "ours").is_none() || self.find(workload, other).is_none() {
                continue;
            }
            let ratios = COLUMNS.map(|(metric, _)| {
                let ratio = self.ratio(workload, metric, other);
                let range = self.ratio_range(workload, metric, other).filter(|_| metric == Metric::Throughput);
                match (ratio, range) {
                    (Some(ratio), Some((low, high))) => format!("{ratio:.3} ({low:.2}–{high:.2})"),
                    (Some(ratio), None) => format!("{ratio:.2}"),
                    (None, _) => "–".to_owned(),
                }
            });
            let row = [String::new(), format!("ours / {other}")].into_iter().chain(ratios);
            table.row(row.chain([String::new()]));
        }
    }

    /// Everything, raw samples included.
    pub(super) fn json(&self) -> Value {
        json!({ "heading": self.heading, "about": self.about, "series": self.series, "gates": self.gates })
    }
}

/// Three digits that matter.
fn number(value: Option<f64>) -> String {
    match value {
        None => "–".to_owned(),
        Some(value) if value.abs() < 10.0 => format!("{value:.2}"),
        Some(value) if value.abs() < 100.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.0}"),
    }
}

/// From here on a round says more about the machine than about a server.
const DISTURBED_CORES: f64 = 0.1;

/// What the table has no room for: counts, what was cached, the load tool's own cost, what the process held.
fn notes(series: &Series) -> Vec<String> {
    let Some(first) = series.figures.first() else { return Vec::new() };
    let who = format!("{}, {}", series.workload.name(), series.contender);
    let cpu = median(series.figures.iter().filter_map(|f| f.load_cpu_percent));
    let others: Vec<f64> = series.figures.iter().filter_map(|f| f.others_cores).collect();
    let mut notes = vec![format!(
        "{who}: {} requests a round, {} prompt tokens ({} of them cached), {:.0} tokens in {} pieces; of a core the load \
         tool took {} %; other programs took {} cores, at most {}",
        first.requests,
        first.prompt_tokens,
        first.cached_tokens,
        first.completion_tokens,
        first.pieces,
        number(cpu),
        number(median(others.clone())),
        number(others.iter().copied().reduce(f64::max)),
    )];
    if !series.workload.shares_prompts() && first.cached_tokens * 2 > first.prompt_tokens {
        notes.push(format!("{who}: WARNING: most of the prompts were cached; use another --seed"));
    }
    if others.iter().any(|cores| *cores > DISTURBED_CORES) {
        notes.push(format!("{who}: WARNING: other programs took more than {DISTURBED_CORES} cores in some round"));
    }
    if let Some(rate) = series.median(Metric::LongRate) {
        let alone = number(median(series.figures.iter().filter_map(|f| f.alone_gap_p99_ms)));
        notes.push(format!("{who}: {} long prompts a minute; gap p99 before them {alone} ms", number(Some(rate))));
    }
    notes.extend(own_notes(series).into_iter().map(|note| format!("{who}: {note}")));
    if matches!(series.workload, Workload::Abort | Workload::Overload | Workload::Canary) {
        let (left, early): (usize, usize) =
            series.figures.iter().fold((0, 0), |(a, b), f| (a + f.left, b + f.left_before_text));
        notes.push(format!("{who}: {left} requests left, {early} of them before any text"));
        for (round, sample) in series.samples.iter().enumerate() {
            if let (Some(before), Some(after)) = (&sample.before, &sample.after) {
                notes.push(format!("{who}, round {}: before: {before}; after: {after}", round + 1));
            }
        }
    } else if let Some(after) = series.samples.last().and_then(|sample| sample.after.as_ref()?.resident_mib) {
        notes.push(format!("{who}: {after:.0} MiB resident at the end"));
    }
    let answers = series.samples.iter().flat_map(|sample| &sample.answers);
    let errors: BTreeSet<&str> = answers.filter_map(|answer| answer.error.as_deref()).collect();
    notes.extend(errors.iter().take(3).map(|error| format!("{who}: error: {error}")));
    notes
}

/// What only some workloads measure.
fn own_notes(series: &Series) -> Vec<String> {
    let value = |metric| series.overall(metric);
    let sum = |of: fn(&Figures) -> u64| series.figures.iter().map(of).sum::<u64>();
    let mut notes = Vec::new();
    if let Some(stretch) = value(Metric::Stretch) {
        notes.push(format!("beside long prompts gap p99 is {} times the one before them", number(Some(stretch))));
    }
    if let Some(share) = value(Metric::OfFree) {
        let free = number(median(series.figures.iter().filter_map(|f| f.twin_throughput)));
        notes.push(format!("without the schema {free} tok/s; with it {share:.3} of that"));
    }
    if let Some(fairness) = value(Metric::Fairness) {
        let idle = number(median(series.figures.iter().filter_map(|f| f.idle_ttft_ms)));
        notes.push(format!(
            "key B alone has its first text after {idle} ms; during key A's flood after {} ms, which is {fairness:.2} of twice \
             that and a step",
            number(series.median(Metric::TtftP50)),
        ));
    }
    if let Some(share) = value(Metric::Computed).filter(|_| series.workload == Workload::Burst) {
        notes.push(format!("computed {share:.3} of: the common part once, and for each its own part and a chunk"));
    }
    if let Some(speed) = value(Metric::Speculation) {
        let [equal, all] =
            series.figures.iter().filter_map(|f| f.equal_pairs).fold([0, 0], |[a, b], [c, d]| [a + c, b + d]);
        notes.push(format!(
            "guessing ahead decodes {speed:.3} times as fast; {equal} of {all} texts are the same as without"
        ));
    }
    if sum(|f| f.refusals) > 0 {
        notes.push(format!("had no room {} times; the clients asked again", sum(|f| f.refusals)));
    }
    for (round, sample) in series.samples.iter().enumerate().filter(|(_, sample)| !sample.replayed.is_empty()) {
        let [same, near, wrong] = series.figures[round].replays.unwrap_or_default();
        let gaps = sample.replayed.iter().filter_map(|(_, verdict)| match verdict {
            Verdict::NearTie(gap) => Some(*gap),
            _ => None,
        });
        notes.push(format!(
            "round {}: of {} answers asked for again alone {same} are the same, {near} differ from a near tie on (at most {} \
             between the logarithms), {wrong} are wrong",
            round + 1,
            sample.replayed.len(),
            number(gaps.reduce(f64::max)),
        ));
        notes.extend(sample.replayed.iter().filter_map(|(index, verdict)| match verdict {
            Verdict::Wrong(why) => Some(format!("WRONG: request {index}: {why}")),
            _ => None,
        }));
    }
    if series.workload == Workload::Canary {
        let own: usize = series.samples.iter().map(|sample| sample.own_secrets).sum();
        let leaks = series.samples.iter().flat_map(|sample| &sample.leaks);
        notes.push(format!("{own} answers with their own secret, {} with another's", leaks.clone().count()));
        notes.extend(leaks.take(5).map(|leak| format!("LEAK: {leak}")));
    }
    if let Some([squares, middle]) =
        series.figures.last().and_then(|f| f.memory_slope).filter(|_| series.workload == Workload::Overload)
    {
        notes.push(format!(
            "private memory grew by {squares:.2} MiB a minute after a third of the round (least squares; median slope {middle:.2})"
        ));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report { heading: vec!["seed 1".to_owned()], ..Report::default() };
        for (contender, speeds) in [("ours", [110.0, 100.0, 120.0]), ("peer", [100.0, 100.0, 80.0])] {
            let figures = speeds.map(|speed| Figures {
                throughput: Some(speed),
                ttft_p50_ms: Some(1000.0 / speed),
                requests: 8,
                errors: usize::from(speed < 90.0),
                ..Figures::default()
            });
            report.series_mut(Workload::One, contender).figures.extend(figures);
        }
        report
    }

    #[test]
    fn a_ratio_is_of_medians_and_its_range_of_neighbours() {
        let report = report();
        assert_eq!(report.ratio(Workload::One, Metric::Throughput, "peer"), Some(1.1));
        assert_eq!(report.ratio_range(Workload::One, Metric::Throughput, "peer"), Some((1.0, 1.5)));
        assert_eq!(report.ratio(Workload::One, Metric::GapP50, "peer"), None);
        assert_eq!(report.errors(Workload::One, "peer"), Some(1));
        assert_eq!(report.errors(Workload::Eight, "ours"), None);
    }

    #[test]
    fn the_table_has_a_row_per_contender_and_one_for_the_ratio() {
        let expected = "\
| workload | who         |             tok/s | TTFT p50 ms | TTFT p99 | gap p50 ms | gap p99 |  errors |
|----------|-------------|------------------:|------------:|---------:|-----------:|--------:|--------:|
| one      | ours        |               110 |        9.09 |        – |          – |       – | 0 of 24 |
|          | peer        |               100 |        10.0 |        – |          – |       – | 1 of 24 |
|          | ours / peer | 1.100 (1.00–1.50) |        0.91 |        – |          – |       – |         |
";
        assert_eq!(report().table().render(), expected);
    }

    #[test]
    fn gates_compare_ours_with_the_other_and_errors_fail_them() {
        let mut report = report();
        let check = |report: &Report, gate: &str| gate.parse::<super::super::gate::Gate>().expect(gate).check(report).0;
        assert!(check(&report, "one>=1.1"));
        assert!(!check(&report, "one>=1.2"));
        assert!(check(&report, "one.ttft-p50<=0.95"));
        assert!(check(&report, "one.errors<=0"));
        assert!(!check(&report, "one/engine>=0.1"), "what was not measured does not pass");
        assert!(!check(&report, "one.leaks<=0"), "nor does a figure of ours that no round has");
        report.series_mut(Workload::One, "ours").figures[1].left_over = Some(3.0);
        assert!(!check(&report, "one.left-over<=3"), "or not every round");
        for at in [0, 2] {
            report.series_mut(Workload::One, "ours").figures[at].left_over = Some(0.0);
        }
        assert!(check(&report, "one.left-over<=3") && !check(&report, "one.left-over<=2"), "the worst round counts");
        report.series_mut(Workload::One, "ours").figures[0].errors = 1;
        assert!(!check(&report, "one>=1.1"));
    }
}
