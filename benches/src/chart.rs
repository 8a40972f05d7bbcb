//! Line charts as a small SVG that follows the reader's light or dark theme.

use std::fmt::Write as _;

/// One panel.
#[derive(Debug)]
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) x_label: &'static str,
    /// The unit.
    pub(crate) y_label: &'static str,
    /// Equal factors are equally far apart.
    pub(crate) log_x: bool,
    pub(crate) lines: Vec<Line>,
}

/// One line of a panel.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    pub(crate) name: String,
    /// Which of the [`COLOURS`].
    pub(crate) colour: usize,
    pub(crate) dashed: bool,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Distinct for readers who do not see red and green apart, on white and on black.
const COLOURS: [&str; 3] = ["#2a7fd4", "#d9822b", "#8a63c9"];

const PANEL_WIDTH: f64 = 360.0;
const PANEL_HEIGHT: f64 = 250.0;
/// Left, right, top and bottom of a panel, around the axes.
const MARGINS: [f64; 4] = [52.0, 16.0, 34.0, 40.0];
const LEGEND_LINE: f64 = 16.0;
/// Horizontal lines, the axis not counted.
const GRID_LINES: u32 = 4;
/// Numbers under the axis, about.
const MOST_TICKS: usize = 10;
/// Panels beside each other.
const MOST_COLUMNS: usize = 4;

/// All panels in rows, a legend under each.
pub(crate) fn svg(charts: &[Chart]) -> String {
    let n_lines = charts.iter().map(|chart| chart.lines.len()).max().unwrap_or(0);
    let n_columns = charts.len().clamp(1, MOST_COLUMNS);
    let row_height = PANEL_HEIGHT + LEGEND_LINE * (n_lines as f64 + 1.0);
    let (width, height) = (PANEL_WIDTH * n_columns as f64, row_height * charts.len().div_ceil(n_columns) as f64);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\" \
         font-family=\"system-ui, sans-serif\" font-size=\"11\">\n\
         <style>\n\
         text {{ fill: #333; }} .grid {{ stroke: #ddd; }} .axis {{ stroke: #888; }}\n\
         @media (prefers-color-scheme: dark) {{ text {{ fill: #ddd; }} .grid {{ stroke: #3a3a3a; }} .axis {{ stroke: #888; }} }}\n\
         </style>\n"
    );
    for (row, charts) in charts.chunks(n_columns).enumerate() {
        let _ = writeln!(text, "<g transform=\"translate(0 {:.0})\">", row_height * row as f64);
        for (column, chart) in charts.iter().enumerate() {
            panel(&mut text, chart, PANEL_WIDTH * column as f64);
        }
        text.push_str("</g>\n");
    }
    text.push_str("</svg>\n");
    text
}

/// Where the values of a panel lie in the picture.
struct Scale {
    left: f64,
    bottom: f64,
    x_range: (f64, f64),
    y_most: f64,
    log_x: bool,
}

impl Scale {
    fn of(chart: &Chart, offset: f64) -> Self {
        let points = || chart.lines.iter().flat_map(|line| &line.points);
        let low = points().map(|point| point.0).fold(f64::INFINITY, f64::min);
        let high = points().map(|point| point.0).fold(f64::NEG_INFINITY, f64::max);
        let y_most = points().map(|point| point.1).fold(0.0, f64::max);
        Self {
            left: offset + MARGINS[0],
            bottom: PANEL_HEIGHT - MARGINS[3],
            x_range: (low, high),
            y_most: round_up(y_most),
            log_x: chart.log_x,
        }
    }

    fn x(&self, value: f64) -> f64 {
        let place = |value: f64| if self.log_x { value.max(1.0).ln() } else { value };
        let (low, high) = (place(self.x_range.0), place(self.x_range.1));
        let share = if high > low { (place(value) - low) / (high - low) } else { 0.5 };
        self.left + share * (PANEL_WIDTH - MARGINS[0] - MARGINS[1])
    }

    fn y(&self, value: f64) -> f64 {
        self.bottom - value / self.y_most * (self.bottom - MARGINS[2])
    }
}

fn panel(text: &mut String, chart: &Chart, offset: f64) {
    let scale = Scale::of(chart, offset);
    let right = offset + PANEL_WIDTH - MARGINS[1];
    let mut add = |line: std::fmt::Arguments<'_>| {
        let _ = writeln!(text, "{line}"); // a string takes everything
    };
    add(format_args!(
        "<text x=\"{:.1}\" y=\"18\" font-size=\"13\" font-weight=\"600\">{}</text>",
        scale.left,
        escaped(&chart.title)
    ));
    for step in 0..=GRID_LINES {
        let value = scale.y_most * f64::from(step) / f64::from(GRID_LINES);
        let (y, class) = (scale.y(value), if step == 0 { "axis" } else { "grid" });
        add(format_args!(
            "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{y:.1}\" x2=\"{right:.1}\" y2=\"{y:.1}\"/>",
            scale.left
        ));
        add(format_args!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            scale.left - 6.0,
            y + 4.0,
            short(value)
        ));
    }
    let mut ticks: Vec<f64> = chart.lines.iter().flat_map(|line| line.points.iter().map(|point| point.0)).collect();
    ticks.sort_by(f64::total_cmp);
    ticks.dedup();
    for tick in ticks.iter().step_by(ticks.len().div_ceil(MOST_TICKS).max(1)).copied() {
        let (x, y) = (scale.x(tick), scale.bottom + 14.0);
        add(format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{}</text>", short(tick)));
    }
    let middle = f64::midpoint(scale.left, right);
    let label = format!("{} (vertical: {})", chart.x_label, chart.y_label);
    let y = scale.bottom + 30.0;
    add(format_args!("<text x=\"{middle:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{}</text>", escaped(&label)));
    for (at, line) in chart.lines.iter().enumerate() {
        let colour = COLOURS[line.colour % COLOURS.len()];
        let dash = if line.dashed { " stroke-dasharray=\"5 4\"" } else { "" };
        let points: Vec<(f64, f64)> = line.points.iter().map(|&(x, y)| (scale.x(x), scale.y(y))).collect();
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        add(format_args!(
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash} points=\"{}\"/>",
            path.join(" ")
        ));
        for (x, y) in points.iter().filter(|_| !line.dashed) {
            add(format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"));
        }
        let y = PANEL_HEIGHT + LEGEND_LINE * (at as f64 + 0.5);
        let (from, to) = (scale.left, scale.left + 24.0);
        add(format_args!(
            "<line stroke=\"{colour}\" stroke-width=\"2\"{dash} x1=\"{from:.1}\" y1=\"{y:.1}\" x2=\"{to:.1}\" y2=\"{y:.1}\"/>"
        ));
        add(format_args!("<text x=\"{:.1}\" y=\"{:.1}\">{}</text>", to + 6.0, y + 4.0, escaped(&line.name)));
    }
}

/// The next 1, 2, 2.5 or 5 times a power of ten, so that the grid's numbers are short.
fn round_up(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let power = 10_f64.powf(value.log10().floor());
    let step = [1.0, 2.0, 2.5, 4.0, 5.0, 8.0, 10.0].into_iter().find(|step| step * power >= value);
    step.unwrap_or(10.0) * power
}

/// `16k` for 16384, since that is what contexts are called.
fn short(value: f64) -> String {
    let is_whole_kilo = value >= 1024.0 && (value / 1024.0).fract() == 0.0;
    match value {
        _ if is_whole_kilo => format!("{:.0}k", value / 1024.0),
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        _ if value < 10.0 => format!("{value:.2}"),
        _ => format!("{value:.1}"),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart() -> Chart {
        Chart {
            title: "a < b & c".into(),
            x_label: "sequences",
            y_label: "tok/s",
            log_x: true,
            lines: vec![
                Line { name: "engine".into(), colour: 0, dashed: false, points: vec![(1.0, 100.0), (4.0, 200.0)] },
                Line { name: "floor".into(), colour: 0, dashed: true, points: vec![(1.0, 110.0), (4.0, 210.0)] },
            ],
        }
    }

    #[test]
    fn a_point_lies_where_its_value_says() {
        let scale = Scale::of(&chart(), 0.0);
        let (right, top) = (PANEL_WIDTH - MARGINS[1], MARGINS[2]);
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(near(scale.x(1.0), MARGINS[0]) && near(scale.x(4.0), right));
        assert!(near(scale.x(2.0), f64::midpoint(MARGINS[0], right)), "half way by factors");
        assert!(near(scale.y(0.0), PANEL_HEIGHT - MARGINS[3]) && near(scale.y(250.0), top));
    }

    #[test]
    fn the_picture_has_every_line_and_point_and_both_themes() {
        let text = svg(&[chart(), chart()]);
        let count = |what: &str| text.matches(what).count();
        assert_eq!((count("<polyline"), count("<circle"), count("stroke-dasharray")), (4, 4, 4));
        assert_eq!((count("a &lt; b &amp; c"), count("prefers-color-scheme: dark")), (2, 1));
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n") && !text.contains("NaN"));
        assert!(!svg(&[Chart { lines: Vec::new(), ..chart() }]).contains("inf"));
    }

    #[test]
    fn many_panels_are_put_in_rows_and_many_points_share_ticks() {
        let mut many = chart();
        many.lines[0].points = (0..600).map(|at| (f64::from(at), 1.0)).collect();
        let text = svg(&(0..6).map(|_| Chart { lines: many.lines.clone(), ..chart() }).collect::<Vec<_>>());
        assert!(text.contains("viewBox=\"0 0 1440 ") && text.matches("<g transform").count() == 2);
        assert!(text.matches("text-anchor=\"middle\"").count() < 6 * 2 * MOST_TICKS);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [512.0, 1000.0, 2048.0, 16_384.0, 62.5, 0.25].map(short),
            ["512", "1000", "2k", "16k", "62.5", "0.25"]
        );
        let rounded = [0.0, 0.9, 101.0, 210.0, 264.0, 9.1].map(|value| short(round_up(value)));
        assert_eq!(rounded, ["1", "1", "200", "250", "400", "10"]);
    }
}
