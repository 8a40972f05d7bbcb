//! How a load is tuned: what an earlier load found, or measured now between weights and context.

use std::borrow::Cow;
use std::sync::Arc;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use minerva_gpu::CpuInfo;
use minerva_gpu::estimate::{HeadShape, LoadSettings, ModelShape};
use minerva_gpu::plan::{Plan, PlanDeviceKind, PlanMachine, Rung, with_settings};
use minerva_llama::{ContextParams, Model, Simulation};

use super::Report;
use super::machine::n_threads;
use super::placement::{Planned, ggml_type, kv_type};
use crate::config::{EngineConfig, FlashAttention};
use crate::error::LoadError;
use crate::remembered;
use crate::status::LoadProgress;
use crate::tune::candidates::Open;
use crate::tune::measure::ModelLab;
use crate::tune::record::{self, Key};
use crate::tune::{TuneMode, TuneReport, TuneSource, TunedSettings, session};

/// Between the weights and the context.
const FROM: f32 = 0.85;
const TO: f32 = 0.93;

/// What is to be done about the settings of a rung.
pub(super) enum Tuning {
    /// Nothing; the report says why.
    Not(TuneReport),
    /// An earlier load found these.
    Found(TunedSettings, TuneReport),
    /// They are to be measured.
    Measure(Subject),
}

/// What may change and what it is kept under.
pub(super) struct Subject {
    pub(super) default: TunedSettings,
    open: Open,
    key: Key,
}

/// Looks up what is known about a rung.
pub(super) fn prepare(config: &EngineConfig, planned: &Planned, rung: &Rung) -> Tuning {
    look_up(config, &planned.plan, rung, &planned.machine.gpu.machine().cpu)
}

/// The plan as a load would make it after an earlier one found better settings, and what was found.
pub(super) fn planned(
    config: &EngineConfig,
    shapes: (&ModelShape, Option<&HeadShape>),
    machine: &PlanMachine,
    mut plan: Plan,
) -> (Plan, TuneReport) {
    // A plan never measures, so `force` is what it will find.
    let (settings, report) = match look_up(config, &plan, plan.best(), &CpuInfo::read()) {
        Tuning::Not(report) => return (plan, report),
        Tuning::Measure(subject) => {
            let reason = "the first load will measure".to_owned();
            return (plan, TuneReport::none(&subject.default, Some(reason)));
        }
        Tuning::Found(settings, report) => (settings, report),
    };
    let rung = tuned(config, shapes, machine, plan.best(), &settings).map(|(_, rung)| rung.into_owned());
    match rung {
        Some(rung) => {
            plan.rungs[0] = rung;
            (plan, report)
        }
        None => (plan, TuneReport { source: TuneSource::Defaults, reason: Some(does_not_fit(&settings)), ..report }),
    }
}

fn look_up(config: &EngineConfig, plan: &Plan, rung: &Rung, cpu: &CpuInfo) -> Tuning {
    let default = defaults(config, rung, cpu);
    let not = |reason: Option<&str>| Tuning::Not(TuneReport::none(&default, reason.map(str::to_owned)));
    if config.tune.mode == TuneMode::Off {
        return not(Some("tuning is off"));
    }
    let devices = &plan.devices[..rung.placement.n_devices()];
    if devices.iter().any(|device| device.kind == PlanDeviceKind::Rpc) {
        return not(Some("loads with devices over RPC are not tuned: their speed changes with the network"));
    }
    let open = Open::of(config, &default, rung.settings.n_sequences, cpu);
    if open.is_empty() {
        return not(Some("every setting is fixed"));
    }
    if config.tune.mode == TuneMode::Cached && !remembered::is_possible() {
        return not(Some("there is no cache folder to keep a finding in"));
    }
    let Some(key) = key(config, plan, rung, cpu, &default, &open) else { return not(Some("the model cannot be read")) };
    let found = if config.tune.mode == TuneMode::Cached {
        record::read(&key, &open, &default, config.tune.budget_ms)
    } else {
        None
    };
    match found {
        Some((settings, report)) => Tuning::Found(settings, report),
        None => Tuning::Measure(Subject { default, open, key }),
    }
}

/// What the rung has without tuning.
fn defaults(config: &EngineConfig, rung: &Rung, cpu: &CpuInfo) -> TunedSettings {
    let n_threads = n_threads(config, cpu);
    TunedSettings {
        flash_attention: config.flash_attention,
        kv_type_k: kv_type(rung.settings.cache_type_k),
        kv_type_v: kv_type(rung.settings.cache_type_v),
        kv_unified: rung.settings.kv_unified,
        n_threads,
        n_threads_batch: config.n_threads_batch.unwrap_or(n_threads),
        n_ubatch: rung.settings.ubatch_tokens,
    }
}

/// Everything that a finding depends on besides the model.
fn key(
    config: &EngineConfig,
    plan: &Plan,
    rung: &Rung,
    cpu: &CpuInfo,
    default: &TunedSettings,
    open: &Open,
) -> Option<Key> {
    let devices = plan.devices[..rung.placement.n_devices()].iter();
    let devices: Vec<_> = devices.map(|device| format!("{} {}", device.name, device.total_bytes)).collect();
    let placement = &rung.placement;
    let matters = [
        env!("CARGO_PKG_VERSION").to_owned(),
        minerva_llama::version(),
        minerva_llama::compiler().to_owned(),
        minerva_llama::cpu_features().join(" "),
        format!("{} {} {:?} {}", cpu.model, cpu.affinity_cpus, cpu.quota_cpus, cpu.threads),
        format!("{devices:?} {:?} {:?}", placement.layers_per_device(), placement.expert_layers_on_host()),
        format!("{} {} {}", rung.settings.n_sequences, rung.settings.batch_tokens, rung.settings.full_windows),
        format!("{} {}", config.use_extra_buffers, config.use_mmap),
        serde_json::to_string(&(default, open)).ok()?,
        serde_json::to_string(&config.adapters).ok()?,
    ];
    Key::of(&config.model_path, &matters)
}

/// The configuration and the rung with other settings, where they fit.
pub(super) fn tuned<'a>(
    config: &'a EngineConfig,
    (model, head): (&ModelShape, Option<&HeadShape>),
    machine: &PlanMachine,
    rung: &'a Rung,
    settings: &TunedSettings,
) -> Option<(Cow<'a, EngineConfig>, Cow<'a, Rung>)> {
    let load = LoadSettings {
        flash_attention: match settings.flash_attention {
            FlashAttention::Auto => rung.settings.flash_attention,
            wished => wished == FlashAttention::On,
        },
        cache_type_k: ggml_type(settings.kv_type_k),
        cache_type_v: ggml_type(settings.kv_type_v),
        kv_unified: settings.kv_unified,
        ubatch_tokens: settings.n_ubatch,
        ..rung.settings.clone()
    };
    let rung = with_settings(model, &config.wishes(), machine, rung, &load, head)?;
    let config = EngineConfig {
        flash_attention: settings.flash_attention,
        kv_type_k: settings.kv_type_k,
        kv_type_v: settings.kv_type_v,
        kv_unified: settings.kv_unified,
        n_threads: Some(settings.n_threads),
        n_threads_batch: Some(settings.n_threads_batch),
        n_ubatch: Some(settings.n_ubatch),
        ..config.clone()
    };
    Some((Cow::Owned(config), Cow::Owned(rung)))
}

/// Why what was found is not used.
pub(super) fn does_not_fit(settings: &TunedSettings) -> String {
    format!("{settings} was found to be faster, but does not fit now")
}

/// Measures with the loaded weights, on a thread that ends: OpenMP keeps a team of threads for each thread that ever computed
/// (docs/benchmarks.md). What is found is kept.
///
/// # Errors
/// [`LoadError::Cancelled`] when `report` says so.
pub(super) fn measure(
    config: &EngineConfig,
    planned: &Planned,
    rung: &Rung,
    (model, simulation, context): (&Arc<Model>, &Simulation, &ContextParams),
    subject: Subject,
    report: &mut Report<'_>,
) -> Result<(TunedSettings, TuneReport), LoadError> {
    let Subject { default, open, key } = subject;
    let budget = config.tune.budget();
    tracing::info!("Tuning: comparing settings for up to {:.0} s (once; `--tune=off` skips it)", budget.as_secs_f64());
    let (shapes, machine) = (planned.shapes(), &planned.machine.planned);
    let fits = |settings: &TunedSettings| tuned(config, shapes, machine, rung, settings).is_some();
    let mut is_cancelled = false;
    let mut ask = |fraction: f32| {
        let progress = LoadProgress { stage: "tune".to_owned(), fraction: FROM + (TO - FROM) * fraction };
        is_cancelled = is_cancelled || report(&progress).is_break();
        is_cancelled
    };
    let outcome = thread::scope(|scope| {
        let (open, default) = (&open, &default);
        let (ask, context) = (&mut ask, context.clone());
        let measure = move || {
            let mut lab = ModelLab::new(model, simulation, context, &fits, ask, budget);
            session::tune(&mut lab, open, default, budget, config.tune.is_thorough())
        };
        scope.spawn(measure).join()
    });
    if is_cancelled {
        return Err(LoadError::Cancelled);
    }
    let Ok((settings, found)) = outcome else {
        tracing::warn!("tuning panicked; the defaults stay");
        return Ok((default.clone(), TuneReport::none(&default, Some("tuning panicked".to_owned()))));
    };
    let seconds = found.took_ms as f64 / 1e3;
    match &found.reason {
        Some(reason) => tracing::info!("Tuned: nothing, {reason}"),
        None if settings == default => tracing::info!("Tuned in {seconds:.1} s: the defaults are best ({settings})"),
        None => tracing::info!("Tuned in {seconds:.1} s: {settings}, {:.2} of the defaults' speed", found.gain),
    }
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    record::write(key, &config.model_name(), (&settings, &found), config.tune.budget_ms, now_s);
    Ok((settings, found))
}
