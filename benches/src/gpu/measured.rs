//! A ratio that was measured several times: its middle, its spread, and how sure that is.

use serde::{Deserialize, Serialize};

use crate::stats::{median, sorted};

/// The chance that an interval misses the true median.
const MISS: f64 = 0.03;

/// Which way is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Better {
    Higher,
    Lower,
}

/// One ratio by its name, such as `cpu.decode-1`, with every value of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Measured {
    pub(super) name: String,
    pub(super) better: Better,
    /// Never empty.
    pub(super) values: Vec<f64>,
    /// How many values a round brings.
    pub(super) per_round: usize,
}

impl Measured {
    /// `None` without any value, or with one that is no number.
    pub(super) fn new(name: String, better: Better, values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().collect();
        let is_sound = !values.is_empty() && values.iter().all(|value| value.is_finite());
        is_sound.then_some(Self { name, better, values, per_round: 1 })
    }

    #[must_use]
    pub(super) fn per_round(self, per_round: usize) -> Self {
        Self { per_round, ..self }
    }

    pub(super) fn median(&self) -> f64 {
        median(self.values.iter().copied()).unwrap_or(f64::NAN)
    }

    /// The standard error that a median of `n` such values has, from their median absolute deviation: outliers do not count.
    pub(super) fn error_of_median(&self, n: usize) -> f64 {
        let middle = self.median();
        let deviation = median(self.values.iter().map(|value| (value - middle).abs())).unwrap_or(0.0);
        // 1.4826 makes it a standard deviation, and a median is less sure than a mean by 1.2533, of a normal distribution.
        1.4826 * 1.2533 * deviation / (n as f64).sqrt()
    }

    /// Where the true median lies, as sure as [`MISS`] says, whatever the distribution: between two of the sorted values.
    /// `None` while there are too few of them to say anything.
    pub(super) fn interval(&self) -> Option<(f64, f64)> {
        let values = sorted(self.values.iter().copied());
        let n = values.len();
        // The chance that at most `k` of `n` values are below their median.
        let mut term = 0.5_f64.powi(i32::try_from(n).ok()?);
        let (mut sum, mut outside) = (term, None);
        for k in 0..n / 2 {
            if 2.0 * sum > MISS {
                break;
            }
            outside = Some(k);
            term *= (n - k) as f64 / (k + 1) as f64;
            sum += term;
        }
        outside.map(|k| (values[k], values[n - 1 - k]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(values: impl IntoIterator<Item = f64>) -> Measured {
        Measured::new("x".into(), Better::Higher, values).unwrap()
    }

    #[test]
    fn intervals_are_the_tables_of_the_sign_test() {
        let interval = |n: u32| measured((1..=n).map(f64::from)).interval();
        assert_eq!(interval(1), None);
        assert_eq!(interval(6), None); // 2 / 64 is more than 3 %
        assert_eq!(interval(7), Some((1.0, 7.0))); // 2 / 128
        assert_eq!(interval(9), Some((1.0, 9.0))); // the second values miss in 20 of 512
        assert_eq!(interval(10), Some((2.0, 9.0))); // 22 of 1024
        assert_eq!(interval(25), Some((7.0, 19.0))); // 1.5 %; the next ones 4.3 %
    }

    #[test]
    fn outliers_do_not_widen_the_error() {
        let calm = measured([0.98, 0.99, 1.0, 1.01, 1.02]);
        let with_outlier = measured([0.98, 0.99, 1.0, 1.01, 9.0]);
        assert!((calm.error_of_median(4) - 1.4826 * 1.2533 * 0.01 / 2.0).abs() < 1e-9);
        assert!((with_outlier.error_of_median(4) - calm.error_of_median(4)).abs() < 1e-9);
        assert!((with_outlier.median() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn what_is_no_number_is_not_measured() {
        assert_eq!(Measured::new("x".into(), Better::Lower, []), None);
        assert_eq!(Measured::new("x".into(), Better::Lower, [1.0, f64::NAN]), None);
        assert_eq!(Measured::new("x".into(), Better::Lower, [f64::INFINITY]), None);
    }
}
