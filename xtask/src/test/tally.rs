//! Counts tests: reads the closing lines of cargo test and pytest while they pass through to the terminal.

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

use super::limit;
use crate::workspace;

/// How many tests ran, and why some did not.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(super) struct Tally {
    pub(super) passed: u64,
    pub(super) failed: u64,
    pub(super) skipped: u64,
    /// One sentence per thing that this machine cannot test.
    pub(super) skip_reasons: Vec<String>,
}

impl Tally {
    /// `n` tests that passed.
    pub(super) fn passed(n: u64) -> Self {
        Self { passed: n, ..Self::default() }
    }

    /// One test that this machine cannot run.
    pub(super) fn skip(reason: impl Into<String>) -> Self {
        Self { skipped: 1, skip_reasons: vec![reason.into()], ..Self::default() }
    }

    /// Adds the counts of `other`.
    pub(super) fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.skip_reasons.extend_from_slice(&other.skip_reasons);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}

/// `cargo test` on the whole workspace in the release profile, counted over all its test programs, each with a time limit.
pub(super) fn cargo_test(selection: &[&str]) -> anyhow::Result<Tally> {
    let mut command = workspace::cargo();
    command.args(["test", "--release", "--workspace", "--no-fail-fast"]).args(selection);
    limit::set(&mut command)?;
    count(&mut command, cargo_line)
}

/// Runs `command`, shows its output and adds up what `read` finds in each line.
///
/// # Errors
/// When the program fails without having counted a failed test: it did not get as far as its tests.
pub(super) fn count(command: &mut Command, read: fn(&str) -> Option<Tally>) -> anyhow::Result<Tally> {
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start the tests")?;
    let stdout = child.stdout.take().context("the tests have no output")?;
    let mut tally = Tally::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        if let Some(found) = read(&line) {
            tally.add(&found);
        }
    }
    let status = child.wait()?;
    if !status.success() && tally.failed == 0 {
        bail!("the tests did not run to their end ({status})");
    }
    Ok(tally)
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s`
fn cargo_line(line: &str) -> Option<Tally> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    Some(counted(counts, ';', "ignored"))
}

/// `===== 1 failed, 7 passed, 2 skipped in 3.20s =====`, with or without the rule around it.
pub(super) fn pytest_line(line: &str) -> Option<Tally> {
    let (counts, time) = line.trim_matches(['=', ' ']).rsplit_once(" in ")?;
    let is_time = time.starts_with(|c: char| c.is_ascii_digit()) && time.contains('s');
    let is_count = counts.starts_with(|c: char| c.is_ascii_digit());
    (is_time && is_count).then(|| counted(counts, ',', "skipped"))
}

/// The numbers before `passed`, `failed` (or pytest's `error`) and `skipped_word`.
fn counted(counts: &str, separator: char, skipped_word: &str) -> Tally {
    let mut tally = Tally::default();
    for part in counts.split(separator) {
        let Some((number, word)) = part.trim().split_once(' ') else {
            continue;
        };
        let number: u64 = number.parse().unwrap_or(0);
        match word {
            "passed" => tally.passed += number,
            "failed" | "error" | "errors" => tally.failed += number,
            word if word == skipped_word => tally.skipped += number,
            _ => {}
        }
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(passed: u64, failed: u64, skipped: u64) -> Tally {
        Tally { passed, failed, skipped, ..Tally::default() }
    }

    #[test]
    fn cargo_test_lines_are_counted() {
        let ok = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s";
        assert_eq!(cargo_line(ok), Some(tally(3, 0, 1)));
        let bad = "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(cargo_line(bad), Some(tally(3, 2, 0)));
        assert_eq!(cargo_line("test kv::freed ... ok"), None);
    }

    #[test]
    fn pytest_lines_are_counted() {
        assert_eq!(pytest_line("12 passed in 3.20s"), Some(tally(12, 0, 0)));
        let long = "==== 1 failed, 7 passed, 2 skipped, 1 error in 63.20s (0:01:03) ====";
        assert_eq!(pytest_line(long), Some(tally(7, 2, 2)));
        assert_eq!(pytest_line("tests/clients/test_chat.py .... [100%]"), None);
        assert_eq!(pytest_line("no tests ran in 0.01s"), None);
    }

    #[test]
    fn the_closing_line_names_skipped_tests_only_when_there_are_some() {
        assert_eq!(tally(5, 0, 0).to_string(), "5 passed, 0 failed");
        assert_eq!(tally(5, 1, 2).to_string(), "5 passed, 1 failed, 2 skipped");
    }
}
