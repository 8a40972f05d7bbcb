//! Memory that cannot be cut, on llama.cpp: what is taken up from a checkpoint goes on as if it had been computed.
//!
//! The models are tiny and their weights random, so texts say nothing; but each score depends on every token before it.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use minerva_gpu::gguf::{Array, FileBuilder, GgmlType, Header, Value};
use minerva_llama::{Context, ContextParams, FlashAttention, KvType, Model, ModelParams};

use super::backend::LlamaBackend;
use super::claims::Claim;
use crate::backend::{Backend, Loaded, Row};
use crate::event::{Event, Summary};
use crate::request::{Prompt, Request, TokenId};
use crate::{Engine, SimConfig, sim};

const N_VOCAB: u64 = 259;
const N_EMBD: u64 = 64;
const N_FF: u64 = 96;
const N_LAYERS: u32 = 4;
const WINDOW_TOKENS: u32 = 32;

/// The keys and tensors that all of them have.
fn tiny(architecture: &str) -> FileBuilder {
    let mut file = FileBuilder::new();
    file.set("general.architecture", architecture.to_owned());
    file.set("tokenizer.ggml.model", "no_vocab".to_owned());
    let key = |name: &str| format!("{architecture}.{name}");
    file.set(&key("vocab_size"), N_VOCAB as u32);
    file.set(&key("block_count"), N_LAYERS);
    file.set(&key("embedding_length"), N_EMBD as u32);
    file.set(&key("context_length"), 4096_u32);
    file.set(&key("attention.layer_norm_rms_epsilon"), 1e-5_f32);
    file.add_tensor("token_embd.weight", GgmlType::F32, &[N_EMBD, N_VOCAB]);
    file.add_tensor("output.weight", GgmlType::F32, &[N_EMBD, N_VOCAB]);
    file.add_tensor("output_norm.weight", GgmlType::F32, &[N_EMBD]);
    file
}

fn add(file: &mut FileBuilder, layer: u32, tensors: &[(&str, &[u64])]) {
    for (name, dims) in tensors {
        file.add_tensor(&format!("blk.{layer}.{name}"), GgmlType::F32, dims);
    }
}

fn scan_keys(file: &mut FileBuilder, architecture: &str) {
    let sizes = [("conv_kernel", 4_u32), ("inner_size", 128), ("state_size", 16), ("time_step_rank", 8)];
    for (name, size) in sizes {
        file.set(&format!("{architecture}.ssm.{name}"), size);
    }
}

const SCAN: [(&str, &[u64]); 10] = [
    ("attn_norm.weight", &[N_EMBD]),
    ("ssm_in.weight", &[N_EMBD, 256]),
    ("ssm_conv1d.weight", &[4, 128]),
    ("ssm_conv1d.bias", &[128]),
    ("ssm_x.weight", &[128, 40]),
    ("ssm_dt.weight", &[8, 128]),
    ("ssm_dt.bias", &[128]),
    ("ssm_a", &[16, 128]),
    ("ssm_d", &[128]),
    ("ssm_out.weight", &[128, N_EMBD]),
];

const SCAN_NORMS: [(&str, &[u64]); 3] =
    [("ssm_dt_norm.weight", &[8]), ("ssm_b_norm.weight", &[16]), ("ssm_c_norm.weight", &[16])];

const ATTENTION: [(&str, &[u64]); 4] = [
    ("attn_q.weight", &[N_EMBD, 64]),
    ("attn_k.weight", &[N_EMBD, 32]),
    ("attn_v.weight", &[N_EMBD, 32]),
    ("attn_output.weight", &[64, N_EMBD]),
];

const FEED_FORWARD: [(&str, &[u64]); 4] = [
    ("ffn_norm.weight", &[N_EMBD]),
    ("ffn_gate.weight", &[N_EMBD, N_FF]),
    ("ffn_up.weight", &[N_EMBD, N_FF]),
    ("ffn_down.weight", &[N_FF, N_EMBD]),
];

/// A state and nothing else.
fn mamba() -> FileBuilder {
    let mut file = tiny("mamba");
    scan_keys(&mut file, "mamba");
    file.set("mamba.feed_forward_length", 0_u32).set("mamba.attention.head_count", 0_u32);
    (0..N_LAYERS).for_each(|layer| add(&mut file, layer, &SCAN));
    file
}

/// Cells in every other layer, a state in the rest.
fn jamba() -> FileBuilder {
    let mut file = tiny("jamba");
    scan_keys(&mut file, "jamba");
    file.set("jamba.feed_forward_length", N_FF as u32).set("jamba.attention.head_count", 4_u32);
    let n_kv_heads = (0..N_LAYERS).map(|layer| if layer % 2 == 1 { 2 } else { 0 });
    file.set("jamba.attention.head_count_kv", Value::Array(Array::U32(n_kv_heads.collect())));
    for layer in 0..N_LAYERS {
        if layer % 2 == 1 {
            add(&mut file, layer, &[("attn_norm.weight", &[N_EMBD])]);
            add(&mut file, layer, &ATTENTION);
        } else {
            add(&mut file, layer, &SCAN);
            add(&mut file, layer, &SCAN_NORMS);
        }
        add(&mut file, layer, &FEED_FORWARD);
    }
    file
}

/// A window in every other layer.
fn gemma() -> FileBuilder {
    let mut file = tiny("gemma3");
    let keys = [
        ("feed_forward_length", N_FF as u32),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 16),
        ("attention.value_length", 16),
        ("attention.sliding_window", WINDOW_TOKENS),
        ("attention.sliding_window_pattern", 2),
    ];
    for (name, value) in keys {
        file.set(&format!("gemma3.{name}"), value);
    }
    file.set("gemma3.rope.freq_base", 10_000.0_f32);
    let norms: [(&str, &[u64]); 5] = [
        ("attn_norm.weight", &[N_EMBD]),
        ("attn_q_norm.weight", &[16]),
        ("attn_k_norm.weight", &[16]),
        ("post_attention_norm.weight", &[N_EMBD]),
        ("post_ffw_norm.weight", &[N_EMBD]),
    ];
    for layer in 0..N_LAYERS {
        add(&mut file, layer, &norms);
        add(&mut file, layer, &ATTENTION);
        add(&mut file, layer, &FEED_FORWARD);
    }
    file
}

fn write(file: &FileBuilder, path: &Path) {
    file.write_random(path, 7, &mut |_| {}).expect("written");
    // A state that fades, because what grows is soon not a number, and that matters.
    change(path, "ssm_a", |_| -0.05);
    change(path, "ssm_x.weight", |weight| 20.0 * weight);
    change(path, "ssm_conv1d.weight", |weight| 20.0 * weight);
}

/// Changes the weights of the tensors with a name that ends so.
fn change(path: &Path, suffix: &str, new: impl Fn(f32) -> f32) {
    let header = Header::open(path).expect("a header");
    let mut bytes = fs::read(path).expect("reads");
    for tensor in header.tensors.iter().filter(|tensor| tensor.name.ends_with(suffix)) {
        let at = (header.data_offset + tensor.offset) as usize;
        let (weights, _) = bytes[at..at + tensor.bytes as usize].as_chunks_mut();
        for weight in weights {
            *weight = new(f32::from_le_bytes(*weight)).to_le_bytes();
        }
    }
    fs::write(path, bytes).expect("written");
}

struct Setup {
    n_seq_max: u32,
    unified: bool,
    max_checkpoints: u32,
}

impl Setup {
    fn params(&self) -> ContextParams {
        ContextParams {
            n_ctx: 512 * self.n_seq_max,
            n_batch: 512,
            n_ubatch: 64,
            n_seq_max: self.n_seq_max,
            kv_unified: self.unified,
            full_windows: false,
            // Full precision, so that another order of additions is all that may differ.
            flash_attention: FlashAttention::Off,
            type_k: KvType::F32,
            type_v: KvType::F32,
            ..ContextParams::default()
        }
    }
}

fn engine(model: &Arc<Model>, setup: &Setup) -> Engine {
    let context = Context::new(model, &setup.params()).expect("a context");
    let claim = Claim::unless(Vec::new(), |_| None::<()>).expect("nothing is claimed");
    let mut backend = LlamaBackend::new(context, claim);
    backend.warm_up();
    backend.warm_up_fully().expect("a full batch");
    let config =
        SimConfig { host_cache_bytes: 64 << 20, max_checkpoints: setup.max_checkpoints, ..SimConfig::default() };
    let serving = config.serving();
    let limits = backend.limits();
    assert!(!limits.keeps_beginnings && limits.n_vocab == N_VOCAB as usize, "{limits:?}");
    let (simulated, info) = sim::load(config);
    let loaded = Loaded { backend: Box::new(backend), tokenizer: simulated.tokenizer, drafter: None };
    Engine::start(loaded, info, serving, None).expect("the system can start a thread")
}

/// Tokens and their log-probabilities.
type Said = Vec<(TokenId, f32)>;

fn request(prompt: &[TokenId]) -> Request {
    let prompt = Prompt::Tokens(prompt.to_vec());
    let request = Request { prompt, ignore_eos: true, logprobs: Some(0), ..Request::default() };
    request.greedy().max_tokens(24)
}

fn ask(engine: &Engine, prompts: &[Vec<TokenId>]) -> Vec<(Said, Summary)> {
    let streams: Vec<_> =
        prompts.iter().map(|prompt| engine.generate_blocking(request(prompt)).expect("accepted")).collect();
    streams
        .into_iter()
        .map(|mut events| {
            let mut said = Said::new();
            loop {
                match events.blocking_next().expect("a last event") {
                    Event::Delta(delta) => {
                        said.extend(delta.tokens.iter().map(|token| (token.id, token.logprob.expect("asked for"))));
                    }
                    Event::Queued { .. } | Event::Started | Event::Finished { .. } => {}
                    Event::Done(summary) => return (said, summary),
                    Event::Failed(error) => panic!("{error}"),
                }
            }
        })
        .collect()
}

/// Log-probabilities of the same text differ by less. The order of additions alone, without any reuse, makes 0.00009 with these models,
/// and one wrong token in the past at least 0.002; with a cache of 16 bits the first is as large as the second.
const MOST_APART: f32 = 4e-4;

/// The same tokens, and as likely.
fn is_same(one: &Said, other: &Said) -> bool {
    distance(one, other) < MOST_APART
}

/// The largest difference of two log-probabilities; endless where the tokens differ.
fn distance(one: &Said, other: &Said) -> f32 {
    if one.len() != other.len() || one.iter().zip(other).any(|(a, b)| a.0 != b.0) {
        return f32::INFINITY;
    }
    one.iter().zip(other).map(|(a, b)| (a.1 - b.1).abs()).fold(0.0, f32::max)
}

fn text(salt: usize, n: usize) -> Vec<TokenId> {
    (0..n).map(|i| ((i * i * 7 + i * 13 + salt * 101 + (i * salt) % 17) % 256) as TokenId).collect()
}

fn check(name: &str, file: &FileBuilder) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join(format!("{name}.gguf"));
    write(file, &path);
    let params = ModelParams::default();
    let model = Model::load(&path, &params, &mut |_| ControlFlow::Continue(())).expect("loads");
    let cold = |prompt: &Vec<TokenId>| {
        let engine = engine(&model, &Setup { n_seq_max: 1, unified: false, max_checkpoints: 0 });
        ask(&engine, std::slice::from_ref(prompt)).remove(0).0
    };
    // One wrong token is seen wherever it is: otherwise nothing below would prove anything.
    let sound = text(1, 150);
    for n_back in [1, 5, 12, 28, 40, 100] {
        let mut wrong = sound.clone();
        wrong[149 - n_back] = (wrong[149 - n_back] + 1) % 256;
        let apart = (cold(&sound)[0].1 - cold(&wrong)[0].1).abs();
        assert!(apart > 2.0 * MOST_APART, "{name}: a wrong token {n_back} before the end moves the next by {apart}");
    }

    for (n_seq_max, unified) in [(1, false), (3, false), (3, true)] {
        let what = format!("{name}, {n_seq_max} sequences, unified {unified}");
        let engine = engine(&model, &Setup { n_seq_max, unified, max_checkpoints: 32 });
        // The next turn has its last prompt but for the last tokens, and something else for the answer.
        let mut prompt = text(1, 150);
        for turn in 0..4 {
            let (said, summary) = ask(&engine, std::slice::from_ref(&prompt)).remove(0);
            assert!(is_same(&said, &cold(&prompt)), "{what}, turn {turn}");
            let least = if turn == 0 { 0 } else { prompt.len() as u32 - 40 - 2 - 8 };
            assert!(summary.cached_tokens >= least, "{what}, turn {turn}: {summary:?}");
            prompt.truncate(prompt.len() - 2);
            prompt.extend(text(10 + turn, 42));
        }
        // The beginning of others, at once and later.
        let burst: Vec<_> = (0..3).map(|i| [text(2, 200), text(20 + i, 30)].concat()).collect();
        for (prompt, (said, _)) in burst.iter().zip(ask(&engine, &burst)) {
            let apart = distance(&said, &cold(prompt));
            assert!(apart < MOST_APART, "{what}, in a burst: {apart}");
        }
        let later = [text(2, 200), text(30, 30)].concat();
        let (said, summary) = ask(&engine, std::slice::from_ref(&later)).remove(0);
        assert!(is_same(&said, &cold(&later)), "{what}, later");
        assert_eq!(summary.cached_tokens, 200, "{what}");
        let stats = engine.stats();
        assert!(stats.checkpoints_taken_total >= 5 && stats.checkpoints_restored_total >= 4, "{what}: {stats:?}");
        assert!(stats.checkpoint_bytes > 0 && stats.host_cache_bytes <= 64 << 20, "{what}: {stats:?}");
        // 4 turns of 150 and 40 more each, the burst, and who came later; once each, and a few tokens more. The second of a burst may
        // come when the first has gone on: then it computes all of it, and stops where they separate.
        let most = 150 + 3 * (40 + 2 + 8) + 2 * 230 + 2 * 30;
        assert!(stats.prompt_tokens_total <= most, "{what}: {stats:?}");
    }
}

#[test]
fn a_recurrent_model_goes_on_from_its_checkpoints() {
    check("mamba", &mamba());
}

#[test]
fn a_hybrid_model_goes_on_from_its_checkpoints() {
    check("jamba", &jamba());
}

#[test]
fn a_model_with_a_sliding_window_goes_on_from_its_checkpoints() {
    check("gemma3", &gemma());
}

/// Scores after the last of these rows of a sequence, and after the first.
fn step(backend: &mut LlamaBackend, tokens: &[TokenId], begin: usize, end: usize) -> [Vec<f32>; 2] {
    let output = |pos: usize| pos == begin || pos + 1 == end;
    let rows = (begin..end).map(|pos| Row { seq: 0, token: tokens[pos], pos: pos as u32, output: output(pos) });
    backend.decode(&rows.collect::<Vec<_>>()).expect("computes");
    [0, end - begin - 1].map(|row| backend.logits(row).expect("an output").to_vec())
}

#[test]
fn a_step_of_several_physical_batches_attends_to_all_of_its_window() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("gemma.gguf");
    write(&gemma(), &path);
    let model = Model::load(&path, &ModelParams::default(), &mut |_| ControlFlow::Continue(())).expect("loads");
    let backend = |kv_unified| {
        let setup = Setup { n_seq_max: 1, unified: kv_unified, max_checkpoints: 0 };
        LlamaBackend::new(Context::new(&model, &setup.params()).expect("a context"), Claim::nothing())
    };
    // More than the windowed layers have cells for, so that they go round.
    let tokens: Vec<TokenId> = (0..500).map(|n| (n * 7 + n / 5) % N_VOCAB as TokenId).collect();
    let (restored, end) = (270, 500);
    for kv_unified in [false, true] {
        let pieces = |backend: &mut LlamaBackend, from: usize, to: usize| -> Vec<[Vec<f32>; 2]> {
            (from..to).step_by(64).map(|begin| step(backend, &tokens, begin, (begin + 64).min(to))).collect()
        };
        let mut steady = backend(kv_unified);
        pieces(&mut steady, 0, restored);
        let mut other = backend(kv_unified);
        pieces(&mut other, 0, restored);
        let state = other.save(0).expect("saved");
        assert!(other.restore(0, &state));
        let as_wanted = pieces(&mut steady, restored, end);
        let [first, last] = step(&mut other, &tokens, restored, end);
        for (scores, wanted) in [(first, &as_wanted[0][0]), (last, &as_wanted[as_wanted.len() - 1][1])] {
            let off = scores.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0_f32, f32::max);
            assert!(off < 1e-3, "unified {kv_unified}: scores are off by {off}");
        }
    }
}
