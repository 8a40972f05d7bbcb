//! From a request to a checked, tokenized job, on a thread of its own: templates and tokenizers never hold up the engine
//! thread or the caller's executor.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use crate::backend::{BackendLimits, Tokenizer};
use crate::breakers::BreakerCache;
use crate::constrain::{Compilers, Matcher, Waiting};
use crate::decoder::{MAX_STOP_BYTES, MAX_STOPS, validate_stops};
use crate::ends;
use crate::engine::Inner;
use crate::error::RequestError;
use crate::generation::Accepted;
use crate::request::{MAX_CACHE_KEY_BYTES, Prompt, Request, TokenId};
use crate::sampler::InvalidParam;
use crate::serving::Serving;
use crate::stream::EventStream;
use crate::worker::Command;

/// Most alternatives per token that can be reported.
pub const MAX_LOGPROBS: u32 = 100;

/// A day.
const MAX_DEADLINE_MS: u64 = 24 * 60 * 60 * 1000;

/// A minute.
const MAX_ITL_MS: u64 = 60 * 1000;

/// An hour.
const MAX_KEEP_MS: u64 = 60 * 60 * 1000;

/// What the intake thread is asked to do.
pub(crate) enum Task {
    /// Accept or refuse a request.
    Generate {
        request: Box<Request>,
        submitted: Instant,
        engine: Arc<Inner>,
        /// Its prompt is to be kept for everybody, pinned or not.
        warms: Option<bool>,
        answer: oneshot::Sender<Result<EventStream, RequestError>>,
    },
    /// Tokenize a text for its own sake.
    Tokenize { text: String, add_special: bool, answer: oneshot::Sender<Result<Vec<TokenId>, RequestError>> },
}

/// What requests are checked against.
#[derive(Clone)]
pub(crate) struct Intake {
    pub(crate) tokenizer: Arc<dyn Tokenizer>,
    pub(crate) limits: BackendLimits,
    /// The most tokens of one request, prompt and answer together.
    pub(crate) n_ctx: usize,
    pub(crate) serving: Serving,
    pub(crate) breakers: Arc<BreakerCache>,
    pub(crate) compilers: Compilers,
}

/// A request that was checked and tokenized, with all that is needed to admit it.
struct Checked {
    prompt: Vec<TokenId>,
    max_tokens: u32,
    request: Request,
    submitted: Instant,
    engine: Arc<Inner>,
    warms: Option<bool>,
}

/// A checked request whose constraint is being compiled.
struct Constrained {
    intake: Intake,
    checked: Checked,
    answer: oneshot::Sender<Result<EventStream, RequestError>>,
}

impl Waiting for Constrained {
    fn is_gone(&self) -> bool {
        self.answer.is_closed()
    }

    fn resolve(self: Box<Self>, result: Result<Vec<Matcher>, RequestError>) {
        let Self { intake, checked, answer } = *self;
        let _ = answer.send(result.and_then(|matchers| intake.admit(checked, matchers)));
    }
}

impl Intake {
    pub(crate) fn run(&self, tasks: &Receiver<Task>) {
        while let Ok(task) = tasks.recv() {
            // A send fails when the caller has left: then the stream is dropped here, which cancels the request.
            match task {
                Task::Generate { request, submitted, engine, warms, answer } => {
                    let checked = self.check(*request, submitted, engine);
                    self.accept(checked.map(|checked| Checked { warms, ..checked }), answer);
                }
                Task::Tokenize { text, add_special, answer } => {
                    let _ = answer.send(self.tokenizer.tokenize(&text, add_special, false));
                }
            }
        }
    }

    fn accept(
        &self,
        checked: Result<Checked, RequestError>,
        answer: oneshot::Sender<Result<EventStream, RequestError>>,
    ) {
        let _ = match checked {
            Err(refusal) => answer.send(Err(refusal)),
            Ok(mut checked) => match checked.request.constraint.take() {
                None => answer.send(self.admit(checked, Vec::new())),
                Some(constraint) => {
                    let n = checked.request.n;
                    let waiting = Constrained { intake: self.clone(), checked, answer };
                    self.compilers.compile(constraint, n, Box::new(waiting));
                    return;
                }
            },
        };
    }

    fn check(&self, mut request: Request, submitted: Instant, engine: Arc<Inner>) -> Result<Checked, RequestError> {
        self.check_params(&request)?;
        let (prompt, stops) = self.tokens(&request.prompt)?;
        // A template comes from the model file: its stop texts are held to the same limits, and dropped if they break them.
        let stops = stops.into_iter().filter(|stop| (1..=MAX_STOP_BYTES).contains(&stop.len())).take(MAX_STOPS);
        request.stop.extend(stops);
        if prompt.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        // One cell stays for the answer.
        if prompt.len() >= self.n_ctx {
            return Err(RequestError::ContextLength { n_prompt_tokens: prompt.len(), n_ctx: self.n_ctx });
        }
        let room = (self.n_ctx - prompt.len()) as u32;
        let max_tokens = match request.max_tokens {
            Some(max_tokens) => max_tokens.min(room),
            None => room.min(self.pool_share(&request, prompt.len())),
        };
        self.check_pool(&request, prompt.len(), max_tokens)?;
        Ok(Checked { prompt, max_tokens, request, submitted, engine, warms: None })
    }

    /// Puts a request into the queue. `matchers`: the grammar of each choice, or none.
    fn admit(&self, checked: Checked, matchers: Vec<Matcher>) -> Result<EventStream, RequestError> {
        let Checked { prompt, max_tokens, request, submitted, engine, warms } = checked;
        if engine.is_closed() {
            return Err(RequestError::ShuttingDown);
        }
        let n_prompt = prompt.len();
        engine.shared().join_queue(n_prompt, self.serving.queue)?;
        let (events, receiver) = mpsc::unbounded_channel();
        let seed = request.sampling.seed.unwrap_or_else(random_seed);
        let breakers = if request.sampling.has_dry() {
            self.breakers.get(&request.sampling.dry_sequence_breakers, &*self.tokenizer, self.limits.n_vocab)
        } else {
            Arc::default()
        };
        let namespace = self.serving.namespace(&request);
        let id = engine.next_id();
        let accepted =
            Accepted { prompt, request, max_tokens, matchers, seed, namespace, warms, breakers, submitted, events };
        engine.send(Command::Submit(id, Box::new(accepted)));
        Ok(EventStream::new(id, n_prompt as u32, receiver, engine))
    }

    fn check_params(&self, request: &Request) -> Result<(), RequestError> {
        let n_seq_max = self.limits.n_seq_max;
        if !(1..=n_seq_max).contains(&request.n) {
            return Err(InvalidParam::new("n", request.n, format!("between 1 and {n_seq_max}")).into());
        }
        if request.max_tokens == Some(0) {
            return Err(InvalidParam::new("max_tokens", 0, "at least 1").into());
        }
        if let Some(k) = request.logprobs.filter(|&k| k > MAX_LOGPROBS) {
            return Err(InvalidParam::new("top_logprobs", k, format!("at most {MAX_LOGPROBS}")).into());
        }
        let in_range = |name, value: Option<u64>, most| match value {
            Some(ms) if !(1..=most).contains(&ms) => {
                Err(InvalidParam::new(name, ms, format!("between 1 and {most} milliseconds")))
            }
            _ => Ok(()),
        };
        in_range("deadline_ms", request.deadline_ms, MAX_DEADLINE_MS)?;
        in_range("max_itl_ms", request.max_itl_ms, MAX_ITL_MS)?;
        in_range("keep_ms", request.keep_ms, MAX_KEEP_MS)?;
        if let Some(n_bytes) = request.cache_key.as_ref().map(String::len).filter(|&n| n > MAX_CACHE_KEY_BYTES) {
            let allowed = format!("at most {MAX_CACHE_KEY_BYTES} bytes");
            return Err(InvalidParam::new("prompt_cache_key", format!("of {n_bytes} bytes"), allowed).into());
        }
        validate_stops(&request.stop)?;
        ends::validate(request, self.limits.n_vocab)?;
        request.sampling.validate(self.limits.n_vocab)?;
        Ok(())
    }

    /// The tokens that each choice can have next to the others when all cells are theirs; at least 1.
    fn pool_share(&self, request: &Request, n_prompt: usize) -> u32 {
        if !self.limits.unified {
            return u32::MAX;
        }
        (self.limits.n_cells / request.n).saturating_sub(n_prompt as u32).max(1)
    }

    /// With one pool of cells all choices of a request have to fit into it together.
    fn check_pool(&self, request: &Request, n_prompt: usize, max_tokens: u32) -> Result<(), RequestError> {
        let n_cells = self.limits.n_cells as usize;
        let needed = (n_prompt + max_tokens as usize) * request.n as usize;
        if self.limits.unified && needed > n_cells {
            let allowed =
                format!("small enough for {n_cells} cells: each choice may need {}", needed / request.n as usize);
            return Err(InvalidParam::new("n", request.n, allowed).into());
        }
        Ok(())
    }

    /// The prompt's tokens, and the texts that end an answer in its format.
    fn tokens(&self, prompt: &Prompt) -> Result<(Vec<TokenId>, Vec<String>), RequestError> {
        match prompt {
            Prompt::Text(text) => {
                self.check_bytes(text.len())?;
                Ok((self.tokenizer.tokenize(text, true, false)?, Vec::new()))
            }
            Prompt::Chat(messages) => {
                self.check_bytes(messages.iter().map(|message| message.role.len() + message.content.len()).sum())?;
                let chat = self.tokenizer.render_chat(messages)?;
                self.check_bytes(chat.prompt.len())?;
                Ok((self.tokenizer.tokenize(&chat.prompt, true, true)?, chat.stops))
            }
            Prompt::Tokens(tokens) => {
                let n_vocab = self.limits.n_vocab;
                let outside = |&&token: &&TokenId| usize::try_from(token).map_or(true, |token| token >= n_vocab);
                match tokens.iter().find(outside) {
                    Some(&token) => Err(RequestError::UnknownToken { token, n_vocab }),
                    None => Ok((tokens.clone(), Vec::new())),
                }
            }
        }
    }

    /// A text that is too long even if every token were the longest one is refused before the work of tokenizing it.
    fn check_bytes(&self, n_bytes: usize) -> Result<(), RequestError> {
        let n_prompt_tokens = n_bytes / self.tokenizer.max_token_bytes().max(1);
        if n_prompt_tokens >= self.n_ctx {
            return Err(RequestError::ContextLength { n_prompt_tokens, n_ctx: self.n_ctx });
        }
        Ok(())
    }
}

/// A seed that differs from request to request; the standard library's hasher keys come from the system's generator.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(Instant::now())
}
