//! What an earlier process found, kept while nothing that it depends on changes: the boot, the driver, the GPUs, the program,
//! the module files, and the variables that choose devices.
//!
//! Only a probe without problems is kept. What failed may have been mended since (memory that others held, a container that was
//! restarted), and a GPU that stays out for that until the next boot would cost more than trying again.

use std::fs::{self, Metadata};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::ProbeConfig;
use super::report::ProbeReport;

/// A report with thousands of devices is none of ours.
const MOST_BYTES: u64 = 1 << 20;

/// Everything that a finding depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Key {
    version: String,
    hardware: String,
    files: Vec<(PathBuf, u64, u128)>,
    variables: Vec<(String, String)>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    key: Key,
    report: ProbeReport,
}

impl Key {
    /// The key of this moment; `None` when a finding could not be told from one of another boot or another program.
    pub(super) fn now(config: &ProbeConfig) -> Option<Self> {
        let modules = minerva_llama::module_groups();
        let modules = modules.into_iter().flat_map(|group| group.variants.into_iter().chain(group.plain));
        let files = std::iter::once(config.program.clone()).chain(modules);
        let files: Option<Vec<_>> = files.map(|file| Some((stamp(&fs::metadata(&file).ok()?)?, file))).collect();
        let chooses = |name: &str| {
            ["CUDA_", "NVIDIA_", "GGML_", "HIP_", "ROCR_", "LD_LIBRARY_PATH"]
                .iter()
                .any(|start| name.starts_with(start))
        };
        let variables = std::env::vars_os()
            .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()));
        let mut variables: Vec<_> = variables.filter(|(name, _)| chooses(name)).collect();
        variables.sort();
        Some(Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            hardware: minerva_gpu::hardware_fingerprint()?,
            files: files?.into_iter().map(|((size, time), file)| (file, size, time)).collect(),
            variables,
        })
    }
}

fn stamp(metadata: &Metadata) -> Option<(u64, u128)> {
    let modified = metadata.modified().ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some((metadata.len(), modified.as_nanos()))
}

/// What was found under `key`.
pub(super) fn read(file: &Path, key: &Key) -> Option<ProbeReport> {
    let mut text = Vec::new();
    fs::File::open(file).ok()?.take(MOST_BYTES).read_to_end(&mut text).ok()?;
    let entry: Entry = serde_json::from_slice(&text).ok()?;
    // The file could name anything; only modules that are here are loaded.
    let is_known = |module: &PathBuf| key.files.iter().any(|(file, _, _)| file == module);
    let is_usable = entry.key == *key && entry.report.is_clean() && entry.report.modules.iter().all(is_known);
    is_usable.then_some(ProbeReport { is_cached: true, ..entry.report })
}

/// Keeps `report` if nothing was wrong, and forgets what was there otherwise.
pub(super) fn write(file: &Path, key: Key, report: &ProbeReport) -> std::io::Result<()> {
    if !report.is_clean() {
        return match fs::remove_file(file) {
            Err(problem) if problem.kind() != std::io::ErrorKind::NotFound => Err(problem),
            _ => Ok(()),
        };
    }
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    // Another process may read it, or write its own, at any moment.
    let part = file.with_extension(format!("{}.part", std::process::id()));
    let entry = Entry { key, report: report.clone() };
    let written = fs::File::create(&part).and_then(|mut out| out.write_all(&serde_json::to_vec(&entry)?));
    written.and_then(|()| fs::rename(&part, file)).inspect_err(|_| drop(fs::remove_file(&part)))
}

impl ProbeReport {
    fn is_clean(&self) -> bool {
        self.problems.is_empty() && self.gave_up.is_none() && self.nothing_works().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::{Failure, ProbedDevice, Problem, Step, Subject};
    use super::*;

    fn clean() -> ProbeReport {
        let cpu = ProbedDevice {
            name: "CPU".to_owned(),
            description: String::new(),
            pci_bus_id: None,
            is_gpu: false,
            module: None,
            works: true,
        };
        ProbeReport { devices: vec![cpu], took_ms: 7, ..ProbeReport::default() }
    }

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("minerva-probe-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        folder
    }

    fn config(program: &Path) -> ProbeConfig {
        ProbeConfig { program: program.to_owned(), args: vec![], time_limit_ms: 1, cache_file: None, known: vec![] }
    }

    #[test]
    fn a_clean_finding_holds_until_something_that_it_depends_on_changes() {
        let folder = folder("cache");
        let (file, program) = (folder.join("deep/probe.json"), folder.join("program"));
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(&program, "one").expect("a file");
        let key = Key::now(&config(&program)).expect("a key");
        assert_eq!(read(&file, &key), None);
        write(&file, key.clone(), &clean()).expect("it is written");
        assert_eq!(read(&file, &key), Some(ProbeReport { is_cached: true, ..clean() }));

        for other in [
            Key { hardware: "another boot".to_owned(), ..key.clone() },
            Key { version: "0".to_owned(), ..key.clone() },
            Key { variables: vec![("CUDA_VISIBLE_DEVICES".to_owned(), "1".to_owned())], ..key.clone() },
        ] {
            assert_eq!(read(&file, &other), None, "{other:?}");
        }
        fs::write(&program, "another").expect("a file");
        let rebuilt = Key::now(&config(&program)).expect("a key");
        assert_eq!(read(&file, &rebuilt), None);
        assert_eq!(Key::now(&config(Path::new("/nowhere/at/all"))), None);

        fs::write(&file, &b"{\"key\":"[..]).expect("a file");
        assert_eq!(read(&file, &key), None);
        fs::remove_dir_all(&folder).expect("the folder was ours");
    }

    #[test]
    fn a_problem_is_not_kept_and_forgets_what_was() {
        let folder = folder("problem");
        let file = folder.join("probe.json");
        let key = Key { version: String::new(), hardware: String::new(), files: vec![], variables: vec![] };
        write(&file, key.clone(), &clean()).expect("it is written");
        let problem = Problem { subject: Subject::Driver, step: Step::List, failure: Failure::NotTried };
        let report = ProbeReport { problems: vec![problem], ..clean() };
        write(&file, key.clone(), &report).expect("it is removed");
        assert!(!file.exists());
        // A file that somebody else made up names a module that is not there.
        let report = ProbeReport { modules: vec!["/tmp/evil.so".into()], ..clean() };
        write(&file, key.clone(), &report).expect("it is written");
        assert_eq!(read(&file, &key), None);
        fs::remove_dir_all(&folder).expect("the folder was ours");
    }
}
