//! The licences of what a bundle contains besides Minerva: llama.cpp and the Rust crates in the programs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::Value as Json;

use super::Built;
use super::archive::Entry;
use crate::workspace;

pub(super) fn add(built: &Built, entries: &mut BTreeMap<String, Entry>) -> anyhow::Result<()> {
    entries.insert("licenses/llama.cpp.txt".to_owned(), Entry::file(&built.source.join("LICENSE"))?);
    let mut cargo = workspace::cargo();
    cargo.args(["metadata", "--format-version", "1", "--filter-platform", &built.target]);
    let metadata: Json = serde_json::from_str(&workspace::capture(&mut cargo)?)?;
    entries.insert("licenses/rust-crates.txt".to_owned(), Entry::text(crates(&metadata)?));
    Ok(())
}

/// Name, version and licence of each crate in minerva-server, with the licence files that it brings.
fn crates(metadata: &Json) -> anyhow::Result<String> {
    let packages = metadata["packages"].as_array().context("cargo metadata lists packages")?;
    let by_id: BTreeMap<&str, &Json> =
        packages.iter().filter_map(|package| Some((package["id"].as_str()?, package))).collect();
    let server =
        packages.iter().find(|package| package["name"] == "minerva-server").and_then(|package| package["id"].as_str());
    let used = linked(metadata, server.context("minerva-server is a package")?);
    let mut listed: Vec<_> =
        used.iter().filter_map(|id| by_id.get(id)).filter(|package| !package["source"].is_null()).collect();
    listed.sort_by_key(|package| (package["name"].as_str(), package["version"].as_str()));
    let mut text = "The Rust crates in Minerva's programs, with their licences.\n".to_owned();
    for package in listed {
        let field = |name: &str| package[name].as_str().unwrap_or("unknown");
        write!(text, "\n==== {} {}: {}\n", field("name"), field("version"), field("license"))?;
        if package["license"].is_null() && package["license_file"].is_null() {
            bail!("the crate {} names no licence", field("name"));
        }
        let folder = Path::new(field("manifest_path")).parent().context("a manifest has a folder")?;
        for file in licence_files(folder)? {
            write!(text, "\n{}\n", file.trim_end())?;
        }
    }
    Ok(text)
}

/// The packages that end up in `root`: over normal dependencies, not those of build scripts and tests.
fn linked<'a>(metadata: &'a Json, root: &'a str) -> BTreeSet<&'a str> {
    let nodes = metadata["resolve"]["nodes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut found = BTreeSet::new();
    let mut open = vec![root];
    while let Some(id) = open.pop() {
        if !found.insert(id) {
            continue;
        }
        let node = nodes.iter().find(|node| node["id"] == id);
        let deps = node.and_then(|node| node["deps"].as_array()).map(Vec::as_slice).unwrap_or_default();
        let is_normal = |dep: &&Json| {
            dep["dep_kinds"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind["kind"].is_null()))
        };
        open.extend(deps.iter().filter(is_normal).filter_map(|dep| dep["pkg"].as_str()));
    }
    found
}

/// The texts of `LICENSE-MIT`, `COPYING`, `NOTICE` and the like.
fn licence_files(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_uppercase();
        if path.is_file()
            && ["LICENSE", "LICENCE", "COPYING", "NOTICE", "UNLICENSE"].iter().any(|word| name.starts_with(word))
        {
            paths.push(path);
        }
    }
    paths.sort();
    paths.iter().map(|path| Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn build_and_test_dependencies_are_not_in_the_program() {
        let dep = |pkg: &str, kind: Json| json!({"pkg": pkg, "dep_kinds": [{"kind": kind}]});
        let metadata = json!({"resolve": {"nodes": [
            {"id": "root", "deps": [dep("a", Json::Null), dep("b", json!("build")), dep("c", json!("dev"))]},
            {"id": "a", "deps": [dep("d", Json::Null), dep("root", Json::Null)]},
            {"id": "b", "deps": [dep("e", Json::Null)]},
        ]}});
        assert_eq!(linked(&metadata, "root"), BTreeSet::from(["root", "a", "d"]));
    }
}
