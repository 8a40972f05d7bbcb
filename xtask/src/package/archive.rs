//! A `.tar.zst` that depends on its contents only: sorted entries, one date, no owner.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context as _;

/// One file of a bundle.
pub(super) struct Entry {
    pub(super) bytes: Vec<u8>,
    pub(super) mode: u32,
}

impl Entry {
    /// A file that can be run, or loaded.
    pub(super) fn program(path: &Path) -> anyhow::Result<Self> {
        Ok(Self { mode: 0o755, ..Self::file(path)? })
    }

    /// A file to read.
    pub(super) fn file(path: &Path) -> anyhow::Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self { bytes, mode: 0o644 })
    }

    /// A text made here.
    pub(super) fn text(text: String) -> Self {
        Self { bytes: text.into_bytes(), mode: 0o644 }
    }
}

/// 2020-01-01, the date of every entry: old enough for no tool to see the future, and not 0, which some take for "unknown".
const DATE: u64 = 1_577_836_800;
/// Near the smallest that zstd can do; a bundle takes seconds.
const LEVEL: i32 = 19;

/// All entries under one folder.
pub(super) fn pack(folder: &str, entries: &BTreeMap<String, Entry>) -> anyhow::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(zstd::Encoder::new(Vec::new(), LEVEL)?);
    for (name, entry) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(entry.bytes.len() as u64);
        header.set_mode(entry.mode);
        header.set_mtime(DATE);
        tar.append_data(&mut header, format!("{folder}/{name}"), &entry.bytes[..])?;
    }
    Ok(tar.into_inner()?.finish()?)
}

/// Puts the files of an archive under `into`.
pub(super) fn unpack(bytes: &[u8], into: &Path) -> anyhow::Result<()> {
    let mut tar = tar::Archive::new(zstd::Decoder::new(bytes)?);
    Ok(tar.unpack(into)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_give_the_same_bytes_and_come_back_with_their_modes() {
        let entry = |text: &str, mode| Entry { bytes: text.as_bytes().to_vec(), mode };
        let long = format!("{}/x", "deep".repeat(40));
        let entries = || {
            BTreeMap::from([
                ("b/run".into(), entry("#!", 0o755)),
                ("a".into(), entry("A", 0o644)),
                (long.clone(), entry("", 0o644)),
            ])
        };
        let bytes = pack("top", &entries()).unwrap();
        assert_eq!(bytes, pack("top", &entries()).unwrap());
        let mut tar = tar::Archive::new(zstd::Decoder::new(&bytes[..]).unwrap());
        let list: Vec<_> = tar
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                (
                    entry.path().unwrap().display().to_string(),
                    entry.header().mode().unwrap(),
                    entry.header().mtime().unwrap(),
                )
            })
            .collect();
        let expected = [
            ("top/a".to_owned(), 0o644, DATE),
            ("top/b/run".to_owned(), 0o755, DATE),
            (format!("top/{long}"), 0o644, DATE),
        ];
        assert_eq!(list, expected);
    }
}
