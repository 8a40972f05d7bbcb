//! A recorded schedule runs again as it ran, tells no secrets, and a damaged one is an error.

use std::fs::{self, File};
use std::io::BufReader;

use minerva_engine::scheduler::{ReplayError, replay};
use minerva_engine::{Engine, Request, SimConfig};
use tempfile::NamedTempFile;

use crate::support::{greedy, read, submit, tokens, wait_until_idle};

/// Records a busy little schedule.
fn record() -> NamedTempFile {
    let file = NamedTempFile::new().expect("a file");
    let trace_path = Some(file.path().to_owned());
    let config = SimConfig { n_seq_max: 3, n_batch: 32, step_us: 200, trace_path, ..SimConfig::default() };
    let engine = Engine::simulate(SimConfig { period_tokens: Some(4), ..config });
    let streams: Vec<_> = (0..24)
        .map(|i| {
            let prompt = [tokens(1, 40), tokens(10 + i, 5 + i as usize)].concat();
            let request = Request { client: i % 3, n: 1 + (i % 2) as u32, ..greedy(prompt, 10 + i as u32) };
            submit(&engine, request)
        })
        .collect();
    for (i, events) in streams.into_iter().enumerate() {
        if i % 5 == 4 { drop(events) } else { drop(read(events)) }
    }
    wait_until_idle(&engine);
    drop(engine);
    file
}

#[test]
fn a_recorded_schedule_runs_again_as_it_ran() {
    let file = record();
    let replayed = replay(BufReader::new(File::open(file.path()).expect("opens")), true).expect("runs again");
    assert_eq!(replayed.n_requests, 24);
    assert!(replayed.n_steps > 20 && replayed.text.lines().count() as u64 > replayed.n_steps, "{replayed:?}");
    assert!(replayed.text.contains("starts in ["), "{}", replayed.text);
    assert!(replayed.text.contains(" (first)\n") && replayed.text.contains(" (diverged)\n"), "{}", replayed.text);
}

#[test]
fn another_decision_is_found_and_so_is_a_damaged_line() {
    let file = record();
    let text = fs::read_to_string(file.path()).expect("reads");
    let again = |text: &str| replay(text.as_bytes(), false);
    let other = text.replacen("\"from\":0", "\"from\":1", 1);
    assert!(matches!(again(&other), Err(ReplayError::Differs { .. })));
    assert!(again(&text.replacen("\"seq\":0", "\"seq\":77", 1)).is_err());
    assert!(matches!(again("{\"release\":{\"seq\":0}}"), Err(ReplayError::Order { line: 1 })));
    let lines: Vec<&str> = text.lines().collect();
    assert!(matches!(again(&[lines[0], lines[0]].join("\n")), Err(ReplayError::Order { line: 2 })));
    assert!(matches!(again(&[lines[0], "{}"].join("\n")), Err(ReplayError::Line { line: 2, .. })));
    assert!(matches!(again(&[lines[0], "{\"release\":{\"seq\":3}}"].join("\n")), Err(ReplayError::Sequence { .. })));
    assert_eq!(again("").expect("nothing is no error").n_calls, 0);
}

#[test]
fn no_token_of_a_prompt_is_in_a_trace() {
    let text = fs::read_to_string(record().path()).expect("reads");
    let prompt: Vec<String> = tokens(1, 40).iter().map(ToString::to_string).collect();
    assert!(!text.contains(&prompt.join(",")));
}
