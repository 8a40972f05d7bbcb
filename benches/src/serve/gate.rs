//! Conditions that a run must meet, such as `one>=1.0`, `one/engine>=0.96` or `shared-prefix.ttft-p99<=0.1`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context as _, bail};
use clap::ValueEnum as _;

use super::report::{Metric, Report};
use super::workload::Workload;

/// What Minerva promises about serving: each line of its own, with where the number comes from.
const PROMISES: [&str; 19] = [
    // A shared beginning is computed once: a bare loop has six times the peer's throughput from cold.
    "shared-prefix>=5",
    "shared-prefix.ttft-p99<=0.1",
    "burst.computed<=1",
    // Nobody waits for somebody else's prompt, and prompts get on all the same.
    "long-prompt-beside.gap-p99<=0.08",
    "long-prompt-beside.stretch<=3",
    "long-prompt-beside.long-rate>=0.7",
    // A schema costs next to nothing; the peer loses 33 to 43 %.
    "json-schema.of-free>=0.9",
    "json-schema>=1.6",
    // Guesses pay where a text repeats itself, cost nothing where it does not, and change nothing.
    "repetitions.speculation>=1.5",
    "repetitions.wrong<=0",
    "random-text.speculation>=0.98",
    // It stays up.
    "overload.errors<=0",
    "overload.left-over<=0",
    "overload.wrong<=0",
    "overload.memory-slope<=1",
    "canary.leaks<=0",
    "canary.errors<=0",
    "fairness.fairness<=1",
    // Cells and weights, and little else.
    "thirty-two.resident<=0.45",
];

/// The gates of all promises.
pub(super) fn promises() -> Vec<Gate> {
    PROMISES.iter().filter_map(|text| text.parse().ok()).collect()
}

/// `WORKLOAD[.METRIC][/CONTENDER]>=NUMBER`, or `<=`: a ratio of ours to the other's, or a figure of ours alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Gate {
    pub(super) workload: Workload,
    metric: Metric,
    /// `peer` or `engine`.
    other: String,
    is_floor: bool,
    limit: f64,
}

impl FromStr for Gate {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let floor = text.split_once(">=").map(|(what, limit)| (what, limit, true));
        let found = floor.or_else(|| text.split_once("<=").map(|(what, limit)| (what, limit, false)));
        let (what, limit, is_floor) = found.context("a gate needs `>=` or `<=`")?;
        let limit = limit.trim().parse().with_context(|| format!("`{limit}` is not a number"))?;
        let (what, other) = what.trim().split_once('/').unwrap_or((what.trim(), "peer"));
        let (workload, metric) = what.split_once('.').unwrap_or((what, "throughput"));
        let workload = Workload::from_str(workload, false).map_err(|_| anyhow::anyhow!("no workload `{workload}`"))?;
        let metric = Metric::named(metric).with_context(|| format!("no metric `{metric}`"))?;
        if !["peer", "engine"].contains(&other) {
            bail!("`{other}` is neither `peer` nor `engine`");
        }
        Ok(Self { workload, metric, other: other.to_owned(), is_floor, limit })
    }
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.is_floor { ">=" } else { "<=" };
        write!(f, "{}.{}", self.workload.name(), self.metric.name())?;
        if let Some(other) = self.other() {
            write!(f, "/{other}")?;
        }
        write!(f, "{sign}{}", self.limit)
    }
}

impl Gate {
    /// Whom ours is compared with; `None` for a figure of ours alone.
    pub(super) fn other(&self) -> Option<&str> {
        self.metric.is_ratio().then_some(self.other.as_str())
    }

    /// Whether the gate holds, and a line that says so. A figure that is missing, and an error of ours, do not pass.
    pub(super) fn check(&self, report: &Report) -> (bool, String) {
        let errors = report.errors(self.workload, "ours");
        let value = match self.metric {
            Metric::Errors => errors.map(|n| n as f64),
            metric if metric.is_ratio() => report.ratio(self.workload, metric, &self.other),
            metric => report.own(self.workload, metric),
        };
        let value = value.filter(|_| errors == Some(0) || self.metric == Metric::Errors);
        let holds = value.is_some_and(|value| if self.is_floor { value >= self.limit } else { value <= self.limit });
        let shown = value.map_or_else(|| "not measured, or with errors".to_owned(), |value| format!("{value:.3}"));
        (holds, format!("gate {}: {self} ({shown})", if holds { "holds" } else { "FAILS" }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_read_back_as_they_are_written() {
        for (text, full) in [
            ("one>=1.0", "one.throughput/peer>=1"),
            ("one/engine>=0.96", "one.throughput/engine>=0.96"),
            ("shared-prefix.ttft-p99<=0.1", "shared-prefix.ttft-p99/peer<=0.1"),
            ("abort.errors <= 0", "abort.errors<=0"),
            ("overload.memory-slope<=1", "overload.memory-slope<=1"),
        ] {
            let gate: Gate = text.replace(' ', "").parse().expect(text);
            assert_eq!(gate.to_string(), full);
            assert_eq!(full.parse::<Gate>().expect(full), gate);
        }
    }

    #[test]
    fn every_promise_is_a_gate() {
        assert_eq!(promises().len(), PROMISES.len());
    }

    #[test]
    fn a_gate_that_cannot_be_read_is_refused() {
        for text in ["one", "one>=x", "two>=1", "one.speed>=1", "one/them>=1", ""] {
            assert!(text.parse::<Gate>().is_err(), "{text}");
        }
    }
}
