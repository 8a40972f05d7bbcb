//! What a device reached before, and whether it still does: ratios only, each with a tolerance.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use super::measured::{Better, Measured};

/// Rounds that a gate takes at least; a tolerance must hold the error of so many.
pub(super) const MIN_ROUNDS: usize = 7;

/// Tolerances of what is steady (speed and memory): never below, because machines change, and never above, because a tenth
/// must be noticed.
const STEADY: (f64, f64) = (0.05, 0.075);

/// Tolerances of times to load, which depend on what else the system does with its files.
const LOAD: (f64, f64) = (0.25, 0.5);

/// Tolerances of a GPU against a CPU: the clocks of both move.
const DEVICES: (f64, f64) = (0.15, 0.3);

/// One device's file, with a set of ratios for each model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Baseline {
    pub(super) device: String,
    pub(super) models: BTreeMap<String, BTreeMap<String, Limit>>,
}

/// What a ratio was, and how far from it is too far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Limit {
    pub(super) value: f64,
    /// A share of the value.
    pub(super) tolerance: f64,
    pub(super) better: Better,
}

/// What a comparison says so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Not worse than the limit, and more rounds would hardly change that.
    Holds,
    /// Worse, as surely.
    Fails,
    /// More rounds would tell.
    Open,
}

impl Limit {
    /// From what was measured. Fails when it was measured too noisily for any tolerance that is allowed.
    fn of(measured: &Measured) -> anyhow::Result<Self> {
        let (least, most) = match measured.name.split_once('.') {
            Some((place, _)) if place.contains('/') => DEVICES,
            Some((_, "load")) => LOAD,
            _ => STEADY,
        };
        let value = measured.median();
        let needed = 3.0 * measured.error_of_median(MIN_ROUNDS * measured.per_round) / value;
        if needed > most {
            bail!(
                "{} spreads too much: {MIN_ROUNDS} rounds would need a tolerance of {:.1} %, {:.1} % is the most; wait \
                 until the machine is idle",
                measured.name,
                needed * 100.0,
                most * 100.0
            );
        }
        // Digits that mean something.
        let round = |number: f64| (number * 1e4).round() / 1e4;
        Ok(Self { value: round(value), tolerance: round(needed.max(least)), better: measured.better })
    }

    /// The worst that holds.
    pub(super) fn bound(&self) -> f64 {
        match self.better {
            Better::Higher => self.value * (1.0 - self.tolerance),
            Better::Lower => self.value * (1.0 + self.tolerance),
        }
    }

    fn is_met_by(&self, value: f64) -> bool {
        match self.better {
            Better::Higher => value >= self.bound(),
            Better::Lower => value <= self.bound(),
        }
    }

    /// Judged by the interval in which the median must lie.
    pub(super) fn judge(&self, measured: &Measured) -> Verdict {
        let Some((low, high)) = measured.interval() else { return Verdict::Open };
        match (self.is_met_by(low), self.is_met_by(high)) {
            (true, true) => Verdict::Holds,
            (false, false) => Verdict::Fails,
            _ => Verdict::Open,
        }
    }
}

impl Baseline {
    /// Reads a file; `None` when there is none.
    pub(super) fn read(path: &Path) -> anyhow::Result<Option<Self>> {
        match fs::read_to_string(path) {
            Ok(text) => Ok(Some(serde_json::from_str(&text).with_context(|| format!("{}", path.display()))?)),
            Err(problem) if problem.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(problem) => Err(problem).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Sets what was measured of `model`; ratios that were not measured now stay.
    pub(super) fn update(&mut self, device: &str, model: &str, measured: &[Measured]) -> anyhow::Result<()> {
        device.clone_into(&mut self.device);
        let limits = self.models.entry(model.to_owned()).or_default();
        for measured in measured {
            limits.insert(measured.name.clone(), Limit::of(measured)?);
        }
        Ok(())
    }

    pub(super) fn write(&self, path: &Path) -> anyhow::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    pub(super) fn limit(&self, model: &str, name: &str) -> Option<&Limit> {
        self.models.get(model)?.get(name)
    }

    /// Whether every ratio that was measured holds, by its median, with a line for each. What has no limit yet is said, and
    /// holds; a model that has none at all does not.
    pub(super) fn compare(&self, model: &str, measured: &[Measured]) -> (bool, Vec<String>) {
        if !self.models.contains_key(model) {
            return (
                false,
                vec![format!("FAILS: the baseline has nothing about {model}: make one with --write-baseline")],
            );
        }
        let mut all_hold = true;
        let lines = measured.iter().map(|measured| {
            let value = measured.median();
            let Some(limit) = self.limit(model, &measured.name) else {
                return format!("not compared: {} is {value:.3}, the baseline has no such ratio", measured.name);
            };
            let holds = limit.is_met_by(value);
            all_hold &= holds;
            format!(
                "{}: {} is {value:.3}, the baseline {:.3}, the {} that holds {:.3} (median of {})",
                if holds { "holds" } else { "FAILS" },
                measured.name,
                limit.value,
                if limit.better == Better::Higher { "least" } else { "most" },
                limit.bound(),
                measured.values.len(),
            )
        });
        let lines = lines.collect();
        (all_hold, lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(name: &str, better: Better, values: &[f64]) -> Measured {
        Measured::new(name.into(), better, values.iter().copied()).unwrap()
    }

    fn baseline() -> Baseline {
        let mut baseline = Baseline::default();
        let calm = [
            measured("cpu.decode-1", Better::Higher, &[0.98, 0.99, 1.0]),
            measured("cpu.memory", Better::Lower, &[1.02]),
        ];
        baseline.update("a CPU", "m", &calm).unwrap();
        baseline
    }

    #[test]
    fn a_tenth_slower_fails_and_noise_of_a_percent_holds() {
        let limit = *baseline().limit("m", "cpu.decode-1").unwrap();
        assert_eq!((limit.value, limit.tolerance), (0.99, 0.05));
        let judged = |values: &[f64]| limit.judge(&measured("cpu.decode-1", Better::Higher, values));
        assert_eq!(judged(&[0.97, 0.98, 0.98, 0.99, 0.99, 1.0, 1.01]), Verdict::Holds);
        assert_eq!(judged(&[0.88, 0.89, 0.89, 0.90, 0.90, 0.91, 0.91]), Verdict::Fails);
        assert_eq!(judged(&[0.90, 0.98, 0.98, 0.99, 0.99, 1.0, 1.01]), Verdict::Open);
        assert_eq!(judged(&[0.5; 6]), Verdict::Open, "too few to say");
    }

    #[test]
    fn the_comparison_names_every_ratio() {
        let baseline = baseline();
        let now = [
            measured("cpu.decode-1", Better::Higher, &[0.9]),
            measured("cpu.memory", Better::Lower, &[1.05]),
            measured("gpu.decode-1", Better::Higher, &[1.0]),
        ];
        let (holds, lines) = baseline.compare("m", &now);
        assert!(!holds);
        assert_eq!(
            lines,
            [
                "FAILS: cpu.decode-1 is 0.900, the baseline 0.990, the least that holds 0.941 (median of 1)",
                "holds: cpu.memory is 1.050, the baseline 1.020, the most that holds 1.071 (median of 1)",
                "not compared: gpu.decode-1 is 1.000, the baseline has no such ratio",
            ]
        );
        assert!(baseline.compare("m", &now[1..]).0);
        assert!(!baseline.compare("another", &now[1..]).0, "nothing to compare with does not hold");
    }

    #[test]
    fn a_noisy_run_makes_no_baseline() {
        let mut baseline = baseline();
        let noisy = [measured("cpu.decode-1", Better::Higher, &[0.8, 0.9, 1.0, 1.1, 1.2])];
        let problem = baseline.update("a CPU", "m", &noisy).unwrap_err().to_string();
        assert!(problem.starts_with("cpu.decode-1 spreads too much"), "{problem}");
    }

    #[test]
    fn a_baseline_reads_back_and_keeps_what_was_not_measured() {
        let folder = std::env::temp_dir().join(format!("bench-gpu-baseline-{}", std::process::id()));
        let path = folder.join("sub").join("a-cpu.json");
        assert_eq!(Baseline::read(&path).unwrap(), None);
        let mut baseline = baseline();
        baseline.write(&path).unwrap();
        assert_eq!(Baseline::read(&path).unwrap().as_ref(), Some(&baseline));
        baseline.update("a CPU", "m", &[measured("cpu.load", Better::Lower, &[1.4])]).unwrap();
        assert_eq!(baseline.models["m"].len(), 3);
        fs::write(&path, "{").unwrap();
        assert!(Baseline::read(&path).is_err());
        fs::remove_dir_all(&folder).unwrap();
    }
}
