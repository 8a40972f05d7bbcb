//! What one request saw, and the figures of one round made of it.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::footprint::Footprint;
use super::replay::{Token, Verdict};
use super::workload::{Leave, Role, Shape};
use crate::stats;

/// A chunk of a prompt that is computed in one step, in tokens: what each of a burst may compute of the common part before
/// it is found to be common.
const CHUNK_TOKENS: u32 = 128;

/// What one request saw; times are milliseconds since the round began.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) role: Role,
    /// Which request of its role.
    pub(super) index: usize,
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
    /// How often the server had no room and the client asked again.
    pub(super) refusals: u32,
    /// Of requests that keep it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) text: String,
    /// Of requests that ask for log-probabilities.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) tokens: Vec<Token>,
    pub(super) error: Option<String>,
}

impl Answer {
    /// The server's count, or the pieces of text where there is none.
    fn n_tokens(&self) -> f64 {
        self.completion_tokens.map_or(self.pieces_ms.len() as f64, f64::from)
    }

    /// From before the connection is opened to the first piece of text.
    pub(super) fn ttft_ms(&self) -> Option<f64> {
        Some(self.pieces_ms.first()? - self.start_ms)
    }

    /// From the first piece of text to the last.
    fn decode_ms(&self) -> Option<f64> {
        Some(self.pieces_ms.last()? - self.pieces_ms.first()?)
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
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Sample {
    /// Of the requests that the workload is about.
    pub(super) wall_ms: f64,
    /// Of their twins without a schema.
    pub(super) twin_ms: Option<f64>,
    /// Answers that were asked for again, alone: the number of the request and what came of it.
    pub(super) replayed: Vec<(usize, Verdict)>,
    /// Answers with their own secret, and a line for each that has somebody else's.
    pub(super) own_secrets: usize,
    pub(super) leaks: Vec<String>,
    /// Private memory of the server's process over the time of the round: seconds, MiB.
    pub(super) memory: Vec<(f64, f64)>,
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
    /// Throughput without a schema, as many tokens.
    pub(super) twin_throughput: Option<f64>,
    /// Of the one client while another floods, and before.
    pub(super) idle_ttft_ms: Option<f64>,
    /// Over twice its TTFT before the flood and one step of the flood.
    pub(super) fairness: Option<f64>,
    /// Time to decode without guessing ahead over that with it, for as many tokens.
    pub(super) speculation: Option<f64>,
    /// Pairs whose two texts are equal, and all.
    pub(super) equal_pairs: Option<[usize; 2]>,
    /// Prompt tokens of a burst that were computed, over those that may be.
    pub(super) computed_share: Option<f64>,
    pub(super) refusals: u64,
    /// Replays that are the same, differ after a near tie, are wrong.
    pub(super) replays: Option<[usize; 3]>,
    pub(super) leaks: Option<usize>,
    /// Sum of the gauges that should be 0 when nobody asks anything.
    pub(super) left_over: Option<f64>,
    pub(super) resident_mib: Option<f64>,
    /// Growth of private memory, after a third of the round: least squares and, less moved by a few readings, the median.
    pub(super) memory_slope: Option<[f64; 2]>,
}

impl Figures {
    pub(super) fn of(sample: &Sample, shape: &Shape) -> Self {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        // What counts: everything, or from the first long prompt to the end of the window.
        let beside = shape.beside.zip(shape.window);
        let (from, to) = beside.map_or((0.0, f64::INFINITY), |(beside, window)| (ms(beside.start), ms(window)));
        let inside = |at: f64| at >= from && at <= to;
        let of_role = |role: Role| sample.answers.iter().filter(move |answer| answer.role == role);
        let streams = || of_role(Role::Stream);
        let gaps = |range: &dyn Fn(f64) -> bool| {
            let pairs = streams().flat_map(|answer| answer.pieces_ms.windows(2));
            stats::sorted(pairs.filter(|pair| range(pair[1])).map(|pair| pair[1] - pair[0]))
        };
        let gap = gaps(&inside);
        let firsts = streams().filter_map(|a| Some((a.start_ms, *a.pieces_ms.first()?)));
        let ttft = stats::sorted(firsts.filter(|(_, first)| inside(*first)).map(|(start, first)| first - start));

        let tokens_inside: f64 = streams()
            .chain(of_role(Role::Flood))
            .filter(|answer| !answer.pieces_ms.is_empty())
            .map(|answer| {
                let n_inside = answer.pieces_ms.iter().filter(|at| inside(**at)).count();
                answer.n_tokens() * n_inside as f64 / answer.pieces_ms.len() as f64
            })
            .sum();
        let counted_ms = match beside {
            Some(_) => to - from,
            None if shape.has_pairs => streams().map(|answer| answer.end_ms - answer.start_ms).sum(),
            None => sample.wall_ms,
        };
        let long_ends = || of_role(Role::Long).filter(|a| a.error.is_none()).map(|a| a.end_ms);
        // Up to the last one that ended in the window: a window cuts one off, and the slower server should not pay more.
        let last_long = long_ends().filter(|end| inside(*end)).fold(from, f64::max);
        let n_long = long_ends().filter(|end| inside(*end)).count() as f64;

        let count = |keep: &dyn Fn(&Answer) -> bool| sample.answers.iter().filter(|a| keep(a)).count();
        let sum = |tokens: &dyn Fn(&Answer) -> Option<u32>| {
            sample.answers.iter().filter_map(tokens).map(u64::from).sum::<u64>()
        };
        let twin_tokens: f64 = of_role(Role::Twin).map(Answer::n_tokens).sum();
        let ttft_p50_ms = stats::percentile(&ttft, 50.0);
        let idle_ttft_ms = stats::median(of_role(Role::Idle).filter_map(Answer::ttft_ms));
        Self {
            throughput: (counted_ms > 0.0).then(|| tokens_inside.max(0.0) / counted_ms * 1e3),
            ttft_p50_ms,
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
            completion_tokens: sample.answers.iter().map(Answer::n_tokens).sum(),
            pieces: count_pieces(sample),
            others_cores: sample.others_cores,
            load_cpu_percent: sample.load_cpu_ms.map(|cpu| cpu / sample.wall_ms * 100.0),
            twin_throughput: sample
                .twin_ms
                .filter(|ms| *ms > 0.0 && twin_tokens > 0.0)
                .map(|ms| twin_tokens / ms * 1e3),
            idle_ttft_ms,
            fairness: idle_ttft_ms.and_then(|idle| {
                let steps = of_role(Role::Flood).flat_map(|a| a.pieces_ms.windows(2)).map(|pair| pair[1] - pair[0]);
                Some(ttft_p50_ms? / (2.0 * idle + stats::median(steps)?))
            }),
            speculation: shape.has_pairs.then(|| speculation(&sample.answers)).flatten(),
            equal_pairs: shape.has_pairs.then(|| {
                let n_equal = pairs(&sample.answers).filter(|(own, twin)| own.text == twin.text).count();
                [n_equal, pairs(&sample.answers).count()]
            }),
            computed_share: (shape.system_words > 0).then(|| computed_share(streams())).flatten(),
            refusals: sample.answers.iter().map(|answer| u64::from(answer.refusals)).sum(),
            replays: (!sample.replayed.is_empty()).then(|| {
                let count =
                    |is: fn(&Verdict) -> bool| sample.replayed.iter().filter(|(_, verdict)| is(verdict)).count();
                [
                    count(|verdict| matches!(verdict, Verdict::Same)),
                    count(|verdict| matches!(verdict, Verdict::NearTie(_))),
                    count(|verdict| matches!(verdict, Verdict::Wrong(_))),
                ]
            }),
            // A search in answers that never say what they were told proves nothing.
            leaks: (sample.own_secrets > 0 || !sample.leaks.is_empty()).then_some(sample.leaks.len()),
            left_over: sample.after.as_ref().and_then(Footprint::left_over),
            resident_mib: sample.after.as_ref().and_then(|after| after.resident_mib),
            memory_slope: memory_slope(&sample.memory),
        }
    }
}

/// Prompt tokens that a burst computed, over the common part once and, for each, its own part and a chunk.
fn computed_share<'a>(answers: impl Iterator<Item = &'a Answer>) -> Option<f64> {
    let counts: Vec<(u32, u32)> = answers.map(|a| Some((a.prompt_tokens?, a.cached_tokens?))).collect::<Option<_>>()?;
    // Whoever found the most of its prompt computed found all that is common.
    let common = counts.iter().map(|(_, cached)| *cached).max()?;
    let computed: u32 = counts.iter().map(|(prompt, cached)| prompt - cached).sum();
    let own: u32 = counts.iter().map(|(prompt, _)| prompt.saturating_sub(common) + CHUNK_TOKENS).sum();
    Some(f64::from(computed) / f64::from(common + own))
}

/// Requests that were answered in full, each with its twin.
fn pairs(answers: &[Answer]) -> impl Iterator<Item = (&Answer, &Answer)> {
    let answered = |role: Role| answers.iter().filter(move |answer| answer.role == role && answer.error.is_none());
    answered(Role::Stream)
        .filter_map(move |own| Some((own, answered(Role::Twin).find(|twin| twin.index == own.index)?)))
}

/// Time to decode without guessing ahead over that with it; both answers of a pair have as many tokens.
fn speculation(answers: &[Answer]) -> Option<f64> {
    let times = pairs(answers).filter_map(|(own, twin)| Some((own.decode_ms()?, twin.decode_ms()?)));
    let (with_ms, without_ms) = times.fold((0.0, 0.0), |(with, without), (own, twin)| (with + own, without + twin));
    (with_ms > 0.0).then(|| without_ms / with_ms)
}

/// MiB per minute.
fn memory_slope(readings: &[(f64, f64)]) -> Option<[f64; 2]> {
    let settled = &readings[readings.len() / 3..];
    Some([stats::least_squares(settled)?, stats::slope(settled)?].map(|per_second| per_second * 60.0))
}

fn count_pieces(sample: &Sample) -> usize {
    sample.answers.iter().map(|answer| answer.pieces_ms.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::super::workload::{Load, Round, Workload};
    use super::*;

    fn answer(start_ms: f64, pieces_ms: &[f64]) -> Answer {
        let end_ms = pieces_ms.last().copied().unwrap_or(start_ms);
        Answer { start_ms, pieces_ms: pieces_ms.to_vec(), end_ms, ..Answer::default() }
    }

    fn sample(wall_ms: f64, answers: Vec<Answer>) -> Sample {
        Sample { wall_ms, load_cpu_ms: Some(1.0), answers, ..Sample::default() }
    }

    fn shape(workload: Workload) -> Shape {
        let load = Load { cells: 8192, sequences: 8, factor: 4.0 };
        Round { workload, scale: 0.1, seed: 1, number: 0, load }.shape()
    }

    #[test]
    fn throughput_counts_the_whole_round_and_the_servers_tokens() {
        let mut counted = answer(0.0, &[100.0, 110.0]);
        counted.completion_tokens = Some(4); // two pieces of two tokens
        let figures =
            Figures::of(&sample(500.0, vec![counted, answer(100.0, &[300.0, 320.0, 330.0])]), &shape(Workload::One));
        assert_eq!(figures.throughput, Some(14.0));
        assert_eq!((figures.ttft_p50_ms, figures.ttft_p99_ms), (Some(100.0), Some(200.0)));
        assert_eq!((figures.gap_p50_ms, figures.gap_p99_ms), (Some(10.0), Some(20.0)));
        assert_eq!((figures.pieces, figures.load_cpu_percent), (5, Some(0.2)));
    }

    #[test]
    fn beside_long_prompts_only_the_time_with_them_counts() {
        let mut shape = shape(Workload::LongPromptBeside); // 2 s
        shape.beside.as_mut().unwrap().start = Duration::from_secs(1);
        let stream = answer(0.0, &[500.0, 600.0, 1100.0, 1500.0, 2100.0]);
        let long = |end_ms| Answer { role: Role::Long, start_ms: 1000.0, end_ms, ..Answer::default() };
        let figures = Figures::of(&sample(2500.0, vec![stream, long(1500.0), long(2500.0)]), &shape);
        assert_eq!(figures.throughput, Some(2.0));
        assert_eq!((figures.gap_p50_ms, figures.gap_p99_ms), (Some(400.0), Some(500.0)));
        assert_eq!(figures.alone_gap_p99_ms, Some(100.0));
        assert_eq!(figures.long_prompts_per_minute, Some(120.0));
    }

    #[test]
    fn a_burst_may_compute_the_common_part_once_and_a_chunk_for_each() {
        let asked =
            |prompt, cached| Answer { prompt_tokens: Some(prompt), cached_tokens: Some(cached), ..Answer::default() };
        let share = |counts: &[(u32, u32)]| {
            let answers: Vec<Answer> = counts.iter().map(|&(prompt, cached)| asked(prompt, cached)).collect();
            computed_share(answers.iter())
        };
        // 1,000 common and 50 own tokens: 1,100 of 1,000 + 2 x (50 + 128).
        assert_eq!(share(&[(1050, 0), (1050, 1000)]), Some(1100.0 / 1356.0));
        assert!(share(&[(1050, 0), (1050, 0), (1050, 1000)]) > Some(1.0));
        assert_eq!(computed_share([Answer::default()].iter()), None);
    }

    #[test]
    fn a_flood_is_fair_when_the_other_key_waits_twice_as_long_as_alone_and_a_step() {
        let of = |role, start_ms, pieces: &[f64]| Answer { role, ..answer(start_ms, pieces) };
        let answers = vec![
            of(Role::Idle, 0.0, &[100.0, 110.0]),
            of(Role::Flood, 500.0, &[600.0, 640.0, 680.0]),
            of(Role::Stream, 600.0, &[840.0, 850.0]),
        ];
        let figures = Figures::of(&sample(1000.0, answers), &shape(Workload::Fairness));
        assert_eq!((figures.idle_ttft_ms, figures.fairness), (Some(100.0), Some(1.0)));
    }

    #[test]
    fn guessing_ahead_is_as_good_as_its_pairs_decode_faster() {
        let of = |role, index, pieces: &[f64]| Answer { role, index, ..answer(0.0, pieces) };
        let failed = Answer { error: Some("no".to_owned()), ..of(Role::Twin, 2, &[1.0, 9000.0]) };
        let answers = vec![
            of(Role::Stream, 0, &[100.0, 200.0]),
            of(Role::Twin, 0, &[100.0, 300.0]),
            of(Role::Twin, 1, &[500.0, 600.0]),
            Answer { text: "other".to_owned(), ..of(Role::Stream, 1, &[500.0, 600.0]) },
            of(Role::Stream, 2, &[100.0, 200.0]),
            failed,
        ];
        let figures = Figures::of(&sample(9.0, answers), &shape(Workload::Repetitions));
        assert_eq!((figures.speculation, figures.equal_pairs), (Some(1.5), Some([1, 2])));
        assert_eq!(Figures::of(&sample(9.0, Vec::new()), &shape(Workload::One)).speculation, None);
    }

    #[test]
    fn memory_that_grows_a_mebibyte_a_second_grows_60_a_minute() {
        let readings: Vec<(f64, f64)> = (0..30).map(|at| (f64::from(at), 500.0 + f64::from(at))).collect();
        let slopes = memory_slope(&readings).unwrap();
        assert!(slopes.iter().all(|slope| (slope - 60.0).abs() < 1e-6), "{slopes:?}");
        assert_eq!(memory_slope(&readings[..1]), None);
    }
}
