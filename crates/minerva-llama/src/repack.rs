//! Which weights the CPU backend keeps in a layout of its own.

use crate::{ExtraBuffers, cpu_features, extra_buffers};

/// Types that are repacked for this CPU's matrix code, by ggml's names; none with extra buffers off.
///
/// Source: `ggml_repack_get_optimal_repack_type` in ggml-cpu/repack.cpp and `supports_op` in ggml-cpu/amx/amx.cpp.
pub fn repacked_types(use_extra_buffers: bool) -> Vec<&'static str> {
    if !use_extra_buffers || extra_buffers() != ExtraBuffers::Usable {
        return Vec::new();
    }
    let features = cpu_features();
    let has = |prefix: &str| features.iter().any(|feature| feature.starts_with(prefix));
    let mut types = Vec::new();
    if has("AVX2") {
        types.extend(["q4_0", "q4_K", "iq4_nl", "mxfp4"]);
    }
    if has("AVX512") {
        types.push("q2_K");
    }
    if has("AMX") {
        types.extend(["f16", "q4_1", "q8_0", "q5_K", "q6_K", "iq4_xs"]);
    }
    if has("DOTPROD") || has("MATMUL_INT8") {
        types.extend(["q1_0", "q4_0", "q4_K", "q5_K", "q6_K", "q8_0", "iq4_nl", "mxfp4"]);
    }
    types
}
