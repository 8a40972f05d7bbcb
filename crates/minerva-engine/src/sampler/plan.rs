//! The stages of one request as the steps that each of its draws takes: what is switched off or cannot matter is left out.

use super::params::SamplingParams;
use super::stage::SamplerStage;

/// One step of a draw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Step {
    Penalties,
    Dry,
    TopNSigma(f32),
    TopK(usize),
    TypicalP(f32),
    /// `then_min_p` is the parameter of a `min_p` right behind it that may cut the row first; 0 is none.
    TopP {
        p: f32,
        then_min_p: f32,
    },
    MinP(f32),
    Xtc {
        probability: f32,
        threshold: f32,
    },
    Temperature(f32),
    DynamicTemperature {
        low: f32,
        high: f32,
        exponent: f32,
    },
    /// The best token is chosen, so nothing follows.
    Best,
}

impl Step {
    /// Whether the best token stays and no logit changes.
    fn keeps_the_best(self) -> bool {
        matches!(self, Self::TopNSigma(_) | Self::TopK(_) | Self::TopP { .. } | Self::MinP(_))
    }
}

/// The steps for `params`, in their order.
pub(super) fn plan(params: &SamplingParams) -> Vec<Step> {
    const MIROSTAT: &[SamplerStage] = &[SamplerStage::Temperature];
    let order = if params.mirostat == 0 { &params.samplers } else { MIROSTAT };
    let mut steps: Vec<Step> = Vec::with_capacity(order.len());
    for &stage in order {
        let Some(step) = step(stage, params) else { continue };
        if let (Step::MinP(p), Some(Step::TopP { then_min_p, .. }), 0..=1) = (step, steps.last_mut(), params.min_keep) {
            *then_min_p = p;
        }
        if step == Step::Best {
            // The best of a set is the best of what is left of it.
            while steps.last().is_some_and(|last| last.keeps_the_best()) {
                steps.pop();
            }
            steps.push(step);
            break;
        }
        steps.push(step);
    }
    steps
}

fn step(stage: SamplerStage, params: &SamplingParams) -> Option<Step> {
    let &SamplingParams { temperature, top_p, min_p, typical_p, top_n_sigma, dynatemp_range, .. } = params;
    match stage {
        SamplerStage::Penalties => params.has_penalties().then_some(Step::Penalties),
        SamplerStage::Dry => params.has_dry().then_some(Step::Dry),
        SamplerStage::TopNSigma => (top_n_sigma > 0.0).then_some(Step::TopNSigma(top_n_sigma)),
        SamplerStage::TopK => usize::try_from(params.top_k).ok().filter(|k| *k > 0).map(Step::TopK),
        SamplerStage::TypicalP => (typical_p < 1.0).then_some(Step::TypicalP(typical_p)),
        SamplerStage::TopP => (top_p < 1.0).then_some(Step::TopP { p: top_p, then_min_p: 0.0 }),
        SamplerStage::MinP => (min_p > 0.0).then_some(Step::MinP(min_p)),
        SamplerStage::Xtc => {
            let (probability, threshold) = (params.xtc_probability, params.xtc_threshold);
            (probability > 0.0 && threshold <= 0.5).then_some(Step::Xtc { probability, threshold })
        }
        // Mirostat has the plain temperature.
        SamplerStage::Temperature if dynatemp_range > 0.0 && params.mirostat == 0 => Some(Step::DynamicTemperature {
            low: (temperature - dynatemp_range).max(0.0),
            high: temperature + dynatemp_range,
            exponent: params.dynatemp_exponent,
        }),
        SamplerStage::Temperature if temperature <= 0.0 => Some(Step::Best),
        SamplerStage::Temperature => Some(Step::Temperature(temperature)),
        SamplerStage::AdaptiveP => None, // it is the draw: `draw::Draw`
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_switched_off_takes_no_step() {
        let defaults = SamplingParams::default();
        let steps =
            [Step::TopK(40), Step::TopP { p: 0.95, then_min_p: 0.05 }, Step::MinP(0.05), Step::Temperature(0.8)];
        assert_eq!(plan(&defaults), steps);
        let off = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..defaults.clone() };
        assert_eq!(plan(&off), [Step::Temperature(1.0)]);
        assert_eq!(plan(&SamplingParams { samplers: Vec::new(), ..defaults.clone() }), []);
        assert_eq!(plan(&SamplingParams { mirostat: 2, ..defaults }), [Step::Temperature(0.8)]);
    }

    #[test]
    fn greedy_skips_filters_that_keep_the_best_and_no_others() {
        let greedy = SamplingParams::greedy();
        assert_eq!(plan(&greedy), [Step::Best]);
        let typical = SamplingParams { typical_p: 0.5, ..greedy.clone() };
        assert_eq!(plan(&typical), [Step::TopK(40), Step::TypicalP(0.5), Step::Best]);
        let late = vec![SamplerStage::TopK, SamplerStage::Penalties, SamplerStage::Temperature, SamplerStage::TopP];
        let penalised = SamplingParams { presence_penalty: 1.0, samplers: late, ..greedy.clone() };
        assert_eq!(plan(&penalised), [Step::TopK(40), Step::Penalties, Step::Best]);
        let moving = SamplingParams { dynatemp_range: 0.5, samplers: vec![SamplerStage::Temperature], ..greedy };
        assert_eq!(plan(&moving), [Step::DynamicTemperature { low: 0.0, high: 0.5, exponent: 1.0 }]);
    }

    #[test]
    fn min_p_cuts_before_top_p_only_where_nothing_lies_between_and_nothing_has_to_be_kept() {
        let order = |samplers: &[SamplerStage], min_keep| SamplingParams {
            samplers: samplers.to_vec(),
            min_keep,
            ..SamplingParams::default()
        };
        let then_min_p = |params: &SamplingParams| match plan(params)[..] {
            [Step::TopP { then_min_p, .. }, ..] => then_min_p,
            ref steps => panic!("{steps:?}"),
        };
        let [top_p, min_p, temperature] = [SamplerStage::TopP, SamplerStage::MinP, SamplerStage::Temperature];
        assert!(then_min_p(&order(&[top_p, min_p], 1)) > 0.0);
        assert!(then_min_p(&order(&[top_p, min_p], 2)) <= 0.0);
        assert!(then_min_p(&order(&[top_p, temperature, min_p], 0)) <= 0.0);
    }
}
