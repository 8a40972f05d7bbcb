//! CPU and memory limits of the control groups that this process runs in, version 2 and version 1.
//!
//! A limit holds for everything below it, so the tightest one between the process's own group and the mount point counts.
//! Files are read under a root folder, `/` in production and a fake tree in tests; whatever is missing is no limit.

use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A version 1 limit from here on means "none": the kernel writes the largest multiple of the page size.
const V1_UNLIMITED_BYTES: u64 = 1 << 60;

/// What the control groups leave of the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupLimits {
    /// CPU time per time, in thousandths of a CPU: 2500 is two and a half CPUs.
    pub cpu_quota_millis: Option<u64>,
    /// The smallest `memory.max` or `memory.high` (version 1: `memory.limit_in_bytes`) on the way up.
    pub memory_limit_bytes: Option<u64>,
    /// The least room that any limit on the way up leaves: limit less use, the page cache counted as free.
    pub memory_free_bytes: Option<u64>,
    /// The file that sets [`cpu_quota_millis`](Self::cpu_quota_millis).
    pub cpu_source: Option<String>,
    /// The file that sets [`memory_limit_bytes`](Self::memory_limit_bytes).
    pub memory_source: Option<String>,
}

impl CgroupLimits {
    /// Reads the limits of this process. On a system without control groups there are none.
    pub fn read() -> Self {
        Self::read_under(Path::new("/"))
    }

    /// [`read`](Self::read), with `/proc` and `/sys` looked for under `root`.
    pub(crate) fn read_under(root: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let memberships = parse_memberships(&text("proc/self/cgroup"));
        let mounts = parse_mounts(&text("proc/self/mountinfo"));
        let mut limits = Self::default();
        for mount in &mounts {
            let Some(membership) = memberships.iter().find(|m| mount.serves(m)) else {
                continue;
            };
            for folder in mount.levels(root, &membership.path) {
                match mount.version {
                    Version::V2 => limits.add_v2(&folder),
                    Version::V1 => limits.add_v1(&folder),
                }
            }
        }
        limits
    }

    /// Whole CPUs that the quota allows, rounded down but at least one. Rounding up would put more threads at a barrier than
    /// can run at once, and all would wait for the one that is throttled.
    pub fn quota_cpus(&self) -> Option<usize> {
        self.cpu_quota_millis.map(|millis| ((millis / 1000) as usize).max(1))
    }

    fn add_v2(&mut self, folder: &Path) {
        let file = folder.join("cpu.max");
        if let Some(millis) = read(&file).and_then(|text| parse_cpu_max(&text)) {
            self.tighten_cpu(millis, &file);
        }
        let current = read_number(&folder.join("memory.current"));
        let cache = read(&folder.join("memory.stat")).map_or(0, |stat| file_bytes(&stat, ""));
        for name in ["memory.max", "memory.high"] {
            // `memory.high` does not kill, but beyond it the kernel stalls every allocation.
            let file = folder.join(name);
            if let Some(limit) = read_number(&file) {
                self.tighten_memory(limit, current, cache, &file);
            }
        }
    }

    fn add_v1(&mut self, folder: &Path) {
        let file = folder.join("cpu.cfs_quota_us");
        // -1, "no quota", is not a `u64`.
        let quota = read_number(&file);
        let period = read_number(&folder.join("cpu.cfs_period_us"));
        if let Some(millis) = quota.zip(period).and_then(|(quota, period)| millis(quota, period)) {
            self.tighten_cpu(millis, &file);
        }
        let file = folder.join("memory.limit_in_bytes");
        if let Some(limit) = read_number(&file).filter(|&limit| limit < V1_UNLIMITED_BYTES) {
            let current = read_number(&folder.join("memory.usage_in_bytes"));
            let cache = read(&folder.join("memory.stat")).map_or(0, |stat| file_bytes(&stat, "total_"));
            self.tighten_memory(limit, current, cache, &file);
        }
    }

    fn tighten_cpu(&mut self, millis: u64, file: &Path) {
        if self.cpu_quota_millis.is_none_or(|old| millis < old) {
            self.cpu_quota_millis = Some(millis);
            self.cpu_source = Some(file.display().to_string());
        }
    }

    fn tighten_memory(&mut self, limit: u64, current: Option<u64>, cache: u64, file: &Path) {
        if self.memory_limit_bytes.is_none_or(|old| limit < old) {
            self.memory_limit_bytes = Some(limit);
            self.memory_source = Some(file.display().to_string());
        }
        let used = current.unwrap_or(0).saturating_sub(cache);
        let free = limit.saturating_sub(used);
        self.memory_free_bytes = Some(self.memory_free_bytes.map_or(free, |old| old.min(free)));
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// A line of `/proc/self/cgroup`: `4:memory:/docker/abc` or, for version 2, `0::/user.slice`.
#[derive(Debug, PartialEq, Eq)]
struct Membership {
    controllers: Vec<String>, // empty: version 2
    path: String,
}

/// A control group file system, from `/proc/self/mountinfo`.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    version: Version,
    /// The group that is visible at the mount point; in a container often its own.
    root: String,
    point: String,
    options: Vec<String>, // version 1: among them the controllers
}

impl Mount {
    /// Whether the membership's limits are found in this mount. Version 1 spreads a process over several.
    fn serves(&self, membership: &Membership) -> bool {
        match self.version {
            Version::V2 => membership.controllers.is_empty(),
            Version::V1 => {
                let ours = |c: &String| matches!(c.as_str(), "cpu" | "memory") && self.options.contains(c);
                membership.controllers.iter().any(ours)
            }
        }
    }

    /// Folders from the group at `path` up to the mount point.
    fn levels(&self, root: &Path, path: &str) -> Vec<PathBuf> {
        let top = root.join(self.point.trim_start_matches('/'));
        // A path outside of what is mounted (a host path seen from a container, `/../..` in a namespace) has only the top.
        let below = Path::new(path).strip_prefix(&self.root).unwrap_or(Path::new(""));
        let plain = below.components().all(|c| matches!(c, Component::Normal(_)));
        let below = if plain { below } else { Path::new("") };
        below.ancestors().map(|group| top.join(group)).collect()
    }
}

fn parse_memberships(text: &str) -> Vec<Membership> {
    let line = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let controllers = fields.next()?.split(',').filter(|c| !c.is_empty());
        Some(Membership { controllers: controllers.map(str::to_owned).collect(), path: fields.next()?.to_owned() })
    };
    text.lines().filter_map(line).collect()
}

fn parse_mounts(text: &str) -> Vec<Mount> {
    let line = |line: &str| {
        // 31 24 0:27 /root /mount/point rw,relatime shared:9 - cgroup2 source rw,options
        let (mount, file_system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let mut file_system = file_system.split(' ');
        let version = match file_system.next()? {
            "cgroup2" => Version::V2,
            "cgroup" => Version::V1,
            _ => return None,
        };
        Some(Mount {
            version,
            root: unescape(mount.next()?),
            point: unescape(mount.next()?),
            options: file_system.nth(1)?.split(',').map(str::to_owned).collect(),
        })
    };
    text.lines().filter_map(line).collect()
}

/// Undoes mountinfo's octal escapes; only the space is likely.
fn unescape(field: &str) -> String {
    field.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
}

fn read(file: &Path) -> Option<String> {
    fs::read_to_string(file).ok()
}

fn read_number(file: &Path) -> Option<u64> {
    read(file)?.trim().parse().ok() // "max" and "-1", no limit, are no numbers
}

/// Thousandths of a CPU from `cpu.max`: `250000 100000` is 2500, `max 100000` is no quota.
fn parse_cpu_max(text: &str) -> Option<u64> {
    let mut fields = text.split_whitespace();
    let quota = fields.next()?.parse().ok()?;
    let period = fields.next().map_or(Some(100_000), |period| period.parse().ok())?;
    millis(quota, period)
}

fn millis(quota_us: u64, period_us: u64) -> Option<u64> {
    let millis = (u128::from(quota_us) * 1000).checked_div(u128::from(period_us))?;
    u64::try_from(millis).ok()
}

/// Bytes of page cache that the kernel gives back before it kills: both file lists, as in `MemAvailable`. A model file that
/// was read before counts as free, since its next load uses the same pages.
fn file_bytes(memory_stat: &str, prefix: &str) -> u64 {
    let value = |line: &str| {
        let (key, value) = line.split_once(' ')?;
        let name = key.strip_prefix(prefix)?;
        matches!(name, "inactive_file" | "active_file").then(|| value.trim().parse::<u64>().ok())?
    };
    memory_stat.lines().filter_map(value).fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeRoot;
    use proptest::prelude::*;

    const V2_MOUNT: &str = "31 24 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";

    fn v2(path: &str, files: &[(&str, &str)]) -> CgroupLimits {
        let root = FakeRoot::new();
        root.write("proc/self/cgroup", &format!("0::{path}\n"));
        root.write("proc/self/mountinfo", V2_MOUNT);
        for (name, text) in files {
            root.write(&format!("sys/fs/cgroup/{name}"), text);
        }
        CgroupLimits::read_under(root.path())
    }

    #[test]
    fn two_and_a_half_cpus_are_two_threads() {
        let limits = v2("/a", &[("a/cpu.max", "250000 100000\n")]);
        assert_eq!((limits.cpu_quota_millis, limits.quota_cpus()), (Some(2500), Some(2)));
        let limits = v2("/a", &[("a/cpu.max", "50000 100000\n")]);
        assert_eq!((limits.cpu_quota_millis, limits.quota_cpus()), (Some(500), Some(1)));
        let limits = v2("/a", &[("a/cpu.max", "max 100000\n")]);
        assert_eq!((limits.cpu_quota_millis, limits.quota_cpus()), (None, None));
    }

    #[test]
    fn the_tightest_limit_on_the_way_up_counts() {
        let limits = v2(
            "/pod/box/leaf",
            &[
                ("pod/cpu.max", "150000 100000"),
                ("pod/box/cpu.max", "400000 100000"),
                ("pod/box/leaf/cpu.max", "max 100000"),
                ("pod/memory.max", "8000"),
                ("pod/memory.current", "7000"),
                ("pod/memory.stat", "anon 100\ninactive_file 2000\nactive_file 500\n"),
                ("pod/box/memory.max", "6000"),
                ("pod/box/memory.current", "1000"),
                ("pod/box/leaf/memory.max", "max"),
                ("pod/box/leaf/memory.high", "7500"),
            ],
        );
        assert_eq!(limits.cpu_quota_millis, Some(1500));
        assert!(limits.cpu_source.unwrap().ends_with("/sys/fs/cgroup/pod/cpu.max"));
        assert_eq!(limits.memory_limit_bytes, Some(6000));
        assert!(limits.memory_source.unwrap().ends_with("/pod/box/memory.max"));
        assert_eq!(limits.memory_free_bytes, Some(3500)); // pod: 8000 - (7000 - 2500)
    }

    #[test]
    fn page_cache_does_not_change_what_is_free() {
        let with_cache = |cache: u64| {
            let current = (1000 + cache).to_string();
            let stat = format!("anon 1000\nfile {cache}\ninactive_file {cache}\nactive_file 0\n");
            v2("/a", &[("a/memory.max", "10000"), ("a/memory.current", &current), ("a/memory.stat", &stat)])
        };
        for cache in [0, 500, 9000] {
            assert_eq!(with_cache(cache).memory_free_bytes, Some(9000));
        }
    }

    #[test]
    fn memory_high_below_memory_max_is_the_limit() {
        let limits = v2("/a", &[("a/memory.max", "9000"), ("a/memory.high", "5000"), ("a/memory.current", "6000")]);
        assert_eq!((limits.memory_limit_bytes, limits.memory_free_bytes), (Some(5000), Some(0)));
    }

    #[test]
    fn a_namespace_shows_its_own_group_at_the_mount_point() {
        let limits = v2("/", &[("cpu.max", "300000 100000"), ("memory.max", "4096")]);
        assert_eq!((limits.quota_cpus(), limits.memory_limit_bytes), (Some(3), Some(4096)));
        // Outside of the namespace's root, and a path that is not mounted here: the top still counts.
        for path in ["/../../other", "/not/here"] {
            assert_eq!(v2(path, &[("cpu.max", "300000 100000")]).quota_cpus(), Some(3), "{path}");
        }
    }

    #[test]
    fn version_1_controllers_are_found_in_their_own_mounts() {
        let root = FakeRoot::new();
        root.write("proc/self/cgroup", "9:name=systemd:/\n4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n");
        root.write(
            "proc/self/mountinfo",
            "27 1 254:0 / / rw - ext4 /dev/vda rw\n\
             32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
             35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
             40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n\
             41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n",
        );
        root.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1");
        root.write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "350000");
        root.write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000");
        // The container sees its own group as the mount's root.
        root.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "8192");
        root.write("sys/fs/cgroup/memory/memory.usage_in_bytes", "5000");
        root.write(
            "sys/fs/cgroup/memory/memory.stat",
            "inactive_file 1\ntotal_inactive_file 900\ntotal_active_file 100\n",
        );
        let limits = CgroupLimits::read_under(root.path());
        assert_eq!(limits.quota_cpus(), Some(3));
        assert_eq!((limits.memory_limit_bytes, limits.memory_free_bytes), (Some(8192), Some(4192)));

        root.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712");
        assert_eq!(CgroupLimits::read_under(root.path()).memory_limit_bytes, None);
    }

    #[test]
    fn no_control_groups_are_no_limits() {
        assert_eq!(CgroupLimits::read_under(FakeRoot::new().path()), CgroupLimits::default());
    }

    proptest! {
        #[test]
        fn broken_files_never_panic(cgroup in "[0-9a-z:,/.\n ]{0,60}", mounts in "[ -~\n]{0,120}", max in "[ -~]{0,20}") {
            let _ = parse_memberships(&cgroup);
            let _ = parse_mounts(&mounts);
            let _ = parse_cpu_max(&max);
            let _ = file_bytes(&max, "total_");
        }

        #[test]
        fn free_never_exceeds_the_limit(max: u64, current: u64, cache: u64) {
            let mut limits = CgroupLimits::default();
            limits.tighten_memory(max, Some(current), cache, Path::new("memory.max"));
            prop_assert!(limits.memory_free_bytes <= limits.memory_limit_bytes);
        }
    }
}
