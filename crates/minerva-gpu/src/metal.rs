//! The GPU of a Mac. Apple Silicon computes in the system's RAM; an Intel Mac may have an AMD card with its own.
//!
//! Metal itself is never called: names come from the CPU and from `system_profiler`, so this needs no Apple framework, and
//! its parser is tested on every system.

#[cfg(target_os = "macos")]
use crate::cpu::CpuInfo;
use crate::device::{DeviceInfo, GpuDevice, MemoryKind};
use crate::memory::default_limit_bytes;
use crate::ram::SystemMemory;

/// The Metal device of this Mac, if it has one that llama.cpp can use.
#[cfg(target_os = "macos")]
pub(crate) fn probe(cpu: &CpuInfo, ram: &SystemMemory) -> Option<DeviceInfo> {
    // By its name, not by the architecture: an x86 program may run on Apple Silicon under Rosetta.
    if cpu.model.starts_with("Apple") {
        return Some(unified(&cpu.model, ram));
    }
    let output = std::process::Command::new("/usr/sbin/system_profiler").arg("SPDisplaysDataType").output().ok()?;
    let displays = String::from_utf8_lossy(&output.stdout);
    amd_gpu(&displays).map(|(name, vram_bytes)| discrete(&name, vram_bytes, ram))
}

/// Apple Silicon: the guide's half of the system's RAM.
fn unified(name: &str, ram: &SystemMemory) -> DeviceInfo {
    DeviceInfo {
        kind: GpuDevice::Metal,
        name: name.to_owned(),
        limit_bytes: default_limit_bytes(GpuDevice::Metal, ram.total_bytes),
        ..DeviceInfo::cpu(name, ram)
    }
}

/// An AMD card: the guide's half of the system's RAM, but never more than a card's usual share of its own memory.
fn discrete(name: &str, vram_bytes: u64, ram: &SystemMemory) -> DeviceInfo {
    let share = default_limit_bytes(GpuDevice::Metal, ram.total_bytes);
    let card_share = default_limit_bytes(GpuDevice::Cuda, vram_bytes);
    DeviceInfo {
        memory_kind: MemoryKind::Discrete,
        total_bytes: vram_bytes,
        free_bytes: vram_bytes, // macOS does not tell what other programs use
        limit_bytes: share.min(card_share),
        ..unified(name, ram)
    }
}

/// Name and memory of the largest AMD card with Metal in the text of `system_profiler SPDisplaysDataType`.
fn amd_gpu(text: &str) -> Option<(String, u64)> {
    let mut cards: Vec<(String, u64, bool)> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.trim().split_once(':') else {
            continue;
        };
        let value = value.trim();
        match (key, cards.last_mut()) {
            ("Chipset Model", _) => cards.push((value.to_owned(), 0, false)),
            ("VRAM (Total)", Some(card)) => card.1 = crate::memory::parse_bytes(value).unwrap_or(0),
            // "Metal: Supported, feature set macOS GPUFamily2 v1", later "Metal Support: Metal 3"
            ("Metal" | "Metal Support" | "Metal Family", Some(card)) => {
                card.2 = !value.to_ascii_lowercase().contains("unsupported");
            }
            _ => {}
        }
    }
    let usable = |card: &(String, u64, bool)| card.0.contains("AMD") && card.1 > 0 && card.2;
    cards.into_iter().filter(usable).max_by_key(|card| card.1).map(|card| (card.0, card.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: SystemMemory = SystemMemory {
        total_bytes: 16 << 30,
        free_bytes: 9 << 30,
        machine_total_bytes: 16 << 30,
        machine_free_bytes: 9 << 30,
    };

    #[test]
    fn apple_silicon_gets_half_of_the_ram() {
        let device = unified("Apple M1 Pro", &RAM);
        assert_eq!((device.kind, device.memory_kind), (GpuDevice::Metal, MemoryKind::Unified));
        assert_eq!((device.total_bytes, device.free_bytes, device.limit_bytes), (16 << 30, 9 << 30, 8 << 30));
        assert_eq!((device.label().as_str(), device.unusable), ("metal", None));
    }

    #[test]
    fn an_amd_card_is_read_from_system_profiler() {
        let text = "Graphics/Displays:\n\n    Intel UHD Graphics 630:\n\n      Chipset Model: Intel UHD Graphics 630\n      VRAM (Dynamic, Max): 1536 MB\n      Metal Support: Metal 3\n\n    AMD Radeon Pro 5500M:\n\n      Chipset Model: AMD Radeon Pro 5500M\n      Bus: PCIe\n      VRAM (Total): 8 GB\n      Metal Support: Metal 3\n";
        assert_eq!(amd_gpu(text), Some(("AMD Radeon Pro 5500M".to_owned(), 8 << 30)));
        assert_eq!(amd_gpu(&text.replace("AMD", "NVIDIA")), None);
        assert_eq!(amd_gpu(&text.replace("Metal 3", "Unsupported")), None);
        assert_eq!(amd_gpu(""), None);
        let device = discrete("AMD Radeon Pro 5500M", 8 << 30, &RAM);
        assert_eq!((device.memory_kind, device.total_bytes), (MemoryKind::Discrete, 8 << 30));
        assert_eq!(device.limit_bytes, default_limit_bytes(GpuDevice::Cuda, 8 << 30));
    }
}
