//! Multimodal projectors: an encoder of images or sound, and what brings its output to the width of a text model.

mod others;

use super::Draft;
use crate::gguf::{Array, FileBuilder, GgmlType, Value};

/// Names that [`projector`] knows.
pub const PROJECTOR_NAMES: [&str; 34] = [
    "mmproj-vit-b",
    "mmproj-llava-1.5",
    "mmproj-yi-vl",
    "mmproj-granite-vision",
    "mmproj-gemma3",
    "mmproj-smolvlm",
    "mmproj-smolvlm-2b",
    "mmproj-lfm2-vl",
    "mmproj-janus-pro",
    "mmproj-phi4",
    "mmproj-internvl3",
    "mmproj-pixtral",
    "mmproj-mistral-small-3.1",
    "mmproj-lightonocr",
    "mmproj-qwen2vl",
    "mmproj-qwen2.5vl",
    "mmproj-qwen3vl",
    "mmproj-ultravox",
    "mmproj-voxtral",
    "mmproj-qwen2-audio",
    "mmproj-music-flamingo",
    "mmproj-glm-asr",
    "mmproj-qwen2.5-omni",
    "mmproj-gemma4",
    "mmproj-kimi-vl",
    "mmproj-paddleocr",
    "mmproj-dots-ocr",
    "mmproj-minicpm-v",
    "mmproj-glm4v",
    "mmproj-hunyuan",
    "mmproj-deepseek-ocr",
    "mmproj-gemma3n",
    "mmproj-qwen3-asr",
    "mmproj-lfm2-audio",
];

/// Sizes of an encoder; the fields are llama.cpp's hyperparameters.
#[derive(Clone, Copy)]
struct Sizes {
    n_layers: u32,
    n_embd: u32,
    n_heads: u32,
    n_ff: u32,
    /// Width of the text model.
    n_out: u32,
    image: u32,
    patch: u32,
}

const fn sizes(layers_heads: [u32; 2], embd_ff_out: [u32; 3], image_patch: [u32; 2]) -> Sizes {
    let [n_layers, n_heads] = layers_heads;
    let [n_embd, n_ff, n_out] = embd_ff_out;
    let [image, patch] = image_patch;
    Sizes { n_layers, n_embd, n_heads, n_ff, n_out, image, patch }
}

/// Which tensors a layer has besides the products that all have.
#[derive(Clone, Copy)]
struct Style {
    /// Norms and products have biases.
    biases: bool,
    /// A gate in the feed-forward block.
    gate: bool,
    /// Queries, keys and values in one product.
    fused: bool,
    /// What a layer adds is scaled.
    scaled: bool,
    /// Keys have no bias (Whisper).
    plain_keys: bool,
}

const PLAIN: Style = Style { biases: true, gate: false, fused: false, scaled: false, plain_keys: false };
const WHISPER: Style = Style { plain_keys: true, ..PLAIN };
const PIXTRAL: Style = Style { biases: false, gate: true, ..PLAIN };

/// The header of a named projector; `None` for a name that is not in [`PROJECTOR_NAMES`].
pub fn projector(name: &str) -> Option<FileBuilder> {
    build(name, None)
}

/// The same with so many layers, as far as a kind has layers: quick to write and mutate.
pub fn projector_with_layers(name: &str, n_layers: u32) -> Option<FileBuilder> {
    build(name, Some(n_layers))
}

fn build(name: &str, n_layers: Option<u32>) -> Option<FileBuilder> {
    let sizes = |layers_heads, embd_ff_out, image_patch| {
        let all = sizes(layers_heads, embd_ff_out, image_patch);
        Sizes { n_layers: n_layers.unwrap_or(all.n_layers), ..all }
    };
    let whisper = |n_out| sizes([32, 20], [1280, 5120, n_out], [0, 0]);
    let file = match name {
        "mmproj-vit-b" => llava(sizes([12, 12], [768, 3072, 2048], [224, 16]), false),
        "mmproj-llava-1.5" => llava(sizes([24, 16], [1024, 4096, 4096], [336, 14]), false),
        "mmproj-yi-vl" => llava(sizes([32, 16], [1280, 5120, 4096], [448, 14]), true),
        "mmproj-granite-vision" => granite(sizes([27, 16], [1152, 4304, 2048], [384, 14])),
        "mmproj-gemma3" => gemma3(sizes([27, 16], [1152, 4304, 2560], [896, 14])),
        "mmproj-smolvlm" => idefics3(sizes([12, 12], [768, 3072, 960], [512, 16]), 4),
        "mmproj-smolvlm-2b" => idefics3(sizes([27, 16], [1152, 4304, 2048], [384, 14]), 3),
        "mmproj-lfm2-vl" => lfm2(sizes([27, 16], [1152, 4304, 2048], [256, 16])),
        "mmproj-janus-pro" => {
            siglip_products("janus_pro", sizes([24, 16], [1024, 4096, 4096], [384, 16]), ["mm.0", "mm.1"])
        }
        "mmproj-phi4" => phi4(sizes([27, 16], [1152, 4304, 5120], [384, 16])),
        "mmproj-internvl3" => internvl(sizes([24, 16], [1024, 4096, 1536], [448, 14])),
        "mmproj-pixtral" => pixtral("pixtral", sizes([24, 16], [1024, 4096, 5120], [1024, 16]), 1),
        "mmproj-mistral-small-3.1" => pixtral("pixtral", sizes([24, 16], [1024, 4096, 5120], [1540, 14]), 2),
        "mmproj-lightonocr" => pixtral("lightonocr", sizes([24, 16], [1024, 4096, 1024], [1540, 14]), 2),
        "mmproj-qwen2vl" => qwen2vl(sizes([32, 16], [1280, 5120, 3584], [560, 14])),
        "mmproj-qwen2.5vl" => qwen25vl(sizes([32, 16], [1280, 3420, 3584], [560, 14])),
        "mmproj-qwen3vl" => qwen3vl(sizes([27, 16], [1152, 4304, 4096], [768, 16])),
        "mmproj-ultravox" => ultravox(whisper(4096)),
        "mmproj-voxtral" => voxtral(whisper(3072)),
        "mmproj-qwen2-audio" => qwen2_audio(whisper(4096)),
        "mmproj-music-flamingo" => music_flamingo(whisper(3584)),
        "mmproj-glm-asr" => glm_asr(whisper(4096)),
        "mmproj-qwen2.5-omni" => omni(sizes([32, 16], [1280, 3420, 3584], [560, 14]), whisper(3584)),
        _ => return others::projector(name, n_layers),
    };
    Some(file)
}

fn begin() -> Draft {
    let mut file = FileBuilder::new();
    file.set("general.architecture", "clip".to_owned());
    file.set("general.type", "mmproj".to_owned());
    file.set("general.name", "synthetic projector".to_owned());
    Draft { file, architecture: "clip", matrix_type: GgmlType::F16 }
}

/// The encoder's keys. `kind` is `vision` or `audio`.
fn encoder_keys(draft: &mut Draft, kind: &str, projector_type: &str, sizes: Sizes) {
    draft.key(&format!("has_{kind}_encoder"), true);
    draft.key(&format!("{kind}.projector_type"), projector_type.to_owned());
    let numbers = [
        ("embedding_length", sizes.n_embd),
        ("feed_forward_length", sizes.n_ff),
        ("block_count", sizes.n_layers),
        ("attention.head_count", sizes.n_heads),
        ("projection_dim", sizes.n_out),
    ];
    for (name, value) in numbers {
        draft.key(&format!("{kind}.{name}"), value);
    }
    draft.key(&format!("{kind}.attention.layer_norm_epsilon"), 1e-6_f32);
    if kind == "vision" {
        draft.key("vision.image_size", sizes.image);
        draft.key("vision.patch_size", sizes.patch);
        for name in ["vision.image_mean", "vision.image_std"] {
            draft.key(name, Value::Array(Array::F32(vec![0.5; 3])));
        }
    } else {
        draft.key("audio.num_mel_bins", 128_u32);
    }
}

fn begin_vision(projector_type: &str, sizes: Sizes) -> Draft {
    let mut draft = begin();
    encoder_keys(&mut draft, "vision", projector_type, sizes);
    draft
}

/// A norm's weight, and its bias.
fn norm(draft: &mut Draft, name: &str, n: u32, bias: bool) {
    draft.vector(&format!("{name}.weight"), &[n.into()]);
    if bias {
        draft.vector(&format!("{name}.bias"), &[n.into()]);
    }
}

/// A product's weight, and its bias.
fn linear(draft: &mut Draft, name: &str, from: u32, to: u32, bias: bool) {
    draft.matrix(&format!("{name}.weight"), &[from.into(), to.into()]);
    if bias {
        draft.vector(&format!("{name}.bias"), &[to.into()]);
    }
}

/// The layers of an encoder. `prefix` is `v` or `a`.
fn layers(draft: &mut Draft, prefix: &str, sizes: Sizes, style: Style) {
    let Sizes { n_embd, n_ff, .. } = sizes;
    for layer in 0..sizes.n_layers {
        let blk = |name: &str| format!("{prefix}.blk.{layer}.{name}");
        norm(draft, &blk("ln1"), n_embd, style.biases);
        if style.fused {
            linear(draft, &blk("attn_qkv"), n_embd, 3 * n_embd, style.biases);
        } else {
            for name in ["attn_q", "attn_k", "attn_v"] {
                linear(draft, &blk(name), n_embd, n_embd, style.biases && !(style.plain_keys && name == "attn_k"));
            }
        }
        linear(draft, &blk("attn_out"), n_embd, n_embd, style.biases);
        if style.scaled {
            draft.vector(&blk("ls1.weight"), &[n_embd.into()]);
            draft.vector(&blk("ls2.weight"), &[n_embd.into()]);
        }
        norm(draft, &blk("ln2"), n_embd, style.biases);
        linear(draft, &blk("ffn_up"), n_embd, n_ff, style.biases);
        if style.gate {
            linear(draft, &blk("ffn_gate"), n_embd, n_ff, style.biases);
        }
        linear(draft, &blk("ffn_down"), n_ff, n_embd, style.biases);
    }
}

fn patches(draft: &mut Draft, sizes: Sizes, name: &str) {
    draft.matrix(name, &[sizes.patch.into(), sizes.patch.into(), 3, sizes.n_embd.into()]);
}

fn positions(draft: &mut Draft, n_embd: u32, n_positions: u32) {
    draft.vector("v.position_embd.weight", &[n_embd.into(), n_positions.into()]);
}

impl Sizes {
    fn n_patches(self) -> u32 {
        (self.image / self.patch).pow(2)
    }
}

/// `with_norms` is the projector of Yi-VL: a norm behind each product.
fn llava(sizes: Sizes, with_norms: bool) -> FileBuilder {
    let mut draft = begin_vision("mlp", sizes);
    draft.vector("v.class_embd", &[sizes.n_embd.into()]);
    patches(&mut draft, sizes, "v.patch_embd.weight");
    positions(&mut draft, sizes.n_embd, sizes.n_patches() + 1);
    norm(&mut draft, "v.pre_ln", sizes.n_embd, true);
    layers(&mut draft, "v", sizes, PLAIN);
    linear(&mut draft, "mm.0", sizes.n_embd, sizes.n_out, true);
    if with_norms {
        norm(&mut draft, "mm.1", sizes.n_out, true);
        linear(&mut draft, "mm.3", sizes.n_out, sizes.n_out, true);
        norm(&mut draft, "mm.4", sizes.n_out, true);
    } else {
        linear(&mut draft, "mm.2", sizes.n_out, sizes.n_out, true);
    }
    draft.file
}

/// Four layers' outputs beside each other.
fn granite(sizes: Sizes) -> FileBuilder {
    let mut draft = siglip("mlp", sizes);
    draft.key("vision.feature_layer", Value::Array(Array::I32(vec![3, 7, 15, 26])));
    linear(&mut draft, "mm.0", 4 * sizes.n_embd, sizes.n_out, true);
    linear(&mut draft, "mm.2", sizes.n_out, sizes.n_out, true);
    draft.file
}

/// What SigLIP has around its layers.
fn siglip(projector_type: &str, sizes: Sizes) -> Draft {
    let mut draft = begin_vision(projector_type, sizes);
    draft.key("use_gelu", true);
    patches(&mut draft, sizes, "v.patch_embd.weight");
    draft.vector("v.patch_embd.bias", &[sizes.n_embd.into()]);
    positions(&mut draft, sizes.n_embd, sizes.n_patches());
    norm(&mut draft, "v.post_ln", sizes.n_embd, true);
    layers(&mut draft, "v", sizes, PLAIN);
    draft
}

fn gemma3(sizes: Sizes) -> FileBuilder {
    let mut draft = siglip("gemma3", sizes);
    draft.matrix("mm.input_projection.weight", &[sizes.n_out.into(), sizes.n_embd.into()]);
    draft.vector("mm.soft_emb_norm.weight", &[sizes.n_embd.into()]);
    draft.file
}

fn idefics3(sizes: Sizes, merge: u32) -> FileBuilder {
    let mut draft = siglip("idefics3", sizes);
    draft.key("vision.projector.scale_factor", merge);
    draft.key("vision.preproc_image_size", 4 * sizes.image);
    linear(&mut draft, "mm.model.fc", sizes.n_embd * merge * merge, sizes.n_out, false);
    draft.file
}

fn lfm2(sizes: Sizes) -> FileBuilder {
    let mut draft = siglip("lfm2", sizes);
    draft.key("vision.projector.scale_factor", 2_u32);
    norm(&mut draft, "mm.input_norm", 4 * sizes.n_embd, true);
    linear(&mut draft, "mm.1", 4 * sizes.n_embd, sizes.n_out, true);
    linear(&mut draft, "mm.2", sizes.n_out, sizes.n_out, true);
    draft.file
}

/// Two products behind SigLIP, by their names.
fn siglip_products(projector_type: &str, sizes: Sizes, [up, down]: [&str; 2]) -> FileBuilder {
    let mut draft = siglip(projector_type, sizes);
    linear(&mut draft, up, sizes.n_embd, sizes.n_out, true);
    linear(&mut draft, down, sizes.n_out, sizes.n_out, true);
    draft.file
}

fn phi4(sizes: Sizes) -> FileBuilder {
    let mut file = siglip_products("phi4", sizes, ["mm.0", "mm.2"]);
    file.set("clip.vision.image_min_pixels", 65_536_u32).set("clip.vision.image_max_pixels", 921_600_u32);
    file
}

fn internvl(sizes: Sizes) -> FileBuilder {
    let mut draft = begin_vision("internvl", sizes);
    draft.key("use_gelu", true);
    draft.key("vision.projector.scale_factor", 2_u32);
    draft.vector("v.class_embd", &[sizes.n_embd.into()]);
    patches(&mut draft, sizes, "v.patch_embd.weight");
    draft.vector("v.patch_embd.bias", &[sizes.n_embd.into()]);
    positions(&mut draft, sizes.n_embd, sizes.n_patches() + 1);
    layers(&mut draft, "v", sizes, Style { scaled: true, ..PLAIN });
    norm(&mut draft, "mm.model.mlp.0", 4 * sizes.n_embd, true);
    linear(&mut draft, "mm.model.mlp.1", 4 * sizes.n_embd, sizes.n_out, true);
    linear(&mut draft, "mm.model.mlp.3", sizes.n_out, sizes.n_out, true);
    draft.file
}

fn pixtral(projector_type: &str, sizes: Sizes, merge: u32) -> FileBuilder {
    let mut draft = begin_vision(projector_type, sizes);
    draft.key("use_silu", true);
    patches(&mut draft, sizes, "v.patch_embd.weight");
    norm(&mut draft, "v.pre_ln", sizes.n_embd, false);
    layers(&mut draft, "v", sizes, PIXTRAL);
    if merge > 1 {
        draft.key("vision.spatial_merge_size", merge);
        draft.vector("mm.input_norm.weight", &[sizes.n_embd.into()]);
        linear(&mut draft, "mm.patch_merger", sizes.n_embd * merge * merge, sizes.n_embd, false);
    }
    linear(&mut draft, "mm.1", sizes.n_embd, sizes.n_out, merge == 1);
    linear(&mut draft, "mm.2", sizes.n_out, sizes.n_out, merge == 1);
    if projector_type == "pixtral" {
        draft.vector("v.token_embd.img_break", &[sizes.n_out.into()]);
    }
    draft.file
}

/// Two frames of a film are one picture.
fn qwen_frames(draft: &mut Draft, sizes: Sizes) {
    patches(draft, sizes, "v.patch_embd.weight");
    patches(draft, sizes, "v.patch_embd.weight.1");
}

/// The frames, and the two halves of the projector behind the layers.
fn qwen_ends(draft: &mut Draft, sizes: Sizes) {
    qwen_frames(draft, sizes);
    linear(draft, "mm.0", 4 * sizes.n_embd, 4 * sizes.n_embd, true);
    linear(draft, "mm.2", 4 * sizes.n_embd, sizes.n_out, true);
}

fn qwen2vl(sizes: Sizes) -> FileBuilder {
    let mut draft = begin_vision("qwen2vl_merger", sizes);
    qwen_ends(&mut draft, sizes);
    norm(&mut draft, "v.post_ln", sizes.n_embd, true);
    layers(&mut draft, "v", sizes, PLAIN);
    draft.file
}

fn qwen25vl(sizes: Sizes) -> FileBuilder {
    let mut draft = begin_vision("qwen2.5vl_merger", sizes);
    qwen25vl_tensors(&mut draft, sizes);
    draft.file
}

fn qwen25vl_tensors(draft: &mut Draft, sizes: Sizes) {
    draft.key("use_silu", true);
    draft.key("vision.n_wa_pattern", 8_u32);
    qwen_ends(draft, sizes);
    norm(draft, "v.post_ln", sizes.n_embd, false);
    let Sizes { n_embd, n_ff, .. } = sizes;
    for layer in 0..sizes.n_layers {
        let blk = |name: &str| format!("v.blk.{layer}.{name}");
        for name in ["ln1", "ln2"] {
            norm(draft, &blk(name), n_embd, false);
        }
        for name in ["attn_q", "attn_k", "attn_v", "attn_out"] {
            linear(draft, &blk(name), n_embd, n_embd, true);
        }
        for name in ["ffn_up", "ffn_gate"] {
            linear(draft, &blk(name), n_embd, n_ff, true);
        }
        linear(draft, &blk("ffn_down"), n_ff, n_embd, true);
    }
}

fn qwen3vl(sizes: Sizes) -> FileBuilder {
    let mut draft = begin_vision("qwen3vl_merger", sizes);
    draft.key("use_gelu", true);
    qwen_ends(&mut draft, sizes);
    draft.vector("v.patch_embd.bias", &[sizes.n_embd.into()]);
    positions(&mut draft, sizes.n_embd, sizes.n_patches());
    norm(&mut draft, "v.post_ln", sizes.n_embd, true);
    layers(&mut draft, "v", sizes, Style { fused: true, ..PLAIN });
    for layer in [8, 16, 24] {
        let stack = |name: &str| format!("v.deepstack.{layer}.{name}");
        norm(&mut draft, &stack("norm"), 4 * sizes.n_embd, true);
        linear(&mut draft, &stack("fc1"), 4 * sizes.n_embd, 4 * sizes.n_embd, true);
        linear(&mut draft, &stack("fc2"), 4 * sizes.n_embd, sizes.n_out, true);
    }
    draft.file
}

/// Whisper's encoder: two convolutions over time, and layers.
fn whisper(draft: &mut Draft, projector_type: &str, sizes: Sizes, post_norm: bool) {
    encoder_keys(draft, "audio", projector_type, sizes);
    let n_embd = u64::from(sizes.n_embd);
    for (number, channels) in [(1, 128), (2, n_embd)] {
        draft.matrix(&format!("a.conv1d.{number}.weight"), &[3, channels, n_embd]);
        draft.vector(&format!("a.conv1d.{number}.bias"), &[1, n_embd]);
    }
    draft.vector("a.position_embd.weight", &[n_embd, 1500]);
    if post_norm {
        norm(draft, "a.post_ln", sizes.n_embd, true);
    }
    layers(draft, "a", sizes, WHISPER);
}

fn ultravox(sizes: Sizes) -> FileBuilder {
    let mut draft = begin();
    whisper(&mut draft, "ultravox", sizes, true);
    draft.key("audio.projector.stack_factor", 8_u32);
    draft.vector("mm.a.norm_pre.weight", &[8 * u64::from(sizes.n_embd)]);
    linear(&mut draft, "mm.a.mlp.1", 8 * sizes.n_embd, 4096, false);
    draft.vector("mm.a.norm_mid.weight", &[2048]);
    linear(&mut draft, "mm.a.mlp.2", 2048, sizes.n_out, false);
    draft.file
}

fn voxtral(sizes: Sizes) -> FileBuilder {
    let mut draft = begin();
    whisper(&mut draft, "voxtral", sizes, true);
    draft.key("audio.projector.stack_factor", 4_u32);
    linear(&mut draft, "mm.a.mlp.1", 4 * sizes.n_embd, sizes.n_out, false);
    linear(&mut draft, "mm.a.mlp.2", sizes.n_out, sizes.n_out, false);
    draft.file
}

fn qwen2_audio(sizes: Sizes) -> FileBuilder {
    let mut draft = begin();
    whisper(&mut draft, "qwen2a", sizes, true);
    linear(&mut draft, "mm.a.fc", sizes.n_embd, sizes.n_out, true);
    draft.file
}

fn music_flamingo(sizes: Sizes) -> FileBuilder {
    let mut draft = begin();
    whisper(&mut draft, "musicflamingo", sizes, true);
    linear(&mut draft, "mm.a.mlp.1", sizes.n_embd, sizes.n_out, true);
    linear(&mut draft, "mm.a.mlp.2", sizes.n_out, sizes.n_out, true);
    draft.file
}

fn glm_asr(sizes: Sizes) -> FileBuilder {
    let mut draft = begin();
    whisper(&mut draft, "glma", sizes, false);
    draft.key("audio.projector.stack_factor", 4_u32);
    norm(&mut draft, "mm.a.norm_pre", sizes.n_embd, true);
    linear(&mut draft, "mm.a.mlp.1", 4 * sizes.n_embd, 2 * sizes.n_out, true);
    linear(&mut draft, "mm.a.mlp.2", 2 * sizes.n_out, sizes.n_out, true);
    for name in ["v.boi", "v.eoi"] {
        draft.vector(name, &[sizes.n_out.into()]);
    }
    draft.file
}

fn omni(vision: Sizes, audio: Sizes) -> FileBuilder {
    let mut draft = begin_vision("qwen2.5o", vision);
    qwen25vl_tensors(&mut draft, vision);
    whisper(&mut draft, "qwen2.5o", audio, true);
    linear(&mut draft, "mm.a.fc", audio.n_embd, audio.n_out, true);
    draft.file
}
