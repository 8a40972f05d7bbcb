//! Runs every program of the package minerva-examples on the real model.
//!
//! An example finds the model's path as its first argument and in `MINERVA_TEST_MODEL`. It passes when it exits with 0
//! in time and has printed something.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::Deserialize;

use super::tally::Tally;
use crate::setup::Ready;
use crate::workspace;

const PACKAGE: &str = "minerva-examples";
const LIMIT: Duration = Duration::from_mins(3);

/// The part of `cargo metadata --no-deps` that names programs.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

pub(super) fn run(ready: &Ready) -> anyhow::Result<Tally> {
    let model = ready.model.as_deref().context("the examples need the default model")?;
    let metadata = ["metadata", "--no-deps", "--format-version=1"];
    let programs = programs(&workspace::capture(workspace::cargo().args(metadata))?)?;
    if programs.is_empty() {
        bail!("{PACKAGE} has no programs");
    }
    workspace::check(workspace::cargo().args(["build", "--release", "-p", PACKAGE, "--bins", "--examples"]))?;
    let mut tally = Tally::default();
    for (name, folder) in &programs {
        println!("-- {name}");
        match run_example(&workspace::release_dir().join(folder).join(name), model) {
            Ok(()) => tally.passed += 1,
            Err(error) => {
                eprintln!("{name}: {error:#}");
                tally.failed += 1;
            }
        }
    }
    Ok(tally)
}

/// `(name, folder below target/release)` of each program.
fn programs(metadata: &str) -> anyhow::Result<Vec<(String, &'static str)>> {
    let metadata: Metadata = serde_json::from_str(metadata).context("cannot read `cargo metadata`")?;
    let packages = metadata.packages.into_iter().filter(|package| package.name == PACKAGE);
    let programs = packages.flat_map(|package| package.targets).filter_map(|target| {
        let folder = match target.kind.first()?.as_str() {
            "bin" => "",
            "example" => "examples",
            _ => return None,
        };
        Some((target.name, folder))
    });
    Ok(programs.collect())
}

/// Runs one example and shows what it prints.
fn run_example(program: &Path, model: &Path) -> anyhow::Result<()> {
    let mut command = workspace::command(program);
    command.arg(model).env("MINERVA_TEST_MODEL", model).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
    let mut stdout = child.stdout.take().context("the example has no output")?;
    // Read aside, so that an example that prints much does not wait for us while we wait for it.
    let reader = std::thread::spawn(move || {
        let mut output = Vec::new();
        stdout.read_to_end(&mut output).map(|_| output)
    });
    let Some(status) = workspace::wait_for(&mut child, LIMIT)? else {
        child.kill()?;
        child.wait()?;
        bail!("still running after {} s", LIMIT.as_secs());
    };
    let output = reader.join().expect("reading does not panic")?;
    std::io::stdout().write_all(&output)?;
    println!();
    if !status.success() {
        bail!("{status}");
    }
    if output.trim_ascii().is_empty() {
        bail!("printed nothing");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_the_bins_and_examples_of_one_package() {
        let metadata = r#"{ "packages": [
            { "name": "minerva-server", "targets": [{ "name": "minerva", "kind": ["bin"] }] },
            { "name": "minerva-examples", "targets": [
                { "name": "minerva_examples", "kind": ["lib"] },
                { "name": "stream", "kind": ["example"] },
                { "name": "callback", "kind": ["bin"] } ] } ] }"#;
        let expected = [("stream".to_owned(), "examples"), ("callback".to_owned(), "")];
        assert_eq!(programs(metadata).expect("valid metadata"), expected);
    }
}
