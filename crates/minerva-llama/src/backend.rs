//! The library as a whole: one-time start, its devices, and what this build of it can do.

use std::ffi::{CStr, c_char, c_void};
use std::mem::{self, MaybeUninit};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use crate::{log, modules, rpc, sys};

/// What kind of device ggml says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// The CPU.
    Cpu,
    /// A GPU with memory of its own.
    Gpu,
    /// A GPU that shares the system's memory.
    IntegratedGpu,
    /// A helper of the CPU, such as BLAS.
    Accelerator,
}

/// One device that this build of llama.cpp can use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Place in llama.cpp's list; [`ModelParams::devices`](crate::ModelParams::devices) takes it.
    pub index: usize,
    /// ggml's name, such as `CUDA0` or `CPU`.
    pub name: String,
    /// The hardware's name; the address of an RPC server.
    pub description: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Free memory in bytes.
    pub free_bytes: u64,
    /// All memory in bytes.
    pub total_bytes: u64,
    /// `0000:65:00.0`, where the backend tells. Match devices with other lists by this, never by number.
    pub pci_bus_id: Option<String>,
}

/// Starts llama.cpp once: routes its log, loads backend modules where the build has them, initialises it.
pub fn init() {
    static START: Once = Once::new();
    START.call_once(|| {
        log::install();
        modules::load();
        // SAFETY: no preconditions; done once, before every other call.
        unsafe { sys::llama_backend_init() };
        // SAFETY: done once, and nobody has allocated a buffer yet.
        unsafe { sys::mnv_leave_untouched() };
    });
}

/// Over ggml's lists of backends and devices, which have no lock of their own: held for writing while devices are added.
pub(crate) static REGISTRY: RwLock<()> = RwLock::new(());

/// Every device, in llama.cpp's order.
pub fn devices() -> Vec<Device> {
    (0..n_devices()).map(device).collect()
}

/// Whether this build, or a module that was loaded, has the backend that ggml calls `name`, such as `CUDA`: with or without a
/// device for it.
pub fn has_backend(name: &CStr) -> bool {
    init();
    let _registry = REGISTRY.read().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: a NUL-terminated name.
    !unsafe { sys::ggml_backend_reg_by_name(name.as_ptr()) }.is_null()
}

/// How many devices there are. The number only grows.
pub(crate) fn n_devices() -> usize {
    init();
    let _registry = REGISTRY.read().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: no preconditions after `init`.
    unsafe { sys::ggml_backend_dev_count() }
}

/// Names of devices that failed, see [`leave_out_devices`].
static LEFT_OUT: RwLock<Vec<String>> = RwLock::new(Vec::new());

/// Names devices that must not be asked for anything any more: [`devices`] lists them with no memory. A wedged GPU hangs whoever
/// asks it how much memory is free. They can still be named in [`ModelParams::devices`](crate::ModelParams::devices).
pub fn leave_out_devices(names: Vec<String>) {
    *LEFT_OUT.write().unwrap_or_else(PoisonError::into_inner) = names;
}

/// Whether a device is among those of [`leave_out_devices`].
pub(crate) fn is_left_out(name: &str) -> bool {
    LEFT_OUT.read().unwrap_or_else(PoisonError::into_inner).iter().any(|left_out| left_out == name)
}

/// Names of all devices, without asking them anything.
pub fn device_names() -> Vec<String> {
    // SAFETY: a device of ggml's registry, which lives as long as the program.
    (0..n_devices()).map(|index| text(unsafe { sys::ggml_backend_dev_name(raw_device(index)) })).collect()
}

/// One device. `None` when there are not so many.
pub fn device_at(index: usize) -> Option<Device> {
    (index < n_devices()).then(|| device(index))
}

fn device(index: usize) -> Device {
    let raw = raw_device(index);
    // SAFETY: `raw` is from ggml's registry, which lives as long as the program.
    let kind = match unsafe { sys::ggml_backend_dev_type(raw) } {
        sys::GGML_BACKEND_DEVICE_TYPE_GPU => DeviceKind::Gpu,
        sys::GGML_BACKEND_DEVICE_TYPE_IGPU => DeviceKind::IntegratedGpu,
        sys::GGML_BACKEND_DEVICE_TYPE_ACCEL => DeviceKind::Accelerator,
        _ => DeviceKind::Cpu,
    };
    // SAFETY: as above.
    let name = text(unsafe { sys::ggml_backend_dev_name(raw) });
    let mut props = MaybeUninit::<sys::ggml_backend_dev_props>::zeroed();
    if !is_left_out(&name) {
        // SAFETY: as above; the out-pointer is live.
        unsafe { sys::ggml_backend_dev_get_props(raw, props.as_mut_ptr()) };
    }
    // SAFETY: all fields are pointers, numbers and flags, for which zero is a value.
    let props = unsafe { props.assume_init() };
    Device {
        index,
        name,
        description: match rpc::links_of(&[index]).first() {
            Some(link) => link.address.clone(), // ggml knows the relay's address only
            // SAFETY: as above.
            None => text(unsafe { sys::ggml_backend_dev_description(raw) }),
        },
        kind,
        free_bytes: props.memory_free as u64,
        total_bytes: props.memory_total as u64,
        pci_bus_id: Some(text(props.device_id).to_ascii_lowercase()).filter(|id| !id.is_empty()),
    }
}

/// ggml's device at `index`, which must be below [`n_devices`].
pub(crate) fn raw_device(index: usize) -> sys::ggml_backend_dev_t {
    let _registry = REGISTRY.read().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: `init` ran, and callers keep `index` below `n_devices`.
    unsafe { sys::ggml_backend_dev_get(index) }
}

/// The instruction sets that the CPU backend was compiled to use and that this CPU has, such as `AVX512` or `AMX_INT8`.
pub fn cpu_features() -> Vec<String> {
    init();
    let Some(function) = cpu_function(c"ggml_backend_get_features") else { return Vec::new() };
    // SAFETY: ggml documents this name as a function of this type (ggml-backend.h, `ggml_backend_get_features_t`).
    let get = unsafe {
        mem::transmute::<*mut c_void, unsafe extern "C" fn(sys::ggml_backend_reg_t) -> *mut sys::ggml_backend_feature>(
            function,
        )
    };
    let Some(registry) = cpu_registry() else { return Vec::new() };
    // SAFETY: the function belongs to this registry.
    let mut feature = unsafe { get(registry) };
    let mut features = Vec::new();
    while !feature.is_null() {
        // SAFETY: a static array of ggml's that ends with a null name; `feature` has not passed that end.
        let entry = unsafe { &*feature };
        if entry.name.is_null() {
            break;
        }
        if text(entry.value) == "1" {
            features.push(text(entry.name));
        }
        // SAFETY: the entry was not the last one.
        feature = unsafe { feature.add(1) };
    }
    features
}

fn cpu_registry() -> Option<sys::ggml_backend_reg_t> {
    let _registry = REGISTRY.read().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: no preconditions after `init`; null when the build has no CPU backend.
    let device = unsafe { sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU) };
    if device.is_null() {
        return None;
    }
    // SAFETY: a non-null device from ggml's registry.
    let registry = unsafe { sys::ggml_backend_dev_backend_reg(device) };
    (!registry.is_null()).then_some(registry)
}

/// A function of the CPU backend by name: the way that works for static builds and for modules alike.
pub(crate) fn cpu_function(name: &CStr) -> Option<*mut c_void> {
    let registry = cpu_registry()?;
    // SAFETY: a live registry and a NUL-terminated name.
    let function = unsafe { sys::ggml_backend_reg_get_proc_address(registry, name.as_ptr()) };
    (!function.is_null()).then_some(function)
}

/// Whether llama.cpp's repacked weights can be used on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtraBuffers {
    /// They can.
    Usable,
    /// This build's AMX code would fault on this CPU (the compiler's `_tile_loadconfig` is wrong and was not cured).
    FaultyAmx,
    /// A product with them failed when it was tried: [`leave_out_extra_buffers`].
    Failed,
}

/// Set when a product with repacked weights failed in a process that tried it.
static REPACKED_FAILED: AtomicBool = AtomicBool::new(false);

/// Takes note that repacked weights do not work on this machine, whatever the compiler made of them.
pub fn leave_out_extra_buffers() {
    REPACKED_FAILED.store(true, Ordering::Relaxed);
}

/// Whether repacked weights are safe here. See docs/ffi.md, "AMX".
pub fn extra_buffers() -> ExtraBuffers {
    if REPACKED_FAILED.load(Ordering::Relaxed) {
        ExtraBuffers::Failed
    } else if env!("MINERVA_AMX") == "faulty" && cpu_features().iter().any(|feature| feature.starts_with("AMX")) {
        ExtraBuffers::FaultyAmx
    } else {
        ExtraBuffers::Usable
    }
}

/// The C++ compiler that built llama.cpp, as it names itself.
pub fn compiler() -> &'static str {
    env!("MINERVA_CXX")
}

/// What the build made of AMX: `sound`, `cured` or `faulty`.
pub fn amx_state() -> &'static str {
    env!("MINERVA_AMX")
}

/// The release of llama.cpp that llama-cpp-sys-2 ships at our pin.
const RELEASE: &str = "b11434";

/// The release of llama.cpp, and what its own build calls itself.
pub fn version() -> String {
    // SAFETY: returns a static string.
    let own = text(unsafe { sys::llama_version() });
    format!("{RELEASE} ({own})")
}

/// A C string of llama.cpp's that may be null and need not be UTF-8.
pub(crate) fn text(raw: *const c_char) -> String {
    if raw.is_null() {
        return String::new();
    }
    // SAFETY: non-null strings from llama.cpp are NUL-terminated and live through this call.
    unsafe { CStr::from_ptr(raw) }.to_string_lossy().into_owned()
}
