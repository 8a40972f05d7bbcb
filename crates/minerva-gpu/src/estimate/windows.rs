//! Which layers see only a window of past tokens: each architecture's own rule.

use super::EstimateError;
use super::model::Layer;
use crate::gguf::{Array, Metadata, Value};

/// An architecture with sliding windows, as its loader in llama.cpp's `src/models/` sets it up.
struct Rule {
    architecture: &'static str,
    /// Of so many layers one sees everything.
    period: u32,
    /// The first of a period sees everything, otherwise the last.
    dense_first: bool,
    /// The window where the file names none; 0 is no window at all.
    default_tokens: u32,
}

const fn rule(architecture: &'static str, period: u32, dense_first: bool, default_tokens: u32) -> Rule {
    Rule { architecture, period, dense_first, default_tokens }
}

/// Source: `load_arch_hparams` of each model at the pinned release.
const RULES: [Rule; 20] = [
    rule("afmoe", 4, false, 0),
    rule("cohere2", 4, false, 4096),
    rule("cohere2moe", 4, true, 4096),
    rule("exaone-moe", 4, false, 128),
    rule("exaone4", 4, false, 4096),
    rule("gemma-embedding", 6, false, 512),
    rule("gemma2", 2, false, 4096),
    rule("gemma3", 6, false, 0),
    rule("gemma3n", 5, false, 512),
    rule("gemma4", 6, false, 512),
    rule("gpt-oss", 2, false, 128),
    rule("granite-swa", 4, false, 4096),
    rule("laguna", 4, true, 0),
    rule("llama4", 4, false, 8192),
    rule("mellum", 4, false, 0),
    rule("modern-bert", 3, true, 0),
    rule("muse-glimmer", 4, false, 4096),
    rule("olmo2", 4, false, 0),
    rule("plamo3", 8, false, 0),
    rule("smallthinker", 4, true, 0),
];

/// Architectures that name their windowed layers in the file.
const BY_LIST: [&str; 6] = ["mimo2", "step35", "maple", "spark2-5", "gemma4", "granite-swa"];

/// Models whose window is in the file but not in use.
const IGNORED: [&str; 1] = ["phi3"];

/// Marks the windowed layers and answers the window in tokens; 0 without one.
pub(super) fn apply(
    architecture: &str,
    metadata: &Metadata,
    layers: &mut [Layer],
    n_layers: u32,
) -> Result<u64, EstimateError> {
    let rule = RULES.iter().find(|rule| rule.architecture == architecture);
    let is_known = rule.is_some() || BY_LIST.contains(&architecture);
    if !is_known || IGNORED.contains(&architecture) {
        return Ok(0);
    }
    let key = |name: &str| format!("{architecture}.attention.{name}");
    let named = metadata.u32(&key("sliding_window"))?;
    let window_tokens = match (architecture, named) {
        // Llama 4 has chunks of a fixed size unless the file says 0.
        ("llama4", Some(0)) => 0,
        ("llama4", _) => 8192,
        // A 4096 window is Exaone 4's only in its largest size.
        ("exaone4", None) if n_layers != 64 => 0,
        (_, Some(tokens)) => tokens,
        (_, None) => rule.map_or(0, |rule| rule.default_tokens),
    };
    if window_tokens == 0 {
        return Ok(0);
    }
    let pattern = key("sliding_window_pattern");
    let listed = match metadata.get(&pattern) {
        Some(Value::Array(Array::Bool(flags))) => Some(flags.clone()),
        Some(Value::Array(_)) => {
            metadata.u32_per_layer(&pattern, n_layers)?.map(|flags| flags.iter().map(|&flag| flag != 0).collect())
        }
        _ => None,
    };
    let period = match listed {
        None => metadata.u32(&pattern)?.or(rule.map(|rule| rule.period)).unwrap_or(1),
        Some(_) => 1,
    };
    let dense_first = rule.is_some_and(|rule| rule.dense_first);
    for (il, layer) in (0..n_layers).zip(layers.iter_mut()) {
        layer.is_windowed = match &listed {
            Some(flags) => flags.get(il as usize).copied().unwrap_or(false),
            None if period == 0 => true,
            None if dense_first => !il.is_multiple_of(period),
            None => il % period < period - 1,
        };
    }
    let size = |name: &str| metadata.u32(&key(name));
    let (head_k, head_v) = (size("key_length_swa")?, size("value_length_swa")?);
    for layer in layers.iter_mut().filter(|layer| layer.is_windowed) {
        layer.head_k = head_k.map_or(layer.head_k, u64::from);
        layer.head_v = head_v.map_or(layer.head_v, u64::from);
    }
    Ok(window_tokens.into())
}
