//! The workloads of benches/README.md as numbers, and the requests that they are made of.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::canary;
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
    /// 16 clients, a request each, all at once, with one system prompt of 1,000 words
    Burst,
    /// 8 clients whose answers follow a JSON schema, then as many tokens without it
    JsonSchema,
    /// Requests of random length for --load times the cells, for 20 s (600 s with --scale 30); a third leaves
    Overload,
    /// Key A sends 200 requests at once, key B one after the other
    Fairness,
    /// 8 clients with two keys, each prompt with a secret; a third leaves (10,000 requests with --scale 25)
    Canary,
    /// 1 client has texts of 64 words repeated, each with guessing ahead and without it by turns; 256 tokens
    Repetitions,
    /// 1 client, the same by turns; 64-word prompts, 256 tokens drawn at temperature 1
    RandomText,
}

/// What a request is in its workload.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Role {
    /// What the workload is about.
    #[default]
    Stream,
    /// A long prompt beside the streams.
    Long,
    /// As many tokens, without the schema or without guessing ahead.
    Twin,
    /// Of the client that has the server for itself before the flood.
    Idle,
    /// Of the flood.
    Flood,
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
            Self::Burst => "burst",
            Self::JsonSchema => "json-schema",
            Self::Overload => "overload",
            Self::Fairness => "fairness",
            Self::Canary => "canary",
            Self::Repetitions => "repetitions",
            Self::RandomText => "random-text",
        }
    }

    /// Whether the system prompt of a round is meant to be found in the cache.
    pub(super) fn shares_prompts(self) -> bool {
        matches!(self, Self::SharedPrefix | Self::Burst | Self::Canary)
    }

    /// Whether the servers have to be started with two keys.
    pub(super) fn needs_keys(self) -> bool {
        matches!(self, Self::Fairness | Self::Canary)
    }
}

impl Round {
    /// The numbers, with request counts and durations multiplied by the scale.
    pub(super) fn shape(&self) -> Shape {
        let scale = self.scale;
        let plain = |clients: usize, requests: usize, max_tokens| Shape {
            clients,
            requests: Some(((requests as f64 * scale).round() as usize).max(clients)),
            prompt_words: 64,
            system_words: 0,
            max_tokens,
            window: None,
            beside: None,
            has_leavers: false,
            has_pairs: false,
        };
        match self.workload {
            Workload::One => plain(1, 6, 128),
            Workload::Eight => plain(8, 24, 64),
            Workload::ThirtyTwo => plain(32, 64, 64),
            Workload::SharedPrefix => Shape { prompt_words: 16, system_words: 1000, ..plain(16, 48, 32) },
            Workload::LongPromptBeside => {
                let window = Duration::from_secs_f64(20.0 * scale);
                let beside = Beside { words: 1500, max_tokens: 1, start: window / 4 };
                Shape { requests: None, window: Some(window), beside: Some(beside), ..plain(4, 4, 128) }
            }
            Workload::Abort => Shape { has_leavers: true, ..plain(32, 200, 64) },
            Workload::Burst => Shape { requests: Some(16), prompt_words: 16, system_words: 1000, ..plain(16, 16, 16) },
            Workload::JsonSchema => plain(8, 24, 320),
            Workload::Overload => {
                let (words, max_tokens) = self.load.longest();
                let window = Some(Duration::from_secs_f64(20.0 * scale));
                let clients = self.load.clients();
                let shape = plain(clients, clients, max_tokens);
                Shape { requests: None, window, prompt_words: words, has_leavers: true, ..shape }
            }
            Workload::Fairness => {
                let flood = ((200.0 * scale).round() as usize).max(16);
                plain(flood, flood, 64)
            }
            Workload::Canary => Shape { prompt_words: 8, system_words: 40, has_leavers: true, ..plain(8, 400, 24) },
            Workload::Repetitions | Workload::RandomText => Shape { has_pairs: true, ..plain(1, 6, 256) },
        }
    }
}

/// How much is asked of a server at once in `overload`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Load {
    /// KV cells of all sequences.
    pub(super) cells: u32,
    pub(super) sequences: u32,
    /// Cells that all requests together need, over those that there are.
    pub(super) factor: f64,
}

impl Load {
    /// Words of a prompt that fills most of a sequence's share of the cells.
    fn fill_words(&self) -> usize {
        const TOKENS_PER_WORD: f64 = 1.4; // more than any prompt of this length has
        const FRAME_TOKENS: u32 = 40; // of the chat, with the answer
        let share = self.cells / self.sequences.max(1);
        (f64::from(share.saturating_sub(FRAME_TOKENS)) / TOKENS_PER_WORD) as usize
    }

    /// Words of the longest prompt, at up to two tokens each, and tokens of the longest answer: together less than a
    /// sequence's share of the cells.
    fn longest(&self) -> (usize, u32) {
        let share = (self.cells / self.sequences.max(1)).max(64);
        ((share / 5) as usize, share / 5)
    }

    /// Clients, each with one request at a time: lengths are uniform from almost nothing, so the mean is half of the longest.
    fn clients(&self) -> usize {
        const TOKENS_PER_WORD: f64 = 1.3;
        let (words, tokens) = self.longest();
        let mean_tokens = f64::midpoint(words as f64 * TOKENS_PER_WORD, f64::from(tokens));
        ((self.factor * f64::from(self.cells) / mean_tokens).ceil() as usize).clamp(1, 4096)
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
    /// How long requests begin; what is under way then is finished.
    pub(super) window: Option<Duration>,
    pub(super) beside: Option<Beside>,
    pub(super) has_leavers: bool,
    /// Each request is followed or preceded by its twin.
    pub(super) has_pairs: bool,
}

/// The client with long prompts beside the streams.
#[derive(Debug, Clone, Copy)]
pub(super) struct Beside {
    pub(super) words: usize,
    pub(super) max_tokens: u32,
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
    pub(super) load: Load,
}

/// One request.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) system: Option<Arc<str>>,
    pub(super) user: String,
    /// The exact number, or the most of an answer that follows a schema.
    pub(super) max_tokens: u32,
    pub(super) leave: Option<Leave>,
    /// The answer follows the schema of [`super::schema`].
    pub(super) has_schema: bool,
    /// Which of the API keys.
    pub(super) key: usize,
    /// The server may reuse what others computed.
    pub(super) cache_prompt: bool,
    /// The server may guess tokens ahead.
    pub(super) speculate: bool,
    /// Tokens are drawn with this seed, from all of them; `None` takes the likeliest.
    pub(super) seed: Option<u64>,
    /// Alternatives per token; more than 0 reports tokens.
    pub(super) top_logprobs: u32,
    /// The answer keeps its text.
    pub(super) keeps_text: bool,
}

impl Default for Ask {
    fn default() -> Self {
        Self {
            system: None,
            user: String::new(),
            max_tokens: 1,
            leave: None,
            has_schema: false,
            key: 0,
            cache_prompt: true,
            speculate: true,
            seed: None,
            top_logprobs: 0,
            keeps_text: false,
        }
    }
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
        let shape = round.shape();
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

    /// Request `index` in a role.
    pub(super) fn ask(&self, role: Role, index: usize) -> Ask {
        match role {
            Role::Stream | Role::Flood => self.stream(role, index),
            Role::Long => self.long(index),
            Role::Twin if self.shape.has_pairs => Ask { speculate: false, ..self.stream(role, index) },
            // The same sizes, other words.
            Role::Twin => Ask { user: self.words(5, index, self.shape.prompt_words), ..self.plain() },
            Role::Idle => Ask { user: self.words(6, index, self.shape.prompt_words), key: 1, ..self.plain() },
        }
    }

    fn plain(&self) -> Ask {
        Ask { system: self.system.clone(), max_tokens: self.shape.max_tokens, ..Ask::default() }
    }

    fn words(&self, purpose: u64, index: usize, n_words: usize) -> String {
        prompts::text(&mut self.rng(purpose, index as u64), n_words)
    }

    fn stream(&self, role: Role, index: usize) -> Ask {
        let workload = self.round.workload;
        let mut ask = self.plain();
        let mut rng = self.rng(if role == Role::Flood { 7 } else { 2 }, index as u64);
        let mut n_words = self.shape.prompt_words;
        if workload == Workload::Overload {
            n_words = 1 + rng.below(n_words as u64) as usize;
            ask.max_tokens = 1 + rng.below(u64::from(ask.max_tokens)) as u32;
            ask.keeps_text = true;
        }
        ask.user = prompts::text(&mut rng, n_words);
        match workload {
            Workload::JsonSchema => {
                ask.user = format!("Describe a place as JSON, with these words in mind: {}", ask.user);
                ask.has_schema = true;
                ask.keeps_text = true;
            }
            Workload::Fairness => ask.key = usize::from(role == Role::Stream),
            Workload::Canary => {
                ask.user = canary::prompt(&ask.user, &self.secret(index));
                // Both keys with the cache and without it.
                (ask.key, ask.cache_prompt, ask.keeps_text) = (index % 2, index % 4 < 2, true);
            }
            Workload::Repetitions => {
                ask.user = format!("Repeat this text word by word, again and again: {}", ask.user);
                (ask.cache_prompt, ask.keeps_text) = (false, true);
            }
            Workload::RandomText => {
                (ask.cache_prompt, ask.keeps_text, ask.seed) = (false, true, Some(index as u64));
            }
            _ => {}
        }
        let longest = self.shape.window.map_or(1500, |window| window.as_millis() as u64 / 2);
        ask.leave = (self.shape.has_leavers && index % 3 == 2).then(|| match rng.below(3) {
            0 => Leave::After(Duration::from_millis(rng.below(20))),
            1 => Leave::After(Duration::from_millis(rng.below(longest))),
            _ => Leave::AtPiece(1 + rng.below(u64::from(ask.max_tokens.max(2)) - 1) as usize),
        });
        ask
    }

    /// What only request `index` knows.
    pub(super) fn secret(&self, index: usize) -> String {
        canary::secret(&mut self.rng(8, index as u64))
    }

    fn long(&self, index: usize) -> Ask {
        let (words, max_tokens) = self.shape.beside.map_or((1, 1), |beside| (beside.words, beside.max_tokens));
        Ask { user: self.words(3, index, words), max_tokens, ..Ask::default() }
    }

    /// Requests that no round repeats, to wake up a server before it is measured: a short one, and before an overload, whose
    /// memory is watched, as many as there are sequences, which together write to nearly every cell. Memory that nobody has
    /// written to takes none.
    pub(super) fn warm_ups(&self) -> Vec<Ask> {
        let ask = |index, n_words| Ask { user: self.words(4, index, n_words), max_tokens: 8, ..Ask::default() };
        match self.round.workload {
            Workload::Overload => {
                let n_words = self.round.load.fill_words();
                (0..self.round.load.sequences as usize).map(|index| ask(index, n_words)).collect()
            }
            _ => vec![ask(0, 32)],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(workload: Workload, round: u64) -> Asks {
        let load = Load { cells: 8192, sequences: 8, factor: 4.0 };
        Asks::new(Round { workload, scale: 1.0, seed: 1, number: round, load })
    }

    #[test]
    fn prompts_differ_between_requests_rounds_and_workloads_and_repeat_otherwise() {
        let first = asks(Workload::Eight, 0).ask(Role::Stream, 0).user;
        assert_eq!(first, asks(Workload::Eight, 0).ask(Role::Stream, 0).user);
        assert_ne!(first, asks(Workload::Eight, 0).ask(Role::Stream, 1).user);
        assert_ne!(first, asks(Workload::Eight, 1).ask(Role::Stream, 0).user);
        assert_ne!(first, asks(Workload::ThirtyTwo, 0).ask(Role::Stream, 0).user);
    }

    #[test]
    fn one_round_shares_its_system_prompt_and_the_next_has_another() {
        let (this, next) = (asks(Workload::SharedPrefix, 0), asks(Workload::SharedPrefix, 1));
        assert_eq!(this.ask(Role::Stream, 0).system, this.ask(Role::Stream, 5).system);
        assert_ne!(this.ask(Role::Stream, 0).system, next.ask(Role::Stream, 0).system);
    }

    #[test]
    fn an_overload_asks_for_so_many_times_the_cells_in_requests_that_fit() {
        let asks = asks(Workload::Overload, 0);
        let clients = asks.shape().clients;
        let needs: Vec<usize> = (0..clients)
            .map(|index| asks.ask(Role::Stream, index))
            .map(|ask| ask.user.split_whitespace().count() + ask.max_tokens as usize)
            .collect();
        assert!(needs.iter().all(|tokens| *tokens <= 8192 / 8 * 2 / 5), "{needs:?}");
        let times = needs.iter().sum::<usize>() as f64 / 8192.0;
        assert!((2.8..4.4).contains(&times), "{clients} clients need {times} times the cells, at one token a word");
    }

    #[test]
    fn both_keys_ask_with_the_cache_and_without_and_every_secret_is_another() {
        let asks = asks(Workload::Canary, 0);
        let ways: std::collections::BTreeSet<(usize, bool)> =
            (0..8).map(|index| asks.ask(Role::Stream, index)).map(|ask| (ask.key, ask.cache_prompt)).collect();
        assert_eq!(ways.len(), 4);
        let secrets: std::collections::BTreeSet<String> = (0..1000).map(|index| asks.secret(index)).collect();
        assert_eq!(secrets.len(), 1000);
        assert!(asks.ask(Role::Stream, 5).user.contains(&asks.secret(5)));
    }

    #[test]
    fn a_twin_of_a_pair_differs_in_guessing_and_nothing_else() {
        for workload in [Workload::Repetitions, Workload::RandomText] {
            let asks = asks(workload, 0);
            let (ask, twin) = (asks.ask(Role::Stream, 3), asks.ask(Role::Twin, 3));
            assert_eq!((ask.user, ask.seed, ask.speculate), (twin.user, twin.seed, !twin.speculate));
        }
        assert_ne!(asks(Workload::RandomText, 0).ask(Role::Stream, 1).seed, None);
        assert_eq!(asks(Workload::Repetitions, 0).ask(Role::Stream, 1).seed, None);
    }

    #[test]
    fn a_third_of_the_abort_workload_leaves_and_nobody_else_does() {
        let leaving = |workload| (0..200).filter(|&i| asks(workload, 0).ask(Role::Stream, i).leave.is_some()).count();
        assert_eq!(leaving(Workload::Abort), 66);
        assert_eq!(leaving(Workload::ThirtyTwo), 0);
    }
}
