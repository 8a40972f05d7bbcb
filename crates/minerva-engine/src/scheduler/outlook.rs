//! When those who wait will begin: their places in the queue, and an estimate from what steps cost and how long answers were.
//!
//! The estimate plays the queue forward: each seat is busy until its request is done, the next in order takes the seat that is free
//! first. A request takes a seat for as long as its expected tokens take to decode and, since prompts are computed one behind the other,
//! as long as the prompts of all seats take meanwhile.

use super::job::RequestId;
use super::{Scheduler, Seats};

/// How much of the mean a new answer counts.
const FADE: f64 = 0.1;

/// Where a request is that has not begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The request.
    pub id: RequestId,
    /// How many are to begin before it, and itself: 1 is next.
    pub position: u32,
    /// When it will begin, from now, in microseconds; `None` until there was a step to learn from.
    pub estimate_us: Option<u64>,
}

/// What an answer is taken to have before one has ended, where a wrong guess costs little.
const FIRST_ANSWER_TOKENS: f64 = 256.0;

/// The least that a sequence is taken to go on for.
const LEAST_TO_COME: f64 = 4.0;

/// The length of answers, learned from those that ended.
#[derive(Debug, Default)]
pub(super) struct Answers {
    mean_tokens: Option<f64>,
}

impl Answers {
    pub(super) fn learn(&mut self, n_tokens: usize) {
        let n_tokens = n_tokens as f64;
        self.mean_tokens = Some(self.mean_tokens.map_or(n_tokens, |mean| mean + FADE * (n_tokens - mean)));
    }

    /// The tokens that an answer of at most `most` will have.
    fn expect(&self, most: usize) -> f64 {
        self.mean_tokens.unwrap_or(f64::INFINITY).min(most as f64)
    }

    /// The tokens that an answer of so many is taken to go on for. One that is longer than others were may become much longer: half of
    /// what answers usually have is always to come.
    pub(super) fn to_come(&self, n_answered: usize) -> usize {
        let mean = self.mean_tokens.unwrap_or(FIRST_ANSWER_TOKENS);
        (mean - n_answered as f64).max(mean / 2.0).max(LEAST_TO_COME) as usize
    }
}

/// What things take, in microseconds.
struct Pace {
    prompt_token_us: f64,
    step_us: f64,
}

impl Scheduler {
    /// The requests that have not begun, next one first. Those that wait to go on count as places before others, and are not listed.
    pub fn outlook(&self, now_us: u64) -> Vec<Place> {
        let order = self.queue.in_order(now_us, |client| self.seats.n_running(client));
        let pace = self.pace();
        let mut free_at = pace.as_ref().map_or_else(Vec::new, |pace| self.free_at(pace));
        let n_seats = free_at.len().max(1) as f64;
        let mut places = Vec::new();
        for (waiting, position) in order.into_iter().zip(1..) {
            let job = &waiting.job;
            let estimate_us = pace.as_ref().map(|pace| {
                free_at.sort_unstable_by(f64::total_cmp);
                let n = (job.n as usize).clamp(1, free_at.len());
                let begin = free_at[n - 1];
                let prompt_us = job.prompt.len() as f64 * pace.prompt_token_us * n_seats;
                let answer_us = self.seats.claims.answers.expect(job.max_tokens as usize) * pace.step_us;
                free_at[..n].fill(begin + prompt_us + answer_us);
                begin as u64
            });
            if waiting.resume.is_none() {
                places.push(Place { id: job.id, position, estimate_us });
            }
        }
        places
    }

    fn pace(&self) -> Option<Pace> {
        let (n_busy, n_cells) =
            self.seats.busy().fold((0, 0), |(n, cells), (_, seat)| (n + 1, cells + u64::from(seat.n_cells())));
        let mean_cells = n_cells as f64 / f64::from(n_busy).max(1.0);
        // Prompts that are too short to learn from cost next to nothing.
        let prompt_token_us = self.budget.costs().prefill_token_us(mean_cells / 2.0).unwrap_or(0.0);
        let step_us = self.budget.costs().decode_us(n_busy.max(1) as usize, n_cells);
        (step_us > 0.0).then_some(Pace { prompt_token_us, step_us })
    }

    /// When each seat will be free, from now; never none.
    fn free_at(&self, pace: &Pace) -> Vec<f64> {
        let seats: &Seats = &self.seats;
        let n_unfinished: usize = seats.busy().map(|(_, seat)| seat.n_prompt_left()).sum();
        let prompts_us = n_unfinished as f64 * pace.prompt_token_us;
        let busy = seats.busy().map(|(_, seat)| {
            let n_answered = seat.n_answered();
            let expected = self.seats.claims.answers.expect(n_answered + seat.n_left());
            // One that is longer than others were is about to end, as far as anybody knows.
            prompts_us + (expected - n_answered as f64).max(1.0) * pace.step_us
        });
        let mut free_at: Vec<f64> = busy.collect();
        // With one pool a seat may be free and its cells promised to others: somebody has to end first.
        if !self.limits.unified || free_at.is_empty() {
            free_at.resize(self.limits.n_seq_max as usize, 0.0);
        }
        free_at
    }
}
