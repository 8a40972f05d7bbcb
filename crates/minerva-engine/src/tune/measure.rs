//! The lab over llama.cpp: small contexts over the loaded weights, and bare steps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use minerva_llama::{Batch, Context, ContextParams, Model, Simulation};

use super::TunedSettings;
use super::choose::{Work, median};
use super::session::{Bench, Lab};

/// Cells of each sequence of [`Bench::Short`]: llama.cpp's smallest.
const SHORT_CELLS: u32 = 256;
/// Tokens of each of its sequences before decoding, where the device computes them quickly.
const SHORT_TOKENS: u32 = 93;
const LEAST_SHORT_TOKENS: u32 = 16;
/// Sequences that decode together, however many the load has.
const MOST_SEQUENCES: u32 = 32;
/// Cells behind a long context, for the steps.
const STEP_CELLS: u32 = 128;
/// Steps of one sample.
const LEAST_STEPS: usize = 3;
const MOST_STEPS: usize = 24;

/// The lab over a loaded model.
pub(crate) struct ModelLab<'a> {
    pub(crate) model: &'a Arc<Model>,
    /// The same model without weights, to ask what a context would take.
    pub(crate) simulation: &'a Simulation,
    /// Of the context that will be made with the defaults.
    pub(crate) planned: ContextParams,
    pub(crate) fits: &'a (dyn Fn(&TunedSettings) -> bool + Sync),
    /// Told how far it is; `true` when the load was cancelled.
    pub(crate) is_cancelled: &'a mut (dyn FnMut(f32) -> bool + Send),
    pub(crate) began: Instant,
    pub(crate) budget: Duration,
    /// Tokens before decoding: fewer where a prompt takes long.
    short_tokens: Option<u32>,
    /// Wall-clock time of all threads of all steps, and what of it this process computed.
    threads_s: f64,
    cpu_s: f64,
}

/// An open context and what its sequences hold.
pub(crate) struct OpenContext {
    context: Context,
    batch: Batch,
    bench: Bench,
    /// Tokens of each sequence; empty until the first work.
    lengths: Vec<u32>,
    n_prompt_tokens: u32,
    cells: u32,
    n_threads: u32,
    seed: u32,
}

impl<'a> ModelLab<'a> {
    pub(crate) fn new(
        model: &'a Arc<Model>,
        simulation: &'a Simulation,
        planned: ContextParams,
        fits: &'a (dyn Fn(&TunedSettings) -> bool + Sync),
        is_cancelled: &'a mut (dyn FnMut(f32) -> bool + Send),
        budget: Duration,
    ) -> Self {
        Self {
            model,
            simulation,
            planned,
            fits,
            is_cancelled,
            began: Instant::now(),
            budget,
            short_tokens: None,
            threads_s: 0.0,
            cpu_s: 0.0,
        }
    }

    fn params(&self, settings: &TunedSettings, bench: Bench) -> ContextParams {
        let n_many = self.n_seq();
        let (n_seq_max, cells) = match bench {
            Bench::Short => (n_many, SHORT_CELLS),
            Bench::Long(n) => (1, (n + STEP_CELLS).next_multiple_of(256)),
            Bench::Shared(n) => (n_many, (n + STEP_CELLS).next_multiple_of(256)),
        };
        ContextParams {
            n_ctx: cells * n_seq_max,
            n_seq_max,
            n_ubatch: settings.n_ubatch,
            n_threads: settings.n_threads,
            n_threads_batch: settings.n_threads_batch,
            flash_attention: settings.flash_attention.into(),
            type_k: settings.kv_type_k.into(),
            type_v: settings.kv_type_v.into(),
            kv_unified: settings.kv_unified,
            ..self.planned.clone()
        }
    }

    /// Cache and scratch on each device; nothing when llama.cpp cannot say.
    fn taken(&self, params: &ContextParams) -> Option<Vec<u64>> {
        let bytes = self.simulation.memory_bytes(params).ok()?;
        Some(bytes.iter().map(|device| device.kv_bytes + device.compute_bytes).collect())
    }
}

impl Lab for ModelLab<'_> {
    type Context = OpenContext;

    fn open(&mut self, settings: &TunedSettings, bench: Bench) -> Result<OpenContext, String> {
        let params = self.params(settings, bench);
        let room = self.taken(&self.planned).ok_or("its memory is not known")?;
        let taken = self.taken(&params).ok_or("it is refused for this model")?;
        if taken.iter().zip(&room).any(|(taken, room)| taken > room) {
            return Err("it takes more than the planned context".to_owned());
        }
        let context = Context::new(self.model, &params).map_err(|error| crate::llama::root_cause(&error))?;
        let batch = Batch::new(&context);
        let n_prompt_tokens = match bench {
            Bench::Short => self.short_tokens.unwrap_or(LEAST_SHORT_TOKENS),
            Bench::Long(n) | Bench::Shared(n) => n,
        };
        let cells = context.n_ctx_seq();
        let n_threads = settings.n_threads;
        Ok(OpenContext { context, batch, bench, lengths: Vec::new(), n_prompt_tokens, cells, n_threads, seed: 1 })
    }

    fn run(&mut self, open: &mut OpenContext, work: Work, at_least: Duration) -> Result<f64, String> {
        if work != Work::Prefill {
            let (began, cpu_before) = (Instant::now(), own_cpu_s());
            let rate = open.decode(work, at_least, self.began + self.budget)?;
            if let (Some(before), Some(after)) = (cpu_before, own_cpu_s()) {
                self.cpu_s += after - before;
                self.threads_s += began.elapsed().as_secs_f64() * f64::from(open.n_threads);
            }
            return Ok(rate);
        }
        if open.bench == Bench::Short {
            open.n_prompt_tokens = self.short_tokens.unwrap_or(LEAST_SHORT_TOKENS);
        }
        let rate = open.fill()?;
        if open.bench == Bench::Short && self.short_tokens.is_none() {
            // The first prompt of all, slower than any later one: one may take a thirtieth of the time.
            let tokens = (rate * self.budget.as_secs_f64() / 30.0) as u32;
            self.short_tokens = Some(tokens.clamp(LEAST_SHORT_TOKENS, SHORT_TOKENS));
        }
        Ok(rate)
    }

    fn n_seq(&self) -> u32 {
        self.planned.n_seq_max.clamp(1, MOST_SEQUENCES)
    }

    fn cpu_share(&self) -> Option<f64> {
        (self.threads_s > 0.0).then(|| self.cpu_s / self.threads_s)
    }

    fn n_at_once(&mut self, settings: &[TunedSettings], bench: Bench) -> usize {
        let Some(room) = self.taken(&self.planned) else { return 1 };
        let mut sum = vec![0_u64; room.len()];
        for (n, settings) in settings.iter().enumerate() {
            // What is refused is dropped when it is opened, and takes nothing.
            let taken = self.taken(&self.params(settings, bench)).unwrap_or_default();
            for (sum, taken) in sum.iter_mut().zip(taken) {
                *sum += taken;
            }
            if sum.iter().zip(&room).any(|(sum, room)| sum > room) {
                return n.max(1);
            }
        }
        settings.len()
    }

    fn fits(&self, settings: &TunedSettings) -> bool {
        (self.fits)(settings)
    }

    fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    fn is_cancelled(&mut self, fraction: f32) -> bool {
        (self.is_cancelled)(fraction)
    }
}

impl OpenContext {
    /// Computes the prompts anew; returns tokens per second of the first.
    fn fill(&mut self) -> Result<f64, String> {
        let n_seq = self.context.n_seq_max();
        for seq in 0..n_seq {
            self.context.clear_seq(seq).map_err(|error| error.to_string())?;
        }
        self.lengths = vec![0; n_seq as usize];
        let began = Instant::now();
        self.prompt(0)?;
        let rate = f64::from(self.n_prompt_tokens) / began.elapsed().as_secs_f64().max(1e-9);
        for seq in 1..n_seq {
            // One pool shares the cells of a copy, and what is to be measured is sequences that share nothing.
            let shares = self.bench == Bench::Short && self.context.kv_unified();
            let is_copied = !shares && self.context.copy_seq(0, seq, self.n_prompt_tokens).unwrap_or(false);
            if is_copied {
                self.lengths[seq as usize] = self.n_prompt_tokens;
            } else {
                self.prompt(seq)?;
            }
        }
        Ok(rate)
    }

    fn prompt(&mut self, seq: u32) -> Result<(), String> {
        let n_batch = self.context.n_batch();
        for first in (0..self.n_prompt_tokens).step_by(n_batch.max(1) as usize) {
            let end = (first + n_batch).min(self.n_prompt_tokens);
            self.batch.clear();
            for pos in first..end {
                self.push(seq, pos, pos + 1 == self.n_prompt_tokens)?;
            }
            self.step()?;
        }
        self.lengths[seq as usize] = self.n_prompt_tokens;
        Ok(())
    }

    /// One token per sequence and step; returns tokens per second of the median step.
    /// Fewer steps than usual once the time is over.
    fn decode(&mut self, work: Work, at_least: Duration, deadline: Instant) -> Result<f64, String> {
        if self.lengths.is_empty() {
            self.fill()?;
        }
        let n_seq = if matches!(work, Work::Many | Work::Shared) { self.context.n_seq_max() } else { 1 };
        let began = Instant::now();
        let mut taken_s = Vec::new();
        let mut is_first = true; // another number of rows: graphs and buffers are made anew
        while taken_s.len() < LEAST_STEPS || (taken_s.len() < MOST_STEPS && began.elapsed() < at_least) {
            if self.lengths.iter().any(|&length| length + 1 >= self.cells) {
                self.fill()?;
                is_first = true;
            }
            self.batch.clear();
            for seq in 0..n_seq {
                let pos = self.lengths[seq as usize];
                self.push(seq, pos, true)?;
                self.lengths[seq as usize] += 1;
            }
            let step_began = Instant::now();
            self.step()?;
            if !is_first {
                taken_s.push(step_began.elapsed().as_secs_f64());
            }
            if !is_first && Instant::now() > deadline {
                break;
            }
            is_first = false;
        }
        let step_s = median(taken_s.into_iter()).unwrap_or(f64::INFINITY);
        Ok(f64::from(n_seq) / step_s.max(1e-9))
    }

    /// Any token will do; experts are chosen by it, so it is not always the same.
    fn push(&mut self, seq: u32, pos: u32, output: bool) -> Result<(), String> {
        self.seed = self.seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let n_vocab = self.context.model().n_vocab().max(1) as u32;
        let token = ((self.seed >> 8) % n_vocab).cast_signed();
        self.batch.push(token, pos, seq, output).map(|_| ()).map_err(|error| error.to_string())
    }

    fn step(&mut self) -> Result<(), String> {
        self.context.decode(&mut self.batch).map_err(|error| error.to_string())
    }
}

/// CPU time of this process; `None` where the system does not tell.
#[cfg_attr(unix, expect(clippy::unnecessary_wraps, reason = "other systems do not tell"))]
fn own_cpu_s() -> Option<f64> {
    #[cfg(unix)]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Some(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
    }
    #[cfg(not(unix))]
    None
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;
    use std::path::PathBuf;

    use minerva_llama::ModelParams;

    use super::*;
    use crate::config::{FlashAttention, KvType};

    fn settings() -> TunedSettings {
        TunedSettings {
            flash_attention: FlashAttention::Auto,
            kv_type_k: KvType::F16,
            kv_type_v: KvType::F16,
            kv_unified: false,
            n_threads: 1,
            n_threads_batch: 1,
            n_ubatch: 128,
        }
    }

    #[test]
    fn every_kind_of_work_has_a_rate_and_what_llama_cpp_refuses_is_a_reason() {
        let path: PathBuf = std::env::var_os("MINERVA_TEST_MODEL")
            .expect("run `cargo xtask setup` first: it fetches the test model")
            .into();
        let model = Model::load(&path, &ModelParams::default(), &mut |_| ControlFlow::Continue(())).unwrap();
        let simulation = Simulation::load(&path, &ModelParams::default()).unwrap();
        let planned = ContextParams { n_ctx: 4096, n_seq_max: 2, n_ubatch: 128, ..ContextParams::default() };
        let (fits, mut ask) = (|_: &TunedSettings| true, |_: f32| false);
        let budget = Duration::from_mins(1);
        let mut lab = ModelLab::new(&model, &simulation, planned, &fits, &mut ask, budget);
        let off = TunedSettings { flash_attention: FlashAttention::Off, ..settings() };
        let unified = TunedSettings { kv_unified: true, ..settings() };
        for (settings, bench, works) in [
            (settings(), Bench::Short, vec![Work::Prefill, Work::Alone, Work::Many]),
            (off.clone(), Bench::Long(32), vec![Work::Long]),
            (unified.clone(), Bench::Short, vec![Work::Many]),
            (unified, Bench::Shared(32), vec![Work::Shared]),
        ] {
            let mut open = lab.open(&settings, bench).unwrap();
            for work in works {
                let rate = lab.run(&mut open, work, Duration::ZERO).unwrap();
                assert!(rate.is_finite() && rate > 0.0, "{settings} {work:?}: {rate}");
            }
        }
        let impossible = TunedSettings { kv_type_k: KvType::Q8_0, kv_type_v: KvType::Q8_0, ..off.clone() };
        assert!(lab.open(&impossible, Bench::Short).is_err(), "a quantized V cache without flash attention");
        assert!(lab.open(&settings(), Bench::Long(100_000)).err().unwrap().contains("more than the planned context"));
        let three = [settings(), off.clone(), off];
        assert_eq!(lab.n_at_once(&three, Bench::Long(3_500)), 1, "each of them nearly fills the planned context");
        assert!((2..=3).contains(&lab.n_at_once(&three, Bench::Short)));
        #[cfg(unix)]
        assert!(lab.cpu_share().is_some_and(|share| share > 0.0));
    }

    #[test]
    fn sequences_that_reach_the_end_of_their_cells_begin_anew() {
        let path: PathBuf = std::env::var_os("MINERVA_TEST_MODEL")
            .expect("run `cargo xtask setup` first: it fetches the test model")
            .into();
        let model = Model::load(&path, &ModelParams::default(), &mut |_| ControlFlow::Continue(())).unwrap();
        let simulation = Simulation::load(&path, &ModelParams::default()).unwrap();
        let planned = ContextParams { n_ctx: 1024, n_ubatch: 128, ..ContextParams::default() };
        let (fits, mut ask) = (|_: &TunedSettings| true, |_: f32| false);
        let mut lab = ModelLab::new(&model, &simulation, planned, &fits, &mut ask, Duration::from_mins(1));
        let mut open = lab.open(&settings(), Bench::Short).unwrap();
        open.n_prompt_tokens = SHORT_CELLS - 4;
        for _ in 0..3 {
            lab.run(&mut open, Work::Alone, Duration::ZERO).unwrap();
        }
        assert!(open.lengths[0] <= SHORT_CELLS);
    }
}
