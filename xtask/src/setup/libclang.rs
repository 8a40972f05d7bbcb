//! Finds libclang where bindgen will look for it (the crate clang-sys, `build/common.rs` and `build/dynamic.rs`).

use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::workspace;

/// Where clang-sys looks on this system; `*` stands for any characters within one path component.
const PATTERNS: &[&str] = if cfg!(target_os = "macos") {
    &[
        "/usr/local/opt/llvm*/lib/llvm*/lib",
        "/Library/Developer/CommandLineTools/usr/lib",
        "/Applications/Xcode.app/Contents/Developer/Toolchains/XcodeDefault.xctoolchain/usr/lib",
        "/usr/local/opt/llvm*/lib",
    ]
} else if cfg!(windows) {
    &["C:/Program Files*/LLVM/bin", "C:/LLVM/bin"]
} else {
    &[
        "/usr/local/llvm*/lib*",
        "/usr/local/lib*/*/*",
        "/usr/local/lib*/*",
        "/usr/local/lib*",
        "/usr/lib*/*/*",
        "/usr/lib*/*",
        "/usr/lib*",
    ]
};

/// The folder of a libclang that bindgen finds by itself.
pub(super) fn system() -> Option<PathBuf> {
    if let Some(path) = workspace::user_var("LIBCLANG_PATH").map(PathBuf::from) {
        // A user's choice is the only place that clang-sys looks at; it may name the file.
        let dir = if path.is_file() { path.parent()?.to_owned() } else { path };
        return is_in(&dir).then_some(dir);
    }
    let llvm_config = env::var("LLVM_CONFIG_PATH").unwrap_or_else(|_| "llvm-config".into());
    let prefix = workspace::capture(workspace::command(llvm_config).arg("--prefix")).ok();
    let llvm = prefix
        .iter()
        .flat_map(|prefix| ["bin", "lib", "lib64"].map(|dir| Path::new(prefix.lines().next().unwrap_or("")).join(dir)));
    let listed = ["LD_LIBRARY_PATH", "LIBRARY_PATH"].into_iter().filter_map(env::var_os);
    let listed: Vec<PathBuf> = listed.flat_map(|v| env::split_paths(&v).collect::<Vec<_>>()).collect();
    llvm.chain(listed).chain(PATTERNS.iter().flat_map(|p| expand(p))).find(|dir| is_in(dir))
}

/// Whether `dir` holds a libclang that can be loaded at run time.
pub(super) fn is_in(dir: &Path) -> bool {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|e| e.path().is_file()).any(|e| is_libclang(&e.file_name().to_string_lossy()))
}

/// `libclang.so`, `libclang.so.14`, `libclang-14.so.1` and their like, but not libclang-cpp, which is another library.
fn is_libclang(name: &str) -> bool {
    if cfg!(target_os = "macos") {
        return name == "libclang.dylib";
    }
    if cfg!(windows) {
        return name == "libclang.dll";
    }
    let Some(rest) = name.strip_prefix("libclang") else {
        return false;
    };
    if rest.contains("-cpp.") {
        return false;
    }
    rest == ".so" || rest.starts_with(".so.") || rest.starts_with('-') && rest.contains(".so")
}

/// Whether the libclang in `dir` finds the headers that belong to the compiler (`stddef.h` and others).
///
/// They lie in `clang/VERSION/include` beside the library; a `clang` on `PATH` tells bindgen where its own are.
pub(super) fn has_headers(dir: &Path) -> bool {
    let real = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    let beside = [real.join("clang"), real.join("../lib/clang")];
    let versions = beside.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten();
    let mut headers = versions.map(|version| version.path().join("include/stddef.h"));
    headers.any(|header| header.is_file()) || workspace::which("clang").is_some()
}

/// The existing folders that match a pattern of [`PATTERNS`].
fn expand(pattern: &str) -> Vec<PathBuf> {
    let mut dirs = vec![PathBuf::new()];
    for component in Path::new(pattern) {
        let text = component.to_string_lossy();
        dirs = match text.split_once('*') {
            None => dirs.iter().map(|dir| dir.join(component)).collect(),
            Some((start, end)) => dirs.iter().flat_map(|dir| matching(dir, start, end)).collect(),
        };
    }
    dirs.retain(|dir| dir.is_dir());
    dirs
}

/// The folders in `dir` whose names start and end so, sorted.
fn matching(dir: &Path, start: &str, end: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let fits = |name: &str| name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end);
    let named = entries.filter(|entry| fits(&entry.file_name().to_string_lossy()));
    let mut found: Vec<_> = named.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    found.sort();
    found
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn file_names_of_libclang_are_told_from_its_neighbours() {
        for name in ["libclang.so", "libclang.so.14", "libclang-14.so", "libclang-14.so.1"] {
            assert!(is_libclang(name), "{name}");
        }
        for name in ["libclang-cpp.so.14", "libclang-cpp.so", "libclang.a", "libclangAST.so", "libLLVM.so"] {
            assert!(!is_libclang(name), "{name}");
        }
    }

    #[test]
    fn a_star_stands_for_any_part_of_one_component() {
        let root = env::temp_dir().join(format!("minerva-expand-{}", std::process::id()));
        for dir in ["llvm-14/lib", "llvm-19/lib", "other/lib"] {
            fs::create_dir_all(root.join(dir)).expect("a folder to test with");
        }
        let found = expand(root.join("llvm*/lib*").to_str().expect("an ASCII path"));
        assert_eq!(found, [root.join("llvm-14/lib"), root.join("llvm-19/lib")]);
        fs::remove_dir_all(root).expect("the folder is ours");
    }
}
