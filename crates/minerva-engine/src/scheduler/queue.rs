//! Who waits, and who is next: the best priority first, then the client with the fewest sequences, then the earliest deadline.
//!
//! Priorities age, so that nobody waits for ever behind better ones; at best to the best that waits, so that it is never age that decides
//! between clients. What was gained by waiting holds once a request is seated, or it would have to yield at once. Between clients of
//! the same priority, the one who has fewer sequences running is next, and with as many the one who was served longer ago: a client
//! with two hundred requests and one with a single request get the same share of the seats.

use std::cmp::Reverse;

use super::common;
use super::job::{ClientId, Job, RequestId};
use super::parked::ParkId;

/// Waiting so long is worth one priority.
const AGING_US: u64 = 10_000_000;

/// A request without a deadline is ordered as if it had to start so long after it came.
const PATIENCE_US: u64 = 60_000_000;

/// Clients whose last turn is remembered. Who is forgotten counts as never served.
const MOST_CLIENTS: usize = 1024;

/// Waiting prompts that one is compared with when it begins.
const MOST_COMPARED: usize = 64;

/// A request's place among others: when it came, and how long it has waited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Turn {
    since_us: u64,
    order: u64,
    /// Without the time in which it was computed.
    waited_us: u64,
}

impl Turn {
    /// Lower is earlier. Waiting makes a priority better, at most as good as `best`.
    pub(super) fn rank(&self, priority: i32, best: i32) -> i64 {
        let aged = i64::from(priority) - (self.waited_us / AGING_US) as i64;
        aged.max(i64::from(best.min(priority)))
    }

    pub(super) fn wait(&mut self, waited_us: u64) {
        self.waited_us = self.waited_us.saturating_add(waited_us);
    }
}

/// A request that waits for its sequences.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) job: Job,
    /// Where it comes from, when it ran before.
    pub(super) resume: Option<Resume>,
    /// As it was when it came here; the wait since then counts too.
    pub(super) turn: Turn,
    entered_us: u64,
    /// Somebody saw whether there is a file for it.
    looked: bool,
}

/// A choice that ran before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Resume {
    pub(super) choice: u32,
    /// Its cells, if they were kept.
    pub(super) parked: Option<ParkId>,
    pub(super) turn: Turn,
    /// Tokens of its answer.
    pub(super) n_answered: usize,
}

impl Waiting {
    /// Lower is earlier, and `best` is the earliest.
    pub(super) fn rank(&self, now_us: u64, best: i32) -> i64 {
        let mut turn = self.turn;
        turn.wait(now_us.saturating_sub(self.entered_us));
        turn.rank(self.job.terms.priority, best)
    }

    fn due_us(&self) -> u64 {
        let patient = self.turn.since_us.saturating_add(PATIENCE_US);
        self.job.terms.deadline_us.map_or(patient, |deadline| deadline.min(patient))
    }
}

/// All that wait.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: Vec<Waiting>,
    /// New requests among them, and their prompt tokens.
    n_new: usize,
    n_new_tokens: usize,
    /// Per client, when it was served last.
    served: Vec<(ClientId, u64)>,
    clock: u64,
}

impl Queue {
    pub(super) fn push(&mut self, job: Job, now_us: u64) {
        self.clock += 1;
        self.n_new += 1;
        self.n_new_tokens += job.prompt.len();
        let turn = Turn { since_us: now_us, order: self.clock, waited_us: 0 };
        self.waiting.push(Waiting { job, resume: None, turn, entered_us: now_us, looked: false });
    }

    /// A request that ran waits again, in its old place.
    pub(super) fn push_back(&mut self, job: Job, resume: Resume, now_us: u64) {
        let turn = resume.turn;
        self.waiting.push(Waiting { job, resume: Some(resume), turn, entered_us: now_us, looked: true });
    }

    /// Removes all that waits of a request; what it kept is in the second list. `true` when it never ran.
    pub(super) fn remove(&mut self, id: RequestId) -> (bool, Vec<ParkId>) {
        let (mut was_new, mut kept) = (false, Vec::new());
        while let Some(at) = self.waiting.iter().position(|waiting| waiting.job.id == id) {
            let waiting = self.take(at);
            was_new |= waiting.resume.is_none();
            kept.extend(waiting.resume.and_then(|resume| resume.parked));
        }
        (was_new, kept)
    }

    /// New requests whose deadline is over; they are removed.
    pub(super) fn expired(&mut self, now_us: u64) -> Vec<RequestId> {
        let is_late = |waiting: &Waiting| {
            waiting.resume.is_none() && waiting.job.terms.deadline_us.is_some_and(|deadline| deadline <= now_us)
        };
        let mut late = Vec::new();
        while let Some(at) = self.waiting.iter().position(is_late) {
            late.push(self.take(at).job.id);
        }
        late
    }

    /// Requests that never ran, and their prompt tokens.
    pub(super) fn n_new(&self) -> (usize, usize) {
        (self.n_new, self.n_new_tokens)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Who waits.
    pub(super) fn ids(&self) -> impl Iterator<Item = RequestId> {
        self.waiting.iter().map(|waiting| waiting.job.id)
    }

    /// When the next deadline of those that wait is over.
    pub(super) fn next_deadline_us(&self, now_us: u64) -> Option<u64> {
        let deadlines = self.waiting.iter().filter_map(|waiting| waiting.job.terms.deadline_us);
        deadlines.filter(|&deadline| deadline > now_us).min()
    }

    /// Requests that may reuse what is in a file and for which nobody has looked there.
    pub(super) fn unlooked(&mut self) -> impl Iterator<Item = (&Job, &mut bool)> {
        let new = self.waiting.iter_mut().filter(|waiting| !waiting.looked && waiting.job.reuse);
        new.map(|waiting| (&waiting.job, &mut waiting.looked))
    }

    /// The best priority that waits.
    pub(super) fn best_priority(&self) -> Option<i32> {
        self.waiting.iter().map(|waiting| waiting.job.terms.priority).min()
    }

    /// The place of the next one of those that `may_start`; `n_running` is how many sequences a client has.
    pub(super) fn next(
        &self,
        now_us: u64,
        n_running: impl Fn(ClientId) -> usize,
        may_start: impl Fn(RequestId) -> bool,
    ) -> Option<usize> {
        let best = self.best_priority()?;
        (0..self.waiting.len()).filter(|&at| may_start(self.waiting[at].job.id)).min_by_key(|&at| {
            let waiting = &self.waiting[at];
            let client = waiting.job.terms.client;
            (waiting.rank(now_us, best), n_running(client), self.served(client), waiting.due_us(), waiting.turn.order)
        })
    }

    /// All that wait in the order in which they will begin, as far as that can be told now: clients on equal terms take turns.
    pub(super) fn in_order(&self, now_us: u64, n_running: impl Fn(ClientId) -> usize) -> Vec<&Waiting> {
        let best = self.best_priority().unwrap_or_default();
        let client = |waiting: &Waiting| waiting.job.terms.client;
        let own = |waiting: &Waiting| (waiting.rank(now_us, best), waiting.due_us(), waiting.turn.order);
        let mut order: Vec<&Waiting> = self.waiting.iter().collect();
        order.sort_by_key(|waiting| (client(waiting), own(waiting)));
        let turns = order.chunk_by(|a, b| client(a) == client(b)).flat_map(|own| {
            let (id, n_before) = own.first().map_or((0, 0), |first| (client(first), n_running(client(first))));
            let served = self.served(id);
            own.iter().enumerate().map(move |(turn, waiting)| (n_before + turn, served, *waiting))
        });
        let mut order: Vec<_> = turns.collect();
        order.sort_by_key(|(n_running, served, waiting)| {
            (waiting.rank(now_us, best), *n_running, *served, waiting.due_us(), waiting.turn.order)
        });
        order.into_iter().map(|(.., waiting)| waiting).collect()
    }

    /// How many tokens of the prompt of `job` those have that will be next, of the same namespace.
    pub(super) fn n_shared_each(&self, job: &Job) -> Vec<usize> {
        let namespace = job.terms.namespace;
        let same = self.waiting.iter().take(MOST_COMPARED).map(|waiting| &waiting.job);
        same.filter(|other| other.reuse && other.terms.namespace == namespace)
            .map(|other| common(&other.prompt, &job.prompt))
            .collect()
    }

    pub(super) fn at(&self, at: usize) -> &Waiting {
        &self.waiting[at]
    }

    /// Takes one out; its client was served now.
    pub(super) fn admit(&mut self, at: usize, now_us: u64) -> Waiting {
        let mut waiting = self.take(at);
        waiting.turn.wait(now_us.saturating_sub(waiting.entered_us));
        self.clock += 1;
        let (client, now) = (waiting.job.terms.client, self.clock);
        match self.served.iter_mut().find(|(known, _)| *known == client) {
            Some((_, last)) => *last = now,
            None => self.served.push((client, now)),
        }
        if self.served.len() > MOST_CLIENTS {
            self.served.sort_unstable_by_key(|(_, last)| Reverse(*last));
            self.served.truncate(MOST_CLIENTS / 2);
        }
        waiting
    }

    fn take(&mut self, at: usize) -> Waiting {
        let waiting = self.waiting.remove(at);
        if waiting.resume.is_none() {
            self.n_new -= 1;
            self.n_new_tokens -= waiting.job.prompt.len();
        }
        waiting
    }

    fn served(&self, client: ClientId) -> u64 {
        self.served.iter().find(|(known, _)| *known == client).map_or(0, |(_, last)| *last)
    }
}
