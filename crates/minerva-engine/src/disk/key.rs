//! Which files an engine may read: those of the same model, computed by the same build, with the same cache layout, in the same place.
//!
//! Bytes that differ only in their last bits would restore as well, but then an answer would depend on which machine computed its
//! prompt; so whatever can change them is part of the key.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::format::StateKey;
use crate::config::EngineConfig;
use crate::status::ModelInfo;

/// Of a model file: its header, and pieces spread over its weights. Reading all of 40 GB would take longer than loading it.
const HEAD_BYTES: u64 = 1 << 20;
const N_PIECES: u64 = 64;
const PIECE_BYTES: u64 = 64 << 10;

/// The key of a loaded model's states; `None` when its file cannot be read any more.
pub(crate) fn of_model(config: &EngineConfig, info: &ModelInfo) -> Option<StateKey> {
    let mut hash = blake3::Hasher::new_derive_key("minerva 2026 disk cache, key of states");
    for part in parts(&config.model_path) {
        add_file(&mut hash, &part).ok()?;
    }
    for adapter in &config.adapters {
        add_file(&mut hash, &adapter.path).ok()?;
        hash.update(&adapter.scale.to_le_bytes());
    }
    let (placement, build) = (&info.placement, crate::engine::Engine::build_info());
    let matters = [
        build.version,
        build.llama_cpp,
        build.compiler,
        build.cpu_features.join(" "),
        placement.device.clone(),
        placement.device_name.clone(),
        placement.n_gpu_layers.to_string(),
        placement.n_expert_layers_on_host.to_string(),
        placement.flash_attention.clone(),
        placement.kv_type.clone(),
        placement.kv_unified.to_string(),
        placement.extra_buffers.clone(),
        // The scale of positions may follow the context.
        info.context_train_tokens.to_string(),
        info.context_length_tokens.to_string(),
    ];
    for part in matters {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    Some(StateKey(*hash.finalize().as_bytes()))
}

/// All files of a model that is split (`name-00001-of-00004.gguf`), or the only one.
fn parts(path: &Path) -> Vec<PathBuf> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let of_several = name.strip_suffix(".gguf").and_then(|stem| {
        let (start, n) = stem.rsplit_once("-of-")?;
        let start = start.strip_suffix("-00001")?;
        Some((start, n, n.parse::<u32>().ok().filter(|n| n.to_string().len() <= 4)?))
    });
    match of_several {
        Some((start, text, n)) => {
            (1..=n).map(|i| path.with_file_name(format!("{start}-{i:05}-of-{text}.gguf"))).collect()
        }
        None => vec![path.to_path_buf()],
    }
}

fn add_file(hash: &mut blake3::Hasher, path: &Path) -> io::Result<()> {
    let mut file = File::open(path)?;
    let about = fs::metadata(path)?;
    let size = about.len();
    // A file that was replaced has another time, should all pieces be the same.
    let changed = about.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    hash.update(&size.to_le_bytes());
    hash.update(&changed.as_nanos().to_le_bytes());
    add_piece(hash, &mut file, 0, HEAD_BYTES)?;
    for i in 0..N_PIECES {
        let last = size.saturating_sub(PIECE_BYTES);
        add_piece(hash, &mut file, last / N_PIECES * i, PIECE_BYTES)?;
    }
    add_piece(hash, &mut file, size.saturating_sub(PIECE_BYTES), PIECE_BYTES)
}

fn add_piece(hash: &mut blake3::Hasher, file: &mut File, from: u64, n_bytes: u64) -> io::Result<()> {
    let mut piece = Vec::new();
    file.seek(SeekFrom::Start(from))?;
    file.take(n_bytes).read_to_end(&mut piece)?;
    hash.update(&piece);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_files_of_a_split_model_count() {
        let names = |name: &str| {
            let names = parts(Path::new(name)).into_iter().map(|path| path.display().to_string());
            names.collect::<Vec<_>>()
        };
        assert_eq!(names("m/a-00001-of-00002.gguf"), ["m/a-00001-of-00002.gguf", "m/a-00002-of-00002.gguf"]);
        assert_eq!(names("m/a.gguf"), ["m/a.gguf"]);
        assert_eq!(names("m/a-00002-of-00002.gguf").len(), 1);
    }

    #[test]
    fn a_model_that_differs_in_its_midst_has_another_key() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("a.gguf");
        let key = |bytes: &[u8]| {
            fs::write(&path, bytes).expect("writes");
            let file = File::options().append(true).open(&path).expect("opens");
            file.set_modified(UNIX_EPOCH).expect("a time");
            let config = EngineConfig::new(&path);
            of_model(&config, &ModelInfo::default()).expect("it can be read")
        };
        let mut bytes = vec![1; 3 << 20];
        let before = key(&bytes);
        assert_eq!(key(&bytes), before);
        bytes[2 << 20] = 2;
        assert_ne!(key(&bytes), before);
        let config = EngineConfig::new(dir.path().join("nothing.gguf"));
        assert_eq!(of_model(&config, &ModelInfo::default()), None);
    }
}
