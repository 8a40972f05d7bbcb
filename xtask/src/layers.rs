//! `cargo xtask layers`: every dependency between our crates points down, and each foreign crate stays in its layer.
//!
//! The declared dependencies of `cargo metadata` are read, so optional, build, dev and other platforms' ones count too.

use std::collections::BTreeSet;

use anyhow::{Context as _, bail};
use serde::Deserialize;

use crate::workspace;

/// Our crates from the lowest layer to the highest.
const LAYERS: [&str; 4] = ["minerva-gpu", "minerva-llama", "minerva-engine", "minerva-server"];

/// Members above all layers: they may use any of our crates, and no crate may use them.
const ABOVE: [&str; 4] = ["xtask", "minerva-examples", "minerva-benches", "minerva-counts"];

/// Foreign crates that belong to one layer: (crate, its only user, why).
const RESERVED: [(&str, &str, &str); 4] = [
    ("llama-cpp-sys-2", "minerva-llama", "the only crate that touches llama.cpp"),
    ("hyper", "minerva-server", "the only crate that knows HTTP"),
    ("hyper-util", "minerva-server", "the only crate that knows HTTP"),
    ("http-body-util", "minerva-server", "the only crate that knows HTTP"),
];

/// No options: the rules are in the code.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// The part of `cargo metadata --no-deps` that we read: `packages` are the workspace's members.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// `None` for a normal dependency, else `build` or `dev`.
    kind: Option<String>,
}

/// Prints how many edges were checked.
///
/// # Errors
/// One line per edge that breaks a rule.
pub(crate) fn run(_args: &Args) -> anyhow::Result<()> {
    let json = workspace::capture(workspace::cargo().args(["metadata", "--no-deps", "--format-version=1"]))?;
    let metadata: Metadata = serde_json::from_str(&json).context("cannot read `cargo metadata`")?;
    let faults = faults(&metadata);
    if !faults.is_empty() {
        bail!("the layers are {}\n{}", LAYERS.map(|l| &l[8..]).join(" < "), faults.join("\n"));
    }
    let edges: usize = metadata.packages.iter().map(|package| package.dependencies.len()).sum();
    println!("layers: {edges} dependencies of {} members are in order", metadata.packages.len());
    Ok(())
}

/// One sentence per edge that points upward or leaves its layer.
fn faults(metadata: &Metadata) -> Vec<String> {
    let members: BTreeSet<&str> = metadata.packages.iter().map(|p| p.name.as_str()).collect();
    let mut faults = Vec::new();
    for package in &metadata.packages {
        let from = package.name.as_str();
        if rank(from).is_none() {
            faults.push(format!("{from} has no layer: give it one in xtask/src/layers.rs"));
        }
        for dependency in &package.dependencies {
            let to = dependency.name.as_str();
            let edge = match &dependency.kind {
                None => format!("{from} -> {to}"),
                Some(kind) => format!("{from} -> {to} ({kind}-dependency)"),
            };
            if members.contains(to) && !points_down(from, to) {
                faults.push(format!("{edge}: points upward"));
            }
            if let Some((_, owner, why)) = RESERVED.iter().find(|(name, ..)| *name == to) {
                // Benches may load a server over HTTP; llama.cpp has one way in, for them too.
                let free = ABOVE.contains(&from) && to != "llama-cpp-sys-2";
                if from != *owner && !free {
                    faults.push(format!("{edge}: {owner} is {why}"));
                }
            }
        }
    }
    faults
}

/// A member's height; members of [`ABOVE`] share the highest. `None` for a crate without a layer.
fn rank(name: &str) -> Option<usize> {
    let above = ABOVE.contains(&name).then_some(LAYERS.len());
    LAYERS.iter().position(|layer| *layer == name).or(above)
}

/// Whether a dependency of `from` on `to` keeps the order. A crate may name itself, for dev-dependencies with features.
fn points_down(from: &str, to: &str) -> bool {
    match (rank(from), rank(to)) {
        (Some(from_rank), Some(to_rank)) => to_rank < from_rank || from == to,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `edges` of `(from, kind, to)` as `cargo metadata` would print them.
    fn metadata(edges: &[(&str, Option<&str>, &str)]) -> Metadata {
        let members = LAYERS.iter().chain(&ABOVE).copied();
        let extra = edges.iter().map(|(from, ..)| *from).filter(|f| rank(f).is_none());
        let packages: Vec<_> = members
            .chain(extra)
            .map(|name| {
                let dependencies: Vec<_> = edges
                    .iter()
                    .filter(|(from, ..)| *from == name)
                    .map(|(_, kind, to)| serde_json::json!({ "name": to, "kind": kind, "req": "*" }))
                    .collect();
                serde_json::json!({ "name": name, "dependencies": dependencies })
            })
            .collect();
        serde_json::from_value(serde_json::json!({ "packages": packages })).expect("the fixture")
    }

    #[test]
    fn edges_that_point_down_pass() {
        let downward = metadata(&[
            ("minerva-server", None, "minerva-engine"),
            ("minerva-server", None, "minerva-gpu"),
            ("minerva-server", None, "hyper"),
            ("minerva-engine", None, "minerva-llama"),
            ("minerva-llama", None, "llama-cpp-sys-2"),
            ("minerva-benches", None, "minerva-llama"),
            ("minerva-benches", None, "hyper"),
            ("xtask", Some("dev"), "minerva-server"),
            ("minerva-gpu", None, "serde"),
        ]);
        assert_eq!(faults(&downward), Vec::<String>::new());
    }

    #[test]
    fn an_upward_edge_is_named_with_its_kind() {
        let upward =
            metadata(&[("minerva-gpu", None, "minerva-llama"), ("minerva-engine", Some("dev"), "minerva-server")]);
        let expected = [
            "minerva-gpu -> minerva-llama: points upward",
            "minerva-engine -> minerva-server (dev-dependency): points upward",
        ];
        assert_eq!(faults(&upward), expected);
    }

    #[test]
    fn nothing_may_depend_on_what_stands_above_the_layers() {
        let found = faults(&metadata(&[
            ("minerva-server", Some("dev"), "minerva-benches"),
            ("minerva-examples", None, "minerva-benches"),
        ]));
        assert_eq!(found.len(), 2, "{found:?}");
    }

    #[test]
    fn foreign_crates_stay_in_their_layer() {
        let found = faults(&metadata(&[
            ("minerva-engine", None, "hyper"),
            ("minerva-engine", Some("build"), "llama-cpp-sys-2"),
            ("minerva-benches", None, "llama-cpp-sys-2"),
        ]));
        assert_eq!(found.len(), 3, "{found:?}");
        assert_eq!(found[0], "minerva-engine -> hyper: minerva-server is the only crate that knows HTTP");
    }

    #[test]
    fn a_new_crate_needs_a_layer() {
        let found = faults(&metadata(&[("minerva-new", None, "minerva-gpu")]));
        assert!(found[0].starts_with("minerva-new has no layer"), "{found:?}");
    }
}
