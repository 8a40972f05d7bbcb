//! `minerva tune`: measures the settings that nobody fixed, whatever was found before, and prints what it tried.
//!
//! Its flags are the server's: a server with the same flags then finds the result. Exit codes: 0 with a choice, 1 when the model does
//! not load.

use std::ops::ControlFlow;
use std::process::ExitCode;

use minerva_engine::{Engine, THOROUGH_MS, TuneMode, TuneReport};
use tracing::error;

use crate::config::{Config, Source};
use crate::program::{print, refuse};
use crate::{logging, probing};

/// How long it may take when nobody says: long enough for every comparison on a slow machine.
const DEFAULT_MS: u64 = 60_000;

/// Loads the model, measures, and prints.
pub(crate) fn run(config: &Config, seconds_from: &Source, json: bool) -> ExitCode {
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".to_owned());
    if let Err(problem) = logging::init(Some(&filter), false) {
        return refuse(&problem);
    }
    match measure(config, seconds_from) {
        Ok(report) if json => print(&format!("{:#}\n", serde_json::json!(report))),
        Ok(report) => print(&report.table()),
        Err(problem) => {
            error!("{problem:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(config: &Config, seconds_from: &Source) -> anyhow::Result<TuneReport> {
    let mut engine = config.engine()?;
    engine.tune.mode = TuneMode::Force;
    if *seconds_from == Source::Default {
        engine.tune.budget_ms = DEFAULT_MS.max(THOROUGH_MS);
    }
    engine.probe = probing::config(config);
    if let Some(probe) = &engine.probe {
        probing::probe(probe);
    }
    let engine = Engine::load(engine, |_| ControlFlow::Continue(()))?;
    Ok(engine.info().placement.tuning.clone())
}
