//! What can only be seen from outside, or when nothing else runs: threads that are left, memory that engines share, and bytes on
//! stdout and stderr.
//!
//! The ignored tests here are the insides of the others, which run them one by one in a process of their own.

use std::ops::ControlFlow;
use std::process::{Command, Output};

use futures_util::FutureExt;
use minerva_engine::{Engine, EngineConfig, Request, SimConfig};

use crate::real_model;
use crate::support::{ask, greedy, submit, tokens, wait_until};

fn run_alone(test: &str) -> Output {
    let this = std::env::current_exe().expect("a test has an executable");
    let name = format!("own_process::{test}");
    let output = Command::new(this).args(["--exact", &name, "--ignored", "--nocapture"]).output().expect("it runs");
    let printed = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
    output
}

/// The names of this process's threads that are the engine's.
fn engine_threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("Linux lists threads");
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with("minerva")).collect()
}

#[test]
#[cfg(target_os = "linux")]
fn no_thread_is_left_when_the_last_handle_is_gone() {
    run_alone("inside_count_threads");
}

#[test]
#[ignore = "run by no_thread_is_left_when_the_last_handle_is_gone"]
fn inside_count_threads() {
    let config = SimConfig { step_us: 1000, ..SimConfig::default() };
    for _ in 0..10 {
        let engine = Engine::simulate(config.clone());
        wait_until("a new thread has its name", || engine_threads().len() == 2);
        ask(&engine, greedy(tokens(1, 10), 2));
        let unfinished = submit(&engine, greedy(tokens(2, 10), 500));
        let clone = engine.clone();
        drop(engine);
        assert_eq!(engine_threads().len(), 2);
        drop((clone, unfinished));
        // The engine thread has ended when the drop returns, the intake thread follows.
        wait_until("the threads ended", || engine_threads().is_empty());
    }
    // After a shutdown as well, and when it is the intake thread that drops the last handle.
    let engine = Engine::simulate(config.clone());
    engine.shutdown();
    drop(engine);
    wait_until("the threads ended", || engine_threads().is_empty());
    let engine = Engine::simulate(config);
    let _ = engine.generate(greedy(tokens(1, 10), 500)).now_or_never();
    drop(engine);
    wait_until("the threads ended", || engine_threads().is_empty());
}

/// What the test harness itself prints, without the name and the time.
fn stdout_of(test: &str) -> String {
    let output = run_alone(test);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    let stdout = String::from_utf8_lossy(&output.stdout).replace(test, "inside");
    let without_time = |line: &str| line.split(" finished in").next().unwrap_or_default().to_owned() + "\n";
    stdout.lines().map(without_time).collect()
}

#[test]
fn nothing_is_printed_while_a_model_is_loaded_and_generates() {
    assert_eq!(stdout_of("inside_generate"), stdout_of("inside_do_nothing"));
}

#[test]
#[ignore = "run by nothing_is_printed_while_a_model_is_loaded_and_generates"]
fn inside_generate() {
    let engine = real_model::load();
    let answer = ask(&engine, Request::text("The capital of France is").greedy().max_tokens(4));
    assert_eq!(answer.summary().completion_tokens, 4);
    let missing = Engine::load(EngineConfig::new("/no/such/model.gguf"), |_| ControlFlow::Continue(()));
    assert!(missing.is_err());
}

#[test]
#[ignore = "run by nothing_is_printed_while_a_model_is_loaded_and_generates"]
fn inside_do_nothing() {}

#[test]
fn two_models_share_one_limit() {
    run_alone("inside_share_one_limit");
}

/// The engines of other tests hold memory too.
#[test]
#[ignore = "run by two_models_share_one_limit"]
fn inside_share_one_limit() {
    let load = |memory_limit_bytes| {
        let sizes = EngineConfig { n_seq_max: Some(1), context_length_tokens: None, ..real_model::config() };
        Engine::load(EngineConfig { memory_limit_bytes, ..sizes }, |_| ControlFlow::Continue(())).expect("it loads")
    };
    let planned = |engine: &Engine| engine.info().placement.memory.iter().map(|m| m.planned_bytes).sum::<u64>();
    let alone = planned(&load(None));
    let limit_bytes = alone * 9 / 5;
    let first = load(Some(limit_bytes));
    assert_eq!(planned(&first), alone);
    let second = load(Some(limit_bytes));
    assert!(alone + planned(&second) <= limit_bytes, "{alone} + {} > {limit_bytes}", planned(&second));
    let answer = ask(&second, Request::text("The capital of France is").greedy().max_tokens(4));
    assert!(answer.text().contains("Paris"), "{}", answer.text());
    drop((first, second));
    assert_eq!(planned(&load(Some(limit_bytes))), alone, "what the others held is free again");
}
