//! The estimator of `minerva-gpu` against llama.cpp's own figures, from loads that allocate nothing.

use std::path::Path;

use minerva_gpu::estimate::{DeviceLoad, DeviceTraits, HostTraits, LoadSettings, ModelShape, Placement, estimate};
use minerva_gpu::gguf::{GgmlType, Header};
use minerva_gpu::synthetic;
use minerva_llama::{ContextParams, DeviceBytes, FlashAttention, KvType, ModelParams, Simulation};

const MIB: f64 = 1_048_576.0;

/// One context's worth of settings.
struct Case {
    settings: LoadSettings,
    params: ContextParams,
    label: String,
}

fn cases() -> Vec<Case> {
    let types = [
        ("f16", GgmlType::F16, KvType::F16),
        ("q8_0", GgmlType::Q8_0, KvType::Q8_0),
        ("q4_0", GgmlType::Q4_0, KvType::Q4_0),
    ];
    let mut cases = Vec::new();
    for context in [512, 4096, 32768] {
        for (type_name, ggml_type, kv_type) in types {
            for n_sequences in [1, 8] {
                for ubatch in [128, 512] {
                    for flash in [true, false] {
                        if !flash && ggml_type != GgmlType::F16 {
                            continue; // llama.cpp refuses a quantised V without flash attention
                        }
                        let settings = LoadSettings {
                            context_tokens: context,
                            n_sequences,
                            ubatch_tokens: ubatch,
                            flash_attention: flash,
                            cache_type_k: ggml_type,
                            cache_type_v: ggml_type,
                            ..LoadSettings::default()
                        };
                        let params = ContextParams {
                            n_ctx: context,
                            n_seq_max: n_sequences,
                            n_ubatch: ubatch,
                            flash_attention: if flash { FlashAttention::On } else { FlashAttention::Off },
                            type_k: kv_type,
                            type_v: kv_type,
                            full_windows: false,
                            ..ContextParams::default()
                        };
                        let fa = if flash { "fa" } else { "no fa" };
                        let label = format!("ctx {context} {type_name} np {n_sequences} ub {ubatch} {fa}");
                        cases.push(Case { settings, params, label });
                    }
                }
            }
        }
    }
    cases
}

#[test]
fn matrix() {
    let only = std::env::var("SHAPE").ok();
    let dir = std::env::temp_dir().join(format!("minerva-estimate-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let mut worst: Vec<(f64, String)> = Vec::new();
    for name in synthetic::NAMES.iter().filter(|name| only.as_deref().is_none_or(|only| name.starts_with(only))) {
        let path = dir.join(format!("{name}.gguf"));
        synthetic::shape(name).expect("known").write_header_only(&path).expect("written");
        check(name, &path, &mut worst);
        std::fs::remove_file(&path).expect("removed");
    }
    worst.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (miss, line) in worst.iter().take(20) {
        println!("{miss:.3} {line}");
    }
    let bad = worst.iter().filter(|(miss, _)| *miss > 1.0).count();
    println!("{bad} of {} outside", worst.len());
}

fn check(name: &str, path: &Path, worst: &mut Vec<(f64, String)>) {
    let header = Header::open(path).unwrap_or_else(|error| panic!("{name}: {error}"));
    let start = std::time::Instant::now();
    let model = ModelShape::of(&header).unwrap_or_else(|error| panic!("{name}: {error}"));
    let simulation = match Simulation::load(path, &ModelParams { use_extra_buffers: false, ..ModelParams::default() }) {
        Ok(simulation) => simulation,
        Err(error) => {
            println!("{name}: {error}");
            return;
        }
    };
    println!("{name}: loaded in {:?}", start.elapsed());
    let placement = Placement::split(&model, &[]);
    let (mut ours_time, mut theirs_time, mut shown) = (std::time::Duration::ZERO, std::time::Duration::ZERO, 0);
    for case in cases() {
        let start = std::time::Instant::now();
        let ours = estimate(&model, &case.settings, &placement, &[DeviceTraits::HOST], &HostTraits::default());
        ours_time += start.elapsed();
        let start = std::time::Instant::now();
        let theirs = match simulation.memory_bytes(&case.params) {
            Ok(theirs) => theirs,
            Err(error) => {
                println!("{name} {}: {error}", case.label);
                continue;
            }
        };
        theirs_time += start.elapsed();
        let miss = miss(&ours.host, theirs.last().expect("host"));
        let line = format!("{name} | {} | {}", case.label, compare(&ours.host, theirs.last().expect("host")));
        if miss > 1.0 && shown < 6 {
            shown += 1;
            println!("OUT {miss:.2} {line}");
        }
        worst.push((miss, line));
    }
    println!("{name}: ours {ours_time:?}, theirs {theirs_time:?}");
}

/// The largest of the misses, each as a multiple of what is allowed.
fn miss(ours: &DeviceLoad, theirs: &DeviceBytes) -> f64 {
    let one = |ours: u64, theirs: u64, share: f64, least_mib: f64| {
        ours.abs_diff(theirs) as f64 / (theirs as f64 * share).max(least_mib * MIB)
    };
    let total = theirs.weights_bytes + theirs.kv_bytes + theirs.compute_bytes;
    one(ours.weights_bytes, theirs.weights_bytes, 0.001, 1.0)
        .max(one(ours.cache_bytes, theirs.kv_bytes, 0.001, 1.0))
        .max(one(ours.compute_bytes, theirs.compute_bytes, 0.05, 16.0))
        .max(one(ours.total_bytes(), total, 0.02, 32.0))
}

fn compare(ours: &DeviceLoad, theirs: &DeviceBytes) -> String {
    let mib = |bytes: u64| bytes as f64 / MIB;
    format!(
        "weights {:.2} / {:.2}, cache {:.2} / {:.2}, compute {:.2} / {:.2}",
        mib(ours.weights_bytes),
        mib(theirs.weights_bytes),
        mib(ours.cache_bytes),
        mib(theirs.kv_bytes),
        mib(ours.compute_bytes),
        mib(theirs.compute_bytes)
    )
}
