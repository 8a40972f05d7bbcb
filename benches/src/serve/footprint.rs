//! What a server's process holds: threads, open files, memory, and the gauges that should be 0 when nobody asks anything.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;

use serde::{Deserialize, Serialize};

/// Ends of the names of gauges that count requests or used cells, of Minerva and of llama-server.
const GAUGES: [&str; 6] = [
    "requests_running",
    "requests_queued",
    "kv_cells_used",
    "connections_open",
    "requests_processing",
    "requests_deferred",
];

/// A process at one moment. Fields are `None` where the system does not tell.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Footprint {
    pub(super) threads: Option<u64>,
    pub(super) open_files: Option<usize>,
    pub(super) resident_mib: Option<f64>,
    /// Of `resident_mib`, what was copied out of the KV cache, if the server tells: up to a limit it may grow.
    pub(super) host_cache_mib: Option<f64>,
    /// From `/metrics`, where the server has it.
    pub(super) gauges: BTreeMap<String, f64>,
}

impl Footprint {
    /// Reads what the system tells about process `pid`.
    pub(super) fn of(pid: Option<u32>, metrics: &str) -> Self {
        let host_cache = samples(metrics).find(|(name, _)| name.ends_with("host_cache_bytes"));
        let host_cache_mib =
            host_cache.and_then(|(_, value)| value.parse::<f64>().ok()).map(|bytes| bytes / 1_048_576.0);
        let mut footprint = Self { gauges: gauges(metrics), host_cache_mib, ..Self::default() };
        let Some(pid) = pid else { return footprint };
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        footprint.threads = number(&status, "Threads:");
        footprint.resident_mib = number(&status, "VmRSS:").map(|kib| kib as f64 / 1024.0);
        footprint.open_files = fs::read_dir(format!("/proc/{pid}/fd")).ok().map(Iterator::count);
        footprint
    }
}

impl Footprint {
    /// Sum of the gauges, without the connection that asked for them; `None` where the server has none.
    pub(super) fn left_over(&self) -> Option<f64> {
        let counted = self.gauges.iter().filter(|(name, _)| !name.ends_with("connections_open"));
        counted.map(|(_, value)| *value).reduce(|sum, value| sum + value)
    }
}

/// Memory of a process that no file backs, in RAM or swapped out, in MiB; `None` where the system does not tell.
pub(super) fn private_mib(pid: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = ["RssAnon:", "RssShmem:", "VmSwap:"].into_iter().map(|key| number(&status, key));
    kib.sum::<Option<u64>>().map(|kib| kib as f64 / 1024.0)
}

fn number(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The gauges of [`GAUGES`] in Prometheus' text format.
fn gauges(metrics: &str) -> BTreeMap<String, f64> {
    samples(metrics)
        .filter(|(name, _)| GAUGES.iter().any(|gauge| name.ends_with(gauge)))
        .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
        .collect()
}

/// Names and values of Prometheus' text format.
fn samples(metrics: &str) -> impl Iterator<Item = (&str, &str)> {
    metrics.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '))
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        parts.extend(self.threads.map(|n| format!("{n} threads")));
        parts.extend(self.open_files.map(|n| format!("{n} open files")));
        parts.extend(self.resident_mib.map(|mib| format!("{mib:.0} MiB resident")));
        parts.extend(self.host_cache_mib.map(|mib| format!("{mib:.0} MiB of it host cache")));
        parts.extend(self.gauges.iter().map(|(name, value)| format!("{name} {value}")));
        f.write_str(&parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_gauges_that_should_return_to_zero_are_read() {
        let text = "# TYPE minerva_kv_cells_used gauge\nminerva_kv_cells_used 12\nminerva_kv_cells_total 8192\n\
                    llamacpp:requests_processing 1\nllamacpp:prompt_tokens_total 5\n";
        let footprint = Footprint::of(None, text);
        assert_eq!((footprint.left_over(), Footprint::default().left_over()), (Some(13.0), None));
        assert_eq!(footprint.to_string(), "llamacpp:requests_processing 1, minerva_kv_cells_used 12");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_threads_files_and_memory() {
        let own = Footprint::of(Some(std::process::id()), "");
        assert!(private_mib(std::process::id()) > Some(0.1));
        assert!(own.threads >= Some(1) && own.open_files >= Some(3) && own.resident_mib > Some(0.5), "{own}");
    }
}
