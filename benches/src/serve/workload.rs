//! The workloads of design.md, section 4, as numbers, and the requests that they are made of.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::prompts::{self, Rng};

/// What the clients do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// 1 client, 64-word prompts, 128 tokens
    One,
    /// 8 clients, 64-word prompts, 64 tokens
    Eight,
    /// 32 clients, 64-word prompts, 64 tokens
    ThirtyTwo,
    /// 16 clients share a 1,000-word system prompt that no earlier round had; 32 tokens
    SharedPrefix,
    /// 4 streams; after a quarter of the time another client sends 1,500-word prompts back to back
    LongPromptBeside,
    /// 32 clients, a third of whose requests leave while queued, in prefill or in decode
    Abort,
}

impl Workload {
    /// The name on the command line and in reports.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::One => "one",
            Self::Eight => "eight",
            Self::ThirtyTwo => "thirty-two",
            Self::SharedPrefix => "shared-prefix",
            Self::LongPromptBeside => "long-prompt-beside",
            Self::Abort => "abort",
        }
    }

    /// The numbers, with request counts and durations multiplied by `scale`.
    pub(super) fn shape(self, scale: f64) -> Shape {
        let plain = |clients: usize, requests: usize, max_tokens| Shape {
            clients,
            requests: Some(((requests as f64 * scale).round() as usize).max(clients)),
            prompt_words: 64,
            system_words: 0,
            max_tokens,
            beside: None,
            has_leavers: false,
        };
        match self {
            Self::One => plain(1, 6, 128),
            Self::Eight => plain(8, 24, 64),
            Self::ThirtyTwo => plain(32, 64, 64),
            Self::SharedPrefix => Shape { prompt_words: 16, system_words: 1000, ..plain(16, 48, 32) },
            Self::LongPromptBeside => {
                let window = Duration::from_secs_f64(20.0 * scale);
                let beside = Beside { words: 1500, max_tokens: 1, window, start: window / 4 };
                Shape { requests: None, beside: Some(beside), ..plain(4, 4, 128) }
            }
            Self::Abort => Shape { has_leavers: true, ..plain(32, 200, 64) },
        }
    }
}

/// The numbers of one workload.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Clients, each with one request at a time.
    pub(super) clients: usize,
    /// Requests of all clients together; `None` goes on until the end of the window.
    pub(super) requests: Option<usize>,
    pub(super) prompt_words: usize,
    /// Words of the system prompt that all requests of one round share; 0 for none.
    pub(super) system_words: usize,
    pub(super) max_tokens: u32,
    pub(super) beside: Option<Beside>,
    pub(super) has_leavers: bool,
}

/// The client with long prompts beside the streams.
#[derive(Debug, Clone, Copy)]
pub(super) struct Beside {
    pub(super) words: usize,
    pub(super) max_tokens: u32,
    /// How long the workload runs; what is under way then is finished, but not counted.
    pub(super) window: Duration,
    /// When the long prompts begin; before that the streams are alone.
    pub(super) start: Duration,
}

/// Which requests: everything that decides their text.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Round {
    pub(super) workload: Workload,
    pub(super) scale: f64,
    pub(super) seed: u64,
    /// From 0.
    pub(super) number: u64,
}

/// One request.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) system: Option<Arc<str>>,
    pub(super) user: String,
    pub(super) max_tokens: u32,
    pub(super) leave: Option<Leave>,
}

/// When a client goes away before its answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leave {
    /// So long after sending the request.
    After(Duration),
    /// At its n-th piece of text.
    AtPiece(usize),
}

/// Makes the requests of one round, in any order.
#[derive(Debug)]
pub(super) struct Asks {
    round: Round,
    shape: Shape,
    system: Option<Arc<str>>,
}

impl Asks {
    pub(super) fn new(round: Round) -> Self {
        let shape = round.workload.shape(round.scale);
        let mut asks = Self { round, shape, system: None };
        if shape.system_words > 0 {
            asks.system = Some(prompts::text(&mut asks.rng(1, 0), shape.system_words).into());
        }
        asks
    }

    pub(super) fn shape(&self) -> Shape {
        self.shape
    }

    fn rng(&self, purpose: u64, index: u64) -> Rng {
        Rng::new(self.round.seed, &[self.round.workload as u64, self.round.number, purpose, index])
    }

    /// Request `index` of the streams.
    pub(super) fn stream(&self, index: usize) -> Ask {
        let mut rng = self.rng(2, index as u64);
        let user = prompts::text(&mut rng, self.shape.prompt_words);
        let max_tokens = self.shape.max_tokens;
        let leave = (self.shape.has_leavers && index % 3 == 2).then(|| match rng.below(3) {
            0 => Leave::After(Duration::from_millis(rng.below(20))),
            1 => Leave::After(Duration::from_millis(rng.below(1500))),
            _ => Leave::AtPiece(1 + rng.below(u64::from(max_tokens) - 1) as usize),
        });
        Ask { system: self.system.clone(), user, max_tokens, leave }
    }

    /// Request `index` of the client with long prompts.
    pub(super) fn long(&self, beside: &Beside, index: usize) -> Ask {
        let user = prompts::text(&mut self.rng(3, index as u64), beside.words);
        Ask { system: None, user, max_tokens: beside.max_tokens, leave: None }
    }

    /// A short request that no round repeats, to wake up a server before it is measured.
    pub(super) fn warm_up(&self) -> Ask {
        Ask { system: None, user: prompts::text(&mut self.rng(4, 0), 32), max_tokens: 8, leave: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(workload: Workload, round: u64) -> Asks {
        Asks::new(Round { workload, scale: 1.0, seed: 1, number: round })
    }

    #[test]
    fn prompts_differ_between_requests_rounds_and_workloads_and_repeat_otherwise() {
        let first = asks(Workload::Eight, 0).stream(0).user;
        assert_eq!(first, asks(Workload::Eight, 0).stream(0).user);
        assert_ne!(first, asks(Workload::Eight, 0).stream(1).user);
        assert_ne!(first, asks(Workload::Eight, 1).stream(0).user);
        assert_ne!(first, asks(Workload::ThirtyTwo, 0).stream(0).user);
    }

    #[test]
    fn one_round_shares_its_system_prompt_and_the_next_has_another() {
        let (this, next) = (asks(Workload::SharedPrefix, 0), asks(Workload::SharedPrefix, 1));
        assert_eq!(this.stream(0).system, this.stream(5).system);
        assert_ne!(this.stream(0).system, next.stream(0).system);
    }

    #[test]
    fn a_third_of_the_abort_workload_leaves_and_nobody_else_does() {
        let leaving = |workload| (0..200).filter(|&i| asks(workload, 0).stream(i).leave.is_some()).count();
        assert_eq!(leaving(Workload::Abort), 66);
        assert_eq!(leaving(Workload::ThirtyTwo), 0);
    }
}
