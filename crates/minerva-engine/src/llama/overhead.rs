//! What a GPU's backend takes for itself (the CUDA context, its libraries' workspaces): measured at the first load and
//! remembered for each device and build, so that the next plan is right.

use minerva_gpu::DeviceInfo;

use crate::remembered;

const FILE: &str = "device-overheads.json";

/// More than this is no overhead but another process that took memory meanwhile.
const MAX_OVERHEAD_BYTES: u64 = 3 << 30;

/// The overhead measured at an earlier load on this device with this build.
pub(super) fn remembered(device: &DeviceInfo) -> Option<u64> {
    remembered::read(FILE).remove(&key(device))
}

/// Stores what a load took beyond the tensors: `free_before - free_after - tensors`.
pub(super) fn remember(device: &DeviceInfo, free_before: u64, free_after: u64, tensor_bytes: u64) {
    let Some(overhead) = free_before.checked_sub(free_after).and_then(|taken| taken.checked_sub(tensor_bytes)) else {
        return;
    };
    if overhead == 0 || overhead > MAX_OVERHEAD_BYTES {
        return;
    }
    let mut all = remembered::read(FILE);
    // The largest seen: workspaces come with the first large batch.
    let entry = all.entry(key(device)).or_default();
    if *entry >= overhead {
        return;
    }
    *entry = overhead;
    remembered::write(FILE, &all);
}

fn key(device: &DeviceInfo) -> String {
    let id = device.uuid.as_deref().or(device.pci_bus_id.as_deref()).unwrap_or(&device.name);
    let driver = device.driver_version.as_deref().unwrap_or("-");
    format!("{id} {driver} {}", minerva_llama::version())
}
