//! The session over a made-up machine with a clock of its own.

use proptest::prelude::*;

use super::*;
use crate::config::{EngineConfig, FlashAttention, KvType};
use minerva_gpu::CpuInfo;

/// How fast settings are at a kind of work, in tokens per second.
type Speed = fn(&TunedSettings, Work, Bench) -> f64;

struct MadeUp {
    speed: Speed,
    now: Duration,
    room: usize,
    open: usize,
    most_open: usize,
    /// Up to this part every figure is off, by chance.
    noise: f64,
    seed: u32,
    refuses: fn(&TunedSettings) -> bool,
    fits: fn(&TunedSettings) -> bool,
    cpu_share: Option<f64>,
    cancelled_at: Duration,
}

impl MadeUp {
    fn new(speed: Speed) -> Self {
        Self {
            speed,
            now: Duration::ZERO,
            room: 9,
            open: 0,
            most_open: 0,
            noise: 0.0,
            seed: 1,
            refuses: |_| false,
            fits: |_| true,
            cpu_share: Some(1.0),
            cancelled_at: Duration::MAX,
        }
    }

    fn chance(&mut self) -> f64 {
        self.seed = self.seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(self.seed >> 8) / f64::from(1_u32 << 24)
    }

    fn tune(&mut self, budget_s: u64) -> (TunedSettings, TuneReport) {
        let budget = Duration::from_secs(budget_s);
        tune(self, &open(), &default(), budget, budget_s >= 20)
    }
}

impl Lab for MadeUp {
    type Context = (TunedSettings, Bench);

    fn open(&mut self, settings: &TunedSettings, bench: Bench) -> Result<Self::Context, String> {
        if (self.refuses)(settings) {
            return Err("the backend does not have it".to_owned());
        }
        self.now += Duration::from_millis(5);
        self.open += 1;
        self.most_open = self.most_open.max(self.open);
        Ok((settings.clone(), bench))
    }

    fn run(&mut self, (settings, bench): &mut Self::Context, work: Work, at_least: Duration) -> Result<f64, String> {
        let rate = (self.speed)(settings, work, *bench) * (1.0 + self.noise * (2.0 * self.chance() - 1.0));
        let prompt = match bench {
            Bench::Short => 93,
            Bench::Long(n) | Bench::Shared(n) => *n,
        };
        let took = match work {
            Work::Prefill => Duration::from_secs_f64(f64::from(prompt) / rate),
            Work::Many | Work::Shared => Duration::from_secs_f64(4.0 * 8.0 / rate).max(at_least),
            Work::Alone | Work::Long => Duration::from_secs_f64(4.0 / rate).max(at_least),
        };
        self.now += took;
        Ok(rate)
    }

    fn n_seq(&self) -> u32 {
        8
    }

    fn n_at_once(&mut self, settings: &[TunedSettings], _bench: Bench) -> usize {
        self.open = 0; // no group is open when the next one is asked for
        settings.len().min(self.room)
    }

    fn cpu_share(&self) -> Option<f64> {
        self.cpu_share
    }

    fn fits(&self, settings: &TunedSettings) -> bool {
        (self.fits)(settings)
    }

    fn elapsed(&self) -> Duration {
        self.now
    }

    fn is_cancelled(&mut self, _fraction: f32) -> bool {
        self.now >= self.cancelled_at
    }
}

fn default() -> TunedSettings {
    TunedSettings {
        flash_attention: FlashAttention::Auto,
        kv_type_k: KvType::F16,
        kv_type_v: KvType::F16,
        kv_unified: false,
        n_threads: 4,
        n_threads_batch: 4,
        n_ubatch: 512,
    }
}

fn open() -> Open {
    Open::of(&EngineConfig::default(), &default(), 8, &CpuInfo { affinity_cpus: 4, ..CpuInfo::default() })
}

fn plain(work: Work) -> f64 {
    match work {
        Work::Alone => 180.0,
        Work::Many | Work::Shared => 450.0,
        Work::Long => 120.0,
        Work::Prefill => 1400.0,
    }
}

/// As measured on a processor with matrix units: no flash attention and bf16 are both better.
fn with_matrix_units(settings: &TunedSettings, work: Work, _bench: Bench) -> f64 {
    let flash = if settings.flash_attention == FlashAttention::Off { 1.2 } else { 1.0 };
    let bf16 = if settings.kv_type_k == KvType::Bf16 { 1.3 } else { 1.0 };
    plain(work) * f64::max(flash, bf16)
}

#[test]
fn the_best_cache_is_found_checked_and_its_gain_said() {
    let mut lab = MadeUp::new(with_matrix_units);
    let (settings, report) = lab.tune(6);
    let expected = TunedSettings { kv_type_k: KvType::Bf16, kv_type_v: KvType::Bf16, ..default() };
    assert_eq!(settings, expected, "{}", report.table());
    assert!((report.gain - 1.3).abs() < 1e-6 && report.source == TuneSource::Measured, "{}", report.table());
    assert!(report.rows.iter().any(|row| row.stage == "check" && row.outcome == "chosen"), "{}", report.table());
}

#[test]
fn what_is_faster_only_with_short_sequences_is_not_taken() {
    let mut lab = MadeUp::new(|settings, work, _| {
        let off = settings.flash_attention == FlashAttention::Off;
        plain(work)
            * if !off {
                1.0
            } else if work == Work::Long {
                0.6
            } else {
                1.3
            }
    });
    let (settings, report) = lab.tune(6);
    assert_eq!(settings, default());
    assert!(report.rows.iter().any(|row| row.outcome == "slower with a long context"), "{}", report.table());
    assert!((report.gain - 1.0).abs() < 1e-9);
}

#[test]
fn what_fails_or_does_not_fit_is_dropped_with_its_reason() {
    let mut lab = MadeUp::new(with_matrix_units);
    lab.refuses = |settings| settings.kv_type_k == KvType::Bf16;
    lab.fits = |settings| settings.flash_attention != FlashAttention::Off;
    let (settings, report) = lab.tune(6);
    assert_eq!(settings, default(), "{}", report.table());
    let outcomes: Vec<_> = report.rows.iter().map(|row| row.outcome.as_str()).collect();
    assert!(outcomes.contains(&"does not fit in the planned memory"), "{outcomes:?}");
    assert!(outcomes.contains(&"has no context: the backend does not have it"), "{outcomes:?}");
}

#[test]
fn with_room_for_one_context_each_is_made_anew_for_its_turn() {
    let mut lab = MadeUp::new(with_matrix_units);
    lab.room = 1;
    let (settings, report) = lab.tune(6);
    assert_eq!(settings.kv_type_k, KvType::Bf16, "{}", report.table());
}

#[test]
fn a_model_that_is_too_slow_keeps_its_defaults_and_costs_a_few_steps() {
    let mut lab = MadeUp::new(|_, work, _| plain(work) / 60.0);
    let (settings, report) = lab.tune(6);
    assert_eq!(settings, default());
    assert!(report.reason.as_ref().is_some_and(|reason| reason.contains("a step takes 333 ms")), "{report:?}");
    assert!(lab.now < Duration::from_secs(8), "{:?}", lab.now);
}

#[test]
fn threads_are_not_compared_on_cores_that_others_use() {
    let fewer_are_faster: Speed = |settings, work, _| plain(work) * if settings.n_threads < 4 { 2.0 } else { 1.0 };
    let mut lab = MadeUp::new(fewer_are_faster);
    assert_eq!(lab.tune(6).0.n_threads, 3);
    let mut lab = MadeUp::new(fewer_are_faster);
    lab.cpu_share = Some(0.5);
    let (settings, report) = lab.tune(6);
    assert!(settings == default() && report.is_disturbed, "{}", report.table());
}

#[test]
fn one_pool_does_not_win_by_shared_beginnings_alone() {
    let mut lab = MadeUp::new(|settings, work, _| {
        plain(work)
            * if !settings.kv_unified {
                1.0
            } else if work == Work::Shared {
                2.3
            } else {
                0.5
            }
    });
    let (settings, report) = lab.tune(60);
    assert!(!settings.kv_unified, "{}", report.table());
    let mut lab = MadeUp::new(|settings, work, _| plain(work) * if settings.kv_unified { 1.2 } else { 1.0 });
    let (settings, report) = lab.tune(60);
    assert!(settings.kv_unified, "{}", report.table());
}

#[test]
fn a_cancelled_load_ends_within_a_turn() {
    let mut lab = MadeUp::new(with_matrix_units);
    lab.cancelled_at = Duration::from_secs(1);
    lab.tune(600);
    assert!(lab.now < Duration::from_secs(20), "{:?}", lab.now);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn it_ends_in_time_whatever_the_speed(slow in 0.05..200.0_f64, noise in 0.0..0.5_f64, seed: u32, room in 1_usize..6) {
        let speed: Speed = with_matrix_units;
        let mut lab = MadeUp { room, noise, seed, ..MadeUp::new(speed) };
        // The clock runs slower instead: the same rates from a machine that is `slow` times slower.
        let budget = Duration::from_secs_f64(6.0 * slow);
        let (settings, report) = tune(&mut lab, &open(), &default(), budget, false);
        prop_assert!(open().allows(&default(), &settings));
        // The longest turn that can be under way: a prompt of the longest context and its steps.
        let turn = Duration::from_secs_f64(1024.0 / 700.0 + 1.0) + budget / 10;
        prop_assert!(lab.now <= budget.mul_f64(1.3) + turn, "{:?} of {:?}\n{}", lab.now, budget, report.table());
    }

    #[test]
    fn noise_alone_never_costs_more_than_it_can_hide(noise in 0.0..0.08_f64, seed: u32) {
        // Whatever is not the default is slower.
        let mut lab = MadeUp { noise, seed, ..MadeUp::new(|settings, work, _| {
            plain(work) * if *settings == default() { 1.0 } else { 0.9 }
        }) };
        let (settings, report) = lab.tune(6);
        prop_assert_eq!(settings, default(), "{}", report.table());
    }
}
