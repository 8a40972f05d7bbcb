//! What may be tried: only what the user left open, and of that only what can be worth it.

use minerva_gpu::CpuInfo;
use serde::Serialize;

use super::TunedSettings;
use crate::config::{EngineConfig, FlashAttention, KvType};

/// Micro-batches to compare: powers of two around llama.cpp's default.
const UBATCHES: [u32; 4] = [128, 256, 512, 1024];

/// From this many threads on half of them are tried too: decoding waits for memory, and half may fill its channels.
const MANY_THREADS: u32 = 8;

/// Values that each setting may take besides its default. Part of what a finding is kept under.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Open {
    flash_attention: Vec<FlashAttention>,
    /// For K and V alike.
    kv_types: Vec<KvType>,
    kv_unified: Vec<bool>,
    threads: Vec<u32>,
    threads_batch: Vec<u32>,
    ubatches: Vec<u32>,
}

impl Open {
    /// What `config` leaves open beside these defaults of its plan.
    pub(crate) fn of(config: &EngineConfig, default: &TunedSettings, n_seq_max: u32, cpu: &CpuInfo) -> Self {
        let types_are_plain = (default.kv_type_k, default.kv_type_v) == (KvType::F16, KvType::F16);
        let mut kv_types = Vec::new();
        if types_are_plain && !config.tune.fixed_kv_types {
            kv_types.push(KvType::Bf16);
            kv_types.extend(config.kv_may_quantize.then_some(KvType::Q8_0));
        }
        let v_needs_flash = default.kv_type_v.is_quantized();
        let without = config.flash_attention == FlashAttention::Auto && !v_needs_flash;
        let layout = n_seq_max > 1 && !default.kv_unified && !config.tune.fixed_kv_layout;
        let threads = |fixed: bool, n| if fixed { Vec::new() } else { other_threads(n, cpu) };
        // Threads for prompts are as many as for decoding where the user fixed those.
        let is_fixed = config.n_threads.is_some();
        let ubatches = UBATCHES.into_iter().filter(|&n| n != default.n_ubatch && n <= config.n_batch);
        Self {
            flash_attention: without.then_some(FlashAttention::Off).into_iter().collect(),
            kv_types,
            kv_unified: layout.then_some(true).into_iter().collect(),
            threads: threads(is_fixed, default.n_threads),
            threads_batch: threads(is_fixed || config.n_threads_batch.is_some(), default.n_threads_batch),
            ubatches: if config.n_ubatch.is_none() { ubatches.collect() } else { Vec::new() },
        }
    }

    /// Whether nothing may change.
    pub(crate) fn is_empty(&self) -> bool {
        let Self { flash_attention, kv_types, kv_unified, threads, threads_batch, ubatches } = self;
        flash_attention.is_empty()
            && kv_types.is_empty()
            && kv_unified.is_empty()
            && [threads, threads_batch, ubatches].iter().all(|list| list.is_empty())
    }

    /// Whether these settings could be the result of tuning from these defaults.
    pub(crate) fn allows(&self, default: &TunedSettings, settings: &TunedSettings) -> bool {
        fn is_open<T: PartialEq>(value: &T, default: &T, open: &[T]) -> bool {
            value == default || open.contains(value)
        }
        let same_types = settings.kv_type_k == settings.kv_type_v
            || (settings.kv_type_k, settings.kv_type_v) == (default.kv_type_k, default.kv_type_v);
        same_types
            && can_be(settings)
            && is_open(&settings.flash_attention, &default.flash_attention, &self.flash_attention)
            && is_open(&settings.kv_type_k, &default.kv_type_k, &self.kv_types)
            && is_open(&settings.kv_type_v, &default.kv_type_v, &self.kv_types)
            && is_open(&settings.kv_unified, &default.kv_unified, &self.kv_unified)
            && is_open(&settings.n_threads, &default.n_threads, &self.threads)
            && is_open(&settings.n_threads_batch, &default.n_threads_batch, &self.threads_batch)
            && is_open(&settings.n_ubatch, &default.n_ubatch, &self.ubatches)
    }

    /// Every other cache, those that win most often first.
    pub(crate) fn caches(&self, base: &TunedSettings) -> Vec<TunedSettings> {
        let types = std::iter::once((base.kv_type_k, base.kv_type_v)).chain(self.kv_types.iter().map(|&t| (t, t)));
        let flash = || std::iter::once(base.flash_attention).chain(self.flash_attention.iter().copied());
        let all = types.flat_map(|(kv_type_k, kv_type_v)| {
            flash().map(move |flash_attention| TunedSettings { flash_attention, kv_type_k, kv_type_v, ..base.clone() })
        });
        all.filter(|settings| settings != base && can_be(settings)).collect()
    }

    /// Other numbers of threads for decoding.
    pub(crate) fn threads(&self, base: &TunedSettings) -> Vec<TunedSettings> {
        self.threads.iter().map(|&n_threads| TunedSettings { n_threads, ..base.clone() }).collect()
    }

    /// Other ways to compute a prompt of so many tokens. Threads for prompts come as a pair with the micro-batch that is there.
    pub(crate) fn prompts(&self, base: &TunedSettings, n_tokens: u32) -> Vec<TunedSettings> {
        let ubatches = self.ubatches.iter().filter(|&&n| n <= n_tokens);
        let ubatches = ubatches.map(|&n_ubatch| TunedSettings { n_ubatch, ..base.clone() });
        let threads = self.threads_batch.iter().map(|&n| TunedSettings { n_threads_batch: n, ..base.clone() });
        ubatches.chain(threads).collect()
    }

    /// The other layout of the cache.
    pub(crate) fn layouts(&self, base: &TunedSettings) -> Vec<TunedSettings> {
        self.kv_unified.iter().map(|&kv_unified| TunedSettings { kv_unified, ..base.clone() }).collect()
    }
}

/// llama.cpp computes with a quantized V cache only by flash attention.
fn can_be(settings: &TunedSettings) -> bool {
    settings.flash_attention != FlashAttention::Off || !settings.kv_type_v.is_quantized()
}

/// One fewer (the server, its clients and the system compute too), half, and both hardware threads of each core.
fn other_threads(n: u32, cpu: &CpuInfo) -> Vec<u32> {
    let most = cpu.quota_cpus.map_or(cpu.affinity_cpus, |quota| quota.min(cpu.affinity_cpus));
    let most = u32::try_from(most).unwrap_or(n);
    let mut others = Vec::new();
    if n > 1 {
        others.push(n - 1);
    }
    if n >= MANY_THREADS {
        others.push(n / 2);
    }
    if most > n {
        others.push(most);
    }
    others
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn default() -> TunedSettings {
        TunedSettings {
            flash_attention: FlashAttention::Auto,
            kv_type_k: KvType::F16,
            kv_type_v: KvType::F16,
            kv_unified: false,
            n_threads: 8,
            n_threads_batch: 8,
            n_ubatch: 512,
        }
    }

    fn cpu(affinity_cpus: usize, quota_cpus: Option<usize>) -> CpuInfo {
        CpuInfo { affinity_cpus, quota_cpus, ..CpuInfo::default() }
    }

    fn everything(open: &Open, base: &TunedSettings) -> Vec<TunedSettings> {
        let mut all = open.caches(base);
        all.extend(open.threads(base));
        all.extend(open.prompts(base, 1024));
        all.extend(open.layouts(base));
        all
    }

    #[test]
    fn an_open_configuration_has_its_likeliest_winners_first() {
        let open = Open::of(&EngineConfig::default(), &default(), 8, &cpu(16, None));
        let caches: Vec<_> = open.caches(&default()).iter().map(ToString::to_string).collect();
        let of = |cache: &str| format!("{cache}, 8+8 threads, ubatch 512");
        assert_eq!(caches, [of("fa off, kv f16"), of("fa auto, kv bf16"), of("fa off, kv bf16")]);
        let threads: Vec<_> = open.threads(&default()).iter().map(|settings| settings.n_threads).collect();
        assert_eq!(threads, [7, 4, 16]);
        assert_eq!(open.prompts(&default(), 512).len(), 2 + 3, "a micro-batch larger than the prompt is not tried");
        assert_eq!(open.layouts(&default()).len(), 1);
        let limited = Open::of(&EngineConfig::default(), &default(), 8, &cpu(16, Some(8)));
        assert_eq!(limited.threads, [7, 4], "no thread beyond the quota");
    }

    #[test]
    fn a_smaller_type_needs_leave_and_flash_attention() {
        let config = EngineConfig { kv_may_quantize: true, ..EngineConfig::default() };
        let open = Open::of(&config, &default(), 8, &cpu(8, None));
        let caches: Vec<_> = open.caches(&default()).iter().map(ToString::to_string).collect();
        assert_eq!(
            caches.iter().filter(|cache| cache.contains("q8_0")).collect::<Vec<_>>(),
            ["fa auto, kv q8_0, 8+8 threads, ubatch 512"]
        );
        let impossible = TunedSettings {
            flash_attention: FlashAttention::Off,
            kv_type_k: KvType::Q8_0,
            kv_type_v: KvType::Q8_0,
            ..default()
        };
        assert!(!open.allows(&default(), &impossible));
    }

    #[test]
    fn with_everything_fixed_nothing_is_tried() {
        let mut config = EngineConfig {
            flash_attention: FlashAttention::On,
            n_threads: Some(8),
            n_ubatch: Some(512),
            ..EngineConfig::default()
        };
        (config.tune.fixed_kv_types, config.tune.fixed_kv_layout) = (true, true);
        let open = Open::of(&config, &default(), 8, &cpu(16, None));
        assert!(open.is_empty() && everything(&open, &default()).is_empty(), "{open:?}");
    }

    proptest! {
        #[test]
        fn what_is_fixed_never_changes_and_what_is_tried_is_allowed(
            fixed in proptest::array::uniform6(any::<bool>()), may_quantize: bool, n in 1_u32..200, cpus in 1_usize..200,
            n_seq_max in 1_u32..64, n_batch in 1_u32..4096,
        ) {
            let [flash, types, layout, threads, batch, ubatch] = fixed;
            let default = TunedSettings { n_threads: n, n_threads_batch: n, n_ubatch: n_batch.min(512), ..default() };
            let mut config = EngineConfig {
                flash_attention: if flash { FlashAttention::On } else { FlashAttention::Auto },
                n_threads: threads.then_some(n),
                n_threads_batch: batch.then_some(n),
                n_ubatch: ubatch.then_some(default.n_ubatch),
                n_batch,
                kv_may_quantize: may_quantize,
                ..EngineConfig::default()
            };
            (config.tune.fixed_kv_types, config.tune.fixed_kv_layout) = (types, layout);
            let open = Open::of(&config, &default, n_seq_max, &cpu(cpus, None));
            for settings in everything(&open, &default) {
                prop_assert!(open.allows(&default, &settings), "{settings}");
                prop_assert!(settings != default && settings.n_threads > 0 && settings.n_ubatch <= n_batch);
                prop_assert!(!flash || settings.flash_attention == FlashAttention::Auto);
                prop_assert!(!types || (settings.kv_type_k, settings.kv_type_v) == (KvType::F16, KvType::F16));
                prop_assert!(may_quantize || !settings.kv_type_k.is_quantized());
                prop_assert!(!layout || !settings.kv_unified);
                prop_assert!(!threads || (settings.n_threads, settings.n_threads_batch) == (n, n));
                prop_assert!(!batch || settings.n_threads_batch == n);
                prop_assert!(!ubatch || settings.n_ubatch == default.n_ubatch);
            }
            prop_assert!(open.allows(&default, &default));
        }
    }
}
