//! Memory that cannot be cut: what is reused all the same, and that nobody can tell by the text.

use std::fs::File;
use std::io::BufReader;

use minerva_engine::scheduler::replay;
use minerva_engine::{ChatMessage, Engine, Request, SimConfig, SimMemory};
use tempfile::NamedTempFile;

use crate::support::{ask, ask_alone, greedy, read, submit, tokens, wait_until_idle};

const MEMORIES: [SimMemory; 3] = [SimMemory::Recurrent, SimMemory::Hybrid, SimMemory::Window(32)];

/// Tokens of the end of a prompt that the next turn computes again.
const TAIL_TOKENS: u32 = 8;

fn config(memory: SimMemory) -> SimConfig {
    SimConfig { memory, ..SimConfig::default() }
}

#[test]
fn ten_turns_of_a_conversation_compute_what_is_new_and_a_few_tokens_more() {
    for memory in MEMORIES {
        for n_seq_max in [1, 3] {
            let config = SimConfig { n_seq_max, ..config(memory) };
            let engine = Engine::simulate(config.clone());
            let mut messages = vec![ChatMessage::system("you answer in letters ".repeat(6))];
            let mut n_before = None;
            for turn in 0..10 {
                messages.push(ChatMessage::user(format!("and what about {turn}?")));
                let request = Request::chat(messages.clone()).greedy();
                let answer = ask(&engine, request.clone());
                assert_eq!(answer.choices, ask_alone(&config, request).choices);
                let summary = answer.summary();
                if let Some(n_before) = n_before {
                    let n_new = summary.prompt_tokens - n_before;
                    let n_computed = summary.prompt_tokens - summary.cached_tokens;
                    assert!(n_computed <= n_new + TAIL_TOKENS, "{memory:?}, turn {turn}: {summary:?}");
                }
                n_before = Some(summary.prompt_tokens);
                messages.push(ChatMessage::new("assistant", answer.text()));
            }
            let stats = engine.stats();
            assert!(stats.checkpoints_taken_total >= 10 && stats.checkpoints_restored_total >= 9, "{stats:?}");
            assert!(stats.checkpoint_bytes > 0 && stats.checkpoint_bytes <= stats.host_cache_bytes, "{stats:?}");
        }
    }
}

#[test]
fn a_burst_with_a_common_beginning_computes_it_once_and_so_does_who_comes_later() {
    for memory in MEMORIES {
        let config = SimConfig { n_seq_max: 8, step_us: 500, n_batch: 64, ..config(memory) };
        let engine = Engine::simulate(config.clone());
        let request = |salt| greedy([tokens(1, 400), tokens(salt, 20)].concat(), 12);
        // The first is still in its prompt when the others come.
        let streams: Vec<_> = (10..18).map(|salt| submit(&engine, request(salt))).collect();
        for (salt, events) in (10..).zip(streams) {
            assert_eq!(read(events).choices, ask_alone(&config, request(salt)).choices, "{memory:?}");
        }
        wait_until_idle(&engine);
        // Own parts may have their first letters in common.
        let n_computed = engine.stats().prompt_tokens_total;
        assert!((400 + 8 * 16..=400 + 8 * 20).contains(&n_computed), "{memory:?}: {n_computed}");
        let later = ask(&engine, request(99));
        assert_eq!(later.choices, ask_alone(&config, request(99)).choices);
        assert!(later.summary().cached_tokens >= 400, "{memory:?}: {:?}", later.summary());
    }
}

#[test]
fn a_client_never_goes_on_from_a_checkpoint_of_another_when_they_are_apart() {
    for memory in MEMORIES {
        let isolated = SimConfig { cache_isolation: minerva_engine::CacheIsolation::Key, ..config(memory) };
        let engine = Engine::simulate(isolated);
        let request = |client, salt| {
            let prompt = [tokens(1, 300), tokens(salt, 20)].concat();
            Request { client, ..greedy(prompt, 4) }
        };
        ask(&engine, request(1, 10));
        ask(&engine, request(1, 11));
        assert_eq!(ask(&engine, request(2, 12)).summary().cached_tokens, 0, "{memory:?}");
        assert_eq!(ask(&engine, request(1, 13)).summary().cached_tokens, 300, "{memory:?}");
    }
}

#[test]
fn a_schedule_with_checkpoints_runs_again_as_it_ran() {
    for memory in MEMORIES {
        let file = NamedTempFile::new().expect("a file");
        let trace_path = Some(file.path().to_owned());
        let config = SimConfig { n_batch: 32, step_us: 100, n_seq_max: 3, trace_path, ..config(memory) };
        let engine = Engine::simulate(config);
        let requests = (0..16).map(|i| greedy([tokens(1, 90), tokens(10 + i % 5, 40)].concat(), 6));
        let streams: Vec<_> = requests.map(|request| submit(&engine, request)).collect();
        for events in streams {
            drop(read(events));
        }
        wait_until_idle(&engine);
        assert!(engine.stats().checkpoints_taken_total > 0);
        drop(engine);
        let replayed = replay(BufReader::new(File::open(file.path()).expect("opens")), false);
        assert_eq!(replayed.expect("runs again").n_requests, 16);
    }
}
