//! A stand-in for NVIDIA's libnvidia-ml with four GPUs that are not there, built by the tests of `src/nvml.rs`
//! (`rustc --crate-type cdylib`) so that loading, calling and reading are tested without a driver.
//!
//! 0 is an H100, 1 a GB10 with unified memory, 2 has fallen off the bus, 3 is an A100 with two MIG instances.
//! Environment of the build: `FAKE_INIT` is the code that `nvmlInit` returns, `FAKE_DRIVER` the driver's version; drivers
//! before 510 lack the second memory query, `--cfg old` leaves it out. `FAKE_HANG` (`init`, `name`, `memory`) is the call that
//! never returns, `FAKE_CRASH` ends the process in `nvmlInit`, `FAKE_ERROR` (`count`, `memory`) is the call that fails,
//! `FAKE_LIE` (`zero`, `free`, `huge`, `count`) what the H100's memory or the number of GPUs is claimed to be.
#![allow(non_snake_case)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong};

const UNKNOWN: c_uint = 999;
const NOT_SUPPORTED: c_uint = 3;
const NOT_FOUND: c_uint = 6;
const GPU_IS_LOST: c_uint = 15;
const GIB: c_ulonglong = 1 << 30;

/// A device handle is its number plus one; instance `n` of GPU 3 is 100 plus `n`.
type Handle = usize;

const UUIDS: [(Handle, &str); 5] =
    [(1, "GPU-h100"), (2, "GPU-gb10"), (4, "GPU-a100"), (100, "MIG-zero"), (103, "MIG-three")];

#[repr(C)]
pub struct Pci {
    legacy: [c_char; 16],
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    pci_device_id: c_uint,
    sub_system_id: c_uint,
    bus_id: [c_char; 32],
}

#[repr(C)]
pub struct MemoryV1 {
    total: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

#[repr(C)]
pub struct MemoryV2 {
    version: c_uint,
    total: c_ulonglong,
    reserved: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

unsafe fn put(text: &str, to: *mut c_char) -> c_uint {
    for (i, byte) in text.bytes().chain([0]).enumerate() {
        // SAFETY: `to` has room for the text and its NUL: nvml-wrapper passes buffers longer than any text here.
        unsafe { *to.add(i) = byte as c_char };
    }
    0
}

fn hang_in(call: &str) {
    while option_env!("FAKE_HANG") == Some(call) {
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

/// Total and free bytes; `None` is NVML's "N/A".
fn memory(handle: Handle) -> Option<(c_ulonglong, c_ulonglong)> {
    hang_in("memory");
    match (handle, option_env!("FAKE_LIE")) {
        (1, Some("zero")) => return Some((0, 0)),
        (1, Some("free")) => return Some((80 * GIB, 81 * GIB)),
        (1, Some("huge")) => return Some((1 << 60, 1 << 59)),
        _ => {}
    }
    match handle {
        1 => Some((80 * GIB, 79 * GIB)),
        4 => Some((40 * GIB, 30 * GIB)),
        100 => Some((5 * GIB, 4 * GIB)),
        103 => Some((10 * GIB, 9 * GIB)),
        _ => None,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> c_uint {
    hang_in("init");
    if option_env!("FAKE_CRASH").is_some() {
        std::process::abort();
    }
    option_env!("FAKE_INIT").map_or(0, |code| code.parse().unwrap())
}
#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> c_uint {
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(to: *mut c_char, _: c_uint) -> c_uint {
    // SAFETY: nvml-wrapper passes a live buffer that is longer than any text here.
    unsafe { put(option_env!("FAKE_DRIVER").unwrap_or("535.104.05"), to) }
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetCudaDriverVersion_v2(to: *mut c_int) -> c_uint {
    // SAFETY: nvml-wrapper passes a live pointer of this type, as nvml.h asks of it.
    unsafe { *to = 12020 };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(to: *mut c_uint) -> c_uint {
    if option_env!("FAKE_ERROR") == Some("count") {
        return UNKNOWN;
    }
    let count = if option_env!("FAKE_LIE") == Some("count") { 4_000_000_000 } else { 4 };
    // SAFETY: nvml-wrapper passes a live pointer of this type, as nvml.h asks of it.
    unsafe { *to = count };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, to: *mut Handle) -> c_uint {
    if index == 2 {
        return GPU_IS_LOST;
    }
    // SAFETY: nvml-wrapper passes a live pointer of this type, as nvml.h asks of it.
    unsafe { *to = index as usize + 1 };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, to: *mut Handle) -> c_uint {
    // SAFETY: nvml-wrapper passes a NUL-terminated string that lives through the call.
    let uuid = unsafe { CStr::from_ptr(uuid) }.to_str().unwrap();
    match UUIDS.iter().find(|(_, known)| *known == uuid) {
        // SAFETY: nvml-wrapper passes a live pointer of this type, as nvml.h asks of it.
        Some((handle, _)) => unsafe { *to = *handle },
        None => return NOT_FOUND,
    }
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetName(handle: Handle, to: *mut c_char, _: c_uint) -> c_uint {
    hang_in("name");
    let name = match handle {
        1 => "NVIDIA H100 80GB HBM3",
        2 => "NVIDIA GB10",
        4 => "NVIDIA A100-SXM4-40GB",
        100 => "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        _ => "NVIDIA A100-SXM4-40GB MIG 2g.10gb",
    };
    // SAFETY: nvml-wrapper passes a live buffer that is longer than any text here.
    unsafe { put(name, to) }
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUUID(handle: Handle, to: *mut c_char, _: c_uint) -> c_uint {
    match UUIDS.iter().find(|(known, _)| *known == handle) {
        // SAFETY: nvml-wrapper passes a live buffer that is longer than any text here.
        Some((_, uuid)) => unsafe { put(uuid, to) },
        None => NOT_FOUND,
    }
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPciInfo_v3(handle: Handle, to: *mut Pci) -> c_uint {
    let bus_id = match handle {
        1 => "00000000:65:00.0",
        2 => "0000000F:01:00.0",
        _ => "00000000:17:00.0", // the A100 comes first on the bus
    };
    // SAFETY: nvml-wrapper passes a live buffer that is longer than any text here.
    unsafe { put(bus_id, (&raw mut (*to).bus_id).cast()) }
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCudaComputeCapability(
    handle: Handle,
    major: *mut c_int,
    minor: *mut c_int,
) -> c_uint {
    let (a, b) = [(9, 0), (12, 1), (0, 0), (8, 0)][handle - 1];
    // SAFETY: nvml-wrapper passes a live pointer of this type, as nvml.h asks of it.
    unsafe { (*major, *minor) = (a, b) };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo(handle: Handle, to: *mut MemoryV1) -> c_uint {
    if option_env!("FAKE_ERROR") == Some("memory") {
        return UNKNOWN;
    }
    let Some((total, free)) = memory(handle) else {
        return NOT_SUPPORTED;
    };
    // SAFETY: nvml-wrapper passes a live pointer of this type, as nvml.h asks of it.
    unsafe { *to = MemoryV1 { total, free, used: total.saturating_sub(free) } };
    0
}
#[cfg(not(old))]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(handle: Handle, to: *mut MemoryV2) -> c_uint {
    if option_env!("FAKE_ERROR") == Some("memory") {
        return UNKNOWN;
    }
    let Some((total, free)) = memory(handle) else {
        return NOT_SUPPORTED;
    };
    // SAFETY: nvml-wrapper passes a live pointer of this type, as nvml.h asks of it.
    unsafe { *to = MemoryV2 { version: 2, total, reserved: 0, free, used: total.saturating_sub(free) } };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetNumGpuCores(_: Handle, to: *mut c_uint) -> c_uint {
    // SAFETY: nvml-wrapper passes a live pointer of this type, as nvml.h asks of it.
    unsafe { *to = 16896 };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMaxClockInfo(_: Handle, clock: c_uint, to: *mut c_uint) -> c_uint {
    const MEMORY: c_uint = 2;
    // SAFETY: nvml-wrapper passes a live pointer of this type, as nvml.h asks of it.
    unsafe { *to = if clock == MEMORY { 2619 } else { 1980 } };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryBusWidth(handle: Handle, to: *mut c_uint) -> c_uint {
    if handle == 2 {
        return NOT_SUPPORTED;
    }
    // SAFETY: nvml-wrapper passes a live pointer of this type, as nvml.h asks of it.
    unsafe { *to = 5120 };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigMode(handle: Handle, now: *mut c_uint, later: *mut c_uint) -> c_uint {
    if handle == 2 {
        return NOT_SUPPORTED;
    }
    let on = c_uint::from(handle == 4);
    // SAFETY: nvml-wrapper passes a live pointer of this type, as nvml.h asks of it.
    unsafe { (*now, *later) = (on, on) };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMaxMigDeviceCount(_: Handle, to: *mut c_uint) -> c_uint {
    // SAFETY: nvml-wrapper passes a live pointer of this type, as nvml.h asks of it.
    unsafe { *to = 7 };
    0
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigDeviceHandleByIndex(_: Handle, place: c_uint, to: *mut Handle) -> c_uint {
    if place != 0 && place != 3 {
        return NOT_FOUND;
    }
    // SAFETY: nvml-wrapper passes a live pointer of this type, as nvml.h asks of it.
    unsafe { *to = 100 + place as usize };
    0
}
