//! The folder of the disk tier: who may use it, which files are in it, and its limit.
//!
//! One engine uses a folder at a time (`lock`). Files have numbers for names; each is written under another name first. Files for
//! other models, and of clients who are unknown now, count and are the first to go. What is damaged is removed, with one line in the
//! log; what merely cannot be read now is tried again later. Files of other kinds are none of ours and stay.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use minerva_llama::SavedState;

use super::format::{Damage, Head, NamespaceName, StateKey, file_bytes, last_digest, read_state};
use super::{MOST_FILES, Store, Unread};
use crate::request::TokenId;
use crate::scheduler::{FileId, OnDisk};

const ENDING: &str = "kv";
const UNFINISHED: &str = "tmp";

/// What names of namespaces are made with, so that they tell nothing to somebody without it.
const SALT_BYTES: usize = 32;

/// A file that cannot be read so many times one after the other is damaged.
const MOST_TRIES: u32 = 3;

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    #[error("another server uses it")]
    Locked,
    #[cfg(unix)]
    #[error("it belongs to another user")]
    Foreign,
    #[cfg(unix)]
    #[error("others may read it and something else is in it; give the cache a folder of its own")]
    Shared,
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A file that could be read, or could have been by somebody else.
#[derive(Debug)]
struct Known {
    path: PathBuf,
    n_bytes: u64,
    /// Of its head: another file in its place has another.
    digest: [u8; 32],
    /// Attempts to read it that failed since one did not.
    n_failed: u32,
}

/// The folder.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// Held as long as this is.
    _lock: File,
    key: StateKey,
    limit_bytes: u64,
    names: Vec<(u64, NamespaceName)>,
    files: BTreeMap<FileId, Known>,
    /// Files that are of no use to this engine, the oldest last.
    others: Vec<Known>,
    n_bytes: u64,
    next_number: u64,
}

/// Files that were found, the one unused for longest first, and what was dropped.
pub(crate) type Index = (Vec<OnDisk>, Vec<Damage>);

impl Folder {
    /// Opens or makes the folder, and reads what all files in it say of themselves. `clients`: namespaces, and the secrets behind
    /// their names.
    pub(crate) fn open(
        path: &Path,
        limit_bytes: u64,
        key: StateKey,
        clients: &[(u64, [u8; 32])],
    ) -> Result<(Self, Index), FolderError> {
        make_private(path)?;
        let lock = private().create(true).truncate(false).open(path.join("lock"))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => FolderError::Locked,
            TryLockError::Error(error) => error.into(),
        })?;
        let salt = salt(&path.join("salt"))?;
        let names = clients
            .iter()
            .map(|(namespace, secret)| (*namespace, NamespaceName(*blake3::keyed_hash(&salt, secret).as_bytes())));
        let mut folder = Self {
            path: path.to_path_buf(),
            _lock: lock,
            key,
            limit_bytes,
            names: names.collect(),
            files: BTreeMap::new(),
            others: Vec::new(),
            n_bytes: 0,
            next_number: 1,
        };
        let index = folder.index()?;
        Ok((folder, index))
    }

    fn index(&mut self) -> io::Result<Index> {
        let (mut found, mut dropped): (Vec<(SystemTime, Known, Head)>, _) = (Vec::new(), Vec::new());
        let mut unread = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            let ending = path.extension().and_then(|ending| ending.to_str());
            let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(parse_number);
            let Some(number) = number else { continue };
            if ending == Some(UNFINISHED) {
                remove(&path);
            } else if ending == Some(ENDING) {
                self.next_number = self.next_number.max(number.saturating_add(1));
                match look_at(&path, self.limit_bytes) {
                    Ok((head, known, used)) => found.push((used, known, head)),
                    Err(damage) if damage.may_pass() => {
                        warn_of(&path, damage, "is left alone");
                        let n_bytes = fs::symlink_metadata(&path).map_or(0, |about| about.len());
                        unread.push(Known { path, n_bytes, digest: [0; 32], n_failed: 1 });
                    }
                    Err(damage) => {
                        drop_file(&path, damage);
                        dropped.push(damage);
                    }
                }
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0).then_with(|| a.1.path.cmp(&b.1.path)));
        self.n_bytes = found.iter().map(|(_, known, _)| known).chain(&unread).map(|known| known.n_bytes).sum();
        let mut index = Vec::new();
        for (_, known, head) in found {
            let name = self.names.iter().find(|(_, name)| *name == head.namespace && self.key == head.key);
            let Some(&(namespace, _)) = name else {
                self.others.insert(0, known);
                continue;
            };
            let (file, n_bytes) = (index.len() as FileId + 1, known.n_bytes);
            self.files.insert(file, known);
            index.push(OnDisk { file, tokens: head.tokens, namespace, n_bytes });
        }
        self.others.splice(0..0, unread);
        // A limit may be lower than the last time.
        while self.is_full(0) && self.drop_other() {}
        let mut oldest = index.iter().map(|file| file.file);
        let mut gone = Vec::new();
        while self.is_full(0) {
            let Some(file) = oldest.next() else { break };
            self.remove(file);
            gone.push(file);
        }
        index.retain(|file| !gone.contains(&file.file));
        Ok((index, dropped))
    }

    fn is_full(&self, n_bytes: u64) -> bool {
        self.n_bytes.saturating_add(n_bytes) > self.limit_bytes || self.files.len() + self.others.len() > MOST_FILES
    }

    /// Removes the oldest file that is of no use here; `false` when there is none.
    fn drop_other(&mut self) -> bool {
        let Some(other) = self.others.pop() else { return false };
        if remove(&other.path) {
            self.n_bytes -= other.n_bytes;
        }
        true
    }

    fn write_file(path: &Path, head: &Head, state: &[u8]) -> io::Result<[u8; 32]> {
        let unfinished = path.with_extension(UNFINISHED);
        let (bytes, digest) = head.to_bytes();
        let written = private().create_new(true).open(&unfinished).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.write_all(state)?;
            file.write_all(&last_digest(&digest, state))
        });
        // Not flushed to the device: what a loss of power leaves of it fails its checksum.
        let there = written.and_then(|()| fs::rename(&unfinished, path));
        if there.is_err() {
            remove(&unfinished);
        }
        there.map(|()| digest)
    }
}

impl Store for Folder {
    fn write(&mut self, file: FileId, namespace: u64, tokens: &[TokenId], state: &[u8]) -> io::Result<bool> {
        let Some(&(_, namespace)) = self.names.iter().find(|(own, _)| *own == namespace) else { return Ok(false) };
        let n_bytes = file_bytes(tokens.len(), state.len() as u64);
        while self.is_full(n_bytes) && self.drop_other() {}
        if self.is_full(n_bytes) {
            return Ok(false);
        }
        let head = Head { key: self.key, namespace, tokens: tokens.to_vec(), n_state_bytes: state.len() as u64 };
        // Numbers never end, unless somebody made a file of the last one.
        let Some(next_number) = self.next_number.checked_add(1) else { return Ok(false) };
        let path = self.path.join(format!("{:016x}", self.next_number)).with_extension(ENDING);
        self.next_number = next_number;
        self.n_bytes += n_bytes; // before it is there
        match Self::write_file(&path, &head, state) {
            Ok(digest) => {
                self.files.insert(file, Known { path, n_bytes, digest, n_failed: 0 });
                Ok(true)
            }
            Err(error) => {
                self.n_bytes -= n_bytes;
                Err(error)
            }
        }
    }

    fn read(&mut self, file: FileId) -> Result<SavedState, Unread> {
        let gone = Unread { damage: Damage::Unreadable(io::ErrorKind::NotFound), is_gone: true };
        let Some(known) = self.files.get_mut(&file) else { return Err(gone) };
        known.n_failed += 1;
        let damage = match read_known(known, self.limit_bytes) {
            Ok(state) => {
                known.n_failed = 0;
                return Ok(state);
            }
            Err(damage) => damage,
        };
        let is_gone = !damage.may_pass() || known.n_failed >= MOST_TRIES;
        if is_gone {
            drop_file(&known.path, damage);
            self.remove(file);
        } else {
            warn_of(&known.path, damage, "is left alone for now");
        }
        Err(Unread { damage, is_gone })
    }

    fn remove(&mut self, file: FileId) {
        let Some(known) = self.files.remove(&file) else { return };
        if remove(&known.path) {
            self.n_bytes -= known.n_bytes;
        }
    }

    fn size(&self) -> (u64, usize) {
        (self.n_bytes, self.files.len() + self.others.len())
    }
}

fn read_known(known: &Known, limit_bytes: u64) -> Result<SavedState, Damage> {
    let mut file = open(&known.path)?;
    let (head, digest) = Head::read(&mut file, known.n_bytes, limit_bytes)?;
    if digest != known.digest {
        return Err(Damage::Checksum);
    }
    let state = read_state(&mut file, &head, &digest)?;
    // When it was used last, for the next start. A clock that cannot be set costs only the order.
    let _ = file.set_modified(SystemTime::now());
    Ok(state)
}

fn look_at(path: &Path, limit_bytes: u64) -> Result<(Head, Known, SystemTime), Damage> {
    let mut file = open(path)?;
    let about = file.metadata().map_err(|error| Damage::Unreadable(error.kind()))?;
    let n_bytes = about.len();
    let (head, digest) = Head::read(&mut file, n_bytes, limit_bytes)?;
    let used = about.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    Ok((head, Known { path: path.to_path_buf(), n_bytes, digest, n_failed: 0 }, used))
}

/// Opens a plain file of this user: a link, a pipe, which would never end, and what somebody else put there are none of ours.
fn open(path: &Path) -> Result<File, Damage> {
    let unreadable = |error: io::Error| Damage::Unreadable(error.kind());
    let about = fs::symlink_metadata(path).map_err(unreadable)?;
    #[cfg(unix)]
    let is_mine = std::os::unix::fs::MetadataExt::uid(&about) == rustix::process::geteuid().as_raw();
    #[cfg(not(unix))]
    let is_mine = true;
    if !(about.is_file() && is_mine) {
        return Err(Damage::NotOurs);
    }
    File::open(path).map_err(unreadable)
}

fn drop_file(path: &Path, damage: Damage) {
    warn_of(path, damage, "is dropped");
    remove(path);
}

fn warn_of(path: &Path, damage: Damage, fate: &str) {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    tracing::warn!(%file, "a file of the disk cache {fate}: {damage}");
}

/// Whether it is gone.
fn remove(path: &Path) -> bool {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::debug!("{} cannot be removed: {error}", path.display());
            false
        }
        _ => true,
    }
}

fn parse_number(name: &str) -> Option<u64> {
    let is_ours = name.len() == 16 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    is_ours.then(|| u64::from_str_radix(name, 16).ok()).flatten()
}

/// The folder, for nobody but its user.
fn make_private(path: &Path) -> Result<(), FolderError> {
    let is_new_or_ours = !path.exists() || path.join("salt").exists() || fs::read_dir(path)?.next().is_none();
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
        let about = fs::metadata(path)?;
        if about.uid() != rustix::process::geteuid().as_raw() {
            return Err(FolderError::Foreign);
        }
        if about.mode() & 0o777 != 0o700 && !is_new_or_ours {
            return Err(FolderError::Shared);
        }
        if about.mode() & 0o777 != 0o700 {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
        }
    }
    Ok(())
}

/// A file that nobody but its user reads.
fn private() -> OpenOptions {
    let mut options = File::options();
    options.write(true).read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// The folder's own random number; a new one makes all names unknown, and their files the first to go.
fn salt(path: &Path) -> io::Result<[u8; SALT_BYTES]> {
    let mut salt = [0; SALT_BYTES];
    match open(path) {
        Ok(mut file) if file.metadata()?.len() == SALT_BYTES as u64 => {
            file.read_exact(&mut salt)?;
            return Ok(salt);
        }
        Err(Damage::Unreadable(kind)) if kind != io::ErrorKind::NotFound => return Err(kind.into()),
        _ => {}
    }
    getrandom::fill(&mut salt).map_err(io::Error::other)?;
    let unfinished = path.with_extension(UNFINISHED);
    remove(&unfinished);
    private().create_new(true).open(&unfinished)?.write_all(&salt)?;
    fs::rename(unfinished, path)?;
    Ok(salt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_read_for_a_while_stays_and_one_that_never_can_goes() {
        let parent = tempfile::tempdir().expect("a folder");
        let (path, aside) = (parent.path().join("kv"), parent.path().join("aside"));
        let open = || Folder::open(&path, 1 << 20, StateKey([1; 32]), &[(0, [2; 32])]).expect("it opens");
        let (mut folder, _) = open();
        assert!(folder.write(1, 0, &[1, 2, 3], b"state").expect("it is written"));
        let cannot_be_read = |folder: &mut Folder| {
            fs::rename(&path, &aside).expect("it moves");
            fs::write(&path, b"no folder").expect("it is written");
            let unread = folder.read(1).expect_err("there is no such folder");
            fs::remove_file(&path).expect("it goes");
            fs::rename(&aside, &path).expect("it moves back");
            unread.is_gone
        };
        for _ in 0..2 {
            assert!(!cannot_be_read(&mut folder));
            assert!(!cannot_be_read(&mut folder));
            assert_eq!(folder.read(1).expect("it is there again"), b"state".to_vec().into());
        }
        let (n_bytes, n_files) = folder.size();
        assert_eq!((n_bytes, n_files), (file_bytes(3, 5), 1));
        for is_gone in [false, false, true] {
            assert_eq!(cannot_be_read(&mut folder), is_gone);
        }
        assert_eq!(folder.size().1, 0);
        assert_eq!(folder.read(1), Err(Unread { damage: Damage::Unreadable(io::ErrorKind::NotFound), is_gone: true }));
    }
}
