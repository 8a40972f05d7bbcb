//! What was measured once and is good for later loads: a file of entries by name in the cache folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// For names of files that are not whole yet.
static N_WRITTEN: AtomicU64 = AtomicU64::new(0);

/// All entries; none where there is no file, or no such file.
pub(super) fn read<T: DeserializeOwned>(file: &str) -> BTreeMap<String, T> {
    let text = path(file).and_then(|path| fs::read_to_string(path).ok());
    text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

/// Replaces all entries. Nothing is lost but time when that fails.
pub(super) fn write<T: Serialize>(file: &str, all: &BTreeMap<String, T>) {
    if let Err(problem) = try_write(file, all) {
        tracing::debug!(%problem, "{file} is not written");
    }
}

/// Through a file of its own, so that two loads leave one of their results and no mixture.
fn try_write<T: Serialize>(file: &str, all: &BTreeMap<String, T>) -> std::io::Result<()> {
    let Some(path) = path(file) else { return Ok(()) };
    fs::create_dir_all(path.parent().unwrap_or(&path))?;
    let number = N_WRITTEN.fetch_add(1, Ordering::Relaxed);
    let own = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
    fs::write(&own, serde_json::to_string_pretty(all)?)?;
    fs::rename(own, path)
}

fn path(file: &str) -> Option<PathBuf> {
    Some(crate::cache::cache_dir()?.join(file))
}
