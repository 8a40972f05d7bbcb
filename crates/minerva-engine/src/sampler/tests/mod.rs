//! The sampler as a whole: against a plain reference, against llama.cpp's, and against the exact distribution.

use proptest::prelude::*;

mod llama;
mod reference;

use self::reference::{left_by_reference, probabilities};
use super::*;

const NEG_INF: f32 = f32::NEG_INFINITY;

/// All filters off, temperature 1: the model's own distribution.
fn plain() -> SamplingParams {
    SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..SamplingParams::default() }
}

/// Logits with a head and a body, by a fixed recipe.
fn row(n_vocab: usize, seed: u64) -> Vec<f32> {
    let mut rng = SplitMix64::new(seed);
    (0..n_vocab).map(|_| ((0..4).map(|_| rng.uniform()).sum::<f64>() * 6.0 - 12.0) as f32).collect()
}

/// The tokens that are left of `logits` when the draw comes, with their probabilities, by ascending id.
fn left(sampler: &mut Sampler, logits: &[f32]) -> Vec<(TokenId, f64)> {
    sampler.scratch.candidates.list.clear();
    let chosen = sampler.sample(logits, &[], None).expect("a token is left").token;
    let Scratch { candidates, patches, .. } = &sampler.scratch;
    let mut left = Vec::new();
    if sampler.plan.last() == Some(&Step::Best) {
        return vec![(chosen, 1.0)];
    } else if candidates.list.is_empty() {
        left.extend((0..).zip(logits.iter().map(|logit| f64::from(*logit)))); // nothing narrowed the row
        for patch in patches {
            left[patch.token].1 = f64::from(patch.logit);
        }
        left.retain(|token| token.1 > f64::NEG_INFINITY);
    } else {
        left.extend(candidates.list.iter().map(|candidate| (candidate.token, f64::from(candidate.logit))));
    }
    left.iter().map(|token| token.0).zip(probabilities(&left, 1.0 / f64::from(candidates.scale))).collect()
}

/// Compares two lists by ascending id. A token that is too improbable for an `f32` may be in either or not.
fn assert_same(ours: &[(TokenId, f64)], theirs: &[(TokenId, f64)], what: &dyn std::fmt::Debug) {
    // A token counts if either list calls it possible: at the bound itself the two differ in their last digits.
    let possible = |list: &[(TokenId, f64)], other: &[(TokenId, f64)]| {
        let of_other = |id| other.binary_search_by_key(&id, |token| token.0).map_or(0.0, |at| other[at].1);
        list.iter().copied().filter(|token| token.1.max(of_other(token.0)) > 1e-37).collect::<Vec<_>>()
    };
    let (ours, theirs) = (possible(ours, theirs), possible(theirs, ours));
    let ids = |list: &[(TokenId, f64)]| list.iter().map(|token| token.0).collect::<Vec<_>>();
    assert_eq!(ids(&ours), ids(&theirs), "{what:?}");
    for (our, their) in ours.iter().zip(&theirs) {
        assert!((our.1 - their.1).abs() <= 2e-4 * their.1 + 1e-7, "{our:?} {their:?} for {what:?}");
    }
}

/// Rows over several blocks: few distinct values, so that ties are everywhere, or many; some tokens are impossible.
fn any_row() -> impl Strategy<Value = Vec<f32>> {
    let tied = (-40..40_i32).prop_map(|steps| steps as f32 * 0.25);
    let distinct = (-12.0..12.0_f32).boxed();
    let impossible = prop_oneof![Just(NEG_INF), Just(f32::NAN)];
    let logit = prop_oneof![4 => tied, 4 => distinct, 1 => impossible];
    prop::collection::vec(logit, 1..400).prop_map(|mut row| {
        let n = row.len();
        row[n / 2] = 12.5; // at least one possible token
        row
    })
}

fn any_filters() -> impl Strategy<Value = SamplingParams> {
    let top_k = prop_oneof![Just(0), 1..20_i32, 20..500_i32];
    let top_p = prop_oneof![Just(1.0), 0.0..1.0_f32, 0.9..1.0_f32];
    let min_p = prop_oneof![Just(0.0), 0.0..1.0_f32, 0.0..0.01_f32];
    let typical_p = prop_oneof![2 => Just(1.0), 1 => 0.0..1.0_f32];
    let min_keep = prop_oneof![3 => Just(0), 1 => 1..500_u32];
    let top_n_sigma = prop_oneof![2 => Just(-1.0), 1 => 0.1..4.0_f32];
    let xtc = prop_oneof![2 => Just(0.0), 1 => 0.01..0.6_f32];
    let temperature = (
        prop_oneof![2 => Just(1.0), 1 => 0.1..3.0_f32, 1 => Just(0.0)],
        prop_oneof![3 => Just(0.0), 1 => 0.1..2.0_f32],
    );
    let order = (Just(SamplerStage::DEFAULT_ORDER.to_vec()).prop_shuffle(), 0..20_usize).prop_map(|(mut order, n)| {
        if n >= order.len() {
            return SamplerStage::DEFAULT_ORDER.to_vec();
        }
        order.truncate(n);
        order
    });
    let cuts = (top_k, top_p, min_p, typical_p, min_keep);
    (cuts, top_n_sigma, xtc, temperature, order).prop_map(|(cuts, top_n_sigma, xtc, (temperature, range), samplers)| {
        let (top_k, top_p, min_p, typical_p, min_keep) = cuts;
        SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            typical_p,
            min_keep,
            top_n_sigma,
            xtc_probability: if xtc > 0.0 { 1.0 } else { 0.0 },
            xtc_threshold: xtc,
            dynatemp_range: range,
            samplers,
            ..plain()
        }
    })
}

#[test]
fn top_tokens_whose_log_probabilities_round_to_one_value_are_in_the_order_of_their_logits() {
    let row = [1.249_999_6, 0.0, 0.0, 12.5, 0.0, 0.0, 1.25];
    let sampled = Sampler::new(&plain(), row.len(), 1).sample(&row, &[], Some(3)).expect("has a candidate");
    assert_eq!(sampled.top.iter().map(|top| top.0).collect::<Vec<_>>(), [3, 6, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn greedy_takes_the_first_of_the_largest_logits(row in any_row(), banned in prop::collection::vec(0..400, 0..4)) {
        let mut expected: Option<(TokenId, f32)> = None;
        for (token, &logit) in (0..).zip(&row) {
            let is_possible = logit > NEG_INF && !banned.contains(&token);
            if is_possible && expected.is_none_or(|best| logit > best.1) {
                expected = Some((token, logit));
            }
        }
        let mut sampler = Sampler::new(&SamplingParams::greedy(), row.len(), 0);
        let chosen = sampler.sample(&row, &banned, None).ok().map(|sampled| sampled.token);
        prop_assert_eq!(chosen, expected.map(|best| best.0));
    }

    #[test]
    fn any_filters_in_any_order_leave_what_the_reference_leaves(row in any_row(), params in any_filters()) {
        if let Some(expected) = left_by_reference(&params, &row) {
            assert_same(&left(&mut Sampler::new(&params, row.len(), 0), &row), &expected, &params);
        }
    }

    #[test]
    fn log_probabilities_are_those_of_the_unmodified_row(row in any_row(), n_top in 0..30_usize) {
        let params = SamplingParams { logit_bias: vec![(0, -3.0)], ..SamplingParams::default() };
        let sampled = Sampler::new(&params, row.len(), 1).sample(&row, &[], Some(n_top)).expect("has a candidate");
        let mut tokens: Vec<(TokenId, f64)> = (0..).zip(row.iter().map(|logit| f64::from(*logit))).collect();
        tokens.retain(|token| token.1.is_finite());
        tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let expected: Vec<(TokenId, f64)> =
            tokens.iter().zip(probabilities(&tokens, 1.0)).map(|(token, p)| (token.0, p.ln())).collect();
        prop_assert_eq!(sampled.top.len(), n_top.min(expected.len()));
        for (given, expected) in sampled.top.iter().zip(&expected) {
            prop_assert_eq!(given.0, expected.0);
            prop_assert!((f64::from(given.1) - expected.1).abs() < 1e-4);
        }
        let chosen = expected.iter().find(|entry| entry.0 == sampled.token).expect("finite").1;
        prop_assert!((f64::from(sampled.logprob.expect("asked for")) - chosen).abs() < 1e-4);
    }

    #[test]
    fn a_mask_is_the_same_as_a_row_with_everything_else_at_minus_infinity(
        row in any_row(),
        words in prop::collection::vec(prop_oneof![Just(0_u32), Just(u32::MAX), any::<u32>()], 0..16),
        banned in prop::collection::vec(0..400, 0..4),
        params in any_filters(),
        seed in any::<u64>(),
    ) {
        let mask = TokenMask::from_words(&words);
        let written_out: Vec<f32> =
            (0..).zip(&row).map(|(token, &logit)| if mask.allows(token) { logit } else { NEG_INF }).collect();
        let params = SamplingParams { logit_bias: vec![(2, 3.0), (70, -1.0)], ..params };
        let sampler = || Sampler::new(&params, row.len(), seed);
        let (masked, plain) = (sampler().sample_allowed(&row, &banned, &mask, None), sampler().sample(&written_out, &banned, None));
        prop_assert_eq!(masked, plain);
    }

    #[test]
    fn no_parameters_and_no_row_make_the_sampler_panic(
        bits in prop::collection::vec(any::<u32>(), 0..200),
        params in any_filters(),
        temperature in prop_oneof![Just(0.0), Just(f32::MIN_POSITIVE / 4.0), Just(100.0), 0.0..2.0_f32],
        mirostat in 0..3_u8,
        adaptive_target in prop_oneof![Just(-1.0), 0.0..1.0_f32],
        n_top in prop::option::of(0..300_usize),
        banned in prop::collection::vec(any::<i32>(), 0..3),
    ) {
        let row: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let mut samplers = params.samplers.clone();
        samplers.extend([SamplerStage::AdaptiveP].iter().filter(|_| adaptive_target > 0.5));
        let (repeat_penalty, repeat_last_n, dry_multiplier, dry_allowed_length) = (1.5, -1, 3.0, 0);
        let penalties = SamplingParams { repeat_penalty, repeat_last_n, dry_multiplier, dry_allowed_length, ..params };
        let params = SamplingParams { temperature, mirostat, adaptive_target, samplers, ..penalties };
        let mut sampler = Sampler::new(&params, row.len(), 3);
        for token in [-1, 5, 6, 5, 6] {
            sampler.accept(token);
        }
        for _ in 0..3 {
            if let Ok(sampled) = sampler.sample(&row, &banned, n_top) {
                prop_assert!(row[sampled.token as usize] > NEG_INF);
                sampler.accept(sampled.token);
            }
        }
    }
}

/// Draws from `logits` many times and compares the counts with the exact probabilities.
fn assert_draws_follow_the_distribution(params: &SamplingParams, logits: &[f32], seed: u64) {
    const N_DRAWS: usize = 40_000;
    let expected = left_by_reference(params, logits).expect("a row without close calls");
    let mut counts = vec![0_u32; logits.len()];
    let mut sampler = Sampler::new(params, logits.len(), seed);
    for _ in 0..N_DRAWS {
        counts[sampler.sample(logits, &[], None).expect("has candidates").token as usize] += 1;
    }
    let drawn: u32 = expected.iter().map(|token| counts[token.0 as usize]).sum();
    assert_eq!(drawn as usize, N_DRAWS, "a token was drawn that the filters drop");

    let cells = expected.iter().map(|token| (token.1 * N_DRAWS as f64, f64::from(counts[token.0 as usize])));
    assert_chi_square(cells, |mean, count| (count - mean).powi(2) / mean, params);
}

/// Pearson's statistic over cells with a first number of 5 or more, the others merged into one.
fn assert_chi_square(
    cells: impl Iterator<Item = (f64, f64)>,
    term: impl Fn(f64, f64) -> f64,
    what: &dyn std::fmt::Debug,
) {
    let (mut chi2, mut n_cells, mut rest) = (0.0, 0, (0.0, 0.0));
    for (mean, count) in cells {
        if mean < 5.0 {
            rest = (rest.0 + mean, rest.1 + count);
        } else {
            chi2 += term(mean, count);
            n_cells += 1;
        }
    }
    if rest.0 >= 5.0 {
        chi2 += term(rest.0, rest.1);
        n_cells += 1;
    }
    let freedom = f64::from(n_cells - 1);
    if freedom < 1.0 {
        return; // one token only, and it was drawn
    }
    // Wilson and Hilferty's approximation of the value that chance exceeds once in 100,000 tests.
    let spread = 2.0 / (9.0 * freedom);
    let limit = freedom * (1.0 - spread + 4.26 * spread.sqrt()).powi(3);
    assert!(chi2 <= limit, "chi² {chi2:.1} with {freedom} degrees of freedom for {what:?}");
}

#[test]
fn draws_follow_the_exact_distribution_under_every_filter() {
    let all = [
        plain(),
        SamplingParams { temperature: 0.3, ..plain() },
        SamplingParams { temperature: 2.5, ..plain() },
        SamplingParams::default(),
        SamplingParams { top_k: 7, ..plain() },
        SamplingParams { top_p: 0.9, ..plain() },
        SamplingParams { min_p: 0.02, ..plain() },
        SamplingParams { typical_p: 0.7, ..plain() },
        SamplingParams { top_k: 90, typical_p: 0.9, temperature: 1.7, ..SamplingParams::default() },
        SamplingParams { top_n_sigma: 1.3, ..plain() },
        SamplingParams { xtc_probability: 1.0, xtc_threshold: 0.05, ..plain() },
        SamplingParams { dynatemp_range: 0.8, temperature: 1.1, ..plain() },
        SamplingParams { samplers: vec![SamplerStage::Temperature, SamplerStage::TopP], ..SamplingParams::default() },
    ];
    for (seed, params) in (0..).zip(&all) {
        for n_vocab in [3, 64, 1_000] {
            assert_draws_follow_the_distribution(params, &row(n_vocab, 11), seed);
        }
    }
}

#[test]
fn a_penalised_and_biased_row_is_drawn_like_the_same_row_written_out() {
    let params = SamplingParams {
        repeat_penalty: 1.3,
        presence_penalty: 0.5,
        logit_bias: vec![(3, 2.0), (130, -100.0)],
        ..plain()
    };
    let logits = row(150, 5);
    let mut written_out = logits.clone();
    for token in [70, 71, 149] {
        let logit = &mut written_out[token];
        *logit = if *logit <= 0.0 { *logit * 1.3 } else { *logit / 1.3 } - 0.5;
    }
    written_out[3] += 2.0;
    written_out[130] = NEG_INF;
    written_out[8] = NEG_INF; // banned below

    for filters in [plain(), SamplingParams::default(), SamplingParams::greedy()] {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = filters;
        let mut adjusted = Sampler::new(&SamplingParams { temperature, top_k, top_p, min_p, ..params.clone() }, 150, 9);
        for token in [70, 149, 71] {
            adjusted.accept(token);
        }
        let mut direct = Sampler::new(&filters, 150, 9);
        for _ in 0..500 {
            assert_eq!(adjusted.sample(&logits, &[8], None), direct.sample(&written_out, &[], None));
        }
    }
}

#[test]
fn rows_without_a_usable_token_fail_that_call_only() {
    for params in [plain(), SamplingParams::default(), SamplingParams::greedy()] {
        let mut sampler = Sampler::new(&params, 3, 0);
        assert_eq!(sampler.sample(&[f32::NAN; 3], &[], None), Err(SampleError::NoCandidate));
        assert_eq!(sampler.sample(&[NEG_INF; 3], &[], Some(2)), Err(SampleError::NoCandidate));
        assert_eq!(sampler.sample(&[0.0; 3], &[2, 1, 0], None), Err(SampleError::NoCandidate));
        assert_eq!(sampler.sample(&[0.0, f32::INFINITY, 0.0], &[], None), Err(SampleError::InfiniteLogit));
        let wrong = SampleError::WrongLength { given: 2, n_vocab: 3 };
        assert_eq!(sampler.sample(&[0.0; 2], &[], None), Err(wrong));
        assert_eq!(sampler.sample(&[f32::NAN, -5.0, NEG_INF], &[], None).expect("token 1 is left").token, 1);
    }
    assert_eq!(Sampler::new(&plain(), 0, 0).sample(&[], &[], None), Err(SampleError::NoCandidate));
}

/// Draws `n` tokens, each accepted, from rows that change with every step.
fn generate(sampler: &mut Sampler, steps: std::ops::Range<u64>) -> Vec<TokenId> {
    let mut draw = |step| {
        let token = sampler.sample(&row(300, step), &[], None).expect("has candidates").token;
        sampler.accept(token);
        token
    };
    steps.map(&mut draw).collect()
}

#[test]
fn a_resumed_sampler_goes_on_as_if_nothing_had_happened() {
    let penalised = SamplingParams { repeat_last_n: 5, presence_penalty: 8.0, ..SamplingParams::default() };
    let [version_1, version_2] = [1, 2].map(|mirostat| SamplingParams { mirostat, mirostat_tau: 3.0, ..plain() });
    let samplers = vec![SamplerStage::Xtc, SamplerStage::AdaptiveP];
    let adaptive = SamplingParams { adaptive_target: 0.3, xtc_probability: 0.5, samplers, ..plain() };
    let dry = SamplingParams { dry_multiplier: 4.0, dry_allowed_length: 0, dry_penalty_last_n: 9, ..plain() };
    for params in [penalised, plain(), version_1, version_2, adaptive, dry] {
        let mut uninterrupted = Sampler::new(&params, 300, 42);
        let mut first = uninterrupted.clone();
        generate(&mut first, 0..20);
        let json = serde_json::to_string(&first.state()).expect("writes");
        let mut second = Sampler::resume(serde_json::from_str(&json).expect("reads")).expect("valid");
        assert_eq!(generate(&mut second, 20..60), generate(&mut uninterrupted, 0..60)[20..]);
    }
}

#[test]
fn a_state_with_broken_parameters_is_refused() {
    let mut state = Sampler::new(&plain(), 10, 0).state();
    state.params.top_p = 7.0;
    state.history = vec![-4, 1_000];
    assert_eq!(Sampler::resume(state).expect_err("must be refused").param, "top_p");
}

#[test]
fn a_seed_gives_these_tokens_on_every_platform() {
    let mut sampler = Sampler::new(&SamplingParams { top_k: 0, ..SamplingParams::default() }, 300, 1);
    assert_eq!(generate(&mut sampler, 0..12), [262, 94, 244, 264, 62, 41, 4, 52, 119, 286, 140, 153]);
    let mut sampler = Sampler::new(&plain(), 300, 1);
    assert_eq!(generate(&mut sampler, 0..12), [262, 94, 148, 299, 62, 101, 4, 52, 119, 286, 140, 153]);
}

#[test]
fn buffers_stop_growing_after_the_first_tokens() {
    let mut sampler = Sampler::new(&SamplingParams { top_k: 0, ..SamplingParams::default() }, 5_000, 1);
    let rows: Vec<_> = (0..8).map(|seed| row(5_000, seed)).collect();
    let mut sizes = Vec::new();
    for row in rows.iter().cycle().take(32) {
        sampler.sample(row, &[3], None).expect("has candidates");
        let Scratch { patches, maxima, blocks, candidates } = &sampler.scratch;
        sizes.push([patches.capacity(), maxima.capacity(), blocks.capacity(), candidates.list.capacity()]);
    }
    assert!(sizes[8..].iter().all(|size| *size == sizes[8]), "{sizes:?}");
}
