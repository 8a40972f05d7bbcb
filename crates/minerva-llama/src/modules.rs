//! The backend modules of a `dynamic-backends` build: which files there are, which fit this machine, and loading them.
//!
//! ggml can do all of it by itself ([`load`] without a choice), but it loads every file that it finds, and one that crashes
//! takes the process along. Whoever tried the files in another process first makes the choice with [`use_modules`].
//! A build without the feature has no modules, and everything here is empty.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::{OnceLock, PoisonError};

use crate::error::{CallError, call};
use crate::{backend, log, sys};

/// The files of one backend.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModuleGroup {
    /// ggml's word for the backend in file names, such as `cuda`.
    pub backend: String,
    /// One file per instruction set; the one with the best score is the one to load.
    pub variants: Vec<PathBuf>,
    /// The file that is taken when no variant fits.
    pub plain: Option<PathBuf>,
}

/// The backends that ggml looks for, in its order: `ggml_backend_load_all_from_path` at our pin.
const BACKENDS: [&str; 15] = [
    "blas", "zendnn", "cann", "cuda", "hip", "metal", "rpc", "sycl", "vulkan", "virtgpu", "opencl", "hexagon", "musa",
    "openvino", "cpu",
];

/// The modules to load, if somebody chose.
static CHOSEN: OnceLock<Vec<PathBuf>> = OnceLock::new();

/// The module files of this build by backend, in the order in which ggml loads them. Nothing is opened.
pub fn module_groups() -> Vec<ModuleGroup> {
    let mut groups = folder().map(|folder| groups_in(&folder)).unwrap_or_default();
    // ggml's variable for one more module, wherever it lies.
    if let Some(file) = std::env::var_os("GGML_BACKEND_PATH").filter(|_| cfg!(feature = "dynamic-backends")) {
        let backend = Path::new(&file).file_stem().unwrap_or_default().to_string_lossy().into_owned();
        groups.push(ModuleGroup { backend, variants: Vec::new(), plain: Some(file.into()) });
    }
    groups
}

fn groups_in(folder: &Path) -> Vec<ModuleGroup> {
    let (prefix, suffix) = if cfg!(windows) { ("ggml-", ".dll") } else { ("libggml-", ".so") };
    let mut files = BTreeMap::new(); // in an order that is the same on every machine
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(word) = name.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(suffix)) {
            files.insert(word.to_owned(), entry.path());
        }
    }
    let group = |backend: &&str| {
        let is_variant = |word: &str| word.strip_prefix(backend).is_some_and(|rest| rest.starts_with('-'));
        ModuleGroup {
            backend: (*backend).to_owned(),
            variants: files.iter().filter(|(word, _)| is_variant(word)).map(|(_, path)| path.clone()).collect(),
            plain: files.get(*backend).cloned(),
        }
    };
    let groups = BACKENDS.iter().map(group);
    groups.filter(|group| group.plain.is_some() || !group.variants.is_empty()).collect()
}

/// How well a module fits this machine: 0 not at all, `None` when it does not say. The file is loaded for the question.
///
/// # Errors
/// The system's loader refuses it.
pub fn module_score(path: &Path) -> Result<Option<i32>, CallError> {
    let (path, mut score) = (c_path(path)?, 0);
    // SAFETY: a NUL-terminated path; `score` receives the result.
    call(|error| unsafe { sys::mnv_module_score(path.as_ptr(), &raw mut score, error) })?;
    Ok(Some(score).filter(|score| *score >= 0))
}

/// Loads one module and adds its devices to the list.
///
/// # Errors
/// ggml refuses it: not a module, made for another version, or no such file.
#[doc(alias = "ggml_backend_load")]
pub fn load_module(path: &Path) -> Result<(), CallError> {
    backend::init();
    load_file(path)
}

fn load_file(path: &Path) -> Result<(), CallError> {
    let path = c_path(path)?;
    log::take_last_error(); // of an earlier call
    let _registry = backend::REGISTRY.write().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: a NUL-terminated path; nobody reads ggml's list while the write lock is held.
    let registry = unsafe { sys::ggml_backend_load(path.as_ptr()) };
    if registry.is_null() {
        let reason = log::take_last_error();
        return Err(CallError::Refused(reason.unwrap_or_else(|| "it does not run on this machine".to_owned())));
    }
    Ok(())
}

/// Names the modules that are loaded at the start of llama.cpp, in place of all that there are. `false` when it is too late:
/// the choice was made before, by somebody else or by the start.
pub fn use_modules(paths: Vec<PathBuf>) -> bool {
    CHOSEN.set(paths).is_ok()
}

/// Loads the chosen modules; without a choice the best CPU module and every other one of the folder. The log names each.
pub(crate) fn load() {
    let all = || {
        load_all();
        Vec::new()
    };
    for path in CHOSEN.get_or_init(all) {
        if let Err(problem) = load_file(path) {
            tracing::error!("cannot load {}: {problem}", path.display());
        }
    }
}

#[cfg(feature = "dynamic-backends")]
fn load_all() {
    let Some(folder) = folder() else {
        tracing::error!("no folder with llama.cpp's modules: this build needs lib/minerva beside the program's folder");
        return;
    };
    let Ok(path) = c_path(&folder) else { return };
    // SAFETY: a NUL-terminated path; ggml tries the files it knows the names of and skips what does not load.
    unsafe { sys::ggml_backend_load_all_from_path(path.as_ptr()) };
}

#[cfg(not(feature = "dynamic-backends"))]
fn load_all() {}

/// `MINERVA_BACKENDS_DIR`, or `../lib/minerva` from the program as the bundle has it, or where this build put them.
#[cfg(feature = "dynamic-backends")]
fn folder() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("MINERVA_BACKENDS_DIR").filter(|folder| !folder.is_empty()) {
        return Some(folder.into());
    }
    let program = std::env::current_exe().ok();
    let in_bundle = program.and_then(|program| Some(program.parent()?.parent()?.join("lib").join("minerva")));
    // A bundle must not name a folder of the machine that built it.
    let in_build = if cfg!(minerva_bundle) { None } else { sys::BACKENDS_DIR.map(PathBuf::from) };
    [in_bundle, in_build].into_iter().flatten().find(|folder| folder.is_dir())
}

#[cfg(not(feature = "dynamic-backends"))]
fn folder() -> Option<PathBuf> {
    None
}

fn c_path(path: &Path) -> Result<CString, CallError> {
    CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| CallError::Argument(format!("{} contains a NUL", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(not(windows))]
    #[test]
    fn files_are_grouped_by_backend_in_ggmls_order() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in [
            "libggml-cpu-x64.so",
            "libggml-cpu-haswell.so",
            "libggml-cuda.so",
            "libggml-base.so",
            "libggml-rpc.so.bak",
            "libllama.so",
            "libggml-cudart.so",
        ] {
            std::fs::write(folder.path().join(name), "").expect("a file");
        }
        let names = |paths: &[PathBuf]| -> Vec<String> {
            paths.iter().map(|path| path.file_name().unwrap_or_default().to_string_lossy().into_owned()).collect()
        };
        let groups = groups_in(folder.path());
        let seen: Vec<_> = groups.iter().map(|group| (group.backend.as_str(), names(&group.variants))).collect();
        let cpus = ["libggml-cpu-haswell.so", "libggml-cpu-x64.so"].map(str::to_owned).to_vec();
        assert_eq!(seen, [("cuda", vec![]), ("cpu", cpus)]);
        assert_eq!(groups[0].plain, Some(folder.path().join("libggml-cuda.so")));
        assert!(groups_in(Path::new("/nowhere")).is_empty());
    }

    #[test]
    fn a_file_that_is_no_module_is_refused_with_the_loaders_words() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let error = module_score(file.path()).expect_err("it is empty").to_string();
        assert!(error.contains("too short"), "{error}");
        let error = load_module(file.path()).expect_err("it is empty").to_string();
        assert!(error.contains("failed to load"), "{error}");
    }
}
