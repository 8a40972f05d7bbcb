//! How much guessing is worth: for each sequence, how long the next guess may be, if there is one at all.
//!
//! A guess costs rows, and a draft model's time, and never changes an answer: each of its tokens is sampled from the scores that it
//! would have had anyway, and the first one that differs ends it. How long a guess pays follows from how often guesses were right and
//! from what a row and a drafted token take. Who guesses is behind [`Drafter`](crate::drafter::Drafter).

use super::cost::Costs;

/// The longest guess from what the text has said before.
pub(super) const MOST_LOOKED_UP_TOKENS: usize = 12;

/// Trust in a draft model's first guess for a request.
const FIRST_TRUST: f64 = 0.7;

/// From how many equal tokens on a guess is trusted as those like it were, and at first. Three are often chance, nine are a
/// quotation: drawn at random a text has some of the first in every hundred tokens and none of the last.
const SAME_TOKENS: [(usize, f64); 3] = [(0, 0.3), (5, 0.7), (9, 0.9)];

/// Weight of the newest guess.
const LEARN: f64 = 0.15;

/// Its weight for guesses after fewer equal tokens: a text that quotes goes on quoting where it left off.
const LEARN_SHORTER: f64 = 0.05;

/// A guess below this is worth nothing.
const LEAST_TRUST: f64 = 0.05;

/// Tokens after which somebody who is not trusted may try again.
const TRY_AGAIN_TOKENS: u32 = 48;

/// A draft model that went on being too slow tries again after so many times as many.
const MOST_PATIENCE: u32 = 8;

/// Tokens of a guess that finds out whether the draft model pays, and of those before its speed is known.
const TRIAL_TOKENS: usize = 4;

/// What trying again may take of the time since the last try.
const TRIAL_SHARE: f64 = 0.05;

/// Gain of a draft model that was not measured yet, and the least that is remembered of a bad one.
const FIRST_GAIN: f64 = 1.2;
const LEAST_GAIN: f64 = 0.8;

/// How good a draft model's guesses for one sequence are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trust {
    /// The share of guessed tokens that were right, the first wrong one of each guess included.
    rate: f64,
    n_since_guess: u32,
    /// How many times as fast the sequence was with guesses than without.
    gain: f64,
    /// How many times as long it waits to try again.
    patience: u32,
}

impl Default for Trust {
    fn default() -> Self {
        Self { rate: FIRST_TRUST, n_since_guess: 0, gain: FIRST_GAIN, patience: 1 }
    }
}

impl Trust {
    /// What is known of others, for a sequence of which nothing is.
    pub(super) fn as_prior(self) -> Self {
        Self { n_since_guess: 0, patience: 1, ..self }
    }

    /// A guess was looked at: of `n_guessed` tokens the first `n_right` were right.
    pub(super) fn learn(&mut self, n_guessed: usize, n_right: usize) {
        self.n_since_guess = 0;
        learn(&mut self.rate, LEARN, n_guessed, n_right);
    }

    /// A step with a draft gave `gain` times the tokens in its time that it would have given without.
    pub(super) fn measure(&mut self, gain: f64) {
        self.n_since_guess = 0;
        let was_worth_it = self.gain >= 1.0;
        self.gain = (self.gain + LEARN * (gain - self.gain)).max(LEAST_GAIN);
        match (was_worth_it, gain >= 1.0) {
            (_, true) => self.patience = 1,
            (true, false) => {}
            (false, false) => self.patience = (self.patience * 2).min(MOST_PATIENCE),
        }
    }

    /// One more token without a guess.
    pub(super) fn pass(&mut self) {
        self.n_since_guess = self.n_since_guess.saturating_add(1);
    }

    /// How many tokens a draft model should write, at most `most`. Each of them takes its time too; a sequence that was no faster with
    /// them gets none.
    ///
    /// Another try has to be paid for: with the `behind_us` that the draft model needs to catch up it may take a twentieth of the time
    /// since the last one.
    pub(super) fn worth_drafting(
        &self,
        costs: &Costs,
        n_decode: usize,
        n_cells: u64,
        (most, behind_us): (usize, f64),
    ) -> usize {
        let Some(token_us) = costs.draft_token_us(n_decode) else { return most.min(TRIAL_TOKENS) };
        let step_us = costs.decode_us(n_decode, n_cells);
        let n = length(self.rate, costs, (n_decode, n_cells), token_us, most);
        if n > 0 && self.gain >= 1.0 {
            return n;
        }
        let takes_us = behind_us + TRIAL_TOKENS as f64 * token_us;
        let is_time = self.n_since_guess >= TRY_AGAIN_TOKENS * self.patience;
        if is_time && takes_us <= f64::from(self.n_since_guess) * step_us * TRIAL_SHARE {
            most.min(TRIAL_TOKENS)
        } else {
            0
        }
    }
}

/// How good the guesses were for one sequence that were looked up in what it has said before.
#[derive(Debug, Clone, Copy)]
pub(super) struct LookupTrust {
    /// The share of guessed tokens that were right, the first wrong one of each guess included, by [`SAME_TOKENS`]. What follows
    /// more equal tokens is never trusted less.
    rates: [f64; SAME_TOKENS.len()],
    n_since_guess: u32,
}

impl Default for LookupTrust {
    fn default() -> Self {
        Self { rates: SAME_TOKENS.map(|(_, rate)| rate), n_since_guess: 0 }
    }
}

impl LookupTrust {
    fn kind(n_same: usize) -> usize {
        SAME_TOKENS.iter().rposition(|(from, _)| n_same >= *from).unwrap_or(0)
    }

    /// A guess after `n_same` equal tokens was looked at: of `n_guessed` tokens the first `n_right` were right.
    pub(super) fn learn(&mut self, n_same: usize, n_guessed: usize, n_right: usize) {
        self.n_since_guess = 0;
        let (shorter, longer) = self.rates.split_at_mut(Self::kind(n_same));
        let Some((own, longer)) = longer.split_first_mut() else { return };
        learn(own, LEARN, n_guessed, n_right);
        for rate in shorter {
            learn(rate, LEARN_SHORTER, n_guessed, n_right);
            *rate = rate.min(*own);
        }
        for rate in longer {
            *rate = rate.max(*own);
        }
    }

    /// One more token without a guess.
    pub(super) fn pass(&mut self) {
        self.n_since_guess = self.n_since_guess.saturating_add(1);
    }

    /// How many tokens to look up after `n_same` equal ones.
    pub(super) fn worth(&self, n_same: usize, costs: &Costs, n_decode: usize, n_cells: u64) -> usize {
        let kind = Self::kind(n_same);
        let n = length(self.rates[kind], costs, (n_decode, n_cells), 0.0, MOST_LOOKED_UP_TOKENS);
        // Texts change: a single row now and then finds out.
        let may_try = kind + 1 == SAME_TOKENS.len() && self.n_since_guess >= TRY_AGAIN_TOKENS;
        if n == 0 && may_try { 1 } else { n }
    }

    /// Whether any number of equal tokens would be worth a guess: if not, there is no need to look.
    pub(super) fn is_worth_a_look(&self, costs: &Costs, n_decode: usize, n_cells: u64) -> bool {
        self.worth(usize::MAX, costs, n_decode, n_cells) > 0
    }
}

/// The share of right tokens after one more guess.
fn learn(rate: &mut f64, weight: f64, n_guessed: usize, n_right: usize) {
    for i in 0..n_guessed.min(n_right + 1) {
        let right = if i < n_right { 1.0 } else { 0.0 };
        *rate += weight * (right - *rate);
    }
}

/// The length of a guess, at most `most`, with which a step gives most tokens for its time, when each token is right with a
/// probability of `rate` and takes `token_us` to be guessed; 0 when it is best without. Rows are not alike: llama.cpp computes two
/// in twice the time of one, and eight in three times that.
fn length(rate: f64, costs: &Costs, (n_decode, n_cells): (usize, u64), token_us: f64, most: usize) -> usize {
    let n_decode = n_decode.max(1);
    let time_us = |n: usize| {
        let rows_us = costs.rows_us(n_decode + n, n_cells * (n_decode + n) as u64);
        (rows_us + n as f64 * token_us).max(1.0)
    };
    let (mut likely, mut tokens) = (1.0, n_decode as f64);
    let (mut best, mut best_speed) = (0, tokens / time_us(0));
    for n in 1..=most {
        likely *= rate;
        if likely < LEAST_TRUST {
            break;
        }
        tokens += likely;
        let speed = tokens / time_us(n);
        if speed > best_speed {
            (best, best_speed) = (n, speed);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::super::cost::Work;
    use super::*;

    fn costs(one_us: u64, row_us: u64) -> Costs {
        let mut costs = Costs::default();
        for n_decode in [1, 2, 4, 8, 4, 2, 1] {
            costs.learn(Work { n_decode, ..Work::default() }, one_us + row_us * (n_decode as u64 - 1));
        }
        costs
    }

    #[test]
    fn guesses_are_as_long_as_they_pay() {
        let mut trust = LookupTrust::default();
        let (cheap, dear) = (costs(10_000, 500), costs(10_000, 9_900));
        assert!(trust.worth(5, &cheap, 1, 0) >= 4, "{}", trust.worth(5, &cheap, 1, 0));
        assert!(!trust.is_worth_a_look(&dear, 1, 0));
        for _ in 0..20 {
            trust.learn(20, 4, 0);
        }
        assert_eq!(trust.worth(20, &cheap, 1, 0), 0, "nobody trusts who is always wrong");
        assert_eq!(trust.worth(3, &cheap, 1, 0), 0, "and fewer equal tokens are not trusted more");
        (0..TRY_AGAIN_TOKENS).for_each(|_| trust.pass());
        assert_eq!(trust.worth(20, &cheap, 1, 0), 1, "but he may try again");
        assert_eq!(trust.worth(3, &cheap, 1, 0), 0);
        for _ in 0..20 {
            trust.learn(3, 1, 1);
        }
        assert_eq!([3, 20].map(|n_same| trust.worth(n_same, &cheap, 1, 0)), [MOST_LOOKED_UP_TOKENS; 2]);
    }

    #[test]
    fn what_follows_few_equal_tokens_is_not_guessed_where_rows_are_dear() {
        // As a processor of two cores: two rows take twice as long as one, eight four and a half times.
        let mut costs = Costs::default();
        for (n_decode, step_us) in [(1, 10_000), (2, 19_000), (8, 46_000), (13, 50_000)] {
            costs.learn(Work { n_decode, ..Work::default() }, step_us);
        }
        for _ in 0..100 {
            costs.learn(Work { n_decode: 1, ..Work::default() }, 10_000); // and this is not forgotten
        }
        let trust = LookupTrust::default();
        assert_eq!(trust.worth(3, &costs, 1, 0), 0);
        assert!(trust.worth(9, &costs, 1, 0) >= 8, "{}", trust.worth(9, &costs, 1, 0));
    }

    #[test]
    fn drafts_get_shorter_as_the_draft_model_gets_slower() {
        let (trust, mut costs) = (Trust::default(), costs(10_000, 500));
        assert_eq!(trust.worth_drafting(&costs, 1, 0, (16, 0.0)), TRIAL_TOKENS, "nobody knows yet");
        let mut longest = usize::MAX;
        for token_us in [100, 2_000, 6_000, 20_000] {
            (0..50).for_each(|_| costs.learn_draft(4, 4, 4 * token_us));
            let n = trust.worth_drafting(&costs, 1, 0, (16, 0.0));
            assert!(n <= longest, "{token_us} us a token, {n} tokens");
            longest = n;
        }
        assert_eq!(longest, 0, "a draft token that takes twice a step is worth nothing");
    }

    #[test]
    fn a_try_that_takes_long_to_catch_up_is_put_off_until_it_is_a_small_part_of_the_time() {
        let (mut trust, mut costs) = (Trust::default(), costs(10_000, 500));
        costs.learn_draft(4, 4, 400);
        (0..20).for_each(|_| trust.measure(0.7));
        (0..1000).for_each(|_| trust.pass());
        let twentieth_us = 1000.0 * 10_000.0 / 20.0;
        assert_eq!(trust.worth_drafting(&costs, 1, 0, (16, twentieth_us * 1.1)), 0);
        assert_eq!(trust.worth_drafting(&costs, 1, 0, (16, twentieth_us * 0.9)), TRIAL_TOKENS);
    }

    #[test]
    fn a_sequence_that_is_no_faster_gets_no_drafts_and_tries_again_more_and_more_seldom() {
        let (mut trust, mut costs) = (Trust::default(), costs(10_000, 500));
        costs.learn_draft(4, 4, 400);
        assert!(trust.worth_drafting(&costs, 1, 0, (16, 0.0)) > TRIAL_TOKENS);
        (0..20).for_each(|_| trust.measure(0.7));
        let mut waits = Vec::new();
        for _ in 0..6 {
            let mut wait = 0;
            while trust.worth_drafting(&costs, 1, 0, (16, 0.0)) == 0 {
                trust.pass();
                wait += 1;
            }
            waits.push(wait);
            trust.measure(0.7);
        }
        assert!(waits.is_sorted() && waits[0] >= TRY_AGAIN_TOKENS, "{waits:?}");
        assert_eq!(waits.last(), Some(&(TRY_AGAIN_TOKENS * MOST_PATIENCE)));
        (0..4).for_each(|_| trust.measure(3.0));
        assert!(trust.worth_drafting(&costs, 1, 0, (16, 0.0)) > TRIAL_TOKENS, "it pays again");
    }
}
