//! Our sampler against llama.cpp's own, in one process: the same tokens left with the same probabilities, and the same draws.

use minerva_llama::{ChainStage, SamplerChain};

use super::*;

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
fn kept_by_llama(chain: &mut SamplerChain, logits: &[f32]) -> Vec<(TokenId, f64)> {
    chain.sample(logits);
    let kept: Vec<_> = chain.kept().into_iter().map(|(token, logit)| (token, f64::from(logit))).collect();
    kept.iter().map(|token| token.0).zip(probabilities(&kept, 1.0)).collect()
}

/// What our sampler leaves of it.
fn kept_by_us(sampler: &mut Sampler, logits: &[f32]) -> Vec<(TokenId, f64)> {
    sampler.scratch.candidates.list.clear();
    let chosen = sampler.sample(logits, &[], None).expect("a token is left").token;
    let Scratch { candidates, patches, .. } = &sampler.scratch;
    let (mut kept, mut scale) = (Vec::new(), f64::from(candidates.scale));
    if matches!(sampler.plan.last(), Some(Step::Best)) {
        (kept, scale) = (vec![(chosen, 0.0)], 1.0);
    } else if candidates.list.is_empty() {
        kept.extend((0..).zip(logits.iter().map(|logit| f64::from(*logit)))); // nothing narrowed the row
        for patch in patches {
            kept[patch.token].1 = f64::from(patch.logit);
        }
        kept.retain(|token| token.1 > f64::NEG_INFINITY);
    } else {
        kept.extend(candidates.list.iter().map(|candidate| (candidate.token, f64::from(candidate.logit))));
    }
    kept.iter().map(|token| token.0).zip(probabilities(&kept, 1.0 / scale)).collect()
}

fn assert_same(ours: &[(TokenId, f64)], theirs: &[(TokenId, f64)], what: &dyn std::fmt::Debug) {
    // A temperature of 0 leaves one token in both; a tiny one leaves tokens whose probability is 0 in either.
    let ids =
        |kept: &[(TokenId, f64)]| kept.iter().filter(|token| token.1 > 0.0).map(|token| token.0).collect::<Vec<_>>();
    assert_eq!(ids(ours), ids(theirs), "{what:?}");
    for (our, their) in ours.iter().filter(|token| token.1 > 0.0).zip(theirs.iter().filter(|token| token.1 > 0.0)) {
        assert!((our.1 - their.1).abs() <= 2e-4 * their.1 + 1e-7, "{our:?} {their:?} for {what:?}");
    }
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
        assert_same(&kept_by_us(&mut sampler, &logits), &kept_by_llama(&mut chain, &logits), &(case, &params));
    }
}
