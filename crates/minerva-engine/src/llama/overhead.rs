//! What a GPU's backend takes for itself (the CUDA context, its libraries' workspaces): measured at the first load and
//! remembered for each device and build, so that the next plan is right.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use minerva_gpu::DeviceInfo;

/// More than this is no overhead but another process that took memory meanwhile.
const MAX_OVERHEAD_BYTES: u64 = 3 << 30;

/// The overhead measured at an earlier load on this device with this build.
pub(super) fn remembered(device: &DeviceInfo) -> Option<u64> {
    read().get(&key(device)).copied()
}

/// Stores what a load took beyond the tensors: `free_before - free_after - tensors`.
pub(super) fn remember(device: &DeviceInfo, free_before: u64, free_after: u64, tensor_bytes: u64) {
    let Some(overhead) = free_before.checked_sub(free_after).and_then(|taken| taken.checked_sub(tensor_bytes)) else {
        return;
    };
    if overhead == 0 || overhead > MAX_OVERHEAD_BYTES {
        return;
    }
    let mut all = read();
    // The largest seen: workspaces come with the first large batch.
    let entry = all.entry(key(device)).or_default();
    if *entry >= overhead {
        return;
    }
    *entry = overhead;
    if let Err(problem) = write(&all) {
        tracing::debug!(%problem, "the device's overhead is not remembered");
    }
}

fn key(device: &DeviceInfo) -> String {
    let id = device.uuid.as_deref().or(device.pci_bus_id.as_deref()).unwrap_or(&device.name);
    let driver = device.driver_version.as_deref().unwrap_or("-");
    format!("{id} {driver} {}", minerva_llama::version())
}

fn path() -> Option<PathBuf> {
    Some(crate::cache::cache_dir()?.join("device-overheads.json"))
}

fn read() -> BTreeMap<String, u64> {
    let text = path().and_then(|path| fs::read_to_string(path).ok());
    text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

/// Through a file of its own, so that two processes leave one of their results and no mixture.
fn write(all: &BTreeMap<String, u64>) -> std::io::Result<()> {
    let Some(path) = path() else { return Ok(()) };
    fs::create_dir_all(path.parent().unwrap_or(&path))?;
    let own = path.with_extension(format!("{}.tmp", std::process::id()));
    fs::write(&own, serde_json::to_string_pretty(all)?)?;
    fs::rename(own, path)
}
