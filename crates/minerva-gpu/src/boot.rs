//! What must be the same for a finding about drivers and devices to hold: this boot, this driver, these GPUs. Only files are
//! read; no driver is called.

use std::fmt::Write as _;
use std::path::Path;

use crate::nvml;

/// A text that changes with a reboot, another NVIDIA driver, or other GPUs. `None` when the boot cannot be told from another.
pub fn hardware_fingerprint() -> Option<String> {
    fingerprint_under(Path::new("/"), boot_id()?)
}

fn fingerprint_under(root: &Path, boot: String) -> Option<String> {
    let mut text = boot;
    if let Ok(version) = std::fs::read_to_string(root.join("sys/module/nvidia/version")) {
        write!(text, " nvidia {}", version.trim()).ok()?;
    }
    for address in nvml::pci_addresses(root) {
        write!(text, " {address}").ok()?;
        let information = root.join("proc/driver/nvidia/gpus").join(&address).join("information");
        let information = std::fs::read_to_string(information).unwrap_or_default();
        if let Some(uuid) = information.lines().find_map(|line| line.strip_prefix("GPU UUID:")) {
            write!(text, "={}", uuid.trim()).ok()?;
        }
    }
    // A container sees the host's bus, but only the device nodes that it was given.
    let nodes = std::fs::read_dir(root.join("dev")).into_iter().flatten().flatten();
    let mut nodes: Vec<_> = nodes.map(|node| node.file_name().to_string_lossy().into_owned()).collect();
    nodes.retain(|node| node.starts_with("nvidia"));
    nodes.sort();
    write!(text, " {}", nodes.join(" ")).ok()?;
    Some(text)
}

#[cfg(target_os = "linux")]
fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}

#[cfg(not(target_os = "linux"))]
fn boot_id() -> Option<String> {
    Some(sysinfo::System::boot_time()).filter(|seconds| *seconds > 0).map(|seconds| seconds.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeRoot;

    #[test]
    fn boot_driver_gpus_and_device_nodes_all_change_it() {
        let root = FakeRoot::new();
        let now = |boot: &str| fingerprint_under(root.path(), boot.to_owned()).unwrap();
        let mut seen = vec![now("one"), now("two")];
        for (file, text) in [
            ("sys/module/nvidia/version", "535.104.05\n"),
            ("sys/module/nvidia/version", "550.54.14\n"),
            ("sys/bus/pci/devices/0000:65:00.0/vendor", "0x10de\n"),
            ("sys/bus/pci/devices/0000:65:00.0/class", "0x030200\n"),
            ("proc/driver/nvidia/gpus/0000:65:00.0/information", "Model: x\nGPU UUID: \t GPU-1\n"),
            ("proc/driver/nvidia/gpus/0000:65:00.0/information", "Model: x\nGPU UUID: \t GPU-2\n"),
            ("dev/nvidia0", ""),
        ] {
            root.write(file, text);
            seen.push(now("one"));
        }
        seen.remove(4); // a vendor without a class is not a GPU yet
        let mut different = seen.clone();
        different.sort();
        different.dedup();
        assert_eq!(different.len(), seen.len(), "{seen:#?}");
        assert_eq!(now("one"), now("one"));
    }

    #[test]
    fn this_machine_has_one() {
        assert_eq!(hardware_fingerprint(), hardware_fingerprint());
        assert!(hardware_fingerprint().is_some_and(|text| text.len() > 8));
    }
}
