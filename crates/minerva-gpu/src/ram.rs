//! The system's memory, after what the control groups leave of it.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::cgroup::CgroupLimits;

/// RAM that this process may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemMemory {
    /// The machine's RAM, or the cgroup's limit where that is less.
    pub total_bytes: u64,
    /// What can be allocated without swapping, page cache included: `MemAvailable`, or the cgroup's room where that is less.
    pub free_bytes: u64,
    /// The machine's RAM.
    pub machine_total_bytes: u64,
    /// The machine's `MemAvailable`.
    pub machine_free_bytes: u64,
}

impl SystemMemory {
    /// Reads the memory now.
    pub fn read() -> Self {
        Self::read_under(Path::new("/"), &CgroupLimits::read())
    }

    pub(crate) fn read_under(root: &Path, limits: &CgroupLimits) -> Self {
        let (total, free) = machine_memory(root).unwrap_or_else(|| {
            tracing::warn!("the system's memory cannot be read");
            (0, 0)
        });
        Self::bounded(total, free, limits)
    }

    fn bounded(machine_total_bytes: u64, machine_free_bytes: u64, limits: &CgroupLimits) -> Self {
        let total_bytes = limits.memory_limit_bytes.map_or(machine_total_bytes, |l| l.min(machine_total_bytes));
        let free_bytes = limits.memory_free_bytes.map_or(machine_free_bytes, |l| l.min(machine_free_bytes));
        Self { total_bytes, free_bytes: free_bytes.min(total_bytes), machine_total_bytes, machine_free_bytes }
    }
}

#[cfg(target_os = "linux")]
fn machine_memory(root: &Path) -> Option<(u64, u64)> {
    parse_meminfo(&std::fs::read_to_string(root.join("proc/meminfo")).ok()?)
}

#[cfg(not(target_os = "linux"))]
#[allow(clippy::unnecessary_wraps)] // as on Linux
fn machine_memory(_root: &Path) -> Option<(u64, u64)> {
    let mut system = sysinfo::System::new();
    system.refresh_memory_specifics(sysinfo::MemoryRefreshKind::nothing().with_ram());
    Some((system.total_memory(), system.available_memory()))
}

/// Total and available bytes from `/proc/meminfo`. `MemFree` will not do: it counts the page cache as used.
#[cfg(any(target_os = "linux", test))]
fn parse_meminfo(text: &str) -> Option<(u64, u64)> {
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let total = kib("MemTotal")?;
    let available = kib("MemAvailable").or_else(|| kib("MemFree"))?; // always there since Linux 3.14
    Some((total.checked_mul(1024)?, available.min(total).checked_mul(1024)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn page_cache_counts_as_free() {
        // A DGX Spark after a 60 GB model file was read: MemFree says that there is nothing left.
        let meminfo = "MemTotal:       125513504 kB\nMemFree:         1206508 kB\nMemAvailable:   117312280 kB\nCached:         62914560 kB\n";
        assert_eq!(parse_meminfo(meminfo), Some((125_513_504 << 10, 117_312_280 << 10)));
        assert_eq!(parse_meminfo("MemTotal: 8 kB\nMemFree: 3 kB\n"), Some((8192, 3072)));
        assert_eq!(parse_meminfo("MemTotal: x kB\n"), None);
        assert_eq!(parse_meminfo(""), None);
    }

    #[test]
    fn the_cgroup_bounds_what_the_machine_has() {
        let limits = |limit, free| CgroupLimits {
            memory_limit_bytes: limit,
            memory_free_bytes: free,
            ..CgroupLimits::default()
        };
        let seen = |limits| {
            let memory = SystemMemory::bounded(100, 60, &limits);
            (memory.total_bytes, memory.free_bytes)
        };
        assert_eq!(seen(limits(None, None)), (100, 60));
        assert_eq!(seen(limits(Some(50), Some(40))), (50, 40));
        assert_eq!(seen(limits(Some(90), Some(80))), (90, 60)); // the machine has less than the group may take
        assert_eq!(seen(limits(Some(500), Some(400))), (100, 60));
    }

    proptest! {
        #[test]
        fn broken_meminfo_never_panics(text in "(Mem(Total|Free|Available): {0,4}[0-9]{0,22} ?(kB)?\n){0,5}") {
            let _ = parse_meminfo(&text);
        }
    }
}
