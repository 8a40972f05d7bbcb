//! What was found, kept for later loads of the same model with the same settings on the same device by the same build.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::candidates::Open;
use super::{TuneReport, TuneSource, TunedSettings};
use crate::remembered;

const FILE: &str = "tuning.json";

/// Raised with every change of what is measured or how it is kept: older findings are then forgotten.
const FORMAT: u32 = 1;
/// Findings that are kept; the oldest leave.
const MOST_ENTRIES: usize = 64;
/// More rows than any tuning has.
const MOST_ROWS: usize = 64;
/// Loads that measure on a machine that others use, before the defaults stay for good.
const MOST_TRIES: u32 = 3;
/// A gain or a rate beyond it was not measured.
const MOST_GAIN: f64 = 1e3;
/// Of the model file: its header with the shapes, and the end, which differs between trainings of one shape.
const HEAD_BYTES: u64 = 1 << 20;
const TAIL_BYTES: u64 = 1 << 16;

const HEX: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];

/// What a finding is kept under: a digest of everything that it depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Key(String);

/// A finding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Record {
    /// The model's name, for people who read the file.
    model: String,
    /// Seconds since 1970.
    since_s: u64,
    /// How long measuring was allowed to take.
    budget_ms: u64,
    /// Loads that measured.
    n_tries: u32,
    settings: TunedSettings,
    report: TuneReport,
}

impl Key {
    /// A key of the model file and of what else matters, in words. `None` when the file cannot be read.
    pub(crate) fn of(model: &Path, matters: &[String]) -> Option<Self> {
        let mut file = File::open(model).ok()?;
        let size = file.metadata().ok()?.len();
        let mut bytes = Vec::new();
        file.by_ref().take(HEAD_BYTES).read_to_end(&mut bytes).ok()?;
        file.seek(SeekFrom::Start(size.saturating_sub(TAIL_BYTES))).ok()?;
        file.take(TAIL_BYTES).read_to_end(&mut bytes).ok()?;
        let mut hash = Sha256::new();
        hash.update(FORMAT.to_le_bytes());
        hash.update(size.to_le_bytes());
        hash.update(&bytes);
        for part in matters {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let digest = hash.finalize();
        Some(Self(
            digest.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|nibble| HEX[usize::from(nibble)]).collect(),
        ))
    }
}

/// What was found under `key`, if it could have been.
pub(crate) fn read(
    key: &Key,
    open: &Open,
    default: &TunedSettings,
    budget_ms: u64,
) -> Option<(TunedSettings, TuneReport)> {
    let record = remembered::read::<Record>(FILE).remove(&key.0)?;
    if record.is_worth_another_look(budget_ms) { None } else { believable(record, open, default) }
}

impl Record {
    /// What was too slow to be measured may be fast enough for a longer time, and what was disturbed for a quieter one.
    fn is_worth_another_look(&self, budget_ms: u64) -> bool {
        let was_too_slow = self.report.reason.is_some() && budget_ms > self.budget_ms;
        was_too_slow || (self.report.is_disturbed && self.n_tries < MOST_TRIES)
    }
}

/// The file could say anything: only settings that could have been chosen are taken.
fn believable(record: Record, open: &Open, default: &TunedSettings) -> Option<(TunedSettings, TuneReport)> {
    let Record { settings, report, .. } = record;
    let is_plausible = |number: f64| number.is_finite() && number > 0.0 && number < MOST_GAIN;
    let is_whole = open.allows(default, &settings)
        && report.settings == settings.to_string()
        && report.rows.len() <= MOST_ROWS
        && is_plausible(report.gain)
        && report.rows.iter().all(|row| row.ratio.is_none_or(is_plausible));
    let source = if report.reason.is_some() { TuneSource::Defaults } else { TuneSource::Cached };
    is_whole.then_some((settings, TuneReport { source, ..report }))
}

/// Keeps a finding.
pub(crate) fn write(
    key: Key,
    model: &str,
    (settings, report): (&TunedSettings, &TuneReport),
    budget_ms: u64,
    since_s: u64,
) {
    let mut all: BTreeMap<String, Record> = remembered::read(FILE);
    let (settings, report) = (settings.clone(), report.clone());
    let n_tries = all.get(&key.0).map_or(0, |record| record.n_tries).saturating_add(1);
    let record = Record { model: model.to_owned(), since_s, budget_ms, n_tries, settings, report };
    all.insert(key.0, record);
    while all.len() > MOST_ENTRIES {
        let Some(oldest) = all.iter().min_by_key(|(_, record)| record.since_s).map(|(key, _)| key.clone()) else {
            break;
        };
        all.remove(&oldest);
    }
    remembered::write(FILE, &all);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{EngineConfig, FlashAttention, KvType};
    use minerva_gpu::CpuInfo;
    use proptest::prelude::*;

    fn default() -> TunedSettings {
        TunedSettings {
            flash_attention: FlashAttention::Auto,
            kv_type_k: KvType::F16,
            kv_type_v: KvType::F16,
            kv_unified: false,
            n_threads: 8,
            n_threads_batch: 8,
            n_ubatch: 512,
        }
    }

    fn open() -> Open {
        Open::of(&EngineConfig::default(), &default(), 8, &CpuInfo { affinity_cpus: 8, ..CpuInfo::default() })
    }

    fn record(settings: TunedSettings) -> Record {
        let report = TuneReport {
            source: TuneSource::Measured,
            settings: settings.to_string(),
            gain: 1.25,
            ..TuneReport::default()
        };
        Record { model: "a".to_owned(), since_s: 1, budget_ms: 6_000, n_tries: 1, settings, report }
    }

    #[test]
    fn a_finding_comes_back_as_it_was_and_says_that_it_is_old() {
        let settings = TunedSettings { flash_attention: FlashAttention::Off, n_threads: 7, ..default() };
        let text = serde_json::to_string(&record(settings.clone())).unwrap();
        let (found, report) = believable(serde_json::from_str(&text).unwrap(), &open(), &default()).unwrap();
        assert_eq!((found, report.source, report.gain), (settings, TuneSource::Cached, 1.25));
    }

    #[test]
    fn settings_that_could_not_have_been_chosen_are_not_taken() {
        for settings in [
            TunedSettings { n_threads: 4_000_000, ..default() },
            TunedSettings { n_threads: 0, ..default() },
            TunedSettings { n_ubatch: 1 << 30, ..default() },
            TunedSettings { kv_type_k: KvType::Q4_0, kv_type_v: KvType::Q4_0, ..default() },
            TunedSettings { kv_type_k: KvType::Bf16, ..default() },
        ] {
            assert_eq!(believable(record(settings.clone()), &open(), &default()), None, "{settings}");
        }
        let mut wild = record(default());
        wild.report.gain = f64::INFINITY;
        assert_eq!(believable(wild, &open(), &default()), None);
    }

    #[test]
    fn a_disturbed_finding_and_one_without_time_are_looked_at_again() {
        let mut disturbed = record(default());
        disturbed.report.is_disturbed = true;
        assert!(disturbed.is_worth_another_look(6_000));
        disturbed.n_tries = MOST_TRIES;
        assert!(!disturbed.is_worth_another_look(6_000), "not for ever");
        let mut slow = record(default());
        slow.report.reason = Some("a step takes 400 ms".to_owned());
        assert!(!slow.is_worth_another_look(6_000) && slow.is_worth_another_look(60_000));
    }

    #[test]
    fn another_model_or_another_machine_is_another_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let (one, same, other) = (file("a", b"GGUF one"), file("b", b"GGUF one"), file("c", b"GGUF two"));
        let parts = ["a".to_owned(), "bc".to_owned()];
        let key = Key::of(&one, &parts).unwrap();
        assert_eq!(Key::of(&same, &parts), Some(key.clone()), "the name does not matter");
        assert_ne!(Key::of(&other, &parts), Some(key.clone()));
        assert_ne!(Key::of(&one, &["ab".to_owned(), "c".to_owned()]), Some(key));
        assert_eq!(Key::of(&folder.path().join("none"), &parts), None);
    }

    proptest! {
        #[test]
        fn a_mutated_record_is_refused_or_harmless(at in 0_usize..10_000, byte: u8) {
            let mut text = serde_json::to_vec(&record(default())).unwrap();
            let at = at % text.len();
            text[at] = byte;
            if let Ok(record) = serde_json::from_slice::<Record>(&text)
                && let Some((settings, report)) = believable(record, &open(), &default())
            {
                prop_assert!(open().allows(&default(), &settings), "{}", settings);
                prop_assert!(report.gain > 0.0 && report.gain < MOST_GAIN);
            }
        }
    }
}
