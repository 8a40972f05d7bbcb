//! Projectors of newer or rarer kinds, among them those of which the estimate knows a bound only.

use super::{PIXTRAL, PLAIN, Sizes, Style, WHISPER, begin, begin_vision, encoder_keys, layers, linear, norm, patches};
use super::{qwen_frames, siglip, sizes};
use crate::gguf::{FileBuilder, Value};
use crate::synthetic::Draft;

pub(super) fn projector(name: &str, n_layers: Option<u32>) -> Option<FileBuilder> {
    let sizes = |layers_heads, embd_ff_out, image_patch| {
        let all = sizes(layers_heads, embd_ff_out, image_patch);
        Sizes { n_layers: n_layers.unwrap_or(all.n_layers), ..all }
    };
    let file = match name {
        "mmproj-gemma4" => gemma4(sizes([27, 16], [1152, 4304, 2560], [224, 16])),
        "mmproj-kimi-vl" => kimi(sizes([27, 16], [1152, 4304, 2048], [896, 14])),
        "mmproj-paddleocr" => paddleocr(sizes([27, 16], [1152, 4304, 1024], [378, 14])),
        "mmproj-dots-ocr" => dots_ocr(sizes([42, 12], [1536, 4224, 1536], [1120, 14])),
        "mmproj-minicpm-v" => resampler(sizes([27, 16], [1152, 4304, 3584], [448, 14])),
        "mmproj-glm4v" => glm4v(sizes([24, 12], [1536, 4096, 4096], [336, 14])),
        "mmproj-hunyuan" => hunyuan(sizes([27, 16], [1152, 4304, 1024], [2048, 16])),
        "mmproj-deepseek-ocr" => deepseek_ocr(sizes([24, 16], [1024, 4096, 1280], [1024, 14])),
        "mmproj-gemma3n" => gemma3n(sizes([128, 8], [2048, 8192, 2048], [768, 48])),
        "mmproj-qwen3-asr" => qwen3_asr(sizes([24, 16], [1024, 4096, 2048], [0, 0])),
        "mmproj-lfm2-audio" => lfm2_audio(sizes([17, 8], [512, 2048, 2048], [0, 0])),
        _ => return None,
    };
    Some(file)
}

/// Norms before and behind both blocks, and of each head.
fn gemma4(sizes: Sizes) -> FileBuilder {
    let mut draft = begin_vision("gemma4v", sizes);
    draft.key("use_gelu", true);
    patches(&mut draft, sizes, "v.patch_embd.weight");
    draft.vector("v.position_embd.weight", &[sizes.n_embd.into(), 10_240, 2]);
    layers(&mut draft, "v", sizes, PIXTRAL);
    for layer in 0..sizes.n_layers {
        let blk = |name: &str| format!("v.blk.{layer}.{name}");
        for name in ["attn_q_norm", "attn_k_norm"] {
            norm(&mut draft, &blk(name), sizes.n_embd / sizes.n_heads, false);
        }
        for name in ["attn_post_norm", "ffn_post_norm"] {
            norm(&mut draft, &blk(name), sizes.n_embd, false);
        }
    }
    linear(&mut draft, "mm.input_projection", sizes.n_embd, sizes.n_out, false);
    draft.file
}

fn merger(draft: &mut Draft, sizes: Sizes, width: u32, [up, down]: [&str; 2]) {
    norm(draft, "mm.input_norm", sizes.n_embd, true);
    linear(draft, up, width, width, true);
    linear(draft, down, width, sizes.n_out, true);
}

fn kimi(sizes: Sizes) -> FileBuilder {
    let mut draft = siglip("kimivl", sizes);
    draft.key("vision.projector.scale_factor", 2_u32);
    merger(&mut draft, sizes, 4 * sizes.n_embd, ["mm.1", "mm.2"]);
    draft.file
}

fn limits(draft: &mut Draft, least: u32, most: u32) {
    draft.key("vision.image_min_pixels", least);
    draft.key("vision.image_max_pixels", most);
}

fn paddleocr(sizes: Sizes) -> FileBuilder {
    let mut draft = siglip("paddleocr", sizes);
    limits(&mut draft, 147_384, 2_822_400);
    merger(&mut draft, sizes, 4 * sizes.n_embd, ["mm.1", "mm.2"]);
    draft.file
}

fn dots_ocr(sizes: Sizes) -> FileBuilder {
    let mut draft = begin_vision("dots_ocr", sizes);
    draft.key("use_silu", true);
    draft.key("vision.projector.scale_factor", 2_u32);
    limits(&mut draft, 3136, 11_289_600);
    patches(&mut draft, sizes, "v.patch_embd.weight");
    draft.vector("v.patch_embd.bias", &[sizes.n_embd.into()]);
    norm(&mut draft, "v.pre_ln", sizes.n_embd, false);
    layers(&mut draft, "v", sizes, Style { fused: true, ..PIXTRAL });
    norm(&mut draft, "mm.post_norm", sizes.n_embd, false);
    merger(&mut draft, sizes, 4 * sizes.n_embd, ["mm.0", "mm.2"]);
    draft.file
}

/// MiniCPM-V: 64 queries attend to all patches.
fn resampler(sizes: Sizes) -> FileBuilder {
    let mut draft = siglip("resampler", sizes);
    draft.file.set("clip.minicpmv_version", Value::I32(3)).set("clip.minicpmv_query_num", 64_u32);
    let n_out = sizes.n_out;
    draft.vector("resampler.pos_embed_k", &[n_out.into(), 4900]);
    draft.vector("resampler.query", &[n_out.into(), 64]);
    draft.matrix("resampler.proj.weight", &[n_out.into(), n_out.into()]);
    draft.matrix("resampler.kv.weight", &[sizes.n_embd.into(), n_out.into()]);
    for name in ["q", "k", "v", "out"] {
        linear(&mut draft, &format!("resampler.attn.{name}"), n_out, n_out, true);
    }
    for name in ["q", "kv", "post"] {
        norm(&mut draft, &format!("resampler.ln_{name}"), n_out, true);
    }
    draft.file
}

fn glm4v(sizes: Sizes) -> FileBuilder {
    let mut draft = begin_vision("glm4v", sizes);
    draft.key("use_silu", true);
    qwen_frames(&mut draft, sizes);
    draft.vector("v.patch_embd.bias", &[sizes.n_embd.into()]);
    norm(&mut draft, "v.norm_embd", sizes.n_embd, false);
    draft.vector("v.position_embd.weight", &[sizes.n_embd.into(), 576]);
    norm(&mut draft, "v.post_ln", sizes.n_embd, false);
    layers(&mut draft, "v", sizes, Style { fused: true, ..PIXTRAL });
    let (n_embd, n_out) = (u64::from(sizes.n_embd), sizes.n_out);
    draft.matrix("mm.patch_merger.weight", &[2, 2, n_embd, n_out.into()]);
    draft.vector("mm.patch_merger.bias", &[n_out.into()]);
    linear(&mut draft, "mm.model.fc", n_out, n_out, false);
    norm(&mut draft, "mm.post_norm", n_out, true);
    for name in ["mm.up", "mm.gate"] {
        linear(&mut draft, name, n_out, 13_696, false);
    }
    linear(&mut draft, "mm.down", 13_696, n_out, false);
    draft.file
}

/// Two convolutions behind the layers, and tokens around the picture.
fn hunyuan(sizes: Sizes) -> FileBuilder {
    let mut draft = siglip("hunyuanvl", sizes);
    let [n_embd, wide, wider] = [1, 2, 4].map(|n| n * u64::from(sizes.n_embd));
    draft.key("vision.spatial_merge_size", 2_u32);
    limits(&mut draft, 262_144, 4_194_304);
    norm(&mut draft, "mm.pre_norm", sizes.n_embd, false);
    draft.matrix("mm.0.weight", &[2, 2, n_embd, wide]);
    draft.vector("mm.0.bias", &[wide]);
    draft.matrix("mm.2.weight", &[1, 1, wide, wider]);
    draft.vector("mm.2.bias", &[wider]);
    draft.vector("v.image_newline", &[wider]);
    linear(&mut draft, "mm.model.fc", 4 * sizes.n_embd, sizes.n_out, true);
    for name in ["mm.image_begin", "mm.image_end"] {
        draft.vector(name, &[sizes.n_out.into()]);
    }
    norm(&mut draft, "mm.post_norm", sizes.n_out, false);
    draft.file
}

/// Segment Anything's encoder with windows, and CLIP's behind it.
fn deepseek_ocr(sizes: Sizes) -> FileBuilder {
    const SAM: u32 = 768;
    let mut draft = begin_vision("deepseekocr", sizes);
    for (name, value) in
        [("sam.block_count", 12), ("sam.head_count", 12), ("sam.embedding_length", SAM), ("window_size", 14)]
    {
        draft.key(&format!("vision.{name}"), value);
    }
    let sam = u64::from(SAM);
    draft.vector("v.sam.pos_embd.weight", &[sam, 64, 64]);
    draft.matrix("v.sam.patch_embd.weight", &[16, 16, 3, sam]);
    draft.vector("v.sam.patch_embd.bias", &[sam]);
    for layer in 0..12 {
        let blk = |name: &str| format!("v.sam.blk.{layer}.{name}");
        for name in ["pre_ln", "post_ln"] {
            norm(&mut draft, &blk(name), SAM, true);
        }
        let reach = if [2, 5, 8, 11].contains(&layer) { 127 } else { 27 };
        for name in ["attn.pos_h", "attn.pos_w"] {
            draft.vector(&blk(&format!("{name}.weight")), &[64, reach]);
        }
        linear(&mut draft, &blk("attn.qkv"), SAM, 3 * SAM, true);
        linear(&mut draft, &blk("attn.out"), SAM, SAM, true);
        linear(&mut draft, &blk("mlp.lin1"), SAM, 4 * SAM, true);
        linear(&mut draft, &blk("mlp.lin2"), 4 * SAM, SAM, true);
    }
    draft.matrix("v.sam.neck.0.weight", &[1, 1, sam, 256]);
    draft.matrix("v.sam.neck.2.weight", &[3, 3, 256, 256]);
    for name in ["v.sam.neck.1", "v.sam.neck.3"] {
        norm(&mut draft, name, 256, true);
    }
    draft.matrix("v.sam.net_2.weight", &[3, 3, 256, 512]);
    draft.matrix("v.sam.net_3.weight", &[3, 3, 512, 1024]);
    draft.vector("v.class_embd", &[sizes.n_embd.into()]);
    draft.vector("v.position_embd.weight", &[sizes.n_embd.into(), 257]);
    norm(&mut draft, "v.pre_ln", sizes.n_embd, true);
    layers(&mut draft, "v", sizes, Style { fused: true, ..PLAIN });
    linear(&mut draft, "mm.model.fc", 2 * sizes.n_embd, sizes.n_out, true);
    for name in ["v.image_newline", "v.view_seperator"] {
        draft.vector(name, &[sizes.n_out.into()]);
    }
    draft.file
}

/// A convolution in two dimensions, and the norm behind it.
fn convolution(draft: &mut Draft, names: [&str; 2], dims: [u64; 4]) {
    draft.matrix(&format!("{}.weight", names[0]), &dims);
    draft.vector(&format!("{}.weight", names[1]), &[dims[3]]);
}

/// MobileNet-V5: four stages of convolutions, in the last two with attention in every other block.
fn gemma3n(sizes: Sizes) -> FileBuilder {
    let mut draft = begin_vision("gemma3nv", sizes);
    convolution(&mut draft, ["v.conv_stem.conv", "v.conv_stem.bn"], [3, 3, 3, 64]);
    draft.vector("v.conv_stem.conv.bias", &[1, 1, 64]);
    for (block, channels) in [64, 128, 128].into_iter().enumerate() {
        let blk = |name: &str| format!("v.blk.0.{block}.{name}");
        convolution(&mut draft, [&blk("conv_exp"), &blk("bn1")], [3, 3, channels, 4 * channels]);
        convolution(&mut draft, [&blk("conv_pwl"), &blk("bn2")], [1, 1, 4 * channels, 128]);
    }
    for (stage, before, channels, n_blocks) in [(1, 128, 256, 5), (2, 256, 640, 37), (3, 640, 1280, 39)] {
        for block in 0..n_blocks {
            let blk = |name: &str| format!("v.blk.{stage}.{block}.{name}");
            draft.vector(&blk("layer_scale.gamma"), &[1, 1, channels]);
            if stage > 1 && block % 2 == 1 {
                let (n_heads, head) = if stage == 2 { (12, 64) } else { (16, 96) };
                draft.vector(&blk("norm.weight"), &[channels]);
                for (part, n_out) in [("query", n_heads * head), ("key", head), ("value", head)] {
                    draft.matrix(&blk(&format!("attn.{part}.proj.weight")), &[1, 1, channels, n_out]);
                    if stage == 2 && part != "query" {
                        let names =
                            [format!("attn.{part}.down_conv"), format!("attn.{part}.norm")].map(|name| blk(&name));
                        convolution(&mut draft, [&names[0], &names[1]], [3, 3, 1, channels]);
                    }
                }
                draft.matrix(&blk("attn.output.proj.weight"), &[1, 1, n_heads * head, channels]);
                continue;
            }
            let from = if block == 0 { before } else { channels };
            convolution(&mut draft, [&blk("dw_start.conv"), &blk("dw_start.bn")], [5, 5, 1, from]);
            convolution(&mut draft, [&blk("pw_exp.conv"), &blk("pw_exp.bn")], [1, 1, from, 4 * from]);
            if block == 0 {
                convolution(&mut draft, [&blk("dw_mid.conv"), &blk("dw_mid.bn")], [5, 5, 1, 4 * from]);
            }
            convolution(&mut draft, [&blk("pw_proj.conv"), &blk("pw_proj.bn")], [1, 1, 4 * from, channels]);
        }
    }
    let n_embd = u64::from(sizes.n_embd);
    convolution(&mut draft, ["v.msfa.ffn.pw_exp.conv", "v.msfa.ffn.pw_exp.bn"], [1, 1, 1920, 3840]);
    convolution(&mut draft, ["v.msfa.ffn.pw_proj.conv", "v.msfa.ffn.pw_proj.bn"], [1, 1, 3840, n_embd]);
    draft.vector("v.msfa.norm.weight", &[n_embd]);
    draft.vector("mm.soft_emb_norm.weight", &[n_embd]);
    linear(&mut draft, "mm.input_projection", sizes.n_embd, sizes.n_out, false);
    draft.file
}

/// Three convolutions in two dimensions over pieces of a second.
fn qwen3_asr(sizes: Sizes) -> FileBuilder {
    let mut draft = begin();
    encoder_keys(&mut draft, "audio", "qwen3a", sizes);
    for (number, channels) in [(1, 1), (2, 480), (3, 480)] {
        draft.matrix(&format!("a.conv2d.{number}.weight"), &[3, 3, channels, 480]);
        draft.vector(&format!("a.conv2d.{number}.bias"), &[480]);
    }
    linear(&mut draft, "a.conv_out", 480 * 16, sizes.n_embd, false);
    draft.vector("a.position_embd.weight", &[sizes.n_embd.into(), 1500]);
    norm(&mut draft, "a.post_ln", sizes.n_embd, true);
    layers(&mut draft, "a", sizes, WHISPER);
    linear(&mut draft, "mm.a.mlp.1", sizes.n_embd, sizes.n_embd, true);
    linear(&mut draft, "mm.a.mlp.2", sizes.n_embd, sizes.n_out, true);
    draft.file
}

/// A conformer: attention by distance, convolutions in each layer, two feed-forward blocks.
fn lfm2_audio(sizes: Sizes) -> FileBuilder {
    let mut draft = begin();
    encoder_keys(&mut draft, "audio", "lfm2a", sizes);
    let n_embd = u64::from(sizes.n_embd);
    for (number, dims) in
        [(0, [3, 3, 1, 256]), (2, [3, 3, 1, 256]), (3, [1, 1, 256, 256]), (5, [3, 3, 1, 256]), (6, [1, 1, 256, 256])]
    {
        draft.matrix(&format!("a.conv1d.{number}.weight"), &dims);
        draft.vector(&format!("a.conv1d.{number}.bias"), &[1, 1, 256]);
    }
    linear(&mut draft, "a.pre_encode.out", 4096, sizes.n_embd, true);
    draft.vector("a.position_embd.weight", &[n_embd, 9999]);
    layers(&mut draft, "a", sizes, PLAIN);
    for layer in 0..sizes.n_layers {
        let blk = |name: &str| format!("a.blk.{layer}.{name}");
        for name in ["ffn_norm", "ffn_norm_1", "norm_conv", "conv_norm"] {
            norm(&mut draft, &blk(name), sizes.n_embd, true);
        }
        linear(&mut draft, &blk("ffn_up_1"), sizes.n_embd, sizes.n_ff, true);
        linear(&mut draft, &blk("ffn_down_1"), sizes.n_ff, sizes.n_embd, true);
        for name in ["pos_bias_u", "pos_bias_v"] {
            draft.vector(&blk(name), &[n_embd / u64::from(sizes.n_heads), sizes.n_heads.into()]);
        }
        linear(&mut draft, &blk("linear_pos"), sizes.n_embd, sizes.n_embd, false);
        draft.vector(&blk("conv_dw.weight"), &[9, n_embd]);
        draft.vector(&blk("conv_dw.bias"), &[n_embd]);
        linear(&mut draft, &blk("conv_pw1"), sizes.n_embd, 2 * sizes.n_embd, true);
        linear(&mut draft, &blk("conv_pw2"), sizes.n_embd, sizes.n_embd, true);
    }
    norm(&mut draft, "mm.a.mlp.0", sizes.n_embd, true);
    linear(&mut draft, "mm.a.mlp.1", sizes.n_embd, sizes.n_out, true);
    linear(&mut draft, "mm.a.mlp.3", sizes.n_out, sizes.n_out, true);
    draft.file
}
