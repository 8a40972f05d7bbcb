//! A head for multi-token prediction over llama.cpp, of a small model whose answers and whose head's guesses are known.

use std::ops::ControlFlow;

use minerva_engine::{Engine, EngineConfig, LoadError, Prompt, Request, Speculation, TokenId};
use minerva_gpu::synthetic::{ChainHead, following_in_chain, write_chain};
use tempfile::TempDir;

use crate::real_model::config;
use crate::support::{ask, read, submit};

const MIB: u64 = 1 << 20;

fn chain_model(dir: &TempDir, n_layers: u32, head: ChainHead) -> EngineConfig {
    let path = dir.path().join("chain.gguf");
    write_chain(&path, n_layers, head).expect("written");
    EngineConfig { model_path: path, speculation: Speculation::Draft, ..config() }
}

fn load(config: EngineConfig) -> Result<Engine, LoadError> {
    Engine::load(config, |_| ControlFlow::Continue(()))
}

fn chain(first: TokenId, n: usize) -> Vec<TokenId> {
    let chain = std::iter::successors(Some(first.cast_unsigned()), |&token| Some(following_in_chain(token)));
    chain.take(n).map(u32::cast_signed).collect()
}

fn request(prompt: Vec<TokenId>, n_tokens: u32) -> Request {
    Request { prompt: Prompt::Tokens(prompt), ignore_eos: true, ..Request::default() }.greedy().max_tokens(n_tokens)
}

#[test]
fn a_head_writes_ahead_and_is_right() {
    let dir = tempfile::tempdir().expect("a directory");
    for head in [ChainHead::Token, ChainHead::Hidden] {
        for kv_unified in [false, true] {
            let config = EngineConfig { kv_unified, ..chain_model(&dir, 4, head) };
            let engine = load(config).expect("it loads");
            assert!(engine.info().draft.is_some());
            for first in [20, 90, 201] {
                let whole = chain(first, 40 + 100);
                let answer = ask(&engine, request(whole[..40].to_vec(), 100));
                assert_eq!(answer.choices[0].ids(), whole[40..]);
            }
            let together: Vec<_> = [30, 70].map(|first| (first, submit(&engine, request(chain(first, 9), 60)))).into();
            for (first, events) in together {
                assert_eq!(read(events).choices[0].ids(), chain(first, 69)[9..]);
            }
            let stats = engine.stats();
            assert!(stats.drafted_tokens_total >= 4, "{stats:?}");
            if head == ChainHead::Token {
                assert_eq!(stats.drafted_tokens_total, stats.right_drafts_total, "{stats:?}");
            } else {
                // It goes on from its own hidden state, which says the same once more.
                assert!(stats.right_drafts_total > 0, "{stats:?}");
            }
            assert_eq!((stats.failed_drafts_total, stats.failed_total), (0, 0));
        }
    }
}

#[test]
fn its_memory_is_planned_and_shown() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = EngineConfig { use_mmap: false, ..chain_model(&dir, 4, ChainHead::Token) };
    let without = load(EngineConfig { speculation: Speculation::Off, ..config.clone() }).expect("it loads");
    assert_eq!(without.info().draft, None);
    let with = load(config).expect("it loads");
    let (main, head) = (with.info(), with.info().draft.as_ref().expect("a head"));
    let main = main.placement.memory.last().expect("the host");
    let head = head.memory.last().expect("the host");
    let all = |memory: &minerva_engine::DeviceMemory| memory.weights_bytes + memory.kv_bytes + memory.compute_bytes;
    // llama.cpp counts the head's weights with the model's.
    let (planned, real) = (main.planned_bytes + head.planned_bytes, all(main) + all(head));
    assert!(planned.abs_diff(real) <= MIB, "planned {planned}, really {real}: {main:?} {head:?}");
    assert!(head.kv_bytes > 0 && head.compute_bytes > 0, "{head:?}");
    let more = main.weights_bytes - without.info().placement.memory.last().expect("the host").weights_bytes;
    assert!(more.abs_diff(with.info().draft.as_ref().map_or(0, |draft| draft.size_bytes)) < MIB / 4, "{more}");
}

#[test]
fn where_nobody_can_write_ahead_that_is_an_error_if_it_was_asked_for() {
    let no_head = EngineConfig { speculation: Speculation::Draft, ..config() };
    let problem = load(no_head).expect_err("nobody is there").to_string();
    assert!(problem.contains("`speculation` is `draft`") && problem.contains("no head"), "{problem}");
    assert_eq!(load(EngineConfig { speculation: Speculation::Auto, ..config() }).expect("it loads").info().draft, None);
}
