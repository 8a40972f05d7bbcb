//! One accepted request while it runs: its choices, what of their text is out, and its times.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use crate::backend::{SeqId, Tokenizer};
use crate::constrain::{Allowed, MatchError, Matcher, Progress};
use crate::decoder::TextDecoder;
use crate::ends::Ends;
use crate::event::{Delta, Event, FinishReason, GenerationError, Summary, TokenInfo, TopToken};
use crate::queue_watch::Told;
use crate::request::{Request, TokenId};
use crate::sampler::{Breakers, Sampled, Sampler};
use crate::scheduler::Miss;
use crate::shared::Shared;

/// A request that was checked and tokenized.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) request: Request,
    pub(crate) max_tokens: u32,
    /// The grammar of each choice, or none at all.
    pub(crate) matchers: Vec<Matcher>,
    pub(crate) seed: u64,
    /// Cells are only shared within it.
    pub(crate) namespace: u64,
    /// Its prompt is to be kept for everybody once it is computed, pinned or not.
    pub(crate) warms: Option<bool>,
    /// What ends a repetition for DRY; without DRY nothing does.
    pub(crate) breakers: Arc<Breakers>,
    pub(crate) submitted: Instant,
    pub(crate) events: UnboundedSender<Event>,
}

/// One continuation of a request.
#[derive(Debug)]
pub(crate) struct Choice {
    index: u32,
    sampler: Sampler,
    /// What the choice has to follow.
    matcher: Option<Matcher>,
    decoder: TextDecoder,
    /// Tokens whose text is not out yet, each with the offset of its first byte in the choice's bytes.
    held: VecDeque<(usize, TokenInfo)>,
    n_bytes: usize,
    n_generated: u32,
    finished: bool,
    shared: Arc<Shared>,
    /// The next token, where it was sampled together with other rows' (see [`Generation::rows`]).
    sampled: Option<Result<Sampled, GenerationError>>,
}

/// A choice that waits for its next token, with what sampling it needs: it can be sent to another thread.
pub(crate) struct WaitingRow<'a> {
    pub(crate) seq: SeqId,
    choice: &'a mut Choice,
    ends: &'a Ends,
    n_logprobs: Option<usize>,
}

/// A request that has, or waits for, its sequences.
#[derive(Debug)]
pub(crate) struct Generation {
    events: UnboundedSender<Event>,
    stops: Vec<String>,
    ends: Ends,
    n_logprobs: Option<usize>,
    max_tokens: u32,
    warms: Option<bool>,
    n_prompt: u32,
    n_cached: u32,
    n_guessed: u32,
    n_right_guesses: u32,
    /// Where each choice runs; `None` while it waits.
    seqs: Vec<Option<SeqId>>,
    choices: Vec<Choice>,
    /// Why the prompt is computed, when it is not reused.
    miss: Option<Miss>,
    /// What it was told while it waits, if it wants to be.
    told: Option<Told>,
    submitted: Instant,
    /// The answer is cut off here.
    deadline: Option<Instant>,
    started: Option<Instant>,
    first_token: Option<Instant>,
}

impl Generation {
    pub(crate) fn new(accepted: Accepted, tokenizer: &dyn Tokenizer, n_vocab: usize, shared: &Arc<Shared>) -> Self {
        let Accepted { prompt, request, max_tokens, matchers, seed, breakers, submitted, events, warms, .. } = accepted;
        let mut matchers = matchers.into_iter();
        let choices = (0..request.n).map(|index| {
            let mut sampler = Sampler::new(&request.sampling, n_vocab, seed.wrapping_add(u64::from(index)))
                .with_breakers(Arc::clone(&breakers));
            // Only so much of it is ever looked back at.
            let n_before = prompt.len().saturating_sub(sampler.window_tokens());
            prompt[n_before..].iter().for_each(|&token| sampler.accept(token));
            Choice {
                index,
                sampler,
                matcher: matchers.next(),
                decoder: TextDecoder::new(&request.stop),
                held: VecDeque::new(),
                n_bytes: 0,
                n_generated: 0,
                finished: false,
                shared: Arc::clone(shared),
                sampled: None,
            }
        });
        Self {
            choices: choices.collect(),
            ends: Ends::new(&request, tokenizer),
            stops: request.stop,
            events,
            n_logprobs: request.logprobs.map(|n| n as usize),
            max_tokens,
            warms,
            n_prompt: prompt.len() as u32,
            n_cached: 0,
            n_guessed: 0,
            n_right_guesses: 0,
            seqs: Vec::new(),
            miss: None,
            told: request.queue_updates.then(Told::default),
            deadline: request.deadline_ms.map(|ms| submitted + Duration::from_millis(ms)),
            submitted,
            started: None,
            first_token: None,
        }
    }

    /// The request got its sequences, one per choice.
    pub(crate) fn start(&mut self, seqs: Vec<SeqId>, n_cached: u32, miss: Option<Miss>, now: Instant) {
        self.miss = miss;
        if self.told.take().is_some() {
            let _ = self.events.send(Event::Started);
        }
        self.seqs = seqs.into_iter().map(Some).collect();
        self.n_cached = n_cached;
        self.started = Some(now);
    }

    /// It wants to hear where it is in the queue.
    pub(crate) fn wants_updates(&self) -> bool {
        self.told.is_some()
    }

    /// It waits at this place.
    pub(crate) fn tell(&mut self, position: u32, estimate_us: Option<u64>, now: Instant) {
        if let Some(event) = self.told.as_mut().and_then(|told| told.tell(position, estimate_us, now)) {
            let _ = self.events.send(event);
        }
    }

    /// What it should have got from elsewhere could not be had.
    pub(crate) fn lost_prefix(&mut self) {
        if self.set_cached(0) {
            self.miss = Some(Miss::MemoryCannotBeCut);
        }
    }

    /// The choice in `seq` gave its sequence away and waits for another.
    pub(crate) fn pause(&mut self, seq: SeqId) {
        for own in self.seqs.iter_mut().filter(|own| **own == Some(seq)) {
            *own = None;
        }
    }

    /// A choice goes on in another sequence.
    pub(crate) fn resume(&mut self, choice: u32, seq: SeqId) {
        if let Some(own) = self.seqs.get_mut(choice as usize) {
            *own = Some(seq);
        }
    }

    /// So many tokens of the prompt came from a copy, or had to be computed after all. `false` when the prompt was done before.
    pub(crate) fn set_cached(&mut self, n_tokens: u32) -> bool {
        let is_prompt = self.first_token.is_none();
        if is_prompt {
            self.n_cached = n_tokens.min(self.n_prompt);
        }
        is_prompt
    }

    /// Tokens were guessed and computed along, or turned out right.
    pub(crate) fn count_guesses(&mut self, n_guessed: u32, n_right: u32) {
        self.n_guessed += n_guessed;
        self.n_right_guesses += n_right;
    }

    /// Whether its prompt is to be kept for everybody, and then whether it is pinned.
    pub(crate) fn warms(&self) -> Option<bool> {
        self.warms
    }

    /// The deadline that the request asked for, in milliseconds.
    pub(crate) fn deadline_ms(&self) -> Option<u64> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(self.submitted).as_millis() as u64)
    }

    /// For how long it has been here.
    pub(crate) fn waited(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.submitted)
    }

    pub(crate) fn n_prompt(&self) -> usize {
        self.n_prompt as usize
    }

    pub(crate) fn n_cached(&self) -> u32 {
        self.n_cached
    }

    /// The sequences of choices that still run.
    pub(crate) fn running_seqs(&self) -> impl Iterator<Item = SeqId> {
        self.seqs.iter().zip(&self.choices).filter(|(_, choice)| !choice.finished).filter_map(|(&seq, _)| seq)
    }

    /// The choices that run in a sequence.
    pub(crate) fn rows(&mut self) -> impl Iterator<Item = WaitingRow<'_>> {
        let Self { seqs, choices, ends, n_logprobs, .. } = self;
        let running = seqs.iter().zip(choices).filter(|(_, choice)| !choice.finished);
        running.filter_map(|(&seq, choice)| Some(WaitingRow { seq: seq?, choice, ends, n_logprobs: *n_logprobs }))
    }

    /// Samples the next token of the choice in `seq`, unless its row was sampled ahead, and sends what of its text can go out.
    ///
    /// # Errors
    /// The scores are unusable, or the grammar of the choice cannot go on: neither can the request.
    pub(crate) fn advance(
        &mut self,
        seq: SeqId,
        logits: &[f32],
        tokenizer: &dyn Tokenizer,
        now: Instant,
    ) -> Result<Advance, GenerationError> {
        let Some(at) = self.seqs.iter().position(|&own| own == Some(seq)) else { return Ok(Advance::Finished) };
        let choice = &mut self.choices[at];
        let sampled = match choice.sampled.take() {
            Some(sampled) => sampled?,
            None => choice.sample(logits, &self.ends, self.n_logprobs)?,
        };
        self.take(at, sampled, tokenizer, now)
    }

    /// Takes the next token of the choice in `seq` without any scores, where its grammar leaves only one and nobody wants to know how
    /// likely it was.
    pub(crate) fn force(
        &mut self,
        seq: SeqId,
        tokenizer: &dyn Tokenizer,
        now: Instant,
    ) -> Option<Result<Advance, GenerationError>> {
        let at = self.seqs.iter().position(|&own| own == Some(seq))?;
        let token = self.choices[at].matcher.as_ref().filter(|_| self.n_logprobs.is_none())?.forced()?;
        let sampled = Sampled { token, logprob: None, top: Vec::new() };
        Some(self.take(at, sampled, tokenizer, now))
    }

    /// The choice at `at` goes on with a token: sends what of its text can go out, and ends it where it ends.
    fn take(
        &mut self,
        at: usize,
        sampled: Sampled,
        tokenizer: &dyn Tokenizer,
        now: Instant,
    ) -> Result<Advance, GenerationError> {
        let choice = &mut self.choices[at];
        choice.sampler.accept(sampled.token);
        choice.n_generated += 1;
        if self.first_token.is_none() {
            self.first_token = Some(now);
            if let Some(miss) = self.miss {
                choice.shared.count_miss(miss);
            }
        }

        let token = sampled.token;
        let may_end = self.ends.may_end_at(choice.n_generated);
        let mut delta = Delta { choice: choice.index, ..Delta::default() };
        let mut end = None;
        if tokenizer.is_end_of_generation(token) || (may_end && self.ends.is_stop_token(token)) {
            end = Some((FinishReason::Stop, None));
        } else if let Some(stop) = choice.take(sampled, may_end, tokenizer, &mut delta) {
            end = Some((FinishReason::Stop, Some(self.stops[stop].clone())));
        } else if choice.follow(token)? == Progress::Ended {
            end = Some((FinishReason::Stop, None));
        } else if choice.n_generated >= self.max_tokens || self.deadline.is_some_and(|deadline| now >= deadline) {
            end = Some((FinishReason::Length, None));
        }
        if let Some((_, None)) = end {
            choice.flush(&mut delta);
        }
        let mut heard = true;
        if !delta.text.is_empty() || !delta.tokens.is_empty() {
            heard = self.events.send(Event::Delta(delta)).is_ok();
        }
        if let Some((reason, stop)) = end {
            choice.finished = true;
            self.seqs[at] = None; // another choice may go on there
            let _ = self.events.send(Event::Finished { choice: choice.index, reason, stop });
            return Ok(Advance::Finished);
        }
        Ok(if heard { Advance::Continues(token) } else { Advance::NobodyListens })
    }

    /// Whether it has begun, its deadline is over, and none of its choices is in a sequence.
    pub(crate) fn waits_in_vain(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| now >= deadline)
            && self.started.is_some()
            && self.running_seqs().next().is_none()
            && !self.is_done()
    }

    /// Ends every choice where it is.
    pub(crate) fn cut(&mut self) {
        for choice in self.choices.iter_mut().filter(|choice| !choice.finished) {
            let mut delta = Delta { choice: choice.index, ..Delta::default() };
            choice.flush(&mut delta);
            if !delta.text.is_empty() || !delta.tokens.is_empty() {
                let _ = self.events.send(Event::Delta(delta));
            }
            choice.finished = true;
            let finished = Event::Finished { choice: choice.index, reason: FinishReason::Length, stop: None };
            let _ = self.events.send(finished);
        }
    }

    /// Whether every choice is complete.
    pub(crate) fn is_done(&self) -> bool {
        self.choices.iter().all(|choice| choice.finished)
    }

    /// Sends the last event.
    pub(crate) fn finish(&self, now: Instant) -> Summary {
        let ms = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.duration_since(from).as_secs_f64() * 1e3,
            _ => 0.0,
        };
        let summary = Summary {
            prompt_tokens: self.n_prompt,
            cached_tokens: self.n_cached,
            guessed_tokens: self.n_guessed,
            right_guesses: self.n_right_guesses,
            completion_tokens: self.choices.iter().map(|choice| choice.n_generated).sum(),
            queue_ms: ms(Some(self.submitted), self.started),
            prefill_ms: ms(self.started, self.first_token),
            decode_ms: ms(self.first_token, Some(now)),
        };
        let _ = self.events.send(Event::Done(summary));
        summary
    }

    /// Sends the error that ends the request.
    pub(crate) fn fail(&self, error: GenerationError) {
        let _ = self.events.send(Event::Failed(error));
    }
}

/// What became of a choice after one more token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Advance {
    /// The token is to be computed next.
    Continues(TokenId),
    /// The choice is complete.
    Finished,
    /// The caller dropped the event stream.
    NobodyListens,
}

impl WaitingRow<'_> {
    /// Samples the token that [`Generation::advance`] will take.
    pub(crate) fn sample_ahead(self, logits: &[f32]) {
        self.choice.sampled = Some(self.choice.sample(logits, self.ends, self.n_logprobs));
    }
}

impl Choice {
    /// Chooses the next token among those that the grammar allows, if there is one.
    fn sample(&mut self, logits: &[f32], ends: &Ends, n_logprobs: Option<usize>) -> Result<Sampled, GenerationError> {
        let allowed = self.matcher.as_mut().map(Matcher::allowed).transpose()?;
        let banned = ends.banned(self.n_generated);
        let began = Instant::now();
        let sampled = match allowed {
            None => self.sampler.sample(logits, banned, n_logprobs),
            Some(Allowed::Only(token)) => self.sampler.score(token, logits, n_logprobs),
            Some(Allowed::Any(mask)) => {
                // Where the grammar allows nothing but an end, `min_tokens` and `ignore_eos` give way.
                let banned = if mask.is_within(banned) { ends.suppressed() } else { banned };
                self.sampler.sample_allowed(logits, banned, &mask, n_logprobs)
            }
        };
        self.shared.count_sampler(began.elapsed());
        sampled.map_err(|error| GenerationError::Sampling { message: error.to_string() })
    }

    /// Tells the grammar the token.
    fn follow(&mut self, token: TokenId) -> Result<Progress, GenerationError> {
        Ok(self.matcher.as_mut().map_or(Ok(Progress::Goes), |matcher| matcher.accept(token))?)
    }

    /// Takes a token's bytes and moves what can go out into `delta`. Returns which stop text was completed, if one was and the choice may
    /// end.
    fn take(&mut self, sampled: Sampled, may_end: bool, tokenizer: &dyn Tokenizer, delta: &mut Delta) -> Option<usize> {
        let info = token_info(sampled, tokenizer);
        let hit = if may_end {
            self.decoder.push(&info.bytes, &mut delta.text)
        } else {
            self.decoder.push_as_text(&info.bytes, &mut delta.text);
            None
        };
        let start = self.n_bytes;
        self.n_bytes += info.bytes.len();
        self.held.push_back((start, info));
        let released = self.decoder.n_released_bytes();
        self.release(released, delta);
        hit.map(|hit| hit.stop)
    }

    /// Nothing follows: what was held back for a character or a stop text goes out.
    fn flush(&mut self, delta: &mut Delta) {
        self.decoder.finish(&mut delta.text);
        self.release(usize::MAX, delta);
    }

    /// Moves the tokens that begin before `offset` into `delta`. Tokens without text go with the one before them.
    fn release(&mut self, offset: usize, delta: &mut Delta) {
        while let Some((start, info)) = self.held.front() {
            if *start >= offset && !(info.bytes.is_empty() && *start <= offset) {
                break;
            }
            if let Some((_, info)) = self.held.pop_front() {
                delta.tokens.push(info);
            }
        }
    }
}

impl From<MatchError> for GenerationError {
    fn from(error: MatchError) -> Self {
        Self::Constraint { message: error.to_string() }
    }
}

fn token_info(sampled: Sampled, tokenizer: &dyn Tokenizer) -> TokenInfo {
    let bytes_of = |token| {
        let mut bytes = Vec::new();
        tokenizer.token_bytes(token, &mut bytes);
        bytes
    };
    TokenInfo {
        id: sampled.token,
        bytes: bytes_of(sampled.token),
        logprob: sampled.logprob,
        top: sampled.top.into_iter().map(|(id, logprob)| TopToken { id, bytes: bytes_of(id), logprob }).collect(),
    }
}
