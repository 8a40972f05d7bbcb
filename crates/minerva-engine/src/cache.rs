//! Where small results are kept between runs.

use std::env;
use std::path::PathBuf;

/// `MINERVA_CACHE_DIR`, or `minerva` in the user's cache folder; `None` without a home.
pub fn cache_dir() -> Option<PathBuf> {
    let named = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    named("MINERVA_CACHE_DIR")
        .or_else(|| named("XDG_CACHE_HOME").map(|dir| dir.join("minerva")))
        .or_else(|| named("LOCALAPPDATA").map(|dir| dir.join("minerva")))
        .or_else(|| named("HOME").map(|home| home.join(".cache").join("minerva")))
}
