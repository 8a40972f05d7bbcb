//! Draws `N` tokens with one setting: `sampler_count SETTING N`; without arguments it prints the settings' names.
//!
//! `cargo xtask count` runs it under callgrind with two values of `N`: the difference is what the draws cost.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "the names are its answer")]

use minerva_counts::rows::{history, row};
use minerva_counts::sampler::{Sampler, SamplingParams};

const N_VOCAB: usize = 128_256;

/// Name, parameters, and how many log-probabilities are asked for.
type Setting = (&'static str, SamplingParams, Option<usize>);

fn settings() -> Vec<Setting> {
    let defaults = SamplingParams::default();
    let plain = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..defaults.clone() };
    vec![
        ("defaults", defaults.clone(), None),
        ("greedy", SamplingParams::greedy(), None),
        ("temperature", plain.clone(), None),
        ("top_p", SamplingParams { top_p: 0.95, ..plain.clone() }, None),
        ("top_n_sigma", SamplingParams { top_n_sigma: 1.0, ..plain.clone() }, None),
        ("typical_p", SamplingParams { typical_p: 0.9, ..plain.clone() }, None),
        ("mirostat-2", SamplingParams { mirostat: 2, ..plain }, None),
        ("penalties", SamplingParams { repeat_penalty: 1.1, presence_penalty: 0.2, ..defaults.clone() }, None),
        ("dry", SamplingParams { dry_multiplier: 0.8, dry_penalty_last_n: 1024, ..defaults.clone() }, None),
        ("logprobs", defaults, Some(5)),
    ]
}

fn main() {
    let mut args = std::env::args().skip(1);
    let (Some(name), Some(n)) = (args.next(), args.next().and_then(|n| n.parse::<usize>().ok())) else {
        for (name, ..) in settings() {
            println!("{name}");
        }
        return;
    };
    let Some((_, params, n_logprobs)) = settings().into_iter().find(|setting| setting.0 == name) else {
        println!("no setting is called `{name}`");
        std::process::exit(2);
    };
    let rows: Vec<Vec<f32>> = (0..2).map(|seed| row(N_VOCAB, seed)).collect();
    let mut sampler = Sampler::new(&params, N_VOCAB, 1);
    history().for_each(|token| sampler.accept(token));
    for row in rows.iter().cycle().take(n) {
        if let Ok(sampled) = std::hint::black_box(sampler.sample(row, &[], n_logprobs)) {
            sampler.accept(sampled.token);
        }
    }
}
