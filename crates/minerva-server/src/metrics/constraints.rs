//! What constrained output costs: compilations and their cache, masks, and what sampling waited for them.

use std::fmt::Write as _;

use minerva_engine::{ConstraintStats, TIMING_BOUNDS_US, TimingStats};

use super::Text;

pub(super) fn print(text: &mut Text, stats: &ConstraintStats) {
    let name = "constraint_compile_seconds";
    histogram(text, name, "Compilations of schemas and grammars.", &stats.compile);
    histogram(text, "constraint_mask_seconds", "Masks of constrained answers, on their own threads.", &stats.mask);
    let name = "constraint_mask_wait_seconds";
    histogram(text, name, "Times that sampling waited for a mask that was not ready.", &stats.mask_wait);
    for (name, help, value) in [
        ("constraint_cache_hits_total", "Constraints that were compiled already.", stats.cache_hits_total),
        ("constraint_cache_misses_total", "Constraints that had to be compiled.", stats.cache_misses_total),
    ] {
        text.single(name, "counter", help, value as f64);
    }
    text.single("constraint_cache_entries", "gauge", "Compiled constraints that are kept.", stats.cache_entries as f64);
    text.single("constraint_cache_bytes", "gauge", "What these take, by estimate.", stats.cache_bytes as f64);
}

fn histogram(text: &mut Text, name: &str, help: &str, stats: &TimingStats) {
    text.head(name, "histogram", help);
    let mut total = 0;
    for (i, count) in stats.counts.iter().enumerate() {
        total += count;
        let limit = TIMING_BOUNDS_US.get(i).map_or_else(|| "+Inf".to_owned(), |us| (*us as f64 / 1e6).to_string());
        let _ = writeln!(text.0, "minerva_{name}_bucket{{le=\"{limit}\"}} {total}");
    }
    let sum = stats.sum_us as f64 / 1e6;
    let _ = writeln!(text.0, "minerva_{name}_sum {sum}\nminerva_{name}_count {total}");
}
