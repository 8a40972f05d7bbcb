//! What a load really takes against what was planned, and whether anything grows: in a process of its own, whose memory
//! nobody else used before.

use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context as _, bail};
use minerva_engine::{Engine, EngineConfig};
use minerva_gpu::{BuildBackends, GpuContext, GpuOptions};
use serde::{Deserialize, Serialize};

use super::args::Args;
use super::measured::{Better, Measured};
use super::place::{Kind, Place, Sizes};
use crate::engine::{Workload, run_engine};
use crate::stats::slope;

/// Sequences at once, as many as the speed part has.
const N_SEQ: u32 = 8;

/// Between a third of the tokens and all of them, a process may keep so much more: the allocator's slack, no leak.
const MOST_TOKEN_GROWTH_BYTES: i64 = 8 << 20;

/// The same for the later loads and unloads, all of them together.
const MOST_CYCLE_GROWTH_BYTES: i64 = 8 << 20;

/// What the process is asked to do.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    config: EngineConfig,
    n_cycles: usize,
    n_tokens: u64,
    /// Neither the tokens nor the cycles go on for longer, once there are enough to judge.
    most_s: f64,
    /// What each load and unload loses on purpose.
    leak_bytes: usize,
}

/// So many loads and unloads are always measured: a leak of a megabyte in each is then three times what is allowed, since
/// the allocator's free pages, and how it uses them again, move a reading by several megabytes.
const FEWEST_CYCLES: usize = 40;

/// The process at one moment. Fields are `None` where the system does not tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Reading {
    resident_bytes: Option<u64>,
    /// Memory of its own, in RAM or swapped out, and the length of the files that it maps. Resident bytes also follow what
    /// others do: the system takes pages of mapped files from a process when somebody else needs the room, this program's
    /// code among them, and they come back when they are used.
    held_bytes: Option<u64>,
    peak_bytes: Option<u64>,
    device_free_bytes: Option<u64>,
    threads: Option<u64>,
}

/// What the process found.
#[derive(Debug, Serialize, Deserialize)]
struct Findings {
    planned_host_bytes: u64,
    planned_device_bytes: u64,
    before: Reading,
    loaded: Reading,
    /// Tokens generated so far, and the process then.
    tokens: Vec<(u64, Reading)>,
    /// After each load and unload.
    cycles: Vec<Reading>,
}

/// One place's memory.
#[derive(Debug, Serialize)]
pub(super) struct Memory {
    pub(super) place: Place,
    findings: Findings,
}

/// Whether something grew, with a line that says so.
pub(super) struct Growth {
    pub(super) holds: bool,
    pub(super) line: String,
}

/// Runs the measurement in a new process of `program`, which is this one's file.
pub(super) fn measure(model: &Path, place: &Place, args: &Args, program: &Path) -> anyhow::Result<Memory> {
    let sizes = Sizes { n_seq: N_SEQ, context_tokens: 512 };
    // Not mapped: mapped weights are the file's pages, which the system takes and gives as it likes.
    let config = EngineConfig { use_mmap: false, ..place.config(model, sizes, None, args.threads) };
    let order = if args.quick {
        Order { config, n_cycles: FEWEST_CYCLES, n_tokens: 1000, most_s: 6.0, leak_bytes: args.leak }
    } else {
        Order { config, n_cycles: 50, n_tokens: 10_000, most_s: 300.0, leak_bytes: args.leak }
    };
    let mut command = Command::new(program);
    command.args(["--memory-worker", &serde_json::to_string(&order)?]).stdin(Stdio::null()).stderr(Stdio::inherit());
    // As glibc begins. Left alone it learns to keep free megabytes for the next load, and a leak fills those unseen.
    command.env("MALLOC_MMAP_THRESHOLD_", "131072");
    let output = command.output().context("cannot start the process whose memory is measured")?;
    if !output.status.success() {
        bail!("the process whose memory is measured failed ({})", output.status);
    }
    let findings = serde_json::from_slice(&output.stdout).context("the answer of the measured process")?;
    Ok(Memory { place: place.clone(), findings })
}

/// The measured process: obeys one order and prints what it found.
pub(super) fn work(order: &str) -> anyhow::Result<()> {
    let order: Order = serde_json::from_str(order).context("`--memory-worker`")?;
    let gpu = GpuContext::with_options(GpuOptions {
        choice: order.config.device,
        build: BuildBackends {
            cuda: minerva_llama::has_backend(c"CUDA"),
            metal: minerva_llama::has_backend(c"MTL"),
            vulkan: minerva_llama::has_backend(c"Vulkan"),
        },
        ..GpuOptions::default()
    })?;
    let overhead_bytes: u64 = Engine::machine(&order.config)?.devices.iter().map(|device| device.overhead_bytes).sum();
    let before = Reading::now(&gpu);

    let engine = load(&order.config)?;
    let loaded = Reading::now(&gpu);
    let memory = &engine.info().placement.memory;
    let planned = |is_host: bool| -> u64 {
        memory.iter().filter(|m| (m.device == "Host") == is_host).map(|m| m.planned_bytes).sum()
    };
    let mut findings = Findings {
        planned_host_bytes: planned(true),
        planned_device_bytes: planned(false) + overhead_bytes,
        before,
        loaded,
        tokens: Vec::new(),
        cycles: Vec::new(),
    };
    let (began, limit) = (Instant::now(), Duration::from_secs_f64(order.most_s));
    let mut n_tokens = 0;
    for wave in 0.. {
        // First a batch of prompts as large as the device takes at once, so that scratch is used to its end.
        let prompt_tokens = if wave == 0 { 128 } else { 8 };
        let workload = Workload { n_seq: N_SEQ, prompt_tokens, generate_tokens: 32 };
        run_engine(&engine, workload, wave)?;
        n_tokens += u64::from(workload.n_seq * workload.generate_tokens);
        findings.tokens.push((n_tokens, Reading::now(&gpu)));
        let is_enough = n_tokens >= order.n_tokens || began.elapsed() > limit;
        if findings.tokens.len() >= 3 && is_enough {
            break;
        }
    }
    drop(engine);

    let began = Instant::now();
    while findings.cycles.len() < order.n_cycles && (findings.cycles.len() < FEWEST_CYCLES || began.elapsed() < limit) {
        drop(load(&EngineConfig { use_mmap: true, ..order.config.clone() })?);
        std::mem::forget(vec![1_u8; order.leak_bytes]);
        findings.cycles.push(Reading::now(&gpu));
    }
    serde_json::to_writer(io::stdout().lock(), &findings)?;
    io::stdout().flush()?;
    Ok(())
}

fn load(config: &EngineConfig) -> anyhow::Result<Engine> {
    Ok(Engine::load(config.clone(), |_| ControlFlow::Continue(()))?)
}

impl Reading {
    fn now(gpu: &GpuContext) -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let number = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let held_kib = ["RssAnon:", "RssShmem:", "VmSwap:"].into_iter().map(number).sum::<Option<u64>>();
        let is_gpu = gpu.device().is_usable_gpu();
        let free = gpu.estimate_memory().ok().filter(|_| is_gpu);
        Self {
            resident_bytes: number("VmRSS:").map(|kib| kib << 10),
            held_bytes: held_kib.zip(mapped_file_bytes()).map(|(kib, mapped)| (kib << 10) + mapped),
            peak_bytes: number("VmHWM:").map(|kib| kib << 10),
            device_free_bytes: free.map(|memory| memory.free_bytes),
            threads: number("Threads:"),
        }
    }
}

/// Length of all mappings of files, whether their pages are in memory or not.
fn mapped_file_bytes() -> Option<u64> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    Some(maps.lines().filter_map(mapped_file).sum())
}

/// Of one line of `maps`: `from-to rwxp offset device inode path`, with inode 0 where there is no file.
fn mapped_file(line: &str) -> Option<u64> {
    let mut fields = line.split_whitespace();
    let (from, to) = fields.next()?.split_once('-')?;
    let is_file = fields.nth(3)? != "0";
    let address = |text| u64::from_str_radix(text, 16).ok();
    is_file.then_some(address(to)?.checked_sub(address(from)?)?)
}

impl Memory {
    /// What the load planned on this place.
    pub(super) fn planned_bytes(&self) -> u64 {
        match self.place.kind {
            Kind::Cpu => self.findings.planned_host_bytes,
            Kind::Gpu | Kind::RpcWorker => self.findings.planned_device_bytes,
        }
    }

    /// The most that it took: of a GPU what the device lost, of the CPU the process's peak.
    pub(super) fn peak_bytes(&self) -> Option<u64> {
        let last = self.findings.tokens.last().map(|(_, reading)| *reading)?;
        match self.place.kind {
            Kind::Cpu => last.peak_bytes?.checked_sub(self.findings.before.resident_bytes?),
            Kind::Gpu => {
                let free = self.findings.tokens.iter().filter_map(|(_, reading)| reading.device_free_bytes).min()?;
                self.findings.before.device_free_bytes?.checked_sub(free)
            }
            Kind::RpcWorker => None, // its memory is another process's
        }
    }

    /// Peak over plan.
    pub(super) fn measured(&self) -> Option<Measured> {
        let ratio = self.peak_bytes()? as f64 / self.planned_bytes() as f64;
        Measured::new(format!("{}.memory", self.place.kind.key()), Better::Lower, [ratio])
    }

    /// Growth over tokens and over loads, of the process and of the device.
    pub(super) fn growth(&self) -> Vec<Growth> {
        let name = self.place.kind.title();
        let tokens: Vec<Reading> = self.findings.tokens.iter().map(|(_, reading)| *reading).collect();
        let n_tokens = self.findings.tokens.last().map_or(0, |(n, _)| *n);
        let cycles = &self.findings.cycles;
        let mut all = Vec::new();
        let mut add = |what: &str, readings: &[Reading], value: fn(&Reading) -> Option<i64>, most: i64, unit: Unit| {
            if let Some(grown) = growth(readings, value) {
                let line = format!("{name}: {what} grew by {} of {}", unit.show(grown), unit.show(most));
                all.push(Growth { holds: grown <= most, line: line + " allowed" });
            }
        };
        let held = |reading: &Reading| reading.held_bytes.map(u64::cast_signed);
        let device = |reading: &Reading| reading.device_free_bytes.map(|free| -free.cast_signed());
        let threads = |reading: &Reading| reading.threads.map(u64::cast_signed);
        let over_tokens = format!("over {n_tokens} tokens the process");
        let over_cycles = format!("over {} loads and unloads the process", cycles.len());
        let on_device = format!("over {} loads and unloads what the device holds", cycles.len());
        let in_threads = format!("over {} loads and unloads the number of threads", cycles.len());
        add(&over_tokens, &tokens, held, MOST_TOKEN_GROWTH_BYTES, Unit::Bytes);
        add(&over_cycles, cycles, held, MOST_CYCLE_GROWTH_BYTES, Unit::Bytes);
        add(&on_device, cycles, device, MOST_CYCLE_GROWTH_BYTES, Unit::Bytes);
        add(&in_threads, cycles, threads, 0, Unit::Count);
        all
    }

    /// Resident after the load and the most later, for the table.
    pub(super) fn resident_bytes(&self) -> Option<(u64, u64)> {
        let most = self.findings.tokens.iter().filter_map(|(_, reading)| reading.resident_bytes).max()?;
        Some((self.findings.loaded.resident_bytes?, most))
    }
}

/// How a growth is written.
#[derive(Clone, Copy)]
enum Unit {
    Bytes,
    Count,
}

impl Unit {
    fn show(self, number: i64) -> String {
        match self {
            Self::Bytes => format!("{:.1} MiB", number as f64 / f64::from(1 << 20)),
            Self::Count => number.to_string(),
        }
    }
}

/// Growth after the first third of the readings, which is for caches to fill: the [`slope`] over all of the rest.
fn growth(readings: &[Reading], value: impl Fn(&Reading) -> Option<i64>) -> Option<i64> {
    let values: Vec<f64> = readings.iter().map(|reading| value(reading).map(|n| n as f64)).collect::<Option<_>>()?;
    let settled = values.get(values.len() / 3..).filter(|_| values.len() >= 3)?;
    let points: Vec<(f64, f64)> = settled.iter().enumerate().map(|(at, value)| (at as f64, *value)).collect();
    Some((slope(&points)? * (points.len() - 1) as f64).ceil() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readings(held: impl IntoIterator<Item = u64>) -> Vec<Reading> {
        let reading = |bytes| Reading { held_bytes: Some(bytes), threads: Some(3), ..Reading::default() };
        held.into_iter().map(reading).collect()
    }

    fn memory(kind: Kind, tokens: Vec<Reading>, cycles: Vec<Reading>) -> Memory {
        let findings = Findings {
            planned_host_bytes: 1000,
            planned_device_bytes: 4000,
            before: Reading { resident_bytes: Some(50), device_free_bytes: Some(9000), ..Reading::default() },
            loaded: Reading::default(),
            tokens: tokens.into_iter().enumerate().map(|(n, reading)| (n as u64, reading)).collect(),
            cycles,
        };
        let mut place = Place::cpu();
        place.kind = kind;
        Memory { place, findings }
    }

    #[test]
    fn a_leak_of_a_megabyte_per_load_is_found_and_a_start_that_settles_is_none() {
        let settles = readings([10, 90, 100, 100, 160, 100, 99, 100, 130].map(|mib| mib << 20));
        let leaks = readings((0..FEWEST_CYCLES as u64).map(|n| n << 20));
        let lines = |cycles| memory(Kind::Cpu, readings([1, 1, 1]), cycles).growth();
        assert!(lines(settles.clone()).iter().all(|growth| growth.holds));
        let found = lines(leaks);
        let failed: Vec<&str> =
            found.iter().filter(|growth| !growth.holds).map(|growth| growth.line.as_str()).collect();
        assert_eq!(failed, ["CPU: over 40 loads and unloads the process grew by 26.0 MiB of 8.0 MiB allowed"]);
    }

    #[test]
    fn of_what_is_mapped_only_files_count() {
        let length = mapped_file("7f00-8f00 r--s 00000000 fe:01 1234  /a model.gguf");
        assert_eq!((length, mapped_file("7f00-8f00 rw-p 00000000 00:00 0 [heap]")), (Some(0x1000), None));
        assert_eq!((mapped_file(""), mapped_file("x-y r--s 0 0 1 z")), (None, None));
    }

    #[test]
    fn one_thread_more_is_a_leak() {
        let mut cycles = readings([1; 18]);
        cycles[12..].iter_mut().for_each(|reading| reading.threads = Some(4));
        assert!(memory(Kind::Cpu, readings([1, 1, 1]), cycles).growth().iter().any(|growth| !growth.holds));
    }

    #[test]
    fn a_peak_is_the_processs_on_the_cpu_and_the_devices_loss_on_a_gpu() {
        let reading = |free| Reading { peak_bytes: Some(1150), device_free_bytes: Some(free), ..Reading::default() };
        let tokens = vec![reading(5500), reading(4600), reading(5000)];
        let ratio = |kind| {
            memory(kind, tokens.clone(), Vec::new()).measured().map(|ratio| (ratio.name.clone(), ratio.median()))
        };
        assert_eq!(ratio(Kind::Cpu), Some(("cpu.memory".into(), 1.1)));
        assert_eq!(ratio(Kind::Gpu), Some(("gpu.memory".into(), 1.1)));
        assert_eq!(ratio(Kind::RpcWorker), None);
    }

    #[test]
    fn what_the_system_does_not_tell_is_not_judged() {
        assert_eq!(growth(&[Reading::default(); 9], |reading| reading.threads.map(u64::cast_signed)), None);
        assert_eq!(growth(&readings([1, 2]), |reading| reading.threads.map(u64::cast_signed)), None);
    }
}
