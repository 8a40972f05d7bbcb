//! The grammar of one choice while it runs: which tokens may come next, and whether it has ended.
//!
//! After each token what may follow depends on the grammar alone, so [`Masks`] computes it while the backend computes the
//! step that the sampler needs it for. Where the grammar leaves no choice it runs ahead: the forced tokens are known at once, before
//! the mask behind them is.

use std::collections::VecDeque;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use llguidance::api::StopReason;

use super::meters::Meters;
use crate::request::TokenId;
use crate::sampler::TokenMask;

/// The most threads that compute masks.
const MAX_THREADS: usize = 4;

/// llguidance recurses on regular expressions.
const STACK_BYTES: usize = 16 << 20;

/// The state of one choice's grammar.
pub(crate) struct Matcher {
    state: State,
    masks: Masks,
}

enum State {
    /// The grammar, behind the tokens that are forced, and what may come next.
    Here(Box<llguidance::Matcher>, Next),
    /// The tokens that are forced; what may come behind them is being computed, or was and waits to be fetched.
    Away(VecDeque<TokenId>, Receiver<Computed>),
    /// Something failed before; nothing may follow.
    Failed,
}

/// What may come next.
#[derive(Debug, Clone)]
pub(super) struct Next {
    /// These tokens, in this order, whatever the model says.
    forced: VecDeque<TokenId>,
    /// And then one of these; `None` where the answer has ended.
    then: Option<Arc<TokenMask>>,
}

type Computed = (Box<llguidance::Matcher>, Result<Arc<TokenMask>, String>);

/// A grammar that failed while it ran: its request ends, others go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the grammar cannot go on: {0}")]
pub(crate) struct MatchError(String);

/// What the next token can be.
#[derive(Debug, Clone)]
pub(crate) enum Allowed {
    /// This one.
    Only(TokenId),
    /// One of several.
    Any(Arc<TokenMask>),
}

/// What is left of an answer after a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// More has to follow, or may.
    Goes,
    /// The answer is complete and nothing can follow.
    Ended,
}

impl Matcher {
    /// Starts at the beginning of a grammar, whose [`Next`] is known.
    pub(super) fn new(grammar: llguidance::Matcher, next: Next, masks: Masks) -> Self {
        Self { state: State::Here(Box::new(grammar), next), masks }
    }

    /// What may come next. Waits for the thread that computes it if it is not done.
    ///
    /// # Errors
    /// [`MatchError`]: the grammar is too complex at this place.
    pub(crate) fn allowed(&mut self) -> Result<Allowed, MatchError> {
        if let Some(token) = self.forced() {
            return Ok(Allowed::Only(token));
        }
        let mask = self.next()?.then.as_ref().ok_or_else(|| MatchError("it has ended".into()))?;
        Ok(Allowed::Any(Arc::clone(mask)))
    }

    /// The token that must come next, whatever the model says. `None` where the model has a choice. Waits for nothing.
    pub(crate) fn forced(&self) -> Option<TokenId> {
        match &self.state {
            State::Here(_, Next { forced, .. }) | State::Away(forced, _) => forced.front().copied(),
            State::Failed => None,
        }
    }

    /// Takes the token that was chosen among the [`allowed`](Self::allowed) ones, and sends for what may follow it.
    ///
    /// # Errors
    /// [`MatchError`]: the token was not allowed, or the grammar is too complex.
    pub(crate) fn accept(&mut self, token: TokenId) -> Result<Progress, MatchError> {
        if let State::Here(_, Next { forced, .. }) | State::Away(forced, _) = &mut self.state
            && let Some(only) = forced.pop_front()
        {
            if only != token {
                self.state = State::Failed;
                return Err(MatchError("another token was forced".into()));
            }
            let has_ended = matches!(&self.state, State::Here(_, next) if next.is_nothing());
            return Ok(if has_ended { Progress::Ended } else { Progress::Goes });
        }
        let State::Here(mut grammar, _) = std::mem::replace(&mut self.state, State::Failed) else {
            return Err(MatchError("a token came before it was asked for".into()));
        };
        grammar.consume_token(token.cast_unsigned()).map_err(|error| MatchError(first_line(&error)))?;
        if has_ended(&grammar).map_err(MatchError)? {
            return Ok(Progress::Ended);
        }
        let forced = run_ahead(&mut grammar);
        self.state = if has_ended(&grammar).map_err(MatchError)? {
            State::Here(grammar, Next { forced, then: None })
        } else {
            State::Away(forced, self.masks.compute(grammar))
        };
        Ok(Progress::Goes)
    }

    fn next(&mut self) -> Result<&Next, MatchError> {
        if let State::Away(forced, computed) = &mut self.state {
            let forced = std::mem::take(forced);
            let computed = computed.try_recv().or_else(|_| {
                let began = Instant::now();
                let computed = computed.recv();
                self.masks.meters.wait.observe(began.elapsed());
                computed
            });
            self.state = State::Failed;
            let (grammar, mask) =
                computed.map_err(|_| MatchError("the thread that computes masks has ended".into()))?;
            self.state = State::Here(grammar, Next { forced, then: Some(mask.map_err(MatchError)?) });
        }
        match &self.state {
            State::Here(_, next) => Ok(next),
            State::Away(..) | State::Failed => Err(MatchError("it failed before".into())),
        }
    }
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = match self.state {
            State::Here(..) => "here",
            State::Away(..) => "away",
            State::Failed => "failed",
        };
        f.debug_tuple("Matcher").field(&state).finish()
    }
}

/// llguidance appends its state to some messages.
fn first_line(error: &impl ToString) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Whether nothing can follow, which must not be because of a failure.
fn has_ended(grammar: &llguidance::Matcher) -> Result<bool, String> {
    match grammar.stop_reason() {
        _ if !grammar.is_stopped() => Ok(false),
        reason if reason.is_ok() && !grammar.is_error() => Ok(true),
        reason => Err(grammar.get_error().map_or_else(|| reason.to_string(), |error| first_line(&error))),
    }
}

/// What may come next; moves `grammar` behind the tokens that must.
pub(super) fn compute_next(grammar: &mut llguidance::Matcher) -> Result<Next, String> {
    let forced = run_ahead(grammar);
    let then = if has_ended(grammar)? { None } else { Some(compute_mask(grammar)?) };
    Ok(Next { forced, then })
}

/// Moves `grammar` behind the tokens that must come next.
fn run_ahead(grammar: &mut llguidance::Matcher) -> VecDeque<TokenId> {
    grammar.consume_ff_tokens().into_iter().map(u32::cast_signed).collect()
}

fn compute_mask(grammar: &mut llguidance::Matcher) -> Result<Arc<TokenMask>, String> {
    let words = grammar.compute_mask().map_err(|error| match grammar.stop_reason() {
        StopReason::NoExtensionBias => "no token of the vocabulary can come next".into(),
        _ => first_line(&error),
    })?;
    Ok(Arc::new(TokenMask::from_words(words.as_slice())))
}

impl Next {
    /// Whether the answer can only be empty.
    pub(super) fn is_nothing(&self) -> bool {
        self.forced.is_empty() && self.then.is_none()
    }
}

/// The threads that compute masks. They end when the last handle is gone.
#[derive(Clone)]
pub(crate) struct Masks {
    jobs: Sender<Job>,
    meters: Arc<Meters>,
}

struct Job {
    grammar: Box<llguidance::Matcher>,
    answer: Sender<Computed>,
}

impl Masks {
    /// Starts the threads: one for every other core, since the backend wants the rest.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub(super) fn start(meters: &Arc<Meters>) -> std::io::Result<Self> {
        let n_threads = thread::available_parallelism().map_or(1, |n| n.get() / 2).clamp(1, MAX_THREADS);
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        for i in 0..n_threads {
            let (queue, meters) = (Arc::clone(&queue), Arc::clone(meters));
            thread::Builder::new()
                .name(format!("minerva-mask-{i}"))
                .stack_size(STACK_BYTES)
                .spawn(move || work(&queue, &meters))?;
        }
        Ok(Self { jobs, meters: Arc::clone(meters) })
    }

    fn compute(&self, grammar: Box<llguidance::Matcher>) -> Receiver<Computed> {
        let (answer, computed) = mpsc::channel();
        // Without a thread the answer's sender is dropped, and whoever waits for it hears that.
        let _ = self.jobs.send(Job { grammar, answer });
        computed
    }
}

fn work(queue: &Mutex<Receiver<Job>>, meters: &Meters) {
    loop {
        // The lock is held while waiting, and free again before the work: another thread waits behind it.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { mut grammar, answer }) = job else { return };
        let began = Instant::now();
        let mask = compute_mask(&mut grammar); // a panic in there comes back as an error
        meters.mask.observe(began.elapsed());
        let _ = answer.send((grammar, mask)); // nobody waits for that of a request that was cancelled
    }
}
