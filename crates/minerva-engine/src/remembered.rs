//! What was measured once and is good for later loads: a file of entries by name in the cache folder.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// For names of files that are not whole yet.
static N_WRITTEN: AtomicU64 = AtomicU64::new(0);

/// A larger file is none of ours.
const MOST_BYTES: u64 = 4 << 20;

/// All entries; none where there is no file, or no such file.
pub(crate) fn read<T: DeserializeOwned>(file: &str) -> BTreeMap<String, T> {
    let bytes = path(file).and_then(|path| bounded(&path).ok());
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

fn bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MOST_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Whether there is a place to keep anything.
pub(crate) fn is_possible() -> bool {
    crate::cache::cache_dir().is_some_and(|folder| fs::create_dir_all(folder).is_ok())
}

/// Replaces all entries. Nothing is lost but time when that fails.
pub(crate) fn write<T: Serialize>(file: &str, all: &BTreeMap<String, T>) {
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
