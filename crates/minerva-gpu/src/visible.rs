//! `CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER`: which GPUs a CUDA process sees, and in which order.
//!
//! NVML shows every GPU, sorted by PCI address; CUDA shows what these two variables leave. This module turns the first
//! view into the second, so that `cuda:0` means here what it means in llama.cpp. It is pure: no driver, no environment.

use serde::{Deserialize, Serialize};

/// A GPU as far as visibility goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// `GPU-…`.
    pub(crate) uuid: String,
    /// `None`: MIG is off. `Some`: the `MIG-…` UUIDs of its instances, and CUDA sees those in the GPU's place.
    pub(crate) mig: Option<Vec<String>>,
    /// Cores times clock; 0 when the driver does not say.
    pub(crate) speed: u64,
}

/// One CUDA device: a GPU, or one MIG instance of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ordinal {
    /// Position in the candidates.
    pub(crate) gpu: usize,
    /// Position in that candidate's `mig`.
    pub(crate) mig: Option<usize>,
}

/// What CUDA enumerates: `devices[n]` is CUDA device `n`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Enumeration {
    pub(crate) devices: Vec<Ordinal>,
    /// What the variable did that its author may not have meant.
    pub(crate) note: Option<String>,
}

/// The order in which CUDA counts GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum DeviceOrder {
    /// CUDA's default: the GPU that its heuristic takes for the fastest is device 0, "the order of the rest unspecified".
    ///
    /// Here: the GPU with the most cores times clock moves to the front, the rest stays by PCI address. NVML cannot tell what
    /// the heuristic found, so on a machine with different GPUs match devices by PCI address or UUID, not by number, or set
    /// `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
    #[default]
    FastestFirst,
    /// By PCI address, as nvidia-smi counts.
    PciBusId,
}

impl DeviceOrder {
    /// Reads the value of `CUDA_DEVICE_ORDER`; what is not `PCI_BUS_ID` is the default, as for CUDA.
    pub(crate) fn parse(variable: Option<&str>) -> Self {
        match variable.map(str::trim) {
            Some("PCI_BUS_ID") => Self::PciBusId,
            _ => Self::FastestFirst,
        }
    }

    /// Positions of the candidates, which come by PCI address, in CUDA's order.
    fn sort(self, candidates: &[Candidate]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..candidates.len()).collect();
        let unknown = candidates.iter().any(|c| c.speed == 0);
        if self == Self::FastestFirst && !unknown {
            // `max_by_key` would take the last of equals.
            if let Some(fastest) = (0..candidates.len()).rev().max_by_key(|&i| candidates[i].speed) {
                order[..=fastest].rotate_right(1);
            }
        }
        order
    }
}

/// What CUDA shows of `candidates` (sorted by PCI address) under these variables.
///
/// - Unset: everything. Empty, `-1`, `NoDevFiles` and the like: nothing.
/// - A list of numbers (in CUDA's order) or of UUIDs, of which unique beginnings are enough. The first entry decides which of
///   the two; the first that names no device ends the list; a device named twice empties it. Numbers end at their first other
///   character (`1gpu` is 1), as with `strtoul`.
/// - A GPU in MIG mode stands for its first instance. CUDA shows one instance to a process, and then no whole GPU.
///
/// Source: CUDA programming guide, "CUDA environment variables"; MIG user guide, "Device enumeration"; for duplicates and
/// trailing characters, which NVIDIA leaves open, PyTorch's model of the driver (torch/cuda, `_parse_visible_devices`).
pub(crate) fn enumerate(variable: Option<&str>, order: DeviceOrder, candidates: &[Candidate]) -> Enumeration {
    let order = order.sort(candidates);
    let mut found = match variable {
        None => Enumeration { devices: order.iter().filter_map(|&gpu| whole(gpu, candidates)).collect(), note: None },
        Some(list) => listed(list, &order, candidates),
    };
    if let Some(&instance) = found.devices.iter().find(|d| d.mig.is_some())
        && found.devices.len() > 1
    {
        found.devices = vec![instance];
        found.note.get_or_insert_with(|| {
            "CUDA shows one MIG instance to a process and no other GPU beside it; name another one in CUDA_VISIBLE_DEVICES to use it instead".to_owned()
        });
    }
    found
}

/// The CUDA device that stands for a whole GPU; `None` in MIG mode without instances.
fn whole(gpu: usize, candidates: &[Candidate]) -> Option<Ordinal> {
    match &candidates[gpu].mig {
        None => Some(Ordinal { gpu, mig: None }),
        Some(instances) if instances.is_empty() => None,
        Some(_) => Some(Ordinal { gpu, mig: Some(0) }),
    }
}

fn listed(list: &str, order: &[usize], candidates: &[Candidate]) -> Enumeration {
    let mut devices = Vec::new();
    let by_uuid = ["GPU-", "MIG-"].into_iter().find(|prefix| list.trim_start().starts_with(prefix));
    for entry in list.split(',').map(str::trim) {
        let named = match by_uuid {
            Some(prefix) if entry.starts_with(prefix) => by_uuid_prefix(entry, candidates),
            Some(_) => None,
            None => leading_number(entry).and_then(|n| order.get(n)).and_then(|&gpu| whole(gpu, candidates)),
        };
        match named {
            Some(device) if devices.contains(&device) => {
                return Enumeration {
                    devices: Vec::new(),
                    note: Some(format!("`{entry}` names a device for the second time, which hides all of them")),
                };
            }
            Some(device) => devices.push(device),
            None => {
                let note = match (list.trim(), entry) {
                    ("", _) => "it is empty, which hides every GPU".to_owned(),
                    ("-1" | "NoDevFiles", _) => "this value hides every GPU".to_owned(),
                    _ => format!("`{entry}` names no device and ends the list"),
                };
                return Enumeration { devices, note: Some(note) };
            }
        }
    }
    Enumeration { devices, note: None }
}

/// The one device whose UUID begins with `entry`.
fn by_uuid_prefix(entry: &str, candidates: &[Candidate]) -> Option<Ordinal> {
    let mut matches = candidates.iter().enumerate().flat_map(|(gpu, candidate)| {
        let itself = candidate.uuid.starts_with(entry).then(|| whole(gpu, candidates)).flatten();
        let instances = candidate.mig.iter().flatten().enumerate();
        let instances = instances.filter(|(_, uuid)| uuid.starts_with(entry));
        itself.into_iter().chain(instances.map(move |(mig, _)| Ordinal { gpu, mig: Some(mig) }))
    });
    let first = matches.next()?;
    matches.next().is_none().then_some(first)
}

/// The number at the start of an entry, as `strtoul` reads it; `None` for a negative one and for none at all.
fn leading_number(entry: &str) -> Option<usize> {
    let digits = entry.strip_prefix('+').unwrap_or(entry);
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn gpu(uuid: &str) -> Candidate {
        Candidate { uuid: uuid.to_owned(), ..Candidate::default() }
    }

    fn mig(uuid: &str, instances: &[&str]) -> Candidate {
        Candidate { mig: Some(instances.iter().map(|&i| i.to_owned()).collect()), ..gpu(uuid) }
    }

    /// `[0, 2]` for whole GPUs, `["1.0"]` for an instance.
    fn shown(variable: Option<&str>, candidates: &[Candidate]) -> String {
        let found = enumerate(variable, DeviceOrder::PciBusId, candidates);
        let names = found.devices.iter().map(|d| match d.mig {
            None => d.gpu.to_string(),
            Some(instance) => format!("{}.{instance}", d.gpu),
        });
        names.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn lists_of_numbers_and_uuids_follow_cuda() {
        let gpus = [gpu("GPU-aaaa1111"), gpu("GPU-aaaa2222"), gpu("GPU-bbbb3333"), gpu("GPU-cccc4444")];
        for (variable, expected) in [
            (None, "0 1 2 3"),
            (Some(""), ""),
            (Some("  "), ""),
            (Some("-1"), ""),
            (Some("NoDevFiles"), ""),
            (Some("none"), ""),
            (Some("all"), ""),
            (Some("2"), "2"),
            (Some("2,1"), "2 1"),
            (Some(" 2 , 1 "), "2 1"),
            (Some("0,2,-1,1"), "0 2"),
            (Some("0,9,1"), "0"),
            (Some("0,,1"), "0"),
            (Some("0,"), "0"),
            (Some(",0"), ""),
            (Some("0,1,0"), ""),
            (Some("1gpu2,2ampere"), "1 2"),
            (Some("+1"), "1"),
            (Some("00,01"), "0 1"),
            (Some("99999999999999999999999,0"), ""),
            (Some("GPU-bbbb3333"), "2"),
            (Some("GPU-b,GPU-c"), "2 3"),
            (Some("GPU-aaaa"), ""), // ambiguous
            (Some("GPU-c,GPU-aaaa,GPU-b"), "3"),
            (Some("GPU-"), ""),
            (Some("GPU-dddd,GPU-b"), ""),
            (Some("GPU-b,GPU-bbbb"), ""), // the same device twice
            (Some("GPU-b,0"), "2"),       // the first entry decides the kind
            (Some("0,GPU-b"), "0"),
            (Some("gpu-b"), ""),
            (Some("MIG-1"), ""),
        ] {
            assert_eq!(shown(variable, &gpus), expected, "{variable:?}");
        }
        assert_eq!(shown(None, &[]), "");
        assert_eq!(shown(Some("0"), &[]), "");
    }

    #[test]
    fn one_mig_instance_is_shown_and_then_no_whole_gpu() {
        let gpus = [gpu("GPU-a"), mig("GPU-b", &["MIG-11", "MIG-12"]), mig("GPU-c", &[]), gpu("GPU-d")];
        for (variable, expected) in [
            (None, "1.0"),
            (Some("0,3"), "0 3"),
            (Some("1"), "1.0"),
            (Some("0,1"), "1.0"),
            (Some("2,0"), ""), // MIG mode without instances is no device
            (Some("GPU-b"), "1.0"),
            (Some("MIG-12"), "1.1"),
            (Some("MIG-12,MIG-11"), "1.1"),
            (Some("MIG-1"), ""), // ambiguous
            (Some("MIG-9,MIG-11"), ""),
        ] {
            assert_eq!(shown(variable, &gpus), expected, "{variable:?}");
        }
        let legacy = [mig("GPU-b", &["MIG-GPU-b/1/0", "MIG-GPU-b/2/0"])]; // the names of drivers before 470
        assert_eq!(shown(Some("MIG-GPU-b/2/0"), &legacy), "0.1");
    }

    #[test]
    fn fastest_first_moves_only_the_fastest() {
        let speeds = |speeds: &[u64]| -> Vec<usize> {
            let gpus: Vec<_> = speeds.iter().map(|&speed| Candidate { speed, ..gpu("") }).collect();
            let found = enumerate(None, DeviceOrder::FastestFirst, &gpus);
            found.devices.iter().map(|d| d.gpu).collect()
        };
        assert_eq!(speeds(&[1, 2, 3, 2]), [2, 0, 1, 3]);
        assert_eq!(speeds(&[5, 5, 5]), [0, 1, 2]);
        assert_eq!(speeds(&[1, 5, 5]), [1, 0, 2]);
        assert_eq!(speeds(&[1, 0, 9]), [0, 1, 2]); // unknown: by PCI address
        let gpus = [Candidate { speed: 1, ..gpu("GPU-a") }, Candidate { speed: 9, ..gpu("GPU-b") }];
        let first = |order| enumerate(Some("0"), order, &gpus).devices[0].gpu;
        assert_eq!(first(DeviceOrder::FastestFirst), 1);
        assert_eq!(first(DeviceOrder::PciBusId), 0);
        assert_eq!(DeviceOrder::parse(Some("PCI_BUS_ID")), DeviceOrder::PciBusId);
        assert_eq!(DeviceOrder::parse(Some("pci")), DeviceOrder::FastestFirst);
    }

    #[test]
    fn what_the_variable_hides_is_explained() {
        let gpus = [gpu("GPU-a"), gpu("GPU-b")];
        let note = |variable| enumerate(Some(variable), DeviceOrder::PciBusId, &gpus).note.unwrap_or_default();
        assert!(note("").contains("empty"));
        assert!(note("-1").contains("hides every GPU"));
        assert!(note("0,7").contains("`7` names no device"));
        assert!(note("0,0").contains("second time"));
        assert_eq!(note("0,1"), "");
    }

    fn entry() -> impl Strategy<Value = String> {
        prop_oneof![(-2_i32..8).prop_map(|n| n.to_string()), "GPU-[ab]{0,3}", "MIG-[ab]{0,3}", "[ -~]{0,6}", ".{0,4}"]
    }

    proptest! {
        #[test]
        fn every_list_gives_distinct_devices_that_exist(
            list in proptest::collection::vec(entry(), 0..6),
            uuids in proptest::collection::vec("[ab]{1,3}", 0..5),
            split in 0_usize..6,
            fastest_first: bool,
        ) {
            let gpus: Vec<_> = uuids.iter().enumerate().map(|(i, uuid)| {
                let instances = (i == split).then(|| vec![format!("MIG-{uuid}a"), format!("MIG-{uuid}b")]);
                Candidate { uuid: format!("GPU-{uuid}"), mig: instances, speed: uuid.len() as u64 }
            }).collect();
            let order = if fastest_first { DeviceOrder::FastestFirst } else { DeviceOrder::PciBusId };
            let found = enumerate(Some(&list.join(",")), order, &gpus).devices;
            for (i, device) in found.iter().enumerate() {
                prop_assert!(device.gpu < gpus.len());
                prop_assert_eq!(gpus[device.gpu].mig.is_some(), device.mig.is_some());
                prop_assert!(!found[..i].contains(device));
            }
            let instances = found.iter().filter(|d| d.mig.is_some()).count();
            prop_assert!(instances == 0 || found.len() == 1);
        }

        #[test]
        fn a_permutation_of_numbers_is_that_permutation(order in Just((0_usize..6).collect::<Vec<_>>()).prop_shuffle()) {
            let gpus: Vec<_> = (0..6).map(|i| gpu(&format!("GPU-{i}"))).collect();
            let numbers = order.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
            let uuids = order.iter().map(|i| format!("GPU-{i}")).collect::<Vec<_>>().join(",");
            for list in [numbers, uuids] {
                let found = enumerate(Some(&list), DeviceOrder::PciBusId, &gpus).devices;
                prop_assert_eq!(found.iter().map(|d| d.gpu).collect::<Vec<_>>(), order.clone());
            }
        }
    }
}
