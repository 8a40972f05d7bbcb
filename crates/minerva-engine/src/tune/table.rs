//! What was tried, for people.

use std::fmt::Write as _;

use super::{Rates, TuneReport, TuneSource};

/// A heading, and what stands below it.
type Column = (&'static str, fn(&Rates) -> Option<f64>);

const COLUMNS: [Column; 5] = [
    ("alone", |rates| rates.alone),
    ("many", |rates| rates.many),
    ("long", |rates| rates.long),
    ("prefill", |rates| rates.prefill),
    ("shared", |rates| rates.shared),
];

/// A row for everything that was tried, tokens per second, and the choice below.
pub(super) fn print(report: &TuneReport) -> String {
    let mut text = String::new();
    let columns: Vec<_> =
        COLUMNS.iter().filter(|(_, of)| report.rows.iter().any(|row| of(&row.rates).is_some())).collect();
    let width = report.rows.iter().map(|row| row.settings.len()).max().unwrap_or(0).max("settings".len());
    if !report.rows.is_empty() {
        let _ = write!(text, "{:<9}{:<width$}", "stage", "settings");
        for (heading, _) in &columns {
            let _ = write!(text, "{heading:>10}");
        }
        let _ = writeln!(text, "{:>9}  outcome", "ratio");
    }
    let mut stage = "";
    for row in &report.rows {
        let shown = if row.stage == stage { "" } else { &row.stage };
        stage = &row.stage;
        let _ = write!(text, "{shown:<9}{:<width$}", row.settings);
        for (_, of) in &columns {
            let rate = of(&row.rates).map_or_else(|| "-".to_owned(), rate);
            let _ = write!(text, "{rate:>10}");
        }
        let ratio = row.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
        let mark = if row.outcome == "chosen" { "* " } else { "  " };
        let _ = writeln!(text, "{}", format!("{ratio:>9}{mark}{}", row.outcome).trim_end());
    }
    let seconds = report.took_ms as f64 / 1e3;
    let source = match report.source {
        TuneSource::Defaults => "the defaults".to_owned(),
        TuneSource::Measured => format!("measured in {seconds:.1} s"),
        TuneSource::Cached => "measured at an earlier load".to_owned(),
    };
    let _ = writeln!(text, "chosen: {} ({source}; {:.2} of the defaults)", report.settings, report.gain);
    if let Some(reason) = &report.reason {
        let _ = writeln!(text, "{reason}");
    }
    text
}

fn rate(rate: f64) -> String {
    if rate < 99.95 { format!("{rate:.1}") } else { format!("{rate:.0}") }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::super::TuneRow;
    use super::*;

    #[test]
    fn a_row_for_each_try_and_only_the_columns_that_were_measured() {
        let row = |stage: &str, settings: &str, rates: (f64, f64), ratio: Option<f64>, outcome: &str| TuneRow {
            stage: stage.to_owned(),
            settings: settings.to_owned(),
            rates: Rates { alone: Some(rates.0), many: Some(rates.1), ..Rates::default() },
            ratio,
            outcome: outcome.to_owned(),
        };
        let failed =
            TuneRow { rates: Rates::default(), ..row("cache", "fa off, kv bf16", (0.0, 0.0), None, "failed: x") };
        let report = TuneReport {
            source: TuneSource::Measured,
            settings: "fa off, kv f16".to_owned(),
            gain: 1.134,
            took_ms: 4210,
            rows: vec![
                row("cache", "fa auto, kv f16", (181.2, 360.0), Some(1.0), ""),
                row("cache", "fa off, kv f16", (205.0, 450.4), Some(1.2118), "chosen"),
                failed,
                row("threads", "fa off, kv f16", (99.94, 1000.0), Some(1.0), "stays"),
            ],
            ..TuneReport::default()
        };
        expect![[r"
            stage    settings            alone      many    ratio  outcome
            cache    fa auto, kv f16       181       360    1.000
                     fa off, kv f16        205       450    1.212* chosen
                     fa off, kv bf16         -         -        -  failed: x
            threads  fa off, kv f16       99.9      1000    1.000  stays
            chosen: fa off, kv f16 (measured in 4.2 s; 1.13 of the defaults)
        "]]
        .assert_eq(&report.table());
    }
}
