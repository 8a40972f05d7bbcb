//! The charts of a run: how long users wait, by percentile, and memory over time.

use super::answer::Answer;
use super::report::Series;
use super::workload::{Role, Workload};
use crate::chart::{Chart, Line, svg};
use crate::stats;

const PERCENTILES: [f64; 8] = [1.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0];

/// A panel per workload with a line per contender; of an overload one more with its memory.
pub(super) fn draw(series: &[Series]) -> String {
    let mut charts: Vec<Chart> = Vec::new();
    for (at, first) in series.iter().enumerate() {
        let workload = first.workload;
        if series[..at].iter().any(|earlier| earlier.workload == workload) {
            continue;
        }
        let all: Vec<&Series> = series.iter().filter(|series| series.workload == workload).collect();
        // Beside long prompts it is the streams that wait.
        let has_gaps = workload == Workload::LongPromptBeside;
        charts.push(Chart {
            title: format!("{}: {}", workload.name(), if has_gaps { "gaps" } else { "time to first text" }),
            x_label: "percentile",
            y_label: "ms",
            log_x: false,
            lines: lines(&all, |series| if has_gaps { percentiles(gaps(series)) } else { percentiles(waits(series)) }),
        });
        if workload == Workload::Overload {
            charts.push(Chart {
                title: "overload: private memory".to_owned(),
                x_label: "s",
                y_label: "MiB",
                log_x: false,
                lines: lines(&all, |series| {
                    series.samples.last().map_or_else(Vec::new, |sample| sample.memory.clone())
                }),
            });
        }
    }
    charts.retain(|chart| !chart.lines.is_empty());
    svg(&charts)
}

fn lines(series: &[&Series], points: impl Fn(&Series) -> Vec<(f64, f64)>) -> Vec<Line> {
    let line = |(colour, series): (usize, &&Series)| Line {
        name: series.contender.to_owned(),
        colour,
        dashed: false,
        points: points(series),
    };
    series.iter().enumerate().map(line).filter(|line| !line.points.is_empty()).collect()
}

fn streams(series: &Series) -> impl Iterator<Item = &Answer> {
    series.samples.iter().flat_map(|sample| &sample.answers).filter(|answer| answer.role == Role::Stream)
}

fn waits(series: &Series) -> impl Iterator<Item = f64> {
    streams(series).filter_map(Answer::ttft_ms)
}

fn gaps(series: &Series) -> impl Iterator<Item = f64> {
    streams(series).flat_map(|answer| answer.pieces_ms.windows(2)).map(|pair| pair[1] - pair[0])
}

fn percentiles(values: impl Iterator<Item = f64>) -> Vec<(f64, f64)> {
    let sorted = stats::sorted(values);
    PERCENTILES.iter().filter_map(|&percent| Some((percent, stats::percentile(&sorted, percent)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::answer::Sample;
    use super::*;

    #[test]
    fn each_workload_has_a_panel_and_each_contender_a_line_in_it() {
        let sample = || Sample {
            answers: vec![Answer { start_ms: 5.0, pieces_ms: vec![15.0, 20.0], ..Answer::default() }],
            memory: vec![(0.0, 100.0), (1.0, 101.0)],
            ..Sample::default()
        };
        let series = |workload, contender| Series { workload, contender, figures: Vec::new(), samples: vec![sample()] };
        let all = [
            series(Workload::One, "ours"),
            series(Workload::One, "peer"),
            series(Workload::Overload, "ours"),
            Series { samples: Vec::new(), ..series(Workload::Eight, "ours") },
        ];
        let text = draw(&all);
        assert_eq!((text.matches("font-weight=\"600\"").count(), text.matches("<polyline").count()), (3, 4));
        assert!(text.contains("overload: private memory") && !text.contains(">eight"));
    }
}
