//! Our sampler against llama.cpp's own, in one process: the same tokens left with the same probabilities, and the same draws.

use std::ops::ControlFlow;
use std::path::PathBuf;

use minerva_llama::{ChainStage, Model, ModelParams, SamplerChain};

use super::*;
use crate::backend::{RenderedChat, Tokenizer};
use crate::breakers::BreakerCache;
use crate::error::RequestError;
use crate::request::ChatMessage;

const SEED: u32 = 7;

/// The chain that llama-server makes of `params`, without the draw at its end unless the draw is Mirostat's or adaptive-p's.
fn chain(params: &SamplingParams, n_vocab: usize) -> SamplerChain {
    let mut chain = SamplerChain::new();
    if !params.logit_bias.is_empty() {
        chain.push(&ChainStage::LogitBias { n_vocab, bias: &params.logit_bias });
    }
    let (tau, eta, temperature) = (params.mirostat_tau, params.mirostat_eta, params.temperature);
    if params.mirostat != 0 {
        chain.push(&ChainStage::Temperature { temperature, range: 0.0, exponent: 1.0 });
        chain.push(&match params.mirostat {
            1 => ChainStage::Mirostat { n_vocab, seed: SEED, tau, eta },
            _ => ChainStage::MirostatV2 { seed: SEED, tau, eta },
        });
        return chain;
    }
    let min_keep = params.min_keep as usize;
    for stage in &params.samplers {
        chain.push(&match stage {
            SamplerStage::Penalties => ChainStage::Penalties {
                n_vocab,
                last_n: params.repeat_last_n,
                repeat: params.repeat_penalty,
                frequency: params.frequency_penalty,
                presence: params.presence_penalty,
            },
            SamplerStage::Dry => ChainStage::Dry {
                model: None,
                multiplier: params.dry_multiplier,
                base: params.dry_base,
                allowed_length: params.dry_allowed_length,
                last_n: params.dry_penalty_last_n,
                breakers: &[],
            },
            SamplerStage::TopNSigma => ChainStage::TopNSigma(params.top_n_sigma),
            SamplerStage::TopK => ChainStage::TopK(params.top_k),
            SamplerStage::TypicalP => ChainStage::TypicalP { p: params.typical_p, min_keep },
            SamplerStage::TopP => ChainStage::TopP { p: params.top_p, min_keep },
            SamplerStage::MinP => ChainStage::MinP { p: params.min_p, min_keep },
            SamplerStage::Xtc => ChainStage::Xtc {
                probability: params.xtc_probability,
                threshold: params.xtc_threshold,
                min_keep,
                seed: SEED,
            },
            SamplerStage::Temperature => ChainStage::Temperature {
                temperature,
                range: params.dynatemp_range,
                exponent: params.dynatemp_exponent,
            },
            SamplerStage::AdaptiveP => continue,
        });
    }
    if params.samplers.contains(&SamplerStage::AdaptiveP) {
        let (target, decay) = (params.adaptive_target, params.adaptive_decay);
        chain.push(&ChainStage::AdaptiveP { target, decay, seed: SEED });
    }
    chain
}

/// What llama.cpp leaves of `logits`, with probabilities, by ascending id.
fn left_by_llama(chain: &mut SamplerChain, logits: &[f32]) -> Vec<(TokenId, f64)> {
    chain.sample(logits);
    let kept: Vec<_> = chain.kept().into_iter().map(|(token, logit)| (token, f64::from(logit))).collect();
    kept.iter().map(|token| token.0).zip(probabilities(&kept, 1.0)).collect()
}

/// Fixed random numbers.
struct Dice(SplitMix64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        (self.0.uniform() * n as f64) as usize
    }

    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.0.uniform() as f32
    }

    fn one_of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }

    fn params(&mut self, n_vocab: usize) -> SamplingParams {
        let mut stages = SamplerStage::DEFAULT_ORDER.to_vec();
        if self.below(2) == 0 {
            for i in (1..stages.len()).rev() {
                stages.swap(i, self.below(i + 1));
            }
            stages.truncate(1 + self.below(stages.len()));
        }
        let off_or = |dice: &mut Self, off: f32, low: f32, high: f32| match dice.below(2) {
            0 => off,
            _ => dice.between(low, high),
        };
        // llama.cpp counts tokens at -inf, which top_n_sigma leaves: min_keep keeps them, typical_p and dynamic temperatures go by them.
        let top_n_sigma = if self.below(4) == 0 { self.between(0.2, 3.0) } else { -1.0 };
        let cuts = top_n_sigma > 0.0;
        let mut params = SamplingParams {
            temperature: self.one_of(&[0.0, 0.3, 1.0, 1.0, 1.7]),
            top_k: self.one_of(&[0, 0, 1, 7, 40, 300]),
            top_p: off_or(self, 1.0, 0.05, 0.999),
            min_p: off_or(self, 0.0, 1e-4, 0.4),
            typical_p: if cuts { 1.0 } else { off_or(self, 1.0, 0.1, 0.99) },
            repeat_penalty: off_or(self, 1.0, 0.7, 1.8),
            repeat_last_n: self.one_of(&[0, 5, 64]),
            frequency_penalty: off_or(self, 0.0, -0.5, 1.0),
            presence_penalty: off_or(self, 0.0, -0.5, 1.0),
            top_n_sigma,
            min_keep: if cuts { 0 } else { self.one_of(&[0, 0, 1, 3, 60]) },
            xtc_probability: self.one_of(&[0.0, 1.0]),
            xtc_threshold: self.one_of(&[0.02, 0.1, 0.3, 0.6]),
            dynatemp_range: if cuts { 0.0 } else { self.one_of(&[0.0, 0.0, 0.5, 2.0]) },
            dynatemp_exponent: self.one_of(&[0.5, 1.0, 2.0]),
            dry_multiplier: self.one_of(&[0.0, 0.8, 5.0]),
            dry_allowed_length: self.one_of(&[0, 1, 2, 4]),
            dry_penalty_last_n: self.one_of(&[0, 7, 64]),
            logit_bias: (0..self.below(4)).map(|i| ((i * 31 % n_vocab) as TokenId, self.between(-5.0, 5.0))).collect(),
            samplers: stages,
            ..SamplingParams::default()
        };
        let place = |stage| params.samplers.iter().position(|other| *other == stage);
        if place(SamplerStage::Temperature) < place(SamplerStage::TypicalP) {
            params.typical_p = 1.0; // llama.cpp's entropy is NaN where a low temperature makes a probability 0
        }
        params
    }
}

#[test]
fn any_parameters_in_any_order_leave_what_llama_cpp_leaves() {
    let mut dice = Dice(SplitMix64::new(20));
    for case in 0..4_000_u64 {
        let n_vocab = dice.one_of(&[2, 50, 300, 1_500]);
        let params = dice.params(n_vocab);
        let logits = row(n_vocab, 1_000 + case);
        let (mut sampler, mut chain) = (Sampler::new(&params, n_vocab, case), chain(&params, n_vocab));
        for _ in 0..dice.below(90) {
            let token = dice.below(n_vocab.min(6)) as TokenId; // few different ones, so that they repeat
            sampler.accept(token);
            chain.accept(token);
        }
        assert_same(&left(&mut sampler, &logits), &left_by_llama(&mut chain, &logits), &(case, &params));
    }
}

/// Draws of both from one row, many times, each time from the state after `history`. Both counts are random, so their difference has
/// the variance of their sum.
fn assert_draws_agree(params: &SamplingParams, logits: &[f32], history: &[TokenId]) {
    const N_DRAWS: u64 = 20_000;
    let n_vocab = logits.len();
    let mut counts = vec![(0.0, 0.0); n_vocab];
    let mut theirs = chain(params, n_vocab);
    theirs.push(&ChainStage::Dist { seed: SEED });
    let mut ours = Sampler::new(params, n_vocab, 3);
    for &token in history {
        ours.accept(token);
        theirs.accept(token);
    }
    for _ in 0..N_DRAWS {
        counts[ours.sample(logits, &[], None).expect("a token is left").token as usize].0 += 1.0;
        counts[theirs.sample(logits).expect("it chooses") as usize].1 += 1.0;
    }
    let used = counts.into_iter().filter(|(ours, theirs)| ours + theirs > 0.0);
    let cells = used.map(|(ours, theirs): (f64, f64)| (ours + theirs, ours - theirs));
    assert_chi_square(cells, |sum, difference| difference.powi(2) / sum, params);
}

#[test]
fn draws_agree_with_llama_cpps_for_every_filter_alone_and_together() {
    let all_on = SamplingParams {
        temperature: 0.9,
        top_k: 60,
        top_p: 0.98,
        min_p: 0.01,
        typical_p: 0.95,
        repeat_penalty: 1.2,
        presence_penalty: 0.3,
        dry_multiplier: 0.8,
        xtc_probability: 0.4,
        xtc_threshold: 0.05,
        dynatemp_range: 0.3,
        logit_bias: vec![(4, 1.5), (9, -2.0)],
        ..SamplingParams::default()
    };
    let all = [
        plain(),
        SamplingParams { temperature: 0.6, ..plain() },
        SamplingParams::default(),
        SamplingParams { top_k: 9, ..plain() },
        SamplingParams { top_p: 0.8, ..plain() },
        SamplingParams { min_p: 0.05, ..plain() },
        SamplingParams { typical_p: 0.6, ..plain() },
        SamplingParams { top_n_sigma: 1.5, ..plain() },
        SamplingParams { xtc_probability: 0.5, xtc_threshold: 0.03, ..plain() },
        SamplingParams { dynatemp_range: 0.7, dynatemp_exponent: 1.5, ..plain() },
        SamplingParams { repeat_penalty: 1.4, frequency_penalty: 0.4, presence_penalty: 0.6, ..plain() },
        SamplingParams { dry_multiplier: 1.5, dry_allowed_length: 1, ..plain() },
        SamplingParams { logit_bias: vec![(3, 3.0), (5, -4.0)], ..plain() },
        SamplingParams { top_p: 0.1, min_keep: 12, ..plain() },
        SamplingParams { samplers: all_on.samplers.iter().rev().copied().collect(), typical_p: 1.0, ..all_on.clone() },
        all_on,
    ];
    let history: Vec<TokenId> = [1, 2, 3, 4, 9, 1, 2, 3, 7, 1, 2].into();
    for (seed, params) in (0..).zip(&all) {
        for n_vocab in [12, 400] {
            assert_draws_agree(params, &row(n_vocab, 900 + seed), &history);
        }
    }
}

/// Mirostat and adaptive-p remember what was drawn. Rows with one likely token make both draw the same, so that their states agree; then
/// what they leave of another row must agree too.
#[test]
fn what_remembers_its_draws_remembers_the_same() {
    let adaptive = |target, decay| SamplingParams {
        adaptive_target: target,
        adaptive_decay: decay,
        samplers: vec![SamplerStage::MinP, SamplerStage::Temperature, SamplerStage::AdaptiveP],
        min_p: 0.001,
        ..plain()
    };
    let mirostat = |mirostat, tau, eta| SamplingParams { mirostat, mirostat_tau: tau, mirostat_eta: eta, ..plain() };
    for params in [
        mirostat(1, 1.5, 0.1),
        mirostat(1, 3.0, 0.4),
        mirostat(2, 1.5, 0.1),
        mirostat(2, 3.0, 0.3),
        SamplingParams { temperature: 0.7, ..mirostat(2, 2.0, 0.2) },
        adaptive(0.3, 0.9),
        adaptive(0.6, 0.5),
        adaptive(0.05, 0.99),
    ] {
        const N_VOCAB: usize = 500;
        let (mut ours, mut theirs) = (Sampler::new(&params, N_VOCAB, 5), chain(&params, N_VOCAB));
        for step in 0..6 {
            assert_same(
                &left(&mut ours.clone(), &row(N_VOCAB, 70 + step)),
                &left_by_llama(&mut theirs.clone(), &row(N_VOCAB, 70 + step)),
                &(step, &params),
            );
            let mut likely = row(N_VOCAB, step);
            likely[step as usize] = 40.0; // everything else is 1e-13 times as probable
            let token = ours.sample(&likely, &[], None).expect("a token is left").token;
            assert_eq!((token, theirs.sample(&likely)), (step as TokenId, Some(step as TokenId)));
            ours.accept(token);
            theirs.accept(token);
        }
    }
}

#[test]
fn draws_of_mirostat_and_adaptive_p_follow_what_they_leave() {
    let logits = row(300, 8);
    let mirostat = |mirostat| SamplingParams { mirostat, mirostat_tau: 3.0, ..plain() };
    let samplers = vec![SamplerStage::MinP, SamplerStage::AdaptiveP];
    let adaptive = SamplingParams { adaptive_target: 0.2, samplers, min_p: 0.01, ..plain() };
    for params in [mirostat(1), mirostat(2), adaptive] {
        const N_DRAWS: u64 = 20_000;
        let expected = left_by_llama(&mut chain(&params, logits.len()), &logits);
        let mut counts = vec![0.0; logits.len()];
        for seed in 0..N_DRAWS {
            let drawn = Sampler::new(&params, logits.len(), seed).sample(&logits, &[], None).expect("a token is left");
            counts[drawn.token as usize] += 1.0;
        }
        let cells = expected.iter().map(|token| (token.1 * N_DRAWS as f64, counts[token.0 as usize]));
        assert_chi_square(cells, |mean, count| (count - mean).powi(2) / mean, &params);
    }
}

/// The test model's vocabulary.
struct Vocabulary(Arc<Model>);

impl Tokenizer for Vocabulary {
    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<TokenId>, RequestError> {
        Ok(self.0.tokenize(text, add_special, parse_special).expect("tokenizes"))
    }

    fn token_bytes(&self, token: TokenId, out: &mut Vec<u8>) {
        self.0.token_bytes(token, false, out);
    }

    fn is_end_of_generation(&self, token: TokenId) -> bool {
        self.0.is_end_of_generation(token)
    }

    fn end_of_generation(&self) -> &[TokenId] {
        &[]
    }

    fn max_token_bytes(&self) -> usize {
        64
    }

    fn render_chat(&self, _: &[ChatMessage]) -> Result<RenderedChat, RequestError> {
        Err(RequestError::NoChatTemplate)
    }
}

#[test]
fn dry_breakers_of_a_real_vocabulary_break_where_llama_cpps_do() {
    let path: PathBuf = std::env::var_os("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` once").into();
    let model = Model::load(&path, &ModelParams::default(), &mut |_| ControlFlow::Continue(()));
    let model = model.expect("the test model loads");
    let n_vocab = model.n_vocab();
    let cache = BreakerCache::default();
    let words = ["the ", "cat", ": ", "\"", "\n", " sat on", "* ", "mat", "end of", " story", "END.", "<|im_end|>"];
    let mut dice = Dice(SplitMix64::new(4));
    let lists: [&[&str]; 5] =
        [&["\n", ":", "\"", "*"], &[" story"], &["end of story", "at"], &["<|im_end|>", "cat: the"], &[]];
    for breakers in lists {
        for _ in 0..12 {
            let texts: Vec<String> = breakers.iter().map(|&text| text.to_owned()).collect();
            let params =
                SamplingParams { dry_multiplier: 1.0, dry_allowed_length: 1, dry_penalty_last_n: 64, ..plain() };
            let ours = cache.get(&texts, &Vocabulary(Arc::clone(&model)), n_vocab);
            let mut sampler = Sampler::new(&params, n_vocab, 0).with_breakers(ours);
            let mut chain = SamplerChain::new();
            let (multiplier, base, last_n) = (1.0, params.dry_base, 64);
            let dry = ChainStage::Dry { model: Some(&model), multiplier, base, allowed_length: 1, last_n, breakers };
            chain.push(&dry);
            let text: String = (0..40).map(|_| words[dice.below(words.len())]).collect();
            for token in model.tokenize(&text, false, true).expect("tokenizes") {
                sampler.accept(token);
                chain.accept(token);
            }
            let logits = row(n_vocab, 5);
            assert_same(&left(&mut sampler, &logits), &left_by_llama(&mut chain, &logits), &(breakers, text));
        }
    }
}
