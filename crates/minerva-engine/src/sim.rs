//! The simulator: a backend without a model, for tests of everything above llama.cpp.
//!
//! Its vocabulary is the 256 bytes and a few control tokens. What it writes depends on every token of its sequence, so a
//! cell that belongs to somebody else, a missing one or one in the wrong place changes the text. It keeps the books that
//! llama.cpp keeps and panics when the engine breaks a rule that llama.cpp would abort on.

mod brake;
mod faults;
mod head;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use minerva_llama::SavedState;

use crate::backend::{Backend, BackendLimits, Loaded, RenderedChat, Row, SeqId, StepError, Tokenizer};
use crate::disk::Opened;
use crate::drafter::{DraftSettings, Drafter, ModelDrafter, followed};
use crate::error::RequestError;
use crate::request::{ChatMessage, TokenId};
use crate::scheduler::{DraftLimits, Policy, Reservation};
use crate::serving::{CacheIsolation, Serving, Speculation};
use crate::shared::QueueLimits;
use crate::status::{ModelInfo, Placement};

use self::head::{SimHead, hidden_after};

pub use self::brake::SimBrake;
pub use self::faults::SimDisk;

/// Ends a generation.
pub const END: TokenId = 256;

/// Stands before each role in a rendered chat.
const TURN: TokenId = 257;

/// Stands where the answer begins.
const ANSWER: TokenId = 258;

const N_VOCAB: usize = 259;

/// What a sequence's memory is, and so where it can be cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SimMemory {
    /// Cells: anywhere.
    #[default]
    Cells,
    /// A state and nothing else, as Mamba has: nowhere.
    Recurrent,
    /// Cells and a state, as Jamba and Qwen3-Next have: nowhere, but the cells stay and a checkpoint holds only the state.
    Hybrid,
    /// Cells, some of which are kept only for so many tokens, as of Gemma: where nothing was dropped yet, or with a checkpoint.
    Window(u32),
    /// The same with cells that keep everything, of which copies in host memory have so many: anywhere, but for what came back from there.
    FullWindow(u32),
}

/// Bytes of the simulator's recurrent state in [`BackendLimits`].
const STATE_BYTES: u64 = 64;

/// How the simulator behaves.
#[derive(Debug, Clone, PartialEq)]
pub struct SimConfig {
    /// The model's name.
    pub model_name: String,
    /// Sequences.
    pub n_seq_max: u32,
    /// The most tokens of one request.
    pub context_length_tokens: u32,
    /// One pool of cells for all sequences.
    pub unified: bool,
    /// Cells of all sequences; `None` is room for a full context in each.
    pub n_cells: Option<u32>,
    /// The most rows of one step.
    pub n_batch: u32,
    /// Time that a step takes, in microseconds.
    pub step_us: u64,
    /// Time that each row of a step adds, in microseconds.
    pub us_per_token: u64,
    /// Holds steps, however long they take.
    pub brake: SimBrake,
    /// Length of an answer to a chat, in tokens. Plain prompts are continued without an end.
    pub answer_tokens: u32,
    /// How far the scores of all tokens are spread by chance, fixed for each sequence of tokens. At 0 one token is far likelier
    /// than the others, which are all alike.
    pub spread: f32,
    /// What a sequence's memory is.
    pub memory: SimMemory,
    /// Cuts of a sequence fail though the backend did not say so.
    pub cannot_cut: bool,
    /// Every so many steps one fails, with its cells half written.
    pub fail_every_steps: Option<u64>,
    /// Requests that may wait.
    pub max_queued_requests: usize,
    /// Prompt tokens that may wait.
    pub max_queued_tokens: usize,
    /// The longest gap between two tokens that prompts of others may cause, in milliseconds.
    pub max_itl_ms: Option<u64>,
    /// Host memory for what sequences held when they had to give their cells away, in bytes.
    pub host_cache_bytes: u64,
    /// The most checkpoints of one text, where memory cannot be cut.
    pub max_checkpoints: u32,
    /// With one pool, how many cells are set aside for a request.
    pub reservation: Reservation,
    /// Files for what does not fit there, and for later runs.
    pub disk: Option<SimDisk>,
    /// How the next tokens of a sequence are guessed.
    pub speculation: Speculation,
    /// A draft model beside it.
    pub draft: Option<SimDraft>,
    /// The text repeats itself after so many tokens, so that guesses can be right.
    pub period_tokens: Option<u32>,
    /// Where to write down what is asked of the scheduler.
    pub trace_path: Option<PathBuf>,
    /// Who shares the cells of equal beginnings.
    pub cache_isolation: CacheIsolation,
}

/// A simulated draft model: what the simulator would write, as often as it is said to be right.
#[derive(Debug, Clone, PartialEq)]
pub struct SimDraft {
    /// The share of its tokens that are the simulator's.
    pub quality: f32,
    /// Cells that its sequences share; `None` is a full context.
    pub n_cells: Option<u32>,
    /// Time that one token of its guesses takes, in microseconds.
    pub step_us: u64,
    /// The step that fails, counted from 1.
    pub fails_at_step: Option<u64>,
    /// The most tokens of a guess.
    pub max_tokens: u32,
    /// A shorter guess is none.
    pub min_tokens: u32,
    /// It is no model of its own but the model's head, which follows it.
    pub is_head: bool,
}

impl Default for SimDraft {
    fn default() -> Self {
        Self {
            is_head: false,
            quality: 1.0,
            n_cells: None,
            step_us: 0,
            fails_at_step: None,
            max_tokens: 16,
            min_tokens: 0,
        }
    }
}

impl SimConfig {
    pub(crate) fn serving(&self) -> Serving {
        Serving {
            queue: QueueLimits { requests: self.max_queued_requests, tokens: self.max_queued_tokens },
            policy: Policy {
                max_itl_us: self.max_itl_ms.map(|ms| ms.saturating_mul(1000)),
                guess: self.speculation.looks_up(),
                draft: self
                    .draft
                    .as_ref()
                    .filter(|_| self.speculation.drafts())
                    .map(|draft| DraftLimits { max_tokens: draft.max_tokens, min_tokens: draft.min_tokens }),
                host_cache_bytes: self.host_cache_bytes,
                max_checkpoints: self.max_checkpoints,
                reservation: self.reservation,
                disk_cache_bytes: self.disk.as_ref().map_or(0, |disk| disk.cache.limit_bytes),
            },
            isolation: self.cache_isolation,
            trace_path: self.trace_path.clone(),
        }
    }

    pub(crate) fn open_disk(&self) -> Option<Opened> {
        self.disk.as_ref()?.open(&self.model_name)
    }
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            model_name: "sim".to_owned(),
            n_seq_max: 4,
            context_length_tokens: 1024,
            unified: false,
            n_cells: None,
            n_batch: 256,
            step_us: 0,
            us_per_token: 0,
            brake: SimBrake::default(),
            answer_tokens: 32,
            spread: 0.0,
            memory: SimMemory::Cells,
            cannot_cut: false,
            fail_every_steps: None,
            max_queued_requests: 256,
            max_queued_tokens: 1 << 20,
            max_itl_ms: None,
            host_cache_bytes: 1 << 20,
            max_checkpoints: 32,
            reservation: Reservation::Expected,
            disk: None,
            speculation: Speculation::Auto,
            draft: None,
            period_tokens: None,
            trace_path: None,
            cache_isolation: CacheIsolation::None,
        }
    }
}

pub(crate) fn load(config: SimConfig) -> (Loaded, ModelInfo) {
    let backend = SimBackend::new(config);
    let limits = backend.limits();
    let config = backend.config.clone();
    let info = ModelInfo {
        name: config.model_name.clone(),
        description: "simulator".to_owned(),
        n_vocab: N_VOCAB as u32,
        context_train_tokens: config.context_length_tokens,
        context_length_tokens: config.context_length_tokens,
        n_seq_max: limits.n_seq_max,
        n_cells: limits.n_cells,
        has_chat_template: true,
        placement: Placement { device: "Cpu".to_owned(), device_name: "simulator".to_owned(), ..Placement::default() },
        ..ModelInfo::default()
    };
    let mut loaded = Loaded { backend: Box::new(backend), tokenizer: Arc::new(SimTokenizer), drafter: None };
    match config.draft.as_ref().filter(|_| config.speculation.drafts()) {
        Some(draft) if draft.is_head => {
            let head = Box::new(SimHead::new(limits, draft));
            let (backend, drafter) = followed(loaded.backend, head, draft_settings(draft));
            loaded.backend = Box::new(backend);
            loaded.drafter = Some(Box::new(drafter));
        }
        draft => loaded.drafter = draft.map(|draft| drafter(&config, draft)),
    }
    (loaded, info)
}

fn draft_settings(draft: &SimDraft) -> DraftSettings {
    DraftSettings { min_probability: 0.0, min_tokens: draft.min_tokens, n_vocab: N_VOCAB, ends: vec![END] }
}

/// The draft model, over a simulator of its own: it panics too when a rule of llama.cpp is broken.
fn drafter(config: &SimConfig, draft: &SimDraft) -> Box<dyn Drafter> {
    let n_cells = draft.n_cells.unwrap_or(config.context_length_tokens);
    let draft_config = SimConfig {
        unified: true,
        n_cells: Some(n_cells),
        context_length_tokens: n_cells,
        step_us: draft.step_us,
        us_per_token: 0,
        fail_every_steps: draft.fails_at_step,
        draft: None,
        ..config.clone()
    };
    let backend = SimBackend { quality: draft.quality, ..SimBackend::new(draft_config) };
    Box::new(ModelDrafter::new(Box::new(backend), draft_settings(draft)))
}

/// Byte-level vocabulary.
struct SimTokenizer;

impl Tokenizer for SimTokenizer {
    fn tokenize(&self, text: &str, _add_special: bool, parse_special: bool) -> Result<Vec<TokenId>, RequestError> {
        let control = |byte| match byte {
            0x1e if parse_special => TURN,
            0x1f if parse_special => ANSWER,
            byte => TokenId::from(byte),
        };
        Ok(text.bytes().map(control).collect())
    }

    fn token_bytes(&self, token: TokenId, out: &mut Vec<u8>) {
        out.extend(u8::try_from(token));
    }

    fn is_end_of_generation(&self, token: TokenId) -> bool {
        token == END
    }

    fn end_of_generation(&self) -> &[TokenId] {
        &[END]
    }

    fn max_token_bytes(&self) -> usize {
        1
    }

    fn render_chat(&self, messages: &[ChatMessage]) -> Result<RenderedChat, RequestError> {
        let turns = messages.iter().map(|message| format!("\u{1e}{}\n{}", message.role, message.content));
        Ok(RenderedChat { prompt: turns.chain(["\u{1f}".to_owned()]).collect(), stops: Vec::new() })
    }
}

/// What one sequence holds.
#[derive(Debug, Clone, Default)]
struct SimSeq {
    tokens: Vec<TokenId>,
    /// What the part has seen that cannot be cut: of recurrent memory all tokens, of a window the last ones.
    part: Vec<TokenId>,
    /// It came back from host memory without what is needed to be shorter than this.
    n_least: usize,
}

impl SimSeq {
    fn push(&mut self, token: TokenId, memory: SimMemory) {
        assert!(self.tokens.ends_with(&self.part), "the state is that of another text");
        self.tokens.push(token);
        match memory {
            SimMemory::Cells | SimMemory::FullWindow(_) => {}
            SimMemory::Recurrent | SimMemory::Hybrid => self.part.push(token),
            SimMemory::Window(n) => {
                self.part.push(token);
                let n_over = self.part.len().saturating_sub(n as usize);
                self.part.drain(..n_over);
            }
        }
    }

    fn clear(&mut self) {
        *self = Self::default();
    }

    /// The likeliest next token: letters, digits and blanks that depend on everything before.
    fn next(&self, answer_tokens: u32, period_tokens: Option<u32>) -> TokenId {
        let since_answer = self.tokens.iter().rev().position(|&token| token == ANSWER);
        if since_answer.is_some_and(|n| n >= answer_tokens as usize) {
            return END;
        }
        // All of it decides still: a token from elsewhere breaks the row.
        if let Some(period) = period_tokens
            && self.tokens.len() > 2 * period as usize
        {
            return self.tokens[self.tokens.len() - period as usize];
        }
        let alphabet = b"abcdefghijklmnopqrstuvwxyz  etaoin";
        TokenId::from(alphabet[((self.hash() >> 32) % alphabet.len() as u64) as usize])
    }

    /// A number that depends on every token.
    fn hash(&self) -> u64 {
        self.tokens.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &token| Self::hash_with(hash, token))
    }

    fn hash_with(hash: u64, token: TokenId) -> u64 {
        (hash ^ u64::from(token.cast_unsigned())).wrapping_mul(0x0100_0000_01b3)
    }

    /// The scores of all tokens; the likeliest one is right with a chance of `quality`.
    fn logits(&self, config: &SimConfig, quality: f32) -> Vec<f32> {
        let mut logits = self.right_logits(config);
        let chance = (self.hash().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32 / (1 << 24) as f32;
        if chance >= quality {
            logits.rotate_right(1);
        }
        logits
    }

    fn right_logits(&self, config: &SimConfig) -> Vec<f32> {
        let mut logits = vec![0.0; N_VOCAB];
        if config.spread > 0.0 {
            let hash = self.hash();
            for (logit, token) in logits.iter_mut().zip(1_u64..) {
                let mixed = (hash ^ token.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                *logit = (mixed >> 40) as f32 / (1 << 24) as f32 * config.spread;
            }
            return logits;
        }
        logits[self.next(config.answer_tokens, config.period_tokens) as usize] = 20.0;
        logits
    }
}

struct SimBackend {
    config: SimConfig,
    seqs: Vec<SimSeq>,
    /// The scores of each row of the last step that asked for them.
    rows: Vec<Option<Vec<f32>>>,
    /// The hidden state after each row, if there is a head.
    hidden: Vec<f32>,
    n_steps: u64,
    /// The share of likeliest tokens that are right.
    quality: f32,
}

impl SimBackend {
    fn new(config: SimConfig) -> Self {
        let seqs = (0..config.n_seq_max).map(|_| SimSeq::default()).collect();
        Self { config, seqs, rows: Vec::new(), hidden: Vec::new(), n_steps: 0, quality: 1.0 }
    }

    fn n_window(&self) -> u32 {
        if let SimMemory::Window(n) = self.config.memory { n } else { 0 }
    }
}

impl Backend for SimBackend {
    fn limits(&self) -> BackendLimits {
        let config = &self.config;
        let n_cells = config.n_cells.unwrap_or(config.context_length_tokens * config.n_seq_max);
        let keeps_beginnings = matches!(config.memory, SimMemory::Cells | SimMemory::FullWindow(_));
        BackendLimits {
            n_seq_max: config.n_seq_max,
            n_cells_per_seq: config.context_length_tokens,
            n_cells,
            unified: config.unified,
            stream_bytes: 0,
            cell_bytes: if config.memory == SimMemory::Recurrent { 0 } else { size_of::<TokenId>() as u64 },
            state_bytes: match config.memory {
                SimMemory::Recurrent | SimMemory::Hybrid => STATE_BYTES,
                SimMemory::Cells | SimMemory::Window(_) | SimMemory::FullWindow(_) => 0,
            },
            keeps_beginnings, // or says that it cannot, when it is asked to: `cannot_cut`
            window_cell_bytes: if self.n_window() > 0 { size_of::<TokenId>() as u64 } else { 0 },
            n_window_tokens: self.n_window(),
            n_copied_window_tokens: if let SimMemory::FullWindow(n) = config.memory { n } else { 0 },
            checkpoints_need_cells: matches!(config.memory, SimMemory::Hybrid | SimMemory::Window(_)),
            n_batch: config.n_batch,
            n_ubatch: config.n_batch,
            n_vocab: N_VOCAB,
        }
    }

    fn decode(&mut self, rows: &[Row]) -> Result<(), StepError> {
        let time_us = self.config.step_us + self.config.us_per_token * rows.len() as u64;
        if time_us > 0 {
            std::thread::sleep(Duration::from_micros(time_us));
        }
        self.config.brake.wait();
        assert!(rows.len() <= self.config.n_batch as usize, "a step of {} rows", rows.len());
        self.n_steps += 1;
        self.rows.clear();
        self.hidden.clear();
        let has_head = self.config.draft.as_ref().is_some_and(|draft| draft.is_head);
        for row in rows {
            let seq = &mut self.seqs[row.seq as usize];
            assert_eq!(seq.tokens.len(), row.pos as usize, "sequence {} has a gap", row.seq);
            assert!(row.pos < self.config.context_length_tokens, "sequence {} is too long", row.seq);
            seq.push(row.token, self.config.memory);
            self.rows.push(row.output.then(|| seq.logits(&self.config, self.quality)));
            if has_head {
                hidden_after(seq, &self.config, &mut self.hidden);
            }
        }
        let held: usize = self.seqs.iter().map(|seq| seq.tokens.len()).sum();
        assert!(held <= self.limits().n_cells as usize, "{held} cells are in use");
        if self.config.fail_every_steps.is_some_and(|every| self.n_steps.is_multiple_of(every)) {
            return Err(StepError::new(false, "a simulated fault"));
        }
        Ok(())
    }

    fn logits(&self, i: usize) -> Option<&[f32]> {
        self.rows.get(i)?.as_deref()
    }

    fn hidden(&mut self) -> &[f32] {
        &self.hidden
    }

    fn truncate(&mut self, seq: SeqId, n_tokens: u32) -> bool {
        let n_window = self.n_window() as usize;
        let held = &mut self.seqs[seq as usize];
        let (n, n_held) = (n_tokens as usize, held.tokens.len());
        let is_cuttable = match self.config.memory {
            SimMemory::Cells | SimMemory::FullWindow(_) => !self.config.cannot_cut,
            SimMemory::Recurrent | SimMemory::Hybrid => false,
            SimMemory::Window(_) => n_held <= n_window,
        };
        if n == n_held {
            return true;
        }
        if n == 0 || !is_cuttable {
            held.clear();
            return n == 0;
        }
        assert!(n >= held.n_least, "sequence {seq} is cut to {n} tokens of which it has no windows");
        held.tokens.truncate(n);
        held.part.truncate(n);
        true
    }

    fn copy(&mut self, src: SeqId, dst: SeqId, n_tokens: u32) -> bool {
        assert_ne!(src, dst, "a copy onto itself");
        self.seqs[dst as usize] = self.seqs[src as usize].clone();
        self.truncate(dst, n_tokens)
    }

    fn save(&mut self, seq: SeqId) -> Option<SavedState> {
        Some(bytes_of(&self.seqs[seq as usize].tokens).into())
    }

    fn restore(&mut self, seq: SeqId, state: &[u8]) -> bool {
        let memory = self.config.memory;
        let held = &mut self.seqs[seq as usize];
        held.clear();
        for token in tokens_of(state) {
            held.push(token, memory);
        }
        if let SimMemory::FullWindow(n) = memory
            && held.tokens.len() > n as usize
        {
            held.n_least = held.tokens.len();
        }
        true
    }

    fn save_part(&mut self, seq: SeqId) -> Option<SavedState> {
        Some(bytes_of(&self.seqs[seq as usize].part).into())
    }

    fn rewind(&mut self, seq: SeqId, state: &[u8], n_tokens: u32) -> bool {
        let n_window = self.n_window();
        let held = &mut self.seqs[seq as usize];
        assert!(held.tokens.len() >= n_tokens as usize, "a checkpoint after the end of sequence {seq}");
        held.tokens.truncate(n_tokens as usize);
        held.part = tokens_of(state);
        let n_part = if n_window > 0 { n_tokens.min(n_window) } else { n_tokens };
        assert_eq!(held.part.len(), n_part as usize, "a checkpoint of another length");
        assert!(held.tokens.ends_with(&held.part), "a checkpoint of another text");
        true
    }
}

fn bytes_of(tokens: &[TokenId]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

fn tokens_of(state: &[u8]) -> Vec<TokenId> {
    let (tokens, rest) = state.as_chunks();
    assert!(rest.is_empty(), "a state of {} bytes", state.len());
    tokens.iter().map(|&bytes| TokenId::from_le_bytes(bytes)).collect()
}
