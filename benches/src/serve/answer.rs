//! What one request saw, and the figures of one round made of it.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::footprint::Footprint;
use super::workload::{Beside, Leave};
use crate::stats;

/// What one request saw; times are milliseconds since the round began.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Answer {
    /// One of the long prompts beside the streams.
    pub(super) is_long: bool,
    pub(super) start_ms: f64,
    /// When each piece of text came.
    pub(super) pieces_ms: Vec<f64>,
    pub(super) end_ms: f64,
    /// As the server counts them; `None` from a server that does not say.
    pub(super) prompt_tokens: Option<u32>,
    pub(super) cached_tokens: Option<u32>,
    pub(super) completion_tokens: Option<u32>,
    /// The client left on purpose.
    pub(super) has_left: bool,
    pub(super) error: Option<String>,
}

impl Answer {
    /// The server's count, or the pieces of text where there is none.
    fn tokens(&self) -> f64 {
        self.completion_tokens.map_or(self.pieces_ms.len() as f64, f64::from)
    }

    /// Notes a piece of text. `true` when the client leaves now.
    pub(super) fn piece(&mut self, clock: Instant, leave: Option<Leave>) -> bool {
        self.pieces_ms.push(since_ms(clock));
        self.has_left = leave == Some(Leave::AtPiece(self.pieces_ms.len()));
        self.has_left
    }
}

/// Milliseconds since `clock`, to the microsecond.
pub(super) fn since_ms(clock: Instant) -> f64 {
    clock.elapsed().as_micros() as f64 / 1e3
}

/// One round of one workload against one contender.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Sample {
    pub(super) wall_ms: f64,
    /// CPU time of the process that made the requests.
    pub(super) load_cpu_ms: Option<f64>,
    pub(super) answers: Vec<Answer>,
    /// Cores that programs outside the comparison kept busy.
    pub(super) others_cores: Option<f64>,
    /// The server's process before and after, where it is known.
    pub(super) before: Option<Footprint>,
    pub(super) after: Option<Footprint>,
}

/// The figures of one round. `None` where there was nothing to measure.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Figures {
    /// Generated tokens per second of the whole round, so prompts are included.
    pub(super) throughput: Option<f64>,
    pub(super) ttft_p50_ms: Option<f64>,
    pub(super) ttft_p99_ms: Option<f64>,
    pub(super) gap_p50_ms: Option<f64>,
    pub(super) gap_p99_ms: Option<f64>,
    /// Of the streams before the long prompts began.
    pub(super) alone_gap_p99_ms: Option<f64>,
    pub(super) long_prompts_per_minute: Option<f64>,
    pub(super) requests: usize,
    pub(super) errors: usize,
    pub(super) left: usize,
    pub(super) left_before_text: usize,
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) completion_tokens: f64,
    pub(super) pieces: usize,
    /// CPU time of the load tool as a share of the round, in percent of one core.
    pub(super) load_cpu_percent: Option<f64>,
    /// Cores that programs outside the comparison kept busy meanwhile.
    pub(super) others_cores: Option<f64>,
}

impl Figures {
    pub(super) fn of(sample: &Sample, beside: Option<&Beside>) -> Self {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        // What counts: everything, or from the first long prompt to the end of the window.
        let (from, to) = beside.map_or((0.0, f64::INFINITY), |b| (ms(b.start), ms(b.window)));
        let inside = |at: f64| at >= from && at <= to;
        let gaps = |range: &dyn Fn(f64) -> bool| {
            let pairs = sample.answers.iter().filter(|a| !a.is_long).flat_map(|a| a.pieces_ms.windows(2));
            stats::sorted(pairs.filter(|pair| range(pair[1])).map(|pair| pair[1] - pair[0]))
        };
        let streams = || sample.answers.iter().filter(|answer| !answer.is_long);
        let gap = gaps(&inside);
        let firsts = streams().filter_map(|a| Some((a.start_ms, *a.pieces_ms.first()?)));
        let ttft = stats::sorted(firsts.filter(|(_, first)| inside(*first)).map(|(start, first)| first - start));

        let tokens_inside: f64 = streams()
            .filter(|answer| !answer.pieces_ms.is_empty())
            .map(|answer| {
                let n_inside = answer.pieces_ms.iter().filter(|at| inside(**at)).count();
                answer.tokens() * n_inside as f64 / answer.pieces_ms.len() as f64
            })
            .sum();
        let counted_ms = if beside.is_some() { to - from } else { sample.wall_ms };
        let long_ends = || sample.answers.iter().filter(|a| a.is_long && a.error.is_none()).map(|a| a.end_ms);
        // Up to the last one that ended in the window: a window cuts one off, and the slower server should not pay more.
        let last_long = long_ends().filter(|end| inside(*end)).fold(from, f64::max);
        let n_long = long_ends().filter(|end| inside(*end)).count() as f64;

        let count = |keep: &dyn Fn(&Answer) -> bool| sample.answers.iter().filter(|a| keep(a)).count();
        let sum = |tokens: &dyn Fn(&Answer) -> Option<u32>| {
            sample.answers.iter().filter_map(tokens).map(u64::from).sum::<u64>()
        };
        Self {
            throughput: (counted_ms > 0.0).then(|| tokens_inside / counted_ms * 1e3),
            ttft_p50_ms: stats::percentile(&ttft, 50.0),
            ttft_p99_ms: stats::percentile(&ttft, 99.0),
            gap_p50_ms: stats::percentile(&gap, 50.0),
            gap_p99_ms: stats::percentile(&gap, 99.0),
            alone_gap_p99_ms: beside.and_then(|_| stats::percentile(&gaps(&|at| at < from), 99.0)),
            long_prompts_per_minute: beside
                .map(|_| if n_long > 0.0 { n_long / (last_long - from) * 60e3 } else { 0.0 }),
            requests: sample.answers.len(),
            errors: count(&|a| a.error.is_some()),
            left: count(&|a| a.has_left),
            left_before_text: count(&|a| a.has_left && a.pieces_ms.is_empty()),
            prompt_tokens: sum(&|a| a.prompt_tokens),
            cached_tokens: sum(&|a| a.cached_tokens),
            completion_tokens: sample.answers.iter().map(Answer::tokens).sum(),
            pieces: count_pieces(sample),
            others_cores: sample.others_cores,
            load_cpu_percent: sample.load_cpu_ms.map(|cpu| cpu / sample.wall_ms * 100.0),
        }
    }
}

fn count_pieces(sample: &Sample) -> usize {
    sample.answers.iter().map(|answer| answer.pieces_ms.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(start_ms: f64, pieces_ms: &[f64]) -> Answer {
        let end_ms = pieces_ms.last().copied().unwrap_or(start_ms);
        Answer { start_ms, pieces_ms: pieces_ms.to_vec(), end_ms, ..Answer::default() }
    }

    fn sample(wall_ms: f64, answers: Vec<Answer>) -> Sample {
        Sample { wall_ms, load_cpu_ms: Some(1.0), answers, others_cores: None, before: None, after: None }
    }

    #[test]
    fn throughput_counts_the_whole_round_and_the_servers_tokens() {
        let mut counted = answer(0.0, &[100.0, 110.0]);
        counted.completion_tokens = Some(4); // two pieces of two tokens
        let figures = Figures::of(&sample(500.0, vec![counted, answer(100.0, &[300.0, 320.0, 330.0])]), None);
        assert_eq!(figures.throughput, Some(14.0));
        assert_eq!((figures.ttft_p50_ms, figures.ttft_p99_ms), (Some(100.0), Some(200.0)));
        assert_eq!((figures.gap_p50_ms, figures.gap_p99_ms), (Some(10.0), Some(20.0)));
        assert_eq!((figures.pieces, figures.load_cpu_percent), (5, Some(0.2)));
    }

    #[test]
    fn beside_long_prompts_only_the_time_with_them_counts() {
        let beside = Beside { words: 9, max_tokens: 1, window: Duration::from_secs(2), start: Duration::from_secs(1) };
        let stream = answer(0.0, &[500.0, 600.0, 1100.0, 1500.0, 2100.0]);
        let long = |end_ms| Answer { is_long: true, start_ms: 1000.0, end_ms, ..Answer::default() };
        let figures = Figures::of(&sample(2500.0, vec![stream, long(1500.0), long(2500.0)]), Some(&beside));
        assert_eq!(figures.throughput, Some(2.0));
        assert_eq!((figures.gap_p50_ms, figures.gap_p99_ms), (Some(400.0), Some(500.0)));
        assert_eq!(figures.alone_gap_p99_ms, Some(100.0));
        assert_eq!(figures.long_prompts_per_minute, Some(120.0));
    }
}
