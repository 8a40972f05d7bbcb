//! What a GPU's backend takes for itself (the CUDA context, its libraries' workspaces): measured at the first load and
//! remembered for each device and build, so that the next plan is right.

use minerva_gpu::DeviceInfo;

use crate::remembered;

const FILE: &str = "measured-overheads.json";

/// More than this is no overhead but another process that took memory meanwhile.
const MAX_OVERHEAD_BYTES: u64 = 3 << 30;

/// So many measurements are kept.
const N_KEPT: usize = 5;

/// The overhead measured at earlier loads on this device with this build: the middle one of the last few, since what another process
/// took or gave during a load looks the same.
pub(super) fn remembered(device: &DeviceInfo) -> Option<u64> {
    middle(remembered::read::<Vec<u64>>(FILE).remove(&key(device))?)
}

/// Of two in the middle the larger.
fn middle(mut measured: Vec<u64>) -> Option<u64> {
    measured.sort_unstable();
    measured.get(measured.len() / 2).copied()
}

/// Stores what a load took beyond the tensors: `free_before - free_after - tensors`.
pub(super) fn remember(device: &DeviceInfo, free_before: u64, free_after: u64, tensor_bytes: u64) {
    let Some(overhead) = free_before.checked_sub(free_after).and_then(|taken| taken.checked_sub(tensor_bytes)) else {
        return;
    };
    if overhead == 0 || overhead > MAX_OVERHEAD_BYTES {
        return;
    }
    let mut all = remembered::read::<Vec<u64>>(FILE);
    let measured = all.entry(key(device)).or_default();
    measured.push(overhead);
    measured.drain(..measured.len().saturating_sub(N_KEPT));
    remembered::write(FILE, &all);
}

fn key(device: &DeviceInfo) -> String {
    let id = device.uuid.as_deref().or(device.pci_bus_id.as_deref()).unwrap_or(&device.name);
    let driver = device.driver_version.as_deref().unwrap_or("-");
    format!("{id} {driver} {}", minerva_llama::version())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_load_beside_a_busy_neighbour_is_not_believed() {
        assert_eq!(middle(vec![]), None);
        assert_eq!(middle(vec![500]), Some(500));
        assert_eq!(middle(vec![480, 2900]), Some(2900), "what is not known to be wrong is kept free");
        assert_eq!(middle(vec![480, 2900, 500]), Some(500));
    }
}
