//! Runs a trace again, without a model, and compares.

use std::io::BufRead;
use std::time::{Duration, Instant};

use super::super::{Scheduler, Step};
use super::Call;
use crate::backend::SeqId;

/// No trace has more.
const MOST_SEQUENCES: u32 = 1 << 16;

/// What a trace came to when it was run again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Calls of the scheduler.
    pub n_calls: u64,
    /// Requests.
    pub n_requests: u64,
    /// Steps.
    pub n_steps: u64,
    /// Rows of all steps.
    pub n_rows: u64,
    /// Time inside the scheduler, this time.
    pub time: Duration,
    /// The longest that one turn took, from one step to the next.
    pub longest_turn: Duration,
    /// One line per admission and step, if they were asked for.
    pub text: String,
}

/// Why a trace could not be run again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The file cannot be read.
    #[error("cannot read the trace")]
    Read(#[from] std::io::Error),
    /// A line is no call of the scheduler.
    #[error("line {line} is no call of the scheduler")]
    Line {
        /// Its number, from 1.
        line: u64,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The first line has to say how large everything is, and the others have to agree with it.
    #[error(
        "line {line} is out of order: a trace begins with `new`, once, requests fit it, and `computed` follows `step`"
    )]
    Order {
        /// Its number, from 1.
        line: u64,
    },
    /// A number is outside what the trace's first line allows.
    #[error("line {line} names sequence {seq}, and there are {n_seq_max}")]
    Sequence {
        /// Its number, from 1.
        line: u64,
        /// The sequence.
        seq: SeqId,
        /// How many there are.
        n_seq_max: u32,
    },
    /// The scheduler answered something else.
    #[error("line {line}: the trace has {then}, now it is {now}")]
    Differs {
        /// Its number, from 1.
        line: u64,
        /// What the trace has.
        then: String,
        /// What the scheduler says now.
        now: String,
    },
}

/// Runs a trace again and compares every answer; `with_text` collects a line per admission and step.
///
/// # Errors
/// [`ReplayError`], at the first line that is damaged or that the scheduler answers differently now.
pub fn replay(trace: impl BufRead, with_text: bool) -> Result<Replayed, ReplayError> {
    let mut replayed = Replayed::default();
    let mut running: Option<(Scheduler, u32)> = None;
    let (mut step, mut turn) = (Step::default(), Duration::ZERO);
    for (line, text) in (1_u64..).zip(trace.lines()) {
        let then: Call = serde_json::from_str(&text?).map_err(|source| ReplayError::Line { line, source })?;
        if let Call::New { limits, policy } = then {
            if running.is_some() || !(1..=MOST_SEQUENCES).contains(&limits.n_seq_max) {
                return Err(ReplayError::Order { line });
            }
            running = Some((Scheduler::new(limits, policy), limits.n_seq_max));
            continue;
        }
        let Some((scheduler, n_seq_max)) = &mut running else { return Err(ReplayError::Order { line }) };
        if let Some(seq) = then.seq().filter(|seq| seq >= n_seq_max) {
            return Err(ReplayError::Sequence { line, seq, n_seq_max: *n_seq_max });
        }
        let is_no_job =
            matches!(&then, Call::Enqueue { job, .. } if job.prompt.is_empty() || !(1..=*n_seq_max).contains(&job.n));
        if is_no_job || (matches!(then, Call::Computed { .. }) && step.rows.is_empty()) {
            return Err(ReplayError::Order { line });
        }
        let began = Instant::now();
        let now = then.again(scheduler, &mut step);
        let took = began.elapsed();
        if now != then {
            return Err(ReplayError::Differs { line, then: format!("{then:?}"), now: format!("{now:?}") });
        }
        replayed.n_calls += 1;
        replayed.time += took;
        turn += took;
        match &now {
            Call::Enqueue { .. } => replayed.n_requests += 1,
            Call::Step { rows } => {
                replayed.n_steps += 1;
                replayed.n_rows += rows.iter().map(|run| u64::from(run.n)).sum::<u64>();
                replayed.longest_turn = replayed.longest_turn.max(turn);
                turn = Duration::ZERO;
            }
            _ => {}
        }
        if with_text {
            now.print(&mut replayed.text);
        }
    }
    Ok(replayed)
}
