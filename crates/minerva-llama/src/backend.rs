//! The library as a whole: one-time start, its devices, and what this build of it can do.

use std::ffi::{CStr, c_char, c_void};
use std::mem;
use std::sync::{Once, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use crate::{log, rpc, sys};

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
}

/// Starts llama.cpp once: routes its log, loads backend modules where the build has them, initialises it.
pub fn init() {
    static START: Once = Once::new();
    START.call_once(|| {
        log::install();
        #[cfg(feature = "dynamic-backends")]
        load_backend_modules();
        // SAFETY: no preconditions; done once, before every other call.
        unsafe { sys::llama_backend_init() };
    });
}

/// Loads the best CPU module and every other module of the folder that has them; the log names each.
#[cfg(feature = "dynamic-backends")]
fn load_backend_modules() {
    let Some(folder) = module_folder() else {
        tracing::error!("no folder with llama.cpp's modules: this build needs lib/minerva beside the program's folder");
        return;
    };
    let Ok(path) = std::ffi::CString::new(folder.as_os_str().as_encoded_bytes()) else { return };
    // SAFETY: a NUL-terminated path; ggml tries the files it knows the names of and skips what does not load.
    unsafe { sys::ggml_backend_load_all_from_path(path.as_ptr()) };
}

/// `MINERVA_BACKENDS_DIR`, or `../lib/minerva` from the program as the bundle has it, or where this build put them.
#[cfg(feature = "dynamic-backends")]
fn module_folder() -> Option<std::path::PathBuf> {
    if let Some(folder) = std::env::var_os("MINERVA_BACKENDS_DIR").filter(|folder| !folder.is_empty()) {
        return Some(folder.into());
    }
    let program = std::env::current_exe().ok();
    let in_bundle = program.and_then(|program| Some(program.parent()?.parent()?.join("lib").join("minerva")));
    // A bundle must not name a folder of the machine that built it.
    let in_build = if cfg!(minerva_bundle) { None } else { sys::BACKENDS_DIR.map(std::path::PathBuf::from) };
    [in_bundle, in_build].into_iter().flatten().find(|folder| folder.is_dir())
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

fn device(index: usize) -> Device {
    let raw = raw_device(index);
    // SAFETY: `raw` is from ggml's registry, which lives as long as the program.
    let kind = match unsafe { sys::ggml_backend_dev_type(raw) } {
        sys::GGML_BACKEND_DEVICE_TYPE_GPU => DeviceKind::Gpu,
        sys::GGML_BACKEND_DEVICE_TYPE_IGPU => DeviceKind::IntegratedGpu,
        sys::GGML_BACKEND_DEVICE_TYPE_ACCEL => DeviceKind::Accelerator,
        _ => DeviceKind::Cpu,
    };
    let (mut free, mut total) = (0, 0);
    // SAFETY: as above; both out-pointers are live.
    unsafe { sys::ggml_backend_dev_memory(raw, &raw mut free, &raw mut total) };
    Device {
        index,
        // SAFETY: as above.
        name: text(unsafe { sys::ggml_backend_dev_name(raw) }),
        description: match rpc::links_of(&[index]).first() {
            Some(link) => link.address.clone(), // ggml knows the relay's address only
            // SAFETY: as above.
            None => text(unsafe { sys::ggml_backend_dev_description(raw) }),
        },
        kind,
        free_bytes: free as u64,
        total_bytes: total as u64,
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
}

/// Whether repacked weights are safe here. See docs/ffi.md, "AMX".
pub fn extra_buffers() -> ExtraBuffers {
    if env!("MINERVA_AMX") == "faulty" && cpu_features().iter().any(|feature| feature.starts_with("AMX")) {
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
