//! What the filters must leave, written plainly: full sorts, `f64`, one stage after the other.

use super::*;

/// The tokens that `params` leaves of `logits` with their probabilities, by ascending id. Penalties and DRY are not in it, and XTC
/// removes whenever its probability is 1. `None` where a stage comes so close to its limit that rounding may decide.
pub(super) fn left_by_reference(params: &SamplingParams, logits: &[f32]) -> Option<Vec<(TokenId, f64)>> {
    let mut tokens: Vec<(TokenId, f64)> = (0..).zip(logits.iter().map(|logit| f64::from(*logit))).collect();
    tokens.retain(|(_, logit)| logit.is_finite());
    sort(&mut tokens);
    let min_keep = params.min_keep as usize;
    for stage in &params.samplers {
        match stage {
            SamplerStage::TopNSigma if params.top_n_sigma > 0.0 => keep_top_n_sigma(&mut tokens, params.top_n_sigma)?,
            SamplerStage::TopK if params.top_k > 0 => tokens.truncate(params.top_k as usize),
            SamplerStage::TypicalP if params.typical_p < 1.0 => keep_typical(&mut tokens, params.typical_p, min_keep)?,
            SamplerStage::TopP if params.top_p < 1.0 => {
                let n = prefix(probabilities(&tokens, 1.0).into_iter(), params.top_p)?;
                tokens.truncate(n.max(min_keep));
            }
            SamplerStage::MinP if params.min_p > 0.0 => {
                let ratio = |logit: f64| (logit - tokens[0].1).exp() / f64::from(params.min_p);
                if tokens.iter().any(|token| is_close(ratio(token.1), 1.0)) {
                    return None;
                }
                let n = tokens.iter().take_while(|token| ratio(token.1) >= 1.0).count();
                tokens.truncate(n.max(min_keep).max(1));
            }
            SamplerStage::Xtc if params.xtc_probability >= 1.0 && params.xtc_threshold <= 0.5 => {
                let threshold = f64::from(params.xtc_threshold);
                let share = probabilities(&tokens, 1.0);
                if share.iter().any(|p| is_close(*p, threshold)) {
                    return None;
                }
                let n_removed = share.iter().filter(|p| **p >= threshold).count().saturating_sub(1);
                if tokens.len() - n_removed >= min_keep {
                    tokens.drain(..n_removed);
                }
            }
            SamplerStage::Temperature => heat(&mut tokens, params),
            _ => {}
        }
    }
    let mut left: Vec<_> = tokens.iter().map(|token| token.0).zip(probabilities(&tokens, 1.0)).collect();
    left.sort_by_key(|token| token.0);
    Some(left)
}

fn is_close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-5
}

/// By falling logit, then by ascending id.
fn sort(tokens: &mut [(TokenId, f64)]) {
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
}

fn keep_top_n_sigma(tokens: &mut Vec<(TokenId, f64)>, sigmas: f32) -> Option<()> {
    let n = tokens.len() as f64;
    let mean = tokens.iter().map(|token| token.1).sum::<f64>() / n;
    let deviation = (tokens.iter().map(|token| (token.1 - mean).powi(2)).sum::<f64>() / n).sqrt();
    let bound = tokens[0].1 - f64::from(sigmas) * deviation;
    if deviation > 0.0 && tokens.iter().any(|token| is_close(token.1, bound)) {
        return None;
    }
    tokens.retain(|token| token.1 >= bound);
    Some(())
}

fn keep_typical(tokens: &mut Vec<(TokenId, f64)>, p: f32, min_keep: usize) -> Option<()> {
    let surprise: Vec<f64> = probabilities(tokens, 1.0).iter().map(|p| -p.ln()).collect();
    let entropy: f64 = surprise.iter().filter(|s| s.is_finite()).map(|s| s * (-s).exp()).sum();
    let mut order: Vec<(f64, f64, (TokenId, f64))> =
        surprise.iter().zip(&*tokens).map(|(s, token)| ((s - entropy).abs(), (-s).exp(), *token)).collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.2.0.cmp(&b.2.0)));
    let differ = |a: &(f64, f64, (TokenId, f64)), b: &(f64, f64, (TokenId, f64))| a.2.1.to_bits() != b.2.1.to_bits();
    if order.windows(2).any(|pair| differ(&pair[0], &pair[1]) && is_close(pair[0].0, pair[1].0)) {
        return None;
    }
    // Equal logits are equally far from the entropy, whatever rounding said above.
    order.sort_by(|a, b| if is_close(a.0, b.0) { a.2.0.cmp(&b.2.0) } else { a.0.total_cmp(&b.0) });
    let n = prefix(order.iter().map(|entry| entry.1), p)?.max(min_keep).min(order.len());
    *tokens = order[..n].iter().map(|entry| entry.2).collect();
    sort(tokens);
    Some(())
}

fn heat(tokens: &mut Vec<(TokenId, f64)>, params: &SamplingParams) {
    let (temperature, range) = (f64::from(params.temperature), f64::from(params.dynatemp_range));
    let temperature = if range > 0.0 {
        if tokens.len() < 2 {
            return;
        }
        let entropy: f64 = probabilities(tokens, 1.0).iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
        let share = (entropy / (tokens.len() as f64).ln()).powf(f64::from(params.dynatemp_exponent));
        let low = (temperature - range).max(0.0);
        low + (temperature + range - low) * share
    } else {
        temperature
    };
    if temperature <= 0.0 {
        tokens.truncate(1);
    }
    for token in tokens {
        token.1 /= if temperature > 0.0 { temperature } else { 1.0 };
    }
}

/// How many of `probabilities` it takes to reach `p`; `None` if a running sum is close to it.
fn prefix(probabilities: impl Iterator<Item = f64>, p: f32) -> Option<usize> {
    let (mut sum, mut n) = (0.0, 0);
    for probability in probabilities {
        sum += probability;
        n += 1;
        if is_close(sum, f64::from(p)) {
            return None;
        }
        if sum > f64::from(p) {
            break;
        }
    }
    Some(n)
}

pub(super) fn probabilities(tokens: &[(TokenId, f64)], temperature: f64) -> Vec<f64> {
    let top = tokens.iter().map(|token| token.1).fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = tokens.iter().map(|token| ((token.1 - top) / temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}
