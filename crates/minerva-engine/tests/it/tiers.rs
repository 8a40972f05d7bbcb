//! What falls out of host memory goes to disk and comes back, in this run and in later ones, and nothing that is wrong with a disk is
//! ever part of an answer.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use minerva_engine::scheduler::replay;
use minerva_engine::{
    CacheIsolation, ChatMessage, ClientSecret, DiskCache, Engine, EngineStats, Prompt, Request, SimConfig, SimDisk,
    WarmError, WarmPrompt,
};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::real_model;
use crate::support::{ask, ask_alone, greedy, read, submit, tokens, wait_until, wait_until_idle};

const DISK_BYTES: u64 = 1 << 20;

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

fn cache(dir: &Path) -> DiskCache {
    DiskCache { dir: Some(dir.join("kv")), limit_bytes: DISK_BYTES, clients: Vec::new() }
}

/// Two sequences, host memory for about two prompts of 300 tokens, and a disk for many.
fn config(dir: &Path) -> SimConfig {
    SimConfig {
        n_seq_max: 2,
        us_per_token: 50,
        host_cache_bytes: 2_600,
        disk: Some(SimDisk { cache: cache(dir), ..SimDisk::default() }),
        ..SimConfig::default()
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir.join("kv")).expect("the folder is there");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let mut files: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|end| end == "kv")).collect();
    files.sort();
    files
}

/// Bytes of everything of ours in the folder.
fn bytes_in(dir: &Path) -> u64 {
    files(dir).iter().map(|path| path.metadata().map_or(0, |about| about.len())).sum()
}

fn check_limits(config: &SimConfig, stats: &EngineStats) {
    assert!(stats.host_cache_bytes <= config.host_cache_bytes, "{stats:?}");
    assert!(stats.disk_cache.bytes <= stats.disk_cache.limit_bytes, "{stats:?}");
}

#[test]
fn what_falls_out_of_host_memory_comes_back_from_disk() {
    let dir = folder();
    let config = config(dir.path());
    let engine = Engine::simulate(config.clone());
    for salt in 1..8 {
        ask(&engine, greedy(tokens(salt, 300), 2));
        check_limits(&config, &engine.stats());
    }
    wait_until("it is written", || engine.stats().disk_cache.files >= 4);
    let before = engine.stats();
    let again = ask(&engine, greedy(tokens(1, 300), 2));
    assert_eq!(again.summary().cached_tokens, 299);
    assert_eq!(
        again.choices,
        ask_alone(&SimConfig { disk: None, ..config.clone() }, greedy(tokens(1, 300), 2)).choices
    );
    let stats = engine.stats();
    assert_eq!(stats.disk_cache.hits_total, before.disk_cache.hits_total + 1);
    assert_eq!(stats.prompt_tokens_total, before.prompt_tokens_total + 1, "only the last token was computed");
    check_limits(&config, &stats);
}

#[test]
fn a_prompt_is_there_after_a_restart() {
    let dir = folder();
    let config = config(dir.path());
    let prompt = tokens(1, 400);
    let first = ask(&Engine::simulate(config.clone()), greedy(prompt.clone(), 5));
    assert_eq!(files(dir.path()).len(), 1, "written when the engine ended");
    let engine = Engine::simulate(config.clone());
    assert_eq!(engine.stats().disk_cache.files, 1);
    let second = ask(&engine, greedy(prompt.clone(), 5));
    assert_eq!((second.choices, second.end.map(|end| end.cached_tokens)), (first.choices, Ok(399)));
    assert_eq!(engine.stats().prompt_tokens_total, 1);
    // A longer one of the same conversation takes its place.
    ask(&engine, greedy([prompt, tokens(2, 100)].concat(), 5));
    drop(engine);
    assert_eq!(files(dir.path()).len(), 1);
    let other = Engine::simulate(SimConfig { model_name: "another model".into(), ..config.clone() });
    assert_eq!(ask(&other, greedy(tokens(1, 400), 5)).summary().cached_tokens, 0, "its cells mean something else");
    drop(other);
    assert_eq!(files(dir.path()).len(), 2, "and it leaves them where they are");
}

#[cfg(unix)]
#[test]
fn nobody_else_can_read_what_is_on_disk() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = folder();
    fs::create_dir(dir.path().join("kv")).expect("a folder");
    fs::set_permissions(dir.path().join("kv"), fs::Permissions::from_mode(0o755)).expect("is ours");
    ask(&Engine::simulate(config(dir.path())), greedy(tokens(1, 400), 5));
    let mode = |path: &Path| path.metadata().expect("it is there").permissions().mode() & 0o777;
    assert_eq!(mode(&dir.path().join("kv")), 0o700);
    for name in ["lock", "salt"] {
        assert_eq!(mode(&dir.path().join("kv").join(name)), 0o600, "{name}");
    }
    assert_eq!(files(dir.path()).iter().map(|path| mode(path)).collect::<Vec<_>>(), [0o600]);
}

#[test]
fn damaged_files_are_dropped_and_never_part_of_an_answer() {
    let dir = folder();
    let config = config(dir.path());
    let prompt = tokens(1, 400);
    ask(&Engine::simulate(config.clone()), greedy(prompt.clone(), 5));
    let path = files(dir.path()).remove(0);
    let whole = fs::read(&path).expect("reads");
    let alone = ask_alone(&SimConfig { disk: None, ..config.clone() }, greedy(prompt.clone(), 5));
    let (mid, last) = (whole.len() / 2 + 900, whole.len() - 1);
    let damages: [(&str, Vec<u8>); 7] = [
        ("a flipped byte of the state", flipped(&whole, mid)),
        ("a flipped byte of the checksum", flipped(&whole, last)),
        ("a flipped token", flipped(&whole, 90)),
        ("cut", whole[..mid].to_vec()),
        ("empty", Vec::new()),
        ("too large", [whole.as_slice(), &vec![0; DISK_BYTES as usize]].concat()),
        ("something else", b"%PDF-1.7".repeat(500)),
    ];
    for (what, bytes) in damages {
        for file in files(dir.path()) {
            fs::remove_file(file).expect("goes");
        }
        fs::write(&path, bytes).expect("writes");
        let engine = Engine::simulate(config.clone());
        let answer = ask(&engine, greedy(prompt.clone(), 5));
        assert_eq!((&answer.choices, answer.summary().cached_tokens), (&alone.choices, 0), "{what}");
        let disk = engine.stats().disk_cache;
        let dropped = disk.not_ours_total + disk.length_total + disk.checksum_total + disk.too_large_total;
        assert_eq!((dropped, path.exists()), (1, false), "{what}: {disk:?}");
    }
    // One that changes while the engine runs.
    fs::write(&path, &whole).expect("writes");
    for file in files(dir.path()).into_iter().filter(|file| *file != path) {
        fs::remove_file(file).expect("goes");
    }
    let engine = Engine::simulate(config);
    assert_eq!(engine.stats().disk_cache.files, 1);
    fs::write(&path, flipped(&whole, mid)).expect("writes");
    let answer = ask(&engine, greedy(prompt, 5));
    assert_eq!((answer.choices, engine.stats().disk_cache.checksum_total), (alone.choices, 1));
    assert!(!path.exists());
}

fn flipped(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 0x20;
    bytes
}

#[test]
fn a_second_engine_in_the_same_folder_works_without_it_and_destroys_nothing() {
    let dir = folder();
    let config = config(dir.path());
    let first = Engine::simulate(config.clone());
    let second = Engine::simulate(config.clone());
    assert_eq!(second.stats().disk_cache.limit_bytes, 0);
    for engine in [&first, &second] {
        (1..6).for_each(|salt| drop(ask(engine, greedy(tokens(salt, 300), 2))));
    }
    drop(second);
    wait_until("the first one writes", || first.stats().disk_cache.files >= 2);
    drop(first);
    assert!(ask(&Engine::simulate(config), greedy(tokens(1, 300), 2)).summary().cached_tokens > 0);
}

#[test]
fn a_full_disk_or_no_folder_costs_the_tier_and_nothing_else() {
    let dir = folder();
    let mut config = config(dir.path());
    config.disk.as_mut().expect("it has one").fails_at_write = Some(3);
    let engine = Engine::simulate(config.clone());
    for salt in (1..8).chain(1..8) {
        let request = greedy(tokens(salt, 300), 4);
        assert_eq!(
            ask(&engine, request.clone()).choices,
            ask_alone(&SimConfig { disk: None, ..config.clone() }, request).choices
        );
    }
    let disk = engine.stats().disk_cache;
    assert!(disk.switched_off && disk.written_total <= 2, "{disk:?}");
    drop(engine);
    // A file where the folder should be.
    let blocked = folder();
    fs::write(blocked.path().join("kv"), "").expect("writes");
    let engine = Engine::simulate(self::config(blocked.path()));
    assert_eq!(ask(&engine, greedy(tokens(1, 300), 2)).summary().completion_tokens, 2);
    assert_eq!(engine.stats().disk_cache.limit_bytes, 0);
}

#[test]
fn a_disk_that_hangs_holds_up_nobody() {
    let dir = folder();
    let config = SimConfig { n_seq_max: 3, ..config(dir.path()) };
    (1..4).for_each(|salt| drop(ask(&Engine::simulate(config.clone()), greedy(tokens(salt, 300), 2))));
    let mut slow = config;
    slow.disk.as_mut().expect("it has one").slow_us = 3_000_000;
    let engine = Engine::simulate(SimConfig { step_us: 2_000, ..slow.clone() });
    // What prompts cost is known.
    ask(&engine, greedy(tokens(77, 300), 2));
    let stream = submit(&engine, greedy(tokens(78, 20), 100));
    wait_until("it has begun", || engine.stats().requests_running == 1);
    let began = Instant::now();
    let held = submit(&engine, greedy(tokens(1, 300), 2));
    let other = submit(&engine, greedy(tokens(79, 20), 2));
    assert_eq!(read(other).summary().completion_tokens, 2, "it passes who waits for the disk");
    let steps = engine.stats().steps_total;
    let answer = read(held);
    assert!(began.elapsed() < Duration::from_secs(2), "it waited for the disk");
    assert_eq!(answer.summary().cached_tokens, 0, "its prompt was computed");
    assert!(engine.stats().steps_total >= steps, "steps go on");
    read(stream).summary();
}

#[test]
fn a_disk_that_hangs_holds_up_the_end_for_some_seconds_only() {
    let dir = folder();
    let mut config = config(dir.path());
    config.disk.as_mut().expect("it has one").slow_us = 60_000_000;
    let engine = Engine::simulate(config.clone());
    ask(&engine, greedy(tokens(1, 400), 2));
    let began = Instant::now();
    drop(engine);
    assert!(began.elapsed() < Duration::from_secs(12), "it waited for {:?}", began.elapsed());
    assert!(files(dir.path()).is_empty(), "half a file is none");
    // The thread that hangs has the folder: another engine works without it.
    config.disk.as_mut().expect("it has one").slow_us = 0;
    let engine = Engine::simulate(config);
    assert_eq!(engine.stats().disk_cache.limit_bytes, 0);
    assert_eq!(ask(&engine, greedy(tokens(1, 400), 2)).summary().cached_tokens, 0);
}

#[test]
fn with_isolation_a_prompt_is_there_for_the_same_key_only_whatever_its_number_is_now() {
    let dir = folder();
    let with = |clients: &[(u64, &str)]| {
        let mut config = SimConfig { cache_isolation: CacheIsolation::Key, ..config(dir.path()) };
        let secrets = clients.iter().map(|&(number, key)| (number, ClientSecret::of_api_key(key.as_bytes())));
        config.disk.as_mut().expect("it has one").cache.clients = secrets.collect();
        Engine::simulate(config)
    };
    let from = |client: u64| Request { client, ..greedy(tokens(1, 400), 2) };
    ask(&with(&[(1, "sk-anna"), (2, "sk-ben")]), from(1));
    for path in fs::read_dir(dir.path().join("kv")).expect("the folder").map(|entry| entry.expect("an entry").path()) {
        let bytes = fs::read(&path).unwrap_or_default();
        assert!(!bytes.windows(7).any(|window| window == b"sk-anna"), "{}", path.display());
    }
    let swapped = with(&[(1, "sk-ben"), (2, "sk-anna")]);
    assert_eq!(ask(&swapped, from(1)).summary().cached_tokens, 0, "another key has this number now");
    assert_eq!(ask(&swapped, from(2)).summary().cached_tokens, 399);
    assert_eq!(ask(&swapped, from(3)).summary().cached_tokens, 0, "a client without a name");
    drop(swapped);
    let without = with(&[]);
    assert_eq!(ask(&without, from(1)).summary().cached_tokens, 0);
    assert_eq!(ask(&without, from(0)).summary().cached_tokens, 0);
}

/// What one run of an engine does: prompts by text and length, and who leaves.
type Run = Vec<(u64, usize, Option<usize>)>;

prop_compose! {
    fn run()(
        visits in prop::collection::vec((0_u64..6, 20_usize..200, prop::option::weighted(0.2, 0_usize..8)), 1..14),
    ) -> Run {
        visits
    }
}

proptest! {
    // Each case starts several engines and computes every answer a second time alone.
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 30, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn with_any_faults_each_answer_is_the_cold_one_and_limits_hold(
        runs in prop::collection::vec(run(), 1..4),
        n_seq_max in 1_u32..=3,
        (unified, cannot_cut) in (any::<bool>(), any::<bool>()),
        host_cache_bytes in prop::sample::select(vec![900_u64, 2_000, 1 << 20]),
        limit_bytes in prop::sample::select(vec![2_000_u64, 6_000, 1 << 20]),
        fails_at_write in prop::option::weighted(0.2, 1_u64..8),
        (fails_every_reads, busy_every_reads) in (prop::option::weighted(0.4, 1_u64..4), prop::option::weighted(0.3, 1_u64..4)),
        slow_us in prop::sample::select(vec![0_u64, 0, 300, 5_000]),
        us_per_token in prop::sample::select(vec![0_u64, 20, 60]),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>()), 0..4),
        isolated in any::<bool>(),
    ) {
        let dir = folder();
        let clients = (1..3).map(|number| (number, ClientSecret::of_api_key(&[number as u8]))).collect();
        let cache = DiskCache { limit_bytes, clients, ..cache(dir.path()) };
        let trace = tempfile::NamedTempFile::new().expect("a file");
        let config = SimConfig {
            n_seq_max,
            context_length_tokens: 256,
            unified,
            n_cells: unified.then_some(600),
            cannot_cut,
            host_cache_bytes,
            us_per_token,
            disk: Some(SimDisk { cache, fails_at_write, fails_every_reads, busy_every_reads, slow_us }),
            cache_isolation: if isolated { CacheIsolation::Key } else { CacheIsolation::None },
            trace_path: Some(trace.path().to_owned()),
            ..SimConfig::default()
        };
        let cold = SimConfig { disk: None, trace_path: None, ..config.clone() };
        for visits in runs {
            let engine = Engine::simulate(config.clone());
            let request = |&(text, n, _): &(u64, usize, Option<usize>)| {
                Request { client: 1 + text % 2, ..greedy(tokens(text / 2, n), 4) }
            };
            let streams: Vec<_> = visits.iter().map(|visit| submit(&engine, request(visit))).collect();
            for (visit, mut events) in visits.iter().zip(streams) {
                if let Some(n) = visit.2 {
                    (0..n).for_each(|_| drop(events.blocking_next()));
                    continue;
                }
                prop_assert_eq!(read(events).choices, ask_alone(&cold, request(visit)).choices);
                let stats = engine.stats();
                prop_assert!(stats.host_cache_bytes <= host_cache_bytes, "{:?}", stats);
                prop_assert!(stats.disk_cache.bytes <= limit_bytes, "{:?}", stats);
                prop_assert!(bytes_in(dir.path()) <= limit_bytes);
            }
            wait_until_idle(&engine);
            prop_assert_eq!(engine.stats().failed_total, 0);
            drop(engine);
            let replayed = replay(std::io::BufReader::new(fs::File::open(trace.path()).expect("opens")), false);
            prop_assert!(replayed.is_ok(), "{:?}", replayed);
            let unfinished = fs::read_dir(dir.path().join("kv")).expect("the folder").filter(|entry| {
                entry.as_ref().is_ok_and(|entry| entry.path().extension().is_some_and(|end| end == "tmp"))
            });
            prop_assert_eq!(unfinished.count(), 0);
            let files = files(dir.path());
            for (which, at, cuts) in &flips {
                let Some(path) = (!files.is_empty()).then(|| which.get(&files)) else { break };
                let Ok(mut bytes) = fs::read(path) else { continue };
                let at = at.index(bytes.len().max(1));
                if *cuts { bytes.truncate(at) } else if let Some(byte) = bytes.get_mut(at) { *byte ^= 1 }
                fs::write(path, bytes).expect("writes");
            }
        }
    }
}

fn pinned(salt: u64, n: usize) -> WarmPrompt {
    WarmPrompt { prompt: Prompt::Tokens(tokens(salt, n)), is_pinned: true }
}

#[test]
fn what_is_pinned_stays_and_is_for_everybody_and_a_restart_does_not_compute_it_again() {
    let dir = folder();
    let config = SimConfig { cache_isolation: CacheIsolation::Key, ..config(dir.path()) };
    let engine = Engine::simulate(config.clone());
    let report = engine.warm(&[pinned(1, 300)], |_| ControlFlow::Continue(())).expect("it fits");
    assert_eq!((report.n_tokens, report.n_computed, report.pinned_bytes), (300, 300, 1200));
    for salt in 2..9 {
        ask(&engine, Request { client: salt, ..greedy(tokens(salt, 300), 2) });
        check_limits(&config, &engine.stats());
    }
    for client in 1..4 {
        let prompt = [tokens(1, 300), tokens(90 + client, 5)].concat();
        assert_eq!(ask(&engine, Request { client, ..greedy(prompt, 2) }).summary().cached_tokens, 300, "{client}");
    }
    drop(engine);
    let again = Engine::simulate(config);
    let report = again.warm(&[pinned(1, 300)], |_| ControlFlow::Continue(())).expect("it fits");
    assert_eq!((report.n_tokens, report.n_computed), (300, 1), "the last token has to be computed");
}

#[test]
fn what_cannot_be_warmed_is_said_before_anything_is_computed() {
    let dir = folder();
    let engine = Engine::simulate(config(dir.path()));
    let go = |_| ControlFlow::Continue(());
    let both = engine.warm(&[pinned(1, 400), pinned(2, 300)], go).expect_err("too large").to_string();
    assert_eq!(both, "the pinned prefixes need 2800 bytes of host memory, the limit is 2600 bytes");
    assert_eq!(engine.stats().steps_total, 0);
    let long = [WarmPrompt { is_pinned: false, ..pinned(1, 20) }, WarmPrompt { is_pinned: false, ..pinned(2, 2_000) }];
    let problem = engine.warm(&long, go).expect_err("too long");
    assert!(matches!(problem, WarmError::Prompt { index: 1, .. }) && problem.to_string().contains("1024"), "{problem}");
    let stopped = engine.warm(&[pinned(1, 300)], |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(WarmError::Cancelled)));
}

#[test]
fn on_the_real_model_a_warmed_system_prompt_is_used_by_the_first_request() {
    let engine = real_model::load();
    let system = ChatMessage::system("You answer in one short sentence. ".repeat(20));
    let warm = WarmPrompt { prompt: Prompt::Chat(vec![system.clone()]), is_pinned: true };
    let report = engine.warm(&[warm], |_| ControlFlow::Continue(())).expect("it fits");
    let question = Request::chat([system, ChatMessage::user("What is the capital of France?")]).greedy().max_tokens(12);
    let cold = ask(&engine, Request { cache_prompt: false, ..question.clone() });
    let warm = ask(&engine, question);
    // A text that follows may change how the last token was cut.
    assert!(
        u64::from(warm.summary().cached_tokens) + 1 >= report.n_tokens && report.n_tokens > 100,
        "{report:?} {warm:?}"
    );
    assert_eq!(warm.text(), cold.text());
}

#[test]
fn on_the_real_model_a_long_prompt_is_there_after_a_restart() {
    let dir = folder();
    let load = || {
        let mut config = real_model::config();
        config.disk_cache = Some(DiskCache { limit_bytes: 1 << 30, ..cache(dir.path()) });
        Engine::load(config, |_| std::ops::ControlFlow::Continue(())).expect("the test model loads")
    };
    let text = "The keeper of the lighthouse wrote down the weather every evening. ".repeat(40);
    let request = || Request::text(text.clone() + "One evening he wrote that the").greedy().max_tokens(24);
    let first = ask(&load(), request());
    let n_prompt = first.summary().prompt_tokens;
    assert!(n_prompt > 400 && first.summary().cached_tokens == 0, "{:?}", first.summary());
    let engine = load();
    let second = ask(&engine, request());
    assert_eq!((second.text(), second.summary().cached_tokens), (first.text(), n_prompt - 1));
    let stats = engine.stats();
    assert_eq!((stats.prompt_tokens_total, stats.disk_cache.hits_total), (1, 1), "{stats:?}");
    assert!(stats.disk_cache.bytes <= stats.disk_cache.limit_bytes && stats.disk_cache.bytes > 0, "{stats:?}");
    println!(
        "prompt tokens computed: {n_prompt}, after the restart {}; {} bytes on disk",
        stats.prompt_tokens_total, stats.disk_cache.bytes
    );
}
