//! `minerva tune` and what later loads make of it.
//!
//! Needs the default model: `cargo xtask setup` fetches it. What is chosen depends on the machine, so only what must hold on every
//! machine is asserted.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::client::get;
use crate::process::Process;

fn model() -> String {
    std::env::var("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model")
}

/// Small enough for any machine; threads are fixed, because other tests use the cores.
const LOAD: [&str; 8] = ["--gpu=cpu", "-np", "2", "--ctx", "512", "-t", "1", "--no-probe"];

fn minerva(command: &str, args: &[&str], cache: &Path) -> (Option<i32>, String, String) {
    let mut minerva = Command::new(env!("CARGO_BIN_EXE_minerva"));
    let output = minerva.arg(command).args(args).env_clear().env("MINERVA_CACHE_DIR", cache).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_tune_finds_is_shown_planned_with_and_used() {
    let (model, cache) = (model(), tempfile::tempdir().unwrap());
    let load = [&[model.as_str()], &LOAD[..]].concat();
    let (code, json, log) = minerva("tune", &[&load[..], &["--tune-time", "3", "--json"]].concat(), cache.path());
    assert_eq!(code, Some(0), "{log}");
    let report: Value = serde_json::from_str(&json).unwrap();
    assert!(report["settings"].as_str().unwrap().contains("1+1 threads"), "threads are fixed: {report:#}");
    assert!(cache.path().join("tuning.json").is_file());
    if report["is_disturbed"] == true || report["source"] != "measured" {
        println!("skipped: other programs use the cores, so later loads would measure again");
        return;
    }

    let (_, plan, _) = minerva("plan", &[&load[..], &["--json"]].concat(), cache.path());
    let plan: Value = serde_json::from_str(&plan).unwrap();
    assert_eq!((&plan["tuning"]["source"], &plan["tuning"]["settings"]), (&json!("cached"), &report["settings"]));
    let (_, plan, _) = minerva("plan", &load, cache.path());
    assert!(plan.contains("measured at an earlier load"), "{plan}");

    let folder = cache.path().to_str().unwrap();
    let vars = [("MINERVA_CACHE_DIR", folder), ("MINERVA_TUNE", "cached")];
    let server = Process::start(&[&["-m"], &load[..]].concat(), &vars).await;
    let placement = &get(server.address, "/v1/status").await.json()["model"]["placement"];
    assert_eq!(placement["tuning"]["source"], "cached", "{placement:#}");
    assert_eq!(placement["tuning"]["settings"], report["settings"]);
}

#[test]
fn a_table_for_people_has_a_row_for_every_try() {
    let (model, cache) = (model(), tempfile::tempdir().unwrap());
    let args = [&[model.as_str()], &LOAD[..], &["--tune-time", "1"]].concat();
    let (code, table, log) = minerva("tune", &args, cache.path());
    assert!(code == Some(0) && table.contains("chosen: fa "), "{table}\n{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn off_measures_nothing_and_a_damaged_file_is_ignored() {
    let (model, cache) = (model(), tempfile::tempdir().unwrap());
    std::fs::write(cache.path().join("tuning.json"), "{\"a\": [1, 2").unwrap();
    let folder = cache.path().to_str().unwrap();
    let args = [&["-m", model.as_str()], &LOAD[..]].concat();
    let server = Process::start(&args, &[("MINERVA_CACHE_DIR", folder)]).await;
    let placement = &get(server.address, "/v1/status").await.json()["model"]["placement"];
    assert_eq!(
        (&placement["tuning"]["source"], &placement["tuning"]["reason"]),
        (&json!("defaults"), &json!("tuning is off"))
    );
    assert_eq!(std::fs::read_to_string(cache.path().join("tuning.json")).unwrap(), "{\"a\": [1, 2");
    drop(server);
    let (code, _, log) = minerva("plan", &[&[model.as_str()], &LOAD[..]].concat(), cache.path());
    assert_eq!(code, Some(0), "{log}");
}

#[test]
fn other_words_are_refused_and_a_model_that_is_not_there_is_exit_code_1() {
    let cache = tempfile::tempdir().unwrap();
    let (code, _, log) = minerva("tune", &["a.gguf", "--tune", "always"], cache.path());
    assert!(code == Some(2) && log.contains("one of off, cached, force"), "{code:?} {log}");
    let (code, _, log) = minerva("tune", &["/nowhere/at/all.gguf", "--gpu=cpu", "--no-probe"], cache.path());
    assert!(code == Some(1) && !log.is_empty(), "{code:?} {log}");
}
