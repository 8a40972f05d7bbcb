use expect_test::{Expect, expect};

use super::*;
use crate::gguf::Header;
use crate::synthetic;

fn shape(name: &str) -> ModelShape {
    let file = synthetic::shape(name).unwrap();
    ModelShape::of(&Header::parse(&file.header_bytes(), file.file_bytes()).unwrap()).unwrap()
}

fn show(estimate: &Estimate) -> String {
    let line = |load: &DeviceLoad| format!("{} + {} + {}", load.weights_bytes, load.cache_bytes, load.compute_bytes);
    estimate.devices.iter().chain([&estimate.host]).map(line).collect::<Vec<_>>().join("\n")
}

fn check(name: &str, settings: &LoadSettings, layers: &[u32], expected: &Expect) {
    let model = shape(name);
    let placement = Placement::split(&model, layers);
    let estimate = estimate(&model, settings, &placement, &[DeviceTraits::RPC; 2], &HostTraits::default());
    expected.assert_eq(&show(&estimate));
}

// Weights, cache and scratch of each device, the host last. All of these are llama.cpp's own figures:
// minerva-llama/tests/estimate.rs compares them, and 13,000 others, with its simulated loads.

#[test]
fn a_dense_model_on_the_host() {
    check("llama2-7b-q4_0", &LoadSettings::default(), &[], &expect!["3791273984 + 2147483648 + 113790976"]);
}

#[test]
fn half_of_a_model_with_windows_and_a_quantised_cache() {
    let settings = LoadSettings {
        context_tokens: 32768,
        n_sequences: 8,
        cache_type_k: GgmlType::Q8_0,
        cache_type_v: GgmlType::Q8_0,
        ..LoadSettings::default()
    };
    check(
        "gemma3-4b-q4_0",
        &settings,
        &[17],
        &expect![[r#"
        1227532288 + 516947968 + 542113792
        1333776384 + 614989824 + 95483904"#]],
    );
}

#[test]
fn compressed_attention_without_flash_attention() {
    let settings = LoadSettings { flash_attention: false, ..LoadSettings::default() };
    check(
        "deepseek2-lite-q4_0",
        &settings,
        &[28],
        &expect![[r#"
        8729081856 + 127401984 + 234893312
        117964800 + 0 + 25182208"#]],
    );
}

#[test]
fn a_hybrid_over_two_devices() {
    check(
        "jamba-mini-q4_0",
        &LoadSettings::default(),
        &[5, 8],
        &expect![[r#"
        934070784 + 9633792 + 104869952
        1832988416 + 10256384 + 138412032
        978881024 + 1245184 + 113264672"#]],
    );
}

#[test]
fn experts_left_behind_take_their_weights_and_their_scratch_along() {
    let model = shape("qwen3moe-30b-q4_0");
    let all = Placement::split(&model, &[49]);
    let behind = all.clone().with_experts_on_host(0..48);
    let sums = |placement: &Placement| {
        let traits = [DeviceTraits::CUDA];
        let estimate = estimate(&model, &LoadSettings::default(), placement, &traits, &HostTraits::default());
        (estimate.devices[0], estimate.host)
    };
    let ((device, host), (less, more)) = (sums(&all), sums(&behind));
    let moved = device.weights_bytes - less.weights_bytes;
    assert_eq!(more.weights_bytes - host.weights_bytes, moved);
    assert!(moved > 15 << 30, "{moved}");
    assert_eq!(device.cache_bytes, less.cache_bytes);
}

#[test]
fn a_larger_context_micro_batch_or_type_never_takes_less() {
    for name in ["llama3-8b-q8_0", "gemma2-2b-q4_0", "granitehybrid-7b-q4_0"] {
        let model = shape(name);
        let total = |settings: &LoadSettings| {
            let placement = Placement::split(&model, &[]);
            estimate(&model, settings, &placement, &[], &HostTraits::default()).host.total_bytes()
        };
        let least = LoadSettings { context_tokens: 2048, ubatch_tokens: 128, ..LoadSettings::default() };
        for more in [
            LoadSettings { context_tokens: 4096, ..least.clone() },
            LoadSettings { ubatch_tokens: 256, ..least.clone() },
            LoadSettings { cache_type_k: GgmlType::F32, cache_type_v: GgmlType::F32, ..least.clone() },
            LoadSettings { full_windows: true, ..least.clone() },
        ] {
            assert!(total(&more) >= total(&least), "{name} {more:?}");
        }
    }
}

#[test]
fn sizes_that_no_model_has_are_errors_with_the_limit() {
    let with = |key: &str, value: u32| {
        let mut file = synthetic::shape_with_layers("llama2-7b-q4_0", 2).unwrap();
        file.set(key, value);
        ModelShape::of(&Header::parse(&file.header_bytes(), file.file_bytes()).unwrap()).map(|_| ())
    };
    assert!(with("llama.attention.key_length", 128).is_ok());
    for (key, value) in [
        ("llama.attention.key_length", u32::MAX),
        ("llama.attention.head_count", u32::MAX),
        ("llama.embedding_length", u32::MAX),
        ("llama.block_count", 100_000),
        ("llama.block_count", 0),
    ] {
        let text = with(key, value).unwrap_err().to_string();
        assert!(text.contains("the limit is") && text.contains(&value.to_string()), "{key}: {text}");
    }
}
