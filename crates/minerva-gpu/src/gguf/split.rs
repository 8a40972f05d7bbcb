//! Models in several files: `NAME-00001-of-00003.gguf` and its siblings, merged into one header.
//!
//! The file names are made here from the name that was asked for, as llama.cpp does it (`llama_split_path`), so a file cannot
//! name another one: what it says about the set only has to agree.

use std::path::Path;

use super::error::GgufError;
use super::header::Header;
use super::limits::{MAX_SHARDS, MAX_TENSORS};
use super::value::Value;

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
const TENSORS: &str = "split.tensors.count";

/// Reads a single file, or all files of the set that `path` belongs to.
pub(super) fn open(path: &Path) -> Result<Header, GgufError> {
    let asked = Header::open_shard(path)?;
    let n_shards = u16_of(&asked, COUNT)?.unwrap_or(0);
    if n_shards <= 1 {
        return Ok(asked);
    }
    if n_shards > MAX_SHARDS {
        return Err(GgufError::TooLarge {
            field: format!("`{COUNT}`"),
            offset: asked.metadata.offset(COUNT),
            given: u64::from(n_shards),
            limit: u64::from(MAX_SHARDS),
        });
    }
    let file_name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let refused = |why: String| GgufError::Shard { file: file_name.to_owned(), why };
    let asked_number = u16_of(&asked, NUMBER)?.ok_or_else(|| GgufError::Missing { key: NUMBER.to_owned() })?;
    if asked_number >= n_shards {
        return Err(refused(format!("says that it is shard {asked_number}, counted from 0, of {n_shards}")));
    }
    let Some(prefix) = file_name.strip_suffix(&suffix(asked_number, n_shards)).filter(|prefix| !prefix.is_empty())
    else {
        let suffix = suffix(asked_number, n_shards);
        return Err(refused(format!("is part of a split model, so its name must end in `{suffix}`")));
    };

    let mut merged: Option<Header> = None;
    for number in 0..n_shards {
        let name = format!("{prefix}{}", suffix(number, n_shards));
        let shard = if number == asked_number {
            asked.clone()
        } else {
            Header::open_shard(&path.with_file_name(&name)).map_err(|error| absent(error, n_shards))?
        };
        check_place(&shard, &name, number, n_shards)?;
        match &mut merged {
            None => merged = Some(shard),
            Some(merged) => append(merged, shard, &name, number)?,
        }
    }
    let mut merged = merged.unwrap_or(asked); // n_shards is at least 2
    merged.n_shards = n_shards;
    merged.index_names()?;
    check_tensor_count(&merged)?;
    Ok(merged)
}

/// The end of a shard's name, whose numbers count from 1: `-00002-of-00003.gguf`.
fn suffix(number: u16, n_shards: u16) -> String {
    format!("-{:05}-of-{n_shards:05}.gguf", u32::from(number) + 1)
}

/// llama.cpp reads these keys as `u16` and aborts on another type in a later shard.
fn u16_of(header: &Header, key: &str) -> Result<Option<u16>, GgufError> {
    match header.metadata.get(key) {
        None => Ok(None),
        Some(&Value::U16(number)) => Ok(Some(number)),
        Some(_) => Err(header.metadata.wrong_type(key, "u16")),
    }
}

/// A missing sibling is said as such, not as the system's error for a name that nobody typed.
fn absent(error: GgufError, n_shards: u16) -> GgufError {
    match error {
        GgufError::Io { file, source } if source.kind() == std::io::ErrorKind::NotFound => {
            GgufError::Shard { file, why: format!("is missing: the model is split into {n_shards} files") }
        }
        other => other,
    }
}

fn check_place(shard: &Header, name: &str, number: u16, n_shards: u16) -> Result<(), GgufError> {
    let refused = |why: String| Err(GgufError::Shard { file: name.to_owned(), why });
    match u16_of(shard, NUMBER)? {
        Some(given) if given == number => {}
        Some(given) => return refused(format!("says that it is shard {given}, counted from 0, not {number}")),
        None => return refused(format!("has no `{NUMBER}`, so it is of another model")),
    }
    match u16_of(shard, COUNT)? {
        Some(given) if given == n_shards => Ok(()),
        Some(given) => refused(format!("is of a set of {given} files, not {n_shards}")),
        None => refused(format!("has no `{COUNT}`, so it is of another model")),
    }
}

/// Adds a later shard's tensors. What it repeats of the metadata must be as in the first shard.
fn append(merged: &mut Header, shard: Header, name: &str, number: u16) -> Result<(), GgufError> {
    for key in ["general.architecture", "general.name", "general.basename", TENSORS] {
        if let Some(given) = shard.metadata.get(key)
            && merged.metadata.get(key) != Some(given)
        {
            return Err(GgufError::Shard {
                file: name.to_owned(),
                why: format!("is of another model: its `{key}` is {given}"),
            });
        }
    }
    let n_tensors = (merged.tensors.len() + shard.tensors.len()) as u64;
    if n_tensors > MAX_TENSORS {
        return Err(GgufError::TooLarge {
            field: format!("the number of tensors up to `{name}`"),
            offset: 8, // where a file says its count
            given: n_tensors,
            limit: MAX_TENSORS,
        });
    }
    merged.file_bytes = merged.file_bytes.saturating_add(shard.file_bytes);
    merged.shard_data_offsets.push(shard.data_offset);
    merged.tensors.extend(shard.tensors.into_iter().map(|mut tensor| {
        tensor.shard = number;
        tensor
    }));
    Ok(())
}

fn check_tensor_count(merged: &Header) -> Result<(), GgufError> {
    let metadata = &merged.metadata;
    match metadata.get(TENSORS) {
        None => Err(GgufError::Missing { key: TENSORS.to_owned() }),
        Some(&Value::I32(given)) if usize::try_from(given) == Ok(merged.tensors.len()) => Ok(()),
        Some(&Value::I32(given)) => {
            Err(metadata.invalid(TENSORS, &given, format!("the shards have {} tensors", merged.tensors.len())))
        }
        Some(_) => Err(metadata.wrong_type(TENSORS, "i32")),
    }
}
