//! The CPU: what it is, what it can do, and how many threads this process may run on it.

#[cfg(any(target_os = "linux", test))]
use std::collections::HashSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::cgroup::CgroupLimits;

/// The CPU and this process's part of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuInfo {
    /// The marketing name.
    pub model: String,
    /// `x86_64`, `aarch64`.
    pub architecture: String,
    /// Hardware threads of the machine.
    pub logical_cpus: usize,
    /// Cores of the machine.
    pub physical_cores: usize,
    /// Hardware threads that the affinity mask leaves (`taskset`, cpusets).
    pub affinity_cpus: usize,
    /// Cores that the affinity mask leaves.
    pub affinity_cores: usize,
    /// Whole CPUs of the cgroup's quota, rounded down; `None` without one.
    pub quota_cpus: Option<usize>,
    /// Threads for computing: one per core in the mask, at most the quota.
    ///
    /// Two hardware threads share one core's arithmetic, so a second one per core gains next to nothing, and a thread beyond the
    /// quota makes all others wait. The exception is a single core with two hardware threads, as small virtual machines have:
    /// both are used.
    pub threads: usize,
    /// The instruction sets that matter for inference, in Linux's spelling: `avx2`, `avx512f`, `amx_int8`, `asimddp`, `i8mm`.
    pub features: Vec<String>,
}

/// What of the CPU's flags makes llama.cpp faster, the older first.
const FEATURES: &[&str] = &[
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "bmi2",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512cd",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512vbmi",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "amx_fp16", // x86
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "sme",
    "sme2", // Arm
];

impl CpuInfo {
    /// Reads the CPU and this thread's affinity mask.
    pub fn read() -> Self {
        Self::read_under(Path::new("/"), &CgroupLimits::read())
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn read_under(root: &Path, limits: &CgroupLimits) -> Self {
        Self::from_linux(root, affinity(), limits)
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn read_under(_root: &Path, limits: &CgroupLimits) -> Self {
        let kind = sysinfo::RefreshKind::nothing().with_cpu(sysinfo::CpuRefreshKind::nothing());
        let system = sysinfo::System::new_with_specifics(kind);
        let logical_cpus = system.cpus().len().max(1);
        let physical_cores = sysinfo::System::physical_core_count().unwrap_or(logical_cpus);
        let affinity_cpus = std::thread::available_parallelism().map_or(logical_cpus, usize::from);
        let counts =
            Counts { logical_cpus, physical_cores, affinity_cpus, affinity_cores: physical_cores.min(affinity_cpus) };
        let model = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned());
        Self::new(model.unwrap_or_default(), counts, limits, detected_features())
    }

    #[cfg(any(target_os = "linux", test))]
    fn from_linux(root: &Path, affinity: Option<Vec<usize>>, limits: &CgroupLimits) -> Self {
        let text = |path: &str| std::fs::read_to_string(root.join(path)).ok();
        let cpuinfo = text("proc/cpuinfo").unwrap_or_default();
        let online = text("sys/devices/system/cpu/online").and_then(|list| parse_cpu_list(&list));
        let online = online.unwrap_or_else(|| {
            let seen = std::thread::available_parallelism().map_or(1, usize::from);
            affinity.clone().unwrap_or_else(|| (0..seen).collect())
        });
        let affinity = affinity.unwrap_or_else(|| online.clone());
        let siblings = |cpu: usize| {
            let folder = format!("sys/devices/system/cpu/cpu{cpu}/topology");
            text(&format!("{folder}/core_cpus_list")).or_else(|| text(&format!("{folder}/thread_siblings_list")))
        };
        let counts = Counts {
            logical_cpus: online.len(),
            physical_cores: count_cores(&online, siblings),
            affinity_cpus: affinity.len(),
            affinity_cores: count_cores(&affinity, siblings),
        };
        let (model, features) = parse_cpuinfo(&cpuinfo);
        // Arm's cpuinfo has no name; boards put one here, with a NUL at its end.
        let board = || text("sys/firmware/devicetree/base/model").map(|name| name.trim_end_matches('\0').to_owned());
        Self::new(model.or_else(board).unwrap_or_default(), counts, limits, features)
    }

    fn new(model: String, counts: Counts, limits: &CgroupLimits, features: Vec<String>) -> Self {
        let quota_cpus = limits.quota_cpus();
        let wanted = counts.affinity_cores.max(counts.affinity_cpus.min(2));
        Self {
            model: if model.is_empty() { "unknown CPU".to_owned() } else { model },
            architecture: std::env::consts::ARCH.to_owned(),
            logical_cpus: counts.logical_cpus,
            physical_cores: counts.physical_cores,
            affinity_cpus: counts.affinity_cpus,
            affinity_cores: counts.affinity_cores,
            quota_cpus,
            threads: wanted.min(quota_cpus.unwrap_or(usize::MAX)).max(1),
            features,
        }
    }
}

/// The four counts of [`CpuInfo`].
#[derive(Clone, Copy)]
struct Counts {
    logical_cpus: usize,
    physical_cores: usize,
    affinity_cpus: usize,
    affinity_cores: usize,
}

/// The hardware threads that this thread may run on. `None` on machines with more than the mask can hold.
#[cfg(target_os = "linux")]
fn affinity() -> Option<Vec<usize>> {
    let mask = rustix::thread::sched_getaffinity(None).ok()?;
    Some((0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| mask.is_set(cpu)).collect())
}

/// Different cores among these hardware threads; each counts as one where the kernel does not tell.
#[cfg(any(target_os = "linux", test))]
fn count_cores(cpus: &[usize], siblings: impl Fn(usize) -> Option<String>) -> usize {
    let name = |&cpu: &usize| siblings(cpu).map_or_else(|| cpu.to_string(), |list| list.trim().to_owned());
    cpus.iter().map(name).collect::<HashSet<_>>().len()
}

/// The kernel's list format: `0-3,8,10-11`.
#[cfg(any(target_os = "linux", test))]
fn parse_cpu_list(text: &str) -> Option<Vec<usize>> {
    const MOST: usize = 1 << 16; // far above any machine; keeps a broken file from filling the memory
    let mut cpus = Vec::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MOST {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// The name and the known features from `/proc/cpuinfo`. The kernel lists a feature only if it also saves its registers.
#[cfg(any(target_os = "linux", test))]
fn parse_cpuinfo(text: &str) -> (Option<String>, Vec<String>) {
    let field = |names: &[&str]| {
        text.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            names.contains(&key.trim()).then(|| value.trim())
        })
    };
    let flags: HashSet<_> = field(&["flags", "Features"]).unwrap_or_default().split_whitespace().collect();
    let features = FEATURES.iter().filter(|name| flags.contains(*name));
    (field(&["model name"]).map(str::to_owned), features.map(|&name| name.to_owned()).collect())
}

/// The features that this program can find out by itself, for systems without `/proc/cpuinfo`.
#[cfg(not(target_os = "linux"))]
fn detected_features() -> Vec<String> {
    #[cfg(target_arch = "x86_64")]
    let found = [
        ("sse4_2", std::arch::is_x86_feature_detected!("sse4.2")),
        ("avx", std::arch::is_x86_feature_detected!("avx")),
        ("f16c", std::arch::is_x86_feature_detected!("f16c")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("bmi2", std::arch::is_x86_feature_detected!("bmi2")),
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx512bw", std::arch::is_x86_feature_detected!("avx512bw")),
        ("avx512_vnni", std::arch::is_x86_feature_detected!("avx512vnni")),
        ("avx512_bf16", std::arch::is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(target_arch = "aarch64")]
    let found = [
        ("asimd", std::arch::is_aarch64_feature_detected!("neon")),
        ("asimdhp", std::arch::is_aarch64_feature_detected!("fp16")),
        ("asimddp", std::arch::is_aarch64_feature_detected!("dotprod")),
        ("i8mm", std::arch::is_aarch64_feature_detected!("i8mm")),
        ("bf16", std::arch::is_aarch64_feature_detected!("bf16")),
    ];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let found: [(&str, bool); 0] = [];
    let known = found.into_iter().filter(|(name, there)| *there && FEATURES.contains(name));
    known.map(|(name, _)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeRoot;
    use proptest::prelude::*;

    /// `cores` cores with two hardware threads each, numbered as Intel's are: 0 and `cores` share the first core.
    fn smt(cores: usize) -> FakeRoot {
        let root = FakeRoot::new();
        root.write("sys/devices/system/cpu/online", &format!("0-{}\n", cores * 2 - 1));
        for cpu in 0..cores * 2 {
            let core = cpu % cores;
            let file = format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
            root.write(&file, &format!("{core},{}\n", core + cores));
        }
        root
    }

    fn quota(millis: u64) -> CgroupLimits {
        CgroupLimits { cpu_quota_millis: Some(millis), ..CgroupLimits::default() }
    }

    fn threads(root: &FakeRoot, affinity: &[usize], limits: &CgroupLimits) -> usize {
        CpuInfo::from_linux(root.path(), Some(affinity.to_vec()), limits).threads
    }

    #[test]
    fn one_thread_per_core_within_mask_and_quota() {
        let root = smt(8);
        let all: Vec<_> = (0..16).collect();
        let none = CgroupLimits::default();
        assert_eq!(threads(&root, &all, &none), 8);
        assert_eq!(threads(&root, &all, &quota(2500)), 2);
        assert_eq!(threads(&root, &all, &quota(500)), 1);
        assert_eq!(threads(&root, &all, &quota(64_000)), 8);
        assert_eq!(threads(&root, &[0], &none), 1);
        assert_eq!(threads(&root, &[0, 1], &none), 2);
        assert_eq!(threads(&root, &[0, 8], &none), 2); // one core, but both of its threads are all there is
        assert_eq!(threads(&root, &[0, 1, 2, 8, 9, 10], &none), 3);
        assert_eq!(threads(&root, &[4, 5, 6], &quota(2000)), 2);
    }

    #[test]
    fn the_machine_and_the_mask_are_counted_apart() {
        let cpu = CpuInfo::from_linux(smt(4).path(), Some(vec![1, 2, 5]), &CgroupLimits::default());
        assert_eq!((cpu.logical_cpus, cpu.physical_cores), (8, 4));
        assert_eq!((cpu.affinity_cpus, cpu.affinity_cores, cpu.threads), (3, 2, 2));
    }

    #[test]
    fn without_topology_every_hardware_thread_is_a_core() {
        let root = FakeRoot::new();
        let cpu = CpuInfo::from_linux(root.path(), Some(vec![0, 1, 2]), &CgroupLimits::default());
        assert_eq!((cpu.logical_cpus, cpu.physical_cores, cpu.threads), (3, 3, 3));
        let cpu = CpuInfo::from_linux(root.path(), None, &CgroupLimits::default());
        assert!(cpu.threads >= 1);
    }

    #[test]
    fn names_and_features_come_from_cpuinfo() {
        let xeon = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Platinum 8481C\nflags\t\t: fpu sse4_2 avx avx2 fma avx512f avx512_vnni amx_bf16 amx_tile amx_int8\n\nprocessor\t: 1\nmodel name\t: other\n";
        let (model, features) = parse_cpuinfo(xeon);
        assert_eq!(model.as_deref(), Some("Intel(R) Xeon(R) Platinum 8481C"));
        let expected = ["sse4_2", "avx", "fma", "avx2", "avx512f", "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"];
        assert_eq!(features, expected);

        let root = FakeRoot::new();
        root.write("proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm sve2\nCPU part\t: 0xd42\n");
        root.write("sys/firmware/devicetree/base/model", "NVIDIA Jetson AGX Orin Developer Kit\0");
        let cpu = CpuInfo::from_linux(root.path(), Some(vec![0]), &CgroupLimits::default());
        assert_eq!(cpu.model, "NVIDIA Jetson AGX Orin Developer Kit");
        assert_eq!(cpu.features, ["asimd", "asimddp", "i8mm", "sve2"]);
        assert_eq!(parse_cpuinfo(""), (None, vec![]));
    }

    #[test]
    fn lists_of_cpus_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_cpu_list("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(parse_cpu_list("0\n"), Some(vec![0]));
        for broken in ["", "a", "3-1", "0-99999999999", "0,,1"] {
            assert_eq!(parse_cpu_list(broken), None, "{broken}");
        }
    }

    proptest! {
        #[test]
        fn threads_stay_within_mask_and_quota(
            affinity in proptest::collection::btree_set(0_usize..16, 1..16),
            millis in proptest::option::of(1_u64..20_000),
        ) {
            let affinity: Vec<_> = affinity.into_iter().collect();
            let limits = CgroupLimits { cpu_quota_millis: millis, ..CgroupLimits::default() };
            let counts = Counts {
                logical_cpus: 16,
                physical_cores: 8,
                affinity_cpus: affinity.len(),
                affinity_cores: count_cores(&affinity, |cpu| Some((cpu % 8).to_string())),
            };
            let threads = CpuInfo::new(String::new(), counts, &limits, vec![]).threads;
            prop_assert!(threads >= 1 && threads <= affinity.len());
            if let Some(millis) = millis.filter(|&m| m >= 1000) {
                prop_assert!(threads as u64 * 1000 <= millis);
            }
        }

        #[test]
        fn broken_files_never_panic(text in "[ -~\n\t]{0,80}") {
            let _ = parse_cpu_list(&text);
            let _ = parse_cpuinfo(&text);
        }
    }
}
