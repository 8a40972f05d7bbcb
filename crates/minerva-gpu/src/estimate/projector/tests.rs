use proptest::prelude::*;

use super::*;
use crate::estimate::EstimateError;
use crate::gguf::{Array, FileBuilder, GgmlType, Header, Value};
use crate::synthetic;

fn read(file: &FileBuilder) -> Result<ProjectorShape, EstimateError> {
    ProjectorShape::of(&Header::parse(&file.header_bytes(), file.file_bytes()).unwrap())
}

fn shape(name: &str) -> ProjectorShape {
    read(&synthetic::projector(name).unwrap()).unwrap()
}

fn settings(flash_attention: bool, picture: PictureSize) -> ProjectorSettings {
    ProjectorSettings { flash_attention, picture, ..ProjectorSettings::default() }
}

/// What llama.cpp b11434 counts before it allocates anything: the bytes of the weights' buffer, of the scratch (with flash attention,
/// without), and, where the encoder has a device, of the host's part of the scratch.
///
/// They are the figures behind `mtmd_get_memory_usage`: `clip_init` with `no_alloc` on the synthetic files, on the CPU, and on a device
/// over RPC whose memory is a CPU's, where all of the weights and the scratch of the CPU move to the device. Each encoder of a file
/// with two is counted by itself, and their sums stand here.
const AT_LOAD: [(&str, u64, [u64; 2], u64); 32] = [
    ("mmproj-vit-b", 183_693_312, [4_840_000, 4_887_296], 603_712),
    ("mmproj-llava-1.5", 650_813_440, [22_593_056, 34_479_712], 1_359_392),
    ("mmproj-yi-vl", 1_311_328_256, [46_461_984, 95_891_552], 2_416_672),
    ("mmproj-granite-vision", 855_732_672, [45_445_376, 79_457_600], 1_775_360),
    ("mmproj-gemma3", 849_871_296, [127_139_840, 1_186_988_032], 9_633_792),
    ("mmproj-smolvlm", 198_276_096, [22_020_096, 62_914_560], 3_145_728),
    ("mmproj-smolvlm-2b", 870_920_640, [22_628_160, 47_449_152], 1_769_472),
    ("mmproj-lfm2-vl", 854_004_672, [31_784_960, 85_983_232], 3_145_728),
    ("mmproj-janus-pro", 651_177_984, [21_233_664, 30_670_848], 1_769_472),
    ("mmproj-phi4", 892_429_248, [11_665_408, 11_665_408], 786_432),
    ("mmproj-internvl3", 628_211_712, [29_388_800, 84_033_600], 2_408_448),
    ("mmproj-pixtral", 870_055_936, [17_369_088, 16_844_800], 788_480),
    ("mmproj-mistral-small-3.1", 878_039_040, [67_756_032, 90_824_704], 2_416_640),
    ("mmproj-lightonocr", 819_298_304, [67_428_352, 90_497_024], 2_416_640),
    ("mmproj-qwen2vl", 1_352_605_696, [280_056_832, 4_821_636_096], 20_042_752),
    ("mmproj-qwen2.5vl", 1_354_132_480, [739_025_728, 5_108_210_240], 306_616_896),
    ("mmproj-qwen3vl", 1_159_009_216, [390_156_544, 5_001_072_896], 26_136_832),
    ("mmproj-ultravox", 1_379_483_648, [53_760_000, 210_720_000], 1_536_000),
    ("mmproj-voxtral", 1_329_102_848, [53_760_000, 210_720_000], 1_536_000),
    ("mmproj-qwen2-audio", 1_289_273_344, [53_760_000, 210_720_000], 1_536_000),
    ("mmproj-music-flamingo", 1_313_665_024, [53_760_000, 210_720_000], 1_536_000),
    ("mmproj-glm-asr", 1_429_848_064, [53_760_000, 210_720_000], 1_536_000),
    ("mmproj-qwen2.5-omni", 2_645_103_616, [792_785_728, 5_318_930_240], 308_152_896),
    ("mmproj-gemma4", 1_192_436_928, [157_943_808, 399_919_104], 7_096_320),
    ("mmproj-kimi-vl", 905_345_984, [36_560_896, 93_118_464], 2_416_640),
    ("mmproj-paddleocr", 880_389_568, [111_992_832, 709_087_232], 7_426_048),
    ("mmproj-dots-ocr", 2_524_471_296, [553_071_616, 3_822_748_672], 20_042_752),
    ("mmproj-minicpm-v", 1_037_828_032, [58_523_136, 88_407_552], 2_424_320),
    ("mmproj-glm4v", 1_786_947_584, [540_070_912, 3_822_748_672], 20_042_752),
    ("mmproj-hunyuan", 952_977_856, [139_722_752, 1_161_822_208], 31_457_280),
    ("mmproj-gemma3n", 875_265_408, [389_302_272, 389_302_272], 7_077_888),
    ("mmproj-qwen3-asr", 641_652_800, [580_800_000, 580_800_000], 1_536_000),
];

/// The same for kinds whose graphs are not written down.
const BOUNDED: [(&str, u64, [u64; 2], u64); 2] = [
    ("mmproj-deepseek-ocr", 809_439_232, [1_272_066_560, 1_686_254_080], 12_600_096),
    ("mmproj-lfm2-audio", 250_798_592, [202_941_952, 202_941_952], 3_069_952),
];

/// The same for the largest picture, where that is not the one at load: `reserve_compute_meta` with a picture of that size.
const LARGEST: [(&str, [u64; 2], u64); 13] = [
    ("mmproj-lfm2-vl", [31_784_960, 85_983_232], 3_145_728),
    ("mmproj-phi4", [164_044_800, 895_795_200], 11_059_200),
    ("mmproj-pixtral", [68_820_992, 91_889_664], 3_153_920),
    ("mmproj-mistral-small-3.1", [270_368_768, 1_167_949_824], 9_666_560),
    ("mmproj-lightonocr", [796_760_832, 9_646_604_032], 28_556_032),
    ("mmproj-qwen2vl", [542_113_792, 17_638_096_896], 38_797_312),
    ("mmproj-qwen2.5vl", [1_984_987_136, 18_711_871_488], 1_112_571_904),
    ("mmproj-qwen3vl", [755_236_864, 17_985_437_696], 50_593_792),
    ("mmproj-gemma4", [692_238_144, 6_789_814_464], 31_101_888),
    ("mmproj-kimi-vl", [146_243_584, 1_177_780_224], 9_666_560),
    ("mmproj-paddleocr", [514_252_800, 13_636_915_200], 34_099_200),
    ("mmproj-glm4v", [1_045_430_272, 13_628_342_272], 38_797_312),
    ("mmproj-hunyuan", [558_891_008, 17_532_190_720], 125_829_120),
];

#[test]
fn weights_and_scratch_are_llama_cpps_to_the_byte() {
    for (name, weights, scratch, on_host) in AT_LOAD {
        let projector = shape(name);
        assert!(!projector.is_bound(), "{name}");
        for (flash_attention, scratch) in [true, false].into_iter().zip(scratch) {
            let settings = settings(flash_attention, PictureSize::AtLoad);
            let there = estimate_projector(&projector, Some(DeviceTraits::RPC), &settings).bytes;
            let load = |weights_bytes, compute_bytes| DeviceLoad { weights_bytes, cache_bytes: 0, compute_bytes };
            assert_eq!((there.devices, there.host), (vec![load(weights, scratch)], load(0, on_host)), "{name}");
            let here = estimate_projector(&projector, None, &settings).bytes;
            assert_eq!((here.devices, here.host), (vec![], load(weights, scratch)), "{name}");
        }
    }
}

#[test]
fn scratch_for_the_largest_picture_is_llama_cpps_to_the_byte() {
    for (name, scratch, on_host) in LARGEST {
        let projector = shape(name);
        for (flash_attention, scratch) in [true, false].into_iter().zip(scratch) {
            let settings = settings(flash_attention, PictureSize::Largest);
            let there = estimate_projector(&projector, Some(DeviceTraits::RPC), &settings).bytes;
            let bytes = [there.devices[0].compute_bytes, there.host.compute_bytes];
            assert_eq!(bytes, [scratch, on_host], "{name}");
        }
    }
}

#[test]
fn a_bound_is_one_and_says_so() {
    for (name, weights, scratch, on_host) in BOUNDED {
        let projector = shape(name);
        for (flash_attention, scratch) in [true, false].into_iter().zip(scratch) {
            let settings = settings(flash_attention, PictureSize::AtLoad);
            let there = estimate_projector(&projector, Some(DeviceTraits::RPC), &settings);
            assert!(there.is_bound, "{name}");
            let (device, host) = (there.bytes.devices[0], there.bytes.host);
            assert_eq!(device.weights_bytes, weights, "{name}");
            assert!(device.compute_bytes >= scratch && host.compute_bytes >= on_host, "{name}: {device:?} {host:?}");
            assert!(device.compute_bytes < 16 * scratch, "{name}: a bound of some use, {device:?}");
        }
    }
}

/// What the bound of a kind would be is above what its graph takes, for every kind with layers whose graph is written down.
#[test]
fn bounds_of_the_kinds_that_are_written_down_are_bounds() {
    for (name, _, scratch, on_host) in AT_LOAD.into_iter().filter(|(name, ..)| *name != "mmproj-gemma3n") {
        for (flash_attention, scratch) in [true, false].into_iter().zip(scratch) {
            let mut bounds = [0, 0];
            for encoder in &shape(name).encoders {
                let bytes = bound::scratch_bytes(encoder, encoder.at_load(None), flash_attention, 2);
                bounds.iter_mut().zip(bytes).for_each(|(sum, bytes)| *sum += bytes);
            }
            assert!(bounds[0] >= scratch && bounds[1] >= on_host, "{name}: {bounds:?} for {scratch} and {on_host}");
        }
    }
}

#[test]
fn the_named_projectors_are_all_compared() {
    let compared: Vec<&str> = AT_LOAD.iter().chain(&BOUNDED).map(|(name, ..)| *name).collect();
    for name in synthetic::PROJECTOR_NAMES {
        assert!(compared.contains(&name), "{name}");
    }
}

#[test]
fn a_larger_picture_never_takes_less_and_fewer_tokens_never_more() {
    for name in synthetic::PROJECTOR_NAMES {
        let projector = shape(name);
        let scratch =
            |settings: ProjectorSettings| estimate_projector(&projector, None, &settings).bytes.host.compute_bytes;
        let (least, most) = (settings(true, PictureSize::AtLoad), settings(true, PictureSize::Largest));
        assert!(scratch(most) >= scratch(least), "{name}");
        for image_max_tokens in [1, 100, 256].map(Some) {
            assert!(scratch(ProjectorSettings { image_max_tokens, ..most }) <= scratch(most), "{name}");
        }
    }
}

#[test]
fn what_no_projector_has_is_an_error_that_says_so() {
    let with = |key: &str, value: Value| {
        let mut file = synthetic::projector("mmproj-vit-b").unwrap();
        file.set(key, value);
        read(&file).map(|_| ())
    };
    let text = with("clip.projector_type", Value::String("new".to_owned())).unwrap_err().to_string();
    assert!(text.contains("`new`"), "{text}");
    for (key, value) in [
        ("clip.vision.image_size", 9000),
        ("clip.vision.patch_size", 1 << 20),
        ("clip.vision.block_count", 100_000),
        ("clip.vision.attention.head_count", 1 << 20),
        ("clip.vision.embedding_length", u32::MAX),
    ] {
        let text = with(key, Value::U32(value)).unwrap_err().to_string();
        assert!(text.contains("the limit is") && text.contains(&value.to_string()), "{key}: {text}");
    }
    for key in ["clip.vision.patch_size", "clip.vision.embedding_length"] {
        let text = with(key, Value::U32(0)).unwrap_err().to_string();
        assert!(text.contains("has no"), "{key}: {text}");
    }
    let mut model = synthetic::projector("mmproj-vit-b").unwrap();
    model.unset("clip.has_vision_encoder");
    assert!(read(&model).unwrap_err().to_string().contains("has_vision_encoder"));
}

const NUMBERS: [&str; 16] = [
    "image_size",
    "patch_size",
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "projection_dim",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.head_dim",
    "projector.scale_factor",
    "projector.stack_factor",
    "spatial_merge_size",
    "n_wa_pattern",
    "preproc_image_size",
    "image_max_pixels",
    "num_mel_bins",
];

fn number() -> impl Strategy<Value = u32> {
    prop_oneof![0_u32..70, 0_u32..5000, any::<u32>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever the header says, there is an answer, and soon.
    #[test]
    fn no_header_is_too_much(
        base in prop::sample::select(synthetic::PROJECTOR_NAMES.to_vec()),
        kind in prop::sample::select(family::names()),
        changes in prop::collection::vec((prop::sample::select(NUMBERS.to_vec()), number()), 0..4),
        dims in prop::collection::vec(prop_oneof![0_u64..20, 0_u64..5000, any::<u64>()], 0..5),
        features in prop::collection::vec(any::<i32>(), 0..4),
        image_max_tokens in prop::option::of(number()),
    ) {
        let mut file = synthetic::projector(base).unwrap();
        file.set("clip.projector_type", kind.to_owned());
        for part in ["vision", "audio"] {
            for (name, value) in &changes {
                file.set(&format!("clip.{part}.{name}"), *value);
            }
            file.set(&format!("clip.{part}.feature_layer"), Value::Array(Array::I32(features.clone())));
        }
        file.add_tensor("mm.extra.weight", GgmlType::F16, &dims);
        if let Ok(header) = Header::parse(&file.header_bytes(), file.file_bytes())
            && let Ok(projector) = ProjectorShape::of(&header)
        {
            for flash_attention in [true, false] {
                let settings = ProjectorSettings { flash_attention, image_max_tokens, ..ProjectorSettings::default() };
                for device in [None, Some(DeviceTraits::CUDA)] {
                    let bytes = estimate_projector(&projector, device, &settings).bytes;
                    prop_assert!(bytes.host.total_bytes() > 0);
                }
            }
        }
    }
}
