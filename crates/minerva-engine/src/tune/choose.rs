//! What wins: pure functions from measurements to a choice.
//!
//! Rates of one candidate are compared with those of the base in the same round, so that a machine that slows down slows both. The
//! score is the geometric mean of these ratios over the kinds of work. A candidate wins with a score above 1 by more than the
//! noise, and if no kind of work becomes slower: a cache that is faster while it is empty must not be taken for long contexts.

use std::collections::BTreeMap;

use super::Rates;

/// A kind of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Work {
    /// One sequence decodes.
    Alone,
    /// Many sequences decode.
    Many,
    /// One sequence with a long context decodes.
    Long,
    /// A prompt is computed.
    Prefill,
    /// Many sequences behind one beginning decode.
    Shared,
}

impl Work {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Many => "many",
            Self::Long => "a long context",
            Self::Prefill => "a prompt",
            Self::Shared => "a shared beginning",
        }
    }

    /// Its part in the score. Many clients are what a server is for, so they count as much as a single one and a long one
    /// together; a prompt is computed once and its answer token by token.
    fn weight(self) -> f64 {
        if self == Self::Many { 2.0 } else { 1.0 }
    }
}

/// The least gain worth a change: two runs of the same settings differ by as much on a quiet machine.
pub(crate) const LEAST_GAIN: f64 = 0.03;
/// By how much a single kind of work may look slower and still be as fast.
pub(crate) const MOST_LOSS: f64 = 0.03;
/// The same where there is one round only, which a neighbour's moment can spoil.
pub(crate) const MOST_LOSS_OF_ONE: f64 = 0.1;

/// Rates of one candidate and of the base beside it, round by round.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Comparison {
    samples: BTreeMap<Work, Vec<Pair>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Pair {
    base: f64,
    own: f64,
}

/// What comes of a comparison.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Verdict {
    /// Better by more than the noise.
    Better,
    /// Not better, or by less than the noise.
    NoBetter,
    /// Slower.
    Slower,
    /// Better on the whole, but this kind of work is slower.
    SlowerAt(Work),
    /// Nothing was measured.
    Unknown,
}

impl Comparison {
    /// One round of one kind of work, in tokens per second. What is no rate is left out.
    pub(crate) fn add(&mut self, work: Work, base: f64, own: f64) {
        let is_rate = |rate: f64| rate.is_finite() && rate > 0.0;
        if is_rate(base) && is_rate(own) {
            self.samples.entry(work).or_default().push(Pair { base, own });
        }
    }

    /// What both comparisons measured.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (work, pairs) in &other.samples {
            self.samples.entry(*work).or_default().extend(pairs);
        }
    }

    /// The median ratio to the base of one kind of work.
    fn ratio(&self, work: Work) -> Option<f64> {
        median(self.samples.get(&work)?.iter().map(Pair::ratio))
    }

    /// The geometric mean of the ratios over the kinds of work that were measured.
    pub(crate) fn score(&self) -> Option<f64> {
        let parts = self.samples.keys().filter_map(|&work| Some((work.weight(), self.ratio(work)?.ln())));
        let (weights, sum) = parts.fold((0.0, 0.0), |(w, s), (weight, log)| (w + weight, s + weight * log));
        (weights > 0.0).then(|| (sum / weights).exp())
    }

    /// How far the score may be from the truth, judged by how far the rounds are from each other.
    fn noise(&self) -> f64 {
        let parts = self.samples.iter().filter_map(|(&work, pairs)| {
            let middle = self.ratio(work)?;
            let off = median(pairs.iter().map(|pair| (pair.ratio() / middle - 1.0).abs()))?;
            Some((work.weight(), off / (pairs.len() as f64).sqrt()))
        });
        let (weights, sum) = parts.fold((0.0, 0.0), |(w, s), (weight, off)| (w + weight, s + weight * off));
        if weights > 0.0 { 2.0 * sum / weights } else { 0.0 }
    }

    pub(crate) fn verdict(&self) -> Verdict {
        let Some(score) = self.score() else { return Verdict::Unknown };
        if score < 1.0 - LEAST_GAIN {
            return Verdict::Slower;
        }
        if score < 1.0 + LEAST_GAIN.max(self.noise()) {
            return Verdict::NoBetter;
        }
        let is_slower = |work: Work, n_rounds: usize| {
            let most_loss = if n_rounds > 1 { MOST_LOSS } else { MOST_LOSS_OF_ONE };
            self.ratio(work).is_some_and(|ratio| ratio < 1.0 - most_loss)
        };
        let slower = self.samples.iter().find(|(work, pairs)| is_slower(**work, pairs.len()));
        slower.map_or(Verdict::Better, |(&work, _)| Verdict::SlowerAt(work))
    }

    /// The candidate's median rates.
    pub(crate) fn rates(&self) -> Rates {
        self.rates_of(|pair| pair.own)
    }

    /// The base's median rates beside this candidate.
    pub(crate) fn base_rates(&self) -> Rates {
        self.rates_of(|pair| pair.base)
    }

    fn rates_of(&self, side: impl Fn(&Pair) -> f64) -> Rates {
        let of = |work: Work| median(self.samples.get(&work)?.iter().map(&side));
        Rates {
            alone: of(Work::Alone),
            many: of(Work::Many),
            long: of(Work::Long),
            prefill: of(Work::Prefill),
            shared: of(Work::Shared),
        }
    }
}

impl Pair {
    fn ratio(&self) -> f64 {
        self.own / self.base
    }
}

/// The positions of those that are better, the best first.
pub(crate) fn ranking(comparisons: &[Comparison]) -> Vec<usize> {
    let mut better: Vec<usize> =
        (0..comparisons.len()).filter(|&i| comparisons[i].verdict() == Verdict::Better).collect();
    let score = |&i: &usize| comparisons[i].score().unwrap_or(0.0);
    better.sort_by(|a, b| score(b).total_cmp(&score(a)));
    better
}

/// The middle one; between two of them, their mean.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 0 => Some(f64::midpoint(values[middle - 1], values[middle])),
        _ => Some(values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn comparison(rounds: &[(Work, f64, f64)]) -> Comparison {
        let mut comparison = Comparison::default();
        for &(work, base, own) in rounds {
            comparison.add(work, base, own);
        }
        comparison
    }

    #[test]
    fn a_gain_within_the_noise_changes_nothing() {
        let steady = comparison(&[(Work::Alone, 100.0, 108.0), (Work::Alone, 100.0, 109.0), (Work::Alone, 90.0, 97.0)]);
        assert_eq!(steady.verdict(), Verdict::Better);
        let small = comparison(&[(Work::Alone, 100.0, 102.0), (Work::Alone, 100.0, 102.0)]);
        assert_eq!(small.verdict(), Verdict::NoBetter);
        let wild = comparison(&[(Work::Alone, 100.0, 130.0), (Work::Alone, 100.0, 88.0)]);
        assert_eq!(wild.verdict(), Verdict::NoBetter, "{} {}", wild.score().unwrap(), wild.noise());
        assert_eq!(comparison(&[(Work::Many, 100.0, 80.0)]).verdict(), Verdict::Slower);
        assert_eq!(comparison(&[(Work::Many, 0.0, 80.0), (Work::Many, 9.0, f64::NAN)]).verdict(), Verdict::Unknown);
    }

    #[test]
    fn what_wins_only_while_the_cache_is_empty_does_not_win() {
        let mut short = comparison(&[(Work::Alone, 100.0, 130.0), (Work::Many, 400.0, 520.0)]);
        assert_eq!(short.verdict(), Verdict::Better);
        short.merge(&comparison(&[(Work::Long, 60.0, 40.0)]));
        assert_eq!(short.verdict(), Verdict::SlowerAt(Work::Long));
    }

    #[test]
    fn the_whole_machine_slowing_down_is_no_difference() {
        let rounds = [(Work::Many, 400.0, 400.0), (Work::Many, 100.0, 100.0), (Work::Many, 250.0, 250.0)];
        let same = comparison(&rounds);
        assert_eq!((same.verdict(), same.score()), (Verdict::NoBetter, Some(1.0)));
    }

    #[test]
    fn the_best_comes_first() {
        let all: Vec<_> = [1.1, 0.8, 1.3, 1.01].map(|ratio| comparison(&[(Work::Alone, 50.0, 50.0 * ratio)])).into();
        assert_eq!(ranking(&all), [2, 0]);
        assert!(ranking(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn whatever_wins_was_slower_at_nothing_and_faster_on_the_whole(
            rounds in proptest::collection::vec((0_usize..5, 0.0..2000.0_f64, 0.0..2000.0_f64), 0..40)
        ) {
            let works = [Work::Alone, Work::Many, Work::Long, Work::Prefill, Work::Shared];
            let rounds: Vec<_> = rounds.into_iter().map(|(work, base, own)| (works[work], base, own)).collect();
            let comparison = comparison(&rounds);
            if comparison.verdict() == Verdict::Better {
                prop_assert!(comparison.score().unwrap() >= 1.0 + LEAST_GAIN);
                for work in works {
                    let ratios = rounds.iter().filter(|(w, base, own)| *w == work && *base > 0.0 && *own > 0.0);
                    let ratios: Vec<f64> = ratios.map(|(_, base, own)| own / base).collect();
                    let most_loss = if ratios.len() > 1 { MOST_LOSS } else { MOST_LOSS_OF_ONE };
                    prop_assert!(median(ratios.into_iter()).is_none_or(|ratio| ratio >= 1.0 - most_loss));
                }
            }
        }
    }
}
