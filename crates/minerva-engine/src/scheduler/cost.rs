//! What a step costs, learned from past ones: the time of a decoding step by its rows and by the cells that these look at, and
//! that of a prompt's token by its place.

/// What a step computes, as far as its time depends on it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Sequences that get one token.
    pub n_decode: usize,
    /// Cells of all of these.
    pub n_decode_cells: u64,
    /// Tokens of prompts.
    pub n_prefill: usize,
    /// The mean place of these in their sequences.
    pub prefill_pos: f64,
}

/// Steps with fewer prompt tokens than this say little about what one costs.
pub(super) const MIN_PREFILL_TOKENS: usize = 16;

/// So many steps with prompts say what prompts take, as long as it is known what the decoding beside them does.
const MOST_MIXED: u32 = 48;

/// Lines by the number of sequences, four for each doubling: 24 sequences take a quarter more than 16, and who takes them for equal
/// gives prompts half of the time that is theirs.
const N_BUCKETS: usize = 32;

/// The learned costs.
#[derive(Debug, Default)]
pub(super) struct Costs {
    /// Time of a step that only decodes over its cells, in microseconds.
    decode: [Line; N_BUCKETS],
    /// Steps since the last that only decoded, where others have decoded beside prompts since.
    steps_mixed: [u32; N_BUCKETS],
    /// Time of one prompt token over its place.
    prefill: Line,
    /// Time in which a draft model writes one more token of each guess, over the guesses.
    draft: Line,
    /// Time of a token that a draft model is behind by, over nothing.
    feed: Line,
}

impl Costs {
    pub(super) fn learn(&mut self, work: Work, step_us: u64) {
        let step_us = step_us as f64;
        if work.n_decode > 0 {
            let n_mixed = &mut self.steps_mixed[bucket(work.n_decode)];
            *n_mixed = if work.n_prefill == 0 { 0 } else { n_mixed.saturating_add(1) };
        }
        if work.n_prefill == 0 {
            self.decode[bucket(work.n_decode)].learn(work.n_decode_cells as f64, step_us);
        } else if work.n_prefill >= MIN_PREFILL_TOKENS {
            let decode_us = self.decode_us(work.n_decode, work.n_decode_cells);
            self.prefill.learn(work.prefill_pos, (step_us - decode_us).max(0.0) / work.n_prefill as f64);
        }
    }

    /// The time of a step that decodes so many sequences with so many cells: by the nearest number that was measured, fewer before
    /// more. 0 while nothing is known.
    pub(super) fn decode_us(&self, n_decode: usize, n_cells: u64) -> f64 {
        if n_decode == 0 {
            return 0.0;
        }
        let at = bucket(n_decode);
        let (below, above) = (self.decode[..=at].iter().rev(), self.decode[at..].iter());
        below.chain(above).find_map(|line| line.at(n_cells as f64)).unwrap_or(0.0)
    }

    /// Whether it is not known, or not any more, what a step takes that decodes about so many sequences and nothing else.
    pub(super) fn decode_is_unknown(&self, n_decode: usize) -> bool {
        let at = bucket(n_decode);
        self.decode[at].weight <= 0.0 || self.steps_mixed[at] >= MOST_MIXED
    }

    /// The time of a step that decodes so many rows with so many cells, guesses among them: between two numbers that were measured
    /// on the straight line, elsewhere that of the nearest. 0 while nothing is known.
    pub(super) fn rows_us(&self, n_rows: usize, n_cells: u64) -> f64 {
        let at = bucket(n_rows);
        let time_us = |bucket: usize| self.decode[bucket].at(n_cells as f64);
        let below = (0..=at).rev().find_map(|bucket| Some((bucket, time_us(bucket)?)));
        let above = (at + 1..N_BUCKETS).find_map(|bucket| Some((bucket, time_us(bucket)?)));
        match (below, above) {
            (Some((low, low_us)), Some((high, high_us))) if low < at => {
                let (low, high) = (rows_of(low), rows_of(high));
                low_us + (high_us - low_us) * (n_rows as f64 - low) / (high - low)
            }
            (Some((_, us)), _) | (None, Some((_, us))) => us,
            (None, None) => 0.0,
        }
    }

    /// A draft model took so many rounds for a token of each guess; the guesses of all rounds are counted.
    pub(super) fn learn_draft(&mut self, n_rounds: u32, n_guesses: u32, all_us: u64) {
        if n_rounds > 0 {
            let n_rounds = f64::from(n_rounds);
            self.draft.learn(f64::from(n_guesses) / n_rounds, all_us as f64 / n_rounds);
        }
    }

    /// A draft model computed tokens that it was behind by.
    pub(super) fn learn_feed(&mut self, n_tokens: u32, all_us: u64) {
        if n_tokens > 0 {
            self.feed.learn(0.0, all_us as f64 / f64::from(n_tokens));
        }
    }

    /// What one more token of a guess takes of a draft model's time, where so many sequences get a guess; `None` while nothing is known.
    pub(super) fn draft_token_us(&self, n_guesses: usize) -> Option<f64> {
        let n_guesses = n_guesses.max(1) as f64;
        self.draft.at(n_guesses).map(|round_us| round_us / n_guesses)
    }

    /// What a draft model takes for a token that it is behind by; `None` while nothing is known.
    pub(super) fn feed_token_us(&self) -> Option<f64> {
        self.feed.at(0.0).filter(|&us| us > 0.0)
    }

    /// The time of a prompt's token at a place; `None` while nothing is known.
    pub(super) fn prefill_token_us(&self, pos: f64) -> Option<f64> {
        self.prefill.at(pos).filter(|&us| us > 0.0)
    }
}

fn bucket(n_decode: usize) -> usize {
    let n = n_decode.max(1);
    let octave = n.ilog2() as usize;
    let quarter = ((n << 2) >> octave) & 3;
    (4 * octave + quarter).min(N_BUCKETS - 1)
}

/// The least number of rows in a bucket.
fn rows_of(bucket: usize) -> f64 {
    let octave = 1_u32 << (bucket / 4);
    f64::from(octave) * (1.0 + (bucket % 4) as f64 / 4.0)
}

/// A line through recent measurements: least squares, with weights that fade.
#[derive(Debug, Clone, Copy, Default)]
struct Line {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Line {
    /// What a measurement still weighs after the next one.
    const FADE: f64 = 0.9;
    /// One measurement counts as no more than so many times what was expected: a step that the system held up is not the rule.
    const OUTLIER: f64 = 4.0;
    /// However far away, an estimate is at least this share of the mean.
    const FLOOR: f64 = 0.25;

    fn learn(&mut self, x: f64, y: f64) {
        let y = match self.at(x) {
            Some(expected) if self.weight > 3.0 && expected > 0.0 => y.min(expected * Self::OUTLIER),
            _ => y,
        };
        for sum in [&mut self.weight, &mut self.x, &mut self.y, &mut self.xx, &mut self.xy] {
            *sum *= Self::FADE;
        }
        self.weight += 1.0;
        self.x += x;
        self.y += y;
        self.xx += x * x;
        self.xy += x * y;
    }

    fn at(&self, x: f64) -> Option<f64> {
        if self.weight <= 0.0 {
            return None;
        }
        let (mean_x, mean_y) = (self.x / self.weight, self.y / self.weight);
        Some(self.slope().mul_add(x - mean_x, mean_y).max(mean_y * Self::FLOOR))
    }

    /// What one more of `x` adds; never below 0, and 0 where measurements lie too close to each other to say.
    fn slope(&self) -> f64 {
        if self.weight <= 0.0 {
            return 0.0;
        }
        let (mean_x, mean_y) = (self.x / self.weight, self.y / self.weight);
        let variance = self.xx / self.weight - mean_x * mean_x;
        if variance > (0.05 * mean_x).powi(2).max(0.1) {
            ((self.xy / self.weight - mean_x * mean_y) / variance).max(0.0)
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_in_noise_and_follows_when_it_changes() {
        let mut line = Line::default();
        assert_eq!(line.at(5.0), None);
        for i in 0..200_i32 {
            let x = f64::from(i % 10) * 100.0;
            line.learn(x, 50.0 + 0.5 * x + if i % 2 == 0 { 3.0 } else { -3.0 });
        }
        assert!((line.at(2000.0).unwrap() - 1050.0).abs() < 40.0, "{line:?}");
        line.learn(0.0, 1e9); // a step that the system held up
        assert!(line.at(0.0).unwrap() < 250.0, "{line:?}");
        for i in 0..100_i32 {
            line.learn(f64::from(i % 10) * 100.0, 10.0);
        }
        assert!((line.at(500.0).unwrap() - 10.0).abs() < 1.0, "{line:?}");
    }

    #[test]
    fn costs_are_taken_from_the_nearest_number_of_sequences() {
        let mut costs = Costs::default();
        assert_eq!((costs.decode_us(4, 100), costs.prefill_token_us(0.0)), (0.0, None));
        let decode = |n_decode| Work { n_decode, n_decode_cells: 100, ..Work::default() };
        costs.learn(decode(1), 10_000);
        costs.learn(decode(16), 40_000);
        assert_eq!([1, 2, 8, 16, 31, 32].map(|n| costs.decode_us(n, 100) as u64 / 1000), [10, 10, 10, 40, 40, 40]);
        costs.learn(Work { n_prefill: 100, prefill_pos: 50.0, ..decode(1) }, 60_000);
        assert_eq!(costs.prefill_token_us(50.0), Some(500.0));
    }

    #[test]
    fn rows_between_two_measurements_take_what_lies_between() {
        let mut costs = Costs::default();
        assert!(costs.rows_us(1, 0) <= 0.0);
        for n_decode in [1, 2, 3, 4, 5, 7, 8, 10, 31, 64] {
            assert!(rows_of(bucket(n_decode)) <= n_decode as f64 && rows_of(bucket(n_decode) + 1) > n_decode as f64);
        }
        for (n_decode, step_us) in [(1, 10_000), (8, 45_000)] {
            costs.learn(Work { n_decode, ..Work::default() }, step_us);
        }
        for _ in 0..200 {
            costs.learn(Work { n_decode: 1, ..Work::default() }, 10_000);
        }
        assert_eq!(
            [1, 2, 5, 8, 9, 12].map(|n| (costs.rows_us(n, 0) / 1000.0).round() as u64),
            [10, 15, 30, 45, 45, 45]
        );
    }

    #[test]
    fn what_decoding_takes_is_unknown_again_after_many_steps_with_prompts() {
        let mut costs = Costs::default();
        let mixed = Work { n_decode: 20, n_prefill: 16, ..Work::default() };
        costs.learn(Work { n_prefill: 0, ..mixed }, 100_000);
        assert!(costs.decode_is_unknown(32), "20 streams say little of 32");
        for _ in 0..MOST_MIXED {
            assert!(!costs.decode_is_unknown(20));
            costs.learn(mixed, 150_000);
        }
        assert!(costs.decode_is_unknown(20));
        costs.learn(Work { n_prefill: 0, ..mixed }, 100_000);
        assert!(!costs.decode_is_unknown(20));
    }
}
