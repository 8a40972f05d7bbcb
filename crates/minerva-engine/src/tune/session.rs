//! Which comparisons are made, in which order, within how much time.
//!
//! Four stages, each beginning with the winner of the one before: the cache (flash attention and element type), threads for decoding,
//! prompts (micro-batch and threads), and with enough time the cache's layout. In a stage the base and its challengers take turns,
//! forwards and backwards, so that a machine that becomes slower is slower for all of them. A cache that won on short sequences must
//! then not lose on a longer one, and what came out of all stages must not lose against the defaults in new contexts: a context
//! keeps its luck with memory pages as long as it lives.
//!
//! What computes is behind [`Lab`], so that the order and the bounds of time are tested without a model.

use std::collections::VecDeque;
use std::time::Duration;

use super::candidates::Open;
use super::choose::{Comparison, Verdict, Work, ranking};
use super::{Rates, TuneReport, TuneRow, TuneSource, TunedSettings};

/// A context to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bench {
    /// Many sequences of about a hundred tokens, each with cells of its own.
    Short,
    /// One sequence with so many tokens.
    Long(u32),
    /// Many sequences behind one beginning of so many tokens.
    Shared(u32),
}

/// What computes.
pub(crate) trait Lab {
    /// An open context.
    type Context;

    /// Makes a context. Nothing is computed yet.
    fn open(&mut self, settings: &TunedSettings, bench: Bench) -> Result<Self::Context, String>;

    /// Does so much work at least; returns tokens per second.
    fn run(&mut self, context: &mut Self::Context, work: Work, at_least: Duration) -> Result<f64, String>;

    /// Sequences of [`Work::Many`].
    fn n_seq(&self) -> u32;

    /// How many of these may be open at a time.
    fn n_at_once(&mut self, settings: &[TunedSettings], bench: Bench) -> usize;

    /// The part of the threads' time that they really had, as far as known. Little means that other programs use the cores, or that
    /// the threads wait for a device.
    fn cpu_share(&self) -> Option<f64>;

    /// Whether the load would still fit.
    fn fits(&self, settings: &TunedSettings) -> bool;

    /// Time since tuning began.
    fn elapsed(&self) -> Duration;

    /// How far it is, from 0 to 1; `true` when the load was cancelled.
    fn is_cancelled(&mut self, fraction: f32) -> bool;
}

/// How long one sample lasts, as a part of the whole time.
const SAMPLE_PART: u32 = 40;
const LONGEST_SAMPLE: Duration = Duration::from_millis(500);
/// Rounds of a comparison: fewer say nothing about the noise, more say little else.
const ROUNDS: std::ops::RangeInclusive<u32> = 2..=7;
/// A step that takes more than this part of the time leaves too few of them for a finding.
const MOST_STEP_PART: f64 = 0.02;
/// A first look that takes more than this part of the time leaves too little of it.
const LOOK_UNTIL: f64 = 0.5;
/// Parts of the whole time. What must be known before anything is changed may begin late.
const CACHE: When = When { until: 0.4, at_latest: 0.7 };
const LONG: When = When { until: 0.6, at_latest: 1.0 };
const THREADS: When = When { until: 0.7, at_latest: 0.75 };
const PROMPTS: When = When { until: 0.8, at_latest: 0.85 };
const LAYOUT: When = When { until: 0.9, at_latest: 0.9 };
const SHARED: When = When { until: 0.95, at_latest: 1.0 };
const CHECK: When = When { until: 1.0, at_latest: GRACE };
/// What is under way at the end may take so much longer; then it is cut short.
const GRACE: f64 = 1.2;
/// Steps of the shortest sample, the one that is not timed included.
const SAMPLE_STEPS: f64 = 4.0;
/// After a round a challenger this slow has lost.
const HOPELESS: f64 = 0.75;
/// Threads that had less of their time are not compared: with fewer of them the others' programs would decide.
const LEAST_CPU_SHARE: f64 = 0.85;
/// Tokens of a long context: as many as there is time for.
const LONG_TOKENS: std::ops::RangeInclusive<u32> = 256..=1024;
const THOROUGH_LONG_TOKENS: u32 = 1536;
/// Tokens of a shared beginning.
const SHARED_TOKENS: u32 = 512;

/// Runs the whole of it.
pub(crate) fn tune<L: Lab>(
    lab: &mut L,
    open: &Open,
    default: &TunedSettings,
    budget: Duration,
    is_thorough: bool,
) -> (TunedSettings, TuneReport) {
    let mut session =
        Session { lab, budget, is_thorough, rows: Vec::new(), gain: 1.0, prefill_rate: 0.0, alone_s: 0.0, many_s: 0.0 };
    let mut base = default.clone();
    let reason = session.look(default).err();
    if reason.is_none() {
        session.caches(open, &mut base);
        if session.has_its_cores() {
            let threads = open.threads(&base);
            let works = [Work::Alone, Work::Many];
            session.stage("threads", threads, &mut base, Bench::Short, &works, THREADS);
        }
        let n_tokens = session.long_tokens(PROMPTS, &[Work::Prefill]);
        let mut prompts = open.prompts(&base, n_tokens);
        let has_its_cores = session.has_its_cores();
        prompts.retain(|settings| has_its_cores || settings.n_threads_batch == base.n_threads_batch);
        session.stage("prompts", prompts, &mut base, Bench::Long(n_tokens), &[Work::Prefill], PROMPTS);
        if is_thorough {
            session.layouts(open, &mut base);
        }
        session.check(default, &mut base);
    }
    let is_disturbed = !session.has_its_cores() && session.rows.iter().all(|row| row.outcome != "chosen");
    // A base and nothing beside it is no comparison.
    let was_compared = session.rows.iter().filter(|row| row.ratio.is_some()).count() > 1;
    let no_time = || format!("there was no time to compare settings within {} s", budget.as_secs_f64());
    let reason = reason.or_else(|| (!was_compared && !session.rows.is_empty()).then(no_time));
    let took_ms = u64::try_from(session.lab.elapsed().as_millis()).unwrap_or(u64::MAX);
    let source = if reason.is_none() { TuneSource::Measured } else { TuneSource::Defaults };
    let (rows, gain) = (session.rows, session.gain);
    let report = TuneReport { source, reason, settings: base.to_string(), gain, took_ms, is_disturbed, rows };
    (base, report)
}

struct Session<'a, L: Lab> {
    lab: &'a mut L,
    budget: Duration,
    is_thorough: bool,
    rows: Vec<TuneRow>,
    gain: f64,
    /// Prompt tokens per second and seconds of a step, as the first look found them.
    prefill_rate: f64,
    alone_s: f64,
    many_s: f64,
}

/// When a comparison ends, as a part of the whole time.
#[derive(Debug, Clone, Copy)]
struct When {
    /// No new round that would end later.
    until: f64,
    /// Not begun at all if the fewest rounds would end later.
    at_latest: f64,
}

/// A challenger on its way through a comparison.
struct Entry<C> {
    settings: TunedSettings,
    comparison: Comparison,
    context: Option<C>,
    dropped: Option<String>,
}

/// How a group is compared.
struct Turns<'a> {
    bench: Bench,
    works: &'a [Work],
    until: f64,
    /// Contexts stay open between turns; else each is made anew for its turn.
    stay_open: bool,
}

impl<C> Entry<C> {
    fn new(settings: TunedSettings) -> Self {
        Self { settings, comparison: Comparison::default(), context: None, dropped: None }
    }

    fn is_in_the_race(&self) -> bool {
        self.dropped.is_none() && self.comparison.score().is_none_or(|score| score >= HOPELESS)
    }
}

impl<L: Lab> Session<'_, L> {
    /// A few steps with the defaults: whether there is time for more. The reason if not.
    fn look(&mut self, default: &TunedSettings) -> Result<(), String> {
        let mut context = self.lab.open(default, Bench::Short)?;
        self.lab.run(&mut context, Work::Prefill, Duration::ZERO)?; // pages are touched and threads started
        self.alone_s = 1.0 / self.lab.run(&mut context, Work::Alone, Duration::ZERO)?;
        self.is_fast_enough()?;
        self.prefill_rate = self.lab.run(&mut context, Work::Prefill, Duration::ZERO)?;
        self.is_fast_enough()?;
        self.many_s = f64::from(self.lab.n_seq()) / self.lab.run(&mut context, Work::Many, Duration::ZERO)?;
        self.is_fast_enough()
    }

    fn is_fast_enough(&self) -> Result<(), String> {
        let budget_s = self.budget.as_secs_f64();
        if self.alone_s > budget_s * MOST_STEP_PART {
            let step_ms = self.alone_s * 1e3;
            return Err(format!("a step takes {step_ms:.0} ms, too long to compare settings within {budget_s} s"));
        }
        if self.part_over() > LOOK_UNTIL {
            return Err(format!("the first look took too long to compare settings within {budget_s} s"));
        }
        Ok(())
    }

    fn has_its_cores(&self) -> bool {
        self.lab.cpu_share().is_none_or(|share| share >= LEAST_CPU_SHARE)
    }

    /// The result against the defaults, once more and in new contexts. Without a proof the defaults stay.
    fn check(&mut self, default: &TunedSettings, base: &mut TunedSettings) {
        if base == default {
            return;
        }
        let stage = "check";
        let challenger = vec![base.clone()];
        let works = [Work::Alone, Work::Many, Work::Prefill];
        let entries = self.compare(default, challenger, Bench::Short, &works, CHECK);
        let score = entries.first().and_then(|entry| entry.comparison.score());
        let holds = score.is_some_and(|score| score >= 1.0);
        let mut checked = default.clone();
        self.conclude(stage, &mut checked, entries, holds.then_some(0));
        self.gain = score.filter(|_| holds).unwrap_or(1.0);
        *base = checked;
    }

    /// Flash attention and element type: ranked by short sequences, and then the best that holds with a long one.
    fn caches(&mut self, open: &Open, base: &mut TunedSettings) {
        let stage = "cache";
        let (works, challengers) = ([Work::Alone, Work::Many], open.caches(base));
        if challengers.is_empty() {
            return;
        }
        let mut entries = self.compare(base, challengers, Bench::Short, &works, CACHE);
        let comparisons: Vec<Comparison> = entries.iter().map(|entry| entry.comparison.clone()).collect();
        let mut winner = None;
        for i in ranking(&comparisons) {
            let works = [Work::Prefill, Work::Long];
            let n_tokens = self.long_tokens(LONG, &works);
            let challenger = vec![entries[i].settings.clone()];
            let long = self.compare(base, challenger, Bench::Long(n_tokens), &works, LONG);
            let Some(long) = long.into_iter().next() else { continue };
            if long.comparison.score().is_none() {
                let reason = long.dropped.unwrap_or_else(|| "there was no time for a long context".to_owned());
                entries[i].dropped = Some(reason);
                continue;
            }
            entries[i].comparison.merge(&long.comparison);
            if entries[i].comparison.verdict() == Verdict::Better {
                winner = Some(i);
                break;
            }
        }
        self.conclude(stage, base, entries, winner);
    }

    /// Another comparison, whose best challenger becomes the base if it is better.
    fn stage(
        &mut self,
        stage: &str,
        challengers: Vec<TunedSettings>,
        base: &mut TunedSettings,
        bench: Bench,
        works: &[Work],
        when: When,
    ) {
        if challengers.is_empty() {
            return;
        }
        let entries = self.compare(base, challengers, bench, works, when);
        let comparisons: Vec<Comparison> = entries.iter().map(|entry| entry.comparison.clone()).collect();
        let winner = ranking(&comparisons).first().copied();
        self.conclude(stage, base, entries, winner);
    }

    /// The layouts: independent sequences are slower in one pool, and a shared beginning is faster. Only a layout that wins both, or
    /// wins one and does not lose the other, is taken.
    fn layouts(&mut self, open: &Open, base: &mut TunedSettings) {
        let challengers = open.layouts(base);
        if challengers.is_empty() {
            return;
        }
        let stage = "layout";
        let works = [Work::Alone, Work::Many];
        let mut entries = self.compare(base, challengers.clone(), Bench::Short, &works, LAYOUT);
        let shared = self.compare(base, challengers, Bench::Shared(SHARED_TOKENS), &[Work::Shared], SHARED);
        for (entry, shared) in entries.iter_mut().zip(shared) {
            entry.comparison.merge(&shared.comparison);
            entry.dropped = entry.dropped.take().or(shared.dropped);
        }
        let winner =
            entries.iter().position(|entry| entry.dropped.is_none() && entry.comparison.verdict() == Verdict::Better);
        self.conclude(stage, base, entries, winner);
    }

    /// Writes the rows of a stage, and makes its winner the base.
    fn conclude(
        &mut self,
        stage: &str,
        base: &mut TunedSettings,
        entries: Vec<Entry<L::Context>>,
        winner: Option<usize>,
    ) {
        let of_base = entries.iter().map(|entry| entry.comparison.base_rates()).fold(Rates::default(), Rates::or);
        let outcome = if winner.is_some() { "" } else { "stays" };
        self.row(stage, base, of_base, Some(1.0), outcome.to_owned());
        for (i, entry) in entries.iter().enumerate() {
            let outcome = match (&entry.dropped, entry.comparison.verdict()) {
                (Some(reason), _) => reason.clone(),
                (None, _) if winner == Some(i) => "chosen".to_owned(),
                (None, Verdict::Better) => "better, but not the best".to_owned(),
                (None, Verdict::NoBetter) => "no more than noise".to_owned(),
                (None, Verdict::Slower) => "slower".to_owned(),
                (None, Verdict::SlowerAt(work)) => format!("slower with {}", work.name()),
                (None, Verdict::Unknown) => "not measured".to_owned(),
            };
            self.row(stage, &entry.settings, entry.comparison.rates(), entry.comparison.score(), outcome);
        }
        if let Some(entry) = winner.and_then(|winner| entries.into_iter().nth(winner)) {
            self.gain *= entry.comparison.score().unwrap_or(1.0);
            *base = entry.settings;
        }
    }

    fn row(&mut self, stage: &str, settings: &TunedSettings, rates: Rates, ratio: Option<f64>, outcome: String) {
        self.rows.push(TuneRow { stage: stage.to_owned(), settings: settings.to_string(), rates, ratio, outcome });
    }

    /// Lets the base and its challengers compute by turns. As many contexts are open at a
    /// time as there is memory for; the base is always among them, or next to them.
    fn compare(
        &mut self,
        base: &TunedSettings,
        challengers: Vec<TunedSettings>,
        bench: Bench,
        works: &[Work],
        when: When,
    ) -> Vec<Entry<L::Context>> {
        let mut entries: Vec<Entry<L::Context>> = challengers.into_iter().map(Entry::new).collect();
        for entry in &mut entries {
            if !self.lab.fits(&entry.settings) {
                entry.dropped = Some("does not fit in the planned memory".to_owned());
            }
        }
        let mut waiting: VecDeque<usize> = (0..entries.len()).filter(|&i| entries[i].dropped.is_none()).collect();
        while !waiting.is_empty() && !self.is_over(when.at_latest) && self.has_time(bench, works, 2, when) {
            let mut settings = vec![base.clone()];
            settings.extend(waiting.iter().map(|&i| entries[i].settings.clone()));
            let n_open = self.lab.n_at_once(&settings, bench);
            // Two of them take turns even where only one has room: each is then made anew for its turn.
            let affordable = (2..=settings.len()).rev().find(|&n| self.has_time(bench, works, n, when)).unwrap_or(2);
            let n_group = n_open.clamp(2, settings.len()).min(affordable);
            let group: Vec<usize> = waiting.drain(..n_group - 1).collect();
            let stay_open = n_open >= n_group;
            // Those that wait for a later group have their part of the time.
            let part = group.len() as f64 / (group.len() + waiting.len()) as f64;
            let now = self.part_over();
            let until = now + (when.until - now) * part;
            self.take_turns(base, &mut entries, &group, &Turns { bench, works, until, stay_open });
        }
        for i in waiting {
            entries[i].dropped = Some("not measured: there was no time for it".to_owned());
        }
        entries
    }

    /// Rounds of one group. A round that was cut short counts for nothing.
    fn take_turns(
        &mut self,
        base: &TunedSettings,
        entries: &mut [Entry<L::Context>],
        group: &[usize],
        turns: &Turns<'_>,
    ) {
        let mut of_base = Entry::new(base.clone());
        let mut last_round = 0.0;
        for round in 0..*ROUNDS.end() {
            let mut order: Vec<Option<usize>> = vec![None];
            order.extend(group.iter().filter(|&&i| entries[i].is_in_the_race()).map(|&i| Some(i)));
            let began = self.part_over();
            let is_enough = round >= *ROUNDS.start() && began + last_round > turns.until;
            if order.len() == 1 || is_enough {
                break;
            }
            if round % 2 == 1 {
                order.reverse();
            }
            let mut rates: Vec<(Option<usize>, Vec<Option<f64>>)> = Vec::new();
            for who in order {
                if self.is_over(GRACE) {
                    break;
                }
                let entry = who.map_or(&mut of_base, |i| &mut entries[i]);
                rates.push((who, self.turn(entry, turns, round)));
            }
            last_round = self.part_over() - began;
            if let Some(reason) = of_base.dropped.take() {
                for &i in group {
                    entries[i].dropped.get_or_insert_with(|| format!("not measured: the base {reason}"));
                }
                break;
            }
            let Some(of_base) = rates.iter().find(|(who, _)| who.is_none()).map(|(_, rates)| rates.clone()) else {
                break;
            };
            for (who, own) in rates {
                let Some(i) = who else { continue };
                for ((&work, own), base) in turns.works.iter().zip(own).zip(&of_base) {
                    if let (Some(own), Some(base)) = (own, base) {
                        entries[i].comparison.add(work, *base, own);
                    }
                }
            }
        }
        for &i in group {
            entries[i].context = None;
        }
    }

    /// One turn of one context: every kind of work once. `None` for work that is not measured in this round.
    fn turn(&mut self, entry: &mut Entry<L::Context>, turns: &Turns<'_>, round: u32) -> Vec<Option<f64>> {
        let sample = self.sample();
        let open = entry.context.take().map_or_else(|| self.lab.open(&entry.settings, turns.bench), Ok);
        let mut context = match open {
            Ok(context) => context,
            Err(reason) => {
                entry.dropped = Some(format!("has no context: {reason}"));
                return vec![None; turns.works.len()];
            }
        };
        let mut rates = Vec::new();
        for &work in turns.works {
            // A prompt takes long, and is in the cache already.
            if work == Work::Prefill && round >= self.n_prompts(turns.bench, turns.works) {
                rates.push(None);
                continue;
            }
            match self.lab.run(&mut context, work, sample) {
                Ok(rate) => rates.push(Some(rate)),
                Err(reason) => {
                    entry.dropped = Some(format!("failed: {reason}"));
                    return vec![None; turns.works.len()];
                }
            }
        }
        if turns.stay_open {
            entry.context = Some(context);
        }
        rates
    }

    /// In how many rounds the prompt is computed: once where it comes before something else and is long.
    fn n_prompts(&self, bench: Bench, works: &[Work]) -> u32 {
        match bench {
            _ if self.is_thorough => *ROUNDS.end(),
            Bench::Long(_) if works.len() > 1 => 1,
            _ => *ROUNDS.start(),
        }
    }

    /// Tokens of a long context, so that the prompts of two contexts fit in the time.
    fn long_tokens(&self, when: When, works: &[Work]) -> u32 {
        let n_prompts = self.n_prompts(Bench::Long(0), works).min(*ROUNDS.start());
        let most = if self.is_thorough { THOROUGH_LONG_TOKENS } else { *LONG_TOKENS.end() };
        let tokens = self.left_s(when.until) * 0.7 * self.prefill_rate / f64::from(2 * n_prompts);
        // Whole blocks of cells.
        (tokens as u32 / 128 * 128).clamp(*LONG_TOKENS.start(), most)
    }

    /// Whether so many contexts can have the fewest rounds in time.
    fn has_time(&self, bench: Bench, works: &[Work], n_contexts: usize, when: When) -> bool {
        let sample_s = self.sample().as_secs_f64();
        let (alone_s, many_s) = (sample_s.max(SAMPLE_STEPS * self.alone_s), sample_s.max(SAMPLE_STEPS * self.many_s));
        let n_prompts = f64::from(self.n_prompts(bench, works).min(*ROUNDS.start()));
        let (prompt_tokens, round_s) = match bench {
            Bench::Short => (100.0, alone_s + many_s),
            Bench::Long(n) if works == [Work::Prefill] => (f64::from(n) * n_prompts, 0.0),
            Bench::Long(n) => (f64::from(n) * n_prompts, alone_s),
            Bench::Shared(n) => (f64::from(n), many_s),
        };
        let each_s = prompt_tokens / self.prefill_rate.max(1e-3) + round_s * f64::from(*ROUNDS.start());
        each_s * n_contexts as f64 <= self.left_s(when.at_latest)
    }

    fn sample(&self) -> Duration {
        (self.budget / SAMPLE_PART).min(LONGEST_SAMPLE)
    }

    fn left_s(&self, until: f64) -> f64 {
        (self.budget.as_secs_f64() * until - self.lab.elapsed().as_secs_f64()).max(0.0)
    }

    /// How much of the whole time is over.
    fn part_over(&self) -> f64 {
        self.lab.elapsed().as_secs_f64() / self.budget.as_secs_f64().max(1e-3)
    }

    fn is_over(&mut self, until: f64) -> bool {
        let fraction = self.part_over();
        fraction >= until || self.lab.is_cancelled(fraction.min(1.0) as f32)
    }
}

impl Rates {
    fn or(self, other: Self) -> Self {
        Self {
            alone: self.alone.or(other.alone),
            many: self.many.or(other.many),
            long: self.long.or(other.long),
            prefill: self.prefill.or(other.prefill),
            shared: self.shared.or(other.shared),
        }
    }
}

#[cfg(test)]
mod tests;
